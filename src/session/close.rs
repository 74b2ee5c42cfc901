//! Ending the session of a public mount from another process: in order where that works, by force
//! where it does not and somebody has asked for it.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tracing::debug;

use super::VERB;
use super::mounts::{self, FUSE, Mount};
use super::wire::{Order, Report, Status, receive, send};
use crate::error::{Attempt, Error, Kind, Result};
use crate::export;
use crate::host::{View, holders, mount, mount_table};
use crate::progress::{Event, Monitor};

/// A session that gets no further for so long is reported, or ended when that was asked for.
const PATIENCE: Duration = Duration::from_secs(10); // several round trips of any link
/// How long a killed process may take to end, and a loop device to be freed.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How a session had served until it was closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Closed {
    /// Everything is on stable storage.
    Synced,
    /// Its process was gone, and with it what it had not yet synced.
    Lost,
    /// It was ended by force.
    Forced {
        /// Bytes that it had accepted and not yet sent, when it last said so.
        owed: Option<u64>,
        /// Who still had files open, as a sentence; the loop device is freed when they end.
        held: Option<String>,
    },
}

/// Has the session behind `mountpoint` unmount, drain, sync and release the lease; returns when
/// that is done, however long it takes.
///
/// With `force` a session that gets no further, because it hangs or its server is out of reach, is
/// ended after 10 s, and what it has not yet stored is lost; and files that are open keep nothing
/// from being unmounted.
///
/// # Errors
/// [`Kind::NotFound`] when no session of this user serves it; [`Kind::InUse`] with who keeps it
/// busy; how the session has failed.
pub fn close_mount(mountpoint: &Path, force: bool, monitor: &dyn Monitor) -> Result<Closed> {
    let wanted = mounts::lexical(mountpoint)?;
    let mut mounts = mounts::all()?;
    mounts.retain(|(_, mount)| mount.mountpoint == wanted);
    let Some((session, mount)) = mounts.first() else {
        let why = format!("nothing of yours is mounted at {}", wanted.display());
        let error = Error::new(Kind::NotFound, why);
        return Err(error.hint("give the directory that `e2ebak mount` was given"));
    };
    // A dead session may have left its word for the same directory; a living one comes first.
    let connect = |session: &Path| UnixStream::connect(mounts::control_path(session));
    let living = mounts
        .iter()
        .find_map(|(session, mount)| Some((session, mount, connect(session).ok()?)));
    let (session, mount, stream) = match living {
        Some(living) => living,
        None => match connect(session) {
            Err(error) if is_gone(&error) => return clear_away(session, &wanted),
            other => (
                session,
                mount,
                other
                    .attempt(|| format!("talk to the session that serves {}", wanted.display()))?,
            ),
        },
    };
    let mut closing = Closing {
        stream,
        force,
        at: &wanted,
        monitor,
        last: None,
    };
    match closing.end_in_order()? {
        true => Ok(Closed::Synced),
        false => end_by_force(session, mount, closing.last.map(|status| status.owed)),
    }
}

/// A talk with a session that is to end.
struct Closing<'a> {
    stream: UnixStream,
    force: bool,
    at: &'a Path,
    monitor: &'a dyn Monitor,
    last: Option<Status>,
}

impl Closing<'_> {
    /// Whether it has ended; else it gets no further, and was to be forced.
    fn end_in_order(&mut self) -> Result<bool> {
        let order = if self.force {
            Order::Force
        } else {
            Order::Close
        };
        send(&mut self.stream, &order)?;
        let mut since = Instant::now();
        let mut told = false;
        loop {
            if since.elapsed() >= PATIENCE && self.force {
                return Ok(false);
            }
            if since.elapsed() >= PATIENCE && !told {
                self.tell_of_waiting();
                told = true;
            }
            if !readable(&self.stream, Duration::from_secs(1))? {
                continue;
            }
            match receive::<Report>(&mut self.stream)? {
                Some(Report::Done(_)) => return Ok(true),
                Some(Report::Failed(told)) => return Err(told.into()),
                Some(Report::Status(status)) => {
                    if self.is_further(status) {
                        since = Instant::now();
                    }
                    self.last = Some(status);
                    self.monitor.report(Event::Progress(status.progress()));
                }
                Some(Report::Warning(text)) => self.monitor.report(Event::Warning(text)),
                Some(Report::Note(text)) => self.monitor.report(Event::Note(text)),
                Some(_) => {}
                None => {
                    let why = format!("the session that serves {} broke off", self.at.display());
                    return Err(Error::new(Kind::Io, why));
                }
            }
        }
    }

    fn is_further(&self, now: Status) -> bool {
        let Some(last) = self.last else { return true };
        (now.owed, now.sent) != (last.owed, last.sent)
    }

    fn tell_of_waiting(&self) {
        let text = format!(
            "the session that serves {} has got no further for {} s: it hangs, or its server is \
             out of reach. Waiting for it; `e2ebak umount --force` gives up what is not yet stored",
            self.at.display(),
            PATIENCE.as_secs()
        );
        self.monitor.report(Event::Warning(text));
    }
}

fn readable(stream: &UnixStream, limit: Duration) -> Result<bool> {
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    let limit = Timespec::try_from(limit).ok();
    match poll(&mut fds, limit.as_ref()) {
        Err(rustix::io::Errno::INTR) => Ok(false),
        ready => ready
            .map(|ready| ready > 0)
            .attempt(|| "wait for the session"),
    }
}

/// Takes the mount from a session that does not do it. Nothing here waits for the session or its
/// server: from the first step on, who asks the mount for anything gets an error.
fn end_by_force(session: &Path, mount: &Mount, owed: Option<u64>) -> Result<Closed> {
    let held = holders::sentence(&mount.mountpoint);
    let device = mount_table::topmost(&mount.mountpoint)?.map(|entry| entry.source);
    let fuse = mount_table::topmost(&session.join(FUSE))?;
    if let Some(entry) = fuse.filter(|entry| entry.kind == "fuse.e2ebak")
        && let Err(error) = export::abort_connection(entry.minor)
    {
        // The end of the process has the same effect.
        debug!("{}", error.report());
    }
    let ended = kill_session(mount.pid).attempt(|| format!("end the session {}", mount.pid));
    if mount_table::topmost(&mount.mountpoint)?.is_some() {
        mount::unmount_lazily(&mount.mountpoint, View::Own)?;
    }
    mounts::remove(session)?;
    ended?;
    let freed = device.is_none_or(|device| is_freed(&device));
    Ok(Closed::Forced {
        owed,
        held: held.filter(|_| !freed),
    })
}

/// Kills a session and waits for its end; not whoever has got its number since.
fn kill_session(pid: u32) -> Result<()> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let number = number.ok_or_else(|| Error::new(Kind::Corrupt, "it has no process number"))?;
    let process = match pidfd_open(number, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        opened => opened?,
    };
    if !is_session(pid) {
        return Ok(());
    }
    match pidfd_send_signal(&process, Signal::KILL) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        sent => sent?,
    }
    let limit = Timespec::try_from(END_LIMIT).ok();
    match poll(&mut [PollFd::new(&process, PollFlags::IN)], limit.as_ref())? {
        0 => Err(Error::new(
            Kind::TimedOut,
            format!("it has not ended {} s after SIGKILL", END_LIMIT.as_secs()),
        )),
        _ => Ok(()),
    }
}

fn is_session(pid: u32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).nth(1) == Some(VERB.as_bytes())
}

/// Waits a while for the kernel to free a loop device, which it does by itself with the last user.
fn is_freed(device: &Path) -> bool {
    let Some(name) = device.file_name() else {
        return true;
    };
    let backing = Path::new("/sys/block").join(name).join("loop");
    let start = Instant::now();
    while backing.exists() {
        if start.elapsed() > END_LIMIT {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    true
}

/// Frees a mountpoint whose session was killed. Nothing that a mount of a dead session is asked
/// for ever comes, so both go out of sight without being asked.
///
/// # Errors
/// How the session failed, if it could still say so.
fn clear_away(session: &Path, mountpoint: &Path) -> Result<Closed> {
    if mount_table::topmost(mountpoint)?.is_some() {
        mount::unmount_lazily(mountpoint, View::Own)?;
    }
    let failure = mounts::failure(session);
    mounts::remove(session)?;
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
