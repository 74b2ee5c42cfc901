//! The snapshots that a filesystem holds, complete ones and others.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use super::{DELETING, DIRECTORY, INFLIGHT, Id, PIN, RECORD, Record};
use crate::error::{Attempt, Error, Kind, Result};
use crate::restore::Filesystem;

/// As much of a filesystem as the catalogue needs. Paths are relative to its root.
pub trait Files {
    /// Names in a directory; none when it does not exist.
    fn names(&mut self, directory: &str) -> Result<Vec<Vec<u8>>>;
    /// A small file, whole.
    fn read(&mut self, path: &str) -> Result<Vec<u8>>;
}

/// A filesystem that is mounted.
pub struct MountedFiles(pub PathBuf);

impl Files for MountedFiles {
    fn names(&mut self, directory: &str) -> Result<Vec<Vec<u8>>> {
        let path = self.0.join(directory);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).attempt(|| format!("list {}", path.display())),
        };
        let names: io::Result<Vec<_>> = entries
            .map(|e| Ok(std::os::unix::ffi::OsStringExt::into_vec(e?.file_name())))
            .collect();
        names.attempt(|| format!("list {}", path.display()))
    }

    fn read(&mut self, path: &str) -> Result<Vec<u8>> {
        let path = self.0.join(path);
        fs::read(&path).attempt(|| format!("read {}", path.display()))
    }
}

/// A filesystem that is read without being mounted.
impl Files for Filesystem {
    fn names(&mut self, directory: &str) -> Result<Vec<Vec<u8>>> {
        self.names_in(directory)
    }

    fn read(&mut self, path: &str) -> Result<Vec<u8>> {
        self.read_small(path)
    }
}

/// A complete snapshot.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub id: Id,
    pub record: Record,
    /// No policy deletes it.
    pub pinned: bool,
}

/// What is there, oldest first.
#[derive(Debug, Default)]
pub struct Catalogue {
    pub complete: Vec<Found>,
    /// Interrupted, or running now.
    pub inflight: Vec<Id>,
    /// What is left of snapshots that were being deleted.
    pub deleting: Vec<Id>,
    /// Trees without a usable record, and records without a tree, with the reason.
    pub damaged: Vec<(Id, Error)>,
}

impl Catalogue {
    pub fn load(files: &mut dyn Files) -> Result<Self> {
        #[derive(Default)]
        struct Parts {
            tree: bool,
            record: bool,
            pin: bool,
        }
        let mut catalogue = Catalogue::default();
        let mut parts: BTreeMap<Id, Parts> = BTreeMap::new();
        for name in files.names(DIRECTORY)? {
            let Ok(name) = String::from_utf8(name) else {
                continue;
            };
            if let Ok(id) = name.parse() {
                parts.entry(id).or_default().tree = true;
            } else if let Some(Ok(id)) = name.strip_suffix(RECORD).map(str::parse) {
                parts.entry(id).or_default().record = true;
            } else if let Some(Ok(id)) = name.strip_suffix(INFLIGHT).map(str::parse) {
                catalogue.inflight.push(id);
            } else if let Some(Ok(id)) = name.strip_suffix(DELETING).map(str::parse) {
                catalogue.deleting.push(id);
            } else if let Some(Ok(id)) = name.strip_suffix(PIN).map(str::parse) {
                parts.entry(id).or_default().pin = true;
            }
        }
        catalogue.inflight.sort();
        catalogue.deleting.sort();
        for (id, parts) in parts {
            if !parts.tree {
                // A run that ended between writing its record and publishing its tree, or between
                // putting a tree aside and removing its record.
                let between = [&catalogue.inflight, &catalogue.deleting];
                if parts.record && !between.iter().any(|ids| ids.contains(&id)) {
                    let why = Error::new(Kind::Corrupt, format!("the tree of {id} is missing"));
                    catalogue.damaged.push((id, why));
                }
                continue;
            }
            let record = match parts.record {
                true => files
                    .read(&format!("{DIRECTORY}/{id}{RECORD}"))
                    .and_then(|bytes| Record::parse(&bytes, &id.to_string())),
                false => Err(Error::new(
                    Kind::Corrupt,
                    format!("the completion record of {id} is missing"),
                )),
            };
            match record {
                Ok(record) => catalogue.complete.push(Found {
                    id,
                    record,
                    pinned: parts.pin,
                }),
                Err(why) => catalogue.damaged.push((id, why)),
            }
        }
        Ok(catalogue)
    }

    /// The newest complete snapshot.
    pub fn latest(&self) -> Option<&Found> {
        self.complete.last()
    }

    /// The newest id in use by anything, complete or not.
    pub fn newest_id(&self) -> Option<Id> {
        let complete = self.complete.iter().map(|f| f.id);
        complete
            .chain(self.inflight.iter().copied())
            .chain(self.deleting.iter().copied())
            .chain(self.damaged.iter().map(|d| d.0))
            .max()
    }

    /// Finds a complete snapshot by id, unique prefix of an id, or `latest`.
    pub fn find(&self, name: &str) -> Result<&Found> {
        let none = |why: String| Error::new(Kind::NotFound, why);
        if name == super::LATEST {
            return self
                .latest()
                .ok_or_else(|| none("there is no complete snapshot yet".into()));
        }
        let matching: Vec<&Found> = self
            .complete
            .iter()
            .filter(|f| !name.is_empty() && f.id.to_string().starts_with(name))
            .collect();
        match matching[..] {
            [one] => Ok(one),
            [] => {
                let error = none(format!("no complete snapshot is named `{name}`"));
                let is_latest = !name.is_empty() && super::LATEST.starts_with(name);
                Err(match self.nearest(name) {
                    Some(_) if is_latest => error.hint("write `latest` in full"),
                    Some(near) => error.hint(format!("the nearest in time is {near}")),
                    None => error.hint("there is no complete snapshot yet"),
                })
            }
            [first, .., last] => Err(Error::new(
                Kind::Usage,
                format!(
                    "`{name}` is the beginning of {} snapshots, {} to {}",
                    matching.len(),
                    first.id,
                    last.id
                ),
            )
            .hint("give more of the id")),
        }
    }

    /// The complete snapshot whose id has the longest beginning in common with `name`.
    fn nearest(&self, name: &str) -> Option<Id> {
        let common = |id: Id| {
            id.to_string()
                .bytes()
                .zip(name.bytes())
                .take_while(|(a, b)| a == b)
                .count()
        };
        self.complete
            .iter()
            .map(|f| f.id)
            .max_by_key(|id| (common(*id), *id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake(BTreeMap<&'static str, &'static str>);

    impl Files for Fake {
        fn names(&mut self, directory: &str) -> Result<Vec<Vec<u8>>> {
            assert_eq!(directory, DIRECTORY);
            Ok(self.0.keys().map(|k| k.as_bytes().to_vec()).collect())
        }
        fn read(&mut self, path: &str) -> Result<Vec<u8>> {
            let name = path.strip_prefix("snapshots/").expect("below snapshots");
            let id = name.strip_suffix(RECORD).expect("a record");
            Ok(match self.0[name] {
                "good" => record(id).to_json(),
                other => other.as_bytes().to_vec(),
            })
        }
    }

    fn record(id: &str) -> Record {
        Record {
            version: 1,
            id: id.into(),
            host: "laptop".into(),
            sources: vec!["/home".into()],
            started: String::new(),
            finished: String::new(),
            duration_seconds: 1.5,
            files: 3,
            bytes: 10,
            new_files: 1,
            new_bytes: 5,
            rsync_exit_code: 0,
            error_count: 0,
            errors: vec![],
            program: "e2ebak".into(),
        }
    }

    fn catalogue() -> Catalogue {
        let files = [
            ("2026-11-20T01-00-00Z", ""),
            ("2026-11-20T01-00-00Z.json", "good"),
            ("2026-11-21T01-00-00Z", ""),
            ("2026-11-21T01-00-00Z.json", "good"),
            ("2026-11-22T01-00-00Z", ""),
            ("2026-11-22T01-00-00Z.json", "{ not json"),
            ("2026-11-23T01-00-00Z", ""),
            ("2026-11-24T01-00-00Z.inflight", ""),
            ("2026-11-24T01-00-00Z.json", "good"),
            ("2026-11-19T01-00-00Z.deleting", ""),
            ("2026-11-19T01-00-00Z.json", "good"),
            ("2026-11-18T01-00-00Z.pinned", ""),
            ("2026-11-20T01-00-00Z.pinned", ""),
            ("notes.txt", ""),
        ];
        Catalogue::load(&mut Fake(files.into_iter().collect())).expect("loads")
    }

    #[test]
    fn only_a_tree_with_a_good_record_is_complete() {
        let catalogue = catalogue();
        let ids: Vec<_> = catalogue
            .complete
            .iter()
            .map(|f| f.id.to_string())
            .collect();
        assert_eq!(ids, ["2026-11-20T01-00-00Z", "2026-11-21T01-00-00Z"]);
        assert_eq!(catalogue.damaged.len(), 2, "{:?}", catalogue.damaged);
        assert_eq!(catalogue.inflight.len(), 1);
        assert_eq!(catalogue.deleting.len(), 1);
        let pins: Vec<_> = catalogue.complete.iter().map(|f| f.pinned).collect();
        assert_eq!(pins, [true, false]);
        assert_eq!(
            catalogue.newest_id().expect("some").to_string(),
            "2026-11-24T01-00-00Z"
        );
    }

    #[test]
    fn a_snapshot_is_found_by_id_prefix_or_latest() {
        let catalogue = catalogue();
        assert_eq!(
            catalogue.find("latest").expect("found").id.to_string(),
            "2026-11-21T01-00-00Z"
        );
        assert_eq!(
            catalogue.find("2026-11-20").expect("found").id.to_string(),
            "2026-11-20T01-00-00Z"
        );
        assert_eq!(catalogue.find("2026-11").unwrap_err().kind(), Kind::Usage);
        assert_eq!(catalogue.find("").unwrap_err().kind(), Kind::NotFound);
        let missing = catalogue.find("2026-11-21T02").unwrap_err();
        assert_eq!(missing.kind(), Kind::NotFound);
        assert!(
            missing.report().contains("2026-11-21T01-00-00Z"),
            "{}",
            missing.report()
        );
    }
}
