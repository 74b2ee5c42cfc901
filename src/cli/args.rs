//! Arguments that several verbs share.

use std::time::Duration;

use clap::Args;

use crate::error::{Error, Kind, Result};
use crate::image::LinkSettings;
use crate::location::Location;
use crate::ui;
use crate::units::parse_duration;

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

    /// Use this many SFTP channels, 1 to 8, instead of as many as the link asks for
    #[arg(long, value_name = "N", help_heading = "Link", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub channels: Option<u8>,

    /// How long a broken link is dialled again before the run fails: `90s`, `10m`, `2h`; 0 fails
    /// at the first break [default: 10m]
    #[arg(long, value_name = "DURATION", help_heading = "Link", value_parser = parse_duration)]
    pub io_deadline: Option<Duration>,

    /// How long what a broken connection had sent may still reach the server. The end of a run
    /// waits for it [default: 30s, and 5m after a connection that fell silent]
    #[arg(long, value_name = "DURATION", help_heading = "Link", value_parser = parse_duration)]
    pub late_writes: Option<Duration>,
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
            channels: self.link.channels.map(usize::from),
            io_deadline: self.link.io_deadline,
            late_writes: self.link.late_writes,
        }
    }
}

#[derive(Args)]
pub struct OutputArgs {
    /// Print only trouble
    #[arg(short, long)]
    pub quiet: bool,
}
