//! Reading what files hold, to see whether the server still has it.
//!
//! LUKS2 has no checksums, so a byte that has changed cannot be told from one that has not. What can
//! be told is a block that the server does not give, and one that it has lost: a sector of an image
//! that was ever written is never all zeros, so a hole where a file has content is content that is
//! gone. The ciphertext is read, and not decrypted.

mod subset;
mod windows;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};
use crate::ext4::Piece;
use crate::progress::{Event, Monitor, Progress};

pub use subset::Subset;
use windows::{Window, Windows, cut, len};

/// Windows that are read at the same time: 8 MiB fill a link of 1 Gbit/s at 60 ms.
const READERS: usize = 8;

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// The first so many ranges of each kind are kept for the report; all are counted.
pub const LISTED_MAX: usize = 20;

/// What is to be read, and for how long.
pub struct Reading<'a> {
    /// The image, ciphertext.
    pub image: &'a dyn Device,
    /// Where the volume begins in it.
    pub begins: u64,
    /// Bytes of a sector of the encryption.
    pub sector: usize,
    /// In places of the volume, ascending.
    pub pieces: &'a [Piece],
    pub subset: Subset,
    /// No window is begun after it.
    pub until: Option<Instant>,
    pub monitor: &'a dyn Monitor,
    pub check: &'a (dyn Fn() -> Result<()> + Sync),
}

/// What came of it; ranges are places in the image.
#[derive(Debug, Default)]
pub struct Read {
    /// Bytes that files have, and those of them that were to be read and were read.
    pub total: u64,
    pub chosen: u64,
    pub done: u64,
    /// Holes where files have content: bytes, the first ranges, and whose they are.
    pub lost: u64,
    pub lost_at: Vec<(Range<u64>, u32)>,
    /// What the server refused to read: bytes, and the first ranges with the reason.
    pub refused: u64,
    pub refused_at: Vec<(Range<u64>, String)>,
    pub out_of_time: bool,
}

/// Reads what files hold.
///
/// # Errors
/// When the link breaks or a signal comes; what is wrong with the data is in the result.
pub fn read(job: &Reading<'_>) -> Result<Read> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed)
        .map_err(|e| Error::new(Kind::Io, e.to_string()))
        .attempt(|| "get random bytes")?;
    let seed = u64::from_le_bytes(seed);
    let total = job.pieces.iter().map(|piece| len(&piece.range)).sum();
    let windows = || Windows::of(job, seed, total);
    let chosen: u64 = windows().map(|window| window.wanted).sum();
    let count = windows().count();
    // A run that may end early begins elsewhere each time, or the end would never be read.
    let first = match job.until {
        Some(_) if count > 0 => (seed % count as u64) as usize,
        _ => 0,
    };
    let queue = Mutex::new(windows().skip(first).chain(windows().take(first)));
    let result = Mutex::new(Read {
        total,
        chosen,
        ..Read::default()
    });
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let failure = Mutex::new(None);
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            if job.until.is_some_and(|until| Instant::now() >= until) {
                lock(&result).out_of_time = true;
                return;
            }
            let Some(window) = lock(&queue).next() else {
                return;
            };
            if let Err(error) = job.read_window(&window, &result) {
                stop.store(true, Ordering::Relaxed);
                lock(&failure).get_or_insert(error);
                return;
            }
            done.fetch_add(window.wanted, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| -> Result<()> {
        let readers: Result<Vec<_>> = (0..READERS)
            .map(|_| {
                let reader = thread::Builder::new().name("check-read".into());
                reader
                    .spawn_scoped(scope, work)
                    .attempt(|| "start a thread")
            })
            .collect();
        let readers = readers.inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        while readers.iter().any(|reader| !reader.is_finished()) {
            thread::sleep(TELL_EVERY);
            job.monitor.report(Event::Progress(Progress {
                bytes: Some(done.load(Ordering::Relaxed)),
                bytes_total: Some(chosen),
                ..Progress::default()
            }));
            if let Err(error) = (job.check)() {
                stop.store(true, Ordering::Relaxed);
                lock(&failure).get_or_insert(error);
            }
        }
        Ok(())
    })?;
    if let Some(error) = lock(&failure).take() {
        return Err(error);
    }
    let mut result = result.into_inner().unwrap_or_else(PoisonError::into_inner);
    result.done = done.into_inner();
    result.out_of_time &= result.done < chosen;
    result.lost_at.sort_by_key(|(range, _)| range.start);
    result.refused_at.sort_by_key(|(range, _)| range.start);
    Ok(result)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reading<'_> {
    fn read_window(&self, window: &Window<'_>, result: &Mutex<Read>) -> Result<()> {
        let at = self.begins + window.range.start;
        let mut buf = vec![0; len(&window.range) as usize];
        match self.image.read_exact_at(&mut buf, at) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), Kind::Io | Kind::Corrupt | Kind::Denied) => {
                return self.read_pieces(window, result);
            }
            Err(error) => return Err(error),
        }
        for piece in window.pieces {
            let inside = cut(&piece.range, &window.range);
            let begin = (inside.start - window.range.start) as usize;
            let bytes = &buf[begin..begin + len(&inside) as usize];
            self.note_holes(bytes, inside.start, piece.inode, result);
        }
        Ok(())
    }

    /// One sector after the other, where not all could be read at once.
    fn read_pieces(&self, window: &Window<'_>, result: &Mutex<Read>) -> Result<()> {
        let mut sector = vec![0; self.sector];
        for piece in window.pieces {
            let inside = cut(&piece.range, &window.range);
            for at in inside.step_by(self.sector) {
                match self.image.read_exact_at(&mut sector, self.begins + at) {
                    Ok(()) => self.note_holes(&sector, at, piece.inode, result),
                    Err(error)
                        if matches!(error.kind(), Kind::Io | Kind::Corrupt | Kind::Denied) =>
                    {
                        let mut result = lock(result);
                        result.refused += self.sector as u64;
                        let start = self.begins + at;
                        if result.refused_at.len() < LISTED_MAX {
                            let why = error.chain().pop().unwrap_or_default();
                            let range = start..start + self.sector as u64;
                            result.refused_at.push((range, why));
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// `at` is where `bytes` begin in the volume.
    fn note_holes(&self, bytes: &[u8], at: u64, inode: u32, result: &Mutex<Read>) {
        for (number, sector) in (0..).zip(bytes.chunks(self.sector)) {
            if sector.iter().any(|byte| *byte != 0) {
                continue;
            }
            let start = self.begins + at + number * self.sector as u64;
            let end = start + sector.len() as u64;
            let mut result = lock(result);
            result.lost += sector.len() as u64;
            let room = result.lost_at.len() < LISTED_MAX;
            match result.lost_at.last_mut() {
                Some((last, of)) if last.end == start && *of == inode => last.end = end,
                _ if room => result.lost_at.push((start..end, inode)),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::layer::fault::{Faulty, Operation};
    use crate::layer::memory::Memory;
    use crate::progress::Silent;
    use crate::units::MIB;

    const BEGINS: u64 = 8192;

    fn piece(range: Range<u64>, inode: u32) -> Piece {
        Piece { range, inode }
    }

    pub fn pieces() -> Vec<Piece> {
        vec![
            piece(4096..12288, 11),
            piece(MIB - 4096..2 * MIB + 8192, 12),
            piece(5 * MIB..5 * MIB + 4096, 13),
        ]
    }

    fn memory() -> Arc<Memory> {
        let memory = Memory::new(BEGINS + 6 * MIB);
        let some = vec![7; (6 * MIB) as usize];
        memory.write_all_at(&some, BEGINS).expect("in range");
        Arc::new(memory)
    }

    pub fn job<'a>(image: &'a dyn Device, pieces: &'a [Piece], subset: Subset) -> Reading<'a> {
        Reading {
            image,
            begins: BEGINS,
            sector: 4096,
            pieces,
            subset,
            until: None,
            monitor: &Silent,
            check: &|| Ok(()),
        }
    }

    #[test]
    fn a_hole_in_a_file_is_found_and_one_beside_it_is_none() {
        let (memory, pieces) = (memory(), pieces());
        let zeros = [0; 8192];
        memory
            .write_all_at(&zeros, BEGINS + 2 * MIB - 4096)
            .expect("in range");
        memory
            .write_all_at(&zeros, BEGINS + 3 * MIB)
            .expect("in range");
        let read = read(&job(&memory, &pieces, Subset::All)).expect("reads");
        assert_eq!(read.lost, 8192);
        assert!(
            read.lost_at.iter().all(|(_, inode)| *inode == 12),
            "{read:?}"
        );
        assert_eq!((read.total, read.done), (read.chosen, read.total));
        assert!(!read.out_of_time && read.refused == 0);
    }

    #[test]
    fn what_cannot_be_read_is_told_and_the_rest_is_read() {
        let (memory, pieces) = (memory(), pieces());
        let faulty = Faulty::new(memory);
        let faults = faulty.faults();
        faults.fail(Some(Operation::Read), 0, Kind::Io);
        let one = &pieces[..1];
        let read = read(&job(&faulty, one, Subset::All)).expect("goes on");
        assert_eq!((read.refused, read.refused_at.len()), (8192, 2), "{read:?}");
        assert_eq!(read.lost, 0);
    }

    #[test]
    fn a_run_out_of_time_says_so() {
        let (memory, pieces) = (memory(), pieces());
        let mut job = job(&memory, &pieces, Subset::All);
        job.until = Some(Instant::now());
        let read = read(&job).expect("ends");
        assert!(read.out_of_time && read.done == 0, "{read:?}");
    }
}
