//! The superblock, and where the group descriptors and through them the inodes are.

use super::checksum::{crc32c, crc32c_without};
use super::{Fault, array, damaged, hash_tree, u16_at, u32_at};

const COMPAT_RESIZE_INODE: u32 = 0x10;
const COMPAT_HAS_JOURNAL: u32 = 0x4;

const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;

/// `EXT2_FLAGS_UNSIGNED_HASH`.
const FLAG_UNSIGNED_HASH: u32 = 0x2;

const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;

/// Every feature that changes how files are read, by its bit, and whether we know it. Those that
/// only forbid writing (`ro_compat`) need no knowing.
const INCOMPAT: [(u32, &str, bool); 17] = [
    (0x1, "compression", false),
    (0x2, "filetype", true),
    (INCOMPAT_RECOVER, "needs_recovery", true),
    (0x8, "journal_dev", false),
    (INCOMPAT_META_BG, "meta_bg", true),
    (0x40, "extent", true),
    (INCOMPAT_64BIT, "64bit", true),
    (0x100, "mmp", true),
    (0x200, "flex_bg", true),
    (0x400, "ea_inode", true),
    (0x1000, "dirdata", false),
    (INCOMPAT_CSUM_SEED, "metadata_csum_seed", true),
    (0x4000, "large_dir", true),
    (0x8000, "inline_data", true),
    (0x1_0000, "encrypt", true), // as a whole; an encrypted file is refused by its own flag
    (0x2_0000, "casefold", true),
    (0x20, "an unnamed feature (0x20)", false),
];

/// What the superblock says, as far as reading needs it. All geometry has been checked.
#[derive(Clone, Debug)]
pub struct Superblock {
    /// Bytes of a block: 1024 to 65536.
    pub block_size: u64,
    /// Blocks of the filesystem.
    pub blocks: u64,
    pub inodes: u32,
    pub uuid: [u8; 16],
    /// Up to 16 bytes, nobody knows in which encoding.
    pub label: Vec<u8>,
    /// The journal has to be replayed.
    pub needs_recovery: bool,
    /// The inode of the journal, if it is inside.
    pub journal: Option<u32>,
    pub(super) checksums: bool,
    pub(super) seed: u32,
    pub(super) inode_size: usize,
    pub(super) first_block: u64,
    pub(super) blocks_per_group: u64,
    pub(super) inodes_per_group: u32,
    pub(super) descriptor_size: u64,
    /// Of the hashes of names, and whether their letters are numbers without a sign.
    pub(super) hash_seed: [u32; 4],
    pub(super) hash_is_unsigned: bool,
    first_meta_group: Option<u64>,
    /// Blocks that descriptors may grow into.
    pub(super) reserved_descriptor_blocks: u64,
    sparse_super: bool,
}

/// A group descriptor. Only the place of the inode table was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// First block of its inode table.
    pub inode_table: u64,
    pub(super) flags: u16,
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) free_blocks: u64,
    pub(super) inodes_unused: u64,
    pub(super) bitmap_checksum: u32,
    /// Bits of the checksum that are stored.
    pub(super) bitmap_checksum_mask: u32,
}

/// Flags of a group: nothing in its inode table, or its block bitmap, was ever written; the whole
/// table was.
pub(super) const INODE_UNINIT: u16 = 0x1;
pub(super) const BLOCK_UNINIT: u16 = 0x2;
pub(super) const INODE_ZEROED: u16 = 0x4;

impl Superblock {
    /// Where it is on the volume, and how long.
    pub const OFFSET: u64 = 1024;
    pub const SIZE: usize = 1024;

    pub fn parse(sb: &[u8; Self::SIZE]) -> Result<Superblock, Fault> {
        if u16_at(sb, 0x38) != 0xEF53 {
            return Err(Fault::NotExt4);
        }
        let (compat, incompat) = (u32_at(sb, 0x5C), u32_at(sb, 0x60));
        let ro_compat = u32_at(sb, 0x64);
        let checksums = ro_compat & RO_COMPAT_METADATA_CSUM != 0;
        if checksums && (sb[0x175] != 1 || crc32c(!0, &sb[..0x3FC]) != u32_at(sb, 0x3FC)) {
            return damaged("the checksum of the superblock is wrong");
        }
        refuse_unknown(incompat)?;
        let large = incompat & INCOMPAT_64BIT != 0;
        let blocks_high = if large { u32_at(sb, 0x150) } else { 0 };
        let uuid: [u8; 16] = array(sb, 0x68);
        let log = u32_at(sb, 0x18);
        let label: [u8; 16] = array(sb, 0x78);
        let fs = Superblock {
            block_size: 1024 << log.min(10),
            blocks: u64::from(u32_at(sb, 0x04)) | u64::from(blocks_high) << 32,
            inodes: u32_at(sb, 0x00),
            uuid,
            label: label.into_iter().take_while(|byte| *byte != 0).collect(),
            needs_recovery: incompat & INCOMPAT_RECOVER != 0,
            journal: (compat & COMPAT_HAS_JOURNAL != 0)
                .then(|| u32_at(sb, 0xE0))
                .filter(|number| *number > 0),
            checksums,
            seed: match incompat & INCOMPAT_CSUM_SEED {
                0 => crc32c(!0, &uuid),
                _ => u32_at(sb, 0x270),
            },
            inode_size: match u32_at(sb, 0x4C) {
                0 => 128, // revision 0
                _ => usize::from(u16_at(sb, 0x58)),
            },
            first_block: u64::from(u32_at(sb, 0x14)),
            blocks_per_group: u64::from(u32_at(sb, 0x20)),
            inodes_per_group: u32_at(sb, 0x28),
            descriptor_size: match large {
                true => u64::from(u16_at(sb, 0xFE)),
                false => 32,
            },
            hash_seed: hash_tree::seed(sb),
            hash_is_unsigned: u32_at(sb, 0x160) & FLAG_UNSIGNED_HASH != 0,
            first_meta_group: (incompat & INCOMPAT_META_BG != 0)
                .then(|| u64::from(u32_at(sb, 0x104))),
            reserved_descriptor_blocks: match compat & COMPAT_RESIZE_INODE {
                0 => 0,
                _ => u64::from(u16_at(sb, 0xCE)),
            },
            sparse_super: ro_compat & RO_COMPAT_SPARSE_SUPER != 0,
        };
        let bits = fs.block_size * 8;
        let sane = log <= 6
            && (1..=bits).contains(&fs.blocks_per_group)
            && (1..=bits).contains(&u64::from(fs.inodes_per_group))
            && (128..=fs.block_size).contains(&(fs.inode_size as u64))
            && fs.inode_size.is_power_of_two()
            && (32..=fs.block_size.min(1024)).contains(&fs.descriptor_size)
            && fs.descriptor_size.is_power_of_two()
            && (!large || fs.descriptor_size >= 64)
            && fs.first_block <= 1
            && fs.blocks > fs.first_block
            // So that every offset in bytes is a u64 with room to spare.
            && fs.blocks < 1 << 46
            && fs.groups() * u64::from(fs.inodes_per_group) >= u64::from(fs.inodes);
        match sane {
            true => Ok(fs),
            false => damaged("the geometry in the superblock makes no sense"),
        }
    }

    /// Bytes of the filesystem.
    pub fn size(&self) -> u64 {
        self.blocks * self.block_size
    }

    /// Bytes of an inode on disk.
    pub fn inode_size(&self) -> usize {
        self.inode_size
    }

    pub(super) fn groups(&self) -> u64 {
        (self.blocks - self.first_block).div_ceil(self.blocks_per_group)
    }

    pub(super) fn inode_table_blocks(&self) -> u64 {
        let bytes = u64::from(self.inodes_per_group) * self.inode_size as u64;
        bytes.div_ceil(self.block_size)
    }

    /// The blocks of a group.
    pub(super) fn group_blocks(&self, number: u64) -> std::ops::Range<u64> {
        let start = self.first_block + number * self.blocks_per_group;
        start..(start + self.blocks_per_group).min(self.blocks)
    }

    /// Bytes of a group descriptor.
    pub fn descriptor_size(&self) -> usize {
        self.descriptor_size as usize
    }

    /// The group of an inode and its place in the group's table; nothing for a number that no
    /// inode has.
    pub fn locate(&self, inode: u32) -> Option<(u64, u64)> {
        let index = inode.checked_sub(1).filter(|index| *index < self.inodes)?;
        let (group, place) = (index / self.inodes_per_group, index % self.inodes_per_group);
        Some((group.into(), place.into()))
    }

    /// Offset in bytes of a group's descriptor.
    pub fn descriptor_at(&self, group: u64) -> u64 {
        let per_block = self.block_size / self.descriptor_size;
        let (meta, within) = (group / per_block, group % per_block);
        let block = match self.first_meta_group {
            // Each run of groups that share a block of descriptors keeps it itself.
            Some(first) if meta >= first => {
                let home = meta * per_block;
                let start = self.first_block + home * self.blocks_per_group;
                start + u64::from(self.has_copy(home))
            }
            _ => self.first_block + 1 + meta,
        };
        block * self.block_size + within * self.descriptor_size
    }

    /// Whether the group begins with a copy of the superblock.
    pub(super) fn has_copy(&self, group: u64) -> bool {
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        !self.sparse_super || group < 2 || [3, 5, 7].into_iter().any(power_of)
    }

    /// Judges a group's descriptor.
    pub fn parse_group(&self, group: u64, raw: &[u8]) -> Result<Group, Fault> {
        if self.checksums {
            let sum = crc32c(self.seed, &(group as u32).to_le_bytes());
            let sum = crc32c_without(sum, raw, 0x1E..0x20);
            if sum as u16 != u16_at(raw, 0x1E) {
                return damaged(format!("the checksum of group descriptor {group} is wrong"));
            }
        }
        let large = raw.len() >= 64;
        let wide = |low: usize, high: usize| {
            let high = if large { u32_at(raw, high) } else { 0 };
            u64::from(u32_at(raw, low)) | u64::from(high) << 32
        };
        let count = |low: usize, high: usize| {
            let high = if large { u16_at(raw, high) } else { 0 };
            u64::from(u16_at(raw, low)) | u64::from(high) << 16
        };
        let inode_table = wide(0x08, 0x28);
        let end = inode_table.saturating_add(self.inode_table_blocks());
        if inode_table <= self.first_block || end > self.blocks {
            return damaged(format!("the inode table of group {group} lies elsewhere"));
        }
        Ok(Group {
            inode_table,
            flags: u16_at(raw, 0x12),
            block_bitmap: wide(0x00, 0x20),
            inode_bitmap: wide(0x04, 0x24),
            free_blocks: count(0x0C, 0x2C),
            inodes_unused: count(0x1C, 0x32),
            bitmap_checksum: count(0x18, 0x38) as u32,
            bitmap_checksum_mask: if large { !0 } else { 0xFFFF },
        })
    }
}

fn refuse_unknown(incompat: u32) -> Result<(), Fault> {
    let mut unknown: Vec<String> = Vec::new();
    for bit in (0..32)
        .map(|bit| 1 << bit)
        .filter(|bit| incompat & bit != 0)
    {
        match INCOMPAT.iter().find(|(known, ..)| *known == bit) {
            Some((_, _, true)) => {}
            Some((_, name, false)) => unknown.push((*name).into()),
            None => unknown.push(format!("an unnamed feature ({bit:#x})")),
        }
    }
    if unknown.is_empty() {
        return Ok(());
    }
    Err(Fault::Unsupported(format!(
        "{}, which this program cannot read",
        unknown.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_known_or_named() {
        assert_eq!(refuse_unknown(0x2 | 0x40 | 0x80 | 0x200), Ok(()));
        let Err(Fault::Unsupported(text)) = refuse_unknown(0x1 | 0x40 | 0x8000_0000) else {
            panic!("taken");
        };
        assert!(text.contains("compression"), "{text}");
        assert!(text.contains("0x80000000"), "{text}");
    }
}
