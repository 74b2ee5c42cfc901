//! What a restore did, and what it could not do.

use std::path::PathBuf;

use super::apply::Shortfall;
use super::ends::Landing;
use crate::error::Error;

/// So many paths of a kind are kept; beyond that they are only counted.
pub const LISTED_MAX: usize = 1000;

/// The first [`LISTED_MAX`] of something, and how many there were.
#[derive(Debug)]
pub struct Listed<T> {
    listed: Vec<T>,
    count: u64,
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Listed {
            listed: Vec::new(),
            count: 0,
        }
    }
}

impl<T> Listed<T> {
    /// The first of them, in the order in which they were met.
    pub fn listed(&self) -> &[T] {
        &self.listed
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Returns whether it was kept.
    pub(super) fn add(&mut self, item: T) -> bool {
        self.count += 1;
        let room = self.listed.len() < LISTED_MAX;
        if room {
            self.listed.push(item);
        }
        room
    }
}

/// One file that is missing, or not in every respect what it was. Those that are listed were told
/// to the monitor as warnings when they were met.
#[derive(Debug)]
pub struct Failure {
    /// Its path in the source.
    pub path: PathBuf,
    pub error: Error,
}

/// What a restore did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Where it is; [`verify`](super::verify()) wants to know.
    pub landing: Landing,
    /// Names put in place that are no directories; each name of a hard link counts.
    pub files: u64,
    /// Directories made or merged into.
    pub directories: u64,
    /// Bytes of file content written, without holes.
    pub bytes: u64,
    /// Files that were there before and are what they would have become
    /// ([`Overwrite::IfChanged`](super::Overwrite::IfChanged)).
    pub unchanged: u64,
    /// Paths below DEST that were there before and stayed.
    pub skipped_existing: Listed<PathBuf>,
    pub errors: Listed<Failure>,
    /// What DEST or the user's privileges could not hold. Not errors: a copy is what was asked for.
    pub shortfall: Shortfall,
}
