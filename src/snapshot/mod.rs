//! Snapshots inside a mounted filesystem: taking and listing them.
//!
//! ```text
//! latest -> snapshots/<id>      the newest complete one
//! snapshots/<id>/               a whole tree of the sources, by their full paths
//! snapshots/<id>.json           its completion record; without it the tree does not count
//! snapshots/<id>.inflight/      one that is running, or was interrupted
//! ```

mod caches;
mod catalogue;
mod id;
mod record;
mod rsync;
mod sources;
mod take;

pub use catalogue::{Catalogue, Files, Found, MountedFiles};
pub use id::Id;
pub use record::Record;
pub use rsync::Filters;
pub use sources::{Sources, resolve as resolve_sources};
pub use take::{Job, Outcome, take};

/// The directory of all snapshots, under the filesystem's root.
pub const DIRECTORY: &str = "snapshots";
/// The symbolic link to the newest complete snapshot, in the filesystem's root.
pub const LATEST: &str = "latest";
/// What the name of a tree ends in until it is published.
pub const INFLIGHT: &str = ".inflight";
/// What the name of a completion record ends in.
pub const RECORD: &str = ".json";
