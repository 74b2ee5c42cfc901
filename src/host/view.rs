//! Acting in a mount namespace without being of it.
//!
//! Whoever serves a filesystem must not be of the namespace that the filesystem is mounted in
//! (`docs/decisions/session-process.md`). So programs go in by nsenter(1), files inside are looked
//! at through `/proc/<pid>/root`, and nothing here keeps a descriptor of the namespace, which would
//! keep its mounts alive as a member does.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::mount::MountPropagationFlags;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use serde::{Deserialize, Serialize};

use super::mount_table::{self, Entry};
use crate::error::{Attempt, Error, Kind, Result};

/// The mount namespace that something is done in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum View {
    /// That of the calling thread.
    #[default]
    Own,
    /// That of the process with this number. It is root's to go there.
    Of(u32),
}

impl View {
    /// The mount that is seen at `at`, as [`mount_table::topmost`] tells it.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when the process is gone.
    pub fn topmost(self, at: &Path) -> Result<Option<Entry>> {
        match self {
            View::Own => mount_table::topmost(at),
            View::Of(pid) => mount_table::topmost_of(pid, at),
        }
    }

    /// The path by which this process reaches `path` inside. What resolves links by name
    /// (canonicalize(3)) ends up outside again.
    pub fn path(self, path: &Path) -> PathBuf {
        match (self, path.strip_prefix("/")) {
            (View::Of(pid), Ok(relative)) => root_of(pid).join(relative),
            _ => path.to_path_buf(),
        }
    }

    /// Does something inside that only a member may do. A short thing: while it lasts, the calling
    /// process is a member.
    pub fn visit<T: Send>(self, what: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let View::Of(pid) = self else { return what() };
        let inside = move || {
            let go = || -> Result<()> {
                let door = Door::of(pid)?;
                // A thread that shares its root directory with others may not change namespaces.
                unshare(UnshareFlags::FS)?;
                Ok(door.pass()?)
            };
            go().attempt(|| format!("enter the mount namespace of process {pid}"))?;
            what()
        };
        in_thread(inside)
    }
}

/// Does something in a mount namespace that is a copy of this one, private, and gone afterwards.
///
/// Not for a process that serves a filesystem: it would be a member of the copy.
///
/// # Errors
/// [`Kind::Denied`] for others than root.
pub fn in_private<T: Send>(what: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let inside = || {
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        unshare(UnshareFlags::NEWNS | UnshareFlags::FS)
            .and_then(|()| rustix::mount::mount_change("/", private))
            .attempt(|| "make a private mount namespace")?;
        what()
    };
    in_thread(inside)
}

fn in_thread<T: Send>(inside: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let visitor = std::thread::Builder::new().name("visitor".into());
        let visitor = visitor.spawn_scoped(scope, inside);
        let visitor = visitor.attempt(|| "start a thread")?;
        visitor
            .join()
            .unwrap_or_else(|_| Err(Error::new(Kind::Io, "the thread that went inside panicked")))
    })
}

fn unshare(what: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: only UnshareFlags::FILES is unsafe (descriptors of one thread unknown to another),
    // and no caller passes it.
    unsafe { rustix::thread::unshare_unsafe(what) }
}

fn root_of(pid: u32) -> PathBuf {
    format!("/proc/{pid}/root").into()
}

/// A way into a mount namespace. While it is open, the namespace lives.
#[derive(Debug)]
pub struct Door {
    namespace: OwnedFd,
    /// Not always that of the namespace: of somebody in a chroot.
    root: OwnedFd,
    directory: OwnedFd,
}

impl Door {
    /// To where this process is now.
    pub fn here() -> Result<Door> {
        let door = || -> std::io::Result<Door> {
            Ok(Door {
                namespace: File::open("/proc/self/ns/mnt")?.into(),
                root: place(Path::new("/"))?,
                directory: place(Path::new("."))?,
            })
        };
        door().attempt(|| "remember this mount namespace")
    }

    /// To the root directory of a process.
    fn of(pid: u32) -> std::io::Result<Door> {
        let root = root_of(pid);
        Ok(Door {
            namespace: File::open(format!("/proc/{pid}/ns/mnt"))?.into(),
            root: place(&root)?,
            directory: place(&root)?,
        })
    }

    /// Takes the calling thread through, into the same root and working directory. System calls and
    /// nothing else, so it may run between fork and exec.
    pub fn pass(&self) -> rustix::io::Result<()> {
        let mount = Some(LinkNameSpaceType::Mount);
        rustix::thread::move_into_link_name_space(self.namespace.as_fd(), mount)?;
        rustix::process::fchdir(&self.root)?;
        rustix::process::chroot(c".")?;
        rustix::process::fchdir(&self.directory)
    }
}

/// A descriptor of a directory, to stand on and no more.
fn place(path: &Path) -> std::io::Result<OwnedFd> {
    const O_PATH: i32 = rustix::fs::OFlags::PATH.bits() as i32;
    let mut options = OpenOptions::new();
    let opened = options.read(true).custom_flags(O_PATH).open(path);
    opened.map(OwnedFd::from)
}
