//! An image behind SFTP, and its side files.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::engine::{Bounds, Engine};
use super::files::{Files, OpenHandle, directory_of};
use super::{
    Access, SIDE_MAX, Space, Store, Traffic, check_side, lean_copy, passing_suffix, transfer,
    verdict,
};
use crate::device::{Caps, Device, Discard, Durability, check_range};
use crate::error::{Attempt, Error, Kind, Result};
use crate::link::{Dial, Occasion};
use crate::location::RemotePath;
use crate::sftp::{Code, Extended, Extension, OpenFlags, Reply, Request, Status};

/// The image at a path of one server.
pub struct SftpStore {
    files: Arc<Files>,
    path: RemotePath,
    /// The location as the user wrote it, for messages.
    name: String,
}

impl SftpStore {
    /// Dials, and greets the server, which may take as long as the dial has patience. `name` is
    /// what messages call the image.
    pub fn connect(dial: &dyn Dial, path: &RemotePath, name: &str, bounds: Bounds) -> Result<Self> {
        let bounds = Bounds {
            greeting: dial.patience(),
            ..bounds
        };
        let engine = dial
            .dial(Occasion::First)
            .and_then(|stream| Engine::start(stream, bounds))
            .attempt(|| format!("connect to the server of {name}"))?;
        Ok(SftpStore::over(Arc::new(engine), path, name))
    }

    /// A store over a session that is up.
    pub fn over(engine: Arc<Engine>, path: &RemotePath, name: &str) -> Self {
        SftpStore {
            files: Arc::new(Files::new(engine)),
            path: path.clone(),
            name: name.into(),
        }
    }

    fn open_file(&self, access: Access) -> Result<SftpFile> {
        let path = self.path.as_str();
        let opened = self.files.open(path, open_flags(access));
        let handle = match opened {
            Err(error) if error.kind() == Kind::NotFound => {
                return Err(Error::new(Kind::NoImage, "there is no such file").because(error));
            }
            Err(error) if error.kind() == Kind::Denied && access == Access::ReadWrite => {
                return Err(match self.files.open(path, OpenFlags::READ) {
                    Ok(_) => {
                        Error::new(Kind::ReadOnly, "the server lets it be read but not written")
                            .because(error)
                    }
                    Err(_) => error,
                });
            }
            Err(error) if error.kind() == Kind::Io => {
                return Err(match self.files.stat(path) {
                    Ok(found) if found.is_regular() == Some(false) => not_regular(),
                    _ => error,
                });
            }
            other => other?,
        };
        self.file(handle, access)
    }

    fn file(&self, handle: OpenHandle, access: Access) -> Result<SftpFile> {
        let request = Request::Fstat {
            handle: handle.bytes(),
        };
        let found = verdict::attributes(self.files.engine.call(&request)?)?;
        if found.is_regular() == Some(false) {
            return Err(not_regular());
        }
        let size = found
            .size
            .ok_or_else(|| Error::new(Kind::Unsupported, "the server does not tell its size"))?;
        Ok(SftpFile {
            handle,
            path: self.path.clone(),
            name: self.name.clone(),
            writable: access == Access::ReadWrite,
            size: AtomicU64::new(size),
        })
    }

    fn create_file(&self, size: u64) -> Result<SftpFile> {
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
        self.file(handle, Access::ReadWrite)
    }

    fn side(&self, suffix: &str) -> RemotePath {
        self.path.with_suffix(suffix)
    }

    fn side_name(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.name)
    }

    /// Writes a side file under a name that nobody else uses, and gives the name.
    fn write_passing(&self, suffix: &str, content: &[u8]) -> Result<RemotePath> {
        let path = self.side(&passing_suffix(suffix));
        self.files.write_new(path.as_str(), content)?;
        Ok(path)
    }

    fn create_side_file(&self, suffix: &str, content: &[u8]) -> Result<()> {
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

    fn read_side_file(&self, suffix: &str) -> Result<Option<Vec<u8>>> {
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

    fn replace_side_file(&self, suffix: &str, content: &[u8]) -> Result<()> {
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

fn open_flags(access: Access) -> OpenFlags {
    match access {
        Access::ReadOnly => OpenFlags::READ,
        Access::ReadWrite => OpenFlags::READ | OpenFlags::WRITE,
    }
}

fn not_regular() -> Error {
    Error::new(Kind::Usage, "it is not a regular file")
}

impl Store for SftpStore {
    fn open(&self, access: Access) -> Result<Arc<dyn Device>> {
        let file = self
            .open_file(access)
            .attempt(|| format!("open {}", self.name))?;
        Ok(Arc::new(file))
    }

    fn create(&self, size: u64) -> Result<Arc<dyn Device>> {
        let file = self
            .create_file(size)
            .attempt(|| format!("create {}, {size} bytes", self.name))?;
        Ok(Arc::new(file))
    }

    fn remove(&self) -> Result<()> {
        let removed = match self.files.remove(self.path.as_str()) {
            Err(error) if error.kind() == Kind::NotFound => {
                Err(Error::new(Kind::NoImage, "there is no such file").because(error))
            }
            other => other,
        };
        removed.attempt(|| format!("remove {}", self.name))
    }

    fn create_side(&self, suffix: &str, content: &[u8]) -> Result<()> {
        check_side(content)
            .and_then(|()| self.create_side_file(suffix, content))
            .attempt(|| format!("create {}", self.side_name(suffix)))
    }

    fn read_side(&self, suffix: &str) -> Result<Option<Vec<u8>>> {
        self.read_side_file(suffix)
            .attempt(|| format!("read {}", self.side_name(suffix)))
    }

    fn replace_side(&self, suffix: &str, content: &[u8]) -> Result<()> {
        check_side(content)
            .and_then(|()| self.replace_side_file(suffix, content))
            .attempt(|| format!("replace {}", self.side_name(suffix)))
    }

    fn remove_side(&self, suffix: &str) -> Result<()> {
        self.files
            .remove_if_there(self.side(suffix).as_str())
            .attempt(|| format!("remove {}", self.side_name(suffix)))
    }

    fn copy_lean(&self, plan: &lean_copy::Plan<'_>) -> Result<()> {
        lean_copy::by_copy_data(&self.files, &self.path, plan)
            .attempt(|| format!("have the server copy {}", self.name))
    }

    fn space(&self) -> Result<Option<Space>> {
        if !self.files.has(Extension::StatVfs) {
            return Ok(None);
        }
        // The directory exists also before the image does.
        let stat = self
            .files
            .statvfs(directory_of(self.path.as_str()))
            .attempt(|| format!("ask for the room around {}", self.name))?;
        Ok(Some(Space {
            free: stat.bytes_available(),
            total: stat.bytes_total(),
        }))
    }

    fn traffic(&self) -> Traffic {
        self.files.engine.traffic()
    }
}

/// An open image.
struct SftpFile {
    handle: OpenHandle,
    path: RemotePath,
    name: String,
    writable: bool,
    size: AtomicU64,
}

impl SftpFile {
    fn check_writable(&self) -> Result<()> {
        match self.writable {
            true => Ok(()),
            false => Err(Error::new(
                Kind::ReadOnly,
                format!("{} was opened for reading only", self.name),
            )),
        }
    }

    fn look_for_room(&self, error: Error) -> Error {
        self.handle.files.look_for_room(self.path.as_str(), error)
    }
}

impl Device for SftpFile {
    fn caps(&self) -> Caps {
        let files = &self.handle.files;
        let chunk = files.engine.read_chunk().min(files.engine.write_chunk());
        Caps {
            alignment: 1,
            io_best: u32::try_from(chunk).unwrap_or(u32::MAX),
            writable: self.writable,
            durability: match files.has(Extension::Fsync) {
                true => Durability::Stable,
                false => Durability::BestEffort,
            },
            discard: Discard::Refused,
        }
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len();
        let engine = &self.handle.files.engine;
        check_range(self.caps(), self.size(), offset, len)
            .and_then(|()| transfer::read_exact_at(engine, self.handle.bytes(), buf, offset))
            .attempt(|| format!("read {len} bytes at offset {offset} of {}", self.name))
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.check_writable()?;
        let engine = &self.handle.files.engine;
        check_range(self.caps(), self.size(), offset, data.len())
            .and_then(|()| {
                transfer::write_all_at(engine, self.handle.bytes(), data, offset)
                    .map_err(|error| self.look_for_room(error))
            })
            .attempt(|| {
                let len = data.len();
                format!("write {len} bytes at offset {offset} of {}", self.name)
            })
    }

    fn flush(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.handle
            .sync()
            .map_err(|error| self.look_for_room(error))
            .attempt(|| format!("sync {}", self.name))
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        Err(Error::new(
            Kind::Unsupported,
            format!(
                "discard bytes {} to {} of {}: plain SFTP cannot punch holes",
                range.start, range.end, self.name
            ),
        ))
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        self.handle
            .set_size(size)
            .map_err(|error| self.look_for_room(error))
            .attempt(|| format!("resize {} to {size} bytes", self.name))?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
