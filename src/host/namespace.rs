//! Where mounts are made: a mount namespace of our own, in which nothing is left behind.
//!
//! A private namespace lives as long as its last process. When the session is killed, however
//! that happens, the kernel takes down the filesystem, the loop device and the FUSE mount with it.
//! Mounts in it are *slaves* of the host's: what the host unmounts goes here too, so a USB disk
//! can still be taken out while a backup runs; what we mount is seen by nobody else.
//!
//! An ordinary user gets the same out of a user namespace that maps nothing but himself. There
//! he holds `CAP_SYS_ADMIN` over the new mount namespace, which is enough for FUSE and tmpfs, and
//! not for loop devices.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, getegid, geteuid};
use rustix::thread::{CapabilitySet, UnshareFlags};
use serde::{Deserialize, Serialize};

use super::view::{Door, View};
use crate::error::{Attempt, Error, Kind, Result};

/// The directory for sockets and mountpoints: `/run/e2ebak` for root, `$XDG_RUNTIME_DIR/e2ebak`
/// or `/tmp/e2ebak-<uid>` for others. Created if need be; it belongs to the caller alone.
///
/// # Errors
/// [`Kind::Denied`] when something else, or somebody else's, is in its place.
pub fn runtime_directory() -> Result<PathBuf> {
    let user = geteuid();
    let directory = match std::env::var_os("XDG_RUNTIME_DIR") {
        _ if user.is_root() => PathBuf::from("/run/e2ebak"),
        Some(base) if Path::new(&base).is_absolute() => PathBuf::from(base).join("e2ebak"),
        _ => PathBuf::from(format!("/tmp/e2ebak-{}", user.as_raw())),
    };
    make_own(&directory, user.as_raw())?;
    Ok(directory)
}

/// Creates `directory` with mode 0700, or proves that it is such a one already.
fn make_own(directory: &Path, user: u32) -> Result<()> {
    let shown = directory.display();
    match DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).attempt(|| format!("create {shown}")),
    }
    // Not followed: in /tmp anybody could have put a link there.
    let about = fs::symlink_metadata(directory).attempt(|| format!("look at {shown}"))?;
    if !about.is_dir() || about.uid() != user || about.mode() & 0o077 != 0 {
        return Err(Error::new(
            Kind::Denied,
            format!("{shown} is not a directory that belongs to user {user} alone"),
        ));
    }
    Ok(())
}

/// A mount namespace that this process has moved into, for a session that is started in it or,
/// where that is possible, outside of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Private {
    directory: PathBuf,
    /// How others act inside.
    view: View,
    /// For a child that shall start where this process came from.
    #[serde(skip)]
    way_back: Option<Arc<Door>>,
}

impl Private {
    /// The runtime directory inside, a tmpfs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// How the process that is started on the way back acts inside; [`View::Own`] without one.
    pub fn view(&self) -> View {
        self.view
    }

    /// The way to where this process was before. An ordinary user has none: out of his user
    /// namespace he may not go.
    pub fn way_back(&self) -> Option<Arc<Door>> {
        self.way_back.clone()
    }
}

/// Moves this process into a mount namespace of its own. The runtime directory in it is an empty
/// tmpfs.
///
/// `let_go` are mountpoints that end in the new namespace: what is mounted there would else stay in
/// use until this process ends, on a host whose mounts are not shared (mount_namespaces(7)).
///
/// Call it first of all: the process must still have a single thread, since a namespace belongs to
/// a thread and other threads would stay outside.
///
/// # Errors
/// [`Kind::Denied`] when the system does not allow it; [`Kind::Usage`] with other threads running.
pub fn enter_private(let_go: &[PathBuf]) -> Result<Private> {
    let threads = fs::read_dir("/proc/self/task").map(Iterator::count);
    match threads.attempt(|| "count the threads in /proc/self/task")? {
        1 => {}
        count => {
            return Err(Error::new(
                Kind::Usage,
                format!("a mount namespace can only be entered by a single thread, not {count}"),
            ));
        }
    }
    let directory = runtime_directory()?;
    let way_back = match may_return() {
        true => Some(Arc::new(Door::here()?)),
        false => None,
    };
    match geteuid().is_root() {
        true => unshare(UnshareFlags::NEWNS).attempt(|| "make a private mount namespace")?,
        false => enter_user_namespace()?,
    }
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM,
    )
    .attempt(|| "keep new mounts from the host's view")?;
    for mountpoint in let_go {
        // One that has ended meanwhile is as good.
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        let _ = rustix::mount::unmount(mountpoint, flags);
    }
    // Room for mountpoints and sockets, and not enough to fill memory by mistake.
    rustix::mount::mount(
        "tmpfs",
        &directory,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        Some(c"mode=0700,size=4m"),
    )
    .attempt(|| format!("mount a tmpfs on {}", directory.display()))?;
    Ok(Private {
        directory,
        view: match way_back {
            Some(_) => View::Of(std::process::id()),
            None => View::Own,
        },
        way_back,
    })
}

/// What setns(2) and chroot(2) ask for.
fn may_return() -> bool {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT;
    let sets = rustix::thread::capabilities(None);
    geteuid().is_root() && sets.is_ok_and(|sets| sets.effective.contains(needed))
}

/// A user namespace in which the caller is himself and nobody else exists, and a mount namespace
/// that it owns. Children keep `CAP_SYS_ADMIN` over it through the ambient set (`capabilities(7)`):
/// a user other than 0 would lose it at exec.
fn enter_user_namespace() -> Result<()> {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS)
        .map_err(|errno| Error::from(errno).of_kind(Kind::Denied))
        .attempt(|| "make a user and mount namespace")
        .map_err(|error| error.hint("run as root, or allow unprivileged user namespaces"))?;
    let write = |file: &str, text: String| {
        fs::write(file, text).attempt(|| format!("map user {user} and group {group} in {file}"))
    };
    // The files below belong to root while this process may not be dumped, as one with secrets.
    let dumpable = rustix::process::dumpable_behavior();
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable);
    // `user_namespaces(7)`: a group map is refused until setgroups is.
    let mapped = write("/proc/self/setgroups", "deny".into())
        .and_then(|()| write("/proc/self/uid_map", format!("{user} {user} 1")))
        .and_then(|()| write("/proc/self/gid_map", format!("{group} {group} 1")));
    if dumpable != Ok(DumpableBehavior::Dumpable) {
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .attempt(|| "keep memory out of core dumps")?;
    }
    mapped?;
    let keep = || -> rustix::io::Result<()> {
        let mut sets = rustix::thread::capabilities(None)?;
        sets.inheritable |= CapabilitySet::SYS_ADMIN;
        rustix::thread::set_capabilities(None, sets)?;
        rustix::thread::configure_capability_in_ambient_set(CapabilitySet::SYS_ADMIN, true)
    };
    keep().attempt(|| "keep the right to mount for child processes")
}

fn unshare(what: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: only UnshareFlags::FILES is unsafe (descriptors of one thread unknown to another),
    // and no caller passes it.
    unsafe { rustix::thread::unshare_unsafe(what) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_open_to_others_or_not_a_directory_is_refused() {
        let base = tempfile::tempdir().expect("a directory");
        let user = geteuid().as_raw();
        let own = base.path().join("own");
        make_own(&own, user).expect("created");
        make_own(&own, user).expect("recognised");
        fs::set_permissions(&own, PermissionsExt::from_mode(0o750)).expect("allowed");
        assert_eq!(make_own(&own, user).unwrap_err().kind(), Kind::Denied);
        let link = base.path().join("link");
        std::os::unix::fs::symlink(base.path(), &link).expect("linked");
        assert_eq!(make_own(&link, user).unwrap_err().kind(), Kind::Denied);
        assert_eq!(
            make_own(base.path(), user + 1).unwrap_err().kind(),
            Kind::Denied
        );
    }

    #[test]
    fn a_process_with_other_threads_is_refused_and_stays_where_it_is() {
        let namespace = || fs::read_link("/proc/thread-self/ns/mnt").expect("readable");
        let before = namespace();
        // The test harness has a main thread beside this one.
        assert_eq!(enter_private(&[]).unwrap_err().kind(), Kind::Usage);
        assert_eq!(namespace(), before);
    }
}
