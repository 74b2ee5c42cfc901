use std::path::PathBuf;

use crate::browse::{Shown, View};
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::key::KeyArgs;
use crate::cli::look::Look;
use crate::cli::{Ending, unmounted};
use crate::error::{Attempt, Result};
use crate::session;
use crate::ui::say;

/// Show all snapshots in a directory, to look around
///
/// A read-only view through FUSE, as an ordinary user: DIR/<snapshot>/... and DIR/latest. It lasts
/// until `umount DIR` or Ctrl-C. No lease is taken; what later backups add is not shown.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// An empty directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let doing = || format!("cannot show {location} in {}", args.directory.display());
    // Before anybody types a passphrase.
    Shown::check(&args.directory).attempt(doing)?;
    let (signals, stop) = session::count_signals()?;
    let show = || -> Result<Shown> {
        let mut keys = args.key.keys(&args.image.location, signals)?;
        let look = Look::over(unmounted::open(&location, &args.image.link()?, &mut keys)?)?;
        let snapshots = look.catalogue.complete.iter();
        let snapshots: Result<Vec<(String, u32)>> = snapshots
            .map(|found| Ok((found.id.to_string(), look.directory(found.id)?)))
            .collect();
        Shown::mount(View::new(look.filesystem, snapshots?), &args.directory)
    };
    let shown = show().attempt(doing)?;
    if !args.output.quiet {
        let directory = args.directory.display();
        say!("showing the snapshots in {directory}; `umount {directory}` or Ctrl-C ends it");
    }
    shown.wait(&stop).attempt(doing)?;
    Ok(Ending::Clean)
}
