//! Arguments that several verbs share.

use clap::Args;

use crate::error::{Error, Kind, Result};
use crate::image::LinkSettings;
use crate::location::Location;
use crate::ui;

#[derive(Args)]
pub struct ImageArgs {
    /// Where the image is: host:path, sftp://host/path or a local path
    #[arg(value_name = "LOCATION")]
    pub location: String,

    #[command(flatten)]
    pub link: LinkArgs,
}

#[derive(Args)]
pub struct LinkArgs {
    /// Pass an option to ssh as `ssh -o OPTION`; may be repeated
    #[arg(long, value_name = "OPTION", help_heading = "Link")]
    pub ssh_option: Vec<String>,

    /// Run this instead of ssh: its standard input and output must speak SFTP. Split into words
    /// as a shell does; no shell is run
    #[arg(
        long,
        value_name = "COMMAND",
        help_heading = "Link",
        conflicts_with = "ssh_option"
    )]
    pub ssh_command: Option<String>,
}

impl ImageArgs {
    pub fn location(&self) -> Result<Location> {
        let usage = |why| Error::new(Kind::Usage, why);
        self.location.parse().map_err(usage)
    }

    pub fn link(&self) -> LinkSettings {
        LinkSettings {
            ssh_options: self.link.ssh_option.clone(),
            command: self.link.ssh_command.clone(),
            interactive: ui::has_terminal(),
        }
    }
}

#[derive(Args)]
pub struct OutputArgs {
    /// Print only trouble
    #[arg(short, long)]
    pub quiet: bool,
}
