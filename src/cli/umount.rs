use std::path::PathBuf;

use crate::cli::Ending;
use crate::cli::args::OutputArgs;
use crate::error::{Attempt, Result};
use crate::session::{self, Closed};
use crate::ui::{Style, Terminal};
use crate::ui::{say, tell};
use crate::units::Bytes;

/// Unmount what `e2ebak mount` mounted
///
/// Returns when every byte is synced on the server and the lease is released. A plain umount(8)
/// does the same, but only says so by having returned. While the server is out of reach it waits.
#[derive(clap::Args)]
pub struct Args {
    /// The mountpoint
    #[arg(value_name = "DIR")]
    mountpoint: PathBuf,

    /// End a session that gets no further for 10 s, and lose what it has not yet stored; unmount
    /// though files are open
    #[arg(short, long)]
    force: bool,

    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let terminal = Terminal::new(Style::choose(args.output.quiet, false));
    let closed = session::close_mount(&args.mountpoint, args.force, &terminal);
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
        Closed::Forced { owed, held } => {
            let at = args.mountpoint.display();
            let lost = match owed {
                Some(0) => "what the kernel still held for it is lost".into(),
                Some(owed) => format!(
                    "{} that it had accepted, and what the kernel still held for it, are lost",
                    Bytes(owed)
                ),
                None => "what it had not yet stored is lost".into(),
            };
            tell!("warning: the session that served {at} was ended by force; {lost}");
            if let Some(held) = held {
                tell!("warning: its loop device is still {held}, and is freed when they end");
            }
            Ok(Ending::Warnings)
        }
    }
}
