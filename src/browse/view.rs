//! All snapshots as a read-only FUSE filesystem: a directory for each, and `latest`.
//!
//! A node's number is its inode's in the image with one bit set, so that nothing has to be
//! remembered of what the kernel was told, and names of one file are one file.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyXattr, Request,
};

use crate::error::{Error, Kind, Result};
use crate::restore::{Content, FileKind, Filesystem, Metadata, Piece, Time, metadata};

/// Nothing changes while it is shown.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// The link to the newest snapshot.
const LATEST: INodeNo = INodeNo(2);
const LATEST_NAME: &str = "latest";

/// Set in the number of every node that is an inode of the image.
const INODE: u64 = 1 << 32;

/// What is shown.
pub struct View {
    filesystem: Arc<Filesystem>,
    /// Names and directories of the snapshots, in order.
    snapshots: Vec<(String, u32)>,
    owner: (u32, u32),
    since: SystemTime,
    listings: Mutex<HashMap<u64, Arc<Vec<Listed>>>>,
    next_listing: AtomicU64,
}

#[derive(Clone)]
struct Listed {
    node: INodeNo,
    kind: FileType,
    name: Vec<u8>,
}

impl View {
    /// `snapshots` are names and inodes of directories, the newest last.
    pub fn new(filesystem: Arc<Filesystem>, snapshots: Vec<(String, u32)>) -> View {
        View {
            filesystem,
            snapshots,
            owner: (
                rustix::process::geteuid().as_raw(),
                rustix::process::getegid().as_raw(),
            ),
            since: SystemTime::now(),
            listings: Mutex::default(),
            next_listing: AtomicU64::new(1),
        }
    }

    fn inode(&self, node: INodeNo) -> Result<crate::ext4::Inode> {
        let number = node.0 & !INODE;
        match u32::try_from(number) {
            Ok(number) if node.0 & INODE != 0 => self.filesystem.inode(number),
            _ => Err(Error::new(Kind::NotFound, "there is no such node")),
        }
    }

    fn attributes(&self, node: INodeNo) -> Result<FileAttr> {
        let own = |kind, perm, size| FileAttr {
            ino: node,
            size,
            blocks: 0,
            atime: self.since,
            mtime: self.since,
            ctime: self.since,
            crtime: self.since,
            kind,
            perm,
            nlink: 1,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        match (node, self.snapshots.last()) {
            (INodeNo::ROOT, _) => Ok(own(FileType::Directory, 0o500, 0)),
            (LATEST, Some((name, _))) => Ok(own(FileType::Symlink, 0o777, name.len() as u64)),
            _ => Ok(shown(node, &metadata(&self.inode(node)?)?)),
        }
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr> {
        if parent != INodeNo::ROOT {
            let directory = self.inode(parent)?;
            let found = self.filesystem.lookup(&directory, name.as_bytes())?;
            return self.attributes(INodeNo(INODE | u64::from(found)));
        }
        if name == LATEST_NAME {
            return self.attributes(LATEST);
        }
        match self.snapshots.iter().find(|(id, _)| name == &**id) {
            Some((_, inode)) => self.attributes(INodeNo(INODE | u64::from(*inode))),
            None => Err(Error::new(Kind::NotFound, "there is no such snapshot")),
        }
    }

    fn list(&self, node: INodeNo) -> Result<Vec<Listed>> {
        let dot = |name: &str| Listed {
            node,
            kind: FileType::Directory,
            name: name.into(),
        };
        let mut all = vec![dot("."), dot("..")];
        if node == INodeNo::ROOT {
            all.extend(self.snapshots.iter().map(|(id, inode)| Listed {
                node: INodeNo(INODE | u64::from(*inode)),
                kind: FileType::Directory,
                name: id.clone().into(),
            }));
            all.extend(self.snapshots.last().map(|_| Listed {
                node: LATEST,
                kind: FileType::Symlink,
                name: LATEST_NAME.into(),
            }));
            return Ok(all);
        }
        let entries = self.filesystem.list(&self.inode(node)?)?;
        // Whoever lists a directory asks next what is in it.
        let numbers = entries
            .iter()
            .filter_map(|entry| u32::try_from(entry.inode).ok());
        self.filesystem.fetch_inodes(&numbers.collect::<Vec<u32>>());
        all.extend(entries.into_iter().map(|entry| Listed {
            node: INodeNo(INODE | entry.inode),
            // The kernel takes what it is told here for a hint.
            kind: entry.kind.map_or(FileType::RegularFile, file_type),
            name: entry.name,
        }));
        Ok(all)
    }

    fn bytes(&self, node: INodeNo, offset: u64, len: u32) -> Result<Vec<u8>> {
        let inode = self.inode(node)?;
        let left = inode.size.saturating_sub(offset).min(len.into());
        let mut bytes = vec![0; left as usize];
        let mut content = self.filesystem.content(&inode)?;
        content.seek(offset);
        let mut at = 0;
        while at < bytes.len() {
            at += match content.next(&mut bytes[at..])? {
                Piece::Data(read) => read,
                Piece::Hole(hole) => hole.min((bytes.len() - at) as u64) as usize,
                Piece::End => break,
            };
        }
        Ok(bytes)
    }

    fn attribute_names(&self, node: INodeNo) -> Result<Vec<u8>> {
        if node.0 & INODE == 0 {
            return Ok(Vec::new());
        }
        let mut names = Vec::new();
        for attribute in self.filesystem.attributes(&self.inode(node)?)? {
            names.extend(attribute.name);
            names.push(0);
        }
        Ok(names)
    }

    fn attribute(&self, node: INodeNo, name: &OsStr) -> Result<Option<Vec<u8>>> {
        if node.0 & INODE == 0 {
            return Ok(None);
        }
        let all = self.filesystem.attributes(&self.inode(node)?)?;
        let mut all = all.into_iter();
        Ok(all
            .find(|attribute| attribute.name == name.as_bytes())
            .map(|attribute| attribute.value))
    }
}

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
    }
}

fn time(time: Time) -> SystemTime {
    let whole = Duration::from_secs(time.seconds.unsigned_abs());
    let base = match time.seconds < 0 {
        true => SystemTime::UNIX_EPOCH.checked_sub(whole),
        false => SystemTime::UNIX_EPOCH.checked_add(whole),
    };
    let nanoseconds = Duration::from_nanos(time.nanoseconds.into());
    base.and_then(|base| base.checked_add(nanoseconds))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

fn shown(node: INodeNo, metadata: &Metadata) -> FileAttr {
    let (major, minor) = metadata.device;
    FileAttr {
        ino: node,
        size: metadata.size,
        blocks: metadata.size.div_ceil(512),
        atime: time(metadata.accessed.unwrap_or(metadata.modified)),
        mtime: time(metadata.modified),
        ctime: time(metadata.modified),
        crtime: time(metadata.modified),
        kind: file_type(metadata.kind),
        perm: metadata.mode as u16,
        nlink: metadata.links,
        uid: metadata.uid,
        gid: metadata.gid,
        // FUSE carries 32 bits: 12 of the major number, 20 of the minor one.
        rdev: (minor & 0xFF) | (major << 8) | ((minor & !0xFF) << 12),
        blksize: 4096,
        flags: 0,
    }
}

fn failed(error: &Error) -> Errno {
    let kind = error.kind();
    if kind != Kind::NotFound {
        tracing::warn!(error = error.chain().join(": "), "cannot show a file");
    }
    Errno::from_i32(kind.errno())
}

/// As `getxattr(2)` wants it: the length if nothing was offered, else all of it or nothing.
fn answer(reply: ReplyXattr, bytes: &[u8], offered: u32) {
    match offered {
        // OK to unwrap: attributes and their names have a few KiB.
        0 => reply.size(u32::try_from(bytes.len()).unwrap_or(u32::MAX)),
        offered if bytes.len() > offered as usize => reply.error(Errno::ERANGE),
        _ => reply.data(bytes),
    }
}

impl fuser::Filesystem for View {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(parent, name) {
            Ok(about) => reply.entry(&REMEMBERED, &about, Generation(0)),
            Err(error) => reply.error(failed(&error)),
        }
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(node) {
            Ok(about) => reply.attr(&REMEMBERED, &about),
            Err(error) => reply.error(failed(&error)),
        }
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        if let (LATEST, Some((name, _))) = (node, self.snapshots.last()) {
            return reply.data(name.as_bytes());
        }
        let target = self.inode(node);
        match target.and_then(|inode| self.filesystem.read_link(&inode)) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(failed(&error)),
        }
    }

    fn open(&self, _: &Request, node: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self
            .inode(node)
            .and_then(|inode| self.filesystem.content(&inode).map(drop))
        {
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Err(error) => reply.error(failed(&error)),
        }
    }

    fn read(
        &self,
        _: &Request,
        node: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.bytes(node, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(failed(&error)),
        }
    }

    fn opendir(&self, _: &Request, node: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.list(node) {
            Ok(listed) => {
                let number = self.next_listing.fetch_add(1, Ordering::Relaxed);
                let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
                listings.insert(number, Arc::new(listed));
                reply.opened(FileHandle(number), FopenFlags::FOPEN_CACHE_DIR);
            }
            Err(error) => reply.error(failed(&error)),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        let listed = listings.get(&handle.0).cloned().unwrap_or_default();
        drop(listings);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (number, entry) in (1..).zip(listed.iter()).skip(from) {
            if reply.add(
                entry.node,
                number,
                entry.kind,
                OsStr::from_bytes(&entry.name),
            ) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        listings.remove(&handle.0);
        reply.ok();
    }

    fn getxattr(&self, _: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.attribute(node, name) {
            Ok(Some(value)) => answer(reply, &value, size),
            Ok(None) => reply.error(Errno::ENODATA),
            Err(error) => reply.error(failed(&error)),
        }
    }

    fn listxattr(&self, _: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        match self.attribute_names(node) {
            Ok(names) => answer(reply, &names, size),
            Err(error) => reply.error(failed(&error)),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = self.filesystem.size() / 4096;
        reply.statfs(blocks, 0, 0, 1, 0, 4096, 255, 4096);
    }
}
