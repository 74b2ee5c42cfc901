use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::key::KeyArgs;
use crate::error::{Attempt, Error, Kind, Result};
use crate::restore::{self, MountedTree, Options, Outcome, Overwrite};
use crate::session::{self, Place, Plan, Session};
use crate::snapshot::{Catalogue, DIRECTORY, MountedFiles};
use crate::ui::{Style, Terminal};
use crate::ui::{say, tell};
use crate::units::Bytes;

/// Copy a path out of a snapshot
///
/// As `cp -a`: into DEST when it is a directory, else as DEST. Nothing that exists is replaced
/// without --overwrite, and nothing outside DEST is written. SNAPSHOT is an id, the beginning of
/// one, or `latest`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// What to restore; without :PATH everything in the snapshot
    #[arg(value_name = "SNAPSHOT[:PATH]")]
    what: OsString,

    /// Where to
    #[arg(value_name = "DEST")]
    destination: PathBuf,

    /// Replace files that exist
    #[arg(long)]
    overwrite: bool,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let link = args.image.link()?;
    let (name, path) = split(&args.what)?;
    let terminal = Arc::new(Terminal::new(Style::choose(args.output.quiet, false)));
    let doing = || format!("cannot restore {} from {location}", args.what.display());
    // Before any thread: a user namespace takes only a process that has one.
    let private = session::enter_private().attempt(doing)?;
    let (signals, stop) = session::count_signals()?;
    let mut keys = args.key.keys(&location.to_string(), signals.clone())?;
    let plan = Plan {
        location: args.image.location.clone(),
        link,
        read_only: true,
        wait: Duration::ZERO,
        place: Place::Private(private),
    };
    let started = Session::start(&plan, &mut keys, signals, terminal.clone());
    let session = started.inspect_err(|_| terminal.finish()).attempt(doing)?;
    let copy = || {
        let catalogue = Catalogue::load(&mut MountedFiles(session.mounted_at().into()))?;
        let id = catalogue.find(&name)?.id;
        let mut tree =
            MountedTree::open(&session.mounted_at().join(DIRECTORY).join(id.to_string()))?;
        let overwrite = if args.overwrite {
            Overwrite::Always
        } else {
            Overwrite::Never
        };
        let options = Options {
            overwrite,
            stop: &stop,
        };
        restore::copy(&mut tree, &path, &args.destination, options, &*terminal)
    };
    let copied = copy();
    let closed = session.close();
    terminal.finish();
    let outcome = match (copied, closed) {
        (Ok(outcome), closed) => closed.map(|_| outcome),
        // What ended the session is the cause of what the copier saw of it.
        (Err(copied), Err(closed)) if copied.kind() == Kind::Io => Err(closed),
        (Err(copied), _) => Err(copied),
    };
    Ok(summary(&args, &outcome.attempt(doing)?))
}

/// `SNAPSHOT` or `SNAPSHOT:PATH`; no id has a colon.
fn split(what: &OsStr) -> Result<(String, PathBuf)> {
    let bytes = what.as_bytes();
    let (name, path) = match bytes.iter().position(|b| *b == b':') {
        Some(colon) => (&bytes[..colon], &bytes[colon + 1..]),
        None => (bytes, &b"/"[..]),
    };
    let path = if path.is_empty() { &b"/"[..] } else { path };
    match std::str::from_utf8(name) {
        Ok(name) if !name.is_empty() => Ok((name.into(), OsStr::from_bytes(path).into())),
        _ => {
            let why = format!("`{}` does not begin with a snapshot", what.display());
            Err(Error::new(Kind::Usage, why)
                .hint("write SNAPSHOT:PATH, for example latest:/etc/fstab"))
        }
    }
}

fn summary(args: &Args, outcome: &Outcome) -> Ending {
    if !args.output.quiet {
        say!(
            "restored {} files and {} directories, {}",
            outcome.files,
            outcome.directories,
            Bytes(outcome.bytes)
        );
        notes(outcome);
    }
    let existing = &outcome.skipped_existing;
    if existing.count() > 0 {
        tell!(
            "warning: {} files that exist were left as they are (--overwrite replaces them):",
            existing.count()
        );
        list(
            existing
                .listed()
                .iter()
                .map(|path| path.display().to_string()),
            existing.count(),
        );
    }
    // Each was reported when it happened.
    if outcome.errors.count() > 0 {
        tell!(
            "warning: {} files could not be restored as they were",
            outcome.errors.count()
        );
    }
    match existing.count() + outcome.errors.count() {
        0 => Ending::Clean,
        _ => Ending::Warnings,
    }
}

/// What was passed over as `cp -a` passes over it.
fn notes(outcome: &Outcome) {
    let lost = outcome.shortfall;
    for (count, what) in [
        (
            lost.owners,
            "belong to you, because only root can give files away",
        ),
        (
            lost.attributes,
            "extended attributes or ACLs could not be set here",
        ),
        (
            lost.hard_links,
            "hard links became files of their own, because the filesystem has none",
        ),
    ] {
        if count > 0 {
            say!("  note: {count} {what}");
        }
    }
}

/// A name may hold anything; what is printed stays on its line.
fn list(lines: impl Iterator<Item = String>, count: u64) {
    const SHOWN: usize = 20;
    for line in lines.take(SHOWN) {
        tell!("  {}", line.escape_debug());
    }
    if count > SHOWN as u64 {
        tell!("  and {} more", count - SHOWN as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_and_a_path_are_told_apart() {
        let both = |text: &str| {
            split(OsStr::new(text))
                .map(|(n, p)| (n, p.display().to_string()))
                .ok()
        };
        assert_eq!(
            both("latest:/etc/a:b"),
            Some(("latest".into(), "/etc/a:b".into()))
        );
        assert_eq!(both("latest"), Some(("latest".into(), "/".into())));
        assert_eq!(both("latest:"), Some(("latest".into(), "/".into())));
        assert_eq!(both(":/etc"), None);
    }
}
