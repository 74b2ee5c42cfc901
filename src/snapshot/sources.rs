//! What is backed up: paths as the user names them, made absolute and free of symbolic links, so
//! that a tree in a snapshot has the path that the files really have.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Error, Kind, Result};

/// At least one existing absolute path; none lies inside another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    paths: Vec<PathBuf>,
    /// One sentence for each name that was not taken as it stands.
    pub notes: Vec<String>,
}

impl Sources {
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }
}

/// Resolves the names given on the command line.
///
/// A name that is, or goes through, a symbolic link is replaced by what it points to: backing up
/// the link alone is never what was meant.
pub fn resolve(names: &[PathBuf]) -> Result<Sources> {
    if names.is_empty() {
        return Err(Error::new(
            Kind::Usage,
            "nothing to back up: name at least one path",
        ));
    }
    let mut paths = Vec::new();
    let mut notes = Vec::new();
    for name in names {
        let absolute = std::path::absolute(name).attempt(|| format!("find {}", name.display()))?;
        let real = fs::canonicalize(name)
            .attempt(|| format!("find the source {}", name.display()))
            .map_err(|e| e.hint("nothing was backed up; mend or leave out that path"))?;
        if real != without_dots(&absolute) {
            notes.push(format!(
                "{} is backed up as {}",
                name.display(),
                real.display()
            ));
        }
        paths.push(real);
    }
    paths.sort();
    paths.dedup();
    let mut kept: Vec<PathBuf> = Vec::new();
    for path in paths {
        match kept.iter().find(|k| path.starts_with(k)) {
            Some(outer) => notes.push(format!(
                "{} is already part of {}",
                path.display(),
                outer.display()
            )),
            None => kept.push(path),
        }
    }
    Ok(Sources { paths: kept, notes })
}

/// Takes out `.` and `..` by the letter, only to tell whether a symbolic link was involved.
fn without_dots(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part.as_os_str() {
            part if part == OsStr::from_bytes(b"..") => drop(clean.pop()),
            part => clean.push(part),
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_resolved_and_nested_paths_merged() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = fs::canonicalize(dir.path()).expect("real");
        fs::create_dir_all(root.join("data/home")).expect("made");
        std::os::unix::fs::symlink("data/home", root.join("home")).expect("made");
        let sources =
            resolve(&[root.join("home"), root.join("data/home/../home")]).expect("resolves");
        assert_eq!(sources.paths(), [root.join("data/home")]);
        assert_eq!(sources.notes.len(), 1, "{:?}", sources.notes);

        let sources = resolve(&[root.clone(), root.join("data")]).expect("resolves");
        assert_eq!(sources.paths(), [root]);
        assert_eq!(sources.notes.len(), 1);
    }

    #[test]
    fn a_missing_source_is_named() {
        let error = resolve(&["/nowhere/at/all".into()]).unwrap_err();
        assert!(
            error.report().contains("/nowhere/at/all"),
            "{}",
            error.report()
        );
        assert_eq!(resolve(&[]).unwrap_err().kind(), Kind::Usage);
    }
}
