//! Deleting whole trees: interruptible, to any depth, through no link.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Attempt, Error, Kind, Result};

/// Directories open at once; what is deeper is moved to the top of its tree first.
const DEPTH_MAX: usize = 64;

/// Deletes trees and counts what it has deleted.
pub(super) struct Remover<'a> {
    /// Looked at before every name.
    pub stop: &'a AtomicBool,
    /// Told after every name, with the count so far.
    pub tell: &'a dyn Fn(u64),
    pub removed: u64,
}

impl Remover<'_> {
    /// Deletes the directory `name` in `parent` with everything below it.
    ///
    /// # Errors
    /// [`Kind::Interrupted`] when told to stop: what is left is a smaller tree.
    pub fn remove(&mut self, parent: BorrowedFd<'_>, name: &str) -> Result<()> {
        let c_name = CString::new(name).map_err(|_| Error::new(Kind::Usage, "a NUL in a name"))?;
        let top = open(parent, &c_name).attempt(|| format!("open {name}"))?;
        let mut deep = Deep { top, next: 0 };
        // What was moved to the top is found there by the next round.
        loop {
            let before = deep.next;
            let here = deep.top.try_clone().attempt(|| "share a directory")?;
            self.empty(here, 1, &mut deep)
                .attempt(|| format!("delete {name}"))?;
            if deep.next == before {
                break;
            }
        }
        let removed = rustix::fs::unlinkat(parent, &c_name, AtFlags::REMOVEDIR);
        removed.attempt(|| format!("remove the directory {name}"))
    }

    fn empty(&mut self, directory: OwnedFd, depth: usize, deep: &mut Deep) -> Result<()> {
        for (name, kind) in names(directory.as_fd())? {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Interrupted, "interrupted by a signal"));
            }
            let is_directory = kind == FileType::Directory
                || match rustix::fs::unlinkat(&directory, &name, AtFlags::empty()) {
                    Ok(()) => false,
                    Err(Errno::ISDIR) => true,
                    Err(errno) => return Err(errno).attempt(|| format!("delete {name:?}")),
                };
            if is_directory && depth == DEPTH_MAX {
                deep.lift(directory.as_fd(), &name)?;
                continue;
            }
            if is_directory {
                let inner = open(directory.as_fd(), &name);
                self.empty(inner.attempt(|| format!("open {name:?}"))?, depth + 1, deep)?;
                let removed = rustix::fs::unlinkat(&directory, &name, AtFlags::REMOVEDIR);
                removed.attempt(|| format!("remove the directory {name:?}"))?;
            }
            self.removed += 1;
            (self.tell)(self.removed);
        }
        Ok(())
    }
}

/// Where directories go that are too deep to be emptied where they are.
struct Deep {
    top: OwnedFd,
    next: u64,
}

impl Deep {
    fn lift(&mut self, from: BorrowedFd<'_>, name: &CString) -> Result<()> {
        loop {
            let to = format!(".deep-{}", self.next);
            self.next += 1;
            match rustix::fs::renameat(from, name, &self.top, &*to) {
                Ok(()) => return Ok(()),
                // The snapshot has such a name of its own.
                Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
                Err(errno) => return Err(errno).attempt(|| format!("move {name:?} up")),
            }
        }
    }
}

fn names(directory: BorrowedFd<'_>) -> Result<Vec<(CString, FileType)>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory).attempt(|| "list a directory")? {
        let entry = entry.attempt(|| "list a directory")?;
        if ![c".", c".."].contains(&entry.file_name()) {
            names.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    Ok(names)
}

fn open(parent: BorrowedFd<'_>, name: &CString) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if !rustix::process::geteuid().is_root() {
        // Its owner may have forbidden himself to change it.
        rustix::fs::chmodat(parent, name, Mode::RWXU, AtFlags::empty())?;
    }
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::path::Path;

    fn remove(base: &Path, name: &str, stop: &AtomicBool) -> Result<u64> {
        let parent = OwnedFd::from(File::open(base).expect("opens"));
        let mut remover = Remover {
            stop,
            tell: &|_| {},
            removed: 0,
        };
        remover.remove(parent.as_fd(), name)?;
        Ok(remover.removed)
    }

    #[test]
    fn a_tree_of_any_depth_goes_and_what_links_point_to_stays() {
        let base = tempfile::tempdir().expect("a directory");
        let outside = base.path().join("outside");
        fs::create_dir(&outside).expect("made");
        fs::write(outside.join("file"), "kept").expect("written");
        let tree = base.path().join("tree");
        fs::create_dir(&tree).expect("made");
        std::os::unix::fs::symlink(&outside, tree.join("link")).expect("linked");
        fs::write(tree.join(".deep-0"), "in the way").expect("written");
        let mut at = OwnedFd::from(File::open(&tree).expect("opens"));
        let name = "d".repeat(200);
        for _ in 0..300 {
            rustix::fs::mkdirat(&at, &*name, Mode::RWXU).expect("made");
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let next = rustix::fs::openat(&at, &*name, flags, Mode::empty());
            at = next.expect("opens");
        }
        let removed = remove(base.path(), "tree", &AtomicBool::new(false)).expect("removed");
        assert_eq!(removed, 302, "each name once");
        assert!(!tree.exists());
        assert_eq!(
            fs::read_to_string(outside.join("file")).expect("there"),
            "kept"
        );
    }

    #[test]
    fn told_to_stop_it_stops_and_is_taken_up_again() {
        let base = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(base.path().join("tree/a/b")).expect("made");
        let error = remove(base.path(), "tree", &AtomicBool::new(true)).unwrap_err();
        assert_eq!(error.kind(), Kind::Interrupted);
        assert!(base.path().join("tree").exists());
        remove(base.path(), "tree", &AtomicBool::new(false)).expect("removed");
        assert!(!base.path().join("tree").exists());
    }
}
