//! The callers' side of the cache: asks the table, copies under the lock, waits, and fetches.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::frames::Frames;
use super::readahead::{Parameters, Readahead};
use super::table::{Fetch, FetchId, Flush, Limits, Read, Table, Write};
use super::{BLOCK, SENDERS_MAX, Settings, Stats, lock};
use crate::buffer::Buffers;
use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result, Told};

pub struct Shared {
    pub inner: Arc<dyn Device>,
    pub state: Mutex<State>,
    /// Of what is fetched.
    incoming: Buffers,
    /// Of what is written back.
    pub outgoing: Buffers,
    /// Workers wait here.
    pub work: Condvar,
    /// Everybody else waits here, for any I/O to end.
    changed: Condvar,
    /// Held by the one writer that waits for room: the others would wake for nothing whenever an
    /// I/O ends. Taken before `state`.
    turn: Mutex<()>,
    /// Held shared by every request, and alone by what must not meet one.
    pub gate: RwLock<()>,
    size: AtomicU64,
    closed: AtomicBool,
    started: Instant,
}

pub struct State {
    pub table: Table,
    pub frames: Frames,
    pub readahead: Readahead,
    /// Fetches for the workers. As each holds a frame for every block, frames are its bound.
    pub queue: VecDeque<Fetch>,
    /// Readers that wait for somebody else's fetch.
    waiting: HashMap<FetchId, Waiting>,
    /// The first failed write or inner flush.
    pub failure: Option<Told>,
    pub stats: Stats,
    pub stop: bool,
    /// Workers that wait, and those among them that will wake by themselves.
    pub idle: usize,
    pub armed: usize,
    /// Workers that write.
    pub senders: usize,
    /// Threads that wait on `changed`.
    waiters: usize,
}

pub type Guard<'a> = MutexGuard<'a, State>;

#[derive(Default)]
struct Waiting {
    readers: usize,
    failure: Option<Told>,
}

/// What one request wants to be fetched.
struct Want {
    blocks: Range<u64>,
    /// Fetch nothing else: a fetch with neighbours has failed.
    narrow: bool,
    /// The read-ahead policy knows of the request.
    known: bool,
}

impl Want {
    fn new(blocks: Range<u64>) -> Self {
        Want {
            blocks,
            narrow: false,
            known: false,
        }
    }
}

/// The part of a request that lies in one block: where in the block, and where in the request.
fn piece(block: u64, offset: u64, length: usize) -> (Range<usize>, Range<usize>) {
    let start = block * BLOCK as u64;
    let from = offset.max(start);
    let to = (offset + length as u64).min(start.saturating_add(BLOCK as u64));
    (
        (from - start) as usize..(to - start) as usize,
        (from - offset) as usize..(to - offset) as usize,
    )
}

fn blocks_of(offset: u64, length: usize) -> Range<u64> {
    let block = BLOCK as u64;
    match length {
        0 => 0..0,
        _ => offset / block..(offset + length as u64).div_ceil(block),
    }
}

impl Shared {
    pub fn new(inner: Arc<dyn Device>, settings: &Settings, limits: Limits) -> Self {
        let size = AtomicU64::new(inner.size());
        Shared {
            inner,
            state: Mutex::new(State {
                table: Table::new(limits),
                frames: Frames::default(),
                readahead: Readahead::new(settings.readahead),
                queue: VecDeque::new(),
                waiting: HashMap::new(),
                failure: None,
                stats: Stats::default(),
                stop: false,
                idle: 0,
                armed: 0,
                senders: 0,
                waiters: 0,
            }),
            incoming: Buffers::short_lived(),
            outgoing: Buffers::long_lived(),
            work: Condvar::new(),
            changed: Condvar::new(),
            turn: Mutex::new(()),
            gate: RwLock::new(()),
            size,
            closed: AtomicBool::new(false),
            started: Instant::now(),
        }
    }

    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn stats(&self) -> Stats {
        let state = lock(&self.state);
        Stats {
            dirty_bytes: (state.table.owed() * BLOCK) as u64,
            resident_bytes: state.frames.resident(),
            ..state.stats
        }
    }

    pub fn adapt_readahead(&self, parameters: Parameters) {
        lock(&self.state).readahead.adapt(parameters);
    }

    // ---- reading -------------------------------------------------------------------------------

    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut want = Want::new(blocks_of(offset, buf.len()));
        let mut missed = None;
        let mut guard = lock(&self.state);
        let mut block = want.blocks.start;
        while block < want.blocks.end {
            let state = &mut *guard;
            let found = state.table.read(block);
            let first_look = missed != Some(block);
            if let Read::Hit(frame) = found {
                let (inside, outside) = piece(block, offset, buf.len());
                buf[outside].copy_from_slice(&state.frames.get(frame)[inside]);
                state.stats.hits += u64::from(first_look);
                block += 1;
                continue;
            }
            state.stats.misses += u64::from(first_look);
            missed = Some(block);
            guard = match found {
                Read::Fetching(fetch) => self.await_fetch(guard, &mut want, block, fetch)?,
                Read::Hit(_) | Read::Absent => self.fetch_missing(guard, &mut want, block)?,
            };
        }
        self.read_ahead(&mut guard, &mut want);
        Ok(())
    }

    /// Reads if all of it is here; else it does nothing.
    pub fn read_at_once(&self, buf: &mut [u8], offset: u64) -> bool {
        let mut want = Want::new(blocks_of(offset, buf.len()));
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if !want.blocks.clone().all(|block| state.table.holds(block)) {
            return false;
        }
        for block in want.blocks.clone() {
            if let Read::Hit(frame) = state.table.read(block) {
                let (inside, outside) = piece(block, offset, buf.len());
                buf[outside].copy_from_slice(&state.frames.get(frame)[inside]);
                state.stats.hits += 1;
            }
        }
        self.read_ahead(state, &mut want);
        true
    }

    /// Has the workers fetch what of these is absent, and waits for it.
    pub fn fetch_all(&self, ranges: &[Range<u64>]) {
        let size = self.size();
        let mut made = Vec::new();
        let mut guard = lock(&self.state);
        for range in ranges.iter().filter(|range| range.end <= size) {
            let length = range.end.saturating_sub(range.start) as usize;
            let Range { start: mut at, end } = blocks_of(range.start, length);
            // What is here and was used before would go first.
            guard.table.spare(at..end);
            while at < end {
                if guard.table.room_ahead() == 0 {
                    guard = self.wait(guard);
                    continue;
                }
                let state = &mut *guard;
                let fetches = state.table.ahead(at..end);
                at = fetches.last().map_or(end, |fetch| fetch.blocks().end);
                made.extend(
                    fetches
                        .iter()
                        .map(|fetch| (fetch.blocks().start, fetch.id())),
                );
                state.queue.extend(fetches);
                self.nudge(state);
            }
        }
        for (block, fetch) in made {
            while guard.table.is_fetching(block, fetch) {
                guard = self.wait(guard);
            }
        }
    }

    /// Waits for another thread's fetch. Its failure is passed on if it is the link's; if it is
    /// the data's, these may be another block's, so this one is then fetched alone.
    fn await_fetch<'a>(
        &'a self,
        mut state: Guard<'a>,
        want: &mut Want,
        block: u64,
        fetch: FetchId,
    ) -> Result<Guard<'a>> {
        self.read_ahead(&mut state, want);
        state.waiting.entry(fetch).or_default().readers += 1;
        while state.table.is_fetching(block, fetch) {
            state = self.wait(state);
        }
        let Some(waiting) = state.waiting.get_mut(&fetch) else {
            return Ok(state);
        };
        waiting.readers -= 1;
        let failure = waiting.failure.clone();
        if waiting.readers == 0 {
            state.waiting.remove(&fetch);
        }
        if let Some(told) = failure
            && !state.table.is_present(block)
        {
            let error = Error::from(told);
            if error.kind().may_be_retried() {
                return Err(error);
            }
            want.narrow = true;
        }
        Ok(state)
    }

    /// Fetches an absent block, with what belongs to it: here the run that it is in, by the
    /// workers the rest of the request and what is read ahead.
    fn fetch_missing<'a>(
        &'a self,
        mut guard: Guard<'a>,
        want: &mut Want,
        block: u64,
    ) -> Result<Guard<'a>> {
        let state = &mut *guard;
        let missing = block..want.blocks.end;
        let mut window = missing.clone();
        if !want.narrow && !want.known {
            window = state.readahead.miss(missing.clone());
            window.end = window.end.min(self.size().div_ceil(BLOCK as u64));
        }
        let Some(own) = state.table.fetch(missing.clone(), window) else {
            // Every frame is owed or being fetched into; one comes free when any I/O ends.
            self.nudge(state);
            return Ok(self.wait(guard));
        };
        let wide = own.blocks().start < missing.start || own.blocks().end > missing.end;
        let mut next = own.blocks().end;
        while next < missing.end {
            if state.table.is_present(next) {
                next += 1;
                continue;
            }
            let Some(rest) = state.table.fetch(next..missing.end, next..missing.end) else {
                break;
            };
            next = rest.blocks().end;
            state.queue.push_back(rest);
        }
        self.read_ahead(state, want);
        let (guard, result) = self.fetch(guard, own);
        match result {
            Err(error) if want.narrow || !wide || error.kind().may_be_retried() => Err(error),
            Err(_) => {
                want.narrow = true;
                Ok(guard)
            }
            Ok(()) => Ok(guard),
        }
    }

    /// Tells the policy of the request, once, and queues what it wants to have ahead of the next.
    fn read_ahead(&self, state: &mut State, want: &mut Want) {
        if !std::mem::replace(&mut want.known, true) {
            let room = state.table.room_ahead();
            if let Some(mut range) = state.readahead.read(want.blocks.clone(), room) {
                range.end = range.end.min(self.size().div_ceil(BLOCK as u64));
                let fetches = state.table.ahead(range);
                state.queue.extend(fetches);
            }
        }
        if !state.queue.is_empty() {
            self.nudge(state);
        }
    }

    /// Makes one fetch; its bytes, or its error, are there when it returns.
    pub fn fetch<'a>(&'a self, guard: Guard<'a>, fetch: Fetch) -> (Guard<'a>, Result<()>) {
        let blocks = fetch.blocks();
        let length = (blocks.end - blocks.start) as usize * BLOCK;
        drop(guard);
        let mut buffer = self.incoming.take(length);

        let bytes = self.bytes_of(&blocks);
        let (data, beyond) = buffer.split_at_mut((bytes.end - bytes.start) as usize);
        tracing::trace!(offset = bytes.start, length = data.len(), "fetch");
        let result = self.inner.read_exact_at(data, bytes.start);
        // The last block may reach beyond the device.
        let partial = data.len().next_multiple_of(BLOCK) - data.len();
        beyond[..partial].fill(0);

        let mut guard = lock(&self.state);
        let state = &mut *guard;
        match &result {
            Ok(()) => {
                state.stats.fetches += 1;
                state.stats.fetched_bytes += bytes.end - bytes.start;
                state.table.fetched(fetch, |block, frame| {
                    let at = (block - blocks.start) as usize * BLOCK;
                    let frame = state.frames.get_mut(frame);
                    frame.copy_from_slice(&buffer[at..at + BLOCK]);
                });
            }
            Err(error) => {
                tracing::debug!(offset = bytes.start, %error, "fetch failed");
                if let Some(waiting) = state.waiting.get_mut(&fetch.id()) {
                    waiting.failure = Some(Told::from(error));
                }
                state.table.fetch_failed(fetch);
            }
        }
        self.tell_waiters(state);
        self.nudge(state);
        (guard, result)
    }

    /// Where blocks are on the inner device, which may end within the last one.
    pub fn bytes_of(&self, blocks: &Range<u64>) -> Range<u64> {
        let block = BLOCK as u64;
        blocks.start * block..blocks.end.saturating_mul(block).min(self.size())
    }

    // ---- writing -------------------------------------------------------------------------------

    pub fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        let mut turn = None;
        let mut guard = lock(&self.state);
        let mut now = self.now();
        for block in blocks_of(offset, data.len()) {
            let mut want = Want::new(block..block + 1);
            loop {
                check_failure(&guard)?;
                let state = &mut *guard;
                match self.write_block(state, block, data, offset, now) {
                    Write::Into(_) => break,
                    Write::Fetch => guard = self.fetch_missing(guard, &mut want, block)?,
                    Write::Wait => {
                        self.nudge(state);
                        if turn.is_some() {
                            guard = self.wait(guard);
                        } else {
                            drop(guard);
                            turn = Some(lock(&self.turn));
                            guard = lock(&self.state);
                        }
                        now = self.now();
                    }
                }
            }
        }
        self.nudge(&guard);
        Ok(())
    }

    /// Writes up to the first block that has to wait; gives the bytes written.
    pub fn write_at_once(&self, data: &[u8], offset: u64) -> usize {
        // Who waits for room was here before.
        if self.turn.try_lock().is_err() {
            return 0;
        }
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let now = self.now();
        let mut written = 0;
        for block in blocks_of(offset, data.len()) {
            if state.failure.is_some() {
                break;
            }
            let Write::Into(_) = self.write_block(state, block, data, offset, now) else {
                break;
            };
            written = piece(block, offset, data.len()).1.end;
        }
        self.nudge(state);
        written
    }

    /// Writes what a request has for one block, if the table lets it.
    fn write_block(
        &self,
        state: &mut State,
        block: u64,
        data: &[u8],
        offset: u64,
        now: Duration,
    ) -> Write {
        let (inside, outside) = piece(block, offset, data.len());
        let bytes = self.bytes_of(&(block..block + 1));
        let whole = inside.len() as u64 == bytes.end - bytes.start;
        let answer = state.table.write(block, whole, now);
        if let Write::Into(frame) = answer {
            let frame = state.frames.get_mut(frame);
            if whole {
                frame[inside.end..].fill(0);
            }
            frame[inside].copy_from_slice(&data[outside]);
        }
        answer
    }

    pub fn flush(&self) -> Result<()> {
        let mut guard = lock(&self.state);
        let target = guard.table.flush_begin();
        self.nudge(&guard);
        loop {
            check_failure(&guard)?;
            match guard.table.flush_step(target) {
                Flush::Done => return Ok(()),
                Flush::Wait => guard = self.wait(guard),
                Flush::Sync(sync) => {
                    drop(guard);
                    tracing::trace!("flush");
                    let result = self.inner.flush();
                    guard = lock(&self.state);
                    guard.stats.flushes += 1;
                    match result {
                        Ok(()) => guard.table.synced(sync),
                        Err(error) => {
                            guard.table.sync_failed(sync);
                            guard.fail(&error, "flush the device under the cache");
                        }
                    }
                    self.tell_waiters(&guard);
                }
            }
        }
    }

    // ---- alone behind the gate -----------------------------------------------------------------

    pub fn discard(&self, range: Range<u64>) -> Result<()> {
        let block = BLOCK as u64;
        let first = range.start.div_ceil(block);
        let end = match range.end == self.size() {
            true => range.end.div_ceil(block),
            false => range.end / block,
        };
        if first >= end {
            return self.zero(range);
        }
        let blocks = first..end;
        let bytes = self.bytes_of(&blocks);
        self.without_io(&blocks, || {
            let result = self.inner.discard(bytes.clone());
            let mut guard = lock(&self.state);
            // If it failed nothing has changed below, so nothing may be forgotten here.
            if result.is_ok() {
                guard.table.remove(&blocks);
            }
            result.attempt(|| format!("discard bytes {} to {}", bytes.start, bytes.end))
        })?;
        self.zero(range.start..bytes.start)?;
        self.zero(bytes.end..range.end)
    }

    /// Writes zeros over less than two blocks.
    fn zero(&self, range: Range<u64>) -> Result<()> {
        let zeros = vec![0; range.end.saturating_sub(range.start) as usize];
        self.write(&zeros, range.start)
    }

    pub fn resize(&self, size: u64) -> Result<()> {
        self.without_io(&(0..u64::MAX), || {
            self.inner
                .resize(size)
                .attempt(|| format!("resize the device under the cache to {size} bytes"))?;
            let mut guard = lock(&self.state);
            let state = &mut *guard;
            self.size.store(size, Ordering::Release);
            state.readahead.reset();
            state.table.remove(&(size.div_ceil(BLOCK as u64)..u64::MAX));
            // What lies beyond the end must read as zeros if the device grows again.
            let last = size / BLOCK as u64;
            if let Some(frame) = state.table.frame_of(last) {
                let kept = (size % BLOCK as u64) as usize;
                if kept > 0 {
                    state.frames.get_mut(frame)[kept..].fill(0);
                }
            }
            Ok(())
        })
    }

    /// Does something while no block of a range has an I/O in flight and none begins; the caller
    /// holds the gate alone.
    fn without_io(&self, blocks: &Range<u64>, body: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut guard = lock(&self.state);
        check_failure(&guard)?;
        guard.table.pause(true);
        while guard.table.is_busy(blocks) {
            guard = self.wait(guard);
        }
        drop(guard);
        let result = body();
        let mut guard = lock(&self.state);
        guard.table.pause(false);
        self.tell_waiters(&guard);
        self.nudge(&guard);
        result
    }

    // ---- opening and closing -------------------------------------------------------------------

    pub fn check_open(&self) -> Result<()> {
        match self.closed.load(Ordering::Acquire) {
            true => Err(Error::new(Kind::Usage, "the cache is closed")),
            false => Ok(()),
        }
    }

    /// Waits for the requests that are being served, and lets no more in.
    pub fn refuse_requests(&self) {
        let gate = self.gate.write();
        let _gate = gate.unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, Ordering::Release);
    }

    pub fn stop(&self) {
        lock(&self.state).stop = true;
        self.work.notify_all();
    }

    // ---- waiting -------------------------------------------------------------------------------

    /// Waits until any I/O has ended. Its bound is the inner device's, which fails in the end.
    fn wait<'a>(&'a self, mut state: Guard<'a>) -> Guard<'a> {
        state.waiters += 1;
        let waited = self.changed.wait(state);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.waiters -= 1;
        state
    }

    pub fn tell_waiters(&self, state: &State) {
        if state.waiters > 0 {
            self.changed.notify_all();
        }
    }

    /// Wakes a worker if there is something to do, or a time to watch, and none is about it. Each
    /// worker that takes something nudges the next.
    pub fn nudge(&self, state: &State) {
        if state.idle == 0 {
            return;
        }
        let may_send = || match state.table.due(self.now()) {
            Ok(_) => true,
            Err(until) => until.is_some() && state.armed == 0,
        };
        if !state.queue.is_empty() || (state.senders < SENDERS_MAX && may_send()) {
            self.work.notify_one();
        }
    }
}

impl State {
    /// The first failure stays, and is the one that is told: what came after it cannot be better.
    pub fn fail(&mut self, error: &Error, attempt: &str) {
        match self.failure {
            None => tracing::error!(%error, kind = ?error.kind(), "cannot {attempt}"),
            Some(_) => tracing::debug!(%error, kind = ?error.kind(), "cannot {attempt}"),
        }
        self.failure.get_or_insert_with(|| Told::from(error));
    }
}

fn check_failure(state: &State) -> Result<()> {
    match &state.failure {
        None => Ok(()),
        Some(told) => Err(Error::from(told.clone())),
    }
}
