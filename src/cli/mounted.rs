//! An image mounted where nobody else sees it, for the verbs that work inside it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use crate::cli::args::ImageArgs;
use crate::cli::key::KeyArgs;
use crate::error::{Error, Kind, Result};
use crate::session::{self, Place, Plan, Session};
use crate::ui::Terminal;

/// What work inside a mounted image is given.
pub struct Inside<'a> {
    /// The root of the filesystem.
    pub root: &'a Path,
    /// Set when a signal asks to stop.
    pub stop: &'a AtomicBool,
    pub terminal: &'a Terminal,
}

/// Mounts, works, unmounts. Returns when everything is synced on the server.
///
/// Call it before any thread is started.
pub fn with<T: Send>(
    image: &ImageArgs,
    key: &KeyArgs,
    read_only: bool,
    wait: Duration,
    terminal: &Arc<Terminal>,
    work: impl FnOnce(&Inside) -> Result<T> + Send,
) -> Result<T> {
    let link = image.link()?;
    let runtime = session::enter_private()?;
    let (signals, stop) = session::count_signals()?;
    let mut keys = key.keys(&image.location, signals.clone())?;
    let plan = Plan {
        location: image.location.clone(),
        link,
        read_only,
        wait,
        place: Place::Private(runtime),
    };
    let started = Session::start(&plan, &mut keys, signals, terminal.clone());
    let session = started.inspect_err(|_| terminal.finish())?;
    let inside = Inside {
        root: session.mounted_at(),
        stop: &stop,
        terminal,
    };
    // The kernel gives a signal to the main thread first, which must not be waiting for the link
    // then, deep in the filesystem: nobody would hear of the signal.
    let worked = thread::scope(|scope| scope.spawn(|| work(&inside)).join());
    let worked = worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let closed = session.close();
    terminal.finish();
    match (worked, closed) {
        (Ok(result), Ok(_)) => Ok(result),
        (Ok(_), Err(closed)) => Err(closed),
        // What ended the session is the cause of what the work saw of it.
        (Err(worked), Err(closed)) if worked.kind() == Kind::Io => {
            Err(Error::new(closed.kind(), worked.to_string()).because(closed))
        }
        (Err(worked), _) => Err(worked),
    }
}
