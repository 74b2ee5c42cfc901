//! A session, what it is wanted for, and how long it is held.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::super::files::Files;
use super::Shared;
use crate::error::Result;
use crate::units::KIB;

/// Reads up to this length take the fast lane.
pub(super) const SMALL: usize = 64 * KIB as usize;

/// What a session is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// Files, attributes, leases.
    Control,
    /// So many bytes.
    Read(usize),
    Write(usize),
}

impl Errand {
    pub(super) fn load(self) -> usize {
        match self {
            Errand::Control => 0,
            Errand::Read(len) | Errand::Write(len) => len,
        }
    }

    pub(super) fn is_bulk(self) -> bool {
        match self {
            Errand::Control => false,
            Errand::Read(len) => len > SMALL,
            Errand::Write(_) => true,
        }
    }
}

/// An SFTP session that was up when it was handed out.
pub struct Session {
    pub files: Arc<Files>,
    /// By the link's counter, when it was up.
    pub number: u64,
    pub(super) load: AtomicUsize,
    pub(super) syncing: AtomicBool,
}

impl Session {
    pub(super) fn new(files: Arc<Files>, number: u64) -> Arc<Self> {
        Arc::new(Session {
            files,
            number,
            load: AtomicUsize::new(0),
            syncing: AtomicBool::new(false),
        })
    }

    /// Whether it has broken.
    pub fn is_dead(&self) -> bool {
        self.files.engine.dead().is_some()
    }
}

/// Checks that a new session leads to where the others did.
pub type Proof = Arc<dyn Fn(&Arc<Files>) -> Result<()> + Send + Sync>;

pub fn proof(body: impl Fn(&Arc<Files>) -> Result<()> + Send + Sync + 'static) -> Proof {
    Arc::new(body)
}

/// A session that is being synced on.
pub struct Syncing(pub(super) Arc<Session>);

impl Syncing {
    pub fn session(&self) -> &Arc<Session> {
        &self.0
    }
}

impl Drop for Syncing {
    fn drop(&mut self) {
        self.0.syncing.store(false, Ordering::Relaxed);
    }
}

/// A session with so many bytes under way on it.
pub(super) struct Booked<'a> {
    shared: &'a Shared,
    pub(super) session: Arc<Session>,
    load: usize,
}

impl<'a> Booked<'a> {
    /// The load has been added by [`Shared::pick`].
    pub(super) fn new(shared: &'a Shared, session: Arc<Session>, load: usize) -> Self {
        Booked {
            shared,
            session,
            load,
        }
    }
}

impl Drop for Booked<'_> {
    fn drop(&mut self) {
        if self.load > 0 {
            self.session.load.fetch_sub(self.load, Ordering::Relaxed);
            // Under the lock, so that nobody misses it between looking and waiting.
            let _state = self.shared.lock();
            self.shared.changed.notify_all();
        }
    }
}
