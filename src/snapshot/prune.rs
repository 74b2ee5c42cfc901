//! Deleting snapshots by a policy.
//!
//! Order of a deletion: the trees are renamed to `<id>.deleting` and their records removed, all of
//! that is synced, and only then the first file goes. So a snapshot that lost a file is never listed
//! as complete, whenever the run ends. What is left of an interrupted run carries the suffix, and
//! the next prune finishes it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;

use super::remove::Remover;
use super::take::{point_latest, rename};
use super::{Catalogue, DELETING, DIRECTORY, Found, Id, MountedFiles, PIN, RECORD};
use crate::error::{Attempt, Error, Kind, Result};
use crate::progress::{Event, Monitor, Progress};
use crate::retention::{self, Candidate, Policy, Reason};

/// How often progress is reported.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// Which snapshots a policy counts together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Grouping {
    /// Those of one host and the same sources: snapshots of something else replace nothing.
    #[default]
    Sources,
    /// All in the image.
    None,
}

/// What becomes of one snapshot.
#[derive(Clone, Debug)]
pub struct Judged {
    pub id: Id,
    /// Why it stays; none: it goes.
    pub reasons: Vec<Reason>,
}

/// Snapshots that are counted together, oldest first.
#[derive(Clone, Debug)]
pub struct Group {
    /// Host and sources, if that is what they have in common.
    pub name: Option<String>,
    pub snapshots: Vec<Judged>,
}

/// Applies a policy to every complete snapshot. Interrupted and damaged ones count for nothing.
///
/// # Errors
/// [`Kind::Usage`] for an empty policy that names no snapshot either.
pub fn judge(
    catalogue: &Catalogue,
    policy: &Policy,
    named: &[Id],
    grouping: Grouping,
    zone: &TimeZone,
) -> Result<Vec<Group>> {
    if policy.is_empty() && named.is_empty() {
        let error = Error::new(
            Kind::Usage,
            "the policy is empty: it would delete all but the newest",
        );
        return Err(error.hint("give at least one --keep-... option, for example --keep-daily 7"));
    }
    let mut groups: BTreeMap<String, Vec<&Found>> = BTreeMap::new();
    for found in &catalogue.complete {
        let name = match grouping {
            Grouping::None => String::new(),
            Grouping::Sources => {
                let mut sources = found.record.sources.clone();
                sources.sort();
                format!("{}: {}", found.record.host, sources.join(" "))
            }
        };
        groups.entry(name).or_default().push(found);
    }
    let judged = groups.into_iter().map(|(name, members)| {
        let candidates: Vec<Candidate> = members
            .iter()
            .map(|found| Candidate {
                time: found.id.time(),
                pinned: found.pinned,
                named: named.contains(&found.id),
            })
            .collect();
        let verdicts = retention::judge(&candidates, policy, zone);
        Group {
            name: (grouping == Grouping::Sources).then_some(name),
            snapshots: members
                .iter()
                .zip(verdicts)
                .map(|(found, reasons)| Judged {
                    id: found.id,
                    reasons,
                })
                .collect(),
        }
    });
    Ok(judged.collect())
}

/// What a deletion has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deleted {
    pub snapshots: usize,
    /// Names that are gone: files, directories, links.
    pub files: u64,
    /// Snapshots that an interrupted run had begun to delete.
    pub taken_up: usize,
}

/// Deletes the snapshots `goes` of the filesystem mounted at `root`, and what an interrupted
/// deletion has left. Whoever calls this holds the lease.
///
/// # Errors
/// [`Kind::Usage`] when no complete snapshot would stay, or a pinned one would go; then nothing was
/// done. [`Kind::Interrupted`] when `stop` was set: the snapshots are gone from the list, and the
/// next deletion removes their files.
pub fn delete(
    root: &Path,
    goes: &[Id],
    stop: &AtomicBool,
    monitor: &dyn Monitor,
) -> Result<Deleted> {
    let catalogue = Catalogue::load(&mut MountedFiles(root.into()))?;
    let stays = catalogue
        .complete
        .iter()
        .rev()
        .find(|f| !goes.contains(&f.id));
    let refuse = |why: String| Err(Error::new(Kind::Usage, why));
    match stays {
        None if !goes.is_empty() => return refuse("no complete snapshot would be left".into()),
        _ => {}
    }
    if let Some(pinned) = catalogue
        .complete
        .iter()
        .find(|f| f.pinned && goes.contains(&f.id))
    {
        return refuse(format!("{} is pinned", pinned.id));
    }
    let snapshots = root.join(DIRECTORY);
    if goes.is_empty() && catalogue.deleting.is_empty() {
        return Ok(Deleted::default());
    }
    let directory = File::open(&snapshots).attempt(|| format!("open {}", snapshots.display()))?;
    if let Some(newest) = stays.filter(|_| latest_is_among(root, goes)) {
        point_latest(root, newest.id)?;
    }
    let mut gone = 0;
    for id in goes {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        put_aside(&snapshots, *id).attempt(|| format!("delete the snapshot {id}"))?;
        gone += 1;
    }
    rustix::fs::syncfs(&directory).attempt(|| "sync the list of snapshots")?;

    let mut deleted = Deleted {
        snapshots: gone,
        files: 0,
        taken_up: catalogue.deleting.len(),
    };
    let mut aside = catalogue.deleting.clone();
    aside.extend(&goes[..gone]);
    let removed = remove_trees(&snapshots, &directory, &aside, stop, monitor);
    deleted.files = removed.map_err(|error| match error.kind() {
        Kind::Interrupted => Error::new(
            Kind::Interrupted,
            format!("interrupted; {gone} snapshots are deleted, the next prune frees the rest of their space"),
        ),
        _ => error,
    })?;
    rustix::fs::syncfs(&directory).attempt(|| "sync what was deleted")?;
    Ok(deleted)
}

/// Whether `latest` points to one of these.
fn latest_is_among(root: &Path, ids: &[Id]) -> bool {
    let target = fs::read_link(root.join(super::LATEST)).unwrap_or_default();
    let name = target.file_name().and_then(|name| name.to_str());
    ids.iter().any(|id| name == Some(&id.to_string()))
}

/// From here on it is no snapshot any more. The tree first: a record alone counts for nothing.
fn put_aside(snapshots: &Path, id: Id) -> Result<()> {
    let name = |suffix: &str| snapshots.join(format!("{id}{suffix}"));
    rename(&name(""), &name(DELETING))?;
    remove_file_if_there(&name(RECORD))
}

fn remove_file_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.attempt(|| format!("remove {}", path.display())),
    }
}

fn remove_trees(
    snapshots: &Path,
    directory: &File,
    aside: &[Id],
    stop: &AtomicBool,
    monitor: &dyn Monitor,
) -> Result<u64> {
    monitor.report(Event::Phase("delete"));
    let reported = std::cell::Cell::new(Instant::now());
    let tell = |files| {
        if reported.get().elapsed() >= PROGRESS_EVERY {
            reported.set(Instant::now());
            monitor.report(Event::Progress(Progress {
                files: Some(files),
                ..Progress::default()
            }));
        }
    };
    let mut remover = Remover {
        stop,
        tell: &tell,
        removed: 0,
    };
    for (number, id) in aside.iter().enumerate() {
        for suffix in [RECORD, PIN] {
            // A run that ended between two steps has left the one, a pin of old the other.
            remove_file_if_there(&snapshots.join(format!("{id}{suffix}")))?;
        }
        remover.remove(directory.as_fd(), &format!("{id}{DELETING}"))?;
        tracing::info!(%id, number, of = aside.len(), "deleted");
    }
    Ok(remover.removed)
}

/// Pins a snapshot, so that no policy deletes it, or takes the pin away. Says whether that
/// changed anything.
pub fn pin(root: &Path, id: Id, pinned: bool) -> Result<bool> {
    let snapshots = root.join(DIRECTORY);
    let path = snapshots.join(format!("{id}{PIN}"));
    let changed = match pinned {
        true => File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .map(drop),
        false => fs::remove_file(&path),
    };
    match changed {
        Ok(()) => {
            let directory = File::open(&snapshots);
            let synced = directory.and_then(|directory| directory.sync_all());
            synced.attempt(|| format!("sync {}", snapshots.display()))?;
            Ok(true)
        }
        Err(e) if pinned && e.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) if !pinned && e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).attempt(|| format!("change {}", path.display())),
    }
}
