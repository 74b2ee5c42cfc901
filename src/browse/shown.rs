//! A view that is mounted, until somebody unmounts it or asks to stop.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use fuser::{Config, Session, SessionACL};

use super::View;
use crate::error::{Attempt, Error, Kind, Result};
use crate::export::Attached;

/// Event loops. One waits for the link while the others answer.
const THREADS: usize = 16;
/// How often it looks whether it is over.
const POLL: Duration = Duration::from_millis(100);

/// A mounted view. Dropping it detaches the mount.
pub struct Shown {
    attached: Attached,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Shown {
    /// Whether it can be mounted on `directory`: [`Kind::Exists`] when that is not empty.
    pub fn check(directory: &Path) -> Result<()> {
        let shown = directory.display();
        let listed = std::fs::read_dir(directory).attempt(|| format!("list {shown}"));
        let mut entries = listed.map_err(|error| error.hint("give an empty directory"))?;
        match entries.next() {
            None => Ok(()),
            Some(_) => {
                let why = format!("{shown} is not empty");
                Err(Error::new(Kind::Exists, why).hint("give an empty directory"))
            }
        }
    }

    /// Mounts on `directory`, for this user only.
    ///
    /// # Errors
    /// [`Kind::Denied`] when FUSE is not allowed here, and those of [`Shown::check`].
    pub fn mount(view: View, directory: &Path) -> Result<Shown> {
        Shown::check(directory)?;
        let shown = directory.display();
        let (attached, fuse) = Attached::new(directory, true)?;
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let session = Session::from_fd(view, fuse, SessionACL::Owner, config)
            .and_then(Session::spawn)
            .attempt(|| format!("serve the FUSE mount on {shown}"))?;
        Ok(Shown {
            attached,
            serving: session.guard,
        })
    }

    /// Returns when it was unmounted, or when `stop` is set; then it is unmounted here, out of sight
    /// of those who still use it.
    pub fn wait(self, stop: &AtomicBool) -> Result<()> {
        while !self.serving.is_finished() {
            if stop.load(Ordering::Relaxed) {
                return match self.attached.detach() {
                    Err(error) if error.kind() == Kind::InUse => self.attached.abort(),
                    done => done,
                };
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}
