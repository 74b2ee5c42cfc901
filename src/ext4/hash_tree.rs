//! The index of a large directory: a tree of hashes of names, from which one name is found without
//! reading the others.
//!
//! Layout and hashes: Linux, `Documentation/filesystems/ext4/directory.rst`, "Hash Tree Directories",
//! and `fs/ext4/hash.c`. The index is only a hint: a name that it does not lead to may be there
//! nevertheless, so its checksums are not looked at.

use super::{Superblock, array, u16_at, u32_at};

/// Where the entries begin in the root, after `.`, `..` and what is said of the tree; and in a node,
/// after an entry without a name.
const ROOT_ENTRIES: usize = 0x20;
const NODE_ENTRIES: usize = 0x08;
/// Levels below the root (`EXT4_HTREE_LEVEL` less one).
const LEVELS_MAX: u8 = 2;

const LEGACY: u8 = 0;
const HALF_MD4: u8 = 1;
const TEA: u8 = 2;

/// The root of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashTree {
    /// Levels of nodes between the root and the blocks with names.
    pub levels: u8,
    algorithm: u8,
}

impl HashTree {
    /// What block 0 of a directory says of its tree. None if that is nothing that is known here.
    pub fn parse(root: &[u8]) -> Option<HashTree> {
        let has_dots = root.len() > ROOT_ENTRIES
            && (root[6], root[8]) == (1, b'.')
            && (root[0x12], &root[0x14..0x16]) == (2, b"..");
        let (reserved, length) = (u32_at(root.get(..0x20)?, 0x18), root[0x1D]);
        let tree = HashTree {
            levels: root[0x1E],
            algorithm: root[0x1C],
        };
        let is_known = tree.algorithm <= TEA && tree.levels <= LEVELS_MAX;
        (has_dots && reserved == 0 && length == 8 && is_known).then_some(tree)
    }

    /// The hash by which a name is found.
    pub fn hash(&self, sb: &Superblock, name: &[u8]) -> u32 {
        let widen = match sb.hash_is_unsigned {
            true => |byte: u8| u32::from(byte),
            false => |byte: u8| byte as i8 as u32,
        };
        let hash = match self.algorithm {
            LEGACY => legacy(name, widen),
            HALF_MD4 => half_md4(sb.hash_seed, name, widen),
            _ => tea(sb.hash_seed, name, widen),
        };
        // The lowest bit says something else in the tree, and the largest is the end of a reading.
        match hash & !1 {
            0xFFFF_FFFE => 0xFFFF_FFFC,
            hash => hash,
        }
    }
}

/// The block of a directory to which the root or a node leads for a hash.
pub fn next_block(raw: &[u8], is_root: bool, hash: u32) -> Option<u64> {
    let at = if is_root { ROOT_ENTRIES } else { NODE_ENTRIES };
    let entries = raw.get(at..)?;
    let (limit, count) = (
        usize::from(u16_at(entries.get(..8)?, 0)),
        usize::from(u16_at(entries, 2)),
    );
    if count == 0 || count > limit || limit > entries.len() / 8 {
        return None;
    }
    // The first entry has no hash, as it is for all that are smaller than the second's.
    let (mut low, mut high) = (0, count);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match u32_at(entries, 8 * middle) <= hash {
            true => low = middle,
            false => high = middle,
        }
    }
    Some(u64::from(u32_at(entries, 8 * low + 4) & 0x0FFF_FFFF))
}

fn legacy(name: &[u8], widen: impl Fn(u8) -> u32) -> u32 {
    let (mut last, mut before) = (0x12A3_FE2D_u32, 0x37AB_E8F9_u32);
    for byte in name {
        let mixed = last ^ widen(*byte).wrapping_mul(7_152_373);
        let mut hash = before.wrapping_add(mixed);
        if hash & 0x8000_0000 != 0 {
            hash = hash.wrapping_sub(0x7FFF_FFFF);
        }
        (before, last) = (last, hash);
    }
    last << 1
}

/// The part of a name that one round takes, as numbers; its length fills what is left over.
fn numbers<const N: usize>(rest: &[u8], widen: impl Fn(u8) -> u32) -> [u32; N] {
    let length = rest.len() as u32; // 255 at most
    let pad = length | length << 8 | length << 16 | length << 24;
    let mut numbers = [pad; N];
    for (number, bytes) in numbers.iter_mut().zip(rest.chunks(4)) {
        for byte in bytes {
            *number = widen(*byte).wrapping_add(*number << 8);
        }
    }
    numbers
}

fn half_md4(seed: [u32; 4], name: &[u8], widen: impl Fn(u8) -> u32) -> u32 {
    // Which numbers a round takes, in turn; its shifts; its constant (RFC 1320, section 3.4).
    const ROUNDS: [([usize; 8], [u32; 4], u32); 3] = [
        ([0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19], 0),
        ([1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13], 0x5A82_7999),
        ([3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15], 0x6ED9_EBA1),
    ];
    let mut state = seed;
    let mut rest = name;
    while !rest.is_empty() {
        let input: [u32; 8] = numbers(rest, &widen);
        let [mut a, mut b, mut c, mut d] = state;
        for (round, (order, shifts, constant)) in ROUNDS.iter().enumerate() {
            for (step, number) in order.iter().enumerate() {
                let mixed = match round {
                    0 => d ^ (b & (c ^ d)),
                    1 => (b & c).wrapping_add((b ^ c) & d),
                    _ => b ^ c ^ d,
                };
                let sum = a.wrapping_add(mixed).wrapping_add(input[*number]);
                let turned = sum.wrapping_add(*constant).rotate_left(shifts[step % 4]);
                (a, b, c, d) = (d, turned, b, c);
            }
        }
        for (sum, new) in state.iter_mut().zip([a, b, c, d]) {
            *sum = sum.wrapping_add(new);
        }
        rest = &rest[rest.len().min(32)..];
    }
    state[1]
}

fn tea(seed: [u32; 4], name: &[u8], widen: impl Fn(u8) -> u32) -> u32 {
    let [mut first, mut second, ..] = seed;
    let mut rest = name;
    while !rest.is_empty() {
        let [a, b, c, d]: [u32; 4] = numbers(rest, &widen);
        let (mut x, mut y, mut sum) = (first, second, 0_u32);
        for _ in 0..16 {
            sum = sum.wrapping_add(0x9E37_79B9);
            let mixed = |of: u32, left: u32, right: u32| {
                (of << 4).wrapping_add(left) ^ of.wrapping_add(sum) ^ (of >> 5).wrapping_add(right)
            };
            x = x.wrapping_add(mixed(y, a, b));
            y = y.wrapping_add(mixed(x, c, d));
        }
        first = first.wrapping_add(x);
        second = second.wrapping_add(y);
        rest = &rest[rest.len().min(16)..];
    }
    first
}

/// The seed of the hashes: that of the filesystem, or MD4's own where it has none.
pub(super) fn seed(sb: &[u8]) -> [u32; 4] {
    let raw: [u8; 16] = array(sb, 0xEC);
    let seed = [0, 4, 8, 12].map(|at| u32_at(&raw, at));
    match seed {
        [0, 0, 0, 0] => [0x6745_2301, 0xEFCD_AB89, 0x98BA_DCFE, 0x1032_5476],
        seed => seed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: &[u8] = b"a much longer name than thirty-two bytes, so that it takes two rounds";

    /// By `dx_hash -s 01234567-89ab-cdef-0123-456789abcdef` of debugfs 1.47.0.
    #[test]
    fn names_hash_as_debugfs_hashes_them() {
        let raw = [
            0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF, 0x01, 0x23, 0x45, 0x67, 0x89, 0xAB,
            0xCD, 0xEF,
        ];
        let mut sb = [0; 1024];
        sb[0xEC..0xFC].copy_from_slice(&raw);
        let seed = seed(&sb);
        let signed = |byte: u8| byte as i8 as u32;
        for (name, of_legacy, of_md4, of_tea) in [
            (&b"a"[..], 0xE74B_53E2, 0x35DC_0CC4, 0x6D0E_A4C0),
            (b"file.txt", 0x7868_4C1E, 0xE688_8F46, 0x572A_0842),
            (LONG, 0x085E_B99A, 0x8825_B6B2, 0x2571_B520),
        ] {
            assert_eq!(legacy(name, signed), of_legacy);
            assert_eq!(half_md4(seed, name, signed) & !1, of_md4);
            assert_eq!(tea(seed, name, signed) & !1, of_tea);
        }
    }

    /// By debugfs without a seed.
    #[test]
    fn letters_beyond_ascii_are_negative_numbers() {
        let (seed, name) = (seed(&[0; 1024]), "grün".as_bytes());
        let signed = |byte: u8| byte as i8 as u32;
        assert_eq!(legacy(name, signed), 0xC202_F150);
        assert_eq!(half_md4(seed, name, signed) & !1, 0x095D_9284);
        assert_eq!(tea(seed, name, signed) & !1, 0xA7AE_33B6);
    }

    #[test]
    fn an_entry_is_for_its_hash_and_those_up_to_the_next() {
        let mut node = vec![0; 4096];
        for (i, word) in [3 << 16 | 511, 70, 1000, 71, 2001, 72].iter().enumerate() {
            let word: u32 = *word;
            node[8 + 4 * i..12 + 4 * i].copy_from_slice(&word.to_le_bytes());
        }
        for (hash, block) in [
            (0, 70),
            (998, 70),
            (1000, 71),
            (2000, 71),
            (2002, 72),
            (!1, 72),
        ] {
            assert_eq!(next_block(&node, false, hash), Some(block));
        }
        for count in [0_u16, 512] {
            node[10..12].copy_from_slice(&count.to_le_bytes());
            assert_eq!(next_block(&node, false, 5), None);
        }
        node[8..12].copy_from_slice(&[0xFF; 4]);
        assert_eq!(next_block(&node, false, 5), None);
        assert_eq!(next_block(&node[..9], false, 5), None);
        assert_eq!(next_block(&[], true, 5), None);
        assert_eq!(HashTree::parse(&[]), None);
        assert_eq!(HashTree::parse(&[0; 4096]), None);
    }
}
