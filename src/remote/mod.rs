//! A location as a [`Device`], and the small files beside it.

pub mod engine; //     the SFTP client over one stream: many requests in flight
mod files; //          what can be done to files of an SFTP server
mod growth; //         how many sessions a link asks for
pub mod lanes; //      the sessions with one server: which carries what, and anew when one breaks
pub mod lean_copy; //  a sparse copy made by the server takes the place of the image
pub mod lease; //      who may write
pub mod local; //      a file here
mod packets; //        packets onto a stream and off it
pub mod redial; //     an image over sessions that may break
pub mod sftp_store; // a file behind SFTP
mod transfer; //       reads and writes of any length, cut into chunks
mod unsynced; //       what was written since the last flush
mod verdict; //        what a reply means

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::device::Device;
use crate::error::{Error, Kind, Result, Told};
use crate::link::Dial;
use crate::location::{Location, Server};

use engine::Bounds;
use local::LocalStore;
use sftp_store::SftpStore;

/// How an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// Room on the filesystem that holds the image, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// What an unprivileged user may still write.
    pub free: u64,
    pub total: u64,
}

/// Bytes that have crossed the link since it was dialled, SFTP framing included, SSH's not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub sent: u64,
    pub received: u64,
}

/// How the link is.
#[derive(Clone, Debug)]
pub enum Link {
    Up {
        sessions: usize,
    },
    /// It broke, and is being dialled again.
    Down {
        since: Duration,
        /// Dials that have failed.
        attempts: u32,
        why: Told,
    },
    /// It broke for good: everything fails with this.
    Over(Told),
}

impl Link {
    pub fn is_over(&self) -> bool {
        matches!(self, Link::Over(_))
    }
}

/// What the link has shown of itself.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub round_trip: Duration,
    /// While it was full; 0 if it never was.
    pub bytes_per_second: u64,
}

/// The longest side file, in bytes.
pub const SIDE_MAX: usize = 64 << 10;

/// One image at one location, with the side files that belong to it. A side file is named by the
/// suffix it adds to the image's name, is at most [`SIDE_MAX`] bytes long, and is read and written
/// whole.
pub trait Store: Send + Sync {
    /// Opens the image. [`Kind::NoImage`] when there is none,
    /// [`Kind::ReadOnly`] when it can be read but not written.
    fn open(&self, access: Access) -> Result<Arc<dyn Device>>;

    /// Creates the image, sparse, `size` bytes long. [`Kind::Exists`]
    /// when anything is there, which then stays untouched.
    fn create(&self, size: u64) -> Result<Arc<dyn Device>>;

    /// Removes the image. [`Kind::NoImage`] when there is none.
    fn remove(&self) -> Result<()>;

    /// Creates a side file that must not exist yet, and syncs it where that is possible.
    /// [`Kind::Exists`] when it does. Out of many that try at once,
    /// one succeeds.
    ///
    /// Where hard links are possible the file appears with its whole content; else a reader may
    /// see it empty for a moment.
    fn create_side(&self, suffix: &str, content: &[u8]) -> Result<()>;

    /// `None` when there is no such side file.
    fn read_side(&self, suffix: &str) -> Result<Option<Vec<u8>>>;

    /// Replaces a side file by an atomic rename, or makes it. A server that cannot rename over a
    /// file has it overwritten in place: it never disappears, but a reader may see part of both,
    /// unless both are equally long and at most a few KiB.
    fn replace_side(&self, suffix: &str, content: &[u8]) -> Result<()>;

    /// Removing what is not there is no error.
    fn remove_side(&self, suffix: &str) -> Result<()>;

    /// Bytes that the image takes on its filesystem; `None` when the server does not tell.
    fn stored(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Has the server copy these ranges of the image into a fresh sparse file, which then takes the
    /// place of the image: what lies between them becomes a hole. No data cross the link. The image
    /// must not be open for writing, and the lease must be held.
    ///
    /// [`Kind::Unsupported`] where the server cannot; then, as after any other error, the image is
    /// what it was.
    fn copy_lean(&self, plan: &lean_copy::Plan<'_>) -> Result<()> {
        let _ = plan;
        Err(Error::new(Kind::Unsupported, "the image is a local file"))
    }

    /// Where the image holds something, ascending: the rest are holes. `None` when that is not known.
    fn data_ranges(&self) -> Result<Option<Vec<Range<u64>>>> {
        Ok(None)
    }

    /// The file beside this one with `suffix` added to its name, as an image of its own. What both
    /// send goes over the same sessions.
    fn beside(&self, suffix: &str) -> Result<Arc<dyn Store>> {
        let why = format!("there is nothing beside this image, nor {suffix}");
        Err(Error::new(Kind::Unsupported, why))
    }

    /// Gives the file with the suffix `from` the name with the suffix `to` (none is the image
    /// itself), in place of what has that name. When this returns the name is on stable storage.
    ///
    /// [`Kind::NotFound`] when there is no such file. On a server that cannot rename over a file,
    /// neither has the name for a moment.
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let why = format!("rename {from} to {to}");
        Err(Error::new(Kind::Unsupported, why))
    }

    /// `None` when the server does not tell.
    fn space(&self) -> Result<Option<Space>>;

    fn traffic(&self) -> Traffic;

    /// Never anything but up where there is no link.
    fn link(&self) -> Link {
        Link::Up { sessions: 0 }
    }

    /// `None` where nothing was measured.
    fn measured(&self) -> Option<Measured> {
        None
    }

    /// Says whose lease the image is used under: after a break it must still be there. `None` ends
    /// that.
    fn use_lease(&self, _nonce: Option<&str>) {}

    /// Waits until no write of a connection that broke can reach the image any more; call it after
    /// the last flush. `tell` hears, about every second, how long that will take yet.
    fn settle(&self, _tell: &dyn Fn(Duration)) -> Result<()> {
        Ok(())
    }
}

/// The store at a location. `dialler` is asked how to reach a server; a local path needs none.
pub fn connect(
    location: &Location,
    dialler: impl FnOnce(&Server) -> Result<Arc<dyn Dial>>,
    bounds: Bounds,
) -> Result<Arc<dyn Store>> {
    match location {
        Location::Local(path) => Ok(Arc::new(LocalStore::new(path))),
        Location::Sftp(server, path) => {
            let dial = dialler(server)?;
            let store = SftpStore::connect(dial, path, &location.to_string(), bounds)?;
            Ok(Arc::new(store))
        }
    }
}

/// A name for a file that is about to be renamed or linked to its own, beside it.
fn passing_suffix(suffix: &str) -> String {
    format!("{suffix}.{}.new", uuid::Uuid::new_v4().simple())
}

fn check_side(content: &[u8]) -> Result<()> {
    match content.len() {
        ..=SIDE_MAX => Ok(()),
        len => Err(Error::new(
            Kind::Usage,
            format!("{len} bytes are too long for a side file, {SIDE_MAX} is the most"),
        )),
    }
}
