//! Where a restore reads from: a cursor that stands in one directory of a tree.
//!
//! A cursor, not paths, so that neither the depth of the tree nor the length of a path has a
//! limit, and so that a reader without paths (inode by inode) and one with file descriptors
//! can both be one.

use crate::error::Result;

/// The name under which a cursor's own directory is asked for.
pub const HERE: &[u8] = b".";

/// The types of files that `inode(7)` knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    Regular,
    Directory,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
}

/// One name in a directory. The name is whatever the directory holds, so it may be none at all:
/// the reader of a damaged image passes it on, and the copier refuses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: Vec<u8>,
    /// `None` where the directory does not tell.
    pub kind: Option<FileKind>,
    pub inode: u64,
}

/// Sorts what is in a directory for who takes the last one next: in the order of the inodes, as the
/// inode tables are read from the server.
pub fn sort_for_popping(entries: &mut [Entry]) {
    entries.sort_unstable_by_key(|entry| std::cmp::Reverse(entry.inode));
}

/// A point in time: seconds since 1970 (negative before), and nanoseconds after that second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// What an inode says of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    pub kind: FileKind,
    /// Permission bits with setuid, setgid and sticky: at most `0o7777`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    pub modified: Time,
    pub accessed: Option<Time>,
    /// Major and minor number of a device file, else zeros.
    pub device: (u32, u32),
    /// Names that the inode has in the whole filesystem.
    pub links: u32,
    /// Which inode it is: the same number for every name of it.
    pub inode: u64,
}

/// One extended attribute. POSIX ACLs are attributes too (`system.posix_acl_access`,
/// `system.posix_acl_default`), their values as Linux passes them (`linux/posix_acl_xattr.h`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    pub name: Vec<u8>,
    pub value: Vec<u8>,
}

/// The next run of bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// So many bytes, more than none, are in the buffer.
    Data(usize),
    /// So many bytes were never written.
    Hole(u64),
    End,
}

/// The bytes of one regular file, in order. The pieces up to [`Piece::End`] add up to its size.
pub trait Content {
    fn next(&mut self, buf: &mut [u8]) -> Result<Piece>;
}

/// A tree of files to read from. Names are looked up in the directory where the cursor stands, and
/// a symbolic link is never followed but by [`Source::go`].
pub trait Source {
    /// Puts the cursor into the directory at `path`, counted from the root of the tree. Symbolic
    /// links on the way are followed, inside the tree only: its root is their `/`, and `..` at the
    /// root stays there.
    fn go(&mut self, path: &[u8]) -> Result<()>;

    /// Moves the cursor into the directory `name`.
    fn enter(&mut self, name: &[u8]) -> Result<()>;

    /// Moves the cursor back to where the last [`Source::enter`] came from.
    fn leave(&mut self) -> Result<()>;

    /// The names in the cursor's directory, without `.` and `..`.
    fn list(&mut self) -> Result<Vec<Entry>>;

    fn metadata(&mut self, name: &[u8]) -> Result<Metadata>;

    fn read_link(&mut self, name: &[u8]) -> Result<Vec<u8>>;

    fn attributes(&mut self, name: &[u8]) -> Result<Vec<Attribute>>;

    /// Opens a regular file.
    fn open(&mut self, name: &[u8]) -> Result<Box<dyn Content + '_>>;

    /// The device number of the tree's filesystem, if it is mounted: the copier then recognises
    /// a DEST that lies inside the tree.
    fn device(&self) -> Option<u64> {
        None
    }
}
