//! A [`Source`] over a directory of a mounted filesystem.
//!
//! The filesystem is the image's and may be hostile: all names are resolved from one directory
//! descriptor, inside that root, on that filesystem and never through `/proc`'s magic links. Device
//! files are described, not opened; mount it `nodev` all the same.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use super::descent::{Descent, identity, open_at, open_directory, show};
use super::source::{Attribute, Content, Entry, FileKind, HERE, Metadata, Piece, Source, Time};
use crate::error::{Attempt, Error, Kind, Result};

/// The largest list of names and the largest value of an extended attribute, in bytes
/// (`XATTR_LIST_MAX` and `XATTR_SIZE_MAX` in `linux/limits.h`).
const ATTRIBUTE_MAX: usize = 65_536;

/// For the path that the user names: links are followed, as if the tree's root were `/`.
const PATH_RULES: ResolveFlags = ResolveFlags::IN_ROOT
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// For every name below it: no link is followed.
const NAME_RULES: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// A directory of a mounted filesystem, read from its root down.
pub struct MountedTree {
    root: OwnedFd,
    device: u64,
    way: Descent,
}

impl MountedTree {
    /// `root` becomes the root of the tree: nothing above it or beside it can be reached.
    pub fn open(root: &Path) -> Result<Self> {
        let attempt = || format!("open {}", show(root.as_os_str().as_bytes()));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty()).attempt(attempt)?;
        let top = root.try_clone().attempt(attempt)?;
        Ok(MountedTree {
            device: identity(root.as_fd())?.device,
            root,
            way: Descent::new(top, NAME_RULES),
        })
    }

    /// What a file takes on the disk, and by how many names.
    pub fn footprint(&self, name: &[u8]) -> Result<Footprint> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(self.way.here(), name, flags, StatxFlags::BASIC_STATS)
            .attempt(|| format!("examine {}", show(name)))?;
        let mode = u32::from(stat.stx_mode);
        Ok(Footprint {
            inode: stat.stx_ino,
            links: stat.stx_nlink,
            stored: stat.stx_blocks * 512,
            is_directory: FileType::from_raw_mode(mode) == FileType::Directory,
        })
    }

    /// A path to `name` for the calls that know no directory descriptors. The descriptor pins the
    /// directory, and a last component that is a symbolic link is not followed by `l*xattr`.
    fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = format!("/proc/self/fd/{}/", self.way.here().as_raw_fd()).into_bytes();
        path.extend_from_slice(name);
        path
    }
}

/// What a file takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    pub inode: u64,
    /// Names in the whole filesystem; of a directory other things.
    pub links: u32,
    /// Bytes on the disk.
    pub stored: u64,
    pub is_directory: bool,
}

impl Source for MountedTree {
    fn go(&mut self, path: &[u8]) -> Result<()> {
        let path = if path.is_empty() { HERE } else { path };
        let root = self.root.as_fd();
        let top = open_directory(root, path, PATH_RULES)
            .attempt(|| format!("open {} in the snapshot", show(path)))?;
        self.way = Descent::new(top, NAME_RULES);
        Ok(())
    }

    fn enter(&mut self, name: &[u8]) -> Result<()> {
        self.way.enter(name)
    }

    fn leave(&mut self) -> Result<()> {
        self.way.leave().map(drop)
    }

    fn list(&mut self) -> Result<Vec<Entry>> {
        let attempt = || "list a directory";
        let mut entries = Vec::new();
        for entry in Dir::read_from(self.way.here()).attempt(attempt)? {
            let entry = entry.attempt(attempt)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                entries.push(Entry {
                    name: name.to_vec(),
                    kind: kind(entry.file_type()),
                    inode: entry.ino(),
                });
            }
        }
        Ok(entries)
    }

    fn metadata(&mut self, name: &[u8]) -> Result<Metadata> {
        let attempt = || format!("examine {}", show(name));
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(self.way.here(), name, flags, StatxFlags::BASIC_STATS)
            .attempt(attempt)?;
        let mode = u32::from(stat.stx_mode);
        let Some(kind) = kind(FileType::from_raw_mode(mode)) else {
            let attempt = format!("{} has no known file type (mode {mode:o})", show(name));
            return Err(Error::new(Kind::Corrupt, attempt));
        };
        Ok(Metadata {
            kind,
            mode: mode & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            size: stat.stx_size,
            modified: Time {
                seconds: stat.stx_mtime.tv_sec,
                nanoseconds: stat.stx_mtime.tv_nsec,
            },
            accessed: Some(Time {
                seconds: stat.stx_atime.tv_sec,
                nanoseconds: stat.stx_atime.tv_nsec,
            }),
            device: (stat.stx_rdev_major, stat.stx_rdev_minor),
            links: stat.stx_nlink,
            inode: stat.stx_ino,
        })
    }

    fn read_link(&mut self, name: &[u8]) -> Result<Vec<u8>> {
        rustix::fs::readlinkat(self.way.here(), name, Vec::new())
            .map(|target| target.into_bytes())
            .attempt(|| format!("read the symbolic link {}", show(name)))
    }

    fn attributes(&mut self, name: &[u8]) -> Result<Vec<Attribute>> {
        let attempt = || format!("read the extended attributes of {}", show(name));
        let path = self.path_of(name);
        let mut names = Vec::with_capacity(ATTRIBUTE_MAX);
        match rustix::fs::llistxattr(&*path, rustix::buffer::spare_capacity(&mut names)) {
            Ok(_) => {}
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(errno) => return Err(errno).attempt(attempt),
        }
        let mut attributes = Vec::new();
        let mut value = Vec::with_capacity(if names.is_empty() { 0 } else { ATTRIBUTE_MAX });
        for name in names.split_inclusive(|byte| *byte == 0) {
            let Ok(name) = CStr::from_bytes_with_nul(name) else {
                continue;
            };
            value.clear();
            let spare = rustix::buffer::spare_capacity(&mut value);
            match rustix::fs::lgetxattr(&*path, name, spare) {
                Ok(_) => attributes.push(Attribute {
                    name: name.to_bytes().to_vec(),
                    value: value.clone(),
                }),
                Err(Errno::NODATA) => {}
                Err(errno) => return Err(errno).attempt(attempt),
            }
        }
        Ok(attributes)
    }

    fn open(&mut self, name: &[u8]) -> Result<Box<dyn Content + '_>> {
        let attempt = || format!("open {}", show(name));
        // Should it be no regular file after all, then opening must neither wait nor take a
        // terminal.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = open_at(self.way.here(), name, flags, NAME_RULES).attempt(attempt)?;
        let stat = rustix::fs::fstat(&file).attempt(attempt)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            let attempt = format!("{} is no regular file any more", show(name));
            return Err(Error::new(Kind::Corrupt, attempt));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        Ok(Box::new(SparseFile {
            file,
            size,
            position: 0,
            data_until: 0,
        }))
    }

    fn device(&self) -> Option<u64> {
        Some(self.device)
    }
}

/// An open file, read run by run with `SEEK_DATA` and `SEEK_HOLE`.
struct SparseFile {
    file: OwnedFd,
    size: u64,
    position: u64,
    /// Where the current run of data ends; at or before `position` when the next run is unknown.
    data_until: u64,
}

impl SparseFile {
    /// The next hole if there is one at the position, else how far the data reach.
    fn look_ahead(&mut self) -> Result<Option<u64>> {
        let attempt = || "look for holes";
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(self.position)) {
            Ok(data) => data.min(self.size),
            Err(Errno::NXIO) => self.size,
            Err(errno) => return Err(errno).attempt(attempt),
        };
        if data > self.position {
            let hole = data - self.position;
            self.position = data;
            return Ok(Some(hole));
        }
        let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(self.position)).attempt(attempt)?;
        // At least one byte, so that a filesystem with strange answers cannot hold us here.
        self.data_until = hole.clamp(self.position + 1, self.size);
        Ok(None)
    }
}

impl Content for SparseFile {
    fn next(&mut self, buf: &mut [u8]) -> Result<Piece> {
        if self.position >= self.size {
            return Ok(Piece::End);
        }
        if self.position >= self.data_until
            && let Some(hole) = self.look_ahead()?
        {
            return Ok(Piece::Hole(hole));
        }
        let wanted = usize::try_from(self.data_until - self.position).unwrap_or(usize::MAX);
        let wanted = wanted.min(buf.len());
        let buf = &mut buf[..wanted];
        let read = loop {
            match rustix::io::pread(&self.file, &mut *buf, self.position) {
                Err(Errno::INTR) => {}
                result => break result.attempt(|| format!("read at offset {}", self.position))?,
            }
        };
        if read == 0 {
            let attempt = format!("the file ends at {} of {} bytes", self.position, self.size);
            return Err(Error::new(Kind::Corrupt, attempt));
        }
        self.position += read as u64;
        Ok(Piece::Data(read))
    }
}

fn kind(file_type: FileType) -> Option<FileKind> {
    match file_type {
        FileType::RegularFile => Some(FileKind::Regular),
        FileType::Directory => Some(FileKind::Directory),
        FileType::Symlink => Some(FileKind::Symlink),
        FileType::CharacterDevice => Some(FileKind::CharDevice),
        FileType::BlockDevice => Some(FileKind::BlockDevice),
        FileType::Fifo => Some(FileKind::Fifo),
        FileType::Socket => Some(FileKind::Socket),
        FileType::Unknown => None,
    }
}
