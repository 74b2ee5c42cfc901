//! A directory of our own for the socket of a master connection: mode 0700, short enough a path for
//! a socket, removed with its owner.
//!
//! Its owner holds a lock on it (`flock(2)`), which ends with the process however that dies. What
//! was left behind by a process that was killed is therefore known by being unlocked, and the next
//! one sweeps it away.

use std::fs::{self, DirBuilder, DirEntry, File};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use tracing::debug;
use uuid::Uuid;

use crate::error::{Attempt, Error, Kind, Result};
use crate::host::runtime_directory;

/// In `/tmp` the name must be nobody else's.
const PREFIX: &str = "e2ebak-link-";
const SOCKET: &str = "s";

/// A socket's path has at most 107 bytes (`unix(7)`), and ssh first binds it under a name that is
/// 17 bytes longer.
const PATH_MAX: usize = 90;

/// How often a new directory may be swept away between its making and its locking.
const TRIES: usize = 5;

pub struct SocketDir {
    path: PathBuf,
    _lock: File,
}

impl SocketDir {
    /// Makes one in the runtime directory, or in `/tmp` where that has too long a path.
    pub fn new() -> Result<Self> {
        let short = |base: &PathBuf| base.as_os_str().len() + PREFIX.len() + 11 <= PATH_MAX;
        let base = match runtime_directory() {
            Ok(base) if short(&base) => base,
            _ => PathBuf::from("/tmp"),
        };
        SocketDir::new_in(&base)
    }

    pub fn new_in(base: &Path) -> Result<Self> {
        sweep(base);
        for _ in 0..TRIES {
            let random = Uuid::new_v4().simple().to_string();
            let path = base.join(format!("{PREFIX}{}", &random[..8]));
            let made = DirBuilder::new().mode(0o700).create(&path);
            made.attempt(|| format!("create {}", path.display()))?;
            if let Some(lock) = lock(&path) {
                return Ok(SocketDir { path, _lock: lock });
            }
        }
        Err(Error::new(
            Kind::Io,
            format!("directories in {} disappear", base.display()),
        ))
    }

    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Nothing but the socket is ever in one of ours; with anything else in it, it stays.
fn remove(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if is_socket(&entry) {
            let _ = fs::remove_file(entry.path()); // then the directory stays, too
        }
    }
    if let Err(error) = fs::remove_dir(path) {
        debug!(%error, path = %path.display(), "cannot remove the directory of a master");
    }
}

/// Under its name, or the one that ssh first binds it under.
fn is_socket(entry: &DirEntry) -> bool {
    let name = entry.file_name();
    let rest = name.as_encoded_bytes().strip_prefix(SOCKET.as_bytes());
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"."))
        && entry.file_type().is_ok_and(|kind| kind.is_socket())
}

/// Locks a directory that is still at its path.
fn lock(path: &Path) -> Option<File> {
    let file = File::open(path).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    let (held, there) = (file.metadata().ok()?, fs::symlink_metadata(path).ok()?);
    (held.ino() == there.ino() && held.dev() == there.dev()).then_some(file)
}

/// Removes what killed processes have left.
fn sweep(base: &Path) {
    let user = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX)
            && entry
                .metadata() // of the entry itself: a link is not followed
                .is_ok_and(|about| about.is_dir() && about.uid() == user);
        if ours && let Some(_lock) = lock(&entry.path()) {
            remove(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn bind(path: PathBuf) {
        UnixListener::bind(path).expect("bound");
    }

    /// Beside the user's own files, as in `/tmp`.
    #[test]
    fn what_somebody_else_put_there_stays() {
        let base = tempfile::tempdir().expect("a directory");
        let (like_ours, alike) = (format!("{PREFIX}cafe"), "link-cafe".to_string());
        let kept = [
            format!("{like_ours}/letter"),
            format!("{like_ours}/s.txt"),
            format!("{alike}/letter"),
        ];
        for directory in [&like_ours, &alike] {
            fs::create_dir(base.path().join(directory)).expect("made");
        }
        for file in &kept {
            fs::write(base.path().join(file), "mine").expect("written");
        }
        bind(base.path().join(&alike).join(SOCKET));
        drop(SocketDir::new_in(base.path()).expect("made"));
        for file in &kept {
            assert!(base.path().join(file).exists(), "{file}");
        }
        assert!(base.path().join(&alike).join(SOCKET).exists());
    }

    #[test]
    fn what_nobody_holds_is_swept_and_what_is_held_stays() {
        let base = tempfile::tempdir().expect("a directory");
        let held = SocketDir::new_in(base.path()).expect("made");
        bind(held.socket());
        let left = base.path().join(format!("{PREFIX}deadbeef"));
        fs::create_dir(&left).expect("made");
        bind(left.join(SOCKET));
        bind(left.join("s.Xp2wQ8rT1nB4vK6z"));
        let other = base.path().join("4711");
        fs::create_dir(&other).expect("made");

        let second = SocketDir::new_in(base.path()).expect("made");
        assert!(!left.exists() && held.socket().exists() && other.exists());
        let about = fs::metadata(&second.path).expect("there");
        assert_eq!(about.mode() & 0o777, 0o700);
        drop((held, second));
        let names = fs::read_dir(base.path()).expect("read").flatten();
        let names: Vec<_> = names.map(|entry| entry.file_name()).collect();
        assert_eq!(names, ["4711"]);
    }
}
