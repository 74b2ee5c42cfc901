//! Copies a tree out of a snapshot, as `cp -a` would, safely.
//!
//! [`copy`] walks a [`Source`] and writes below DEST. Into DEST when that is a directory, else as
//! DEST. A path that ends in `/.` or `/..`, and the root of the source, have no name of their own:
//! what is in them goes into DEST. What holds whatever the image contains and whatever happens:
//!
//! - Nothing is written outside DEST: every directory is opened beneath it, through no link.
//! - Nothing that exists is replaced without [`Overwrite::Always`], and then by one rename.
//!   Directories that exist are merged into, and take the source's owner, mode and times, as with
//!   `cp -a`; only DEST itself, if it was there before, stays as it is when it has no counterpart
//!   in the source. A directory never gives way to a file, nor a file to a directory.
//! - No file has its final name before it is whole, and a directory belongs to root alone until
//!   what is in it is there.
//! - One file that cannot be read or written costs that file: it is recorded and the rest goes on.
//!   A full disk, a dead link and a request to stop end the run.
//!
//! Names, kinds, owners by number, modes, extended attributes, ACLs, times, holes and hard links
//! (among the files of one call, or of those that share their [`HardLinks`]) are kept. Memory grows with the directories and with the files
//! that have more than one name in the image, by about 70 bytes each: in a snapshot nearly all of
//! them have.

mod apply;
mod copier;
mod descent;
mod ends;
mod hard_links;
mod mounted;
mod outcome;
mod source;
mod target;
mod unmounted;
mod verify;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::error::Result;
use crate::progress::Monitor;

pub use apply::Shortfall;
pub use ends::Landing;
pub use hard_links::HardLinks;
pub use mounted::{Footprint, MountedTree};
pub use outcome::{Failure, LISTED_MAX, Listed, Outcome};
pub use source::{Attribute, Content, Entry, FileKind, HERE, Metadata, Piece, Source, Time};
pub use target::TEMPORARY_PREFIX;
pub use unmounted::{
    Ahead, FileContent, Filesystem, Node, Plan, ROOT, Tree, Trouble, UnmountedTree, metadata,
};
pub use verify::verify;

/// What happens to a file that has the name of one that is restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// It stays, and is reported.
    #[default]
    Never,
    /// The restored one takes its place, at once and whole.
    Always,
    /// The same, unless it already is what it would become: of the same type, and of the same size
    /// and time, or with the same target, or the same device.
    IfChanged,
}

/// Whether a path below what is restored, without a slash at its beginning, is wanted. A directory
/// that is not takes all that is in it with it.
pub type Wants<'run> = &'run (dyn Fn(&[u8]) -> bool + 'run);

#[derive(Clone, Copy)]
pub struct Options<'run> {
    pub overwrite: Overwrite,
    /// Nothing: everything is wanted.
    pub wants: Option<Wants<'run>>,
    /// How much there is, where it is known: files, and bytes of content.
    pub totals: Option<(u64, u64)>,
    /// Looked at between files and between pieces of a file; `true` ends the run with
    /// [`Kind::Interrupted`](crate::error::Kind::Interrupted).
    pub stop: &'run AtomicBool,
}

/// Copies `from`, a path inside `source`, to `dest`, and syncs it to disk.
///
/// Symbolic links on the way to `from` are followed inside the source. `from` itself is not,
/// unless a slash ends it. An error means that the run has ended early: what is in place is whole,
/// and calling again takes the rest, with the same arguments, or with `from` and `/.` when the
/// first call has made `dest`. An outcome may have errors of its own:
/// files that are missing or not as they were.
pub fn copy(
    source: &mut dyn Source,
    from: &Path,
    dest: &Path,
    options: Options<'_>,
    monitor: &dyn Monitor,
) -> Result<Outcome> {
    copy_linking(
        source,
        from,
        dest,
        options,
        &mut HardLinks::default(),
        monitor,
    )
}

/// The same for one path of several, of one snapshot and for one DEST: files that share an inode
/// with one that an earlier call has restored become links to it.
pub fn copy_linking(
    source: &mut dyn Source,
    from: &Path,
    dest: &Path,
    options: Options<'_>,
    links: &mut HardLinks,
    monitor: &dyn Monitor,
) -> Result<Outcome> {
    copier::run(source, from, dest, options, links, monitor)
}
