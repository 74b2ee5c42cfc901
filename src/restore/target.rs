//! Where a restore writes to: a cursor that stands in a directory at or below DEST.
//!
//! DEST itself is the user's word and may lead through symbolic links. From there on nothing is
//! followed: directories are entered one by one beneath DEST, new things are made under a temporary
//! name that nobody else has, and only what is whole takes its final name, by one rename.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::Overwrite;
use super::descent::{Descent, Identity, check_name, identity, open_at, show};
use super::hard_links::First;
use super::source::{FileKind, Metadata};
use crate::error::{Attempt, Error, Kind, Result};

/// What is being restored is called this plus eight random letters until it is whole.
pub const TEMPORARY_PREFIX: &str = ".e2ebak-restore-";

/// One in 16^8 names is taken; so often in a row, somebody is taking them.
const TEMPORARY_ATTEMPTS: usize = 16;

const RULES: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// What happened to a whole file on its way to its final name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    Yes,
    /// Something has that name already and stays.
    Existing,
}

/// What was made and is to be synced.
pub(super) enum Owed {
    File(File),
    /// Something that no descriptor can sync.
    Other,
}

/// What is not on stable storage yet.
enum Unsynced {
    /// So few files and directories that each is synced by itself.
    Few(Vec<OwnedFd>),
    /// All of the filesystem has to be, with whatever others write there.
    Many,
}

/// More than this is synced with the whole filesystem.
const FEW: usize = 16;

pub(super) struct Target {
    way: Descent,
    overwrite: Overwrite,
    unsynced: Unsynced,
}

impl Target {
    /// `directory` exists, and everything will be made below it.
    pub fn open(directory: &Path, overwrite: Overwrite) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(directory, flags, Mode::empty())
            .attempt(|| format!("open the directory {directory:?}"))?;
        Ok(Target {
            way: Descent::new(root, RULES),
            overwrite,
            unsynced: Unsynced::Few(Vec::new()),
        })
    }

    /// Enters the directory `name`, which is made if it is not there: for nobody but its maker,
    /// until [`super::apply`] knows better.
    pub fn enter(&mut self, name: &[u8]) -> Result<()> {
        check_name(name)?;
        match rustix::fs::mkdirat(self.way.here(), name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) if self.kind_of(name)? != Some(FileType::Directory) => {
                return Err(in_the_way(name, "is in the way of a directory"));
            }
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno).attempt(|| format!("make {}", show(name))),
        }
        self.way.enter(name)
    }

    /// Goes back up. A filesystem that was mounted on the directory is synced, for
    /// [`Target::sync`] reaches only DEST's own.
    pub fn leave(&mut self) -> Result<()> {
        let left = self.way.here().try_clone_to_owned();
        self.owes(left.map_or(Owed::Other, |fd| Owed::File(fd.into())));
        match self.way.leave()? {
            Some(fd) => sync(fd.as_fd()),
            None => Ok(()),
        }
    }

    pub fn here(&self) -> BorrowedFd<'_> {
        self.way.here()
    }

    pub fn root_identity(&self) -> Result<Identity> {
        identity(self.way.root())
    }

    /// Notes what [`Target::sync`] has to sync; the directories that are left it knows.
    pub fn owes(&mut self, owed: Owed) {
        match (&mut self.unsynced, owed) {
            (Unsynced::Few(few), Owed::File(file)) if few.len() < FEW => few.push(file.into()),
            _ => self.unsynced = Unsynced::Many,
        }
    }

    /// Puts what was made on stable storage.
    pub fn sync(&self) -> Result<()> {
        let Unsynced::Few(few) = &self.unsynced else {
            return sync(self.way.root());
        };
        for fd in few.iter().map(AsFd::as_fd).chain([self.way.root()]) {
            match rustix::fs::fsync(fd) {
                Ok(()) => {}
                // There are filesystems that sync no directories.
                Err(Errno::INVAL) => return sync(self.way.root()),
                Err(errno) => return Err(errno).attempt(|| "sync what was restored"),
            }
        }
        Ok(())
    }

    /// Whether something that must stay has the name. A directory never gives way to a file.
    pub fn is_taken(&self, name: &[u8]) -> Result<bool> {
        check_name(name)?;
        match self.kind_of(name)? {
            None => Ok(false),
            Some(FileType::Directory) => Err(in_the_way(name, "is a directory in the way")),
            Some(_) => Ok(self.overwrite == Overwrite::Never),
        }
    }

    /// Whether what has the name is what a file with this metadata would become. `target` is where
    /// a symbolic link leads.
    pub fn is_same(&self, name: &[u8], metadata: &Metadata, target: Option<&[u8]>) -> Result<bool> {
        check_name(name)?;
        let attempt = || format!("examine {}", show(name));
        let here = self.way.here();
        let stat = match rustix::fs::statat(here, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(false),
            Err(errno) => return Err(errno).attempt(attempt),
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        let device = || {
            let (major, minor) = metadata.device;
            stat.st_rdev == rustix::fs::makedev(major, minor)
        };
        Ok(match metadata.kind {
            FileKind::Regular => {
                kind == FileType::RegularFile
                    && u64::try_from(stat.st_size) == Ok(metadata.size)
                    && stat.st_mtime == metadata.modified.seconds
                    && stat.st_mtime_nsec as i64 == i64::from(metadata.modified.nanoseconds)
            }
            FileKind::Symlink => {
                kind == FileType::Symlink
                    && rustix::fs::readlinkat(here, name, Vec::new())
                        .is_ok_and(|found| Some(found.to_bytes()) == target)
            }
            FileKind::CharDevice => kind == FileType::CharacterDevice && device(),
            FileKind::BlockDevice => kind == FileType::BlockDevice && device(),
            FileKind::Fifo => kind == FileType::Fifo,
            FileKind::Socket => kind == FileType::Socket,
            FileKind::Directory => false,
        })
    }

    /// Which inode has the name.
    pub fn inode_of(&self, name: &[u8]) -> Result<u64> {
        check_name(name)?;
        let stat = rustix::fs::statat(self.way.here(), name, AtFlags::SYMLINK_NOFOLLOW)
            .attempt(|| format!("examine {}", show(name)))?;
        Ok(stat.st_ino)
    }

    fn kind_of(&self, name: &[u8]) -> Result<Option<FileType>> {
        match rustix::fs::statat(self.way.here(), name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno).attempt(|| format!("examine {}", show(name))),
        }
    }

    /// A new empty file, open for writing by its maker only.
    pub fn new_file(&self) -> Result<(Temporary<'_>, File)> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let (temporary, file) = self
            .temporary(|here, name| rustix::fs::openat(here, name, flags, mode).map(File::from))?;
        Ok((temporary, file))
    }

    pub fn new_symlink(&self, target: &[u8]) -> Result<(Temporary<'_>, OwnedFd)> {
        let (temporary, ()) =
            self.temporary(|here, name| rustix::fs::symlinkat(target, here, name))?;
        let fd = self.pin(&temporary, FileType::Symlink)?;
        Ok((temporary, fd))
    }

    /// A device file, fifo or socket.
    pub fn new_node(&self, metadata: &Metadata) -> Result<(Temporary<'_>, OwnedFd)> {
        let kind = match metadata.kind {
            FileKind::CharDevice => FileType::CharacterDevice,
            FileKind::BlockDevice => FileType::BlockDevice,
            FileKind::Fifo => FileType::Fifo,
            FileKind::Socket => FileType::Socket,
            FileKind::Regular | FileKind::Directory | FileKind::Symlink => {
                return Err(Error::new(Kind::Usage, "make a node of another kind"));
            }
        };
        let (major, minor) = metadata.device;
        let device = rustix::fs::makedev(major, minor);
        let mode = Mode::RUSR | Mode::WUSR;
        let (temporary, ()) =
            self.temporary(|here, name| rustix::fs::mknodat(here, name, kind, mode, device))?;
        let fd = self.pin(&temporary, kind)?;
        Ok((temporary, fd))
    }

    /// Gives a finished file its name.
    pub fn place(&self, mut temporary: Temporary<'_>, name: &[u8]) -> Result<Placed> {
        check_name(name)?;
        let here = self.way.here();
        let attempt = || format!("rename {} to {}", temporary.name, show(name));
        let result = match self.overwrite {
            Overwrite::Always | Overwrite::IfChanged => {
                rustix::fs::renameat(here, &temporary.name, here, name)
            }
            Overwrite::Never => {
                let only_new = RenameFlags::NOREPLACE;
                match rustix::fs::renameat_with(here, &temporary.name, here, name, only_new) {
                    // NFS, for one, has no such rename, but hard links, which replace nothing.
                    Err(Errno::INVAL | Errno::NOSYS) => {
                        let linked = self.link_here(&temporary.name, name);
                        return linked.attempt(attempt);
                    }
                    result => result,
                }
            }
        };
        match result {
            Ok(()) => {
                temporary.is_placed = true;
                Ok(Placed::Yes)
            }
            Err(Errno::EXIST) if self.overwrite == Overwrite::Never => Ok(Placed::Existing),
            Err(Errno::ISDIR | Errno::EXIST | Errno::NOTEMPTY) => {
                Err(in_the_way(name, "is a directory in the way"))
            }
            Err(errno) => Err(errno).attempt(attempt),
        }
    }

    fn link_here(&self, from: &str, name: &[u8]) -> rustix::io::Result<Placed> {
        let here = self.way.here();
        match rustix::fs::linkat(here, from, here, name, AtFlags::empty()) {
            Ok(()) => Ok(Placed::Yes),
            Err(Errno::EXIST) => Ok(Placed::Existing),
            Err(errno) => Err(errno),
        }
    }

    /// Makes `name` one more name of the file that this restore has put at `first`, if it still is
    /// what was made there.
    pub fn link(&mut self, first: &First<'_>, name: &[u8]) -> Result<Placed> {
        self.owes(Owed::Other);
        let there = self.way.open(first.way.iter().copied())?;
        let (made, first) = (first.made, first.name);
        let found = rustix::fs::statat(&there, first, AtFlags::SYMLINK_NOFOLLOW);
        if !found.is_ok_and(|found| found.st_ino == made) {
            let attempt = format!("{} was replaced meanwhile", show(first));
            return Err(Error::new(Kind::Io, attempt));
        }
        match self.overwrite {
            Overwrite::Never => {
                check_name(name)?;
                match rustix::fs::linkat(&there, first, self.way.here(), name, AtFlags::empty()) {
                    Ok(()) => Ok(Placed::Yes),
                    Err(Errno::EXIST) => Ok(Placed::Existing),
                    Err(errno) => {
                        Err(errno).attempt(|| format!("link {} to {}", show(name), show(first)))
                    }
                }
            }
            Overwrite::Always | Overwrite::IfChanged => {
                let (temporary, ()) = self.temporary(|here, temporary| {
                    rustix::fs::linkat(&there, first, here, temporary, AtFlags::empty())
                })?;
                let (here, spare) = (temporary.here, temporary.name.clone());
                let placed = self.place(temporary, name)?;
                // A rename between two names of one file does nothing (rename(2)).
                let _ = rustix::fs::unlinkat(here, &spare, AtFlags::empty());
                Ok(placed)
            }
        }
    }

    fn temporary<T>(
        &self,
        make: impl Fn(BorrowedFd<'_>, &str) -> rustix::io::Result<T>,
    ) -> Result<(Temporary<'_>, T)> {
        let here = self.way.here();
        let mut attempts = 1;
        loop {
            let mut random = [0; 4];
            getrandom::fill(&mut random).map_err(|error| {
                Error::new(Kind::Io, "draw a random name").because(error.to_string())
            })?;
            let name = format!("{TEMPORARY_PREFIX}{:08x}", u32::from_le_bytes(random));
            match make(here, &name) {
                Ok(made) => {
                    let is_placed = false;
                    let temporary = Temporary {
                        here,
                        name,
                        is_placed,
                    };
                    return Ok((temporary, made));
                }
                Err(Errno::EXIST) if attempts < TEMPORARY_ATTEMPTS => attempts += 1,
                Err(errno) => return Err(errno).attempt(|| format!("make {name}")),
            }
        }
    }

    /// Holds on to what was just made. Whoever may write to the directory could have put
    /// something else in its place, which must not be given an owner and rights.
    fn pin(&self, temporary: &Temporary<'_>, kind: FileType) -> Result<OwnedFd> {
        let attempt = || format!("open {}", temporary.name);
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let fd = open_at(temporary.here, temporary.name.as_bytes(), flags, {
            // NO_SYMLINKS would refuse to pin a symbolic link; NOFOLLOW does not follow it.
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS
        })
        .attempt(attempt)?;
        let stat = rustix::fs::fstat(&fd).attempt(attempt)?;
        if FileType::from_raw_mode(stat.st_mode) != kind || stat.st_nlink != 1 {
            let attempt = format!("{} was replaced meanwhile", temporary.name);
            return Err(Error::new(Kind::Io, attempt));
        }
        Ok(fd)
    }
}

/// A name that goes when it was not given up for a final one.
pub(super) struct Temporary<'target> {
    here: BorrowedFd<'target>,
    name: String,
    is_placed: bool,
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if self.is_placed {
            return;
        }
        match rustix::fs::unlinkat(self.here, &self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => tracing::warn!(name = self.name, %errno, "a temporary file stays"),
        }
    }
}

fn in_the_way(name: &[u8], what: &str) -> Error {
    Error::new(Kind::Exists, format!("{} {what}", show(name)))
        .hint("restore to another directory, or move it away first")
}

fn sync(directory: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::syncfs(directory).attempt(|| "sync the filesystem that was restored to")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_files_are_synced_by_themselves() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut target = Target::open(dir.path(), Overwrite::Never).expect("opens");
        let is_few = |target: &Target| matches!(target.unsynced, Unsynced::Few(_));
        let file = || Owed::File(tempfile::tempfile().expect("a file"));
        target.enter(b"new").expect("made");
        target.leave().expect("left");
        for _ in 1..FEW {
            target.owes(file());
        }
        assert!(is_few(&target));
        target.sync().expect("synced");
        target.owes(file());
        assert!(!is_few(&target));
        target.owes(file());
        assert!(!is_few(&target), "once too many, always too many");
        target.sync().expect("synced");
        let mut target = Target::open(dir.path(), Overwrite::Never).expect("opens");
        target.owes(Owed::Other);
        assert!(!is_few(&target));
    }

    #[test]
    fn no_link_is_entered_wherever_it_leads() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("beside")).expect("mkdir");
        let mut target = Target::open(dir.path(), Overwrite::Always).expect("opens");
        for to in ["beside", "./beside", ".", "..", "/"] {
            rustix::fs::symlinkat(to, target.here(), "link").expect("symlink");
            // The second is what happens when the link comes after it was looked at.
            assert_eq!(target.enter(b"link").unwrap_err().kind(), Kind::Exists);
            target.way.enter(b"link").unwrap_err();
            rustix::fs::unlinkat(target.here(), "link", AtFlags::empty()).expect("unlink");
        }
        target.enter(b"beside").expect("enters");
        target.leave().expect("leaves");
    }
}
