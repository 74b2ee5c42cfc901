//! What OpenSSH added to version 3 (its file `PROTOCOL`, sections 4.3 to 4.10).
//!
//! A server lists its extensions, each with a version, in its first packet; a client uses one only
//! if name and version are the ones it knows.

use super::wire::{Fields, Malformed, put_string, put_u64};

/// An extension known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Extension {
    /// Rename over an existing file, as `rename(2)` does.
    PosixRename,
    /// Room on the filesystem of a path.
    StatVfs,
    Hardlink,
    Fsync,
    /// How long packets, reads and writes may be.
    Limits,
    /// `~user/` in paths.
    ExpandPath,
    /// The server copies from one open file to another.
    CopyData,
}

impl Extension {
    pub const ALL: [Extension; 7] = [
        Extension::PosixRename,
        Extension::StatVfs,
        Extension::Hardlink,
        Extension::Fsync,
        Extension::Limits,
        Extension::ExpandPath,
        Extension::CopyData,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Extension::PosixRename => "posix-rename@openssh.com",
            Extension::StatVfs => "statvfs@openssh.com",
            Extension::Hardlink => "hardlink@openssh.com",
            Extension::Fsync => "fsync@openssh.com",
            Extension::Limits => "limits@openssh.com",
            Extension::ExpandPath => "expand-path@openssh.com",
            Extension::CopyData => "copy-data",
        }
    }

    pub fn version(self) -> &'static str {
        match self {
            Extension::StatVfs => "2",
            _ => "1",
        }
    }
}

/// The extensions that a server has listed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions(u8);

impl Extensions {
    fn bit(extension: Extension) -> u8 {
        1 << extension as u8
    }

    pub fn has(self, extension: Extension) -> bool {
        self.0 & Self::bit(extension) != 0
    }

    /// Takes one line of the server's list; what is not known here is passed over.
    pub fn list(&mut self, name: &[u8], version: &[u8]) {
        let known = Extension::ALL
            .into_iter()
            .find(|e| e.name().as_bytes() == name && e.version().as_bytes() == version);
        if let Some(extension) = known {
            self.0 |= Self::bit(extension);
        }
    }
}

/// An extended request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extended<'a> {
    /// Answered by a status.
    PosixRename {
        from: &'a [u8],
        to: &'a [u8],
    },
    /// Answered by an extended reply: [`StatVfs`].
    StatVfs {
        path: &'a [u8],
    },
    /// Answered by a status, as are the next ones.
    Hardlink {
        from: &'a [u8],
        to: &'a [u8],
    },
    Fsync {
        handle: &'a [u8],
    },
    /// Answered by an extended reply: [`Limits`].
    Limits,
    /// Answered by one name.
    ExpandPath {
        path: &'a [u8],
    },
    /// Answered by a status. A `len` of 0 copies to the end of the file read.
    CopyData {
        from: &'a [u8],
        from_offset: u64,
        len: u64,
        to: &'a [u8],
        to_offset: u64,
    },
    /// A request that is not known here.
    Other {
        name: &'a [u8],
        data: &'a [u8],
    },
}

impl<'a> Extended<'a> {
    pub fn name(&self) -> &'a [u8] {
        match self {
            Extended::PosixRename { .. } => Extension::PosixRename.name().as_bytes(),
            Extended::StatVfs { .. } => Extension::StatVfs.name().as_bytes(),
            Extended::Hardlink { .. } => Extension::Hardlink.name().as_bytes(),
            Extended::Fsync { .. } => Extension::Fsync.name().as_bytes(),
            Extended::Limits => Extension::Limits.name().as_bytes(),
            Extended::ExpandPath { .. } => Extension::ExpandPath.name().as_bytes(),
            Extended::CopyData { .. } => Extension::CopyData.name().as_bytes(),
            Extended::Other { name, .. } => name,
        }
    }

    pub(super) fn decode(fields: &mut Fields<'a>) -> Result<Self, Malformed> {
        let name = fields.string()?;
        let known = Extension::ALL
            .into_iter()
            .find(|e| e.name().as_bytes() == name);
        Ok(match known {
            Some(Extension::PosixRename) => Extended::PosixRename {
                from: fields.string()?,
                to: fields.string()?,
            },
            Some(Extension::StatVfs) => Extended::StatVfs {
                path: fields.string()?,
            },
            Some(Extension::Hardlink) => Extended::Hardlink {
                from: fields.string()?,
                to: fields.string()?,
            },
            Some(Extension::Fsync) => Extended::Fsync {
                handle: fields.string()?,
            },
            Some(Extension::Limits) => Extended::Limits,
            Some(Extension::ExpandPath) => Extended::ExpandPath {
                path: fields.string()?,
            },
            Some(Extension::CopyData) => Extended::CopyData {
                from: fields.string()?,
                from_offset: fields.u64()?,
                len: fields.u64()?,
                to: fields.string()?,
                to_offset: fields.u64()?,
            },
            None => Extended::Other {
                name,
                data: fields.rest(),
            },
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), Malformed> {
        put_string(out, self.name())?;
        match *self {
            Extended::PosixRename { from, to } | Extended::Hardlink { from, to } => {
                put_string(out, from)?;
                put_string(out, to)?;
            }
            Extended::StatVfs { path } | Extended::ExpandPath { path } => put_string(out, path)?,
            Extended::Fsync { handle } => put_string(out, handle)?,
            Extended::Limits => {}
            Extended::CopyData {
                from,
                from_offset,
                len,
                to,
                to_offset,
            } => {
                put_string(out, from)?;
                put_u64(out, from_offset);
                put_u64(out, len);
                put_string(out, to)?;
                put_u64(out, to_offset);
            }
            Extended::Other { data, .. } => out.extend_from_slice(data),
        }
        Ok(())
    }
}

/// What a server takes, in bytes; 0 where it does not tell (section 4.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub packet: u64,
    pub read: u64,
    pub write: u64,
    /// Handles open at the same time.
    pub open_handles: u64,
}

impl Limits {
    pub fn decode(data: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(data);
        Ok(Limits {
            packet: fields.u64()?,
            read: fields.u64()?,
            write: fields.u64()?,
            open_handles: fields.u64()?,
        })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        for value in [self.packet, self.read, self.write, self.open_handles] {
            put_u64(&mut out, value);
        }
        out
    }
}

/// Room on a filesystem; the fields are those of `statvfs(3)` (section 4.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatVfs {
    pub block_size: u64,
    /// Bytes in one unit of the next three.
    pub fragment_size: u64,
    pub blocks: u64,
    pub blocks_free: u64,
    /// Free for those who are not root.
    pub blocks_available: u64,
    pub files: u64,
    pub files_free: u64,
    pub files_available: u64,
    pub filesystem_id: u64,
    /// 1: read-only, 2: no set-user-ID.
    pub flags: u64,
    pub name_max: u64,
}

impl StatVfs {
    pub fn decode(data: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(data);
        Ok(StatVfs {
            block_size: fields.u64()?,
            fragment_size: fields.u64()?,
            blocks: fields.u64()?,
            blocks_free: fields.u64()?,
            blocks_available: fields.u64()?,
            files: fields.u64()?,
            files_free: fields.u64()?,
            files_available: fields.u64()?,
            filesystem_id: fields.u64()?,
            flags: fields.u64()?,
            name_max: fields.u64()?,
        })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(88);
        for value in [
            self.block_size,
            self.fragment_size,
            self.blocks,
            self.blocks_free,
            self.blocks_available,
            self.files,
            self.files_free,
            self.files_available,
            self.filesystem_id,
            self.flags,
            self.name_max,
        ] {
            put_u64(&mut out, value);
        }
        out
    }

    /// Bytes that an unprivileged user may still write.
    pub fn bytes_available(&self) -> u64 {
        self.fragment_size.saturating_mul(self.blocks_available)
    }

    pub fn bytes_total(&self) -> u64 {
        self.fragment_size.saturating_mul(self.blocks)
    }
}
