//! The blocks of a journal (jbd2), read and judged; numbers are big-endian.
//!
//! A transaction is blocks of tags, each followed by the blocks that its tags name, and of
//! revocations, and ends with a commit block. What is not committed did not happen.

use super::checksum::{crc32c, crc32c_without};
use super::{Fault, array, damaged};

const MAGIC: u32 = 0xC03B_3998;
const HEADER: usize = 12;

const INCOMPAT_64BIT: u32 = 0x2;
const INCOMPAT_CSUM_V2: u32 = 0x8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
/// Revocations, 64 bits, asynchronous commits, checksums in both ways.
const INCOMPAT_KNOWN: u32 = 0x1 | INCOMPAT_64BIT | 0x4 | INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3;

fn u32_be(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

fn u16_be(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

/// What the journal's first block says. Blocks are counted in the journal.
#[derive(Clone, Debug)]
pub struct Log {
    /// Blocks of the journal.
    pub blocks: u32,
    /// The first block after its superblock: the log comes back here from its end.
    pub first: u32,
    /// Where the log begins; nothing if it is empty.
    pub start: Option<u32>,
    /// The transaction that begins there.
    pub sequence: u32,
    features: u32,
    seed: u32,
}

/// One block of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Block {
    Tags(Vec<Tag>),
    /// Blocks of the volume for which what was logged up to this transaction does not count.
    Revoked(Vec<u64>),
    Commit,
}

/// The next block of the log is this block of the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag {
    pub block: u64,
    /// Its first four bytes were zeroed, because they were the journal's own magic number.
    pub is_escaped: bool,
    checksum: u32,
}

/// The bytes that an escaped block begins with.
pub const ESCAPED: [u8; 4] = MAGIC.to_be_bytes();

impl Log {
    /// Judges the first block of a journal of a filesystem with blocks of `block_size` bytes.
    pub fn parse(raw: &[u8], block_size: u64) -> Result<Log, Fault> {
        let kind = u32_be(raw, 4);
        if u32_be(raw, 0) != MAGIC || !(3..=4).contains(&kind) || raw.len() < 1024 {
            return damaged("the journal has no beginning");
        }
        // The first kind has no features.
        let features = if kind == 4 { u32_be(raw, 0x28) } else { 0 };
        if features & INCOMPAT_FAST_COMMIT != 0 {
            let what = "fast commits in a journal that was not closed";
            return Err(Fault::Unsupported(what.into()));
        }
        if features & !INCOMPAT_KNOWN != 0 {
            let unknown = features & !INCOMPAT_KNOWN;
            let what = format!("unknown features in its journal ({unknown:#x})");
            return Err(Fault::Unsupported(what));
        }
        let log = Log {
            blocks: u32_be(raw, 0x10),
            first: u32_be(raw, 0x14),
            start: Some(u32_be(raw, 0x1C)).filter(|start| *start != 0),
            sequence: u32_be(raw, 0x18),
            features,
            seed: crc32c(!0, &raw[0x30..0x40]),
        };
        if log.has_checksums()
            && (raw[0x50] != 4
                || crc32c_without(!0, &raw[..1024], 0xFC..0x100) != u32_be(raw, 0xFC))
        {
            return damaged("the checksum of the journal's beginning is wrong");
        }
        let inside = |block: u32| (log.first..log.blocks).contains(&block);
        let sane = u64::from(u32_be(raw, 0xC)) == block_size
            && log.first >= 1
            && log.first < log.blocks
            && log.start.is_none_or(inside);
        match sane {
            true => Ok(log),
            false => damaged("the journal's beginning makes no sense"),
        }
    }

    fn has_checksums(&self) -> bool {
        self.features & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) != 0
    }

    fn is_wide(&self) -> bool {
        self.features & INCOMPAT_64BIT != 0
    }

    /// The block that comes after `block` in the log.
    pub fn after(&self, block: u32) -> u32 {
        match block + 1 {
            next if next >= self.blocks => self.first,
            next => next,
        }
    }

    /// What a block of the log is; nothing if it is not of transaction `sequence`, or not whole:
    /// there the log ends.
    pub fn parse_block(&self, raw: &[u8], sequence: u32) -> Option<Block> {
        if u32_be(raw, 0) != MAGIC || u32_be(raw, 8) != sequence {
            return None;
        }
        match u32_be(raw, 4) {
            1 => self.parse_tags(raw),
            2 if self.has_checksums() => {
                let sum = crc32c_without(self.seed, raw, 0x10..0x14);
                (sum == u32_be(raw, 0x10)).then_some(Block::Commit)
            }
            2 => Some(Block::Commit),
            5 => self.parse_revoked(raw),
            _ => None,
        }
    }

    /// Bytes before the checksum at the end of a block, if that is right.
    fn body<'a>(&self, raw: &'a [u8]) -> Option<&'a [u8]> {
        if !self.has_checksums() {
            return Some(raw);
        }
        let end = raw.len().checked_sub(4)?;
        let sum = crc32c_without(self.seed, raw, end..raw.len());
        (sum == u32_be(raw, end)).then_some(&raw[..end])
    }

    fn parse_tags(&self, raw: &[u8]) -> Option<Block> {
        const ESCAPE: u32 = 1;
        const SAME_UUID: u32 = 2;
        const LAST: u32 = 8;
        let third = self.features & INCOMPAT_CSUM_V3 != 0;
        let second = self.features & INCOMPAT_CSUM_V2 != 0;
        let size = match (third, self.is_wide()) {
            (true, _) => 16,
            (false, wide) => 8 + if wide { 4 } else { 0 } + if second { 2 } else { 0 },
        };
        let mut rest = self.body(raw)?.get(HEADER..)?;
        let mut tags = Vec::new();
        loop {
            let (tag, tail) = rest.split_at_checked(size)?;
            let (flags, checksum) = match third {
                true => (u32_be(tag, 4), u32_be(tag, 12)),
                false => (u16_be(tag, 6).into(), u16_be(tag, 4).into()),
            };
            let high = if self.is_wide() { u32_be(tag, 8) } else { 0 };
            tags.push(Tag {
                block: u64::from(u32_be(tag, 0)) | u64::from(high) << 32,
                is_escaped: flags & ESCAPE != 0,
                checksum,
            });
            if flags & LAST != 0 {
                return Some(Block::Tags(tags));
            }
            rest = match flags & SAME_UUID {
                0 => tail.get(16..)?,
                _ => tail,
            };
        }
    }

    fn parse_revoked(&self, raw: &[u8]) -> Option<Block> {
        let body = self.body(raw)?;
        let end = u32_be(raw, HEADER) as usize;
        let list = body.get(HEADER + 4..end)?;
        let size = if self.is_wide() { 8 } else { 4 };
        let number = |raw: &[u8]| match self.is_wide() {
            true => u64::from_be_bytes(array(raw, 0)),
            false => u32_be(raw, 0).into(),
        };
        Some(Block::Revoked(
            list.chunks_exact(size).map(number).collect(),
        ))
    }

    /// Whether a logged block is what its tag says.
    pub fn is_whole(&self, tag: &Tag, sequence: u32, raw: &[u8]) -> bool {
        if !self.has_checksums() {
            return true;
        }
        let sum = crc32c(crc32c(self.seed, &sequence.to_be_bytes()), raw);
        match self.features & INCOMPAT_CSUM_V3 {
            0 => sum & 0xFFFF == tag.checksum,
            _ => sum == tag.checksum,
        }
    }
}
