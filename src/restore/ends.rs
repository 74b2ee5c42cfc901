//! The two ends of a restore: what is copied, and the name it gets. The rules are those of `cp -a`.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::descent::show;
use super::source::{FileKind, HERE, Source};
use crate::error::{Attempt, Error, Kind, Result};

/// What is copied, seen from where the source's cursor stands.
pub(super) struct Start {
    /// The name to look up there, or [`HERE`].
    pub lookup: Vec<u8>,
    /// The name it will have in DEST; a path that ends in `.` or `..`, and the root, have none.
    pub name: Option<Vec<u8>>,
    pub is_directory: bool,
}

impl Start {
    pub fn find(source: &mut dyn Source, from: &Path) -> Result<Self> {
        let path = from.as_os_str().as_bytes();
        let end = path.iter().rposition(|byte| *byte != b'/');
        let trimmed = end.map_or(&path[..0], |end| &path[..=end]);
        let cut = trimmed.iter().rposition(|byte| *byte == b'/');
        let last = &trimmed[cut.map_or(0, |slash| slash + 1)..];
        let name = (!matches!(last, b"" | b"." | b"..")).then(|| last.to_vec());
        match name {
            Some(name) if trimmed.len() == path.len() => {
                source.go(&trimmed[..trimmed.len() - name.len()])?;
                Ok(Start {
                    is_directory: source
                        .metadata(&name)
                        .attempt(|| format!("find {} in the snapshot", show(path)))?
                        .kind
                        == FileKind::Directory,
                    lookup: name.clone(),
                    name: Some(name),
                })
            }
            name => {
                source.go(path)?;
                Ok(Start {
                    lookup: HERE.to_vec(),
                    name,
                    is_directory: true,
                })
            }
        }
    }
}

/// Where a copy has landed. Only the copy knows: once it has made DEST, nobody can tell any more
/// whether that was there before.
#[derive(Clone, Debug, Default)]
pub struct Landing {
    /// The directory that was there before.
    pub directory: PathBuf,
    /// The name that was made in it; none when the directory itself took the contents.
    pub name: Option<Vec<u8>>,
}

impl Landing {
    pub(super) fn find(dest: &Path, name: Option<&[u8]>, is_directory: bool) -> Result<Landing> {
        if dest.is_dir() {
            return Ok(Landing {
                directory: dest.to_owned(),
                name: name.map(<[u8]>::to_vec),
            });
        }
        let attempt = || format!("restore to {dest:?}");
        let Some(name) = dest.file_name() else {
            return Err(Error::new(Kind::NotFound, attempt()).because("there is no such directory"));
        };
        if dest.as_os_str().as_bytes().ends_with(b"/") && !is_directory {
            return Err(Error::new(Kind::NotFound, attempt()).because("there is no such directory"));
        }
        let directory = match dest.parent() {
            Some(above) if !above.as_os_str().is_empty() => above.to_owned(),
            _ => PathBuf::from("."),
        };
        Ok(Landing {
            directory,
            name: Some(name.as_bytes().to_vec()),
        })
    }
}
