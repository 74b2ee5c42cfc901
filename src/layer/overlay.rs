//! Writes stay in memory and the device below is only read: for read-only mounts of a filesystem
//! whose journal must be replayed first.
//!
//! A block is clean (read from below) or changed (whole in memory, for good). What has been written
//! is lost when the overlay is dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use crate::device::{Caps, Device, Discard, Durability, check_range};
use crate::error::{Error, Kind, Result};
use crate::units::MIB;

/// Changed bytes that are kept at most: twice the journal that `mkfs` makes at its largest here,
/// which is 128 MiB. A write beyond it fails with [`Kind::NoSpace`].
pub const CHANGED_MAX: u64 = 256 * MIB;

/// Granularity of what is kept, unless the device below has a larger alignment.
const BLOCK: u32 = 4096;

/// A device that can be written without writing to `inner`.
pub struct Overlay {
    inner: Arc<dyn Device>,
    block: u64,
    changed_max: u64,
    changed: RwLock<BTreeMap<u64, Box<[u8]>>>,
}

impl Overlay {
    pub fn new(inner: Arc<dyn Device>) -> Overlay {
        Overlay::with_limit(inner, CHANGED_MAX)
    }

    /// With another bound than [`CHANGED_MAX`], in bytes.
    pub fn with_limit(inner: Arc<dyn Device>, changed_max: u64) -> Overlay {
        Overlay {
            block: u64::from(BLOCK.max(inner.caps().alignment)),
            inner,
            changed_max,
            changed: RwLock::default(),
        }
    }

    /// Hands out what was changed, block by block in ascending order, with its offset in bytes.
    pub fn for_each_changed(&self, each: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let changed = self.changed.read().unwrap_or_else(PoisonError::into_inner);
        for (number, block) in changed.iter() {
            each(number * self.block, block)?;
        }
        Ok(())
    }

    /// The blocks that a request touches.
    fn blocks(&self, offset: u64, len: usize) -> Range<u64> {
        match len {
            0 => 0..0,
            len => offset / self.block..(offset + len as u64 - 1) / self.block + 1,
        }
    }

    fn holds_all(&self, blocks: Range<u64>) -> bool {
        let changed = self.changed.read().unwrap_or_else(PoisonError::into_inner);
        changed.range(blocks.clone()).count() as u64 == blocks.end - blocks.start
    }

    /// Where a request and a block meet, as seen from the request and from the block.
    fn overlap(&self, block: u64, offset: u64, len: usize) -> (Range<usize>, Range<usize>) {
        let begin = block * self.block;
        let start = offset.max(begin);
        let end = (offset + len as u64).min(begin + self.block);
        let seen_from = |origin: u64| (start - origin) as usize..(end - origin) as usize;
        (seen_from(offset), seen_from(begin))
    }

    /// A block as the device below has it; the last one may be shorter than the others.
    fn read_below(&self, block: u64) -> Result<Box<[u8]>> {
        let begin = block * self.block;
        let len = self.block.min(self.inner.size() - begin);
        let mut bytes = vec![0; len as usize].into_boxed_slice();
        self.inner.read_exact_at(&mut bytes, begin)?;
        Ok(bytes)
    }
}

impl Device for Overlay {
    fn caps(&self) -> Caps {
        Caps {
            writable: true,
            durability: Durability::BestEffort,
            discard: Discard::Refused,
            ..self.inner.caps()
        }
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self.caps(), self.size(), offset, buf.len())?;
        let blocks = self.blocks(offset, buf.len());
        if !self.holds_all(blocks.clone()) {
            self.inner.read_exact_at(buf, offset)?;
        }
        // Nothing below ever changes, so what came from there is right without a lock.
        let changed = self.changed.read().unwrap_or_else(PoisonError::into_inner);
        for (&block, bytes) in changed.range(blocks) {
            let (outside, inside) = self.overlap(block, offset, buf.len());
            buf[outside].copy_from_slice(&bytes[inside]);
        }
        Ok(())
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        check_range(self.caps(), self.size(), offset, data.len())?;
        let blocks = self.blocks(offset, data.len());
        let mut changed = self.changed.write().unwrap_or_else(PoisonError::into_inner);
        let fresh = blocks.end - blocks.start - changed.range(blocks.clone()).count() as u64;
        if (changed.len() as u64 + fresh) * self.block > self.changed_max {
            return Err(Error::new(
                Kind::NoSpace,
                format!("keep more than {} changed bytes", self.changed_max),
            )
            .hint("mount the volume for writing once, so that its journal is replayed"));
        }
        // All reads from below come first: a failed write changes nothing.
        let edges = BTreeSet::from([blocks.start, blocks.end.saturating_sub(1)]);
        let mut below = BTreeMap::new();
        for block in edges.into_iter().filter(|block| blocks.contains(block)) {
            let (_, inside) = self.overlap(block, offset, data.len());
            if (inside.len() as u64) < self.block && !changed.contains_key(&block) {
                below.insert(block, self.read_below(block)?);
            }
        }
        changed.append(&mut below);
        for block in blocks {
            let (outside, inside) = self.overlap(block, offset, data.len());
            let bytes = changed
                .entry(block)
                .or_insert_with(|| vec![0; self.block as usize].into_boxed_slice());
            bytes[inside].copy_from_slice(&data[outside]);
        }
        Ok(())
    }

    /// Nothing here outlives the process, and [`Caps::durability`] says so.
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _range: Range<u64>) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "discard in an overlay"))
    }

    fn resize(&self, _size: u64) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "resize an overlay"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layer::conformance;
    use crate::layer::fault::{Faulty, Operation};
    use crate::layer::memory::Memory;

    fn memory(size: u64, alignment: u32, writable: bool) -> Arc<Memory> {
        let caps = Caps {
            alignment,
            writable,
            ..Memory::new(0).caps()
        };
        Arc::new(Memory::with_caps(size, caps))
    }

    proptest! {
        #[test]
        fn an_overlay_is_a_device(
            steps in conformance::steps(),
            log in 0..=13_u32,
            units in 0..40_u64,
            content in any::<u8>(),
        ) {
            let below = memory(units << log, 1 << log, true);
            let before = vec![content; (units << log) as usize];
            below.write_all_at(&before, 0).expect("in range");
            let writes = below.counts().writes;
            conformance::check(&Overlay::new(below.clone()), &steps)?;
            let mut after = vec![0; before.len()];
            below.read_exact_at(&mut after, 0).expect("in range");
            prop_assert!(after == before, "the device below has changed");
            let counts = below.counts();
            prop_assert_eq!((counts.writes, counts.flushes, counts.discards), (writes, 0, 0));
        }
    }

    #[test]
    fn a_read_only_device_becomes_writable() {
        let overlay = Overlay::new(memory(10_000, 1, false));
        assert!(overlay.caps().writable);
        overlay.write_all_at(&[5; 2000], 8000).expect("in range");
        let mut buf = [0; 3000];
        overlay.read_exact_at(&mut buf, 7000).expect("in range");
        assert_eq!((buf[999], buf[1000], buf[2999]), (0, 5, 5));
    }

    #[test]
    fn what_is_kept_is_bounded_and_a_refused_write_changes_nothing() {
        let overlay = Overlay::with_limit(memory(1 << 20, 1, false), 3 * 4096);
        overlay.write_all_at(&[1; 5000], 0).expect("two blocks");
        let refused = overlay.write_all_at(&[2; 8193], 4096).unwrap_err();
        assert_eq!(refused.kind(), Kind::NoSpace);
        let mut buf = [0; 5001];
        overlay.read_exact_at(&mut buf, 0).expect("in range");
        assert!(buf[..5000].iter().all(|&byte| byte == 1) && buf[5000] == 0);
        overlay
            .write_all_at(&[3; 8192], 4096)
            .expect("three blocks");
        overlay.write_all_at(&[4; 12288], 0).expect("no new block");
    }

    #[test]
    fn a_write_whose_edge_cannot_be_read_changes_nothing() {
        let below = Arc::new(Faulty::new(memory(1 << 16, 1, false)));
        let overlay = Overlay::new(below.clone());
        let faults = below.faults();
        faults.fail(Some(Operation::Read), 1, Kind::TimedOut);
        let error = overlay.write_all_at(&[1; 8192], 100).unwrap_err();
        assert_eq!(error.kind(), Kind::TimedOut);
        faults.heal();
        let mut buf = [9; 12288];
        overlay.read_exact_at(&mut buf, 0).expect("healed");
        assert!(buf.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn blocks_in_memory_are_not_fetched() {
        let below = memory(1 << 16, 1, false);
        let overlay = Overlay::new(below.clone());
        overlay.write_all_at(&[1; 8192], 4096).expect("in range");
        overlay
            .read_exact_at(&mut [0; 8192], 4096)
            .expect("in range");
        assert_eq!(below.counts().reads, 0);
    }
}
