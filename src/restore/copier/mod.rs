//! The walk: two cursors, one in the source and one below DEST, that go down and up together.
//!
//! The directories on the way are a list of levels on the heap. A directory is read whole when it
//! is entered, before anything is made on the other side, and gets its metadata when it is left.

mod file; // anything but a directory
mod told; // what is said of the run

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Options;
use super::apply::{Object, apply};
use super::descent::{Identity, check_name};
use super::ends::{Landing, Start};
use super::hard_links::{HardLinks, Place};
use super::outcome::Outcome;
use super::source::{Attribute, Entry, FileKind, HERE, Metadata, Source, sort_for_popping};
use super::target::Target;
use crate::error::{Error, Kind, Result};
use crate::progress::{Event, Monitor};
use told::Trouble;

/// Read and written at once: large enough for a loop device to read ahead, small enough to stop at.
const PIECE_BYTES: usize = 256 << 10;

/// The monitor hears no more often than this.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

pub(super) fn run(
    source: &mut dyn Source,
    from: &Path,
    dest: &Path,
    options: Options<'_>,
    links: &mut HardLinks,
    monitor: &dyn Monitor,
) -> Result<Outcome> {
    let start = Start::find(source, from)?;
    let landing = Landing::find(dest, start.name.as_deref(), start.is_directory)?;
    let target = Target::open(&landing.directory, options.overwrite)?;
    let top = target.root_identity()?;
    links.begin_in(top);
    let mut copier = Copier {
        top,
        target,
        landing: landing.directory.clone(),
        origin: from.as_os_str().as_bytes().to_vec(),
        options,
        monitor,
        reported: Instant::now(),
        levels: Vec::new(),
        links,
        seen: HashSet::new(),
        buf: vec![0; PIECE_BYTES],
        outcome: Outcome {
            landing,
            ..Outcome::default()
        },
        source,
    };
    monitor.report(Event::Phase("copy"));
    let name = copier.outcome.landing.name.clone();
    copier.top(&start, name)?;
    copier.walk()?;
    copier.progress();
    monitor.report(Event::Phase("sync"));
    copier.target.sync()?;
    Ok(copier.outcome)
}

/// A directory that is being copied.
struct Level {
    name: Vec<u8>,
    /// Still to do, the next one last.
    entries: Vec<Entry>,
    /// What it gets when it is left; `None` for a DEST that was there before.
    finish: Option<(Metadata, Vec<Attribute>)>,
    place: Place,
    /// Whether leaving it means going up, on either side.
    entered_source: bool,
    entered_target: bool,
}

struct Copier<'run> {
    source: &'run mut dyn Source,
    target: Target,
    options: Options<'run>,
    monitor: &'run dyn Monitor,
    reported: Instant,
    levels: Vec<Level>,
    links: &'run mut HardLinks,
    /// Directories of the source that were entered: in a sound filesystem each one only once.
    seen: HashSet<u64>,
    /// Where the target's cursor started; its path, and the source's, are for messages only.
    top: Identity,
    landing: PathBuf,
    origin: Vec<u8>,
    buf: Vec<u8>,
    outcome: Outcome,
}

impl Copier<'_> {
    fn top(&mut self, start: &Start, name: Option<Vec<u8>>) -> Result<()> {
        let metadata = self.source.metadata(&start.lookup)?;
        let result = match name.as_deref() {
            Some(name) if metadata.kind != FileKind::Directory => {
                self.file(&start.lookup, name, &metadata, HardLinks::TOP)
            }
            name => self.directory(&start.lookup, name, metadata, HardLinks::TOP),
        };
        self.settle(None, result)
    }

    fn walk(&mut self) -> Result<()> {
        while let Some(level) = self.levels.last_mut() {
            let place = level.place;
            match level.entries.pop() {
                None => self.leave()?,
                Some(entry) => {
                    check_stop(self.options)?;
                    let result = self.entry(&entry, place);
                    self.settle(Some(&entry.name), result)?;
                    if self.reported.elapsed() >= PROGRESS_EVERY {
                        self.progress();
                    }
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, entry: &Entry, place: Place) -> Result<(), Trouble> {
        let name = &*entry.name;
        check_name(name)?;
        if let Some(wants) = self.options.wants {
            let above = self.levels.iter().skip(1).map(|level| &*level.name);
            let names: Vec<&[u8]> = above.chain([name]).collect();
            if !wants(&names.join(&b"/"[..])) {
                return Ok(());
            }
        }
        let metadata = self.source.metadata(name)?;
        match metadata.kind {
            FileKind::Directory => self.directory(name, Some(name), metadata, place),
            _ => self.file(name, name, &metadata, place),
        }
    }

    /// Goes into a directory on both sides. `lookup` is its name in the source, or [`HERE`];
    /// `name` is its name below DEST, or nothing when it is DEST.
    fn directory(
        &mut self,
        lookup: &[u8],
        name: Option<&[u8]>,
        metadata: Metadata,
        above: Place,
    ) -> Result<(), Trouble> {
        let is_dest =
            self.source.device() == Some(self.top.device) && metadata.inode == self.top.inode;
        if is_dest {
            let attempt = "DEST lies inside what is restored";
            return Err(Error::new(Kind::Usage, attempt).into());
        }
        if !self.seen.insert(metadata.inode) {
            let attempt = format!("directory inode {} has a second name", metadata.inode);
            return Err(Error::new(Kind::Corrupt, attempt).into());
        }
        let attributes = self.attributes(lookup)?;
        let entered_source = lookup != HERE;
        if entered_source {
            self.source.enter(lookup)?;
        }
        let entered = self.source.list().and_then(|entries| {
            if let Some(name) = name {
                self.target.enter(name)?;
            }
            Ok(entries)
        });
        let mut entries = match entered {
            Ok(entries) => entries,
            Err(error) => {
                if entered_source {
                    self.source.leave().map_err(Trouble::Run)?;
                }
                return Err(error.into());
            }
        };
        sort_for_popping(&mut entries);
        let place = match name {
            Some(name) => self.links.add_directory(above, name),
            None => above,
        };
        self.levels.push(Level {
            name: name.unwrap_or_default().to_vec(),
            entries,
            finish: name.is_some().then_some((metadata, attributes)),
            place,
            entered_source,
            entered_target: name.is_some(),
        });
        Ok(())
    }

    fn leave(&mut self) -> Result<()> {
        let Some(level) = self.levels.last() else {
            return Ok(());
        };
        if let Some((metadata, attributes)) = &level.finish {
            let object = Object::Open(self.target.here());
            let shortfall = &mut self.outcome.shortfall;
            let errors = apply(object, metadata, attributes, shortfall);
            self.record_all(HERE, errors);
        }
        self.outcome.directories += 1;
        if let Some(level) = self.levels.pop() {
            if level.entered_target {
                self.target.leave()?;
            }
            if level.entered_source {
                self.source.leave()?;
            }
        }
        Ok(())
    }
}

fn check_stop(options: Options<'_>) -> Result<()> {
    if options.stop.load(Ordering::Relaxed) {
        return Err(Error::new(Kind::Interrupted, "stopped on request"));
    }
    Ok(())
}
