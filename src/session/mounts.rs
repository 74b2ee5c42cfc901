//! The public mounts of this user: each session that was left running keeps a directory with its
//! state and a control socket, so that `e2ebak umount` finds it without touching the mountpoint
//! (which may hang while the link is down).

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use tracing::warn;

use super::wire::{Order, Report, receive, send};
use crate::error::{Attempt, Error, Kind, Result, Told};
use crate::export::FILE_NAME;
use crate::host::{self, Means, mount, mount_table, runtime_directory};
use crate::location::Location;
use crate::progress::{Event, Monitor, Progress};

const STATE: &str = "state.json";
const CONTROL: &str = "control";
const FAILURE: &str = "failure.json";
/// Where the volume's FUSE file is, below a session's directory.
pub(super) const FUSE: &str = "fuse";

/// How a session had served until it was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// Everything is on stable storage.
    Synced,
    /// Its process was gone, and with it what it had not yet synced.
    Lost,
}

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
fn all() -> Result<Vec<(PathBuf, Mount)>> {
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

/// Moves this process into a mount namespace of its own, without the public mounts of this user in
/// it, so that they can be unmounted while it runs. Gives back the runtime directory, empty there.
///
/// Call it before any thread is started.
///
/// # Errors
/// [`Kind::Denied`], with what is missing, when nothing can be mounted in it.
pub fn enter_private() -> Result<PathBuf> {
    if let Means::None { why } = Means::of_this_process() {
        return Err(Error::new(Kind::Denied, why));
    }
    let mounts = all()?;
    let places = mounts
        .into_iter()
        .flat_map(|(session, mount)| [mount.mountpoint, session.join(FUSE)]);
    host::enter_private(&places.collect::<Vec<_>>())
}

/// Has the session behind `mountpoint` unmount, drain, sync and release the lease; returns when
/// that is done.
pub fn close_mount(mountpoint: &Path, monitor: &dyn Monitor) -> Result<Closed> {
    let wanted = lexical(mountpoint)?;
    let mut mounts = all()?;
    mounts.retain(|(_, mount)| mount.mountpoint == wanted);
    let Some((session, _)) = mounts.first() else {
        let why = format!("nothing of yours is mounted at {}", wanted.display());
        let error = Error::new(Kind::NotFound, why);
        return Err(error.hint("give the directory that `e2ebak mount` was given"));
    };
    // A dead session may have left its word for the same directory; a living one comes first.
    let connect = |session: &Path| UnixStream::connect(control_path(session));
    let living = mounts.iter().find_map(|(session, _)| connect(session).ok());
    let mut stream = match living.map_or_else(|| connect(session), Ok) {
        Err(error) if is_gone(&error) => return clear_away(session, &wanted),
        other => {
            other.attempt(|| format!("talk to the session that serves {}", wanted.display()))?
        }
    };
    send(&mut stream, &Order::Close)?;
    loop {
        match receive::<Report>(&mut stream)? {
            Some(Report::Done(_)) => return Ok(Closed::Synced),
            Some(Report::Failed(told)) => return Err(told.into()),
            Some(Report::Status(status)) => {
                let progress = Progress {
                    owed: Some(status.owed),
                    sent: Some(status.sent),
                    ..Progress::default()
                };
                monitor.report(Event::Progress(progress));
            }
            Some(Report::Warning(text)) => monitor.report(Event::Warning(text)),
            Some(_) => {}
            None => {
                let why = format!("the session that serves {} broke off", wanted.display());
                return Err(Error::new(Kind::Io, why));
            }
        }
    }
}

/// Frees a mountpoint whose session was killed. Nothing that a mount of a dead session is asked
/// for ever comes, so both go out of sight without being asked.
///
/// # Errors
/// How the session failed, if it could still say so.
fn clear_away(session: &Path, mountpoint: &Path) -> Result<Closed> {
    if mount_table::topmost(mountpoint)?.is_some() {
        mount::unmount_lazily(mountpoint)?;
    }
    let failure = failure(session);
    remove(session)?;
    match failure {
        Some(told) => Err(Error::from(told)).attempt(|| "the session has failed"),
        None => Ok(Closed::Lost),
    }
}

/// Whether nobody listens at a control socket any more.
fn is_gone(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(
        error.kind(),
        ErrorKind::ConnectionRefused | ErrorKind::NotFound
    )
}

fn failure(session: &Path) -> Option<Told> {
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
fn remove(session: &Path) -> Result<()> {
    let fuse = session.join(FUSE);
    if mount_table::topmost(&fuse)?.is_some() {
        mount::unmount_lazily(&fuse)?;
    }
    fs::remove_dir_all(session).attempt(|| format!("remove {}", session.display()))
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
