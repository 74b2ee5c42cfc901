//! Taking one snapshot: link what did not change, copy what did, publish when whole.
//!
//! Every run copies into a fresh, empty `<id>.inflight`. What an interrupted run has left is not
//! written into again: its files may be hard links into a published snapshot, and rsync adjusts
//! the attributes of an existing file in place (rsync(1), `--link-dest`). It serves as one more
//! `--link-dest` instead, so nothing that arrived is sent twice, and is removed after the new
//! snapshot is published.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use super::record::VERSION;
use super::rsync::{Account, BY_THE_NANOSECOND, Filters, Verdict, arguments, verdict};
use super::{
    Catalogue, DIRECTORY, Found, INFLIGHT, Id, LATEST, MountedFiles, RECORD, Record, Sources,
    caches,
};
use crate::error::{Attempt, Error, Kind, Result};
use crate::host::Tool;
use crate::progress::{Event, Monitor, Progress};

/// rsync takes at most 20 `--link-dest`: snapshots, and what a few interrupted runs left.
const EARLIER_MAX: usize = 12;
const INTERRUPTED_KEPT: usize = 8;

/// How often progress is reported.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// One backup run, as far as the mounted filesystem goes.
pub struct Job<'a> {
    /// Where the image's filesystem is mounted.
    pub root: &'a Path,
    pub sources: &'a Sources,
    pub filters: &'a Filters,
    /// Paths never backed up: the image itself, our own mounts.
    pub leave_out: &'a [PathBuf],
    pub host: &'a str,
    /// Set by a signal handler; the run then ends with [`Kind::Interrupted`].
    pub stop: &'a AtomicBool,
    pub monitor: &'a dyn Monitor,
    /// What the link has sent and still owes, to complete the progress.
    pub link: &'a (dyn Fn() -> Progress + Sync),
}

#[derive(Debug)]
pub struct Outcome {
    pub record: Record,
    pub vanished: u64,
}

/// Takes and publishes one snapshot.
///
/// On any error nothing is published, and what was copied stays `.inflight` for the next run.
pub fn take(job: &Job) -> Result<Outcome> {
    let started = Timestamp::now();
    let clock = Instant::now();
    let snapshots = job.root.join(DIRECTORY);
    make_directory(&snapshots)?;
    let catalogue = Catalogue::load(&mut MountedFiles(job.root.into()))?;
    tidy(&snapshots, &catalogue, job.monitor)?;
    let interrupted = drop_oldest(&snapshots, &catalogue.inflight)?;

    let id = new_id(&catalogue, started, job.monitor);
    let inflight = snapshots.join(format!("{id}{INFLIGHT}"));
    make_directory(&inflight)?;
    if let Some(newest) = interrupted.last() {
        let note = format!("taking up the interrupted run of {newest}");
        job.monitor.report(Event::Note(note));
    }
    let account = copy(job, &catalogue, &interrupted, &snapshots, &inflight);
    let (exit_code, account) = account.inspect_err(|_| drop(fs::remove_dir(&inflight)))?;

    job.monitor.report(Event::Phase("sync"));
    let record = Record {
        version: VERSION,
        id: id.to_string(),
        host: job.host.into(),
        sources: shown(job.sources),
        started: started.to_string(),
        finished: Timestamp::now().to_string(),
        duration_seconds: (clock.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
        files: account.files,
        bytes: account.bytes,
        new_files: account.new_files,
        new_bytes: account.new_bytes,
        rsync_exit_code: exit_code,
        error_count: account.error_count,
        errors: account.errors,
        program: format!("e2ebak {}", env!("CARGO_PKG_VERSION")),
    };
    publish(job.root, &snapshots, id, &record).attempt(|| format!("publish the snapshot {id}"))?;
    for old in &interrupted {
        remove_tree(&snapshots.join(format!("{old}{INFLIGHT}")))?;
    }
    Ok(Outcome {
        record,
        vanished: account.vanished,
    })
}

/// Removes what a run left that ended between two steps of publishing.
fn tidy(snapshots: &Path, catalogue: &Catalogue, monitor: &dyn Monitor) -> Result<()> {
    for (id, why) in &catalogue.damaged {
        let tree = snapshots.join(id.to_string());
        let record = snapshots.join(format!("{id}{RECORD}"));
        if fs::symlink_metadata(&tree).is_err() {
            fs::remove_file(&record).attempt(|| format!("remove {}", record.display()))?;
        } else {
            monitor.report(Event::Warning(format!(
                "{why}; it is left as it is and does not count"
            )));
        }
    }
    Ok(())
}

/// Keeps the newest few interrupted trees, removes the others.
fn drop_oldest(snapshots: &Path, inflight: &[Id]) -> Result<Vec<Id>> {
    let (old, kept) = inflight.split_at(inflight.len().saturating_sub(INTERRUPTED_KEPT));
    for id in old {
        remove_tree(&snapshots.join(format!("{id}{INFLIGHT}")))?;
    }
    Ok(kept.to_vec())
}

/// An id after all others: a clock that was set back must not make the newest snapshot sort first.
fn new_id(catalogue: &Catalogue, now: Timestamp, monitor: &dyn Monitor) -> Id {
    let id = Id::at(now);
    match catalogue.newest_id() {
        Some(newest) if newest >= id => {
            let id = newest.next();
            if newest > Id::at(now).next() {
                let warning = format!(
                    "the clock says {now}, before the newest snapshot {newest}; this one becomes {id}"
                );
                monitor.report(Event::Warning(warning));
            }
            id
        }
        _ => id,
    }
}

/// Whether the filesystem of this fresh directory stores times by the nanosecond.
fn keeps_nanoseconds(directory: &Path) -> Result<bool> {
    let time = Timespec {
        tv_sec: 1_000_000_000,
        tv_nsec: 1,
    };
    let both = Timestamps {
        last_access: time,
        last_modification: time,
    };
    let set = utimensat(CWD, directory, &both, AtFlags::empty());
    set.attempt(|| format!("set the time of {}", directory.display()))?;
    let metadata =
        fs::metadata(directory).attempt(|| format!("look at {}", directory.display()))?;
    Ok(metadata.mtime_nsec() == 1)
}

fn shown(sources: &Sources) -> Vec<String> {
    let paths = sources.paths().iter();
    paths.map(|p| p.to_string_lossy().into_owned()).collect()
}

/// What unchanged files are linked from: the newest snapshot of the same host and sources, then the
/// newest of each other set, for one image may hold several.
fn earlier(catalogue: &Catalogue, own: &(String, Vec<String>)) -> Vec<Id> {
    let mut met = HashSet::new();
    let mut newest: Vec<(bool, Id)> = Vec::new();
    for Found { id, record, .. } in catalogue.complete.iter().rev() {
        let mut sources = record.sources.clone();
        sources.sort();
        let set = (record.host.clone(), sources);
        let is_other = set != *own;
        if met.insert(set) {
            newest.push((is_other, *id));
        }
    }
    newest.sort_by_key(|(is_other, _)| *is_other);
    newest.truncate(EARLIER_MAX);
    newest.into_iter().map(|(_, id)| id).collect()
}

/// Runs rsync to its end. An error means: do not publish.
fn copy(
    job: &Job,
    catalogue: &Catalogue,
    interrupted: &[Id],
    snapshots: &Path,
    inflight: &Path,
) -> Result<(i32, Account)> {
    let mut link_from: Vec<PathBuf> = Vec::new();
    let mut sources = shown(job.sources);
    sources.sort();
    let earlier = earlier(catalogue, &(job.host.into(), sources));
    link_from.extend(earlier.iter().map(|id| snapshots.join(id.to_string())));
    link_from.extend(
        interrupted
            .iter()
            .rev()
            .map(|id| snapshots.join(format!("{id}{INFLIGHT}"))),
    );
    let caches = match job.filters.exclude_caches {
        true => caches::find(job.sources.paths(), job.filters.one_file_system, job.stop),
        false => Vec::new(),
    };
    let mut args = arguments(
        job.sources.paths(),
        job.filters,
        job.leave_out,
        &caches,
        &link_from,
        inflight,
    );
    if keeps_nanoseconds(inflight)? {
        args.insert(0, BY_THE_NANOSECOND.into());
    }

    job.monitor.report(Event::Phase("copy"));
    let account = Mutex::new(Account::default());
    let reported = Mutex::new(Instant::now());
    let tell = || {
        let mut last = reported.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= PROGRESS_EVERY {
            *last = Instant::now();
            let copied = account
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .progress;
            let link = (job.link)();
            job.monitor.report(Event::Progress(Progress {
                owed: link.owed,
                sent: link.sent,
                ..copied
            }));
        }
    };
    let status = Tool::new("rsync").args(args).stream(
        &|line| {
            account
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .hear(line);
            tell();
        },
        &|line| {
            account
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .hear_error(line)
        },
        &tell,
        job.stop,
    )?;
    let account = account.into_inner().unwrap_or_else(PoisonError::into_inner);
    if job.stop.load(Ordering::Relaxed) {
        return Err(Error::new(
            Kind::Interrupted,
            "interrupted; the next run takes up what was copied",
        ));
    }
    match verdict(status.code(), &account) {
        // OK to unwrap: a verdict other than Failed comes from an exit code.
        Verdict::Complete | Verdict::WithErrors => Ok((status.code().unwrap_or_default(), account)),
        Verdict::Failed => Err(failure(status, &account)),
    }
}

fn failure(status: std::process::ExitStatus, account: &Account) -> Error {
    let full = account
        .errors
        .iter()
        .any(|e| e.ends_with("(28)") || e.ends_with("(122)"));
    let kind = if full { Kind::NoSpace } else { Kind::Io };
    // rsync names the cause first and then what follows from it.
    let shown: Vec<_> = account.errors.iter().take(5).map(String::as_str).collect();
    let said = match shown[..] {
        [] => Error::new(kind, "it said nothing on standard error"),
        _ => Error::new(kind, shown.join("; ")),
    };
    let error = Error::new(
        kind,
        format!("rsync failed ({status}); nothing was published"),
    )
    .because(said);
    match full {
        true => error.hint("there is no room left in the image or on the server; published snapshots are not affected"),
        false => error,
    }
}

/// Makes the tree count: everything in it durable first, then its record, then its name.
fn publish(root: &Path, snapshots: &Path, id: Id, record: &Record) -> Result<()> {
    let directory = File::open(snapshots).attempt(|| format!("open {}", snapshots.display()))?;
    rustix::fs::syncfs(&directory).attempt(|| "sync the snapshot's data")?;

    let written = snapshots.join(format!("{id}{RECORD}"));
    let unfinished = snapshots.join(format!("{id}{RECORD}.tmp"));
    let mut file =
        File::create(&unfinished).attempt(|| format!("create {}", unfinished.display()))?;
    file.write_all(&record.to_json())
        .and_then(|()| file.sync_all())
        .attempt(|| "write the completion record")?;
    rename(&unfinished, &written)?;
    rename(
        &snapshots.join(format!("{id}{INFLIGHT}")),
        &snapshots.join(id.to_string()),
    )?;

    point_latest(root, id)?;
    rustix::fs::syncfs(&directory).attempt(|| "sync the published snapshot")
}

/// Points `latest` at a snapshot, in one step.
pub(super) fn point_latest(root: &Path, id: Id) -> Result<()> {
    let link = root.join(format!("{LATEST}.tmp"));
    match fs::remove_file(&link) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).attempt(|| format!("remove {}", link.display()))?
        }
        _ => {}
    }
    symlink(format!("{DIRECTORY}/{id}"), &link).attempt(|| format!("create {}", link.display()))?;
    rename(&link, &root.join(LATEST))
}

pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).attempt(|| format!("rename {} to {}", from.display(), to.display()))
}

fn make_directory(path: &Path) -> Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        other => other.attempt(|| format!("create the directory {}", path.display())),
    }
}

fn remove_tree(path: &Path) -> Result<()> {
    fs::remove_dir_all(path).attempt(|| format!("remove {}", path.display()))
}
