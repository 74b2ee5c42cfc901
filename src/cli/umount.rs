use std::path::PathBuf;

use crate::cli::Ending;
use crate::cli::args::OutputArgs;
use crate::error::{Attempt, Result};
use crate::session::{self, Closed};
use crate::ui::{Style, Terminal};
use crate::ui::{say, tell};

/// Unmount what `e2ebak mount` mounted
///
/// Returns when every byte is synced on the server and the lease is released. A plain umount(8)
/// does the same, but only says so by having returned.
#[derive(clap::Args)]
pub struct Args {
    /// The mountpoint
    #[arg(value_name = "DIR")]
    mountpoint: PathBuf,

    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let terminal = Terminal::new(Style::choose(args.output.quiet, false));
    let closed = session::close_mount(&args.mountpoint, &terminal);
    terminal.finish();
    match closed.attempt(|| format!("cannot unmount {}", args.mountpoint.display()))? {
        Closed::Synced => {
            if !args.output.quiet {
                say!("unmounted {}", args.mountpoint.display());
            }
            Ok(Ending::Clean)
        }
        Closed::Lost => {
            tell!(
                "warning: the process that served {} was gone; what it had not yet synced is lost",
                args.mountpoint.display()
            );
            Ok(Ending::Warnings)
        }
    }
}
