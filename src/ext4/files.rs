//! Where the content of files lies: read from the inode tables and the extent trees of an ext4 that
//! nobody has mounted.

use std::ops::Range;

use super::{
    EXTENT_MAGIC, Fault, INODE_UNINIT, RUN_MAX, Read, Superblock, descriptors, u16_at, u32_at,
};

/// The root directory. Below [`FIRST_INODE`] it alone is nobody's secret store: the others hold the
/// journal, room for descriptors and bad blocks.
const ROOT_INODE: u64 = 2;
const FIRST_INODE: u64 = 11;

const FLAG_EXTENTS: u32 = 0x8_0000;

/// An extent longer than this is one that was allocated and not written.
const WRITTEN_MAX: u64 = 32768;

/// ext4 makes no deeper trees.
const DEPTH_MAX: u16 = 5;

/// A run of blocks that hold the content of a file, a directory or a long symbolic link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// In bytes of the volume.
    pub range: Range<u64>,
    pub inode: u32,
}

/// All blocks that were written as somebody's content, ascending. `E` is how reading fails.
///
/// Blocks that were allocated and never written are not among them. A file whose tree makes no sense
/// is a [`Fault::Damaged`]; trees are not proved by their checksums, as e2fsck does that.
pub fn pieces<E>(read: Read<'_, E>, volume_size: u64) -> Result<Result<Vec<Piece>, Fault>, E> {
    let (fs, groups) = match descriptors(read, volume_size)? {
        Ok(both) => both,
        Err(fault) => return Ok(Err(fault)),
    };
    let mut pieces = Vec::new();
    let mut table = Vec::new();
    for (number, group) in (0..).zip(&groups) {
        if group.flags & INODE_UNINIT != 0 {
            continue;
        }
        let used = fs.inodes_per_group - group.inodes_unused;
        let per_run = (RUN_MAX / fs.inode_size).max(1);
        for first in (0..used).step_by(per_run as usize) {
            let count = per_run.min(used - first);
            table.resize((count * fs.inode_size) as usize, 0);
            let at = group.inode_table * fs.block + first * fs.inode_size;
            read(at, &mut table)?;
            for (index, raw) in (first..).zip(table.chunks_exact(fs.inode_size as usize)) {
                let inode = number * fs.inodes_per_group + index + 1;
                if !has_extents(inode, raw) {
                    continue;
                }
                let mut walk = Walk {
                    fs: &fs,
                    inode: inode as u32,
                    pieces: &mut pieces,
                };
                if let Err(fault) = walk.node(read, &raw[0x28..0x64], None)? {
                    return Ok(Err(fault));
                }
            }
        }
    }
    pieces.sort_unstable_by_key(|piece| piece.range.start);
    Ok(Ok(pieces))
}

fn has_extents(inode: u64, raw: &[u8]) -> bool {
    let kind = u16_at(raw, 0x00) & 0xF000;
    let is_content = matches!(kind, 0x4000 | 0x8000 | 0xA000);
    let counts = inode >= FIRST_INODE || inode == ROOT_INODE;
    let in_use = u16_at(raw, 0x1A) > 0;
    counts && in_use && is_content && u32_at(raw, 0x20) & FLAG_EXTENTS != 0
}

struct Walk<'a> {
    fs: &'a Superblock,
    inode: u32,
    pieces: &'a mut Vec<Piece>,
}

impl Walk<'_> {
    /// A node of the tree; `depth` is what the node above it promises.
    fn node<E>(
        &mut self,
        read: Read<'_, E>,
        node: &[u8],
        depth: Option<u16>,
    ) -> Result<Result<(), Fault>, E> {
        let (entries, found) = (usize::from(u16_at(node, 2)), u16_at(node, 6));
        let sane = u16_at(node, 0) == EXTENT_MAGIC
            && found <= DEPTH_MAX
            && depth.is_none_or(|depth| depth == found)
            && 12 + entries * 12 <= node.len();
        if !sane {
            return Ok(Err(self.nonsense()));
        }
        for raw in node[12..12 + entries * 12].chunks_exact(12) {
            if found == 0 {
                if let Err(fault) = self.leaf(raw) {
                    return Ok(Err(fault));
                }
                continue;
            }
            let child = u64::from(u16_at(raw, 8)) << 32 | u64::from(u32_at(raw, 4));
            if child >= self.fs.blocks {
                return Ok(Err(self.nonsense()));
            }
            let mut below = vec![0; self.fs.block as usize];
            read(child * self.fs.block, &mut below)?;
            if let Err(fault) = self.node(read, &below, Some(found - 1))? {
                return Ok(Err(fault));
            }
            self.note(child..child + 1);
        }
        Ok(Ok(()))
    }

    fn leaf(&mut self, raw: &[u8]) -> Result<(), Fault> {
        let len = u64::from(u16_at(raw, 4));
        let start = u64::from(u16_at(raw, 6)) << 32 | u64::from(u32_at(raw, 8));
        let blocks = len
            .checked_sub(WRITTEN_MAX)
            .filter(|n| *n > 0)
            .unwrap_or(len);
        if start.saturating_add(blocks) > self.fs.blocks {
            return Err(self.nonsense());
        }
        if len <= WRITTEN_MAX {
            self.note(start..start + len);
        }
        Ok(())
    }

    fn note(&mut self, blocks: Range<u64>) {
        let range = blocks.start * self.fs.block..blocks.end * self.fs.block;
        match self.pieces.last_mut() {
            Some(last) if last.inode == self.inode && last.range.end == range.start => {
                last.range.end = range.end;
            }
            _ => self.pieces.push(Piece {
                range,
                inode: self.inode,
            }),
        }
    }

    fn nonsense(&self) -> Fault {
        Fault::Damaged(format!("the extents of inode {} make no sense", self.inode))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;

    /// Compared with debugfs: every block of a fragmented file, of a directory, and nothing of what
    /// was only allocated.
    #[test]
    fn pieces_are_what_debugfs_says() {
        let dir = tempfile::tempdir().expect("a directory");
        let image = dir.path().join("fs");
        let script = format!(
            "cd {}; head -c 3000000 /dev/urandom > big; head -c 70000 /dev/urandom > small; \
             truncate -s 64M fs; mkfs.ext4 -q -b 4096 -O ^has_journal fs; \
             for i in $(seq 1 40); do echo \"write small s$i\"; done > script; \
             for i in $(seq 1 2 40); do echo \"rm s$i\"; done >> script; \
             echo 'write big big' >> script; echo 'mkdir d' >> script; \
             echo 'write small gone' >> script; echo 'rm gone' >> script; \
             echo 'write /dev/null empty' >> script; echo 'fallocate empty 0 9' >> script; \
             debugfs -w -f script fs > /dev/null 2>&1; debugfs -R 'blocks big' fs 2> /dev/null; \
             debugfs -R 'blocks d' fs 2> /dev/null; debugfs -R 'blocks empty' fs 2> /dev/null; \
             debugfs -R 'stat big' fs 2> /dev/null | grep -c . > /dev/null; \
             debugfs -R 'ncheck -c 12' fs > /dev/null 2>&1",
            dir.path().display()
        );
        let run = Command::new("sh")
            .args(["-uc", &script])
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .output()
            .expect("sh runs");
        let told = String::from_utf8_lossy(&run.stdout).into_owned();
        let lines: Vec<Vec<u64>> = told
            .lines()
            .map(|line| line.split_whitespace().flat_map(str::parse).collect())
            .collect();
        assert_eq!(
            lines.len(),
            3,
            "{told} {:?}",
            String::from_utf8_lossy(&run.stderr)
        );
        let file = File::open(&image).expect("opens");
        let mut read = |at: u64, into: &mut [u8]| file.read_exact_at(into, at);
        let size = 64 << 20;
        let found = pieces(&mut read, size).expect("reads").expect("sound");
        let holds = |block: u64| {
            let at = block * 4096;
            found.iter().any(|piece| piece.range.contains(&at))
        };
        assert!(lines[0].len() > 700, "{told}");
        for block in lines[0].iter().chain(&lines[1]) {
            assert!(holds(*block), "block {block} of a file or directory");
        }
        assert!(lines[2].iter().filter(|b| **b > 0).count() >= 9, "{told}");
        assert!(!lines[2].iter().any(|block| *block > 0 && holds(*block)));
        let blocks: u64 = found
            .iter()
            .map(|p| (p.range.end - p.range.start) / 4096)
            .sum();
        // 20 small files of 18 blocks, the root, lost+found, and what was compared above.
        let least = lines[0].len() as u64 + 20 * 18 + 1;
        assert!(
            (least..least + 12).contains(&blocks),
            "{blocks}, at least {least}"
        );
    }
}
