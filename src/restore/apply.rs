//! Gives a new file or a finished directory its owner, attributes, mode and times.
//!
//! In this order: the owner first, because `chown(2)` clears setuid, setgid and file capabilities;
//! then the attributes, because an ACL sets mode bits; then the mode; the times last, because all
//! the others are changes. What is refused does not stop the rest.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;

use super::descent::show;
use super::source::{Attribute, FileKind, Metadata, Time};
use crate::error::{Attempt, Error, Result};

const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

const SETUID_SETGID: u32 = 0o6000;

/// What DEST or the user's privileges cannot hold, and `cp -a` passes over in silence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shortfall {
    /// Files whose owner or group stayed the user's own, who is not root; they lost setuid
    /// and setgid.
    pub owners: u64,
    /// Extended attributes and ACLs that only root may set, or that DEST's filesystem lacks.
    pub attributes: u64,
    /// Names that became a file of their own, because DEST's filesystem refused the hard link.
    pub hard_links: u64,
}

/// An inode to be dressed: by a descriptor, so that nobody can exchange it under its name.
#[derive(Clone, Copy)]
pub(super) enum Object<'fd> {
    /// A regular file or a directory.
    Open(BorrowedFd<'fd>),
    /// Anything else, opened with `O_PATH`: most calls take it only through `/proc`.
    Pinned(BorrowedFd<'fd>),
}

impl Object<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Object::Open(fd) | Object::Pinned(fd) => fd.as_fd(),
        }
    }

    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd().as_raw_fd())
    }

    fn set_attribute(&self, name: &[u8], value: &[u8]) -> rustix::io::Result<()> {
        match self {
            Object::Open(fd) => rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()),
            Object::Pinned(_) => {
                rustix::fs::setxattr(self.path(), name, value, XattrFlags::empty())
            }
        }
    }

    fn remove_attribute(&self, name: &[u8]) -> rustix::io::Result<()> {
        match self {
            Object::Open(fd) => rustix::fs::fremovexattr(fd, name),
            Object::Pinned(_) => rustix::fs::removexattr(self.path(), name),
        }
    }

    fn set_mode(&self, mode: Mode) -> rustix::io::Result<()> {
        match self {
            Object::Open(fd) => rustix::fs::fchmod(fd, mode),
            Object::Pinned(_) => rustix::fs::chmod(self.path(), mode),
        }
    }
}

/// Returns what went wrong; what is merely not to be had is counted in `shortfall`.
pub(super) fn apply(
    object: Object<'_>,
    metadata: &Metadata,
    attributes: &[Attribute],
    shortfall: &mut Shortfall,
) -> Vec<Error> {
    let mut errors = Vec::new();
    let mut mode = metadata.mode;
    let mut note = |result: Result<bool>| match result {
        Ok(done) => done,
        Err(error) => {
            errors.push(error);
            false
        }
    };
    let root = rustix::process::geteuid().is_root();
    if !note(set_owner(object, metadata, root, shortfall)) {
        mode &= !SETUID_SETGID;
    }
    for attribute in attributes {
        let set = note(set_attribute(object, attribute, root, shortfall));
        if !set && attribute.name == ACCESS_ACL {
            mode = without_acl(mode, &attribute.value);
        }
    }
    if metadata.kind != FileKind::Symlink {
        for name in [ACCESS_ACL, DEFAULT_ACL] {
            let inherits = name == ACCESS_ACL || metadata.kind == FileKind::Directory;
            if inherits && !attributes.iter().any(|attribute| attribute.name == name) {
                note(remove_inherited(object, name));
            }
        }
        let set = object.set_mode(Mode::from_raw_mode(mode));
        note(set.attempt(|| format!("set mode {mode:o}")).map(|()| true));
    }
    note(set_times(object, metadata).map(|()| true));
    errors
}

/// `Ok(false)`: the owner or the group is not the file's own.
fn set_owner(
    object: Object<'_>,
    metadata: &Metadata,
    root: bool,
    shortfall: &mut Shortfall,
) -> Result<bool> {
    let (uid, gid) = (metadata.uid, metadata.gid);
    let attempt = || format!("set owner {uid} and group {gid}");
    if uid == u32::MAX || gid == u32::MAX {
        // To the kernel it means "leave it as it is".
        return Err(Error::new(crate::error::Kind::Corrupt, attempt()));
    }
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    let set = |uid, gid| rustix::fs::chownat(object.fd(), "", uid, gid, AtFlags::EMPTY_PATH);
    match set(uid, gid) {
        Ok(()) => Ok(true),
        Err(Errno::PERM | Errno::INVAL) if !root => {
            shortfall.owners += 1;
            // A member of the group may still give the file to it; if not, so be it.
            let _ = set(None, gid);
            Ok(false)
        }
        Err(errno) => Err(errno).attempt(attempt),
    }
}

/// `Ok(false)`: the attribute is not to be had here.
fn set_attribute(
    object: Object<'_>,
    attribute: &Attribute,
    root: bool,
    shortfall: &mut Shortfall,
) -> Result<bool> {
    let Attribute { name, value } = attribute;
    let privileged = name.starts_with(b"security.") || name.starts_with(b"trusted.");
    match object.set_attribute(name, value) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP) => {
            shortfall.attributes += 1;
            Ok(false)
        }
        Err(Errno::PERM | Errno::ACCESS) if privileged && !root => {
            shortfall.attributes += 1;
            Ok(false)
        }
        Err(errno) => Err(errno).attempt(|| {
            let bytes = value.len();
            format!("set the extended attribute {} ({bytes} bytes)", show(name))
        }),
    }
}

/// A directory's default ACL becomes the ACL of what is made in it: not ours, so off with it.
fn remove_inherited(object: Object<'_>, name: &[u8]) -> Result<bool> {
    match object.remove_attribute(name) {
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(true),
        Err(errno) => Err(errno).attempt(|| "remove an ACL inherited from DEST"),
    }
}

/// With an ACL the group bits of the mode are the ACL's mask. Without it they are the group's own
/// rights, which must not become more than the ACL gave to the group (`acl(5)`, CORRESPONDENCE
/// BETWEEN ACL ENTRIES AND FILE PERMISSION BITS).
fn without_acl(mode: u32, acl: &[u8]) -> u32 {
    const VERSION_BYTES: usize = 4;
    const ENTRY_BYTES: usize = 8;
    const GROUP_OBJ: u8 = 0x04;
    let entries = acl.get(VERSION_BYTES..).unwrap_or_default();
    let group = entries
        .chunks_exact(ENTRY_BYTES)
        .find(|entry| entry[0] == GROUP_OBJ && entry[1] == 0)
        .map_or(0, |entry| u32::from(entry[2] & 0o7));
    mode & (!0o070 | group << 3)
}

fn set_times(object: Object<'_>, metadata: &Metadata) -> Result<()> {
    let timespec = |time: Time| Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    };
    let omit = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_OMIT,
    };
    let times = Timestamps {
        last_access: metadata.accessed.map_or(omit, timespec),
        last_modification: timespec(metadata.modified),
    };
    rustix::fs::utimensat(object.fd(), "", &times, AtFlags::EMPTY_PATH)
        .attempt(|| format!("set the time {}", metadata.modified.seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_acl_leaves_the_group_no_more_than_it_had() {
        // user::rwx, user:1000:rwx, group::r--, mask::rwx, other::---
        let mut acl = 2_u32.to_le_bytes().to_vec();
        for (tag, rights, id) in [
            (1_u16, 7_u16, u32::MAX),
            (2, 7, 1000),
            (4, 4, u32::MAX),
            (0x10, 7, u32::MAX),
            (0x20, 0, u32::MAX),
        ] {
            acl.extend(tag.to_le_bytes());
            acl.extend(rights.to_le_bytes());
            acl.extend(id.to_le_bytes());
        }
        assert_eq!(without_acl(0o4770, &acl), 0o4740);
        assert_eq!(without_acl(0o710, &acl), 0o700, "the mask still limits");
        assert_eq!(without_acl(0o770, b"short"), 0o700, "damaged: nothing");
    }
}
