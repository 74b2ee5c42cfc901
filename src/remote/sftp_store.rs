//! An image behind SFTP, and its side files.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::engine::{Bounds, Engine};
use super::files::{Files, OpenHandle, directory_of};
use super::lanes::{self, Errand, Lanes, Session};
use super::redial::{Redial, open_flags};
use super::{
    Access, Link, Measured, SIDE_MAX, Space, Store, Traffic, check_side, lean_copy, lease,
    passing_suffix, verdict,
};
use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};
use crate::link::Dial;
use crate::location::RemotePath;
use crate::sftp::{Code, Extended, Extension, OpenFlags, Reply, Request, Status};

/// How often is looked whether a late removal was done.
const LATE_LOOK: Duration = Duration::from_secs(1);

/// The image at a path of one server.
pub struct SftpStore {
    lanes: Arc<Lanes>,
    path: RemotePath,
    /// The location as the user wrote it, for messages.
    name: String,
    /// The image as it was last opened for writing: what it owes outlives its user.
    writable: Mutex<Option<Arc<Redial>>>,
}

impl SftpStore {
    /// Dials, and greets the server, which may take as long as the dial has patience. `name` is
    /// what messages call the image.
    pub fn connect(
        dial: Arc<dyn Dial>,
        path: &RemotePath,
        name: &str,
        bounds: Bounds,
    ) -> Result<Self> {
        let lanes = Lanes::connect(dial, name, bounds)?;
        Ok(SftpStore::with(lanes, path, name))
    }

    /// A store over a session that is up, and that is not replaced when it breaks.
    pub fn over(engine: Arc<Engine>, path: &RemotePath, name: &str) -> Self {
        SftpStore::with(Lanes::single(engine, name), path, name)
    }

    fn with(lanes: Lanes, path: &RemotePath, name: &str) -> Self {
        SftpStore {
            lanes: Arc::new(lanes),
            path: path.clone(),
            name: name.into(),
            writable: Mutex::new(None),
        }
    }

    /// What may be done twice, on a session that is up.
    fn on<T>(&self, body: impl Fn(Beside<'_>) -> Result<T>) -> Result<T> {
        let path = &self.path;
        let on_session = |session: &Arc<Session>| {
            let files = &session.files;
            body(Beside { files, path })
        };
        self.lanes.run(Errand::Control, on_session)
    }

    /// What may be done only once.
    fn once_on<T>(&self, body: impl FnOnce(Beside<'_>) -> Result<T>) -> Result<T> {
        let path = &self.path;
        let on_session = |session: &Arc<Session>| {
            let files = &session.files;
            body(Beside { files, path })
        };
        self.lanes.run_once(on_session)
    }

    fn device(&self, session: &Arc<Session>, handle: OpenHandle, access: Access) -> Result<Redial> {
        let lanes = self.lanes.clone();
        Redial::new(lanes, session, handle, &self.path, &self.name, access)
    }

    fn keep(&self, device: Redial, access: Access) -> Arc<dyn Device> {
        let device = Arc::new(device);
        if access == Access::ReadWrite {
            *self.writable() = Some(device.clone());
        }
        device
    }

    fn writable(&self) -> std::sync::MutexGuard<'_, Option<Arc<Redial>>> {
        self.writable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn side_name(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.name)
    }
}

/// The image and the files beside it, on one session.
#[derive(Clone, Copy)]
struct Beside<'a> {
    files: &'a Arc<Files>,
    path: &'a RemotePath,
}

impl Beside<'_> {
    fn open(self, access: Access) -> Result<OpenHandle> {
        let path = self.path.as_str();
        let error = match self.files.open(path, open_flags(access)) {
            Ok(handle) => return Ok(handle),
            Err(error) => error,
        };
        Err(match error.kind() {
            Kind::NotFound => Error::new(Kind::NoImage, "there is no such file").because(error),
            Kind::Denied if access == Access::ReadWrite => {
                match self.files.open(path, OpenFlags::READ) {
                    Ok(_) => {
                        Error::new(Kind::ReadOnly, "the server lets it be read but not written")
                            .because(error)
                    }
                    Err(_) => error,
                }
            }
            Kind::Io => match self.files.stat(path) {
                Ok(found) if found.is_regular() == Some(false) => {
                    Error::new(Kind::Usage, "it is not a regular file")
                }
                _ => error,
            },
            _ => error,
        })
    }

    fn create(self, size: u64) -> Result<OpenHandle> {
        let path = self.path.as_str();
        let handle = self.files.create(path)?;
        let filled = handle
            .set_size(size)
            .map_err(|error| self.files.look_for_room(path, error))
            .and_then(|()| handle.sync());
        if let Err(error) = filled {
            drop(handle);
            let _ = self.files.remove(path); // we made it a moment ago; the failure is told
            return Err(error);
        }
        Ok(handle)
    }

    fn side(self, suffix: &str) -> RemotePath {
        self.path.with_suffix(suffix)
    }

    /// Writes a side file under a name that nobody else uses, and gives the name.
    fn write_passing(self, suffix: &str, content: &[u8]) -> Result<RemotePath> {
        let path = self.side(&passing_suffix(suffix));
        self.files.write_new(path.as_str(), content)?;
        Ok(path)
    }

    fn create_side_file(self, suffix: &str, content: &[u8]) -> Result<()> {
        let path = self.side(suffix);
        let path = path.as_str();
        if !self.files.has(Extension::Hardlink) {
            return self.files.write_new(path, content);
        }
        let passing = self.write_passing(suffix, content)?;
        let linked = self.files.link_new(passing.as_str(), path);
        let removed = self.files.remove(passing.as_str());
        match linked {
            Ok(true) => removed,
            Ok(false) => self.files.write_new(path, content),
            Err(error) => Err(error),
        }
    }

    fn read_side_file(self, suffix: &str) -> Result<Option<Vec<u8>>> {
        let path = self.side(suffix);
        let handle = match self.files.open(path.as_str(), OpenFlags::READ) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            other => other?,
        };
        let mut content = Vec::new();
        while content.len() <= SIDE_MAX {
            let request = Request::Read {
                handle: handle.bytes(),
                offset: content.len() as u64,
                len: (SIDE_MAX + 1 - content.len()).min(self.files.engine.read_chunk()) as u32,
            };
            match self.files.engine.call(&request)? {
                Reply::Data(data) if !data.bytes().is_empty() => {
                    content.extend_from_slice(data.bytes());
                }
                Reply::Data(_) => return Ok(Some(content)),
                Reply::Status(Status {
                    code: Code::Eof, ..
                }) => return Ok(Some(content)),
                other => return Err(verdict::refusal(&other)),
            }
        }
        Err(Error::new(
            Kind::Corrupt,
            format!("it is longer than {SIDE_MAX} bytes"),
        ))
    }

    fn rename(self, from: &str, to: &str) -> Result<()> {
        let (from_path, to_path) = (self.side(from), self.side(to));
        let (from, to) = (from_path.as_str().as_bytes(), to_path.as_str().as_bytes());
        if self.files.has(Extension::PosixRename) {
            let rename = Extended::PosixRename { from, to };
            self.files.demand(&Request::Extended(rename))?;
        } else {
            // Version 3 renames over nothing.
            self.files.stat(from_path.as_str())?;
            self.files.remove_if_there(to_path.as_str())?;
            self.files.demand(&Request::Rename { from, to })?;
        }
        // SFTP syncs no directory. The filesystems of servers keep the name with a file that is synced.
        let both = OpenFlags::READ | OpenFlags::WRITE;
        let renamed = self.files.open(to_path.as_str(), both)?;
        renamed.sync()?;
        renamed.close()
    }

    fn replace_side_file(self, suffix: &str, content: &[u8]) -> Result<()> {
        let path = self.side(suffix);
        if !self.files.has(Extension::PosixRename) {
            return self.files.overwrite(path.as_str(), content);
        }
        let passing = self.write_passing(suffix, content)?;
        let renamed = self.files.demand(&Request::Extended(Extended::PosixRename {
            from: passing.as_str().as_bytes(),
            to: path.as_str().as_bytes(),
        }));
        if renamed.is_err() {
            let _ = self.files.remove(passing.as_str()); // what is left behind does no harm
        }
        renamed
    }
}

impl Store for SftpStore {
    fn open(&self, access: Access) -> Result<Arc<dyn Device>> {
        let open = |session: &Arc<Session>| {
            let (files, path) = (&session.files, &self.path);
            let handle = Beside { files, path }.open(access)?;
            self.device(session, handle, access)
        };
        let device = self
            .lanes
            .run(Errand::Control, open)
            .attempt(|| format!("open {}", self.name))?;
        Ok(self.keep(device, access))
    }

    fn create(&self, size: u64) -> Result<Arc<dyn Device>> {
        let create = |session: &Arc<Session>| {
            let (files, path) = (&session.files, &self.path);
            let handle = Beside { files, path }.create(size)?;
            self.device(session, handle, Access::ReadWrite)
        };
        let device = self
            .lanes
            .run_once(create)
            .attempt(|| format!("create {}, {size} bytes", self.name))?;
        Ok(self.keep(device, Access::ReadWrite))
    }

    fn remove(&self) -> Result<()> {
        let remove = |on: Beside<'_>| match on.files.remove(on.path.as_str()) {
            Err(error) if error.kind() == Kind::NotFound => {
                Err(Error::new(Kind::NoImage, "there is no such file").because(error))
            }
            other => other,
        };
        self.once_on(remove)
            .attempt(|| format!("remove {}", self.name))
    }

    fn create_side(&self, suffix: &str, content: &[u8]) -> Result<()> {
        check_side(content)
            .and_then(|()| self.once_on(|on| on.create_side_file(suffix, content)))
            .attempt(|| format!("create {}", self.side_name(suffix)))
    }

    fn read_side(&self, suffix: &str) -> Result<Option<Vec<u8>>> {
        self.on(|on| on.read_side_file(suffix))
            .attempt(|| format!("read {}", self.side_name(suffix)))
    }

    fn replace_side(&self, suffix: &str, content: &[u8]) -> Result<()> {
        check_side(content)
            .and_then(|()| self.on(|on| on.replace_side_file(suffix, content)))
            .attempt(|| format!("replace {}", self.side_name(suffix)))
    }

    fn remove_side(&self, suffix: &str) -> Result<()> {
        let path = self.path.with_suffix(suffix);
        let mut late = None;
        let remove = |session: &Arc<Session>| {
            let files = &session.files;
            // One that broke may still be done, and must not hit what somebody makes after ours
            // is gone: so ours stays until that has passed.
            while let Some(until) = late {
                match files.stat(path.as_str()) {
                    Err(error) if error.kind() == Kind::NotFound => return Ok(()),
                    other => other?,
                };
                let left = Instant::saturating_duration_since(&until, Instant::now());
                if left.is_zero() {
                    late = None;
                }
                thread::sleep(left.min(LATE_LOOK));
            }
            let removed = files.remove_if_there(path.as_str());
            if removed.is_err() && session.is_dead() {
                late = Some(Instant::now() + files.engine.late_writes());
            }
            removed
        };
        self.lanes
            .run(Errand::Control, remove)
            .attempt(|| format!("remove {}", self.side_name(suffix)))
    }

    fn copy_lean(&self, plan: &lean_copy::Plan<'_>) -> Result<()> {
        self.once_on(|on| lean_copy::by_copy_data(on.files, on.path, plan))
            .inspect_err(|_| {
                // On another session, if that one has ended; else the next run does it.
                let _ = self.on(|on| lean_copy::clean_up(on.files, on.path));
            })
            .attempt(|| format!("have the server copy {}", self.name))
    }

    fn beside(&self, suffix: &str) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(SftpStore {
            lanes: self.lanes.clone(),
            path: self.path.with_suffix(suffix),
            name: self.side_name(suffix),
            writable: Mutex::new(None),
        }))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        // What the lanes ask new sessions for is at the old name.
        *self.writable() = None;
        self.once_on(|on| on.rename(from, to)).attempt(|| {
            let (from, to) = (self.side_name(from), self.side_name(to));
            format!("rename {from} to {to}")
        })
    }

    fn space(&self) -> Result<Option<Space>> {
        // The directory exists also before the image does.
        let directory = directory_of(self.path.as_str());
        let ask = |on: Beside<'_>| match on.files.has(Extension::StatVfs) {
            true => on.files.statvfs(directory).map(Some),
            false => Ok(None),
        };
        let stat = self
            .on(ask)
            .attempt(|| format!("ask for the room around {}", self.name))?;
        Ok(stat.map(|stat| Space {
            free: stat.bytes_available(),
            total: stat.bytes_total(),
        }))
    }

    fn traffic(&self) -> Traffic {
        self.lanes.traffic()
    }

    fn link(&self) -> Link {
        self.lanes.link()
    }

    fn measured(&self) -> Option<Measured> {
        self.lanes.measured()
    }

    fn use_lease(&self, nonce: Option<&str>) {
        let proof = nonce.map(|nonce| {
            let (path, nonce) = (self.path.clone(), nonce.to_string());
            lanes::proof(move |files| {
                let on = Beside { files, path: &path };
                lease::is_held(on.read_side_file(lease::SUFFIX)?, &nonce)
                    .attempt(|| "look at the lease after the link broke")
            })
        });
        self.lanes.demand("lease", proof);
    }

    fn settle(&self, tell: &dyn Fn(Duration)) -> Result<()> {
        let writable = self.writable().clone();
        match writable {
            Some(device) => device
                .settle(tell)
                .attempt(|| format!("sync {}", self.name)),
            None => Ok(()),
        }
    }
}
