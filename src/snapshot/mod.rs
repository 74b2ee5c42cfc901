//! Snapshots inside a mounted filesystem: taking, listing and deleting them.
//!
//! ```text
//! latest -> snapshots/<id>      the newest complete one
//! snapshots/<id>/               a whole tree of the sources, by their full paths
//! snapshots/<id>.json           its completion record; without it the tree does not count
//! snapshots/<id>.pinned         an empty file: no policy deletes the snapshot
//! snapshots/<id>.inflight/      one that is running, or was interrupted
//! snapshots/<id>.deleting/      one that is no more, as far as it is not yet deleted
//! ```

mod caches;
mod catalogue;
mod check;
mod id;
mod prune;
mod record;
mod remove;
mod rsync;
mod sources;
mod take;
mod usage;

pub use catalogue::{Catalogue, Files, Found, MountedFiles};
pub use check::{Checked, Fault, check};
pub use id::Id;
pub use prune::{Deleted, Group, Grouping, Judged, delete, judge, pin};
pub use record::Record;
pub use rsync::Filters;
pub use sources::{Sources, resolve as resolve_sources};
pub use take::{Job, Outcome, take};
pub use usage::{Share, Usage, usage};

/// The directory of all snapshots, under the filesystem's root.
pub const DIRECTORY: &str = "snapshots";
/// The symbolic link to the newest complete snapshot, in the filesystem's root.
pub const LATEST: &str = "latest";
/// What the name of a tree ends in until it is published.
pub const INFLIGHT: &str = ".inflight";
/// What the name of a tree ends in from its deletion on.
pub const DELETING: &str = ".deleting";
/// What the name of a pin ends in.
pub const PIN: &str = ".pinned";
/// What the name of a completion record ends in.
pub const RECORD: &str = ".json";
