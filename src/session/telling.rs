//! Tells whoever listens how the session is doing, and the cache how the link is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tracing::error;

use super::server::{Listeners, start_thread};
use super::stage::Stage;
use super::wire::{LinkDown, Report, Status};
use crate::error::{Error, Result, Told};
use crate::remote::{Link, Store};
use crate::units::show_duration;

/// How often figures are told, and the cache hears of the link.
const STATUS_EVERY: Duration = Duration::from_millis(250);

/// A thread that tells until it is stopped. It waits for nobody.
pub(super) struct Telling {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Telling {
    pub fn start(
        store: &Arc<dyn Store>,
        stage: &Stage,
        listeners: &Arc<Listeners>,
    ) -> Result<Telling> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, store, listeners) = (stop.clone(), store.clone(), listeners.clone());
        let (owed, tune) = (stage.owed(), stage.tune());
        let tell = move || {
            let mut told = None;
            let mut reported = Reported::Up;
            while !stopped.load(Ordering::Relaxed) {
                thread::sleep(STATUS_EVERY);
                let traffic = store.traffic();
                let link = store.link();
                reported = reported.follow(&link, &listeners);
                let status = Status {
                    owed: owed(),
                    sent: traffic.sent,
                    received: traffic.received,
                    link_down: down(&link),
                };
                if told != Some(status) {
                    listeners.tell(&Report::Status(status));
                    told = Some(status);
                }
                if let Some(measured) = store.measured() {
                    tune(measured.round_trip, measured.bytes_per_second);
                }
            }
        };
        let thread = start_thread("session-status", tell)?;
        Ok(Telling { stop, thread })
    }

    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.join().is_err() {
            error!("the thread session-status panicked");
        }
    }
}

fn down(link: &Link) -> Option<LinkDown> {
    match link {
        Link::Down {
            since, attempts, ..
        } => Some(LinkDown {
            seconds: since.as_secs(),
            attempts: *attempts,
        }),
        Link::Up { .. } | Link::Over(_) => None,
    }
}

/// What was last said of the link, each change once.
enum Reported {
    Up,
    Down { at: Instant },
    Over,
}

/// A break that is mended sooner is not worth a line.
const WORTH_TELLING: Duration = Duration::from_secs(2);

impl Reported {
    fn follow(self, link: &Link, listeners: &Listeners) -> Reported {
        match (self, link) {
            (Reported::Up, Link::Down { since, why, .. }) if *since >= WORTH_TELLING => {
                let text = format!("the link is down, dialling again: {}", sentence(why));
                listeners.tell(&Report::Warning(text));
                Reported::Down {
                    at: Instant::now() - *since,
                }
            }
            (Reported::Down { at }, Link::Up { .. }) => {
                let shown = show_duration(at.elapsed());
                listeners.tell(&Report::Note(format!("the link is up again after {shown}")));
                Reported::Up
            }
            (Reported::Up | Reported::Down { .. }, Link::Over(why)) => {
                let text = format!("the link is gone: {}", sentence(why));
                listeners.tell(&Report::Warning(text));
                Reported::Over
            }
            (before, _) => before,
        }
    }
}

fn sentence(why: &Told) -> String {
    Error::from(why.clone()).chain().join(": ")
}
