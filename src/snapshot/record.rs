//! The completion record of a snapshot, `snapshots/<id>.json`. Fields are only ever added.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// The version this program writes.
pub const VERSION: u32 = 1;

/// At most this many failed paths are kept in a record; their count is always whole.
pub const ERRORS_KEPT: usize = 100;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub version: u32,
    pub id: String,
    /// Host name of the machine that was backed up.
    pub host: String,
    /// Full paths; a name that is not UTF-8 is shown with replacement characters.
    pub sources: Vec<String>,
    /// RFC 3339, UTC.
    pub started: String,
    pub finished: String,
    pub duration_seconds: f64,
    /// Everything in the tree: files, directories, links, devices.
    pub files: u64,
    /// Sum of the sizes of all regular files, bytes.
    pub bytes: u64,
    /// Regular files that were copied because no earlier snapshot had them.
    pub new_files: u64,
    /// Sum of their sizes, bytes.
    pub new_bytes: u64,
    pub rsync_exit_code: i32,
    /// How many messages rsync printed about paths that it could not read.
    pub error_count: u64,
    /// The first of them.
    pub errors: Vec<String>,
    pub program: String,
}

impl Record {
    /// Reads a record and checks that it belongs to the snapshot `id`.
    pub fn parse(bytes: &[u8], id: &str) -> Result<Self> {
        let damaged = |why: String| {
            Error::new(
                Kind::Corrupt,
                format!("the completion record of {id} is damaged: {why}"),
            )
        };
        let record: Record = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
        if record.id != id {
            return Err(damaged(format!("it names {}", record.id)));
        }
        Ok(record)
    }

    pub fn to_json(&self) -> Vec<u8> {
        // OK to unwrap: the record has only strings, numbers and lists of strings.
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        json
    }
}
