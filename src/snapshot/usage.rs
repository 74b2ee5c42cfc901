//! What snapshots take: how much is theirs alone, and how much they share.
//!
//! A file is a snapshot's own if all of its names are in it; that is what deleting the snapshot
//! frees. Names are counted per snapshot, in 16 bytes for each file that has more than one and
//! not all of them seen yet, and the count is dropped before the next snapshot is looked at.

use std::cell::Cell;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Catalogue, DELETING, DIRECTORY, INFLIGHT, Id, MountedFiles, RECORD};
use crate::error::{Attempt, Error, Kind, Result};
use crate::progress::{Event, Monitor, Progress};
use crate::restore::{HERE, MountedTree, Source};

/// How often progress is reported.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// What one tree takes, in bytes of the filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Names in it: files, directories, links.
    pub files: u64,
    /// What deleting it alone would free.
    pub unique: u64,
    /// What others have too.
    pub shared: u64,
}

/// The usage of one tree.
#[derive(Clone, Debug)]
pub struct Share {
    pub id: Id,
    /// Whether it is a complete snapshot, not one that is unfinished, damaged or being deleted.
    pub complete: bool,
    pub usage: Usage,
}

/// Looks at every tree below `root`, where the filesystem is mounted, oldest first.
pub fn usage(root: &Path, stop: &AtomicBool, monitor: &dyn Monitor) -> Result<Vec<Share>> {
    let catalogue = Catalogue::load(&mut MountedFiles(root.into()))?;
    let snapshots = root.join(DIRECTORY);
    let mut trees: Vec<(Id, bool, String)> = Vec::new();
    trees.extend(
        catalogue
            .complete
            .iter()
            .map(|f| (f.id, true, f.id.to_string())),
    );
    trees.extend(
        catalogue
            .damaged
            .iter()
            .map(|d| (d.0, false, d.0.to_string())),
    );
    let suffixed = |ids: &[Id], suffix: &str| -> Vec<_> {
        let name = |id: &Id| (*id, false, format!("{id}{suffix}"));
        ids.iter().map(name).collect()
    };
    trees.extend(suffixed(&catalogue.inflight, INFLIGHT));
    trees.extend(suffixed(&catalogue.deleting, DELETING));
    trees.sort();
    monitor.report(Event::Phase("count"));
    let mut files = 0;
    let mut shares = Vec::new();
    for (id, complete, name) in trees {
        let path = snapshots.join(&name);
        // A record without a tree.
        if std::fs::symlink_metadata(&path).is_err() {
            continue;
        }
        let mut usage = usage_of(&path, stop, &Teller::new(monitor, files))
            .attempt(|| format!("look through {name}"))?;
        let record = std::fs::symlink_metadata(snapshots.join(format!("{id}{RECORD}")));
        usage.unique += record.map_or(0, |about| about.blocks() * 512);
        files += usage.files;
        shares.push(Share {
            id,
            complete,
            usage,
        });
    }
    Ok(shares)
}

struct Teller<'a> {
    monitor: &'a dyn Monitor,
    before: u64,
    told: Cell<Instant>,
}

impl<'a> Teller<'a> {
    fn new(monitor: &'a dyn Monitor, before: u64) -> Self {
        Teller {
            monitor,
            before,
            told: Cell::new(Instant::now()),
        }
    }

    fn tell(&self, files: u64) {
        if self.told.get().elapsed() >= PROGRESS_EVERY {
            self.told.set(Instant::now());
            self.monitor.report(Event::Progress(Progress {
                files: Some(self.before + files),
                ..Progress::default()
            }));
        }
    }
}

/// A file of which some names have been seen.
struct Seen {
    /// Names not seen yet.
    left: u32,
    stored: u64,
}

fn usage_of(path: &Path, stop: &AtomicBool, teller: &Teller<'_>) -> Result<Usage> {
    let mut tree = MountedTree::open(path)?;
    let mut usage = Usage {
        unique: tree.footprint(HERE)?.stored,
        ..Usage::default()
    };
    let mut seen: HashMap<u32, Seen> = HashMap::new();
    // The directories of each level that are still to be entered.
    let mut levels = vec![look(&mut tree, &mut usage, &mut seen, stop, teller)?];
    while let Some(level) = levels.last_mut() {
        match level.pop() {
            Some(name) => {
                tree.enter(&name)?;
                levels.push(look(&mut tree, &mut usage, &mut seen, stop, teller)?);
            }
            None => {
                levels.pop();
                if !levels.is_empty() {
                    tree.leave()?;
                }
            }
        }
    }
    usage.shared = seen.values().map(|file| file.stored).sum();
    Ok(usage)
}

/// Counts what is in the directory where the cursor stands; gives the directories in it.
fn look(
    tree: &mut MountedTree,
    usage: &mut Usage,
    seen: &mut HashMap<u32, Seen>,
    stop: &AtomicBool,
    teller: &Teller<'_>,
) -> Result<Vec<Vec<u8>>> {
    let mut directories = Vec::new();
    for entry in tree.list()? {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Interrupted, "interrupted by a signal"));
        }
        let file = tree.footprint(&entry.name)?;
        usage.files += 1;
        teller.tell(usage.files);
        if file.is_directory || file.links <= 1 {
            usage.unique += file.stored;
            if file.is_directory {
                directories.push(entry.name);
            }
            continue;
        }
        // ext4 numbers inodes in 32 bits.
        let inode = u32::try_from(file.inode)
            .map_err(|_| Error::new(Kind::Unsupported, "an inode number beyond 32 bits"))?;
        let file = seen.entry(inode).or_insert(Seen {
            left: file.links,
            stored: file.stored,
        });
        file.left = file.left.saturating_sub(1);
        if file.left == 0 {
            usage.unique += file.stored;
            seen.remove(&inode);
        }
    }
    Ok(directories)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use std::fs;

    #[test]
    fn a_file_is_unique_if_all_its_names_are_here() {
        let base = tempfile::tempdir().expect("a directory");
        let path = |name: &str| base.path().join(name);
        fs::create_dir_all(path("one/deep/er")).expect("made");
        fs::create_dir(path("two")).expect("made");
        for name in ["one/alone", "one/shared", "one/twice"] {
            fs::write(path(name), vec![1; 300_000]).expect("written");
        }
        fs::hard_link(path("one/shared"), path("two/shared")).expect("linked");
        fs::hard_link(path("one/twice"), path("one/deep/er/again")).expect("linked");
        fs::hard_link(path("one/twice"), path("one/deep/third")).expect("linked");
        let stop = AtomicBool::new(false);
        let of =
            |name: &str| usage_of(&path(name), &stop, &Teller::new(&Silent, 0)).expect("counted");
        let stored = |name: &str| {
            std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path(name)).expect("there")) * 512
        };
        let file = stored("one/alone");
        let directories = stored("one") + stored("one/deep") + stored("one/deep/er");
        let one = of("one");
        assert_eq!((one.files, one.shared), (7, file));
        assert_eq!(one.unique, 2 * file + directories);
        assert_eq!(of("two").shared, file);
        stop.store(true, Ordering::Relaxed);
        let stopped = usage_of(&path("one"), &stop, &Teller::new(&Silent, 0));
        assert_eq!(stopped.unwrap_err().kind(), Kind::Interrupted);
    }
}
