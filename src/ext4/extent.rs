//! Trees of extents: which blocks of the volume are which blocks of a file. One node at a time;
//! whoever walks goes only down, by a level each step, so that no cycle of nodes can hold it.

use std::ops::Range;

use super::checksum::crc32c;
use super::{Fault, Inode, Superblock, damaged, u16_at, u32_at};

const MAGIC: u16 = 0xF30A;
const HEADER: usize = 12;
const ENTRY: usize = 12;
/// The kernel makes no deeper tree (`EXT4_MAX_EXTENT_DEPTH`).
const DEPTH_MAX: u16 = 5;
/// A longer length means: allocated, and never written.
const LENGTH_MAX: u16 = 32768;

/// Blocks of a file that follow each other, on the volume too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// First block of the volume; nothing if these blocks read as zeros.
    pub start: Option<u64>,
    /// How many, at least one.
    pub length: u64,
}

/// What a node says of one block of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// It and those after it.
    Run(Run),
    /// Ask the node in this block of the volume. What it says holds before the second number, the
    /// file's block where the next node begins.
    Down(u64, u64),
}

/// A judged node.
#[derive(Debug)]
pub struct Node<'a> {
    pub depth: u16,
    entries: &'a [u8],
}

/// The place of a node that is in its inode.
pub const IN_INODE: Option<u64> = None;

/// Judges a node. `block` says where it is; one in a block of its own has a checksum.
pub fn parse_node<'a>(
    sb: &Superblock,
    inode: &Inode,
    block: Option<u64>,
    raw: &'a [u8],
) -> Result<Node<'a>, Fault> {
    let wrong = |what: &str| damaged(format!("inode {}: an extent node {what}", inode.number));
    let (entries, most) = (usize::from(u16_at(raw, 2)), usize::from(u16_at(raw, 4)));
    let depth = u16_at(raw, 6);
    let room = raw.len().saturating_sub(HEADER) / ENTRY;
    if u16_at(raw, 0) != MAGIC {
        return wrong("is none");
    }
    if entries > most || most > room || depth > DEPTH_MAX {
        return wrong("has a header that makes no sense");
    }
    if block.is_some() && sb.checksums {
        let tail = HEADER + most * ENTRY;
        if tail + 4 > raw.len() || crc32c(inode.seed, &raw[..tail]) != u32_at(raw, tail) {
            return wrong("has a wrong checksum");
        }
    }
    let node = Node {
        depth,
        entries: &raw[HEADER..HEADER + entries * ENTRY],
    };
    // In order and apart from each other, and all on the volume.
    let mut next = 0;
    for entry in node.entries.chunks_exact(ENTRY) {
        let (from, volume) = node.covered(entry);
        if from.start < next || volume.start == 0 || volume.end > sb.blocks {
            return wrong("points where nothing can be");
        }
        next = from.end;
    }
    Ok(node)
}

impl Node<'_> {
    /// The blocks of the file that an entry speaks of (of the node below: the first), and where.
    fn covered(&self, entry: &[u8]) -> (Range<u64>, Range<u64>) {
        let from = u64::from(u32_at(entry, 0));
        let (start, length) = match self.depth {
            0 => {
                let start = u64::from(u32_at(entry, 8)) | u64::from(u16_at(entry, 6)) << 32;
                let (length, _) = length(entry);
                (start, length)
            }
            _ => {
                let start = u64::from(u32_at(entry, 4)) | u64::from(u16_at(entry, 8)) << 32;
                (start, 1)
            }
        };
        (from..from + length, start..start + length)
    }

    /// What it says of `block` of the file, in a node that speaks of the blocks before `end`.
    pub fn find(&self, block: u64, end: u64) -> Step {
        let hole = |until: u64| {
            let length = until.min(end).saturating_sub(block).max(1);
            Step::Run(Run {
                start: None,
                length,
            })
        };
        let first = |entry: &[u8]| u64::from(u32_at(entry, 0));
        let after = self
            .entries
            .chunks_exact(ENTRY)
            .position(|entry| first(entry) > block)
            .unwrap_or(self.entries.len() / ENTRY);
        let next = self
            .entries
            .chunks_exact(ENTRY)
            .nth(after)
            .map_or(end, first);
        let entry = after
            .checked_sub(1)
            .and_then(|i| self.entries.chunks_exact(ENTRY).nth(i));
        let Some(entry) = entry else {
            return hole(next);
        };
        let (from, volume) = self.covered(entry);
        if self.depth > 0 {
            return Step::Down(volume.start, next.min(end));
        }
        if block >= from.end {
            return hole(next);
        }
        let (_, is_written) = length(entry);
        Step::Run(Run {
            start: is_written.then_some(volume.start + (block - from.start)),
            length: from.end - block,
        })
    }
}

fn length(entry: &[u8]) -> (u64, bool) {
    match u16_at(entry, 4) {
        written if written <= LENGTH_MAX => (written.max(1).into(), true),
        unwritten => ((unwritten - LENGTH_MAX).into(), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_knows_data_and_holes() {
        let mut entries = Vec::new();
        for (from, len, start) in [(10u32, 5u16, 100u32), (20, 32768 + 4, 200), (24, 1, 300)] {
            entries.extend(from.to_le_bytes());
            entries.extend(len.to_le_bytes());
            entries.extend([0, 0]);
            entries.extend(start.to_le_bytes());
        }
        let node = Node {
            depth: 0,
            entries: &entries,
        };
        let run = |start, length| Step::Run(Run { start, length });
        assert_eq!(node.find(0, 1000), run(None, 10));
        assert_eq!(node.find(12, 1000), run(Some(102), 3));
        assert_eq!(node.find(15, 1000), run(None, 5));
        assert_eq!(node.find(21, 1000), run(None, 3));
        assert_eq!(node.find(24, 1000), run(Some(300), 1));
        assert_eq!(node.find(25, 1000), run(None, 975));
        assert_eq!(node.find(2000, 1000), run(None, 1), "never no progress");
    }
}
