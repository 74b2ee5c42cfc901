//! A location as a [`Device`], and the small files beside it.

use std::sync::Arc;

use crate::device::Device;
use crate::error::Result;

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

/// One image at one location, with the side files that belong to it. A side file is named by the
/// suffix it adds to the image's name, is at most 64 KiB, and is read and written whole.
pub trait Store: Send + Sync {
    /// Opens the image. [`Kind::NoImage`](crate::error::Kind::NoImage) when there is none.
    fn open(&self, access: Access) -> Result<Arc<dyn Device>>;

    /// Creates the image, sparse, `size` bytes long. [`Kind::Exists`](crate::error::Kind::Exists)
    /// when anything is there, which then stays untouched.
    fn create(&self, size: u64) -> Result<Arc<dyn Device>>;

    /// Removes the image.
    fn remove(&self) -> Result<()>;

    /// Creates a side file that must not exist yet (`O_EXCL`), and syncs it where that is possible.
    fn create_side(&self, suffix: &str, content: &[u8]) -> Result<()>;

    /// `None` when there is no such side file.
    fn read_side(&self, suffix: &str) -> Result<Option<Vec<u8>>>;

    /// Replaces a side file by an atomic rename.
    fn replace_side(&self, suffix: &str, content: &[u8]) -> Result<()>;

    /// Removing what is not there is no error.
    fn remove_side(&self, suffix: &str) -> Result<()>;

    /// `None` when the server does not tell.
    fn space(&self) -> Result<Option<Space>>;

    fn traffic(&self) -> Traffic;
}
