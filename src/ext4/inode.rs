//! An inode: what it says of its file, and the bytes that lead to the content.

use super::checksum::{crc32c, crc32c_without};
use super::{Fault, Superblock, array, damaged, u16_at, u32_at};

const FLAG_ENCRYPTED: u32 = 0x800;
const FLAG_INDEX: u32 = 0x1000;
const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_EA_INODE: u32 = 0x20_0000;
const FLAG_INLINE_DATA: u32 = 0x1000_0000;

/// Blocks of a file, by the format: their numbers have 32 bits.
const BLOCKS_MAX: u64 = 1 << 32;

/// Bytes of an inode before its extra fields.
pub(super) const BASE: usize = 128;

/// Seconds since 1970, negative before; nanoseconds after that second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// How the content is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A tree of extents, its root in the inode.
    Extents,
    /// Numbers of blocks, and blocks of numbers.
    Blocks,
    /// In the inode, and what does not fit in an attribute.
    Inline,
    /// A short symbolic link, in the inode.
    ShortLink,
}

#[derive(Clone, Debug)]
pub struct Inode {
    pub number: u32,
    /// Type and permissions, as `inode(7)`.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    pub links: u16,
    pub accessed: Stamp,
    pub modified: Stamp,
    pub changed: Stamp,
    pub format: Format,
    /// fscrypt has encrypted names or content.
    pub is_encrypted: bool,
    /// A directory with a hash tree: some of its blocks are the tree's.
    pub has_index: bool,
    /// It holds the value of an attribute.
    pub is_attribute: bool,
    /// The block of attributes, or 0.
    pub attribute_block: u64,
    /// The 60 bytes that lead to the content, or are it.
    pub root: [u8; 60],
    /// Checksums of what belongs to it go on from here.
    pub(super) seed: u32,
    /// Bytes after the extra fields: attributes.
    pub(super) tail: Vec<u8>,
}

impl Inode {
    pub const DIRECTORY: u16 = 0o4_0000;
    pub const REGULAR: u16 = 0o10_0000;
    pub const SYMLINK: u16 = 0o12_0000;

    /// Judges the bytes of inode `number`. One that no file has is [`Fault::Damaged`]: whoever
    /// asks was sent there by a directory.
    pub fn parse(sb: &Superblock, number: u32, raw: &[u8]) -> Result<Inode, Fault> {
        let wrong = |what: &str| damaged(format!("inode {number} {what}"));
        if raw.len() != sb.inode_size {
            return wrong("is cut short");
        }
        let extra = match raw.len() > BASE {
            true => usize::from(u16_at(raw, BASE)),
            false => 0,
        };
        if extra > raw.len() - BASE || !extra.is_multiple_of(4) {
            return wrong("has extra fields beyond its end");
        }
        let generation = array::<4>(raw, 0x64);
        let seed = crc32c(crc32c(sb.seed, &number.to_le_bytes()), &generation);
        if sb.checksums {
            let wide = extra >= 4;
            let mut sum = crc32c_without(seed, &raw[..BASE], 0x7C..0x7E);
            sum = match wide {
                true => crc32c_without(sum, &raw[BASE..], 2..4),
                false => crc32c(sum, &raw[BASE..]),
            };
            let high = if wide { u16_at(raw, 0x82) } else { 0 };
            let mask = if wide { !0 } else { 0xFFFF };
            let stored = u32::from(u16_at(raw, 0x7C)) | u32::from(high) << 16;
            if sum & mask != stored {
                return wrong("has a wrong checksum");
            }
        }
        let (mode, links) = (u16_at(raw, 0x00), u16_at(raw, 0x1A));
        if mode == 0 || links == 0 {
            return wrong("is not in use");
        }
        let flags = u32_at(raw, 0x20);
        let size = u64::from(u32_at(raw, 0x04));
        let kind = mode & 0o17_0000;
        let size = match kind {
            // In other inodes the field has other meanings.
            Self::REGULAR | Self::DIRECTORY => size | u64::from(u32_at(raw, 0x6C)) << 32,
            _ => size,
        };
        if size.div_ceil(sb.block_size) > BLOCKS_MAX {
            return wrong("has more blocks than any file can");
        }
        let field = |at: usize| match at + 4 <= BASE + extra {
            true => u32_at(raw, at),
            false => 0,
        };
        let stamp = |at: usize, extra_at: usize| stamp(u32_at(raw, at), field(extra_at));
        Ok(Inode {
            number,
            mode,
            uid: u32::from(u16_at(raw, 0x02)) | u32::from(u16_at(raw, 0x78)) << 16,
            gid: u32::from(u16_at(raw, 0x18)) | u32::from(u16_at(raw, 0x7A)) << 16,
            size,
            links,
            accessed: stamp(0x08, 0x8C),
            changed: stamp(0x0C, 0x84),
            modified: stamp(0x10, 0x88),
            format: match kind {
                _ if flags & FLAG_INLINE_DATA != 0 => Format::Inline,
                _ if flags & FLAG_EXTENTS != 0 => Format::Extents,
                Self::SYMLINK if size < 60 => Format::ShortLink,
                _ => Format::Blocks,
            },
            is_encrypted: flags & FLAG_ENCRYPTED != 0,
            has_index: flags & FLAG_INDEX != 0,
            is_attribute: flags & FLAG_EA_INODE != 0,
            attribute_block: u64::from(u32_at(raw, 0x68)) | u64::from(u16_at(raw, 0x76)) << 32,
            root: array(raw, 0x28),
            seed,
            tail: raw[BASE + extra..].to_vec(),
        })
    }

    pub fn is_directory(&self) -> bool {
        self.mode & 0o17_0000 == Self::DIRECTORY
    }

    pub fn is_regular(&self) -> bool {
        self.mode & 0o17_0000 == Self::REGULAR
    }

    /// Major and minor number of a device file.
    pub fn device(&self) -> (u32, u32) {
        let (old, new) = (u32_at(&self.root, 0), u32_at(&self.root, 4));
        match old {
            0 => ((new & 0xF_FF00) >> 8, (new & 0xFF) | (new >> 12 & 0xF_FF00)),
            _ => (old >> 8 & 0xFF, old & 0xFF),
        }
    }
}

/// The low 32 bits of the seconds are signed; two more bits, and the nanoseconds, are in `extra`.
fn stamp(seconds: u32, extra: u32) -> Stamp {
    Stamp {
        seconds: i64::from(seconds as i32) + (i64::from(extra & 3) << 32),
        // What is no nanosecond would be refused by whoever sets it.
        nanoseconds: (extra >> 2).min(999_999_999),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_reach_from_1901_to_2446() {
        let seconds = |low, extra| stamp(low, extra).seconds;
        assert_eq!(seconds(0x8000_0000, 0), -(1 << 31));
        assert_eq!(seconds(0x7FFF_FFFF, 0), (1 << 31) - 1);
        assert_eq!(seconds(0x8000_0000, 1), 1 << 31);
        assert_eq!(seconds(0x7FFF_FFFF, 3), 15_032_385_535);
        assert_eq!(stamp(0, 5 << 2).nanoseconds, 5);
    }
}
