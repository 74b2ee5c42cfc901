//! Making a FUSE mount and taking it away: by mount(2) where that is allowed (root, or a user
//! namespace), else by fusermount3, which is set-user-ID for this.
//!
//! fuser could mount too. It would then unmount by path whatever is mounted there later.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tracing::{debug, warn};

use crate::error::{Attempt, Error, Kind, Result};
use crate::host::tool::Tool;
use crate::host::{View, mount};

/// The kernel's list of FUSE connections, one directory for each.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// A mount that goes when this is dropped.
pub struct Attached {
    directory: PathBuf,
    view: View,
    connection: u32,
    by_fusermount: bool,
    attached: Mutex<bool>,
}

impl Attached {
    /// Mounts on `directory`, and gives back the descriptor that the kernel sends requests to.
    pub fn new(directory: &Path, read_only: bool) -> Result<(Attached, OwnedFd)> {
        let shown = directory.display();
        let directory = fs::canonicalize(directory).attempt(|| format!("look at {shown}"))?;
        let (fuse, by_fusermount) = match mount_directly(&directory, read_only) {
            Ok(fuse) => (fuse, false),
            Err(error) if error.kind() == Kind::Denied => {
                debug!(error = error.report(), "mount(2) is not allowed");
                (mount_by_fusermount(&directory, read_only)?, true)
            }
            Err(error) => return Err(error),
        };
        let attached = Attached::of(directory, View::Own, by_fusermount)?;
        Ok((attached, fuse))
    }

    /// The same in another mount namespace; `directory` is a path inside, without links.
    pub fn inside(view: View, directory: &Path, read_only: bool) -> Result<(Attached, OwnedFd)> {
        let fuse = view.visit(|| mount_directly(directory, read_only))?;
        Ok((Attached::of(directory.to_path_buf(), view, false)?, fuse))
    }

    fn of(directory: PathBuf, view: View, by_fusermount: bool) -> Result<Attached> {
        let mut attached = Attached {
            directory,
            view,
            connection: 0,
            by_fusermount,
            attached: Mutex::new(true),
        };
        attached.connection = attached.connection_seen()?;
        Ok(attached)
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn connection(&self) -> u32 {
        self.connection
    }

    /// Unmounts. Not an error when somebody else has done it already.
    ///
    /// # Errors
    /// [`Kind::InUse`] when anybody uses the mount.
    pub fn detach(&self) -> Result<()> {
        self.unmount(UnmountFlags::NOFOLLOW, &["-u"])
    }

    /// Errors for everybody who waits, then the mount is out of sight.
    pub fn abort(&self) -> Result<()> {
        // FORCE aborts the connection first, and needs no list of connections to be mounted.
        let force = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        if self.by_fusermount {
            abort_by_number(self.connection)?;
        }
        self.unmount(force, &["-u", "-z"])
    }

    fn unmount(&self, flags: UnmountFlags, fusermount: &[&str]) -> Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(|e| e.into_inner());
        if !*attached {
            return Ok(());
        }
        match self.view.topmost(&self.directory) {
            Ok(Some(entry)) if entry.minor == self.connection => {}
            // The keeper was killed: nobody can be sent inside, and others may keep the mount alive.
            // The connection has to end, or serving it never does.
            Err(error) if self.view != View::Own => {
                warn!(error = error.report(), "the way to the mount is gone");
                *attached = false;
                return super::abort_connection(self.connection).or_else(none_is_fine);
            }
            // Something else may have been mounted in our place by now.
            _ => {
                *attached = false;
                return Ok(());
            }
        }
        let done = match (self.view, self.by_fusermount) {
            (_, true) => unmount_by_fusermount(&self.directory, fusermount),
            (View::Own, _) => rustix::mount::unmount(&self.directory, flags).map_err(Error::from),
            // Not by a visit of our own: with a filesystem above, we may not be there to be killed.
            (view, _) if flags.contains(UnmountFlags::FORCE) => {
                mount::unmount_by_force(&self.directory, view)
            }
            (view, _) if flags.contains(UnmountFlags::DETACH) => {
                mount::unmount_lazily(&self.directory, view)
            }
            (view, _) => mount::unmount(&self.directory, view),
        };
        done.attempt(|| format!("unmount {}", self.directory.display()))?;
        *attached = false;
        Ok(())
    }

    /// The connection whose mount is seen there, asked of the kernel: stat(2) would ask us.
    fn connection_seen(&self) -> Result<u32> {
        match self.view.topmost(&self.directory)? {
            Some(entry) => Ok(entry.minor),
            None => Err(Error::new(
                Kind::NotFound,
                format!("nothing is mounted on {}", self.directory.display()),
            )),
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let lazily = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        if let Err(error) = self.unmount(lazily, &["-u", "-z"]) {
            warn!(error = error.report(), "a FUSE mount is left behind");
        }
    }
}

/// A connection that is no more needs no abort.
fn none_is_fine(error: Error) -> Result<()> {
    match error.kind() {
        Kind::NotFound => Ok(()),
        _ => Err(error),
    }
}

fn mount_directly(directory: &Path, read_only: bool) -> Result<OwnedFd> {
    let fuse: OwnedFd = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .attempt(|| "open /dev/fuse")?
        .into();
    // Without allow_other the kernel lets nobody in but the user named here, not even root.
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions\0",
        fuse.as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw()
    );
    // OK to unwrap: the one NUL is at the end.
    let data = std::ffi::CStr::from_bytes_with_nul(data.as_bytes()).unwrap();
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    flags.set(MountFlags::RDONLY, read_only);
    rustix::mount::mount("e2ebak", directory, "fuse.e2ebak", flags, data)
        .attempt(|| format!("mount FUSE on {}", directory.display()))?;
    Ok(fuse)
}

/// fusermount3 mounts and sends the descriptor over a socket, whose number it finds in
/// `_FUSE_COMMFD` (`fusermount3(1)`, `mount.fuse(8)`). The socket is its standard input, so no
/// descriptor of ours is open to other children meanwhile.
fn mount_by_fusermount(directory: &Path, read_only: bool) -> Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair().attempt(|| "make a socket pair")?;
    let access = if read_only { "ro" } else { "rw" };
    let options =
        format!("{access},nosuid,nodev,noexec,default_permissions,fsname=e2ebak,subtype=e2ebak");
    let tool = Tool::new("fusermount3")
        .args(["-o", &options, "--"])
        .arg(directory)
        .env("_FUSE_COMMFD", "0");
    let mut command = tool.command()?;
    command
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let child = command.spawn().attempt(|| "start fusermount3")?;
    drop(command); // holds their end of the socket
    let received = receive_descriptor(&ours);
    let output = child
        .wait_with_output()
        .attempt(|| "wait for fusermount3")?;
    match received {
        Ok(Some(fuse)) => Ok(fuse),
        _ => Err(Error::new(
            Kind::Denied,
            String::from_utf8_lossy(&output.stderr).trim().to_string(),
        ))
        .attempt(|| format!("mount FUSE on {}", directory.display())),
    }
}

fn receive_descriptor(socket: &UnixStream) -> rustix::io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sent) => sent.next(),
        _ => None,
    });
    Ok(descriptors.next())
}

fn unmount_by_fusermount(directory: &Path, how: &[&str]) -> Result<()> {
    let tool = Tool::new("fusermount3").args(how).arg("--").arg(directory);
    let output = tool.deaf().run_to_any_end()?;
    match output.status.success() {
        true => Ok(()),
        false if output.stderr.contains("busy") => {
            Err(Error::from(Errno::BUSY).because(output.stderr.trim()))
        }
        false => Err(Error::new(Kind::Io, output.stderr.trim())),
    }
}

/// Mounts the list of connections in this thread's mount namespace.
pub fn mount_connections() -> Result<()> {
    let mounted = rustix::mount::mount("none", CONNECTIONS, "fusectl", MountFlags::empty(), None);
    mounted.attempt(|| "mount the list of FUSE connections")
}

pub fn abort_by_number(number: u32) -> Result<()> {
    let path = format!("{CONNECTIONS}/{number}/abort");
    let abort = || {
        File::options().write(true).open(&path).and_then(|file| {
            use std::io::Write;
            (&file).write_all(b"1")
        })
    };
    match abort() {
        Err(error) if error.kind() == ErrorKind::NotFound => Err(error)
            .attempt(|| format!("abort FUSE connection {number}"))
            .map_err(|error| error.hint("ending the process that serves it has the same effect")),
        done => done.attempt(|| format!("abort FUSE connection {number}")),
    }
}
