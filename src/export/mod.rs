//! A [`Device`] as one file, `volume`, in a FUSE mount, for a loop device or fuse2fs to use.
//!
//! ```text
//! ext4 -> loop device -> volume (FUSE) -> event loops -> handlers -> Device
//! ```
//!
//! **Who may touch the mount.** Never the process that serves it. A thread of ours that waits in
//! the kernel for an answer of ours cannot be killed, and keeps the FUSE connection open while it
//! waits; everything above it would hang with it. So mount(8), losetup(8) and their like run as
//! child processes, which hold no descriptor of `/dev/fuse`, and this module finds out about its
//! mount from the kernel's mount table only.
//!
//! **When it ends.** A plain umount(8) of the filesystem above frees the loop device, which
//! releases the file; [`Export::wait_closed`] hears of it. If this process dies, the kernel
//! answers everybody with an error; that it can die is seen to by being no member of the mount's
//! namespace ([`Options::view`]), or by a [`Keeper`]. If the device below hangs, [`Export::abort`]
//! has the same effect: nobody stays in an unkillable wait.

mod attach;
mod filesystem;
mod handlers;
mod opens;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, Session, SessionACL};
use tracing::{debug, info, warn};

use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};
use crate::host::keeper::Keeper;
use crate::host::{View, in_private};
pub use attach::Attached;
use filesystem::VolumeFile;
use handlers::Handlers;
use opens::Opens;

/// The name of the one file in the mount.
pub const FILE_NAME: &str = "volume";

/// How long unmounting waits for the last user of the file. A loop device lets go of it some
/// milliseconds after its filesystem is gone, once its last requests are answered.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);

/// How long the threads that serve may take to notice that their mount has gone: it is a matter of
/// milliseconds.
const SERVING_LIMIT: Duration = Duration::from_secs(2);

/// Event loops, each with a descriptor of its own. They never wait for the device.
const EVENT_LOOPS: usize = 2; // take in more than 100,000 requests a second

#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// So many requests at most are with the device at once.
    pub threads: usize,
    pub read_only: bool,
    /// The mount namespace to mount in.
    pub view: View,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            threads: filesystem::IN_FLIGHT_MAX,
            read_only: false,
            view: View::Own,
        }
    }
}

/// A mounted file. Dropping it detaches the mount; [`Export::unmount`] also says whether it went.
pub struct Export {
    attached: Attached,
    opens: Arc<Opens>,
    handlers: Arc<Handlers>,
    serving: Mutex<Option<JoinHandle<std::io::Result<()>>>>,
    /// Last, so that it outlives the mount.
    _keeper: Option<Keeper>,
}

impl Export {
    /// Mounts on `directory`, which must be empty and ours alone: the file is for this user only.
    ///
    /// Reads and writes reach the device with the offsets and lengths that the caller used, so
    /// anything but a loop device or fuse2fs wants a device with an alignment of 1.
    ///
    /// # Errors
    /// [`Kind::Denied`] when FUSE is not allowed here, [`Kind::Usage`] for no threads at all.
    pub fn mount(device: Arc<dyn Device>, directory: &Path, options: Options) -> Result<Export> {
        if options.threads == 0 {
            return Err(Error::new(Kind::Usage, "an export needs a thread, not 0"));
        }
        let keeper = match options.view {
            View::Own => Some(Keeper::start(View::Own)?),
            View::Of(_) => None,
        };
        let opens = Arc::new(Opens::default());
        let read_only = options.read_only || !device.caps().writable;
        let handlers = Handlers::new(options.threads);
        let file = VolumeFile::new(device, opens.clone(), handlers.clone(), read_only);
        let (attached, fuse) = match options.view {
            View::Own => Attached::new(directory, read_only)?,
            view => Attached::inside(view, directory, read_only)?,
        };

        let mut config = Config::default();
        config.n_threads = Some(EVENT_LOOPS);
        config.clone_fd = true;
        let session = Session::from_fd(file, fuse, SessionACL::Owner, config)
            .and_then(Session::spawn)
            .attempt(|| format!("serve the FUSE mount on {}", directory.display()))?;
        info!(directory = %directory.display(), connection = attached.connection(), read_only, "exported");
        Ok(Export {
            attached,
            opens,
            handlers,
            serving: Mutex::new(Some(session.guard)),
            _keeper: keeper,
        })
    }

    /// The path of the file. For other processes only.
    pub fn file(&self) -> PathBuf {
        self.attached.directory().join(FILE_NAME)
    }

    /// The number under `/sys/fs/fuse/connections`, for [`abort_connection`] from elsewhere.
    pub fn connection(&self) -> u32 {
        self.attached.connection()
    }

    /// Waits until the file was opened and then released by everybody, or the mount has gone;
    /// `false` when `limit` passed first. Programs that only look at the file open it for a
    /// moment too: wait for the first time when the filesystem above is mounted.
    pub fn wait_closed(&self, limit: Duration) -> bool {
        self.opens.wait_closed(limit)
    }

    /// Unmounts, and ends the threads that serve.
    ///
    /// # Errors
    /// [`Kind::InUse`] when somebody still holds the file after 10 s; it is served further.
    pub fn unmount(&self) -> Result<()> {
        if !self.opens.wait_released(RELEASE_LIMIT) {
            return Err(Error::new(
                Kind::InUse,
                format!("{} is still open in another process", self.file().display()),
            ));
        }
        // The kernel counts the mount as busy for a moment after it reported the release.
        let start = Instant::now();
        while let Err(error) = self.attached.detach() {
            if error.kind() != Kind::InUse || start.elapsed() > RELEASE_LIMIT {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let serving = self
            .serving
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take();
        if let Some(serving) = serving {
            self.end_serving(serving);
        }
        if !self.handlers.finish(RELEASE_LIMIT) {
            warn!("some requests still wait for the device"); // only after an abort
        }
        debug!(directory = %self.attached.directory().display(), "no longer exported");
        Ok(())
    }

    /// Waits for the end of the threads that serve. The kernel keeps the connection as long as
    /// another mount namespace has a copy of the mount, which may be for ever; nobody has the file
    /// open, so such a connection is aborted, or left to the end of this process.
    fn end_serving(&self, serving: JoinHandle<std::io::Result<()>>) {
        if !is_finished_within(&serving, SERVING_LIMIT) {
            debug!(directory = %self.attached.directory().display(), "another mount namespace has a copy of it");
            let aborted = attach::abort_by_number(self.connection());
            if aborted.is_err() || !is_finished_within(&serving, RELEASE_LIMIT) {
                return;
            }
        }
        if serving.join().is_err() {
            warn!("a thread that served the volume panicked");
        }
    }

    /// Gives up: everybody who waits for an answer gets an error at once, and the mount goes as
    /// soon as nobody holds it. Data not yet flushed are lost.
    pub fn abort(&self) -> Result<()> {
        self.attached.abort()
    }
}

fn is_finished_within<T>(thread: &JoinHandle<T>, limit: Duration) -> bool {
    let start = Instant::now();
    while !thread.is_finished() {
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

/// Aborts a FUSE connection from any process of the same user but the one that serves it, by its
/// number. Where the kernel's list of them is not mounted, root mounts it for a moment, out of sight.
///
/// # Errors
/// [`Kind::NotFound`] when there is no such connection, or no list of them.
pub fn abort_connection(number: u32) -> Result<()> {
    match attach::abort_by_number(number) {
        Err(error) if error.kind() == Kind::NotFound => {
            let listed =
                || attach::mount_connections().and_then(|()| attach::abort_by_number(number));
            // The first error says what is missing.
            in_private(listed).map_err(|_| error)
        }
        done => done,
    }
}
