//! An image in a local file, and its side files.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::{Access, SIDE_MAX, Space, Store, Traffic, check_side, passing_suffix};
use crate::device::{Caps, Device, Discard, Durability, check_range};
use crate::error::{Attempt, Error, Kind, Result};
use crate::units::MIB;

/// Only the owner may read and write: the image is encrypted, but its header says how to guess.
const MODE: u32 = 0o600;

/// The image at `path`.
pub struct LocalStore {
    path: PathBuf,
}

impl LocalStore {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        LocalStore { path: path.into() }
    }

    fn side(&self, suffix: &str) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(suffix);
        name.into()
    }

    fn directory(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }

    /// Makes what happened to names in the directory durable.
    fn sync_directory(&self) -> io::Result<()> {
        File::open(self.directory())?.sync_all()
    }

    fn open_file(&self, access: Access) -> Result<File> {
        let opened = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .open(&self.path);
        match opened {
            Ok(file) => Ok(file),
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound => {
                    Err(Error::new(Kind::NoImage, "there is no such file").because(error))
                }
                io::ErrorKind::PermissionDenied
                    if access == Access::ReadWrite && File::open(&self.path).is_ok() =>
                {
                    Err(Error::new(Kind::ReadOnly, "it may be read but not written").because(error))
                }
                _ => Err(error.into()),
            },
        }
    }

    fn create_file(&self, size: u64) -> Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(MODE)
            .open(&self.path)?;
        let filled = file
            .set_len(size)
            .and_then(|()| file.sync_all())
            .and_then(|()| self.sync_directory());
        if let Err(error) = filled {
            let _ = fs::remove_file(&self.path); // we made it a moment ago; the failure is told
            return Err(error.into());
        }
        Ok(file)
    }

    /// Writes a side file under a name that nobody else uses, and gives the name.
    fn write_passing(&self, suffix: &str, content: &[u8]) -> Result<PathBuf> {
        let path = self.side(&passing_suffix(suffix));
        write_new(&path, content)?;
        Ok(path)
    }

    fn create_side_file(&self, suffix: &str, content: &[u8]) -> Result<()> {
        let passing = self.write_passing(suffix, content)?;
        let path = self.side(suffix);
        let linked = fs::hard_link(&passing, &path);
        let _ = fs::remove_file(&passing); // what is left behind does no harm
        match linked {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(error.into()),
            // A filesystem without hard links.
            Err(_) => write_new(&path, content)?,
        }
        Ok(self.sync_directory()?)
    }

    fn replace_side_file(&self, suffix: &str, content: &[u8]) -> Result<()> {
        let passing = self.write_passing(suffix, content)?;
        if let Err(error) = fs::rename(&passing, self.side(suffix)) {
            let _ = fs::remove_file(&passing); // what is left behind does no harm
            return Err(error.into());
        }
        Ok(self.sync_directory()?)
    }
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(path)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(path); // we made it a moment ago; the failure is told
    }
    written
}

impl Store for LocalStore {
    fn open(&self, access: Access) -> Result<Arc<dyn Device>> {
        let file = self
            .open_file(access)
            .and_then(|file| LocalFile::new(file, &self.path, access))
            .attempt(|| format!("open {}", self.path.display()))?;
        Ok(Arc::new(file))
    }

    fn create(&self, size: u64) -> Result<Arc<dyn Device>> {
        let file = self
            .create_file(size)
            .and_then(|file| LocalFile::new(file, &self.path, Access::ReadWrite))
            .attempt(|| format!("create {}, {size} bytes", self.path.display()))?;
        Ok(Arc::new(file))
    }

    fn remove(&self) -> Result<()> {
        let removed = match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::new(Kind::NoImage, "there is no such file"))
            }
            other => other.map_err(Error::from),
        };
        removed
            .and_then(|()| Ok(self.sync_directory()?))
            .attempt(|| format!("remove {}", self.path.display()))
    }

    fn create_side(&self, suffix: &str, content: &[u8]) -> Result<()> {
        check_side(content)
            .and_then(|()| self.create_side_file(suffix, content))
            .attempt(|| format!("create {}", self.side(suffix).display()))
    }

    fn read_side(&self, suffix: &str) -> Result<Option<Vec<u8>>> {
        let path = self.side(suffix);
        let read = || {
            let file = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                other => other?,
            };
            let mut content = Vec::new();
            file.take(SIDE_MAX as u64 + 1).read_to_end(&mut content)?;
            match content.len() {
                ..=SIDE_MAX => Ok(Some(content)),
                _ => Err(Error::new(
                    Kind::Corrupt,
                    format!("it is longer than {SIDE_MAX} bytes"),
                )),
            }
        };
        read().attempt(|| format!("read {}", path.display()))
    }

    fn replace_side(&self, suffix: &str, content: &[u8]) -> Result<()> {
        check_side(content)
            .and_then(|()| self.replace_side_file(suffix, content))
            .attempt(|| format!("replace {}", self.side(suffix).display()))
    }

    fn remove_side(&self, suffix: &str) -> Result<()> {
        let path = self.side(suffix);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.attempt(|| format!("remove {}", path.display())),
        }
    }

    fn stored(&self) -> Result<Option<u64>> {
        let about = std::fs::metadata(&self.path);
        let about = about.attempt(|| format!("look at {}", self.path.display()))?;
        Ok(Some(about.blocks() * 512))
    }

    fn data_ranges(&self) -> Result<Option<Vec<Range<u64>>>> {
        let ranges = || -> Result<Vec<Range<u64>>> {
            let file = self.open_file(Access::ReadOnly)?;
            let mut ranges = Vec::new();
            let mut at = 0;
            loop {
                let start = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
                    Err(Errno::NXIO) => return Ok(ranges), // nothing but a hole is left
                    other => other?,
                };
                at = rustix::fs::seek(&file, SeekFrom::Hole(start))?;
                ranges.push(start..at);
            }
        };
        let ranges = ranges().attempt(|| format!("look for holes in {}", self.path.display()));
        ranges.map(Some)
    }

    fn beside(&self, suffix: &str) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(LocalStore::new(self.side(suffix))))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (self.side(from), self.side(to));
        let renamed = fs::rename(&from, &to).and_then(|()| self.sync_directory());
        renamed.attempt(|| format!("rename {} to {}", from.display(), to.display()))
    }

    fn space(&self) -> Result<Option<Space>> {
        let stat = rustix::fs::statvfs(self.directory())
            .attempt(|| format!("ask for the room in {}", self.directory().display()))?;
        Ok(Some(Space {
            free: stat.f_frsize.saturating_mul(stat.f_bavail),
            total: stat.f_frsize.saturating_mul(stat.f_blocks),
        }))
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}

/// A file that ends within its known size was cut off behind our back.
fn ends_early(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::new(Kind::Corrupt, "the file ends within its known size")
        }
        _ => error.into(),
    }
}

/// An open image.
struct LocalFile {
    file: File,
    path: PathBuf,
    writable: bool,
    size: AtomicU64,
}

impl LocalFile {
    fn new(file: File, path: &Path, access: Access) -> Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Error::new(Kind::Usage, "it is not a regular file"));
        }
        Ok(LocalFile {
            file,
            path: path.to_path_buf(),
            writable: access == Access::ReadWrite,
            size: AtomicU64::new(metadata.len()),
        })
    }

    fn check_writable(&self) -> Result<()> {
        match self.writable {
            true => Ok(()),
            false => Err(Error::new(
                Kind::ReadOnly,
                format!("{} was opened for reading only", self.path.display()),
            )),
        }
    }
}

impl Device for LocalFile {
    fn caps(&self) -> Caps {
        Caps {
            alignment: 1,
            io_best: MIB as u32,
            writable: self.writable,
            durability: Durability::Stable,
            discard: Discard::Zeros,
        }
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len();
        check_range(self.caps(), self.size(), offset, len)
            .and_then(|()| self.file.read_exact_at(buf, offset).map_err(ends_early))
            .attempt(|| {
                let path = self.path.display();
                format!("read {len} bytes at offset {offset} of {path}")
            })
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.check_writable()?;
        check_range(self.caps(), self.size(), offset, data.len())
            .and_then(|()| Ok(self.file.write_all_at(data, offset)?))
            .attempt(|| {
                let path = self.path.display();
                format!("write {} bytes at offset {offset} of {path}", data.len())
            })
    }

    fn flush(&self) -> Result<()> {
        self.file
            .sync_data()
            .attempt(|| format!("sync {}", self.path.display()))
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.check_writable()?;
        let len = range.end.saturating_sub(range.start);
        if len == 0 {
            return Ok(());
        }
        let punch = || -> Result<()> {
            // Beyond the end there is nothing to be given back, and nothing to be read.
            let within = usize::try_from(len)
                .map_err(|_| Error::new(Kind::Usage, format!("{len} bytes are too many")))?;
            check_range(self.caps(), self.size(), range.start, within)?;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Ok(rustix::fs::fallocate(&self.file, flags, range.start, len)?)
        };
        punch().attempt(|| {
            let path = self.path.display();
            format!("punch {len} bytes at offset {} of {path}", range.start)
        })
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        self.file
            .set_len(size)
            .attempt(|| format!("resize {} to {size} bytes", self.path.display()))?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
