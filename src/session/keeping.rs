//! Keeps what a session may write by: its lease, and room on the server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, error, warn};

use super::server::{Happening, Listeners, start_thread};
use super::stage::Stage;
use super::wire::Report;
use crate::error::{Error, Kind, Result, Told};
use crate::remote::lease::Lease;
use crate::remote::{Link, Space, Store};
use crate::units::{Bytes, MIB};

/// How often our own lease is renewed.
const LEASE_RENEWAL: Duration = Duration::from_secs(60);
/// How often the server is asked for its room while something is being written.
const ROOM_EVERY: Duration = Duration::from_secs(2);
/// How often the thread looks at its watch.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Room on the server that is left for an orderly end: so much, or a hundredth of the filesystem
/// where that is less. Bytes.
const RESERVE: u64 = 64 * MIB;

/// A thread that may have to wait for the server.
pub(super) struct Keeping {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Keeping {
    /// Without a lease nothing is written, so there is nothing to keep.
    pub fn start(
        store: &Arc<dyn Store>,
        stage: &Stage,
        lease: Option<Arc<Lease>>,
        listeners: &Arc<Listeners>,
        sender: &Sender<Happening>,
    ) -> Result<Keeping> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, owed) = (stop.clone(), stage.owed());
        let (store, listeners, sender) = (store.clone(), listeners.clone(), sender.clone());
        let keep = move || {
            let Some(lease) = lease else { return };
            let mut room = Room::default();
            let mut renewed = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                room.look(&*store, owed(), &listeners);
                let lost = match store.link() {
                    Link::Over(why) => Some(Error::from(why)),
                    _ if renewed.elapsed() < LEASE_RENEWAL => None,
                    _ => {
                        renewed = Instant::now();
                        lease.renew().err()
                    }
                };
                match lost {
                    Some(error) if error.kind() == Kind::InUse => {
                        let _ = sender.send(Happening::LeaseLost(error));
                        return;
                    }
                    Some(error) if store.link().is_over() => {
                        debug!("{}", error.report());
                        return;
                    }
                    Some(error) => warn!("cannot renew the lease: {}", error.report()),
                    None => {}
                }
                thread::sleep(LOOK_EVERY);
            }
        };
        let thread = start_thread("session-lease", keep)?;
        Ok(Keeping { stop, thread })
    }

    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.join().is_err() {
            error!("the thread session-lease panicked");
        }
    }
}

/// The last look at the server's room.
struct Asked {
    at: Instant,
    /// Bytes sent until then, and free then.
    sent: u64,
    free: u64,
}

impl Asked {
    /// Whether so much was sent since that the room may be short by now.
    fn is_old(&self, sent: u64) -> bool {
        let since = sent.saturating_sub(self.sent);
        since > 0 && (self.at.elapsed() >= ROOM_EVERY || since >= self.free / 8)
    }
}

/// Watches the room on the server.
#[derive(Default)]
struct Room {
    asked: Option<Asked>,
    told: bool,
}

impl Room {
    /// Tells once when what is left is needed for an orderly end.
    fn look(&mut self, store: &dyn Store, owed: u64, listeners: &Listeners) {
        let sent = store.traffic().sent;
        if self.told || self.asked.as_ref().is_some_and(|asked| !asked.is_old(sent)) {
            return;
        }
        let space = store.space().unwrap_or_else(|error| {
            debug!("{}", error.report());
            None
        });
        self.asked = Some(Asked {
            at: Instant::now(),
            sent,
            free: space.map_or(u64::MAX, |space| space.free),
        });
        if let Some(space) = space.filter(|space| is_short(*space, owed)) {
            self.told = true;
            listeners.tell(&Report::Full(Told::from(&full(space))));
        }
    }
}

fn reserve(space: Space) -> u64 {
    RESERVE.min(space.total / 100)
}

fn is_short(space: Space, owed: u64) -> bool {
    space.free < reserve(space).saturating_add(owed)
}

fn full(space: Space) -> Error {
    let text = format!(
        "no space on server: {} free of {}, and {} are left for an orderly end",
        Bytes(space.free),
        Bytes(space.total),
        Bytes(reserve(space))
    );
    Error::new(Kind::NoSpace, text)
        .hint("make room on the server's disk; the image itself grows only as it is filled")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_64_mib_or_a_hundredth() {
        let space = |free, total| Space { free, total };
        assert!(!is_short(space(65 * MIB, 1 << 40), 0));
        assert!(is_short(space(65 * MIB, 1 << 40), 2 * MIB));
        assert!(is_short(space(63 * MIB, 1 << 40), 0));
        assert!(!is_short(space(2 * MIB, 100 * MIB), 0));
        assert!(is_short(space(MIB / 2, 100 * MIB), 0));
    }
}
