use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::keep::{KeepArgs, goes};
use crate::cli::key::KeyArgs;
use crate::error::{Attempt, Error, Kind, Result};
use crate::host;
use crate::location::Location;
use crate::progress::{Event, Monitor};
use crate::session::{self, Place, Plan, Session, Status};
use crate::snapshot::{self, Catalogue, Deleted, Filters, Job, MountedFiles, Outcome};
use crate::ui::{Style, Terminal};
use crate::ui::{say, tell};
use crate::units::{Bytes, parse_duration, show_duration};

/// Take a snapshot of PATHs
///
/// Every snapshot looks like a full copy; what did not change since the last one is a hard link.
/// An interrupted run is taken up again by the next one. A snapshot appears only when it is whole
/// and synced on the server. With --keep-... options it then deletes old ones, as `e2ebak prune`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// What to back up
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,

    /// Leave out what matches this rsync pattern; one that begins with / is a full path
    #[arg(long, value_name = "PATTERN", help_heading = "Filters")]
    exclude: Vec<OsString>,

    /// Read such patterns from a file, one a line
    #[arg(long, value_name = "FILE", help_heading = "Filters")]
    exclude_from: Vec<PathBuf>,

    /// Do not enter other filesystems
    #[arg(short = 'x', long, help_heading = "Filters")]
    one_file_system: bool,

    /// Leave out the content of directories that hold a CACHEDIR.TAG
    #[arg(long, help_heading = "Filters")]
    exclude_caches: bool,

    #[command(flatten)]
    keep: KeepArgs,

    /// How long to wait while somebody else holds the image, for example 30m
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "0")]
    wait: Duration,

    /// Print progress and summary as JSON, one object a line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let link = args.image.link()?;
    let terminal = Arc::new(Terminal::new(Style::choose(args.output.quiet, args.json)));
    let doing = || format!("cannot back up into {location}");
    let sources = snapshot::resolve_sources(&args.paths).attempt(doing)?;
    for file in &args.exclude_from {
        std::fs::File::open(file)
            .attempt(|| format!("read the exclude file {}", file.display()))
            .attempt(doing)?;
    }
    host::require("rsync").attempt(doing)?;
    // Before any thread: a user namespace takes only a process that has one.
    let private = session::enter_private().attempt(doing)?;

    let clock = Instant::now();
    let (signals, stop) = session::count_signals()?;
    let mut keys = args.key.keys(&location.to_string(), signals.clone())?;
    for note in &sources.notes {
        terminal.report(Event::Note(note.clone()));
    }
    let plan = Plan {
        location: args.image.location.clone(),
        link,
        read_only: false,
        wait: args.wait,
        place: Place::Private(private.clone()),
    };
    let started = Session::start(&plan, &mut keys, signals, terminal.clone());
    let session = started.inspect_err(|_| terminal.finish()).attempt(doing)?;
    session.stop_when_full(stop.clone());
    let filters = Filters {
        exclude: args.exclude.clone(),
        exclude_from: args.exclude_from.clone(),
        one_file_system: args.one_file_system,
        exclude_caches: args.exclude_caches,
    };
    let status = session.status_later();
    let job = Job {
        root: session.mounted_at(),
        sources: &sources,
        filters: &filters,
        leave_out: &never_backed_up(&location, private.directory()),
        host: &host::host_name(),
        stop: &stop,
        monitor: &*terminal,
        link: &|| status().progress(),
    };
    // The kernel gives a signal to the main thread first, which must not be waiting for the link
    // then, deep in the filesystem: nobody would hear of the signal.
    let taken = thread::scope(|scope| scope.spawn(|| snapshot::take(&job)).join());
    let taken = taken.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    // Why it was stopped, when it was not by a signal.
    let taken = match session.full() {
        Some(full) => taken.map_err(|error| match error.kind() {
            Kind::Interrupted => full,
            _ => error,
        }),
        None => taken,
    };
    let pruned = match &taken {
        Ok(_) if !args.keep.is_empty() => {
            let (root, keep) = (session.mounted_at(), &args.keep);
            let prune = || prune(keep, root, &stop, &terminal);
            let pruned = thread::scope(|scope| scope.spawn(prune).join());
            pruned.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        }
        _ => Ok(Deleted::default()),
    };
    let closed = session.close();
    terminal.finish();
    let (outcome, status) = both(taken, closed).attempt(doing)?;
    summary(&args, &location, &outcome, status, clock.elapsed());
    let not_pruned = || format!("{} is published, but pruning failed", outcome.record.id);
    let deleted = pruned.attempt(not_pruned)?;
    if deleted.snapshots > 0 && !args.output.quiet && !args.json {
        say!("  deleted    {:>12}   old snapshots", deleted.snapshots);
    }
    let record = &outcome.record;
    Ok(if record.error_count > 0 || record.rsync_exit_code == 23 {
        Ending::Warnings
    } else {
        Ending::Clean
    })
}

fn prune(keep: &KeepArgs, root: &Path, stop: &AtomicBool, monitor: &Terminal) -> Result<Deleted> {
    let catalogue = Catalogue::load(&mut MountedFiles(root.into()))?;
    snapshot::delete(root, &goes(&keep.judge(&catalogue)?), stop, monitor)
}

/// The image itself, when it lies on this machine, and our own mounts.
fn never_backed_up(location: &Location, runtime: &Path) -> Vec<PathBuf> {
    let mut paths = vec![runtime.to_path_buf()];
    if let Location::Local(image) = location
        && let Ok(image) = std::fs::canonicalize(image)
    {
        let mut lease = image.clone().into_os_string();
        lease.push(".lease");
        paths.extend([image, lease.into()]);
    }
    paths
}

/// A failing session is the cause of what rsync saw of it.
fn both(taken: Result<Outcome>, closed: Result<Status>) -> Result<(Outcome, Status)> {
    match (taken, closed) {
        (Ok(outcome), Ok(status)) => Ok((outcome, status)),
        (Err(taken), Ok(_)) => Err(taken),
        (Err(taken), Err(_)) if taken.kind() == Kind::Interrupted => Err(taken),
        (Err(taken), Err(closed)) => {
            let kind = closed.kind();
            Err(Error::new(kind, format!("nothing was published ({taken})")).because(closed))
        }
        (Ok(outcome), Err(closed)) => {
            let what = format!(
                "the snapshot {} is published, but closing the image failed",
                outcome.record.id
            );
            Err(Error::new(closed.kind(), what).because(closed))
        }
    }
}

fn summary(
    args: &Args,
    location: &Location,
    outcome: &Outcome,
    status: Status,
    duration: Duration,
) {
    let record = &outcome.record;
    if args.json {
        let mut line = json!(record);
        line["message_type"] = "summary".into();
        line["vanished"] = outcome.vanished.into();
        line["sent_bytes"] = status.sent.into();
        line["received_bytes"] = status.received.into();
        say!("{line}");
        return;
    }
    if !args.output.quiet {
        say!("snapshot {} in {location}", record.id);
        say!(
            "  files      {:>12}   new {}",
            record.files,
            record.new_files
        );
        say!(
            "  size       {:>12}   new {}",
            Bytes(record.bytes).to_string(),
            Bytes(record.new_bytes)
        );
        let sent = match location {
            Location::Local(_) => "-".into(),
            Location::Sftp(..) => Bytes(status.sent).to_string(),
        };
        say!("  sent       {sent:>12}   in {}", show_duration(duration));
        if outcome.vanished > 0 {
            say!(
                "  note: {} files vanished while they were being copied",
                outcome.vanished
            );
        }
    }
    if record.error_count > 0 {
        tell!(
            "warning: completed with errors: {} paths could not be backed up as they are:",
            record.error_count
        );
        for error in &record.errors {
            tell!("  {error}");
        }
        if record.error_count > record.errors.len() as u64 {
            tell!(
                "  and {} more",
                record.error_count - record.errors.len() as u64
            );
        }
    }
}
