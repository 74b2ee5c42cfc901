//! What a session builds on its volume, and how it is taken down: FUSE file, loop device, mount.

use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::warn;

use super::mounts::{self, FUSE};
use super::server::Happening;
use super::wire::{Place, Plan};
use crate::error::{Attempt, Error, Kind, Result};
use crate::export::{self, Export};
use crate::host::keeper::Keeper;
use crate::host::mount::{self, Driver, Mounted};
use crate::host::{Means, View};
use crate::image::{Opened, Volume};

/// How long one look at the export waits for it to be closed.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How long an unmount in our own namespace waits for a process of ours that is just ending.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a lazily unmounted filesystem may take to let go of the volume.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(30);

/// How the filesystem goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unmounting {
    /// It has gone already.
    Done,
    /// As umount(8) does it, trying again for a while when it is busy.
    Patient,
    /// When it is busy, away from the tree at once, and what is still open ends with its process.
    Forced,
}

pub(super) struct Stage {
    directory: PathBuf,
    mounted_at: PathBuf,
    view: View,
    mounted: Mutex<Mounted>,
    below: Below,
}

/// What the filesystem stands on.
struct Below {
    volume: Volume,
    export: Arc<Export>,
    /// The session's directory, when it goes with the session.
    removed: Option<PathBuf>,
    /// Keeps the namespace of the mounts, when it is not ours. Last, so that it outlives them.
    keeper: Option<Keeper>,
}

/// Where a session's mounts are made.
struct Ground {
    directory: PathBuf,
    mountpoint: PathBuf,
    keeper: Option<Keeper>,
}

impl Ground {
    fn prepare(place: &Place) -> Result<Ground> {
        match place {
            Place::Private(private) => {
                // The command is a member now; the keeper still is when the command was killed.
                let keeper = match private.view() {
                    View::Own => None,
                    command => Some(Keeper::start(command)?),
                };
                Ok(Ground {
                    directory: private.directory().to_path_buf(),
                    mountpoint: private.directory().join("filesystem"),
                    keeper,
                })
            }
            Place::Public(mountpoint) => Ok(Ground {
                directory: mounts::session_directory(&crate::host::runtime_directory()?)?,
                mountpoint: mounts::lexical(mountpoint)?,
                keeper: None,
            }),
        }
    }

    fn view(&self) -> View {
        self.keeper.as_ref().map_or(View::Own, Keeper::view)
    }

    fn make(&self, directory: &Path) -> Result<()> {
        let made = std::fs::create_dir_all(self.view().path(directory));
        made.attempt(|| format!("create {}", directory.display()))
    }
}

impl Stage {
    pub fn build(plan: &Plan, opened: Opened) -> Result<Stage> {
        let driver = match Means::of_this_process() {
            Means::Root => Driver::Kernel,
            Means::UserNamespace => Driver::Fuse2fs,
            Means::None { why } => return Err(Error::new(Kind::Denied, why)),
        };
        let ground = Ground::prepare(&plan.place)?;
        let (view, at) = (ground.view(), ground.mountpoint.clone());
        match plan.place {
            Place::Private(_) => ground.make(&at)?,
            Place::Public(_) => drop(mount::check_mountpoint(&at)?),
        }
        let fuse = ground.directory.join(FUSE);
        ground.make(&fuse)?;
        let volume = opened.volume;
        let options = export::Options {
            view,
            ..export::Options::default()
        };
        let export = Export::mount(volume.device(), &fuse, options)
            .map_err(|e| e.hint("mounting needs root, or the use of /dev/fuse and fuse2fs"))?;
        let below = Below {
            volume,
            export: Arc::new(export),
            removed: matches!(plan.place, Place::Public(_)).then(|| ground.directory.clone()),
            keeper: ground.keeper,
        };
        let file = below.export.file();
        let mounted = match view {
            View::Own => mount::mount_volume(&file, &at, driver, plan.read_only),
            inside => mount::mount_volume_inside(&file, &at, inside, plan.read_only),
        };
        match mounted {
            Ok(mounted) => Ok(Stage {
                directory: ground.directory,
                view,
                mounted_at: mounted.at().to_path_buf(),
                mounted: Mutex::new(mounted),
                below,
            }),
            Err(error) => {
                if let Err(second) = below.dismantle() {
                    warn!("{}", second.report());
                }
                Err(error)
            }
        }
    }

    fn mounted(&self) -> MutexGuard<'_, Mounted> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn mounted_at(&self) -> &Path {
        &self.mounted_at
    }

    /// Tells how many bytes are accepted and not yet stored.
    pub fn owed(&self) -> impl Fn() -> u64 + Send + use<> {
        self.below.volume.owed_later()
    }

    /// Fits the cache to a link with this round trip and these bytes per second.
    pub fn tune(&self) -> impl Fn(Duration, u64) + Send + use<> {
        self.below.volume.tune_later()
    }

    /// Tells when somebody else has unmounted the filesystem.
    pub fn watch(&self, sender: Sender<Happening>) -> Result<()> {
        let export = Arc::downgrade(&self.below.export);
        let watch = move || {
            while let Some(export) = export.upgrade() {
                if export.wait_closed(WATCH_EVERY) {
                    let _ = sender.send(Happening::Closed);
                    return;
                }
            }
        };
        let started = thread::Builder::new()
            .name("session-watch".into())
            .spawn(watch);
        started.map(drop).attempt(|| "start a thread")
    }

    /// Unmounts as umount(8) does; [`Kind::InUse`] names who keeps it busy.
    pub fn unmount(&self) -> Result<()> {
        let mut mounted = self.mounted();
        // Where another namespace has a copy of the mount, unmounting ours would sync nothing. A
        // filesystem that can no longer be synced still has to go.
        let synced = match mounted.is_mounted() {
            true => mount::sync(&self.mounted_at, self.view),
            false => Ok(()),
        };
        mounted.unmount()?;
        synced
    }

    /// Takes everything down and writes nothing more: the image may have another writer by now.
    pub fn abandon(self) {
        // The filesystem hears of errors from here on, and the cache sends nothing.
        if let Err(error) = self.below.export.abort() {
            warn!("{}", error.report());
        }
        self.below.volume.abandon();
        if let Err(error) = self.mounted().unmount_lazily() {
            warn!("{}", error.report());
        }
    }

    /// Takes everything down; every byte is on stable storage when it returns without an error.
    pub fn tear_down(self, unmounting: Unmounting) -> Result<()> {
        let unmounted = match unmounting {
            Unmounting::Done => self.unmount(),
            Unmounting::Patient => self.unmount_patiently(),
            Unmounting::Forced => self.unmount_by_force(),
        };
        // Whatever came of it: what has reached the volume is to be kept.
        let dismantled = self.below.dismantle();
        unmounted.and(dismantled)
    }

    fn unmount_patiently(&self) -> Result<()> {
        let deadline = Instant::now() + BUSY_TIMEOUT;
        loop {
            match self.unmount() {
                Err(error) if error.kind() != Kind::InUse => return Err(error),
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(200)),
                Err(_) => return self.unmount_by_force(),
                Ok(()) => return Ok(()),
            }
        }
    }

    fn unmount_by_force(&self) -> Result<()> {
        match self.unmount() {
            Err(error) if error.kind() == Kind::InUse => {
                warn!("{}; what is open ends with its process", error.report());
                let synced = mount::sync(&self.mounted_at, self.view);
                self.mounted().unmount_lazily()?;
                synced
            }
            other => other,
        }
    }
}

impl Below {
    /// From the top: FUSE file, volume.
    fn dismantle(self) -> Result<()> {
        let closed = self.export.wait_closed(LET_GO_TIMEOUT);
        let synced = self.volume.flush().attempt(|| "sync the image");
        let unmounted = match closed {
            true => self.export.unmount(),
            false => {
                let why = "the volume is still in use; what is written to it from now on is lost";
                let hint = "another mount namespace may have a copy of the mount: `lsns -t mnt`";
                let error = Error::new(Kind::InUse, why).hint(hint);
                self.export.abort().and(Err(error))
            }
        };
        drop(self.export);
        if let Some(directory) = &self.removed {
            // The FUSE mount is gone; a leftover in a runtime directory harms nobody.
            let _ = std::fs::remove_dir_all(directory);
        }
        let closed = self.volume.close();
        // It takes down what is left in the namespace, if the command is gone.
        drop(self.keeper);
        synced.and(closed).and(unmounted)
    }
}
