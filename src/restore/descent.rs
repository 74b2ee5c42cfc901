//! The way from one open directory down to the directory where the copier stands.
//!
//! Every step is one name, opened with `openat2(2)` under the rules of its side: beneath the root,
//! through no symbolic link on the side that is written. Only the deepest directories stay open, so
//! that depth costs names, not file descriptors; one that was closed is opened again from the root
//! when the way back leads there, and must then be the same directory.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Attempt, Error, Kind, Result};

/// Directories kept open on one side; a tree deeper than this is walked back from the root.
const OPEN_MAX: usize = 32;

/// The longest path that the kernel takes in one call, with its terminating zero
/// (`PATH_MAX` in `linux/limits.h`).
const PATH_MAX: usize = 4096;

/// The longest name in a directory (`NAME_MAX` in `linux/limits.h`).
const NAME_MAX: usize = 255;

/// `openat2` gives up with `EAGAIN` when something is renamed while it resolves `..`; more often
/// than this it is not a coincidence.
const RESOLVE_ATTEMPTS: usize = 16;

/// Device and inode number: which directory it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub device: u64,
    pub inode: u64,
}

pub(super) struct Descent {
    root: OwnedFd,
    rules: ResolveFlags,
    steps: Vec<Step>,
    /// The deepest directories of `steps`, the deepest last. Empty only at the root.
    open: VecDeque<OwnedFd>,
}

struct Step {
    name: Box<[u8]>,
    identity: Identity,
}

impl Descent {
    pub fn new(root: OwnedFd, rules: ResolveFlags) -> Self {
        Descent {
            root,
            rules,
            steps: Vec::new(),
            open: VecDeque::new(),
        }
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    pub fn here(&self) -> BorrowedFd<'_> {
        self.open.back().map_or(self.root.as_fd(), AsFd::as_fd)
    }

    pub fn enter(&mut self, name: &[u8]) -> Result<()> {
        check_name(name)?;
        let fd = open_directory(self.here(), name, self.rules)
            .attempt(|| format!("open the directory {}", show(name)))?;
        self.steps.push(Step {
            name: name.into(),
            identity: identity(fd.as_fd())?,
        });
        self.open.push_back(fd);
        if self.open.len() > OPEN_MAX {
            self.open.pop_front();
        }
        Ok(())
    }

    /// Goes back up, and says whether the directory that was left is on another filesystem than
    /// the one above it; its descriptor comes along.
    pub fn leave(&mut self) -> Result<Option<OwnedFd>> {
        let (Some(left), Some(fd)) = (self.steps.pop(), self.open.pop_back()) else {
            return Err(Error::new(Kind::Usage, "leave the topmost directory"));
        };
        if let (true, Some(step)) = (self.open.is_empty(), self.steps.last()) {
            let above = self.open(self.steps.iter().map(|step| &*step.name))?;
            if identity(above.as_fd())? != step.identity {
                let attempt = format!("directory {} was replaced meanwhile", show(&step.name));
                return Err(Error::new(Kind::Io, attempt));
            }
            self.open.push_back(above);
        }
        let crossed = identity(self.here())?.device != left.identity.device;
        Ok(crossed.then_some(fd))
    }

    /// Opens a directory by its names from the root, however long they are together.
    pub fn open<'n>(&self, names: impl Iterator<Item = &'n [u8]>) -> Result<OwnedFd> {
        let mut from: Option<OwnedFd> = None;
        let mut path: Vec<u8> = b".".to_vec();
        let step = |from: &Option<OwnedFd>, path: &[u8]| {
            let from = from.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
            open_directory(from, path, self.rules)
                .attempt(|| format!("open the directory {} again", show(path)))
        };
        for name in names {
            check_name(name)?;
            if path.len() + 1 + name.len() >= PATH_MAX {
                from = Some(step(&from, &path)?);
                path = b".".to_vec();
            }
            path.push(b'/');
            path.extend_from_slice(name);
        }
        step(&from, &path)
    }
}

/// A name that stands for exactly one entry of the directory it is looked up in.
pub(super) fn check_name(name: &[u8]) -> Result<()> {
    let wrong = match name {
        b"" => "is empty",
        b"." | b".." => "stands for a directory of its own",
        _ if name.contains(&b'/') => "contains a slash",
        _ if name.contains(&0) => "contains a zero byte",
        _ if name.len() > NAME_MAX => "is longer than 255 bytes",
        _ => return Ok(()),
    };
    Err(Error::new(
        Kind::Corrupt,
        format!("the name {} {wrong}", show(name)),
    ))
}

/// `openat2`, once more while something else moves.
pub(super) fn open_at(
    from: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
    rules: ResolveFlags,
) -> Result<OwnedFd> {
    let mut attempts = 1;
    loop {
        match rustix::fs::openat2(from, path, flags | OFlags::CLOEXEC, Mode::empty(), rules) {
            Err(Errno::AGAIN) if attempts < RESOLVE_ATTEMPTS => attempts += 1,
            Err(Errno::NOSYS) => {
                let attempt = "this kernel has no openat2(2), which keeps a restore inside DEST";
                return Err(
                    Error::new(Kind::Unsupported, attempt).hint("Linux 5.6 or newer is needed")
                );
            }
            result => return Ok(result?),
        }
    }
}

pub(super) fn open_directory(
    from: BorrowedFd<'_>,
    path: &[u8],
    rules: ResolveFlags,
) -> Result<OwnedFd> {
    open_at(from, path, OFlags::RDONLY | OFlags::DIRECTORY, rules)
}

pub(super) fn identity(fd: BorrowedFd<'_>) -> Result<Identity> {
    let stat = rustix::fs::fstat(fd).attempt(|| "examine an open directory")?;
    Ok(Identity {
        device: stat.st_dev,
        inode: stat.st_ino,
    })
}

/// A name or path as it may be shown: quoted, with control characters and bytes that are not
/// UTF-8 escaped, because an image may hold names made to mislead a terminal.
pub(super) fn show(name: &[u8]) -> String {
    use std::os::unix::ffi::OsStrExt;
    format!("{:?}", std::ffi::OsStr::from_bytes(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beneath(path: &std::path::Path) -> Descent {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty()).expect("opens");
        let rules = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        Descent::new(root, rules)
    }

    #[test]
    fn only_plain_names_are_names() {
        let long = [b'x'; 256];
        for name in [
            b"".as_slice(),
            b".",
            b"..",
            b"a/b",
            b"/",
            b"a\0b",
            b"../x",
            &long,
        ] {
            assert_eq!(check_name(name).unwrap_err().kind(), Kind::Corrupt);
        }
        for name in [b"...".as_slice(), b"a\nb", b"\xff\xfe", b" ", &long[1..]] {
            check_name(name).expect("is a name");
        }
    }

    #[test]
    fn a_way_deeper_than_the_open_directories_leads_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut way = beneath(dir.path());
        let top = identity(way.here()).expect("stat");
        let name = [b'n'; 200];
        let mut seen = Vec::new();
        for _ in 0..OPEN_MAX * 3 {
            rustix::fs::mkdirat(way.here(), &name[..], Mode::RWXU).expect("mkdir");
            way.enter(&name).expect("enter");
            assert!(way.open.len() <= OPEN_MAX);
            seen.push(identity(way.here()).expect("stat"));
        }
        while let Some(expected) = seen.pop() {
            assert_eq!(identity(way.here()).expect("stat"), expected);
            assert!(way.leave().expect("leave").is_none(), "one filesystem");
        }
        assert_eq!(identity(way.here()).expect("stat"), top);
        assert_eq!(way.leave().unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn a_directory_that_was_replaced_is_noticed_on_the_way_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut way = beneath(dir.path());
        for _ in 0..=OPEN_MAX {
            rustix::fs::mkdirat(way.here(), "d", Mode::RWXU).expect("mkdir");
            way.enter(b"d").expect("enter");
        }
        let first = dir.path().join("d");
        std::fs::rename(&first, dir.path().join("kept")).expect("rename");
        std::fs::create_dir(&first).expect("mkdir");
        while way.steps.len() > 1 {
            if let Err(error) = way.leave() {
                assert!(error.to_string().contains("replaced"), "{error}");
                return;
            }
        }
        panic!("the other directory was taken for the one that was left");
    }
}
