//! The entries in a directory's blocks. The blocks of a hash tree look like blocks with no entries,
//! so that a reader of all blocks in order needs to know little of it.

use super::checksum::crc32c;
use super::{Fault, Inode, Superblock, array, damaged, u16_at, u32_at};

/// Bytes of an entry before its name.
const HEADER: usize = 8;
/// The entry without a name that ends a block with a checksum.
const TAIL: usize = 12;

/// A name in a directory. It is whatever the bytes say; `.` and `..` are not left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    pub name: &'a [u8],
    pub inode: u32,
    /// The byte that tells the type of the file, 0 where it does not.
    pub kind: u8,
}

/// The entries of block `number` (counted in the directory).
pub fn block_entries<'a>(
    sb: &Superblock,
    directory: &Inode,
    number: u64,
    raw: &'a [u8],
) -> Result<Vec<DirEntry<'a>>, Fault> {
    if sb.checksums && !is_of_index(directory, number, raw) {
        let end = raw.len().saturating_sub(TAIL);
        let tail = &raw[end..];
        if array::<8>(tail, 0) != [0, 0, 0, 0, 12, 0, 0, 0xDE] {
            return damaged(format!(
                "directory inode {}: block {number} has no checksum",
                directory.number
            ));
        }
        if crc32c(directory.seed, &raw[..end]) != u32_at(tail, 8) {
            return damaged(format!(
                "directory inode {}: block {number} has a wrong checksum",
                directory.number
            ));
        }
    }
    entries(directory, raw)
}

/// The entries in a directory that lives in its inode: `raw` is one of its two parts.
pub fn inline_entries<'a>(directory: &Inode, raw: &'a [u8]) -> Result<Vec<DirEntry<'a>>, Fault> {
    entries(directory, raw)
}

/// The root of the tree, or a node of it: one empty entry that fills the block.
fn is_of_index(directory: &Inode, number: u64, raw: &[u8]) -> bool {
    directory.has_index && (number == 0 || (u32_at(raw, 0) == 0 && record_length(raw) == raw.len()))
}

/// Lengths of 64 KiB do not fit, and are written as 0 or 65535.
fn record_length(raw: &[u8]) -> usize {
    match u16_at(raw, 4) {
        0 | 0xFFFF if raw.len() >= 1 << 16 => 1 << 16,
        length => length.into(),
    }
}

fn entries<'a>(directory: &Inode, raw: &'a [u8]) -> Result<Vec<DirEntry<'a>>, Fault> {
    let mut found = Vec::new();
    let mut rest = raw;
    while !rest.is_empty() {
        let length = record_length(rest);
        let fits = rest.len() >= HEADER
            && length >= HEADER
            && length <= rest.len()
            && length.is_multiple_of(4)
            && HEADER + usize::from(rest[6]) <= length;
        if !fits {
            return damaged(format!(
                "directory inode {}: an entry of {length} bytes where {} are left",
                directory.number,
                rest.len()
            ));
        }
        let inode = u32_at(rest, 0);
        if inode != 0 {
            found.push(DirEntry {
                name: &rest[HEADER..HEADER + usize::from(rest[6])],
                inode,
                kind: rest[7],
            });
        }
        rest = &rest[length..];
    }
    Ok(found)
}
