//! The public mounts of this user: each session that was left running keeps a directory with its
//! state and a control socket, so that `e2ebak umount` finds it without touching the mountpoint
//! (which may hang while the link is down).

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use tracing::warn;

use crate::error::{Attempt, Error, Kind, Result, Told};
use crate::export::FILE_NAME;
use crate::host::{self, Means, Private, View, mount, mount_table, runtime_directory};
use crate::location::Location;

const STATE: &str = "state.json";
const CONTROL: &str = "control";
const FAILURE: &str = "failure.json";
/// Where the volume's FUSE file is, below a session's directory.
pub(super) const FUSE: &str = "fuse";

/// A session that serves a public mountpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mount {
    pub mountpoint: PathBuf,
    pub location: String,
    pub pid: u32,
    pub read_only: bool,
}

/// Removes the directories of sessions that were killed and have nothing mounted any more.
fn sweep(runtime: &Path) -> Result<()> {
    let entries = fs::read_dir(runtime).attempt(|| format!("list {}", runtime.display()))?;
    for session in entries.flatten().map(|entry| entry.path()) {
        let pid = session
            .file_name()
            .and_then(|name| name.to_str()?.parse::<u32>().ok());
        let Some(pid) = pid else { continue };
        // Its socket may be about to listen, so its process is what counts.
        let dead = UnixStream::connect(control_path(&session)).is_err() && has_ended(pid);
        let mount = state(&session);
        let in_use =
            mount.is_some_and(|m| mount_table::topmost(&m.mountpoint).is_ok_and(|e| e.is_some()));
        if dead && !in_use {
            if let Some(told) = failure(&session) {
                warn!(
                    "an earlier session has failed: {}",
                    Error::from(told).report()
                );
            }
            remove(&session)?;
        }
    }
    Ok(())
}

/// Whether there is no such process; one that only waits to be reaped has no program any more.
fn has_ended(pid: u32) -> bool {
    let program = fs::read_link(Path::new("/proc").join(pid.to_string()).join("exe"));
    program.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// The directory of one session, removed with it.
pub(super) fn session_directory(runtime: &Path) -> Result<PathBuf> {
    if let Err(error) = sweep(runtime) {
        warn!("{}", error.report());
    }
    let path = runtime.join(std::process::id().to_string());
    let _ = fs::remove_dir_all(&path);
    DirBuilder::new()
        .mode(0o700)
        .create(&path)
        .attempt(|| format!("create {}", path.display()))?;
    Ok(path)
}

pub(super) fn control_path(session: &Path) -> PathBuf {
    session.join(CONTROL)
}

pub(super) fn write_state(session: &Path, mount: &Mount) -> Result<()> {
    let json = serde_json::to_vec(mount)
        .map_err(std::io::Error::from)
        .attempt(|| "encode the state")?;
    let path = session.join(STATE);
    fs::write(&path, json).attempt(|| format!("write {}", path.display()))
}

/// Every public mount of this user, with its session's directory.
pub(super) fn all() -> Result<Vec<(PathBuf, Mount)>> {
    let runtime = runtime_directory()?;
    let mut mounts = Vec::new();
    for entry in fs::read_dir(&runtime)
        .attempt(|| format!("list {}", runtime.display()))?
        .flatten()
    {
        if let Some(mount) = state(&entry.path()) {
            mounts.push((entry.path(), mount));
        }
    }
    Ok(mounts)
}

/// A public mount of this user that is served: where, and the file of its volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicMount {
    pub mountpoint: PathBuf,
    pub volume: PathBuf,
    pub read_only: bool,
}

/// The public mount of the image at `location`, if this user has one.
pub fn public_mount(location: &Location) -> Result<Option<PublicMount>> {
    let same = |other: &str| match (location, other.parse()) {
        (Location::Local(ours), Ok(Location::Local(theirs))) => fs::canonicalize(ours)
            .is_ok_and(|ours| fs::canonicalize(theirs).is_ok_and(|t| t == ours)),
        (_, other) => other.as_ref() == Ok(location),
    };
    let found = all()?.into_iter().find(|(session, mount)| {
        same(&mount.location) && UnixStream::connect(control_path(session)).is_ok()
    });
    Ok(found.map(|(session, mount)| PublicMount {
        mountpoint: mount.mountpoint,
        volume: session.join(FUSE).join(FILE_NAME),
        read_only: mount.read_only,
    }))
}

/// An image that is in use because this user has mounted it is best unmounted.
pub fn hint_at_mount(error: Error, location: &Location) -> Error {
    match (error.kind(), public_mount(location)) {
        (Kind::InUse, Ok(Some(mount))) => {
            let at = mount.mountpoint.display();
            error.hint(format!("it is mounted: `e2ebak umount {at}`"))
        }
        _ => error,
    }
}

/// Moves this process into a mount namespace of its own, without the public mounts of this user in
/// it, so that they can be unmounted while it runs.
///
/// Call it before any thread is started.
///
/// # Errors
/// [`Kind::Denied`], with what is missing, when nothing can be mounted in it.
pub fn enter_private() -> Result<Private> {
    if let Means::None { why } = Means::of_this_process() {
        return Err(Error::new(Kind::Denied, why));
    }
    let mounts = all()?;
    let places = mounts
        .into_iter()
        .flat_map(|(session, mount)| [mount.mountpoint, session.join(FUSE)]);
    host::enter_private(&places.collect::<Vec<_>>())
}

pub(super) fn failure(session: &Path) -> Option<Told> {
    let bytes = fs::read(session.join(FAILURE)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Leaves word of how a session failed that nobody listens to, for who unmounts or mounts next.
pub(super) fn leave_failure(session: &Path, mount: &Mount, failure: &Error) -> Result<()> {
    fs::create_dir_all(session).attempt(|| format!("create {}", session.display()))?;
    write_state(session, mount)?;
    let path = session.join(FAILURE);
    let json = serde_json::to_vec(&Told::from(failure)).map_err(std::io::Error::from);
    json.and_then(|json| fs::write(&path, json))
        .attempt(|| format!("write {}", path.display()))
}

/// Removes the directory of a session that is dead, and its FUSE mount, which answers nobody.
pub(super) fn remove(session: &Path) -> Result<()> {
    let fuse = session.join(FUSE);
    if mount_table::topmost(&fuse)?.is_some() {
        mount::unmount_lazily(&fuse, View::Own)?;
    }
    match fs::remove_dir_all(session) {
        // The session itself was just done with it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.attempt(|| format!("remove {}", session.display())),
    }
}

fn state(session: &Path) -> Option<Mount> {
    let bytes = fs::read(session.join(STATE)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The absolute path, its parent resolved; the mountpoint itself is never looked at.
pub(super) fn lexical(mountpoint: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(mountpoint)
        .attempt(|| format!("find the mountpoint {}", mountpoint.display()))?;
    Ok(match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => fs::canonicalize(parent)
            .unwrap_or_else(|_| parent.to_path_buf())
            .join(name),
        _ => absolute,
    })
}
