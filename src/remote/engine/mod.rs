//! The SFTP client over one stream, with many requests in flight.
//!
//! Threads: any number of callers submit requests and wait, each for its own replies; the *writer*
//! drains the queue; the *reader* matches replies and alone hands them out; the *watchdog* ends a
//! stream that has gone silent.
//!
//! Live -> Dead, once and for good: by the end of the stream, by a violation of the protocol, by
//! silence, or by drop. The cause is noted first, then everybody who waits is told it, so that no
//! request can slip in between and wait for ever. A failed write only closes the stream: the
//! reader sees that, and knows better why.

mod threads;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tracing::debug;

use super::Traffic;
pub use super::packets::Chunk;
use super::packets::Outgoing;
use super::verdict::refusal;
use crate::buffer::Buffer;
use crate::error::{Attempt, Error, Kind, Result, Told};
use crate::link::{Handle, Stream};
use crate::sftp::{
    Conversation, Event, Extended, Extension, Extensions, Limits, Reply, Request, Violation,
};
use crate::units::{KIB, MIB};

/// The bounds of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// How long the server's first packet may take.
    pub greeting: Duration,
    /// How long nothing at all may come while a request is waiting. Not how old a request may
    /// become: on a slow link hundreds of them share its throughput.
    pub silence: Duration,
    /// The same while a request is waiting that may keep the server's disk busy without a word:
    /// fsync, truncation, copying.
    pub silence_of_disk: Duration,
    /// Payload in flight, in bytes: reads and writes beyond it wait before they are sent.
    pub bytes_in_flight: usize,
    /// Requests in flight.
    pub requests_in_flight: usize,
    /// How many sessions a store uses; as many as the link asks for if `None`.
    pub sessions: Option<usize>,
    /// How long a store tries to restore a broken link before its callers hear of it. Zero: a
    /// session that breaks is not replaced.
    pub io_deadline: Duration,
    /// How long a write of a connection that has ended may still reach the file, from a buffer on
    /// the way or in the server.
    pub late_after_end: Duration,
    /// The same for one that fell silent: TCP sends again what it holds for minutes after the
    /// path has come back.
    pub late_after_silence: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds {
            greeting: crate::link::PATIENCE,
            silence: Duration::from_secs(30),
            // A server with 16 GiB of dirty pages and a disk that writes 30 MB/s.
            silence_of_disk: Duration::from_secs(600),
            // OpenSSH lets one channel carry 2 MiB per round trip; as much again waits at its
            // door.
            bytes_in_flight: 4 * MIB as usize,
            requests_in_flight: 256,
            sessions: None,
            io_deadline: Duration::from_secs(600),
            late_after_end: Duration::from_secs(30),
            late_after_silence: Duration::from_secs(300),
        }
    }
}

/// Payload per request when the server takes as much. Larger ones cost no less and keep small
/// requests behind them waiting longer.
const CHUNK: u64 = 128 * KIB;

/// Payload per request when the server tells no limits: what every server must take (draft
/// section 3).
const CHUNK_UNLIMITED: u64 = 32 * KIB;

/// Nothing is later than this, whatever was set.
const LATE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Chunks are multiples of this, so that a whole sector is in one of them.
const CHUNK_ALIGNMENT: u64 = 4 * KIB;

/// A connection that was silent for so long before its end may have ended for that: ssh gives up by
/// itself, too, and then what it sent still lies in buffers on the way.
const STALLED: Duration = Duration::from_secs(3);

/// The reply to the request that was submitted with this tag.
pub type Completion = (usize, Result<Reply>);

/// Who waits for a reply, and what it gives back to the budget.
struct Ticket {
    tag: usize,
    to: mpsc::Sender<Completion>,
    payload: usize,
    busies_disk: bool,
}

#[derive(Default)]
struct State {
    conversation: Conversation<Ticket>,
    queue: VecDeque<Outgoing>,
    bytes_in_flight: usize,
    /// Callers that wait for room in the budget.
    waiting_for_room: usize,
    /// Requests that may keep the server's disk busy.
    busy: usize,
    /// When the first of the requests now waiting was made.
    waiting_since: Option<Instant>,
    dead: Option<Told>,
    fell_silent: bool,
}

struct Shared {
    state: Mutex<State>,
    /// The queue has something, or the engine is dead.
    work: Condvar,
    /// There is room in the budget, or the engine is dead.
    room: Condvar,
    /// A request waits, or the engine is dead.
    watch: Condvar,
    bounds: Bounds,
    handle: Arc<dyn Handle>,
    born: Instant,
    /// Milliseconds after `born` when a byte last came.
    heard: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

/// An SFTP session that is up. Dropping it ends the session and its stream.
pub struct Engine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    extensions: Extensions,
    limits: Limits,
}

impl Engine {
    /// Greets the server, and asks for its limits.
    ///
    /// [`Kind::Disconnected`] and what the stream's diagnosis says, [`Kind::TimedOut`] when no
    /// packet comes, [`Kind::Unsupported`] when what comes is no SFTP version 3.
    pub fn start(stream: Stream, bounds: Bounds) -> Result<Self> {
        let Stream {
            reader,
            writer,
            handle,
        } = stream;
        let mut state = State::default();
        let hello = Conversation::<Ticket>::HELLO.to_vec();
        state.queue.push_back(Outgoing {
            head: hello,
            data: None,
        });
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            work: Condvar::new(),
            room: Condvar::new(),
            watch: Condvar::new(),
            bounds,
            handle,
            born: Instant::now(),
            heard: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        });
        let mut engine = Engine {
            shared: shared.clone(),
            threads: Vec::new(),
            extensions: Extensions::default(),
            limits: Limits::default(),
        };
        let (ready, greeted) = mpsc::channel();
        let s = shared.clone();
        engine.spawn("sftp-reader", move || s.read(reader, &ready))?;
        let s = shared.clone();
        engine.spawn("sftp-writer", move || s.write(writer))?;
        let s = shared;
        engine.spawn("sftp-watchdog", move || s.watch())?;

        engine.extensions = match greeted.recv_timeout(bounds.greeting) {
            Ok(extensions) => extensions,
            Err(_) => return Err(engine.no_greeting()),
        };
        if engine.extensions.has(Extension::Limits) {
            engine.limits = engine.ask_limits().attempt(|| "ask the server's limits")?;
        }
        debug!(extensions = ?engine.extensions, limits = ?engine.limits, "SFTP is up");
        Ok(engine)
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = thread::Builder::new().name(name.into()).spawn(body)?;
        self.threads.push(thread);
        Ok(())
    }

    fn no_greeting(&self) -> Error {
        let late = || {
            let seconds = self.shared.bounds.greeting.as_secs_f32();
            Error::new(
                Kind::TimedOut,
                format!("the server did not begin SFTP within {seconds} s"),
            )
        };
        // The engine is dead when the stream is at its end; else it is only late.
        let cause = self.shared.lock().dead.clone();
        cause.map_or_else(late, Error::from)
    }

    fn ask_limits(&self) -> Result<Limits> {
        match self.call(&Request::Extended(Extended::Limits))? {
            Reply::Extended(data) => Limits::decode(&data)
                .map_err(|e| Error::new(Kind::Unsupported, "the answer is malformed").because(e)),
            other => Err(refusal(&other)),
        }
    }

    pub fn extensions(&self) -> Extensions {
        self.extensions
    }

    /// The most bytes that one read request asks for.
    pub fn read_chunk(&self) -> usize {
        chunk(self.limits.read)
    }

    /// The most bytes that one write request carries.
    pub fn write_chunk(&self) -> usize {
        chunk(self.limits.write)
    }

    pub fn bounds(&self) -> Bounds {
        self.shared.bounds
    }

    pub fn traffic(&self) -> Traffic {
        Traffic {
            sent: self.shared.sent.load(Ordering::Relaxed),
            received: self.shared.received.load(Ordering::Relaxed),
        }
    }

    /// How long what was not answered when the session ended may still be done by the server.
    pub fn late_writes(&self) -> Duration {
        let bounds = self.shared.bounds;
        let late = match self.shared.lock().fell_silent {
            true => bounds.late_after_silence,
            false => bounds.late_after_end,
        };
        late.min(LATE_MAX)
    }

    /// Ends the session, as dropping it does, for everybody who still knows it.
    pub fn end(&self) {
        let closed = Error::new(Kind::Disconnected, "the session was closed");
        self.shared.die(&closed);
        self.shared.handle.close();
    }

    /// Why the session is over; `None` while it is up.
    pub fn dead(&self) -> Option<Error> {
        self.shared.lock().dead.clone().map(Error::from)
    }

    /// Queues a request; its reply goes to `to` with `tag`, exactly once, be it the error that
    /// ended the session. Waits only for room in the budget. Writes go by [`Engine::submit_write`],
    /// which shares their data instead of copying it.
    pub fn submit(
        &self,
        request: &Request<'_>,
        tag: usize,
        to: &mpsc::Sender<Completion>,
    ) -> Result<()> {
        let data = match request {
            Request::Write { data, .. } => Some(Chunk {
                bytes: Arc::new(Buffer::from(*data)),
                range: 0..data.len(),
            }),
            _ => None,
        };
        self.shared.submit(request, data, tag, to)
    }

    /// Queues a write of at most [`Engine::write_chunk`] bytes, as [`Engine::submit`] does.
    pub fn submit_write(
        &self,
        handle: &[u8],
        offset: u64,
        chunk: Chunk,
        tag: usize,
        to: &mpsc::Sender<Completion>,
    ) -> Result<()> {
        let bytes = chunk.bytes.clone();
        let data = bytes
            .get(chunk.range.clone())
            .ok_or_else(|| Error::new(Kind::Usage, "a chunk that reaches beyond its buffer"))?;
        let request = Request::Write {
            handle,
            offset,
            data,
        };
        self.shared.submit(&request, Some(chunk), tag, to)
    }

    /// One request and its reply.
    pub fn call(&self, request: &Request<'_>) -> Result<Reply> {
        let (to, completions) = mpsc::channel();
        self.submit(request, 0, &to)?;
        drop(to);
        self.wait(&completions).map(|(_, reply)| reply)
    }

    /// The next reply out of those that were submitted for `completions`.
    pub fn wait(&self, completions: &mpsc::Receiver<Completion>) -> Result<(usize, Reply)> {
        match completions.recv() {
            Ok((tag, reply)) => reply.map(|reply| (tag, reply)),
            Err(_) => Err(Error::new(Kind::Disconnected, "nobody answers any more")),
        }
    }
}

/// What one request carries where the server's limit is `limit` (0: it tells none).
fn chunk(limit: u64) -> usize {
    let most = match limit {
        0 => CHUNK_UNLIMITED,
        limit => limit.min(CHUNK),
    };
    let aligned = most - most % CHUNK_ALIGNMENT;
    // At most CHUNK, so it fits.
    aligned.max(CHUNK_ALIGNMENT) as usize
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a panic there has been reported there
        }
    }
}

/// Whether a request may keep the server's disk busy without a word.
fn busies_disk(request: &Request<'_>) -> bool {
    matches!(
        request,
        Request::Extended(Extended::Fsync { .. } | Extended::CopyData { .. })
            | Request::Setstat { .. }
            | Request::Fsetstat { .. }
            | Request::Remove { .. }
    )
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics with the lock held; if it did, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(
        &self,
        request: &Request<'_>,
        data: Option<Chunk>,
        tag: usize,
        to: &mpsc::Sender<Completion>,
    ) -> Result<()> {
        let payload = match request {
            Request::Read { len, .. } => *len as usize,
            _ => data.as_ref().map_or(0, |chunk| chunk.range.len()),
        };
        let ticket = Ticket {
            tag,
            to: to.clone(),
            payload,
            busies_disk: busies_disk(request),
        };
        // Closing is what makes room, and is done in drops: it does not wait.
        let waits = !matches!(request, Request::Close { .. });
        let full = |state: &mut State| {
            let requests = state.conversation.outstanding();
            let bytes = state.bytes_in_flight.saturating_add(payload);
            let over = requests >= self.bounds.requests_in_flight
                || (requests > 0 && bytes > self.bounds.bytes_in_flight);
            waits && over && state.dead.is_none()
        };
        let mut state = self.lock();
        while full(&mut state) {
            state.waiting_for_room += 1;
            let waited = self.room.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
            state.waiting_for_room -= 1;
        }
        if let Some(cause) = &state.dead {
            return Err(cause.clone().into());
        }

        let busy = usize::from(ticket.busies_disk);
        let mut head = Vec::with_capacity(64);
        state
            .conversation
            .request(request, ticket, &mut head)
            .map_err(|(_, what)| Error::new(Kind::Usage, what.to_string()))?;
        state.bytes_in_flight += payload;
        state.busy += busy;
        state.queue.push_back(Outgoing { head, data });
        if state.waiting_since.is_none() {
            state.waiting_since = Some(Instant::now());
            self.watch.notify_all();
        }
        self.work.notify_one();
        Ok(())
    }

    /// Notes the cause, the first one only, and then tells everybody who waits.
    fn die(&self, cause: &Error) {
        let mut state = self.lock();
        if state.dead.is_none() {
            debug!(cause = %cause.chain().join(": "), "the SFTP session is over");
            state.dead = Some(Told::from(cause));
            state.fell_silent |= self.silent_for(&state) >= STALLED;
        }
        let cause = state.dead.clone();
        let abandoned = state.conversation.abandon();
        state.queue.clear();
        state.waiting_since = None;
        drop(state);
        for condition in [&self.work, &self.room, &self.watch] {
            condition.notify_all();
        }
        for ticket in abandoned {
            let Some(cause) = cause.clone() else { continue };
            let _ = ticket.to.send((ticket.tag, Err(cause.into()))); // nobody may want it
        }
    }

    /// For how long the server has not said a word although a request waits.
    fn silent_for(&self, state: &State) -> Duration {
        let heard = self.born + Duration::from_millis(self.heard.load(Ordering::Relaxed));
        let since = state.waiting_since;
        since.map_or(Duration::ZERO, |since| since.max(heard).elapsed())
    }
}

impl State {
    /// Takes a packet; `None` when the session is over and nobody waits for it.
    fn receive(&mut self, packet: Vec<u8>) -> Result<Option<Event<Ticket>>, Violation> {
        if self.dead.is_some() {
            return Ok(None);
        }
        let event = self.conversation.receive(packet)?;
        if let Event::Reply { ticket, .. } = &event {
            self.bytes_in_flight = self.bytes_in_flight.saturating_sub(ticket.payload);
            self.busy = self.busy.saturating_sub(usize::from(ticket.busies_disk));
            if self.conversation.outstanding() == 0 {
                self.waiting_since = None;
            }
        }
        Ok(Some(event))
    }
}
