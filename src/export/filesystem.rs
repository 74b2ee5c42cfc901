//! The filesystem that FUSE shows: a root directory and one file of fixed size.
//!
//! What may have to wait for the device runs in [`Handlers`]; what the device has in memory, or only
//! asks about it, is answered in place.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use tracing::{debug, error, trace};

use super::FILE_NAME;
use super::handlers::Handlers;
use super::opens::Opens;
use crate::device::Device;
use crate::error::{Error, Result};

/// Requests that the kernel sends at once (but for those of system calls that wait, which a loop
/// device does not make).
pub const IN_FLIGHT_MAX: usize = 64; // 64 x 256 KiB = 16 MiB, the windows of eight SSH channels

/// The largest read or write.
const REQUEST_MAX: u32 = 256 << 10;

/// How long the kernel may remember names and attributes: for ever, since only we change them. If
/// it had to ask, every mount(8) and losetup(8) on the machine would wait for our link, because
/// they look at the files behind all loop devices.
const REMEMBERED: Duration = Duration::from_secs(u32::MAX as u64);

const FILE: INodeNo = INodeNo(2);

thread_local! {
    /// An event loop's buffer for what it reads by itself.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// File handles tell one thing: whether the holder may write.
const FOR_READING: FileHandle = FileHandle(0);
const FOR_WRITING: FileHandle = FileHandle(1);

pub struct VolumeFile {
    volume: Arc<Volume>,
    opens: Arc<Opens>,
    handlers: Arc<Handlers>,
    mounted_at: SystemTime,
    owner: (u32, u32),
}

/// What a handler needs to answer.
struct Volume {
    device: Arc<dyn Device>,
    read_only: bool,
    /// One bit for each kind of error that was reported at level error.
    reported: AtomicU32,
}

impl VolumeFile {
    pub fn new(
        device: Arc<dyn Device>,
        opens: Arc<Opens>,
        handlers: Arc<Handlers>,
        read_only: bool,
    ) -> Self {
        VolumeFile {
            volume: Arc::new(Volume {
                device,
                read_only,
                reported: AtomicU32::new(0),
            }),
            opens,
            handlers,
            mounted_at: SystemTime::now(),
            owner: (
                rustix::process::geteuid().as_raw(),
                rustix::process::getegid().as_raw(),
            ),
        }
    }

    fn attributes(&self, node: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match node {
            INodeNo::ROOT => (FileType::Directory, 0o500, 0),
            FILE => {
                let perm = if self.volume.read_only { 0o400 } else { 0o600 };
                (FileType::RegularFile, perm, self.volume.device.size())
            }
            _ => return None,
        };
        Some(FileAttr {
            ino: node,
            size,
            blocks: size.div_ceil(512),
            atime: self.mounted_at,
            mtime: self.mounted_at,
            ctime: self.mounted_at,
            crtime: self.mounted_at,
            kind,
            perm,
            nlink: 1,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    /// truncate(2) to a larger size grows the volume, which is how `grow` reaches a mounted one. The
    /// kernel takes the new size from the answer.
    fn grow(&self, about: FileAttr, size: u64, reply: ReplyAttr) {
        if self.volume.read_only {
            return reply.error(Errno::EROFS);
        }
        let volume = self.volume.clone();
        let grown = FileAttr {
            size,
            blocks: size.div_ceil(512),
            ..about
        };
        let job = move |_: &mut Vec<u8>| match volume
            .device
            .resize(size)
            .and_then(|()| volume.device.flush())
        {
            Ok(()) => reply.attr(&REMEMBERED, &grown),
            Err(failure) => reply.error(volume.failed("grow", size, 0, &failure)),
        };
        self.handlers.run(Box::new(job));
    }

    fn flush_device(&self, handle: FileHandle, reply: ReplyEmpty) {
        if self.volume.read_only || handle != FOR_WRITING {
            return reply.ok();
        }
        let volume = self.volume.clone();
        let job = move |_: &mut Vec<u8>| match volume.device.flush() {
            Ok(()) => reply.ok(),
            Err(failure) => reply.error(volume.failed("flush", 0, 0, &failure)),
        };
        self.handlers.run(Box::new(job));
    }
}

impl Volume {
    /// How much there is of the range: less at the end of the file, as for read(2). The buffer has
    /// room for it.
    fn fit(&self, buffer: &mut Vec<u8>, offset: u64, len: u32) -> usize {
        let left = self.device.size().saturating_sub(offset);
        let len = u64::from(len).min(left) as usize;
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        len
    }

    fn read_into(&self, buffer: &mut Vec<u8>, offset: u64, len: u32) -> Result<usize> {
        let len = self.fit(buffer, offset, len);
        self.device.read_exact_at(&mut buffer[..len], offset)?;
        Ok(len)
    }

    /// Reports a failure, and gives the errno for it. A dead link fails every request of the
    /// filesystem above, so each kind is an error once and then a detail.
    fn failed(&self, what: &str, offset: u64, len: usize, failure: &Error) -> Errno {
        let kind = failure.kind();
        let report = failure.chain().join(": ");
        let bit = 1_u32.checked_shl(kind as u32).unwrap_or(0);
        match self.reported.fetch_or(bit, Ordering::Relaxed) & bit {
            0 => error!(?kind, offset, len, report, "cannot {what} the volume"),
            _ => debug!(?kind, offset, len, report, "cannot {what} the volume"),
        }
        Errno::from_i32(kind.errno())
    }
}

impl Filesystem for VolumeFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Each of these only raises a limit; an old kernel that refuses one serves more slowly.
        // Without asynchronous direct I/O a loop device has one request in flight.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_write(REQUEST_MAX);
        let _ = config.set_max_readahead(REQUEST_MAX);
        let _ = config.set_max_background(IN_FLIGHT_MAX as u16);
        let _ = config.set_congestion_threshold(IN_FLIGHT_MAX as u16);
        Ok(())
    }

    fn destroy(&mut self) {
        self.opens.gone();
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(about) if parent == INodeNo::ROOT && name == FILE_NAME => {
                reply.entry(&REMEMBERED, &about, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(node) {
            Some(about) => reply.attr(&REMEMBERED, &about),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Times are taken and forgotten, and the volume may grow; nothing else may change.
    fn setattr(
        &self,
        _: &Request,
        node: INodeNo,
        mode: Option<u32>,
        user: Option<u32>,
        group: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.attributes(node) {
            None => reply.error(Errno::ENOENT),
            Some(about) => {
                let shrinks = size.is_some_and(|size| size < about.size);
                if shrinks || mode.is_some() || user.is_some() || group.is_some() {
                    return reply.error(Errno::EPERM);
                }
                match size.filter(|size| *size > about.size) {
                    Some(size) => self.grow(about, size, reply),
                    None => reply.attr(&REMEMBERED, &about),
                }
            }
        }
    }

    fn open(&self, _: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if node != FILE {
            return reply.error(Errno::EISDIR);
        }
        let handle = match flags.acc_mode() {
            OpenAccMode::O_RDONLY => FOR_READING,
            _ if self.volume.read_only => return reply.error(Errno::EROFS),
            _ => FOR_WRITING,
        };
        self.opens.opened();
        // No page cache between the loop device and us: the filesystem above has one, and dirty
        // pages in a second one would be invisible to its fsync accounting.
        let direct = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(handle, direct);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
        self.opens.released();
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        trace!(offset, size, "read");
        let mut buffer = BUFFER.take();
        let len = self.volume.fit(&mut buffer, offset, size);
        let done = self.volume.device.read_at_once(&mut buffer[..len], offset);
        if done {
            reply.data(&buffer[..len]);
            BUFFER.set(buffer);
            return;
        }
        BUFFER.set(buffer);
        let volume = self.volume.clone();
        let job = move |buffer: &mut Vec<u8>| match volume.read_into(buffer, offset, size) {
            Ok(len) => reply.data(&buffer[..len]),
            Err(failure) => reply.error(volume.failed("read", offset, size as usize, &failure)),
        };
        self.handlers.run(Box::new(job));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        trace!(offset, size = data.len(), "write");
        if self.volume.read_only {
            return reply.error(Errno::EROFS);
        }
        let size = data.len() as u32;
        let taken = self.volume.device.write_at_once(data, offset);
        if taken == data.len() {
            return reply.written(size);
        }
        let (volume, rest) = (self.volume.clone(), data[taken..].to_vec());
        let offset = offset + taken as u64;
        let job = move |_: &mut Vec<u8>| match volume.device.write_all_at(&rest, offset) {
            Ok(()) => reply.written(size),
            Err(failure) => reply.error(volume.failed("write", offset, rest.len(), &failure)),
        };
        self.handlers.run(Box::new(job));
    }

    fn flush(&self, _: &Request, _: INodeNo, handle: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.flush_device(handle, reply);
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        trace!("flush");
        self.flush_device(handle, reply);
    }

    /// Always refused. The loop driver turns discards and zeroing into hole punching, and a hole
    /// in the image reads as noise under dm-crypt; the kernel then writes real zeros instead. Not
    /// `ENOSYS`: the kernel would never ask again, and `trim` opens a window in which it may.
    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        trace!(offset, length, mode, "fallocate refused");
        reply.error(Errno::EOPNOTSUPP);
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (FILE, FileType::RegularFile, FILE_NAME),
        ];
        for (number, (node, kind, name)) in (1..).zip(entries) {
            if number > offset && reply.add(node, number, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = self.volume.device.size() / 4096;
        reply.statfs(blocks, 0, 0, 1, 0, 4096, 255, 4096);
    }
}
