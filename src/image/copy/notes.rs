//! What is noted of a copy: a hash of each chunk, in a file beside it.

use sha2::{Digest, Sha256};

use super::{CHUNK, CopyJob, remove_if_there};
use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};
use crate::progress::Event;
use crate::remote::{Access, Store};
use crate::units::KIB;

const MAGIC: &[u8; 16] = b"e2ebak sums 1\n\0\0";
/// Where the notes begin, and how long each is: the first half of a SHA-256.
pub const NOTES: u64 = 4 * KIB;
pub const NOTE: u64 = 16;
/// Notes that are read at once: 64 GiB of image.
pub const PAGE: u64 = 65_536;

pub type Note = [u8; NOTE as usize];
/// Zeros, whether written or not.
pub const HOLE: Note = [0; NOTE as usize];
/// Nothing is known.
pub const UNKNOWN: Note = [0xFF; NOTE as usize];

pub fn sums_size(size: u64) -> u64 {
    NOTES + size.div_ceil(CHUNK) * NOTE
}

/// Whether there are notes that can be believed; if not, they are begun.
pub fn open_sums(sums: &dyn Store, size: u64) -> Result<bool> {
    match sums.open(Access::ReadOnly) {
        Ok(device) if device.size() >= NOTES => {
            let mut magic = [0; MAGIC.len()];
            device.read_exact_at(&mut magic, 0)?;
            if magic == *MAGIC {
                return Ok(true);
            }
        }
        Ok(_) => {}
        Err(error) if error.kind() == Kind::NoImage => {}
        Err(error) => return Err(error),
    }
    remove_if_there(sums)?;
    let device = sums.create(sums_size(size))?;
    device.write_all_at(MAGIC, 0)?;
    device.flush()?;
    Ok(false)
}

/// Whether a copy is still what is noted of it: the header and the begin of the volume, where a
/// filesystem notes each time it was mounted, and some other places.
pub fn is_as_noted(job: &CopyJob<'_>, sums: &dyn Store) -> Result<bool> {
    let (to, sums) = (job.to.open(Access::ReadOnly)?, sums.open(Access::ReadOnly)?);
    let chunks = (to.size() / CHUNK).min((sums.size() - NOTES) / NOTE);
    let mut chance = [0; 64];
    getrandom::fill(&mut chance)
        .map_err(|e| Error::new(Kind::Io, e.to_string()))
        .attempt(|| "get random bytes")?;
    let some = chance
        .chunks_exact(8)
        .map(|bytes| bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)));
    let places = (0..32).chain(some.map(|number| number % chunks.max(1)));
    let mut buf = vec![0; CHUNK as usize];
    for number in places.filter(|number| *number < chunks) {
        (job.check)()?;
        let mut note = HOLE;
        sums.read_exact_at(&mut note, NOTES + number * NOTE)?;
        to.read_exact_at(&mut buf, number * CHUNK)?;
        if note != UNKNOWN && note != note_of(&buf) {
            let why = "the copy was changed by somebody else; all of it is read once";
            job.monitor.report(Event::Note(why.into()));
            return Ok(false);
        }
    }
    Ok(true)
}

pub fn note_of(bytes: &[u8]) -> Note {
    if bytes.iter().all(|byte| *byte == 0) {
        return HOLE;
    }
    let hash = Sha256::digest(bytes);
    let mut note = HOLE;
    note.copy_from_slice(&hash[..NOTE as usize]);
    note
}

/// A chunk that has changed.
pub struct Changed {
    pub number: u64,
    pub before: Note,
    pub now: Note,
    pub bytes: Vec<u8>,
}

/// The notes of a page, as they are in the file.
pub struct Notes {
    pub first: u64,
    pub notes: Vec<Note>,
}

impl Notes {
    /// Sets the notes of these chunks, of one batch, by a single write.
    pub fn set(
        &mut self,
        changed: &[Changed],
        note: impl Fn(&Changed) -> Note,
        sums: &dyn Device,
    ) -> Result<()> {
        let place = |chunk: &Changed| (chunk.number - self.first) as usize;
        let (Some(first), Some(last)) = (changed.first(), changed.last()) else {
            return Ok(());
        };
        let (first, last) = (place(first), place(last));
        for chunk in changed {
            let at = (chunk.number - self.first) as usize;
            self.notes[at] = note(chunk);
        }
        let at = NOTES + (self.first + first as u64) * NOTE;
        sums.write_all_at(self.notes[first..=last].as_flattened(), at)
    }
}
