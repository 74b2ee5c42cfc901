//! The structures of ext4 on disk, read and judged: bytes in, numbers out.
//!
//! Nothing is believed: every offset, length and count that is given out was checked against the
//! bytes it came from and against the filesystem's size, and checksums are verified where the
//! filesystem has them (`metadata_csum`; CRC-32C without the final inversion). What is wrong is a
//! [`Fault`], never a panic.
//!
//! Layout: Linux, `Documentation/filesystems/ext4` and `fs/jbd2`.

mod attribute;
mod checksum;
mod directory;
mod extent;
mod files;
mod hash_tree;
mod inode;
pub mod journal;
mod journal_blocks;
mod map;
mod ranges;
mod superblock;

use std::fmt;

pub use attribute::{Attribute, Value, block_attributes, inline_data, inode_attributes};
pub use directory::{DirEntry, block_entries, inline_entries};
pub use extent::{IN_INODE, Node, Run, Step, parse_node};
pub use files::{Piece, pieces};
pub use hash_tree::{HashTree, next_block};
pub use inode::{Format, Inode, Stamp};
pub use map::{Map, Read, map, size};
pub use ranges::{Ranges, merged, without};
pub use superblock::{Group, Superblock};

/// Why bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    NotExt4,
    /// It has to be mounted and unmounted, or repaired, first.
    NotClosed,
    HasErrors,
    /// Well formed, but with something this program does not read.
    Unsupported(String),
    Damaged(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::NotExt4 => f.write_str("the volume holds no ext4"),
            Fault::Unsupported(what) => write!(f, "the filesystem has {what}"),
            Fault::NotClosed => f.write_str("the filesystem was not unmounted in order"),
            Fault::HasErrors => f.write_str("the filesystem has noted errors"),
            Fault::Damaged(what) => write!(f, "the filesystem is damaged: {what}"),
        }
    }
}

fn damaged<T>(what: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Damaged(what.into()))
}

/// Bytes at a place, zeros where there are none: the callers have checked the length, and one that
/// forgot reads nonsense instead of panicking.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(found) = bytes.get(at..).and_then(|rest| rest.get(..N)) {
        out.copy_from_slice(found);
    }
    out
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}
