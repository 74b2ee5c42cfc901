//! An ext4 that nobody has mounted, read as an ordinary user: every kind of file, with all that an
//! inode says of it.
//!
//! The volume is only read. A journal that was not replayed counts as if it had been
//! ([`recovery`]). Every byte may be hostile: what is wrong costs the file or directory that it
//! belongs to, and memory is bounded by what is really there, not by what is claimed.
//!
//! Over a link every read costs a round trip, so whoever knows what comes next says so: [`fetch`]
//! brings it into the cache below in large runs, many at a time.

mod ahead;
mod attributes;
mod content;
mod cursor;
mod fetch;
mod names;
mod plan;
mod recovery;
mod tree;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::source::{Entry, FileKind, Metadata, Time};
use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};
use crate::ext4::{self, Fault, Group, Inode, Superblock};

pub use ahead::Ahead;
pub use content::FileContent;
pub use cursor::UnmountedTree;
pub use plan::Plan;
pub use tree::{Node, Tree, Trouble};

/// The inode of the root directory.
pub const ROOT: u32 = 2;

/// Larger files are not read whole: completion records are a few KiB.
const SMALL_MAX: u64 = 8 << 20;

/// A completion record with all the errors that one keeps is smaller.
const RECORD_MAX: u64 = 64 << 10;

/// An ext4 on a device that nobody changes meanwhile.
pub struct Filesystem {
    device: Arc<dyn Device>,
    superblock: Superblock,
    replayed: recovery::Replayed,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Error {
        match &fault {
            Fault::Unsupported(_) => Error::new(Kind::Unsupported, fault.to_string())
                .hint("the kernel may know it: mount the image with `e2ebak mount --read-only`"),
            _ => Error::new(Kind::Corrupt, fault.to_string()),
        }
    }
}

impl Filesystem {
    /// Reads the superblock, and the journal if it was not replayed.
    pub fn open(device: Arc<dyn Device>) -> Result<Filesystem> {
        let attempt = || "read the filesystem in the image";
        let mut filesystem = Filesystem {
            superblock: read_superblock(|buf, at| read_device(&*device, buf, at))
                .attempt(attempt)?,
            device,
            replayed: BTreeMap::new(),
        };
        if filesystem.superblock.needs_recovery {
            filesystem.replayed =
                recovery::replay(&filesystem).attempt(|| "replay its journal in memory")?;
            tracing::debug!(
                blocks = filesystem.replayed.len(),
                "journal replayed in memory"
            );
            let again = read_superblock(|buf, at| filesystem.read(buf, at));
            filesystem.superblock = again.attempt(attempt)?;
        }
        Ok(filesystem)
    }

    pub fn label(&self) -> String {
        String::from_utf8_lossy(&self.superblock.label).into_owned()
    }

    pub fn uuid(&self) -> String {
        uuid::Uuid::from_bytes(self.superblock.uuid).to_string()
    }

    /// Bytes of the filesystem.
    pub fn size(&self) -> u64 {
        self.superblock.size()
    }

    /// Bytes at an offset of the volume, as they are after the replay.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_device(&*self.device, buf, offset)?;
        if self.replayed.is_empty() || buf.is_empty() {
            return Ok(());
        }
        let size = self.superblock.block_size;
        let last = (offset + buf.len() as u64 - 1) / size;
        for (block, logged) in self.replayed.range(offset / size..=last) {
            let mut bytes = vec![0; size as usize];
            read_device(&*self.device, &mut bytes, logged.block * size)?;
            if logged.is_escaped {
                bytes[..4].copy_from_slice(&ext4::journal::ESCAPED);
            }
            let begin = block * size;
            let from = begin.max(offset);
            let to = (begin + size).min(offset + buf.len() as u64);
            let length = (to - from) as usize;
            buf[(from - offset) as usize..][..length]
                .copy_from_slice(&bytes[(from - begin) as usize..][..length]);
        }
        Ok(())
    }

    fn read_block(&self, block: u64) -> Result<Vec<u8>> {
        if block == 0 || block >= self.superblock.blocks {
            return Err(Fault::Damaged(format!("there is no block {block}")).into());
        }
        let mut bytes = vec![0; self.superblock.block_size as usize];
        self.read(&mut bytes, block * self.superblock.block_size)?;
        Ok(bytes)
    }

    fn group(&self, number: u64) -> Result<Group> {
        let mut raw = vec![0; self.superblock.descriptor_size()];
        self.read(&mut raw, self.superblock.descriptor_at(number))?;
        Ok(self.superblock.parse_group(number, &raw)?)
    }

    /// Where an inode is on the volume, in bytes.
    fn inode_at(&self, number: u32) -> Result<u64> {
        let Some((group, place)) = self.superblock.locate(number) else {
            return Err(Fault::Damaged(format!("there is no inode {number}")).into());
        };
        let table = self.group(group)?.inode_table * self.superblock.block_size;
        Ok(table + place * self.superblock.inode_size() as u64)
    }

    /// Reads and judges an inode.
    pub fn inode(&self, number: u32) -> Result<Inode> {
        let at = self.inode_at(number)?;
        let mut raw = vec![0; self.superblock.inode_size()];
        self.read(&mut raw, at)
            .attempt(|| format!("read inode {number}"))?;
        Ok(Inode::parse(&self.superblock, number, &raw)?)
    }

    /// Names in the directory at `path` (from the root); none when there is no such directory.
    pub fn names_in(&self, path: &str) -> Result<Vec<Vec<u8>>> {
        let list = || {
            let inode = self.resolve(ROOT, path.as_bytes())?;
            self.list(&self.inode(inode)?)
        };
        match list() {
            Ok(entries) => {
                self.fetch_small(&entries);
                Ok(entries.into_iter().map(|entry| entry.name).collect())
            }
            Err(error) if error.kind() == Kind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error).attempt(|| format!("list {path} in the image")),
        }
    }

    /// What is in a directory, and whether each is a directory itself.
    pub fn entries(&self, directory: u32) -> Result<Vec<(Entry, bool)>> {
        let entries = self.list(&self.inode(directory)?)?.into_iter();
        let known = entries.map(|entry| {
            let is_directory = match (entry.kind, u32::try_from(entry.inode)) {
                // Filesystems without the feature `filetype` say it only in the inode.
                (None, Ok(number)) => self.inode(number)?.is_directory(),
                (kind, _) => kind == Some(FileKind::Directory),
            };
            Ok((entry, is_directory))
        });
        known.collect()
    }

    /// Whether there is anything at `path` (from the root), also a link that leads nowhere.
    pub fn exists(&self, path: &str) -> Result<bool> {
        match self.resolve_itself(ROOT, path.as_bytes()) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == Kind::NotFound => Ok(false),
            Err(error) => Err(error).attempt(|| format!("look for {path} in the image")),
        }
    }

    /// Who lists the records reads them next.
    fn fetch_small(&self, entries: &[Entry]) {
        let files = entries
            .iter()
            .filter(|entry| entry.kind != Some(FileKind::Directory));
        let numbers: Vec<u32> = files
            .filter_map(|entry| u32::try_from(entry.inode).ok())
            .collect();
        self.fetch_inodes(&numbers);
        let inodes = numbers.iter().filter_map(|number| self.inode(*number).ok());
        let small: Vec<Inode> = inodes.filter(|inode| inode.size <= RECORD_MAX).collect();
        self.fetch_content(small.iter());
    }

    /// A small file, whole.
    pub fn read_small(&self, path: &str) -> Result<Vec<u8>> {
        let read = || {
            let inode = self.inode(self.resolve(ROOT, path.as_bytes())?)?;
            self.read_whole(&inode, SMALL_MAX)
        };
        read().attempt(|| format!("read {path} in the image"))
    }
}

/// What an inode says of its file.
pub fn metadata(inode: &Inode) -> Result<Metadata> {
    let kind = match inode.mode & 0o17_0000 {
        Inode::REGULAR => FileKind::Regular,
        Inode::DIRECTORY => FileKind::Directory,
        Inode::SYMLINK => FileKind::Symlink,
        0o2_0000 => FileKind::CharDevice,
        0o6_0000 => FileKind::BlockDevice,
        0o1_0000 => FileKind::Fifo,
        0o14_0000 => FileKind::Socket,
        _ => {
            let what = format!(
                "inode {} has no known type ({:o})",
                inode.number, inode.mode
            );
            return Err(Fault::Damaged(what).into());
        }
    };
    let time = |stamp: ext4::Stamp| Time {
        seconds: stamp.seconds,
        nanoseconds: stamp.nanoseconds,
    };
    let is_device = matches!(kind, FileKind::CharDevice | FileKind::BlockDevice);
    Ok(Metadata {
        kind,
        mode: u32::from(inode.mode) & 0o7777,
        uid: inode.uid,
        gid: inode.gid,
        size: inode.size,
        modified: time(inode.modified),
        accessed: Some(time(inode.accessed)),
        device: if is_device { inode.device() } else { (0, 0) },
        links: inode.links.into(),
        inode: inode.number.into(),
    })
}

fn read_superblock(read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<Superblock> {
    let mut raw = [0; Superblock::SIZE];
    read(&mut raw, Superblock::OFFSET)?;
    Ok(Superblock::parse(&raw)?)
}

fn read_device(device: &dyn Device, buf: &mut [u8], offset: u64) -> Result<()> {
    let end = offset.checked_add(buf.len() as u64);
    if end.is_none_or(|end| end > device.size()) {
        let what = format!(
            "the volume ends at {} bytes, before what is to be read at {offset}",
            device.size()
        );
        return Err(Error::new(Kind::Corrupt, what));
    }
    device.read_exact_at(buf, offset)
}
