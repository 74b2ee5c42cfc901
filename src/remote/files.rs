//! What can be done to files of an SFTP server.
//!
//! Version 3 has few words for failures: "exists already", "no space left" and "is a directory"
//! all arrive as FAILURE. So after one, the server is asked what the matter is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use tracing::{debug, warn};

use super::engine::Engine;
use super::{transfer, verdict};
use crate::error::{Error, Kind, Result};
use crate::sftp::{Attributes, Extended, Extension, OpenFlags, Reply, Request, StatVfs};
use crate::units::MIB;

/// Only the owner may read and write: the image is encrypted, but its header says how to guess.
const MODE: u32 = 0o600;

/// A failure on a filesystem with less room than this counts as "no space left": allocation needs
/// metadata, and runs out a little before the end.
const NEARLY_FULL: u64 = MIB;

/// A FAILURE to make a file that then is not there either: it may have been removed meanwhile. So
/// making it is tried again so many times, before the failure is taken for another one.
const EXISTS_TRIES: u32 = 4;

/// What can be done to files of the server.
pub struct Files {
    pub engine: Arc<Engine>,
    warned_of_fsync: AtomicBool,
}

impl Files {
    pub fn new(engine: Arc<Engine>) -> Self {
        Files {
            engine,
            warned_of_fsync: AtomicBool::new(false),
        }
    }

    pub fn has(&self, extension: Extension) -> bool {
        self.engine.extensions().has(extension)
    }

    /// A request that is answered by a status.
    pub fn demand(&self, request: &Request<'_>) -> Result<()> {
        verdict::done(&self.engine.call(request)?)
    }

    pub fn open(self: &Arc<Self>, path: &str, flags: OpenFlags) -> Result<OpenHandle> {
        // Else the server's umask alone would decide who may read it.
        let attributes = match flags.contains(OpenFlags::CREATE) {
            true => Attributes::with_permissions(MODE),
            false => Attributes::default(),
        };
        let request = Request::Open {
            path: path.as_bytes(),
            flags,
            attributes,
        };
        let handle = verdict::handle(self.engine.call(&request)?)?;
        Ok(OpenHandle {
            files: self.clone(),
            handle,
        })
    }

    /// Creates a file that must not exist, and says so if it does.
    pub fn create(self: &Arc<Self>, path: &str) -> Result<OpenHandle> {
        let flags = OpenFlags::READ | OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::EXCLUSIVE;
        let mut tries = 1..=EXISTS_TRIES;
        loop {
            let error = match self.open(path, flags) {
                Ok(handle) => return Ok(handle),
                Err(error) => error,
            };
            return Err(match error.kind() {
                Kind::Io if self.exists(path) => {
                    Error::new(Kind::Exists, "there is something already").because(error)
                }
                Kind::Io if tries.next().is_some() => continue,
                Kind::Io => self.look_for_room(path, error),
                Kind::NotFound => {
                    Error::new(Kind::NotFound, "there is no such directory").because(error)
                }
                _ => error,
            });
        }
    }

    /// Links a file under a name that must not exist, and says so if it does. `false`: it cannot
    /// be linked, as on a filesystem without hard links.
    pub fn link_new(&self, from: &str, to: &str) -> Result<bool> {
        let request = Request::Extended(Extended::Hardlink {
            from: from.as_bytes(),
            to: to.as_bytes(),
        });
        for _ in 0..=EXISTS_TRIES {
            match self.demand(&request) {
                Ok(()) => return Ok(true),
                Err(error) if error.kind().may_be_retried() => return Err(error),
                Err(error) if self.exists(to) => {
                    let exists = Error::new(Kind::Exists, "there is something already");
                    return Err(exists.because(error));
                }
                Err(error) if error.kind() != Kind::Io => return Ok(false),
                Err(_) => {}
            }
        }
        Ok(false)
    }

    pub fn write_new(self: &Arc<Self>, path: &str, content: &[u8]) -> Result<()> {
        let handle = self.create(path)?;
        let written = transfer::write_all_at(&self.engine, handle.bytes(), content, 0)
            .and_then(|()| handle.sync());
        match written {
            Ok(()) => handle.close(),
            Err(error) => {
                let error = self.look_for_room(path, error);
                drop(handle);
                let _ = self.remove(path); // we made it a moment ago; the failure is told
                Err(error)
            }
        }
    }

    /// Replaces the content where a file cannot be renamed over another: plain RENAME refuses,
    /// and removing the old one first would leave no file for a moment. Content of the same
    /// length is replaced by one write.
    pub fn overwrite(self: &Arc<Self>, path: &str, content: &[u8]) -> Result<()> {
        let handle = self.open(path, OpenFlags::WRITE | OpenFlags::CREATE)?;
        transfer::write_all_at(&self.engine, handle.bytes(), content, 0)
            .and_then(|()| handle.set_size(content.len() as u64))
            .and_then(|()| handle.sync())
            .map_err(|error| self.look_for_room(path, error))?;
        handle.close()
    }

    pub fn remove(&self, path: &str) -> Result<()> {
        let path = path.as_bytes();
        self.demand(&Request::Remove { path })
    }

    pub fn remove_if_there(&self, path: &str) -> Result<()> {
        match self.remove(path) {
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            other => other,
        }
    }

    pub fn stat(&self, path: &str) -> Result<Attributes> {
        let path = path.as_bytes();
        verdict::attributes(self.engine.call(&Request::Stat { path })?)
    }

    pub fn exists(&self, path: &str) -> bool {
        let path = path.as_bytes();
        let found = self.engine.call(&Request::Lstat { path });
        found.and_then(verdict::attributes).is_ok()
    }

    pub fn statvfs(&self, path: &str) -> Result<StatVfs> {
        let path = path.as_bytes();
        let request = Request::Extended(Extended::StatVfs { path });
        match self.engine.call(&request)? {
            Reply::Extended(data) => StatVfs::decode(&data)
                .map_err(|e| Error::new(Kind::Unsupported, "the answer is malformed").because(e)),
            other => Err(verdict::refusal(&other)),
        }
    }

    /// After a FAILURE: the same error, or [`Kind::NoSpace`] if the server's disk is full.
    pub fn look_for_room(&self, path: &str, error: Error) -> Error {
        if error.kind() != Kind::Io || !self.has(Extension::StatVfs) {
            return error;
        }
        let full = |stat: &StatVfs| {
            let files_out = stat.files > 0 && stat.files_available == 0;
            stat.bytes_available() < NEARLY_FULL || files_out
        };
        match self.statvfs(directory_of(path)) {
            Ok(stat) if full(&stat) => Error::new(Kind::NoSpace, "no space on server")
                .hint("make room on the server's disk; the image itself grows only as it is filled")
                .because(error),
            _ => error,
        }
    }
}

/// A handle of the server, closed when dropped.
pub struct OpenHandle {
    pub files: Arc<Files>,
    handle: Vec<u8>,
}

impl OpenHandle {
    pub fn bytes(&self) -> &[u8] {
        &self.handle
    }

    /// Closes it, and hears what the server says to that: some disks refuse data only then.
    pub fn close(mut self) -> Result<()> {
        let handle = std::mem::take(&mut self.handle);
        self.files.demand(&Request::Close { handle: &handle })
    }

    pub fn set_size(&self, size: u64) -> Result<()> {
        self.files.demand(&Request::Fsetstat {
            handle: &self.handle,
            attributes: Attributes::with_size(size),
        })
    }

    pub fn sync(&self) -> Result<()> {
        if self.files.has(Extension::Fsync) {
            let handle = &self.handle;
            return self
                .files
                .demand(&Request::Extended(Extended::Fsync { handle }));
        }
        if !self.files.warned_of_fsync.swap(true, Ordering::Relaxed) {
            warn!("the server offers no fsync: what it has received may be lost if it crashes");
        }
        Ok(())
    }
}

impl Drop for OpenHandle {
    fn drop(&mut self) {
        if self.handle.is_empty() {
            return;
        }
        let (to, _) = mpsc::channel();
        let request = Request::Close {
            handle: &self.handle,
        };
        // Nobody waits for the answer, and without a session there is nothing to be closed.
        if let Err(error) = self.files.engine.submit(&request, 0, &to) {
            debug!(%error, "a handle was not closed");
        }
    }
}

/// The directory that a path of the server is in.
pub fn directory_of(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some(("", _)) => "/",
        Some((directory, _)) => directory,
        None => ".",
    }
}
