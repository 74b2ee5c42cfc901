//! Where the content of files lies: read from the inode tables and the extent trees of an ext4 that
//! nobody has mounted.

use std::ops::Range;

use super::map::{RUN_MAX, descriptors};
use super::superblock::INODE_UNINIT;
use super::{
    Fault, Format, IN_INODE, Inode, Node, Read, Step, Superblock, damaged, parse_node, u16_at,
};

/// The root directory. Below [`FIRST_INODE`] it alone is nobody's secret store: the others hold the
/// journal, room for descriptors and bad blocks.
const ROOT_INODE: u32 = 2;
const FIRST_INODE: u32 = 11;

/// Blocks of a file have numbers of 32 bits.
const FILE_END: u64 = 1 << 32;

/// A run of blocks that hold the content of a file, a directory or a long symbolic link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// In bytes of the volume.
    pub range: Range<u64>,
    pub inode: u32,
}

/// All blocks that were written as somebody's content, ascending. `E` is how reading fails.
///
/// Blocks that were allocated and never written are not among them. A file whose inode or tree has a
/// wrong checksum or makes no sense is a [`Fault::Damaged`].
pub fn pieces<E>(read: Read<'_, E>, volume_size: u64) -> Result<Result<Vec<Piece>, Fault>, E> {
    let (fs, groups) = match descriptors(read, volume_size)? {
        Ok(both) => both,
        Err(fault) => return Ok(Err(fault)),
    };
    let mut pieces = Vec::new();
    let mut table = Vec::new();
    let inode_size = fs.inode_size as u64;
    for (number, group) in (0..).zip(&groups) {
        if group.flags & INODE_UNINIT != 0 {
            continue;
        }
        let used = u64::from(fs.inodes_per_group) - group.inodes_unused;
        let per_run = (RUN_MAX / inode_size).max(1);
        for first in (0..used).step_by(per_run as usize) {
            let count = per_run.min(used - first);
            table.resize((count * inode_size) as usize, 0);
            let at = group.inode_table * fs.block_size + first * inode_size;
            read(at, &mut table)?;
            for (index, raw) in (first..).zip(table.chunks_exact(fs.inode_size)) {
                let inode = number * u64::from(fs.inodes_per_group) + index + 1;
                let inode = match parse_content(&fs, inode as u32, raw) {
                    Ok(Some(inode)) => inode,
                    Ok(None) => continue,
                    Err(fault) => return Ok(Err(fault)),
                };
                let mut walk = Walk {
                    fs: &fs,
                    inode: &inode,
                    pieces: &mut pieces,
                };
                if let Err(fault) = walk.tree(read)? {
                    return Ok(Err(fault));
                }
            }
        }
    }
    pieces.sort_unstable_by_key(|piece| piece.range.start);
    Ok(Ok(pieces))
}

/// The inode, if it is in use and its content lies in extents.
fn parse_content(fs: &Superblock, number: u32, raw: &[u8]) -> Result<Option<Inode>, Fault> {
    let kind = u16_at(raw, 0x00) & 0o17_0000;
    let is_content = [Inode::DIRECTORY, Inode::REGULAR, Inode::SYMLINK].contains(&kind);
    let counts = number >= FIRST_INODE || number == ROOT_INODE;
    let in_use = u16_at(raw, 0x1A) > 0;
    if !(counts && in_use && is_content) {
        return Ok(None);
    }
    let inode = Inode::parse(fs, number, raw)?;
    Ok(Some(inode).filter(|inode| inode.format == Format::Extents))
}

struct Walk<'a> {
    fs: &'a Superblock,
    inode: &'a Inode,
    pieces: &'a mut Vec<Piece>,
}

impl Walk<'_> {
    fn tree<E>(&mut self, read: Read<'_, E>) -> Result<Result<(), Fault>, E> {
        match parse_node(self.fs, self.inode, IN_INODE, &self.inode.root) {
            Ok(root) => self.node(read, &root, 0..FILE_END),
            Err(fault) => Ok(Err(fault)),
        }
    }

    /// What a node says of some blocks of the file.
    fn node<E>(
        &mut self,
        read: Read<'_, E>,
        node: &Node<'_>,
        blocks: Range<u64>,
    ) -> Result<Result<(), Fault>, E> {
        let mut at = blocks.start;
        while at < blocks.end {
            let (child, until) = match node.find(at, blocks.end) {
                Step::Run(run) => {
                    if let Some(start) = run.start {
                        self.note(start..start + run.length);
                    }
                    at += run.length;
                    continue;
                }
                Step::Down(child, until) => (child, until),
            };
            let mut raw = vec![0; self.fs.block_size as usize];
            read(child * self.fs.block_size, &mut raw)?;
            let below = match self.below(node, child, &raw) {
                Ok(below) => below,
                Err(fault) => return Ok(Err(fault)),
            };
            if let Err(fault) = self.node(read, &below, at..until)? {
                return Ok(Err(fault));
            }
            self.note(child..child + 1);
            at = until;
        }
        Ok(Ok(()))
    }

    fn below<'raw>(
        &self,
        above: &Node<'_>,
        block: u64,
        raw: &'raw [u8],
    ) -> Result<Node<'raw>, Fault> {
        let node = parse_node(self.fs, self.inode, Some(block), raw)?;
        match node.depth + 1 == above.depth {
            true => Ok(node),
            false => damaged(format!(
                "inode {}: an extent node is misplaced",
                self.inode.number
            )),
        }
    }

    fn note(&mut self, blocks: Range<u64>) {
        let range = blocks.start * self.fs.block_size..blocks.end * self.fs.block_size;
        let inode = self.inode.number;
        match self.pieces.last_mut() {
            Some(last) if last.inode == inode && last.range.end == range.start => {
                last.range.end = range.end;
            }
            _ => self.pieces.push(Piece { range, inode }),
        }
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
