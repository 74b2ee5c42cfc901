//! The sessions with one server: how many there are, which one carries what, and a new one for
//! each that breaks.
//!
//! The oldest session is the *fast lane*: small reads and everything about files. Bulk data take
//! the others, the one with the least under way, and no more than a window's worth each. When a
//! session breaks, what it carried is sent again on another; when none is left, callers wait until
//! one is dialled, and for no longer than the deadline. A new session carries nothing before it
//! is proven that it leads to the same image under the same lease.
//!
//! One thread watches and has sessions dialled; each dial is a thread of its own, since it may
//! hang.

mod session;
mod watch;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::engine::{Bounds, Engine};
use super::files::Files;
use super::growth::Growth;
use super::{Link, Measured, Traffic};
use crate::error::{Attempt, Error, Kind, Result, Told};
use crate::link::{Dial, Occasion};
use crate::units::{MIB, show_duration};
use session::{Booked, SMALL};
pub use session::{Errand, Proof, Session, Syncing, proof};

/// What one session may have under way, in bytes. OpenSSH lets a channel carry 2 MiB per round trip; as
/// parts of what is under way have arrived, more has to be asked for to keep it full.
const WINDOW: usize = 3 * MIB as usize;

/// How often the watching thread, and who waits for a session, looks while nothing happens.
const LOOK_EVERY_IDLE: Duration = Duration::from_secs(1);

/// No session is up.
#[derive(Clone, Debug)]
struct Down {
    since: Instant,
    attempts: u32,
    why: Told,
}

struct State {
    /// Oldest first.
    sessions: Vec<Arc<Session>>,
    growth: Growth,
    dialling: usize,
    next_dial: Instant,
    failures: u32,
    down: Option<Down>,
    /// Why nothing is tried any more.
    over: Option<Told>,
    /// Broken or no longer wanted; ended by the watching thread, which may take a moment.
    ended: Vec<Arc<Session>>,
    /// What ended sessions have carried.
    past: Traffic,
    round_trip: Option<Duration>,
    bytes_per_second: u64,
    proofs: BTreeMap<String, Proof>,
    closed: bool,
}

struct Shared {
    /// None where there is a single session for good.
    dial: Option<Arc<dyn Dial>>,
    bounds: Bounds,
    name: String,
    state: Mutex<State>,
    /// A session came, went or has room; or all is over.
    changed: Condvar,
    /// Held by the one bulk errand that waits for room: the others would wake for nothing whenever
    /// one is done. Taken before `state`.
    turn: Mutex<()>,
    /// Something for the watching thread.
    watch: Condvar,
    counter: AtomicU64,
    /// A caller had to wait for room since the last look.
    full: AtomicBool,
    born: Instant,
}

/// See the [module](self). Dropping it ends all sessions.
pub struct Lanes {
    shared: Arc<Shared>,
    watcher: Option<JoinHandle<()>>,
}

impl Lanes {
    /// Dials the first session. It fails at once if that fails: nothing is tried again before
    /// anything has worked.
    pub fn connect(dial: Arc<dyn Dial>, name: &str, bounds: Bounds) -> Result<Lanes> {
        let bounds = Bounds {
            greeting: dial.patience(),
            ..bounds
        };
        let engine = dial
            .dial(Occasion::First)
            .and_then(|stream| Engine::start(stream, bounds))
            .attempt(|| format!("connect to the server of {name}"))?;
        let dial = (!bounds.io_deadline.is_zero()).then_some(dial);
        let mut lanes = Lanes::new(Arc::new(engine), dial, name, bounds);
        let shared = lanes.shared.clone();
        let watcher = thread::Builder::new().name("link-watch".into());
        lanes.watcher = Some(watcher.spawn(move || shared.watch())?);
        Ok(lanes)
    }

    /// A single session that is not replaced when it breaks.
    pub fn single(engine: Arc<Engine>, name: &str) -> Lanes {
        let bounds = engine.bounds();
        Lanes::new(engine, None, name, bounds)
    }

    fn new(engine: Arc<Engine>, dial: Option<Arc<dyn Dial>>, name: &str, bounds: Bounds) -> Lanes {
        let streams = dial.as_ref().map_or(1, |dial| dial.streams_max());
        let growth = match bounds.sessions {
            Some(pinned) => Growth::new(pinned.min(streams), true),
            None => Growth::new(streams, false),
        };
        let counter = AtomicU64::new(1);
        let files = Arc::new(Files::new(engine));
        let first = Session::new(files, counter.fetch_add(1, Ordering::SeqCst));
        let state = State {
            sessions: vec![first],
            growth,
            dialling: 0,
            next_dial: Instant::now(),
            failures: 0,
            down: None,
            over: None,
            ended: Vec::new(),
            past: Traffic::default(),
            round_trip: None,
            bytes_per_second: 0,
            proofs: BTreeMap::new(),
            closed: false,
        };
        Lanes {
            shared: Arc::new(Shared {
                dial,
                bounds,
                name: name.into(),
                state: Mutex::new(state),
                changed: Condvar::new(),
                turn: Mutex::new(()),
                watch: Condvar::new(),
                counter,
                full: AtomicBool::new(false),
                born: Instant::now(),
            }),
            watcher: None,
        }
    }

    pub fn bounds(&self) -> Bounds {
        self.shared.bounds
    }

    /// The next number of the counter that orders writes, answers and sessions.
    pub fn tick(&self) -> u64 {
        self.shared.counter.fetch_add(1, Ordering::SeqCst)
    }

    /// Does `errand` on a session. When that breaks meanwhile, it is done again on another, as
    /// often as need be; so it must be one that may be done twice.
    ///
    /// What `errand` itself fails with on a session that is up is final. When no session is up for
    /// the whole deadline, or `errand` breaks every one of them for as long, everything ends.
    pub fn run<T>(
        &self,
        errand: Errand,
        mut body: impl FnMut(&Arc<Session>) -> Result<T>,
    ) -> Result<T> {
        let mut failing_since = None;
        loop {
            let session = self.shared.pick(errand)?;
            let session = Booked::new(&self.shared, session, errand.load());
            let begun = Instant::now();
            match body(&session.session) {
                Err(error) if session.session.is_dead() => {
                    let since = *failing_since.get_or_insert_with(Instant::now);
                    self.lost(&session.session, since, &error)?;
                }
                outcome => {
                    if matches!(errand, Errand::Read(..=SMALL)) && outcome.is_ok() {
                        self.note_round_trip(begun.elapsed());
                    }
                    return outcome;
                }
            }
        }
    }

    /// As [`Lanes::run`], for what must not be done twice: a break is an error.
    pub fn run_once<T>(&self, body: impl FnOnce(&Arc<Session>) -> Result<T>) -> Result<T> {
        let session = self.shared.pick(Errand::Control)?;
        let outcome = body(&session);
        if session.is_dead() {
            self.shared.lost(&session);
        }
        outcome
    }

    /// A session to sync on, best one that was up before the number `oldest`, and not the fast
    /// lane. While it is held it gets no bulk data if others can.
    pub fn for_sync(&self, oldest: u64) -> Result<Syncing> {
        loop {
            self.shared.pick(Errand::Control)?;
            let state = self.shared.lock();
            let covers = |session: &&Arc<Session>| session.number < oldest && !session.is_dead();
            let slow = state.sessions.iter().skip(1).find(covers);
            let found = slow.or_else(|| state.sessions.first());
            if let Some(session) = found {
                session.syncing.store(true, Ordering::Relaxed);
                return Ok(Syncing(session.clone()));
            }
        }
    }

    /// Tells that a session was found dead, and fails when the same errand has failed so since
    /// before the deadline.
    pub fn lost(&self, session: &Arc<Session>, since: Instant, error: &Error) -> Result<()> {
        self.shared.lost(session);
        match since.elapsed() < self.shared.bounds.io_deadline {
            true => Ok(()),
            false => Err(self.shared.end_by(&Told::from(error))),
        }
    }

    /// What a single request took to be answered.
    pub fn note_round_trip(&self, took: Duration) {
        self.shared.note_round_trip(took);
    }

    /// From now on, a new session has to pass `proof` before it is used.
    pub fn demand(&self, what: &str, proof: Option<Proof>) {
        let mut state = self.shared.lock();
        match proof {
            Some(proof) => drop(state.proofs.insert(what.into(), proof)),
            None => drop(state.proofs.remove(what)),
        }
    }

    /// Ends everything: a session does not lead to where the others did. Gives what all are told.
    pub fn disprove(&self, error: &Error) -> Error {
        let mut state = self.shared.lock();
        let over = state.over.get_or_insert_with(|| Told::from(error)).clone();
        drop(state);
        self.shared.changed.notify_all();
        self.shared.watch.notify_all();
        over.into()
    }

    /// Why nothing is tried any more; `None` while it is.
    pub fn over(&self) -> Option<Error> {
        self.shared.lock().over.clone().map(Error::from)
    }

    pub fn link(&self) -> Link {
        let state = self.shared.lock();
        match (&state.over, &state.down) {
            (Some(why), _) => Link::Over(why.clone()),
            (None, Some(down)) => Link::Down {
                since: down.since.elapsed(),
                attempts: down.attempts,
                why: down.why.clone(),
            },
            (None, None) => Link::Up {
                sessions: state.sessions.len(),
            },
        }
    }

    pub fn measured(&self) -> Option<Measured> {
        let state = self.shared.lock();
        let round_trip = state.round_trip?;
        Some(Measured {
            round_trip,
            bytes_per_second: state.bytes_per_second,
        })
    }

    pub fn traffic(&self) -> Traffic {
        self.shared.lock().traffic()
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        let sessions = std::mem::take(&mut state.sessions);
        drop(state);
        self.shared.watch.notify_all();
        self.shared.changed.notify_all();
        drop_all(sessions);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join(); // a panic there has been reported there
        }
    }
}

/// Lets go of sessions at the same time: each takes a round trip, or as long as a silent server is given.
fn drop_all(sessions: Vec<Arc<Session>>) {
    thread::scope(|scope| {
        for session in sessions {
            // Without a thread it is dropped here.
            let _ = thread::Builder::new().spawn_scoped(scope, move || drop(session));
        }
    });
}

impl State {
    fn traffic(&self) -> Traffic {
        let mut sum = self.past;
        for session in &self.sessions {
            let carried = session.files.engine.traffic();
            sum.sent += carried.sent;
            sum.received += carried.received;
        }
        sum
    }

    /// Takes a session out.
    fn end(&mut self, session: &Arc<Session>) -> bool {
        let before = self.sessions.len();
        self.sessions.retain(|known| !Arc::ptr_eq(known, session));
        if self.sessions.len() == before {
            return false;
        }
        let carried = session.files.engine.traffic();
        self.past.sent += carried.sent;
        self.past.received += carried.received;
        self.ended.push(session.clone());
        true
    }

    /// The session for an errand; `None` when all that could carry it are full.
    fn choose(&self, errand: Errand) -> Option<&Arc<Session>> {
        if !errand.is_bulk() {
            return self.sessions.first();
        }
        let bulk = match self.sessions.len() {
            0 | 1 => &self.sessions[..],
            _ => &self.sessions[1..],
        };
        let load = |session: &&Arc<Session>| session.load.load(Ordering::Relaxed);
        let idle = |session: &&Arc<Session>| !session.syncing.load(Ordering::Relaxed);
        let least = bulk.iter().filter(idle).min_by_key(load);
        let least = least.or_else(|| bulk.iter().min_by_key(load))?;
        let under_way = load(&least);
        (under_way == 0 || under_way + errand.load() <= WINDOW).then_some(least)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics with the lock held; if it did, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session for an errand, which counts as under way there.
    fn pick(&self, errand: Errand) -> Result<Arc<Session>> {
        let mut turn = None;
        let mut state = self.lock();
        loop {
            if let Some(why) = &state.over {
                return Err(why.clone().into());
            }
            if state.closed {
                return Err(Error::new(Kind::Disconnected, "the link was closed"));
            }
            if let Some(session) = state.choose(errand) {
                session.load.fetch_add(errand.load(), Ordering::Relaxed);
                return Ok(session.clone());
            }
            if errand.is_bulk() && turn.is_none() {
                drop(state);
                turn = Some(self.turn.lock().unwrap_or_else(PoisonError::into_inner));
                state = self.lock();
                continue;
            }
            let patience = match &state.down {
                None => {
                    if !self.full.swap(true, Ordering::Relaxed) {
                        self.watch.notify_all();
                    }
                    LOOK_EVERY_IDLE
                }
                Some(down) => {
                    let left = self.bounds.io_deadline.saturating_sub(down.since.elapsed());
                    if left.is_zero() {
                        let down = down.clone();
                        drop(state);
                        return Err(self.end_by(&down.why));
                    }
                    left
                }
            };
            let waited = self.changed.wait_timeout(state, patience);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes a broken session out of use.
    fn lost(&self, session: &Arc<Session>) {
        let why = session.files.engine.dead();
        let mut state = self.lock();
        if !state.end(session) {
            return;
        }
        let why = why.unwrap_or_else(|| Error::new(Kind::Disconnected, "the session has ended"));
        debug!(why = %why.chain().join(": "), left = state.sessions.len(), "a session broke");
        if self.dial.is_none() {
            state.over.get_or_insert(Told::from(&why));
        } else if state.sessions.is_empty() && state.over.is_none() {
            info!(
                "the link to {} is down: {}",
                self.name,
                why.chain().join(": ")
            );
            state.down.get_or_insert(Down {
                since: Instant::now(),
                attempts: 0,
                why: Told::from(&why),
            });
        }
        drop(state);
        self.watch.notify_all();
        self.changed.notify_all();
    }

    /// Ends everything, for the cause that the last attempt failed with.
    fn end_by(&self, cause: &Told) -> Error {
        let mut state = self.lock();
        let over = state.over.get_or_insert_with(|| {
            let deadline = self.bounds.io_deadline;
            if deadline.is_zero() {
                return cause.clone();
            }
            let shown = show_duration(deadline);
            let text = format!("restore the link to {} within {shown}", self.name);
            let hint = "what was synced before is safe; check the network, and run it again";
            let error = Error::new(Kind::Disconnected, text).hint(hint);
            Told::from(&error.because(Error::from(cause.clone())))
        });
        let over = over.clone();
        drop(state);
        self.changed.notify_all();
        over.into()
    }

    fn note_round_trip(&self, took: Duration) {
        let mut state = self.lock();
        // The shortest counts: the longer ones have waited for something else.
        state.round_trip = Some(match state.round_trip {
            Some(known) if took > known => known + (took - known) / 64,
            _ => took,
        });
    }
}
