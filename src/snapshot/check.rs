//! Whether every completion record has its tree, and the tree what the record says.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Catalogue, DIRECTORY, Found, Id};
use crate::error::{Attempt, Error, Kind, Result};
use crate::progress::{Event, Monitor, Progress};
use crate::restore::{Filesystem, ROOT};

/// How often progress is reported.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// What is wrong with a snapshot.
#[derive(Debug)]
pub struct Fault {
    pub id: Id,
    pub why: String,
}

/// What the records and the trees say of each other.
#[derive(Debug, Default)]
pub struct Checked {
    pub complete: usize,
    pub inflight: usize,
    /// Names in all trees that were looked through.
    pub files: u64,
    pub faults: Vec<Fault>,
}

/// Compares all records with their trees. A tree that was taken without errors has as many names as
/// its record counts.
///
/// # Errors
/// When the directory of snapshots cannot be read, or a signal comes.
pub fn check(view: &mut Filesystem, stop: &AtomicBool, monitor: &dyn Monitor) -> Result<Checked> {
    monitor.report(Event::Phase("compare records with trees"));
    let catalogue = Catalogue::load(view)?;
    let mut checked = Checked {
        complete: catalogue.complete.len(),
        inflight: catalogue.inflight.len(),
        ..Checked::default()
    };
    for (id, why) in &catalogue.damaged {
        checked.faults.push(Fault {
            id: *id,
            why: why.chain().join(": "),
        });
    }
    let told = Instant::now();
    let mut walk = Walk {
        view,
        stop,
        monitor,
        told,
        files: 0,
    };
    for found in &catalogue.complete {
        match walk.look(found) {
            Ok(None) => {}
            Ok(Some(why)) => checked.faults.push(Fault { id: found.id, why }),
            Err(error) if is_damage(error.kind()) => checked.faults.push(Fault {
                id: found.id,
                why: error.chain().join(": "),
            }),
            Err(error) => return Err(error),
        }
    }
    checked.files = walk.files;
    checked.faults.sort_by_key(|fault| fault.id);
    Ok(checked)
}

fn is_damage(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Corrupt | Kind::NotFound | Kind::Unsupported | Kind::Io
    )
}

struct Walk<'a> {
    view: &'a Filesystem,
    stop: &'a AtomicBool,
    monitor: &'a dyn Monitor,
    told: Instant,
    files: u64,
}

impl Walk<'_> {
    /// What is wrong with the tree of a snapshot.
    fn look(&mut self, found: &Found) -> Result<Option<String>> {
        let (id, record) = (found.id, &found.record);
        let tree = format!("{DIRECTORY}/{id}");
        for source in &record.sources {
            // A name that is no UTF-8 is not in the record as it is.
            let whole = !source.contains(char::REPLACEMENT_CHARACTER);
            // rsync could not read everything, and said so: this may be what it could not.
            if record.error_count > 0 {
                continue;
            }
            let path = format!("{tree}/{}", source.trim_start_matches('/'));
            if whole && !self.view.exists(path.trim_end_matches('/'))? {
                return Ok(Some(format!("{source} is missing in its tree")));
            }
        }
        let count = self.count(tree.into_bytes())?;
        let certain = record.sources.len() == 1 && record.rsync_exit_code == 0;
        Ok((certain && count < record.files).then(|| {
            format!(
                "its tree has {count} files and directories, its record says {}",
                record.files
            )
        }))
    }

    fn count(&mut self, tree: Vec<u8>) -> Result<u64> {
        let mut count = 0;
        let root = self.view.resolve(ROOT, &tree)?;
        let mut left = vec![(tree, root)];
        // A damaged tree may lead back into itself.
        let mut seen = HashSet::from([root]);
        while let Some((path, directory)) = left.pop() {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Interrupted, "interrupted by a signal"));
            }
            let shown = || format!("list {} in the image", String::from_utf8_lossy(&path));
            for (entry, is_directory) in self.view.entries(directory).attempt(shown)? {
                count += 1;
                self.files += 1;
                if let (true, Ok(number)) = (is_directory, u32::try_from(entry.inode))
                    && seen.insert(number)
                {
                    left.push(([&*path, b"/", &*entry.name].concat(), number));
                }
            }
            if self.told.elapsed() >= PROGRESS_EVERY {
                self.told = Instant::now();
                self.monitor.report(Event::Progress(Progress {
                    files: Some(self.files),
                    ..Progress::default()
                }));
            }
        }
        Ok(count)
    }
}
