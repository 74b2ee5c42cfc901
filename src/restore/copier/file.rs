//! Anything but a directory: made under a name that nobody else has, and put in place when it is whole.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::told::{Trouble, tell_progress};
use super::{Copier, PROGRESS_EVERY, check_stop};
use crate::error::{Attempt, Error, Kind, Result};
use crate::restore::Overwrite;
use crate::restore::apply::{Object, apply};
use crate::restore::descent::show;
use crate::restore::hard_links::Place;
use crate::restore::source::{FileKind, Metadata, Piece};
use crate::restore::target::{Owed, Placed};

impl Copier<'_> {
    /// Puts anything but a directory in place.
    pub(super) fn file(
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
                self.remember(metadata, place, name)?;
            }
            return Ok(());
        }
        let linked = match metadata.links {
            ..=1 => None,
            _ => self.link(metadata, name)?,
        };
        let is_link = linked.is_some();
        let placed = match (linked, metadata.kind) {
            (Some(placed), _) => placed,
            (None, FileKind::Regular) => self.regular(lookup, name, metadata)?,
            (None, _) => self.special(lookup, name, metadata)?,
        };
        match placed {
            Placed::Existing => self.skip(name),
            Placed::Yes => {
                self.outcome.files += 1;
                if metadata.links > 1 && !is_link {
                    self.remember(metadata, place, name)?;
                }
            }
        }
        Ok(())
    }

    /// One more name of a file that has been restored already; `None` when there is none.
    fn link(&mut self, metadata: &Metadata, name: &[u8]) -> Result<Option<Placed>, Trouble> {
        let Some(first) = self.links.first(metadata.inode) else {
            return Ok(None);
        };
        match self.target.link(&first, name) {
            Ok(done) => Ok(Some(done)),
            Err(error) => match Trouble::from(error) {
                Trouble::File(error) => {
                    let error = error.chain().join(": ");
                    tracing::debug!(name = show(name), error, "copied instead of linked");
                    self.outcome.shortfall.hard_links += 1;
                    Ok(None)
                }
                trouble => Err(trouble),
            },
        }
    }

    /// Other names of the file become links to this one.
    fn remember(&mut self, metadata: &Metadata, place: Place, name: &[u8]) -> Result<()> {
        let made = self.target.inode_of(name)?;
        self.links.add_file(metadata.inode, place, name, made);
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
        let attributes = self.attributes(lookup)?;
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
        self.target.owes(Owed::File(file));
        placed
    }

    fn special(&mut self, lookup: &[u8], name: &[u8], metadata: &Metadata) -> Result<Placed> {
        let attributes = self.attributes(lookup)?;
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
        self.target.owes(Owed::Other);
        placed
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
