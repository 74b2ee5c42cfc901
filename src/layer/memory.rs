//! A sparse device in memory, for tests: it counts what is asked of it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::device::{Caps, Device, Discard, Durability, check_range};
use crate::error::{Error, Kind, Result};

/// Granularity of holes.
const BLOCK: usize = 4096;

/// Calls so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub resizes: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

/// A sparse device in memory. Everything in it is lost when it is dropped.
pub struct Memory {
    caps: Caps,
    state: Mutex<State>,
}

struct State {
    size: u64,
    blocks: BTreeMap<u64, Box<[u8; BLOCK]>>,
    counts: Counts,
}

impl Memory {
    /// `size` bytes of hole, with any alignment, writable, discards make holes.
    pub fn new(size: u64) -> Self {
        let caps = Caps {
            alignment: 1,
            io_best: 1 << 20,
            writable: true,
            durability: Durability::Stable,
            discard: Discard::Zeros,
        };
        Memory::with_caps(size, caps)
    }

    /// A device that keeps to other capabilities.
    pub fn with_caps(size: u64, caps: Caps) -> Self {
        let state = State {
            size,
            blocks: BTreeMap::new(),
            counts: Counts::default(),
        };
        Memory {
            caps,
            state: Mutex::new(state),
        }
    }

    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// Bytes that are not a hole, in blocks of 4096.
    pub fn allocated(&self) -> u64 {
        (self.lock().blocks.len() * BLOCK) as u64
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked elsewhere must not hide its own message behind this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn need_writable(&self) -> Result<()> {
        match self.caps.writable {
            true => Ok(()),
            false => Err(Error::new(Kind::ReadOnly, "memory is read-only")),
        }
    }
}

impl State {
    /// Makes a hole of a range that lies within the device.
    fn punch(&mut self, offset: u64, len: usize) {
        for piece in pieces(offset, len) {
            if piece.inside.len() == BLOCK {
                self.blocks.remove(&piece.block);
            } else if let Some(block) = self.blocks.get_mut(&piece.block) {
                block[piece.inside].fill(0);
            }
        }
    }
}

/// The part of a request that falls into one block.
struct Piece {
    block: u64,
    inside: Range<usize>,
    /// Where it lies in the caller's buffer.
    outside: Range<usize>,
}

fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let start = (at % BLOCK as u64) as usize;
        let count = (BLOCK - start).min(len - done);
        let piece = Piece {
            block: at / BLOCK as u64,
            inside: start..start + count,
            outside: done..done + count,
        };
        done += count;
        (count > 0).then_some(piece)
    })
}

impl Device for Memory {
    fn caps(&self) -> Caps {
        self.caps
    }

    fn size(&self) -> u64 {
        self.lock().size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut state = self.lock();
        check_range(self.caps, state.size, offset, buf.len())?;
        state.counts.reads += 1;
        state.counts.bytes_read += buf.len() as u64;
        for piece in pieces(offset, buf.len()) {
            let to = &mut buf[piece.outside];
            match state.blocks.get(&piece.block) {
                Some(block) => to.copy_from_slice(&block[piece.inside]),
                None => to.fill(0),
            }
        }
        Ok(())
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.need_writable()?;
        let mut state = self.lock();
        check_range(self.caps, state.size, offset, data.len())?;
        state.counts.writes += 1;
        state.counts.bytes_written += data.len() as u64;
        for piece in pieces(offset, data.len()) {
            let block = state
                .blocks
                .entry(piece.block)
                .or_insert_with(|| Box::new([0; BLOCK]));
            block[piece.inside].copy_from_slice(&data[piece.outside]);
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.lock().counts.flushes += 1;
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.need_writable()?;
        if self.caps.discard == Discard::Refused {
            return Err(Error::new(Kind::Unsupported, "discard in this memory"));
        }
        let mut state = self.lock();
        let len = range.end.saturating_sub(range.start) as usize;
        check_range(self.caps, state.size, range.start, len)?;
        state.counts.discards += 1;
        state.punch(range.start, len);
        Ok(())
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.need_writable()?;
        let mut state = self.lock();
        check_range(self.caps, u64::MAX, size, 0)?;
        state.counts.resizes += 1;
        let tail = state.size.saturating_sub(size) as usize;
        state.punch(size, tail);
        state.size = size;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layer::conformance::{self, Step};

    proptest! {
        #[test]
        fn memory_is_a_device(steps in conformance::steps(), log in 0..=12_u32) {
            let caps = Caps { alignment: 1 << log, ..Memory::new(0).caps };
            conformance::check(&Memory::with_caps(3 << 14, caps), &steps)?;
        }

        #[test]
        fn memory_that_refuses_discards_is_a_device(steps in conformance::steps()) {
            let caps = Caps { discard: Discard::Refused, ..Memory::new(0).caps };
            conformance::check(&Memory::with_caps(50_000, caps), &steps)?;
        }
    }

    #[test]
    fn the_suite_finds_a_device_that_lies() {
        /// Says yes to every write and forgets it.
        struct Forgetful(Memory);
        impl Device for Forgetful {
            fn caps(&self) -> Caps {
                self.0.caps()
            }
            fn size(&self) -> u64 {
                self.0.size()
            }
            fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
                self.0.read_exact_at(buf, offset)
            }
            fn write_all_at(&self, _: &[u8], _: u64) -> Result<()> {
                Ok(())
            }
            fn flush(&self) -> Result<()> {
                Ok(())
            }
            fn discard(&self, range: Range<u64>) -> Result<()> {
                self.0.discard(range)
            }
            fn resize(&self, size: u64) -> Result<()> {
                self.0.resize(size)
            }
        }
        let write = Step::Write {
            at: 0,
            units: 1,
            seed: 1,
        };
        assert!(conformance::check(&Forgetful(Memory::new(9)), &[write]).is_err());
    }

    #[test]
    fn calls_are_counted_and_holes_cost_nothing() {
        let memory = Memory::new(1 << 40);
        memory.write_all_at(&[1; 8], 1 << 39).expect("in range");
        memory.read_exact_at(&mut [0; 4], 0).expect("in range");
        memory.flush().expect("nothing to do");
        let counts = memory.counts();
        assert_eq!((counts.reads, counts.writes, counts.flushes), (1, 1, 1));
        assert_eq!((counts.bytes_read, counts.bytes_written), (4, 8));
        assert_eq!(memory.allocated(), 4096);
        let mut kept = [0; 8];
        memory.read_exact_at(&mut kept, 1 << 39).expect("in range");
        assert_eq!(kept, [1; 8]);
    }
}
