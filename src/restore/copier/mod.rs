//! The walk: two cursors, one in the source and one below DEST, that go down and up together.
//!
//! The directories on the way are a list of levels on the heap. A directory is read whole when it
//! is entered, before anything is made on the other side, and gets its metadata when it is left.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::apply::{Object, Shortfall, apply};
use super::descent::{Identity, check_name, show};
use super::ends::{Start, landing};
use super::hard_links::{HardLinks, Place};
use super::outcome::{Failure, Outcome};
use super::source::{Attribute, Entry, FileKind, HERE, Metadata, Piece, Source};
use super::target::{Placed, Target};
use super::{Options, Overwrite};
use crate::error::{Attempt, Error, Kind, Result};
use crate::progress::{Event, Monitor, Progress};

/// Read and written at once: large enough for a loop device to read ahead, small enough to stop at.
const PIECE_BYTES: usize = 256 << 10;

/// The monitor hears no more often than this.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

pub(super) fn run(
    source: &mut dyn Source,
    from: &Path,
    dest: &Path,
    options: Options<'_>,
    monitor: &dyn Monitor,
) -> Result<Outcome> {
    let start = Start::find(source, from)?;
    let (directory, name) = landing(dest, start.name.as_deref(), start.is_directory)?;
    let target = Target::open(&directory, options.overwrite)?;
    let mut copier = Copier {
        top: target.root_identity()?,
        target,
        landing: directory,
        origin: from.as_os_str().as_bytes().to_vec(),
        options,
        monitor,
        reported: Instant::now(),
        levels: Vec::new(),
        links: HardLinks::default(),
        seen: HashSet::new(),
        buf: vec![0; PIECE_BYTES],
        outcome: Outcome::default(),
        source,
    };
    monitor.report(Event::Phase("copy"));
    copier.top(&start, name)?;
    copier.walk()?;
    copier.progress();
    monitor.report(Event::Phase("sync"));
    copier.target.sync()?;
    copier.tell_shortfall();
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
    links: HardLinks,
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
        let attributes = self.source.attributes(lookup)?;
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
        // In the order of the inodes, as the inode tables are read from the server; from the end.
        entries.sort_unstable_by_key(|entry| Reverse(entry.inode));
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

    /// Puts anything but a directory in place.
    fn file(
        &mut self,
        lookup: &[u8],
        name: &[u8],
        metadata: &Metadata,
        place: Place,
    ) -> Result<(), Trouble> {
        if self.target.is_taken(name)? {
            self.skip(name);
            return Ok(());
        }
        if self.options.overwrite == Overwrite::IfChanged && self.is_same(lookup, name, metadata)? {
            self.outcome.unchanged += 1;
            if metadata.links > 1 && self.links.first(metadata.inode).is_none() {
                self.links.add_file(metadata.inode, place, name);
            }
            return Ok(());
        }
        let mut placed = None;
        if metadata.links > 1
            && let Some((names, first)) = self.links.first(metadata.inode)
        {
            match self.target.link(names.into_iter(), first, name) {
                Ok(done) => placed = Some(done),
                Err(error) => match Trouble::from(error) {
                    Trouble::File(error) => {
                        let error = error.chain().join(": ");
                        tracing::debug!(name = show(name), error, "copied instead of linked");
                        self.outcome.shortfall.hard_links += 1;
                    }
                    trouble => return Err(trouble),
                },
            }
        }
        let is_link = placed.is_some();
        let placed = match (placed, metadata.kind) {
            (Some(placed), _) => placed,
            (None, FileKind::Regular) => self.regular(lookup, name, metadata)?,
            (None, _) => self.special(lookup, name, metadata)?,
        };
        match placed {
            Placed::Existing => self.skip(name),
            Placed::Yes => {
                self.outcome.files += 1;
                if metadata.links > 1 && !is_link {
                    self.links.add_file(metadata.inode, place, name);
                }
            }
        }
        Ok(())
    }

    fn is_same(&mut self, lookup: &[u8], name: &[u8], metadata: &Metadata) -> Result<bool> {
        let target = match metadata.kind {
            FileKind::Symlink => Some(self.source.read_link(lookup)?),
            _ => None,
        };
        self.target.is_same(name, metadata, target.as_deref())
    }

    fn regular(&mut self, lookup: &[u8], name: &[u8], metadata: &Metadata) -> Result<Placed> {
        let attributes = self.source.attributes(lookup)?;
        let mut content = self.source.open(lookup)?;
        let (temporary, file) = self.target.new_file()?;
        let attempt = |at: u64| format!("write at offset {at}");
        let mut at: u64 = 0;
        loop {
            check_stop(self.options)?;
            let piece = content.next(&mut self.buf)?;
            let step = match piece {
                Piece::End => break,
                Piece::Hole(bytes) => bytes,
                Piece::Data(bytes) => {
                    written(file.write_all_at(&self.buf[..bytes], at), || attempt(at))?;
                    self.outcome.bytes += bytes as u64;
                    bytes as u64
                }
            };
            at = at
                .checked_add(step)
                .ok_or_else(|| Error::new(Kind::Corrupt, attempt(at)))?;
            if self.reported.elapsed() >= PROGRESS_EVERY {
                self.reported = Instant::now();
                tell_progress(self.monitor, self.options, &self.outcome);
            }
        }
        if at != metadata.size {
            let attempt = format!("read {at} of {} bytes", metadata.size);
            return Err(Error::new(Kind::Corrupt, attempt));
        }
        written(file.set_len(at), || format!("set the size to {at} bytes"))?;
        drop(content);
        let object = Object::Open(file.as_fd());
        let errors = apply(object, metadata, &attributes, &mut self.outcome.shortfall);
        let placed = self.target.place(temporary, name);
        self.record_all(lookup, errors);
        placed
    }

    fn special(&mut self, lookup: &[u8], name: &[u8], metadata: &Metadata) -> Result<Placed> {
        let attributes = self.source.attributes(lookup)?;
        let (temporary, fd) = match metadata.kind {
            FileKind::Symlink => {
                let to = self.source.read_link(lookup)?;
                self.target.new_symlink(&to)?
            }
            _ => self.target.new_node(metadata)?,
        };
        let object = Object::Pinned(fd.as_fd());
        let errors = apply(object, metadata, &attributes, &mut self.outcome.shortfall);
        let placed = self.target.place(temporary, name);
        self.record_all(lookup, errors);
        placed
    }

    fn skip(&mut self, name: &[u8]) {
        let mut path = self.landing.clone();
        path.extend(
            self.levels
                .iter()
                .map(|level| OsStr::from_bytes(&level.name)),
        );
        path.push(OsStr::from_bytes(name));
        self.outcome.skipped_existing.add(path);
    }

    /// Records what concerns one file, and returns what ends the run.
    fn settle(&mut self, name: Option<&[u8]>, result: Result<(), Trouble>) -> Result<()> {
        match result {
            Ok(()) => Ok(()),
            Err(Trouble::File(error)) => {
                self.record(name, error);
                Ok(())
            }
            Err(Trouble::Run(error)) => {
                let path = self.path(name);
                Err(error).attempt(|| format!("restore {}", show(&path)))
            }
        }
    }

    fn record_all(&mut self, name: &[u8], errors: Vec<Error>) {
        for error in errors {
            self.record((name != HERE).then_some(name), error);
        }
    }

    /// `name` is in the directory that is being copied; without one it is that directory itself.
    fn record(&mut self, name: Option<&[u8]>, error: Error) {
        let path = self.path(name);
        let text = format!("{}: {}", show(&path), error.chain().join(": "));
        let path = PathBuf::from(std::ffi::OsString::from_vec(path));
        if self.outcome.errors.add(Failure { path, error }) {
            self.monitor.report(Event::Warning(text));
        }
    }

    /// The path in the source.
    fn path(&self, name: Option<&[u8]>) -> Vec<u8> {
        let below = self.levels.iter().skip(1).map(|level| &*level.name);
        // What is settled before there is a level is what was asked for.
        let name = name.filter(|_| !self.levels.is_empty());
        let mut path = self.origin.clone();
        for name in below.chain(name) {
            if !path.is_empty() && !path.ends_with(b"/") {
                path.push(b'/');
            }
            path.extend_from_slice(name);
        }
        path
    }

    fn progress(&mut self) {
        self.reported = Instant::now();
        tell_progress(self.monitor, self.options, &self.outcome);
    }

    /// One sentence for each kind of thing that could not be kept.
    fn tell_shortfall(&self) {
        let Shortfall {
            owners,
            attributes,
            hard_links,
        } = self.outcome.shortfall;
        for (count, text) in [
            (owners, "files belong to you: only root can give them back"),
            (
                attributes,
                "extended attributes or ACLs are lost: DEST or your rights do not allow them",
            ),
            (
                hard_links,
                "hard links became files of their own: DEST refused them",
            ),
        ] {
            if count > 0 {
                self.monitor
                    .report(Event::Warning(format!("{count} {text}")));
            }
        }
    }
}

/// Why something was not restored, by what follows from it.
enum Trouble {
    /// One file, or one directory with all that is in it, is missing.
    File(Error),
    /// Nothing that comes after it would fare better.
    Run(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        match error.kind() {
            Kind::NoSpace
            | Kind::ReadOnly
            | Kind::Interrupted
            | Kind::Disconnected
            | Kind::TimedOut => Trouble::Run(error),
            Kind::Usage
            | Kind::NoImage
            | Kind::NotFound
            | Kind::Exists
            | Kind::InUse
            | Kind::WrongKey
            | Kind::Corrupt
            | Kind::Unsupported
            | Kind::MissingTool
            | Kind::Denied
            | Kind::Io => Trouble::File(error),
        }
    }
}

/// Gives a failed write the kind that it has here: one file that is too large for DEST's
/// filesystem is no reason to stop.
fn written(result: std::io::Result<()>, attempt: impl FnOnce() -> String) -> Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::FileTooLarge => {
            let cause = Error::from(error).of_kind(Kind::Unsupported);
            Err(cause).attempt(attempt)
        }
        result => result.attempt(attempt),
    }
}

fn check_stop(options: Options<'_>) -> Result<()> {
    if options.stop.load(Ordering::Relaxed) {
        return Err(Error::new(Kind::Interrupted, "stopped on request"));
    }
    Ok(())
}

fn tell_progress(monitor: &dyn Monitor, options: Options<'_>, outcome: &Outcome) {
    monitor.report(Event::Progress(Progress {
        files: Some(outcome.files + outcome.unchanged),
        files_total: options.totals.map(|(files, _)| files),
        bytes: Some(outcome.bytes),
        bytes_total: options.totals.map(|(_, bytes)| bytes),
        ..Progress::default()
    }));
}
