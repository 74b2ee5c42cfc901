//! A filesystem read through ext4-view, without mounting it: enough to find the snapshots and to
//! say what the filesystem is.

use std::error::Error as StdError;
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Error, Ext4Read, PathBuf};

use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};

/// Small files only: completion records are a few KiB.
const FILE_MAX: u64 = 8 << 20;

/// An ext4 filesystem on a device. A journal that was not replayed is taken into account.
pub struct Ext4View {
    filesystem: Ext4,
}

impl Ext4View {
    pub fn load(device: Arc<dyn Device>) -> Result<Self> {
        let filesystem = Ext4::load(Box::new(Reader(device))).map_err(translated);
        let filesystem = filesystem.attempt(|| "read the filesystem in the image");
        filesystem.map(|filesystem| Ext4View { filesystem })
    }

    pub fn label(&self) -> String {
        self.filesystem.label().display().to_string()
    }

    pub fn uuid(&self) -> String {
        self.filesystem.uuid().to_string()
    }

    /// Names in the directory at `path` (from the root), without `.` and `..`; none when there is
    /// no such directory.
    pub fn names(&self, path: &str) -> Result<Vec<Vec<u8>>> {
        let doing = || format!("list {path} in the image");
        let entries = match self.filesystem.read_dir(&rooted(path).attempt(doing)?) {
            Ok(entries) => entries,
            Err(Ext4Error::NotFound) => return Ok(Vec::new()),
            Err(error) => return Err(translated(error)).attempt(doing),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(translated).attempt(doing)?;
            let name = entry.file_name().as_ref().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Names in the directory at `path` (from the root) and whether each is a directory, without
    /// `.` and `..`.
    pub fn entries(&self, path: &[u8]) -> Result<Vec<(Vec<u8>, bool)>> {
        let shown = || String::from_utf8_lossy(path).into_owned();
        let doing = || format!("list {} in the image", shown());
        let mut at = b"/".to_vec();
        at.extend(path);
        let at = PathBuf::try_from(at).map_err(|e| Error::new(Kind::Corrupt, e.to_string()));
        let entries = self.filesystem.read_dir(&at.attempt(doing)?);
        let mut found = Vec::new();
        for entry in entries.map_err(translated).attempt(doing)? {
            let entry = entry.map_err(translated).attempt(doing)?;
            let name = entry.file_name().as_ref().to_vec();
            let kind = entry.file_type().map_err(translated).attempt(doing)?;
            if name != b"." && name != b".." {
                found.push((name, kind.is_dir()));
            }
        }
        Ok(found)
    }

    /// Whether there is anything at `path` (from the root), also a link that leads nowhere.
    pub fn exists(&self, path: &str) -> Result<bool> {
        let doing = || format!("look for {path} in the image");
        let at = rooted(path).attempt(doing)?;
        match self.filesystem.symlink_metadata(&at) {
            Ok(_) => Ok(true),
            Err(Ext4Error::NotFound) => Ok(false),
            Err(error) => Err(translated(error)).attempt(doing),
        }
    }

    /// A small file, whole.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        let doing = || format!("read {path} in the image");
        let at = rooted(path).attempt(doing)?;
        let size = self
            .filesystem
            .metadata(&at)
            .map_err(translated)
            .attempt(doing)?
            .len();
        if size > FILE_MAX {
            return Err(Error::new(
                Kind::Corrupt,
                format!("{path} has {size} bytes, more than {FILE_MAX}"),
            ));
        }
        self.filesystem.read(&at).map_err(translated).attempt(doing)
    }
}

fn rooted(path: &str) -> Result<PathBuf> {
    PathBuf::try_from(format!("/{path}")).map_err(|e| Error::new(Kind::Corrupt, e.to_string()))
}

fn translated(error: Ext4Error) -> Error {
    let kind = match &error {
        Ext4Error::NotFound => Kind::NotFound,
        Ext4Error::Io(source) => match source.downcast_ref::<Error>() {
            Some(inner) => inner.kind(),
            None => Kind::Io,
        },
        Ext4Error::Incompatible(_) => Kind::Unsupported,
        Ext4Error::Corrupt(_) => Kind::Corrupt,
        _ => Kind::Io,
    };
    Error::new(kind, error.to_string())
}

struct Reader(Arc<dyn Device>);

impl Ext4Read for Reader {
    fn read(
        &mut self,
        start: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn StdError + Send + Sync + 'static>> {
        self.0
            .read_exact_at(into, start)
            .map_err(|error| Box::new(error) as _)
    }
}
