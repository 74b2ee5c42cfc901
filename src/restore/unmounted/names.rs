//! Directories, and paths through them.

use super::Filesystem;
use super::content::Map;
use super::fetch::NAMES;
use crate::error::{Attempt, Error, Kind, Result};
use crate::ext4::{self, DirEntry, Fault, Format, HashTree, Inode};
use crate::restore::descent::show;
use crate::restore::source::{Entry, FileKind};

/// Bytes of a directory; three million names of 30 bytes. What is larger is not believed.
const DIRECTORY_MAX: u64 = 128 << 20;

/// A directory of so many bytes is read whole in less time than its index takes round trips.
const LISTED: u64 = 128 << 10;

/// Symbolic links that one path may lead through (`MAXSYMLINKS` of Linux).
const LINKS_MAX: u32 = 40;

impl Filesystem {
    /// The names in a directory, without `.` and `..`.
    pub fn list(&self, directory: &Inode) -> Result<Vec<Entry>> {
        let mut found = Vec::new();
        self.each_entry(directory, |entry| {
            if entry.name != b"." && entry.name != b".." {
                found.push(Entry {
                    name: entry.name.to_vec(),
                    kind: kind(entry.kind),
                    inode: entry.inode.into(),
                });
            }
        })?;
        Ok(found)
    }

    /// The inode that a directory has under a name.
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Result<u32> {
        if let Some(inode) = self.lookup_by_index(directory, name) {
            return Ok(inode);
        }
        let mut inode = None;
        self.each_entry(directory, |entry| {
            if inode.is_none() && entry.name == name {
                inode = Some(entry.inode);
            }
        })?;
        inode.ok_or_else(|| Error::new(Kind::NotFound, format!("there is no {}", show(name))))
    }

    /// The same by the directory's index, if it has one and that leads there.
    fn lookup_by_index(&self, directory: &Inode, name: &[u8]) -> Option<u32> {
        let by_extents = matches!(directory.format, Format::Extents | Format::Blocks);
        if !directory.has_index || !by_extents || directory.size <= LISTED || directory.is_encrypted
        {
            return None;
        }
        let map = Map::new(self, directory);
        let block = |number: u64| self.read_block(map.at(number).ok()?.start?).ok();
        let mut raw = block(0)?;
        let tree = HashTree::parse(&raw)?;
        let hash = tree.hash(&self.superblock, name);
        let mut number = ext4::next_block(&raw, true, hash)?;
        for _ in 0..tree.levels {
            raw = block(number)?;
            number = ext4::next_block(&raw, false, hash)?;
        }
        raw = block(number)?;
        let entries = ext4::block_entries(&self.superblock, directory, number, &raw).ok()?;
        let entry = entries.into_iter().find(|entry| entry.name == name)?;
        Some(entry.inode)
    }

    fn each_entry(&self, directory: &Inode, mut each: impl FnMut(&DirEntry<'_>)) -> Result<()> {
        let wrong = |what: &str| {
            let what = format!("directory inode {} {what}", directory.number);
            Error::from(Fault::Damaged(what))
        };
        if !directory.is_directory() {
            return Err(Error::new(Kind::NotFound, "it is not a directory"));
        }
        if directory.is_encrypted {
            let what = format!(
                "directory inode {} is encrypted by fscrypt",
                directory.number
            );
            return Err(Error::new(Kind::Unsupported, what));
        }
        if directory.format == Format::Inline {
            // The first four bytes are the number of the directory above.
            let root = ext4::inline_entries(directory, &directory.root[4..])?;
            root.iter().for_each(&mut each);
            let rest = ext4::inline_data(directory)?;
            ext4::inline_entries(directory, &rest)?
                .iter()
                .for_each(each);
            return Ok(());
        }
        let size = self.superblock.block_size;
        // No block can be in it twice, and no hole.
        if directory.size > DIRECTORY_MAX.min(self.device.size()) {
            return Err(wrong("is larger than any that is made"));
        }
        if !directory.size.is_multiple_of(size) {
            return Err(wrong("has a size that none can have"));
        }
        let blocks = directory.size / size;
        let map = Map::new(self, directory);
        let mut number = 0;
        let mut fetched = 0;
        while number < blocks {
            if number >= fetched {
                let from = number * size;
                self.fetch_parts(std::iter::once((directory, from..from + NAMES)));
                fetched = number + NAMES / size;
            }
            let run = map.at(number)?;
            let length = run.length.min(blocks - number);
            let Some(start) = run.start else {
                return Err(wrong("has a hole"));
            };
            for i in 0..length {
                let raw = self.read_block(start + i)?;
                ext4::block_entries(&self.superblock, directory, number + i, &raw)?
                    .iter()
                    .for_each(&mut each);
            }
            number += length;
        }
        Ok(())
    }

    /// The inode at a path below the directory `root`, which is its `/`. Symbolic links are
    /// followed, the last one too, and never lead out.
    pub fn resolve(&self, root: u32, path: &[u8]) -> Result<u32> {
        self.walk(root, path, true).map(|way| way[way.len() - 1])
    }

    /// The same without following a symbolic link at the end, unless a slash ends the path.
    pub fn resolve_itself(&self, root: u32, path: &[u8]) -> Result<u32> {
        let follow = path.ends_with(b"/");
        self.walk(root, path, follow).map(|way| way[way.len() - 1])
    }

    /// The inodes on the way, from the root; the last one is what the path names.
    fn walk(&self, root: u32, path: &[u8], follow: bool) -> Result<Vec<u32>> {
        let attempt = || format!("find {} in the snapshot", show(path));
        let mut way = vec![root];
        let mut links = 0;
        // What is still to be walked, the next name last.
        let mut names: Vec<Vec<u8>> = reversed(path);
        while let Some(name) = names.pop() {
            match &*name {
                b"" | b"." => continue,
                b".." => {
                    if way.len() > 1 {
                        way.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let here = self.inode(way[way.len() - 1]).attempt(attempt)?;
            let found = self.lookup(&here, &name).map_err(|error| {
                match (error.kind(), self.similar(&here, &name)) {
                    (Kind::NotFound, Some(near)) => error.hint(format!("there is {}", show(&near))),
                    _ => error,
                }
            });
            let found = found.attempt(attempt)?;
            let inode = self.inode(found).attempt(attempt)?;
            let is_link = inode.mode & 0o17_0000 == Inode::SYMLINK;
            if !is_link || (names.is_empty() && !follow) {
                way.push(found);
                continue;
            }
            links += 1;
            if links > LINKS_MAX {
                let what = "it leads through too many symbolic links";
                return Err(Error::new(Kind::NotFound, what)).attempt(attempt);
            }
            let target = self.read_link(&inode).attempt(attempt)?;
            if target.starts_with(b"/") {
                way.truncate(1);
            }
            names.extend(reversed(&target));
        }
        Ok(way)
    }

    /// A name in the directory that may have been meant: the same but for case, or with a few
    /// letters changed.
    fn similar(&self, directory: &Inode, name: &[u8]) -> Option<Vec<u8>> {
        let entries = self.list(directory).ok()?.into_iter();
        let scored = entries.filter_map(|entry| {
            let distance = distance(&entry.name, name);
            let most = (name.len() / 3).max(1);
            (distance <= most).then_some((distance, entry.name))
        });
        scored.min().map(|(_, name)| name)
    }
}

/// A trailing slash leaves an empty name, so that a link before it is followed.
fn reversed(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path.split(|byte| *byte == b'/').map(<[u8]>::to_vec);
    let mut names: Vec<Vec<u8>> = names.collect();
    names.reverse();
    names
}

/// How many letters to change, add or take away (Levenshtein), ignoring case.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(!x.eq_ignore_ascii_case(y));
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn kind(byte: u8) -> Option<FileKind> {
    Some(match byte {
        1 => FileKind::Regular,
        2 => FileKind::Directory,
        3 => FileKind::CharDevice,
        4 => FileKind::BlockDevice,
        5 => FileKind::Fifo,
        6 => FileKind::Socket,
        7 => FileKind::Symlink,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_count_letters() {
        assert_eq!(distance(b"report.txt", b"Report.txt"), 0);
        assert_eq!(distance(b"fstab", b"fsta"), 1);
        assert_eq!(distance(b"kitten", b"sitting"), 3);
    }
}
