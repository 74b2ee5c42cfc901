use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::key::KeyArgs;
use crate::error::{Attempt, Result};
use crate::host;
use crate::session::{self, Place, Plan, Session};
use crate::ui::say;
use crate::ui::{Style, Terminal};
use crate::units::parse_duration;

/// Mount an image; `e2ebak umount` or umount(8) ends it
///
/// The filesystem in the image appears at DIR, served by a process in the background.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// An empty directory
    #[arg(value_name = "DIR")]
    mountpoint: PathBuf,

    /// Write nothing and take no lease
    #[arg(short, long)]
    read_only: bool,

    /// Stay in the foreground; Ctrl-C unmounts, and the exit code is 130 then
    #[arg(short, long)]
    foreground: bool,

    /// How long to wait while somebody else holds the image, for example 30m
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "0")]
    wait: Duration,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let (signals, _) = session::count_signals()?;
    let mut keys = args.key.keys(&location.to_string(), signals.clone())?;
    let terminal = Arc::new(Terminal::new(Style::choose(args.output.quiet, false)));
    let start = || {
        // Before anybody types a passphrase.
        host::mount::check_mountpoint(&args.mountpoint)?;
        let plan = Plan {
            location: args.image.location.clone(),
            link: args.image.link()?,
            read_only: args.read_only,
            wait: args.wait,
            place: Place::Public(args.mountpoint.clone()),
        };
        Session::start(&plan, &mut keys, signals, terminal.clone())
    };
    let started = start();
    terminal.finish();
    let session =
        started.attempt(|| format!("cannot mount {location} at {}", args.mountpoint.display()))?;
    if !args.output.quiet {
        let how = if args.read_only { ", read-only" } else { "" };
        say!("mounted {location} at {}{how}", args.mountpoint.display());
    }
    if !args.foreground {
        session.detach()?;
        return Ok(Ending::Clean);
    }
    match session.wait() {
        Ok(_) => {
            if !args.output.quiet {
                say!("unmounted {}", args.mountpoint.display());
            }
            Ok(Ending::Clean)
        }
        Err(error) => Err(error),
    }
}
