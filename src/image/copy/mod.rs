//! A copy of an image, as it is: ciphertext, holes and all. No key is needed, and none is read.
//!
//! ```text
//! IMAGE.part    the copy until it is whole; then it takes the name by one rename
//! IMAGE.sums    what is known of it: a hash for each chunk of 1 MiB
//! ```
//!
//! A chunk of the source is read, hashed, and sent if its hash is not the one that is noted. So an
//! interrupted run goes on where it stopped, and a later one sends what has changed. A note never says
//! more than is true: before a chunk is overwritten its note is withdrawn, and the new one is made
//! when the chunk is on stable storage and was read back.

mod notes;

use std::ops::Range;

use crate::device::{Device, Discard};
use crate::error::{Error, Kind, Result};
use crate::progress::{Event, Monitor, Progress};
use crate::remote::{Access, Store};
use crate::units::{Bytes, MIB};

use super::parallel::in_parallel;
use notes::{
    Changed, HOLE, NOTE, NOTES, Note, Notes, PAGE, UNKNOWN, is_as_noted, note_of, open_sums,
    sums_size,
};

/// Added to the name of the copy while it is made, and to that of the notes.
pub const PART: &str = ".part";
pub const SUMS: &str = ".sums";

/// What is compared and sent as one.
const CHUNK: u64 = MIB;

/// Chunks that are under way together; what of them has changed is held in memory: 64 MiB.
const BATCH: usize = 64;

/// What is copied, and how.
pub struct CopyJob<'a> {
    pub from: &'a dyn Device,
    /// Where `from` holds something, if that is known.
    pub ranges: Option<&'a [Range<u64>]>,
    pub to: &'a dyn Store,
    /// Make another copy beside one that is whole, and replace it at the end.
    pub anew: bool,
    pub monitor: &'a dyn Monitor,
    pub check: &'a (dyn Fn() -> Result<()> + Sync),
    /// Asked last of all before the copy gets its name.
    pub unmoved: &'a (dyn Fn() -> Result<()> + Sync),
}

/// What was done, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Of the image.
    pub size: u64,
    /// Read of the source.
    pub read: u64,
    /// Written to the copy, and read back.
    pub written: u64,
    /// That were in the copy already.
    pub same: u64,
}

/// Makes `job.to` a copy of `job.from`. Both are held by leases of ours.
///
/// # Errors
/// Whatever it is, what was sent stays, and another run goes on from there.
/// [`Kind::Corrupt`] when the copy does not read as it was written.
pub fn copy(job: &CopyJob<'_>) -> Result<Copied> {
    let size = job.from.size();
    let (part, sums) = (job.to.beside(PART)?, job.to.beside(SUMS)?);
    let is_there = |store: &dyn Store| match store.open(Access::ReadOnly) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == Kind::NoImage => Ok(false),
        Err(error) => Err(error),
    };
    let half_done = is_there(&*part)?;
    let mut trusted = true;
    if !half_done {
        let whole = is_there(job.to)? && !job.anew;
        if !whole {
            remove_if_there(&*sums)?;
        }
        trusted = open_sums(&*sums, size)?;
        match whole {
            true => {
                job.monitor.report(Event::Phase("look at the copy"));
                trusted = trusted && is_as_noted(job, &*sums)?;
                // From here on it is not what its name says.
                job.to.rename("", PART)?;
            }
            false => {
                part.create(size)?.flush()?;
                trusted = true;
            }
        }
    } else {
        trusted = open_sums(&*sums, size)? && trusted;
    }
    let sums_device = sums.open(Access::ReadWrite)?;
    let to = part.open(Access::ReadWrite)?;
    for (device, wanted) in [(&to, size), (&sums_device, sums_size(size))] {
        if device.size() != wanted {
            device.resize(wanted)?;
        }
    }
    let mut copier = Copier {
        job,
        to: &*to,
        sums: &*sums_device,
        size,
        copied: Copied {
            size,
            ..Copied::default()
        },
    };
    if !trusted {
        copier.note_what_is_there()?;
    }
    copier.run()?;
    to.flush()?;
    sums_device.flush()?;
    let copied = copier.copied;
    drop((to, sums_device));
    for store in [&part, &sums] {
        store.settle(&|left| {
            let note = format!("waiting {} s for late writes", left.as_secs());
            tracing::debug!(note);
        })?;
    }
    (job.check)()?;
    (job.unmoved)()?;
    job.to.rename(PART, "")?;
    Ok(copied)
}

fn remove_if_there(store: &dyn Store) -> Result<()> {
    match store.remove() {
        Err(error) if error.kind() == Kind::NoImage => Ok(()),
        other => other,
    }
}

struct Copier<'a> {
    job: &'a CopyJob<'a>,
    to: &'a dyn Device,
    sums: &'a dyn Device,
    size: u64,
    copied: Copied,
}

impl Copier<'_> {
    fn chunk(&self, number: u64) -> Range<u64> {
        number * CHUNK..((number + 1) * CHUNK).min(self.size)
    }

    fn read(&self, device: &dyn Device, number: u64) -> Result<Vec<u8>> {
        let range = self.chunk(number);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        device.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    fn tell(&self, done: u64, total: u64) {
        self.job.monitor.report(Event::Progress(Progress {
            bytes: Some(done),
            bytes_total: Some(total),
            sent: Some(self.job.to.traffic().sent),
            ..Progress::default()
        }));
    }

    /// The notes of a page of chunks that begins at `first`.
    fn notes(&self, first: u64) -> Result<Vec<Note>> {
        let count = PAGE.min(self.size.div_ceil(CHUNK) - first);
        let mut bytes = vec![0; (count * NOTE) as usize];
        self.sums.read_exact_at(&mut bytes, NOTES + first * NOTE)?;
        let (notes, _) = bytes.as_chunks::<{ NOTE as usize }>();
        Ok(notes.to_vec())
    }

    /// Reads all of a copy whose notes are of no use, and notes what it holds.
    fn note_what_is_there(&mut self) -> Result<()> {
        self.job.monitor.report(Event::Phase("read the copy"));
        let chunks = self.size.div_ceil(CHUNK);
        for first in (0..chunks).step_by(BATCH) {
            (self.job.check)()?;
            let numbers: Vec<u64> = (first..(first + BATCH as u64).min(chunks)).collect();
            let notes = in_parallel(&numbers, |number| {
                Ok(note_of(&self.read(self.to, *number)?))
            })?;
            self.sums
                .write_all_at(notes.as_flattened(), NOTES + first * NOTE)?;
            self.tell((first + numbers.len() as u64) * CHUNK, chunks * CHUNK);
        }
        self.sums.flush()
    }

    fn run(&mut self) -> Result<()> {
        self.job.monitor.report(Event::Phase("copy"));
        let chunks = self.size.div_ceil(CHUNK);
        let total = match self.job.ranges {
            Some(ranges) => chunks_in(ranges, 0..chunks) * CHUNK,
            None => chunks * CHUNK,
        };
        for page in (0..chunks).step_by(PAGE as usize) {
            let mut notes = Notes {
                first: page,
                notes: self.notes(page)?,
            };
            let wanted: Vec<(u64, Note)> = (page..)
                .zip(notes.notes.iter().copied())
                .filter(|(number, note)| *note != HOLE || self.may_hold(*number))
                .collect();
            for batch in wanted.chunks(BATCH) {
                (self.job.check)()?;
                self.copy_batch(batch, &mut notes)?;
                self.tell(self.copied.read, total);
            }
        }
        Ok(())
    }

    /// Whether a chunk of the source may be more than a hole.
    fn may_hold(&self, number: u64) -> bool {
        let Some(ranges) = self.job.ranges else {
            return true;
        };
        let chunk = self.chunk(number);
        let next = ranges.partition_point(|range| range.end <= chunk.start);
        ranges
            .get(next)
            .is_some_and(|range| range.start < chunk.end)
    }

    fn copy_batch(&mut self, batch: &[(u64, Note)], notes: &mut Notes) -> Result<()> {
        let compared = in_parallel(batch, |(number, before)| {
            let bytes = match self.may_hold(*number) {
                true => self.read(self.job.from, *number)?,
                false => vec![0; (self.chunk(*number).end - self.chunk(*number).start) as usize],
            };
            let now = note_of(&bytes);
            Ok((now != *before).then_some(Changed {
                number: *number,
                before: *before,
                now,
                bytes,
            }))
        })?;
        let bytes_of = |number: u64| self.chunk(number).end - self.chunk(number).start;
        let all: u64 = batch.iter().map(|(number, _)| bytes_of(*number)).sum();
        let changed: Vec<Changed> = compared.into_iter().flatten().collect();
        let written: u64 = changed.iter().map(|chunk| chunk.bytes.len() as u64).sum();
        self.copied.read += all;
        self.copied.same += all - written;
        if changed.is_empty() {
            return Ok(());
        }
        if changed.iter().any(|chunk| chunk.before != UNKNOWN) {
            notes.set(&changed, |_| UNKNOWN, self.sums)?;
            self.sums.flush()?;
        }
        in_parallel(&changed, |chunk| self.write(chunk))?;
        self.to.flush()?;
        in_parallel(&changed, |chunk| self.prove(chunk))?;
        notes.set(&changed, |chunk| chunk.now, self.sums)?;
        self.copied.written += written;
        Ok(())
    }

    fn write(&self, chunk: &Changed) -> Result<()> {
        let range = self.chunk(chunk.number);
        if chunk.now == HOLE && self.to.caps().discard == Discard::Zeros {
            return self.to.discard(range);
        }
        self.to.write_all_at(&chunk.bytes, range.start)
    }

    fn prove(&self, chunk: &Changed) -> Result<()> {
        match note_of(&self.read(self.to, chunk.number)?) == chunk.now {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Corrupt,
                format!(
                    "{} at {} do not read as they were written",
                    Bytes(chunk.bytes.len() as u64),
                    self.chunk(chunk.number).start
                ),
            )
            .hint("look into the disk and the memory of the machine that keeps the copy")),
        }
    }
}

/// How many of these chunks hold something.
fn chunks_in(ranges: &[Range<u64>], all: Range<u64>) -> u64 {
    let (mut count, mut next) = (0, all.start);
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        let first = (range.start / CHUNK).max(next);
        let end = range.end.div_ceil(CHUNK).min(all.end);
        count += end.saturating_sub(first);
        next = next.max(end);
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use crate::remote::local::LocalStore;
    use std::os::unix::fs::FileExt;

    #[test]
    fn chunks_that_hold_something_are_counted_once() {
        let all = 0..100;
        assert_eq!(chunks_in(&[], all.clone()), 0);
        let ranges = [
            0..1,
            5..CHUNK + 1,
            CHUNK + 7..CHUNK + 8,
            10 * CHUNK..12 * CHUNK,
        ];
        assert_eq!(chunks_in(&ranges, all), 4);
    }

    /// One copy after the other of a file that changes, each with what was noted of the last.
    #[test]
    fn each_copy_is_whole_and_sends_what_has_changed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("from");
        let file = std::fs::File::create_new(&path).expect("made");
        file.set_len(60 * CHUNK + 5000).expect("sparse");
        let put = |chunk: u64, byte: u8| {
            file.write_all_at(&[byte; 3000], chunk * CHUNK + 100)
                .expect("written");
        };
        for chunk in [0, 1, 30, 59, 60] {
            put(chunk, 9);
        }
        let run = |anew: bool| {
            let from = LocalStore::new(&path);
            let to = LocalStore::new(dir.path().join("to"));
            let ranges = from.data_ranges().expect("told").expect("local");
            let device = from.open(Access::ReadOnly).expect("opens");
            let job = CopyJob {
                from: &*device,
                ranges: Some(&ranges),
                to: &to,
                anew,
                monitor: &Silent,
                check: &|| Ok(()),
                unmoved: &|| Ok(()),
            };
            let copied = copy(&job).expect("copied");
            let same = std::fs::read(&path).expect("read")
                == std::fs::read(dir.path().join("to")).expect("read");
            assert!(same, "{copied:?}");
            assert!(!dir.path().join("to.part").exists());
            copied
        };
        let first = run(false);
        assert_eq!((first.written, first.same), (4 * CHUNK + 5000, 0));
        let stored = |name: &str| {
            let about = std::fs::metadata(dir.path().join(name)).expect("there");
            std::os::unix::fs::MetadataExt::blocks(&about) * 512
        };
        assert!(
            stored("to") <= 6 * CHUNK,
            "{} bytes are stored",
            stored("to")
        );
        assert_eq!(run(false).written, 0);
        put(30, 1);
        put(40, 1);
        assert_eq!(run(false).written, 2 * CHUNK);
        // Behind our back, where the filesystem would note that it was mounted.
        let to = std::fs::File::options()
            .write(true)
            .open(dir.path().join("to"))
            .expect("opens");
        to.write_all_at(b"other", 16 * CHUNK + 1024)
            .expect("written");
        assert_eq!(run(false).written, CHUNK);
        file.set_len(62 * CHUNK).expect("grown");
        put(61, 4);
        assert_eq!(
            run(false).written,
            2 * CHUNK,
            "the last chunk is longer now"
        );
        // All zeros now: the copy gets a hole.
        file.write_all_at(&[0; 3000], 30 * CHUNK + 100)
            .expect("written");
        assert_eq!(run(false).written, CHUNK);
        assert_eq!(run(true).written, 6 * CHUNK);
    }
}
