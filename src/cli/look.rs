//! An image looked into without mounting it, for the verbs that read files: what they are given, and
//! what they have in common.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

use crate::cli::args::ImageArgs;
use crate::cli::key::KeyArgs;
use crate::cli::opening::Opening;
use crate::cli::unmounted::Unmounted;
use crate::cli::{Ending, unmounted};
use crate::error::{Error, Kind, Result};
use crate::restore::{Filesystem, Metadata, ROOT, Tree, Trouble};
use crate::session;
use crate::snapshot::{Catalogue, DIRECTORY, Id};
use crate::ui::tell;

/// As many troubles are told one by one; their count is always told.
const TROUBLES_TOLD: usize = 100;

/// A snapshot and a path in it, as `SNAPSHOT[:PATH]`. No id has a colon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct What {
    pub snapshot: String,
    /// From the top of the snapshot; `/` if none was given.
    pub path: Vec<u8>,
}

impl What {
    pub fn parse(text: &OsStr) -> Result<What> {
        let bytes = text.as_bytes();
        let (name, path) = match bytes.iter().position(|b| *b == b':') {
            Some(colon) => (&bytes[..colon], &bytes[colon + 1..]),
            None => (bytes, &b"/"[..]),
        };
        let path = if path.is_empty() { &b"/"[..] } else { path };
        match std::str::from_utf8(name) {
            Ok(name) if name.starts_with('/') => {
                let why = format!("`{}` does not begin with a snapshot", text.display());
                Err(Error::new(Kind::Usage, why).hint(format!("write latest:{}", text.display())))
            }
            Ok(name) if !name.is_empty() => Ok(What {
                snapshot: name.into(),
                path: path.to_vec(),
            }),
            _ => {
                let why = format!("`{}` does not begin with a snapshot", text.display());
                Err(Error::new(Kind::Usage, why)
                    .hint("write SNAPSHOT:PATH, for example latest:/etc/fstab"))
            }
        }
    }

    pub fn path(&self) -> OsString {
        OsString::from_vec(self.path.clone())
    }
}

/// An image that was opened for reading.
pub struct Look {
    pub filesystem: Arc<Filesystem>,
    pub catalogue: Catalogue,
    opening: Opening,
}

impl Look {
    /// Dials, unlocks, reads the superblock and the catalogue. Takes no lease and mounts nothing.
    pub fn open(image: &ImageArgs, key: &KeyArgs) -> Result<Look> {
        let location = image.location()?;
        let signals = session::end_at_signals()?;
        let mut keys = key.keys(&location.to_string(), signals)?;
        Look::over(unmounted::open(&location, &image.link()?, &mut keys)?)
    }

    /// The same of a filesystem that is already open.
    pub fn over(mut unmounted: Unmounted) -> Result<Look> {
        let catalogue = Catalogue::load(&mut unmounted.filesystem)?;
        Ok(Look {
            filesystem: Arc::new(unmounted.filesystem),
            catalogue,
            opening: unmounted.opening,
        })
    }

    /// What came of reading these snapshots, each with its directory, unless one of them was deleted
    /// meanwhile: then [`Kind::InUse`]. To be asked when reading is over.
    pub fn unless_deleted<T>(&self, read: &[(Id, u32)], came: Result<T>) -> Result<T> {
        match &came {
            // These may have come of what was written over it.
            Err(error) if !matches!(error.kind(), Kind::Corrupt | Kind::NotFound) => came,
            _ => self.opening.still_has(read).and(came),
        }
    }

    /// A snapshot by its name, and the directory that it is.
    pub fn snapshot(&self, name: &str) -> Result<(Id, u32)> {
        let id = self.catalogue.find(name)?.id;
        Ok((id, self.directory(id)?))
    }

    pub fn directory(&self, id: Id) -> Result<u32> {
        let path = format!("{DIRECTORY}/{id}");
        self.filesystem.resolve(ROOT, path.as_bytes())
    }

    /// The inode that is meant. A symbolic link at the end of the path is not followed, unless a
    /// slash comes after it.
    pub fn find(&self, what: &What) -> Result<u32> {
        let (_, root) = self.snapshot(&what.snapshot)?;
        self.filesystem.resolve_itself(root, &what.path)
    }

    /// The tree below a path, and the troubles that reading it met.
    pub fn tree(&self, what: &What, depth: Option<u32>) -> Result<Tree> {
        Tree::load(&self.filesystem, self.find(what)?, depth)
    }
}

/// Tells what could not be read, below a path in a snapshot.
pub fn tell_troubles(base: &[u8], troubles: &[Trouble]) -> Ending {
    for trouble in troubles.iter().take(TROUBLES_TOLD) {
        tell_trouble(&joined(base, &trouble.path), &trouble.error);
    }
    match troubles.len() {
        0 => Ending::Clean,
        count => {
            tell!("warning: {count} files or directories could not be read");
            Ending::Warnings
        }
    }
}

pub fn tell_trouble(path: &[u8], error: &Error) {
    let why = error.chain().join(": ");
    tell!("warning: {}: {why}", printable(path));
}

/// A path below another one. With an empty base it begins with a slash, as paths in a snapshot do.
pub fn joined(base: &[u8], path: &[u8]) -> Vec<u8> {
    let end = base.iter().rposition(|byte| *byte != b'/');
    let mut out = end.map_or(&base[..0], |end| &base[..=end]).to_vec();
    if !path.is_empty() || out.is_empty() {
        out.push(b'/');
        out.extend_from_slice(path);
    }
    if out[0] != b'/' {
        out.insert(0, b'/');
    }
    out
}

/// A name as it may be shown: what could move the cursor, and what is no text, is escaped, and so
/// is the backslash, so that nothing can be mistaken.
pub fn printable(name: &[u8]) -> String {
    let mut out = String::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\t' => out.push_str("\\t"),
                // Marks that turn the direction of writing make one name look like another.
                c if c.is_control()
                    || matches!(c, '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}') =>
                {
                    out.push_str(&c.escape_unicode().to_string());
                }
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

/// The small changes of a file that `versions` and `diff` show.
pub fn mode_octal(metadata: &Metadata) -> String {
    format!("{:04o}", metadata.mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_and_a_path_are_told_apart() {
        let both = |text: &str| {
            let what = What::parse(OsStr::new(text)).ok()?;
            Some((what.snapshot, String::from_utf8(what.path).ok()?))
        };
        let some = |a: &str, b: &str| Some((a.to_string(), b.to_string()));
        assert_eq!(both("latest:/etc/a:b"), some("latest", "/etc/a:b"));
        assert_eq!(both("latest"), some("latest", "/"));
        assert_eq!(both("latest:"), some("latest", "/"));
        assert_eq!(both(":/etc"), None);
        assert_eq!(both("/etc"), None);
    }

    #[test]
    fn what_is_shown_cannot_move_the_cursor() {
        assert_eq!(printable("grün".as_bytes()), "grün");
        assert_eq!(printable(b"a\nb\x1b[2J\xff\\"), "a\\nb\\u{1b}[2J\\xff\\\\");
    }

    #[test]
    fn paths_begin_with_one_slash() {
        for (base, path, whole) in [
            ("/", "", "/"),
            ("/", "a", "/a"),
            ("/etc", "", "/etc"),
            ("etc/", "a/b", "/etc/a/b"),
        ] {
            assert_eq!(joined(base.as_bytes(), path.as_bytes()), whole.as_bytes());
        }
    }
}
