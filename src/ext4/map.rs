//! Which blocks of an ext4 hold something: read from its superblock, group descriptors and block
//! bitmaps, while nobody has it mounted.
//!
//! Whoever acts on this gives blocks away for good, so nothing is believed without its checksum:
//! a filesystem without `metadata_csum`, one that was not closed, one with a feature that moves
//! things elsewhere, a checksum or a count that is wrong: all are refused, never guessed.

use std::ops::Range;

use super::checksum::crc32c;
use super::journal_blocks::read_journal;
use super::ranges::{Ranges, intersection, merged, without};
use super::superblock::{BLOCK_UNINIT, INODE_UNINIT, INODE_ZEROED};
use super::{Fault, Group, Superblock, damaged, u16_at, u32_at};

/// Reads a range of the volume, by its offset in bytes.
pub type Read<'a, E> = &'a mut dyn FnMut(u64, &mut [u8]) -> Result<(), E>;

/// What is where, in bytes of the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    /// Bytes of the filesystem.
    pub size: u64,
    /// Bytes of blocks that are allocated.
    pub used: u64,
    /// May hold what nobody needs any more: free blocks of groups that were in use, the journal
    /// without its first block, which a closed filesystem does not read, and the room for copies of
    /// further group descriptors, which nobody reads before it is written.
    pub free: Ranges,
    /// All that may have to be read again. What is in neither was never written.
    pub live: Ranges,
}

/// filetype, extents, 64bit, ea_inode, flex_bg, csum_seed, large_dir, inline_data, encrypt, casefold:
/// those that put nothing where this module does not look for it.
const INCOMPAT_KNOWN: u32 = 0x2 | 0x40 | 0x80 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x3_8000;
const INCOMPAT_EXTENTS: u32 = 0x40;
const INCOMPAT_RECOVER: u32 = 0x4;
/// All but bigalloc (0x200), replica, read-only and shared blocks.
const RO_COMPAT_KNOWN: u32 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x400 | 0x2000 | 0x8000;
const RO_COMPAT_ORPHAN_PRESENT: u32 = 0x1_0000;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const STATE_ERRORS: u16 = 0x2;

/// Reads that are this close to each other become one, up to [`RUN_MAX`].
const GAP_BLOCKS: u64 = 16;
pub(super) const RUN_MAX: u64 = 1 << 20;

/// Reads the map. `E` is how reading fails.
pub fn map<E>(read: Read<'_, E>, volume_size: u64) -> Result<Result<Map, Fault>, E> {
    let (fs, groups) = match descriptors(read, volume_size)? {
        Ok(both) => both,
        Err(fault) => return Ok(Err(fault)),
    };
    let mut taken: Vec<Range<u64>> = Vec::new();
    if let Err(fault) = read_bitmaps(&fs, &groups, read, &mut taken)? {
        return Ok(Err(fault));
    }
    let journal = read_journal(&fs, &groups, read)?;
    Ok(Ok(assemble(&fs, &groups, taken, journal)))
}

/// The superblock and all group descriptors, proved by their checksums, of a filesystem of which all
/// is known.
pub(super) fn descriptors<E>(
    read: Read<'_, E>,
    volume_size: u64,
) -> Result<Result<(Superblock, Vec<Group>), Fault>, E> {
    let mut sb = [0; Superblock::SIZE];
    if volume_size < 4096 {
        return Ok(Err(Fault::NotExt4));
    }
    read(Superblock::OFFSET, &mut sb)?;
    let fs = match judge(&sb, volume_size) {
        Ok(fs) => fs,
        Err(fault) => return Ok(Err(fault)),
    };
    let mut table = vec![0; fs.groups() as usize * fs.descriptor_size()];
    let at = (fs.first_block + 1) * fs.block_size;
    for (i, part) in table.chunks_mut(RUN_MAX as usize).enumerate() {
        read(at + i as u64 * RUN_MAX, part)?;
    }
    Ok(parse_groups(&fs, &table).map(|groups| (fs, groups)))
}

/// Bytes of the filesystem that begins with these 2048 bytes, closed or not; `None`: it is no ext4,
/// or its superblock is damaged.
pub fn size(begin: &[u8; 2048]) -> Option<u64> {
    let sb = begin.last_chunk::<{ Superblock::SIZE }>()?;
    Superblock::parse(sb).ok().map(|fs| fs.size())
}

/// The superblock of a filesystem of which all is known that has to be.
fn judge(sb: &[u8; Superblock::SIZE], volume_size: u64) -> Result<Superblock, Fault> {
    let unsupported = |what: &str| Err(Fault::Unsupported(what.into()));
    let fs = Superblock::parse(sb)?;
    let (compat, incompat) = (u32_at(sb, 0x5C), u32_at(sb, 0x60));
    let ro_compat = u32_at(sb, 0x64);
    if !fs.checksums {
        return unsupported("no checksums of its metadata (metadata_csum)");
    }
    if fs.needs_recovery || ro_compat & RO_COMPAT_ORPHAN_PRESENT != 0 {
        return Err(Fault::NotClosed);
    }
    if u16_at(sb, 0x3A) & STATE_ERRORS != 0 {
        return Err(Fault::HasErrors);
    }
    let strange = (
        incompat & !(INCOMPAT_KNOWN | INCOMPAT_RECOVER),
        ro_compat & !RO_COMPAT_KNOWN,
    );
    if strange != (0, 0) || incompat & INCOMPAT_EXTENTS == 0 {
        return Err(Fault::Unsupported(format!(
            "features that change where things are (incompat {:#x}, ro_compat {:#x})",
            strange.0, strange.1
        )));
    }
    if compat & COMPAT_SPARSE_SUPER2 != 0 {
        return unsupported("the feature sparse_super2");
    }
    let sane = fs.blocks_per_group == fs.block_size * 8
        && [32, 64].contains(&fs.descriptor_size)
        && fs.blocks <= volume_size / fs.block_size
        && fs.first_block == u64::from(fs.block_size == 1024);
    match sane {
        true => Ok(fs),
        false => damaged("its geometry makes no sense"),
    }
}

fn parse_groups(fs: &Superblock, table: &[u8]) -> Result<Vec<Group>, Fault> {
    let mut groups = Vec::with_capacity(fs.groups() as usize);
    for (number, raw) in (0..).zip(table.chunks_exact(fs.descriptor_size())) {
        let group = fs.parse_group(number, raw)?;
        let last = group.block_bitmap.max(group.inode_bitmap);
        if last > fs.blocks || group.inodes_unused > u64::from(fs.inodes_per_group) {
            return damaged(format!("group {number}: its bitmaps lie beyond the end"));
        }
        groups.push(group);
    }
    Ok(groups)
}

/// Adds the runs of allocated blocks of all groups that have a bitmap.
fn read_bitmaps<E>(
    fs: &Superblock,
    groups: &[Group],
    read: Read<'_, E>,
    taken: &mut Vec<Range<u64>>,
) -> Result<Result<(), Fault>, E> {
    let mut wanted: Vec<(u64, u64)> = (0..)
        .zip(groups)
        .filter(|(_, group)| group.flags & BLOCK_UNINIT == 0)
        .map(|(number, group)| (group.block_bitmap, number))
        .collect();
    wanted.sort_unstable();
    let mut rest = &wanted[..];
    let mut buffer = Vec::new();
    while let Some((first, _)) = rest.first().copied() {
        // Bitmaps lie side by side, so few large reads fetch them all.
        let mut count = 1;
        while let (Some(this), Some(next)) = (rest.get(count - 1), rest.get(count))
            && next.0 - this.0 <= GAP_BLOCKS
            && (next.0 + 1 - first) * fs.block_size <= RUN_MAX
        {
            count += 1;
        }
        let last = rest[count - 1].0;
        buffer.resize(((last + 1 - first) * fs.block_size) as usize, 0);
        read(first * fs.block_size, &mut buffer)?;
        for (block, number) in &rest[..count] {
            let at = ((block - first) * fs.block_size) as usize;
            let bitmap = &buffer[at..at + fs.block_size as usize];
            if let Err(fault) = read_bitmap(fs, *number, &groups[*number as usize], bitmap, taken) {
                return Ok(Err(fault));
            }
        }
        rest = &rest[count..];
    }
    Ok(Ok(()))
}

fn read_bitmap(
    fs: &Superblock,
    number: u64,
    group: &Group,
    bitmap: &[u8],
    taken: &mut Vec<Range<u64>>,
) -> Result<(), Fault> {
    let damaged = |what: &str| Fault::Damaged(format!("group {number}: {what}"));
    let sum = crc32c(fs.seed, &bitmap[..(fs.blocks_per_group / 8) as usize]);
    if sum & group.bitmap_checksum_mask != group.bitmap_checksum {
        return Err(damaged("the checksum of its block bitmap is wrong"));
    }
    let blocks = fs.group_blocks(number);
    let mut free = 0;
    for block in blocks.clone() {
        let bit = (block - blocks.start) as usize;
        if bitmap[bit / 8] >> (bit % 8) & 1 == 0 {
            free += 1;
            continue;
        }
        match taken.last_mut() {
            Some(run) if run.end == block => run.end += 1,
            _ => taken.push(block..block + 1),
        }
    }
    match free == group.free_blocks {
        true => Ok(()),
        false => Err(damaged("its count of free blocks is wrong")),
    }
}

fn assemble(
    fs: &Superblock,
    groups: &[Group],
    taken: Vec<Range<u64>>,
    journal: Vec<Range<u64>>,
) -> Map {
    let taken = merged(taken);
    let journal = merged(journal);
    let mut known: Vec<Range<u64>> = Vec::new();
    let mut spare: Vec<Range<u64>> = Vec::new();
    let mut tables: Vec<Range<u64>> = Vec::new();
    let mut live: Vec<Range<u64>> = Vec::new();
    let descriptors = (fs.groups() * fs.descriptor_size).div_ceil(fs.block_size);
    // Blocks of 1 KiB: the first belongs to no group.
    let mut used = fs.first_block;
    for (number, group) in (0..).zip(groups) {
        let blocks = fs.group_blocks(number);
        used += (blocks.end - blocks.start).saturating_sub(group.free_blocks);
        if group.flags & BLOCK_UNINIT == 0 {
            known.push(blocks.clone());
            live.push(group.block_bitmap..group.block_bitmap + 1);
        }
        if group.flags & INODE_UNINIT == 0 {
            live.push(group.inode_bitmap..group.inode_bitmap + 1);
        }
        if fs.has_copy(number) {
            let end = (blocks.start + 1 + descriptors).min(blocks.end);
            let room = end..(end + fs.reserved_descriptor_blocks).min(blocks.end);
            live.push(blocks.start..end);
            match number {
                // The blocks there list where the others are.
                0 => live.push(room),
                _ => spare.push(room),
            }
        }
        let whole = group.inode_table..group.inode_table + fs.inode_table_blocks();
        let inodes = match (group.flags & INODE_ZEROED, group.flags & INODE_UNINIT) {
            // Somebody may count on the zeros behind them.
            (1.., _) => u64::from(fs.inodes_per_group),
            (0, 0) => u64::from(fs.inodes_per_group) - group.inodes_unused,
            (0, _) => 0,
        };
        let written = (inodes * fs.inode_size as u64).div_ceil(fs.block_size);
        live.push(whole.start..whole.start + written);
        tables.push(whole);
        tables.push(group.block_bitmap..group.block_bitmap + 1);
        tables.push(group.inode_bitmap..group.inode_bitmap + 1);
    }
    // Tables are allocated from the beginning and written as they fill.
    let spare = merged(spare);
    let data = without(&without(&taken, &merged(tables)), &journal);
    live.extend(without(&data, &spare));
    live.retain(|run| !run.is_empty());
    let mut free = without(&merged(known), &taken);
    // Only what is allocated, and so theirs.
    free.extend(intersection(&journal, &taken));
    free.extend(intersection(&spare, &taken));
    let live = merged(live);
    let free = without(&merged(free), &live);
    let bytes = |runs: Ranges| -> Ranges {
        let scaled = runs
            .into_iter()
            .map(|r| r.start * fs.block_size..r.end * fs.block_size);
        scaled.collect()
    };
    Map {
        size: fs.blocks * fs.block_size,
        used: used * fs.block_size,
        free: bytes(free),
        live: bytes(live),
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // a set of ranges with one
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    fn shell(script: &str) -> String {
        let path = "/usr/sbin:/usr/bin:/sbin:/bin";
        let output = Command::new("sh")
            .args(["-euc", script])
            .env("PATH", path)
            .output();
        let output = output.expect("sh runs");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn map_of(path: &std::path::Path) -> Result<Map, Fault> {
        let file = File::open(path).expect("opens");
        let size = file.metadata().expect("metadata").len();
        map(
            &mut |at, into: &mut [u8]| file.read_exact_at(into, at),
            size,
        )
        .expect("reads")
    }

    /// dumpe2fs says which blocks are free; debugfs fills and empties without mounting.
    #[test]
    fn what_is_free_is_what_dumpe2fs_says() {
        let dir = tempfile::tempdir().expect("a directory");
        let image = dir.path().join("fs");
        for options in [
            "-O ^resize_inode -G 64",
            "-O 64bit,metadata_csum_seed -G 4096",
            "-b 1024",
        ] {
            let features = "has_journal,extent,flex_bg,sparse_super,metadata_csum,^orphan_file";
            shell(&format!(
                "cd {}; rm -f fs; truncate -s 600M fs; mkfs.ext4 -q -F -m0 -O {features} {options} \
                 -E lazy_itable_init=1,nodiscard fs; head -c 9000000 /dev/urandom > a; \
                 for i in 1 2 3 4 5 6 7 8; do echo write a f$i; done > script; \
                 for i in 2 5 7; do echo rm f$i; done >> script; debugfs -w -f script fs 2>/dev/null; \
                 e2fsck -fy fs >/dev/null || true",
                dir.path().display()
            ));
            let map = map_of(&image).unwrap_or_else(|fault| panic!("{options}: {fault}"));
            let text = shell(&format!("dumpe2fs {} 2>/dev/null", image.display()));
            let number = |name: &str| -> u64 {
                let line = text
                    .lines()
                    .find_map(|l| l.strip_prefix(name))
                    .expect("told");
                line.trim().parse().expect("a number")
            };
            let block = number("Block size:");
            let mut told = Vec::new();
            let mut uninit = false;
            for line in text.lines() {
                uninit = match line.starts_with("Group ") {
                    true => line.contains("BLOCK_UNINIT"),
                    false => uninit,
                };
                let Some(list) = line.strip_prefix("  Free blocks: ").filter(|_| !uninit) else {
                    continue;
                };
                for run in list.split(", ").filter(|run| !run.is_empty()) {
                    let (from, to) = run.split_once('-').unwrap_or((run, run));
                    let n = |text: &str| text.trim().parse::<u64>().expect("a number");
                    told.push(n(from) * block..(n(to) + 1) * block);
                }
            }
            let told = merged(told);
            let extra = without(&map.free, &told);
            assert_eq!(without(&told, &map.free), Ranges::new(), "{options}");
            let journal: u64 = extra.iter().map(|r| r.end - r.start).sum();
            assert!(journal > 0 && journal <= 64 << 20, "{options}: {extra:?}");
            assert_eq!(
                map.used,
                (number("Block count:") - number("Free blocks:")) * block
            );
            assert_eq!(intersection(&map.live, &map.free), Ranges::new());
            // With noise in all that is not live, nothing is wrong and every file is what it was.
            let file = File::options().write(true).open(&image).expect("opens");
            for range in without(&[0..map.size], &map.live) {
                file.write_all_at(&vec![0xA5; (range.end - range.start) as usize], range.start)
                    .expect("written");
            }
            shell(&format!(
                "cd {}; e2fsck -fn fs >log 2>&1 || {{ cat log >&2; false; }}; \
                 for i in 1 3 4 6 8; do debugfs -R \"cat f$i\" fs 2>/dev/null | cmp - a; done; \
                 truncate -s 5G fs; resize2fs fs >log 2>&1 || {{ cat log >&2; false; }}; \
                 e2fsck -fn fs >log 2>&1 || {{ cat log >&2; false; }}",
                dir.path().display()
            ));
        }
    }

    #[test]
    fn a_wrong_bit_anywhere_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let image = dir.path().join("fs");
        shell(&format!(
            "truncate -s 300M {0}; mkfs.ext4 -q -F -O metadata_csum,64bit -b 4096 {0}",
            image.display()
        ));
        assert!(map_of(&image).is_ok());
        let text = shell(&format!("dumpe2fs {} 2>/dev/null", image.display()));
        let bitmap = text.split("Block bitmap at ").nth(1).expect("told");
        let bitmap = bitmap.split([' ', ',']).next().expect("told");
        let bitmap: u64 = bitmap.parse().expect("a number");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&image)
            .expect("opens");
        for at in [1024 + 0x0C, 4096 + 64 + 3, bitmap * 4096 + 7] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("read");
            file.write_all_at(&[byte[0] ^ 4], at).expect("written");
            let fault = map_of(&image).unwrap_err();
            assert!(matches!(fault, Fault::Damaged(_)), "{at}: {fault:?}");
            file.write_all_at(&byte, at).expect("restored");
        }
        assert!(map_of(&image).is_ok());
        shell(&format!(
            "debugfs -w -R 'feature needs_recovery' {} 2>/dev/null",
            image.display()
        ));
        assert_eq!(map_of(&image), Err(Fault::NotClosed));
        assert_eq!(
            map(&mut |_, _: &mut [u8]| Ok::<(), ()>(()), 1 << 20),
            Ok(Err(Fault::NotExt4))
        );
    }
}
