//! Reads back what was restored, and compares it with where it came from.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, SeekFrom};
use rustix::io::Errno;

use super::Options;
use super::descent::{Descent, check_name, open_at, show};
use super::ends::{Landing, Start};
use super::outcome::{Failure, Listed};
use super::source::{Entry, FileKind, Metadata, Piece, Source, sort_for_popping};
use crate::error::{Attempt, Error, Kind, Result};
use crate::progress::{Event, Monitor};

const PIECE_BYTES: usize = 256 << 10;

const RULES: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// Compares everything below `from` with what a [`copy`](super::copy) of it has made at `landing`:
/// that it is there, its type, its content to the last byte, its target, its time. What else is
/// there does not matter. Owners and attributes were judged when they were set. An error
/// means that the comparison ended early; files that differ are in what is returned.
pub fn verify(
    source: &mut dyn Source,
    from: &Path,
    landing: &Landing,
    options: Options<'_>,
    monitor: &dyn Monitor,
) -> Result<Listed<Failure>> {
    let start = Start::find(source, from)?;
    let directory = &landing.directory;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(directory, flags, Mode::empty())
        .attempt(|| format!("open the directory {directory:?}"))?;
    monitor.report(Event::Phase("verify"));
    let mut verifier = Verifier {
        source,
        way: Descent::new(root, RULES),
        options,
        names: Vec::new(),
        buf: vec![0; PIECE_BYTES],
        other: vec![0; PIECE_BYTES],
        failures: Listed::default(),
        monitor,
    };
    verifier.run(&start, landing.name.clone())?;
    Ok(verifier.failures)
}

struct Verifier<'run> {
    source: &'run mut dyn Source,
    way: Descent,
    options: Options<'run>,
    /// On the way from the start.
    names: Vec<Vec<u8>>,
    buf: Vec<u8>,
    other: Vec<u8>,
    failures: Listed<Failure>,
    monitor: &'run dyn Monitor,
}

impl Verifier<'_> {
    fn run(&mut self, start: &Start, name: Option<Vec<u8>>) -> Result<()> {
        let metadata = self.source.metadata(&start.lookup)?;
        if metadata.kind != FileKind::Directory {
            let name = name.unwrap_or_default();
            let result = self.file(&start.lookup, &name, &metadata);
            return self.settle(&name, result);
        }
        if let Some(name) = name {
            self.way.enter(&name)?;
        }
        if start.lookup != super::HERE {
            self.source.enter(&start.lookup)?;
        }
        let mut levels = vec![self.list()?];
        while let Some(level) = levels.last_mut() {
            if self.options.stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Interrupted, "stopped on request"));
            }
            let Some(entry) = level.pop() else {
                levels.pop();
                if !levels.is_empty() {
                    self.names.pop();
                    self.way.leave()?;
                    self.source.leave()?;
                }
                continue;
            };
            if !self.is_wanted(&entry.name) {
                continue;
            }
            match self.entry(&entry) {
                Ok(Some(below)) => {
                    self.names.push(entry.name);
                    levels.push(below);
                }
                Ok(None) => {}
                Err(error) => self.settle(&entry.name, Err(error))?,
            }
        }
        Ok(())
    }

    fn is_wanted(&self, name: &[u8]) -> bool {
        let Some(wants) = self.options.wants else {
            return true;
        };
        let names: Vec<&[u8]> = self.names.iter().map(|n| &**n).chain([name]).collect();
        wants(&names.join(&b"/"[..]))
    }

    /// Enters a directory and gives what is in it, or compares a file.
    fn entry(&mut self, entry: &Entry) -> Result<Option<Vec<Entry>>> {
        let name = &*entry.name;
        check_name(name)?;
        let metadata = self.source.metadata(name)?;
        if metadata.kind != FileKind::Directory {
            self.file(name, name, &metadata)?;
            return Ok(None);
        }
        self.way.enter(name)?;
        let entered = self.source.enter(name);
        if let Err(error) = entered {
            self.way.leave()?;
            return Err(error);
        }
        match self.list() {
            Ok(entries) => Ok(Some(entries)),
            Err(error) => {
                self.way.leave()?;
                self.source.leave()?;
                Err(error)
            }
        }
    }

    fn list(&mut self) -> Result<Vec<Entry>> {
        let mut entries = self.source.list()?;
        sort_for_popping(&mut entries);
        Ok(entries)
    }

    fn file(&mut self, lookup: &[u8], name: &[u8], metadata: &Metadata) -> Result<()> {
        let here = self.way.here();
        let stat = rustix::fs::statat(here, name, AtFlags::SYMLINK_NOFOLLOW)
            .attempt(|| format!("examine {}", show(name)))?;
        let expected = match metadata.kind {
            FileKind::Regular => FileType::RegularFile,
            FileKind::Directory => FileType::Directory,
            FileKind::Symlink => FileType::Symlink,
            FileKind::CharDevice => FileType::CharacterDevice,
            FileKind::BlockDevice => FileType::BlockDevice,
            FileKind::Fifo => FileType::Fifo,
            FileKind::Socket => FileType::Socket,
        };
        if FileType::from_raw_mode(stat.st_mode) != expected {
            return Err(differs("is of another type"));
        }
        if stat.st_mtime != metadata.modified.seconds {
            return Err(differs("has another time"));
        }
        match metadata.kind {
            FileKind::Regular if u64::try_from(stat.st_size) != Ok(metadata.size) => {
                Err(differs("has another size"))
            }
            FileKind::Regular => self.content(lookup, name, metadata.size),
            FileKind::Symlink => {
                let target = self.source.read_link(lookup)?;
                let found = rustix::fs::readlinkat(here, name, Vec::new())?;
                match found.to_bytes() == target {
                    true => Ok(()),
                    false => Err(differs("leads elsewhere")),
                }
            }
            _ => Ok(()),
        }
    }

    fn content(&mut self, lookup: &[u8], name: &[u8], size: u64) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = open_at(self.way.here(), name, flags, RULES)?;
        let file = File::from(file);
        let mut content = self.source.open(lookup)?;
        let mut at = 0;
        loop {
            match content.next(&mut self.buf)? {
                Piece::End if at == size => return Ok(()),
                Piece::End => return Err(differs("has another size")),
                Piece::Hole(bytes) => {
                    if !is_zero(&file, at, at.saturating_add(bytes), &mut self.other)? {
                        return Err(differs("has data in a hole"));
                    }
                    at = at.saturating_add(bytes);
                }
                Piece::Data(bytes) => {
                    let other = &mut self.other[..bytes];
                    file.read_exact_at(other, at)?;
                    if *other != self.buf[..bytes] {
                        return Err(differs(&format!("differs after byte {at}")));
                    }
                    at += bytes as u64;
                }
            }
        }
    }

    fn settle(&mut self, name: &[u8], result: Result<()>) -> Result<()> {
        let Err(error) = result else { return Ok(()) };
        if matches!(
            error.kind(),
            Kind::Disconnected | Kind::TimedOut | Kind::Interrupted
        ) {
            return Err(error);
        }
        let names: Vec<&[u8]> = self.names.iter().map(|n| &**n).chain([name]).collect();
        let path = names.join(&b"/"[..]);
        let text = format!("{}: {}", show(&path), error.chain().join(": "));
        let path = PathBuf::from(std::ffi::OsString::from_vec(path));
        if self.failures.add(Failure { path, error }) {
            self.monitor.report(Event::Warning(text));
        }
        Ok(())
    }
}

fn differs(how: &str) -> Error {
    Error::new(Kind::Corrupt, format!("what was restored {how}"))
}

/// Whether a range of a file reads as zeros. Holes are not read.
fn is_zero(file: &File, from: u64, to: u64, buf: &mut [u8]) -> Result<bool> {
    let mut at = from;
    while at < to {
        at = match rustix::fs::seek(file.as_fd(), SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        };
        if at >= to {
            break;
        }
        let length = (to - at).min(buf.len() as u64) as usize;
        file.read_exact_at(&mut buf[..length], at)?;
        if buf[..length].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += length as u64;
    }
    Ok(true)
}
