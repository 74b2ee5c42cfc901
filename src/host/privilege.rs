//! What this process can mount with.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{major, minor};
use rustix::process::geteuid;
use rustix::thread::CapabilitySet;
use tracing::debug;

use super::tool::{Tool, find};

/// The device number of `/dev/fuse` (Linux, admin-guide/devices.txt).
const FUSE: (u32, u32) = (10, 229);

/// The way to a mounted filesystem that is open to this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Means {
    /// FUSE, a loop device and the kernel's ext4.
    Root,
    /// FUSE and fuse2fs in a user namespace.
    UserNamespace,
    /// None; `why` says in one sentence what is missing and what would help.
    None { why: String },
}

impl Means {
    /// Tries what can be tried without leaving a trace.
    pub fn of_this_process() -> Means {
        let found = match may_administer() {
            true => as_root(),
            false => as_user(),
        };
        match found {
            Ok(means) => means,
            Err(why) => Means::None { why },
        }
    }
}

fn may_administer() -> bool {
    let sets = rustix::thread::capabilities(None);
    let admin = sets.is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    admin && geteuid().is_root()
}

fn as_root() -> Result<Means, String> {
    fuse_opens()?;
    if !Path::new("/dev/loop-control").exists() {
        return Err("there is no /dev/loop-control: load the kernel module loop".into());
    }
    Ok(Means::Root)
}

fn as_user() -> Result<Means, String> {
    fuse_opens()?;
    if find("fuse2fs").is_none() {
        return Err("mounting needs root, or fuse2fs (package fuse2fs) installed".into());
    }
    // Some systems allow the namespace and then nothing in it, so the probe changes a mount too.
    let probe = Tool::new("unshare").args(["--user", "--map-root-user", "--mount", "true"]);
    match probe.run() {
        Ok(_) => Ok(Means::UserNamespace),
        Err(error) => {
            debug!(error = error.report(), "no user namespace");
            Err(
                "mounting needs root: this system does not allow unprivileged user namespaces"
                    .into(),
            )
        }
    }
}

fn fuse_opens() -> Result<(), String> {
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(file)
            if file
                .metadata()
                .is_ok_and(|about| (major(about.rdev()), minor(about.rdev())) == FUSE) =>
        {
            Ok(())
        }
        Err(error) if error.kind() != ErrorKind::NotFound => Err(format!(
            "mounting needs root: /dev/fuse does not open ({error})"
        )),
        _ => Err(
            "mounting needs root and FUSE, and there is no /dev/fuse: load the kernel module fuse"
                .into(),
        ),
    }
}

/// Tells the kernel that the calling thread, and threads that it starts later, serve a block
/// device: memory they allocate must not be waited for by writing to that same device
/// (`PR_SET_IO_FLUSHER` in `prctl(2)`). Needs `CAP_SYS_RESOURCE`; without it, nothing changes.
pub fn serve_block_device() {
    if let Err(errno) = rustix::process::configure_io_flusher_behavior(true) {
        debug!(%errno, "PR_SET_IO_FLUSHER is not allowed");
    }
}
