use std::sync::Arc;
use std::time::Duration;

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::key::KeyArgs;
use crate::cli::mounted;
use crate::error::{Attempt, Result};
use crate::snapshot::{self, Catalogue, MountedFiles};
use crate::ui::say;
use crate::ui::{Style, Terminal};

/// Keep a snapshot whatever the policy says, until it is unpinned
///
/// `e2ebak snapshots` shows which are pinned.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,
}

#[derive(clap::Args)]
pub struct Which {
    #[command(flatten)]
    image: ImageArgs,

    /// An id, the beginning of one, or `latest`
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    set(args.which, true)
}

/// Pins or unpins.
pub fn set(args: Which, pinned: bool) -> Result<Ending> {
    let location = args.image.location()?;
    let name = &args.snapshot;
    let (verb, done) = match pinned {
        true => ("pin", "pinned"),
        false => ("unpin", "unpinned"),
    };
    let terminal = Arc::new(Terminal::new(Style::choose(args.output.quiet, false)));
    let work = |inside: &mounted::Inside| {
        let catalogue = Catalogue::load(&mut MountedFiles(inside.root.into()))?;
        let id = catalogue.find(name)?.id;
        Ok((id, snapshot::pin(inside.root, id, pinned)?))
    };
    let changed = mounted::with(
        &args.image,
        &args.key,
        false,
        Duration::ZERO,
        &terminal,
        work,
    );
    let (id, changed) = changed.attempt(|| format!("cannot {verb} {name} in {location}"))?;
    if !args.output.quiet {
        match changed {
            true => say!("{done} {id}"),
            false => say!("{id} was {done} already"),
        }
    }
    Ok(Ending::Clean)
}
