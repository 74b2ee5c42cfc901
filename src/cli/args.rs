//! Arguments that several verbs share.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::error::{Error, Kind, Result};
use crate::image::{LinkSettings, Ssh};
use crate::link::limit::{Limit, parse_rate};
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
    /// Log in with this private key
    #[arg(help_heading = "Link", short = 'i', long, value_name = "FILE")]
    pub identity_file: Option<PathBuf>,

    /// Port of the server, where the location names none
    #[arg(help_heading = "Link", long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub ssh_port: Option<u16>,

    /// Configuration file for ssh instead of ~/.ssh/config
    #[arg(help_heading = "Link", long, value_name = "FILE")]
    pub ssh_config: Option<PathBuf>,

    /// Pass an option to ssh as `ssh -o OPTION`; may be repeated
    #[arg(help_heading = "Link", long, value_name = "OPTION")]
    pub ssh_option: Vec<String>,

    /// Who speaks SSH
    #[arg(help_heading = "Link", long, value_name = "WHO", value_enum, default_value_t = SshArg::System)]
    pub ssh: SshArg,

    /// Run this instead of ssh: its standard input and output must speak SFTP. Split into words
    /// as a shell does; no shell is run
    #[arg(
        help_heading = "Link",
        long,
        value_name = "COMMAND",
        conflicts_with_all = ["ssh_option", "ssh_config", "ssh_port", "identity_file", "ssh"]
    )]
    pub ssh_command: Option<String>,

    /// Use this many SFTP channels, 1 to 8, instead of as many as the link asks for
    #[arg(help_heading = "Link", long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub channels: Option<u8>,

    /// How long a broken link is dialled again before the run fails: `90s`, `10m`, `2h`; 0 fails
    /// at the first break [default: 10m]
    #[arg(help_heading = "Link", long, value_name = "DURATION", value_parser = parse_duration)]
    pub io_deadline: Option<Duration>,

    /// How long what a broken connection had sent may still reach the server. The end of a run
    /// waits for it [default: 30s, and 5m after a connection that fell silent]
    #[arg(help_heading = "Link", long, value_name = "DURATION", value_parser = parse_duration)]
    pub late_writes: Option<Duration>,

    /// Move at most so many bytes per second in each direction: 20M, 500K, 2MB
    #[arg(help_heading = "Link", long, value_name = "RATE", value_parser = parse_rate)]
    pub limit_rate: Option<u64>,

    /// The same for what is sent to the server
    #[arg(help_heading = "Link", long, value_name = "RATE", value_parser = parse_rate)]
    pub limit_upload: Option<u64>,

    /// The same for what is fetched from it
    #[arg(help_heading = "Link", long, value_name = "RATE", value_parser = parse_rate)]
    pub limit_download: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SshArg {
    /// The ssh program, with your ssh configuration
    System,
    /// Ourselves, where no ssh program is installed: host keys must be in known_hosts; ssh_config,
    /// jump hosts and hardware keys are not supported
    BuiltIn,
}

impl ImageArgs {
    pub fn location(&self) -> Result<Location> {
        let usage = |why| Error::new(Kind::Usage, why);
        self.location.parse().map_err(usage)
    }

    pub fn link(&self) -> Result<LinkSettings> {
        let args = &self.link;
        let ssh = match args.ssh {
            SshArg::System => Ssh::System,
            SshArg::BuiltIn => Ssh::BuiltIn,
        };
        if ssh == Ssh::BuiltIn && (args.ssh_config.is_some() || !args.ssh_option.is_empty()) {
            return Err(Error::new(
                Kind::Usage,
                "--ssh-option and --ssh-config are for the ssh program, not for `--ssh built-in`",
            ));
        }
        // The session runs elsewhere: what is relative here must not be so there.
        let absolute =
            |file: &Option<PathBuf>| file.as_deref().map(std::path::absolute).transpose();
        Ok(LinkSettings {
            ssh,
            port: args.ssh_port,
            identity_file: absolute(&args.identity_file)?,
            ssh_config: match args.ssh_config.as_deref() == Some(Path::new("none")) {
                true => args.ssh_config.clone(), // ssh's word for no file at all
                false => absolute(&args.ssh_config)?,
            },
            ssh_options: args.ssh_option.clone(),
            command: args.ssh_command.clone(),
            limit: Limit {
                upload: args.limit_upload.or(args.limit_rate),
                download: args.limit_download.or(args.limit_rate),
            },
            interactive: ui::has_terminal(),
            channels: args.channels.map(usize::from),
            io_deadline: args.io_deadline,
            late_writes: args.late_writes,
        })
    }
}

#[derive(Args)]
pub struct OutputArgs {
    /// Print only trouble
    #[arg(short, long)]
    pub quiet: bool,
}
