//! The thread that watches: has sessions dialled and ended, and measures what they carry.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::super::engine::Engine;
use super::super::files::Files;
use super::super::growth::Sample;
use super::{LOOK_EVERY_IDLE, Proof, Session, Shared, State, drop_all};
use crate::error::{Error, Kind, Told};
use crate::link::Occasion;
use crate::units::show_duration;

/// How often it looks while there is traffic.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Pauses between two attempts to dial: the first, doubled each time, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);

impl Shared {
    /// The watching thread's life.
    pub(super) fn watch(self: &Arc<Self>) {
        let mut state = self.lock();
        let mut last = (Instant::now(), 0);
        while !state.closed {
            let ended = std::mem::take(&mut state.ended);
            let dead: Vec<_> = state
                .sessions
                .iter()
                .filter(|s| s.is_dead())
                .cloned()
                .collect();
            if !ended.is_empty() || !dead.is_empty() {
                drop(state);
                // Somebody may still know it: it is over for them, too.
                ended.iter().for_each(|session| session.files.engine.end());
                drop_all(ended); // joins their threads
                dead.iter().for_each(|session| self.lost(session));
                state = self.lock();
                continue;
            }
            let busy = self.look(&mut state, &mut last);
            self.trim(&mut state);
            let missing = self.dial_if_missing(&mut state);
            let nap = match (busy, missing) {
                (_, Some(until)) => until
                    .saturating_duration_since(Instant::now())
                    .max(PAUSE_MIN / 2),
                (true, None) => LOOK_EVERY,
                (false, None) => LOOK_EVERY_IDLE,
            };
            let waited = self.watch.wait_timeout(state, nap);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut rest = std::mem::take(&mut state.ended);
        rest.append(&mut state.sessions);
        drop(state);
        drop_all(rest);
    }

    /// Has the number of sessions decided anew; whether there is traffic.
    fn look(&self, state: &mut State, last: &mut (Instant, u64)) -> bool {
        let full = self.full.swap(false, Ordering::Relaxed);
        let carried = state.traffic();
        let bytes = carried.sent + carried.received;
        let took = last.0.elapsed();
        let moved = bytes.saturating_sub(last.1);
        if took >= LOOK_EVERY / 2 {
            let rate = (moved as f64 / took.as_secs_f64()) as u64;
            state.bytes_per_second = rate_after(state.bytes_per_second, rate, full);
        }
        if took >= LOOK_EVERY / 2 {
            *last = (Instant::now(), bytes);
        }
        let before = state.growth.wanted();
        let sample = Sample {
            now: self.born.elapsed(),
            bytes,
            full,
            sessions: state.sessions.len(),
            round_trip: state.round_trip,
        };
        state.growth.look(sample);
        let wanted = state.growth.wanted();
        if wanted != before {
            debug!(wanted, before, round_trip = ?state.round_trip, rate = state.bytes_per_second, "sessions");
        }
        full || moved > 0
    }

    /// Ends sessions beyond the number wanted, the youngest first, when nothing is under way.
    fn trim(&self, state: &mut State) {
        let wanted = state.growth.wanted();
        while state.sessions.len() > wanted {
            let idle = |s: &&Arc<Session>| {
                s.load.load(Ordering::Relaxed) == 0 && !s.syncing.load(Ordering::Relaxed)
            };
            let Some(session) = state.sessions.last().filter(idle).cloned() else {
                return;
            };
            state.end(&session);
        }
    }

    /// Starts a dial if a session is missing. Gives when the next one may start, if one is missing
    /// and none is under way.
    fn dial_if_missing(self: &Arc<Self>, state: &mut State) -> Option<Instant> {
        self.dial.as_ref()?;
        let up = state.sessions.len();
        let wanted = state.growth.wanted();
        // While nothing is up, one dial at a time finds out what is the matter.
        let room = match up {
            0 => usize::from(state.dialling == 0),
            _ => wanted.saturating_sub(up + state.dialling),
        };
        if room == 0 || state.over.is_some() {
            return None;
        }
        if state.next_dial > Instant::now() {
            return Some(state.next_dial);
        }
        for _ in 0..room {
            let shared = self.clone();
            state.dialling += 1;
            let dialler = thread::Builder::new().name("link-dial".into());
            if let Err(error) = dialler.spawn(move || shared.dial_one()) {
                warn!(%error, "cannot start a thread to dial");
                state.dialling -= 1;
                state.next_dial = Instant::now() + PAUSE_MAX;
            }
        }
        None
    }

    /// A dialling thread's life.
    fn dial_one(&self) {
        let proofs: Vec<Proof> = self.lock().proofs.values().cloned().collect();
        let begun = self
            .dial
            .as_ref()
            .ok_or_else(|| Error::new(Kind::Disconnected, "there is nothing to dial"))
            .and_then(|dial| dial.dial(Occasion::Again))
            .and_then(|stream| Engine::start(stream, self.bounds));
        let mut disproved = None;
        let session = begun.and_then(|engine| {
            let files = Arc::new(Files::new(Arc::new(engine)));
            for proof in proofs {
                if let Err(error) = proof(&files) {
                    // Whatever else it is may pass: a server that has just started may not have
                    // mounted its disk yet.
                    if matches!(error.kind(), Kind::Corrupt | Kind::InUse) {
                        disproved = Some(Told::from(&error));
                    }
                    return Err(error);
                }
            }
            Ok(Session::new(
                files,
                self.counter.fetch_add(1, Ordering::SeqCst),
            ))
        });
        let mut state = self.lock();
        state.dialling -= 1;
        match session {
            Ok(session) if state.closed => state.ended.push(session),
            Ok(session) => {
                if let Some(down) = state.down.take() {
                    let shown = show_duration(down.since.elapsed());
                    info!("the link to {} is up again after {shown}", self.name);
                }
                state.failures = 0;
                state.sessions.push(session);
            }
            Err(error) => {
                debug!(why = %error.chain().join(": "), "a dial failed");
                let up = state.sessions.len();
                let now = self.born.elapsed();
                if disproved.is_some() {
                    state.over = state.over.take().or(disproved);
                } else if up > 0 {
                    state.growth.refused(up, now);
                }
                let pause = pause_after(state.failures);
                state.failures = state.failures.saturating_add(1);
                state.next_dial = Instant::now() + pause;
                if let Some(down) = &mut state.down {
                    down.attempts += 1;
                    down.why = Told::from(&error);
                }
            }
        }
        drop(state);
        self.changed.notify_all();
        self.watch.notify_all();
    }
}

/// What a link carries, where `known` was thought and `seen` went through. Who is seen to carry more
/// than was thought can do that, whether or not it was full: readers ask for as much ahead as the link
/// is thought to carry, so it would never be full again. Less counts only when nobody held back.
fn rate_after(known: u64, seen: u64, full: bool) -> u64 {
    match (seen > known, full) {
        (true, _) => known + (seen - known) / 2,
        (false, true) => known - (known - seen) / 8,
        (false, false) => known,
    }
}

/// Doubled with every failure, and never quite the same, so that many clients of one server do
/// not come back at once.
fn pause_after(failures: u32) -> Duration {
    let doubled = PAUSE_MIN.saturating_mul(1 << failures.min(10));
    let mut byte = [0];
    let jitter = match getrandom::fill(&mut byte) {
        Ok(()) => 0.75 + f64::from(byte[0]) / 512.0,
        Err(_) => 1.0,
    };
    doubled.min(PAUSE_MAX).mul_f64(jitter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_is_no_longer_full_may_still_prove_faster() {
        let thought = rate_after(40_000_000, 80_000_000, false);
        assert!(thought > 40_000_000);
        assert_eq!(rate_after(40_000_000, 10_000_000, false), 40_000_000);
        assert!(rate_after(40_000_000, 10_000_000, true) < 40_000_000);
    }
}
