//! Which block is in which frame, and what has to happen to it next. The pure half of the cache:
//! no data, I/O, threads or clock inside; the shell asks, does as it is told, and reports back.
//!
//! # States of a block
//!
//! | state | the frame holds | in flight |
//! |---|---|---|
//! | absent | (no frame) | |
//! | Fetching | nothing yet | one read |
//! | Superseded | a write that came while it was fetched; the fetch is no longer wanted | one read |
//! | Clean | what the inner device holds; was read at least once, or fetched | |
//! | Cold | what the inner device holds; was written and never read | |
//! | Dirty | newer data than the inner device | |
//! | Sending | what is being written | one write |
//! | Resend | newer data than what is being written | one write |
//!
//! # Moves
//!
//! ```text
//! absent     -> Fetching    fetch, ahead
//! absent     -> Dirty       write of the whole block (of a part: fetch it first)
//! Fetching   -> Clean       fetched
//! Fetching   -> absent      fetch_failed
//! Fetching   -> Superseded  write of the whole block (of a part: wait)
//! Superseded -> Dirty       fetched, fetch_failed
//! Clean      -> Dirty       write
//! Cold       -> Dirty       write
//! Cold       -> Clean       read
//! Clean,Cold -> absent      eviction, remove
//! Dirty      -> Sending     next
//! Dirty      -> absent      remove (discard, shrink)
//! Sending    -> Clean, Cold written (Clean if it was ever read)
//! Sending    -> Resend      write
//! Sending    -> Dirty       write_failed
//! Resend     -> Dirty       written, write_failed
//! ```
//!
//! # Invariants
//!
//! 1. Only Clean and Cold are evicted.
//! 2. A block has at most one I/O in flight, so the inner device never sees two overlapping
//!    requests of which one is a write, and writes to a block keep their order.
//! 3. *Owed* blocks (Superseded, Dirty, Sending, Resend) never exceed [`Limits::dirty`], blocks
//!    in Sending and Resend never [`Limits::sending`], and guesses (blocks fetched that nobody
//!    asked for) stop at [`Limits::fetching`]. As `dirty` is less than all frames, and a fetch
//!    ends, a frame always comes free for who waits.
//! 4. Every write takes the next sequence number. A block remembers that of its oldest write not
//!    yet on the inner device; one overwritten in its frame keeps the older number. A flush waits
//!    for the numbers before its own only, so later writes cannot hold it up.
//! 5. After a failed write or sync nothing is sent any more.
//!
//! # Replacement
//!
//! Cold blocks go first, oldest first: backup data streams through them and leaves the metadata
//! alone. Then a clock: the second read of a block earns it a second chance.

use std::ops::Range;
use std::time::Duration;

pub use super::slots::{FetchId, Frame, Sequence};
use super::slots::{Mark, Slot, Slots, State};

/// Bounds, in blocks.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Frames in all.
    pub frames: usize,
    /// Blocks owed to the inner device; a writer of one more waits. Less than `frames`.
    pub dirty: usize,
    /// Above this many Dirty blocks writing starts at once. Less than `dirty`.
    pub low: usize,
    /// Blocks being written at once; at least `run`.
    pub sending: usize,
    /// Above this many blocks in flight nothing is fetched that nobody asked for.
    pub fetching: usize,
    /// The longest read or write of the inner device; a power of two.
    pub run: u64,
    /// How long a block stays Dirty, so that small rewrites coalesce.
    pub age: Duration,
}

/// What a read of a block finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    Hit(Frame),
    /// Wait for this fetch, then ask again.
    Fetching(FetchId),
    Absent,
}

/// What a write into a block has to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Write {
    /// Copy the bytes into this frame, before the table is asked anything else.
    Into(Frame),
    /// The rest of the block is not here: fetch it, then ask again.
    Fetch,
    /// Too much is owed, no frame is free, or a fetch has to end first: wait for any completion.
    Wait,
}

/// What write-back has to do.
#[derive(Debug)]
pub enum Action {
    /// Copy the frames of these blocks out now, write them, report [`Table::written`].
    Write(WriteBack),
    /// Nothing before this time, or before something changes.
    Wait(Option<Duration>),
}

/// How far a flush is.
#[derive(Debug)]
pub enum Flush {
    Done,
    /// Older writes are still owed, or another flush of the inner device runs.
    Wait,
    /// Flush the inner device now and report [`Table::synced`].
    Sync(InnerFlush),
}

/// A read of the inner device that has to be made, once. Its blocks are all in Fetching.
#[derive(Debug)]
#[must_use = "its blocks stay in Fetching until it is reported"]
pub struct Fetch {
    id: FetchId,
    blocks: Range<u64>,
}

impl Fetch {
    pub fn id(&self) -> FetchId {
        self.id
    }

    pub fn blocks(&self) -> Range<u64> {
        self.blocks.clone()
    }
}

/// A write to the inner device that has to be made, once. Its blocks are all in Sending.
#[derive(Debug)]
#[must_use = "its blocks stay in Sending until it is reported"]
pub struct WriteBack {
    blocks: Range<u64>,
}

impl WriteBack {
    pub fn blocks(&self) -> Range<u64> {
        self.blocks.clone()
    }
}

/// A flush of the inner device that has to be made, once.
#[derive(Debug)]
#[must_use = "no other flush starts until it is reported"]
pub struct InnerFlush {
    through: Sequence,
}

pub struct Table {
    limits: Limits,
    slots: Slots,
    sequence: Sequence,
    fetches: u64,
    /// Everything up to here has to be sent without delay.
    flush_target: Sequence,
    /// Everything up to here is durable.
    synced: Sequence,
    syncing: bool,
    paused: bool,
    halted: bool,
}

impl Table {
    pub fn new(limits: Limits) -> Self {
        Table {
            limits,
            slots: Slots::new(limits.frames),
            sequence: Sequence(0),
            fetches: 0,
            flush_target: Sequence(0),
            synced: Sequence(0),
            syncing: false,
            paused: false,
            halted: false,
        }
    }

    /// Blocks whose data the inner device does not have yet.
    pub fn owed(&self) -> usize {
        self.slots.owed()
    }

    /// How many more blocks may be fetched on a guess.
    pub fn room_ahead(&self) -> u64 {
        self.limits.fetching.saturating_sub(self.slots.fetching) as u64
    }

    pub fn is_present(&self, block: u64) -> bool {
        self.slots.find(block).is_some()
    }

    /// Whether a read of the block finds its bytes.
    pub fn holds(&self, block: u64) -> bool {
        let state = self.slots.find(block).map(|(_, slot)| slot.state);
        !matches!(state, None | Some(State::Fetching(_)))
    }

    /// Whether a reader that was told to wait for this fetch still has to.
    pub fn is_fetching(&self, block: u64, fetch: FetchId) -> bool {
        let state = self.slots.find(block).map(|(_, slot)| slot.state);
        matches!(state, Some(State::Fetching(id)) if id == fetch)
    }

    /// The frame of a block that is being sent.
    pub fn frame_of(&self, block: u64) -> Option<Frame> {
        self.slots.find(block).map(|(frame, _)| frame)
    }

    // ---- reading -------------------------------------------------------------------------------

    pub fn read(&mut self, block: u64) -> Read {
        match self.slots.find(block) {
            None => Read::Absent,
            Some((frame, slot)) => {
                if let State::Fetching(fetch) = slot.state {
                    return Read::Fetching(fetch);
                }
                self.slots.touch(frame);
                Read::Hit(frame)
            }
        }
    }

    /// Takes frames for the absent blocks at the start of `wanted`, and for their absent
    /// neighbours within `window`, one run in all. `None` if the first one wanted is not absent or
    /// no frame is to be had.
    pub fn fetch(&mut self, wanted: Range<u64>, window: Range<u64>) -> Option<Fetch> {
        let id = FetchId(self.fetches);
        let run = self.limits.run;
        let mut blocks = wanted.start..wanted.start;
        while blocks.end < wanted.end
            && blocks.end - blocks.start < run
            && self.take(blocks.end, id)
        {
            blocks.end += 1;
        }
        if blocks.is_empty() {
            return None;
        }
        while blocks.end < window.end
            && blocks.end - blocks.start < run
            && self.slots.fetching < self.limits.fetching
            && self.take(blocks.end, id)
        {
            blocks.end += 1;
        }
        while blocks.start > window.start
            && blocks.end - blocks.start < run
            && self.slots.fetching < self.limits.fetching
            && self.take(blocks.start - 1, id)
        {
            blocks.start -= 1;
        }
        self.fetches += 1;
        Some(Fetch { id, blocks })
    }

    /// Takes frames for the absent blocks of `range` on a guess, as far as the bound allows: runs
    /// that do not cross a multiple of [`Limits::run`].
    pub fn ahead(&mut self, range: Range<u64>) -> Vec<Fetch> {
        let mut fetches = Vec::new();
        let mut at = range.start;
        while at < range.end && self.slots.fetching < self.limits.fetching {
            if self.is_present(at) {
                at += 1;
                continue;
            }
            let end = (at - at % self.limits.run)
                .saturating_add(self.limits.run)
                .min(range.end);
            let Some(fetch) = self.fetch(at..at + 1, at..end) else {
                break;
            };
            at = fetch.blocks.end;
            fetches.push(fetch);
        }
        fetches
    }

    /// Keeps those of these blocks that are here until they are read, or for a round of the clock.
    pub fn spare(&mut self, blocks: Range<u64>) {
        for block in blocks {
            if let Some((frame, slot)) = self.slots.find(block)
                && !matches!(slot.state, State::Fetching(_))
            {
                self.slots.spare(frame);
            }
        }
    }

    fn take(&mut self, block: u64, fetch: FetchId) -> bool {
        if self.is_present(block) {
            return false;
        }
        let Some(frame) = self.slots.allocate(block) else {
            return false;
        };
        self.slots.enter(frame, State::Fetching(fetch));
        true
    }

    /// A fetch succeeded; `fill` is called for each frame that its bytes have to go into.
    pub fn fetched(&mut self, fetch: Fetch, mut fill: impl FnMut(u64, Frame)) {
        for block in fetch.blocks {
            let Some((frame, slot)) = self.slots.find(block) else {
                continue;
            };
            match slot.state {
                State::Fetching(_) => {
                    fill(block, frame);
                    self.slots.enter(frame, State::Clean);
                }
                State::Superseded(mark) => self.slots.enter(frame, State::Dirty(mark)),
                _ => {}
            }
        }
    }

    pub fn fetch_failed(&mut self, fetch: Fetch) {
        for block in fetch.blocks {
            let Some((frame, slot)) = self.slots.find(block) else {
                continue;
            };
            match slot.state {
                State::Fetching(_) => self.slots.release(frame),
                State::Superseded(mark) => self.slots.enter(frame, State::Dirty(mark)),
                _ => {}
            }
        }
    }

    // ---- writing -------------------------------------------------------------------------------

    /// A write into the whole of a block, or into a part of it.
    pub fn write(&mut self, block: u64, whole: bool, now: Duration) -> Write {
        let found = self.slots.find(block);
        let state = found.map_or(State::Free, |(_, slot)| slot.state);
        match state {
            State::Superseded(_) | State::Dirty(_) | State::Sending(_) | State::Resend { .. } => {}
            _ if self.owed() >= self.limits.dirty => return Write::Wait,
            State::Free if !whole => return Write::Fetch,
            State::Fetching(_) if !whole => return Write::Wait,
            _ => {}
        }
        let frame = found.map(|(frame, _)| frame);
        let Some(frame) = frame.or_else(|| self.slots.allocate(block)) else {
            return Write::Wait;
        };
        self.sequence.0 += 1;
        let mark = Mark {
            sequence: self.sequence,
            at: now,
        };
        match state {
            State::Free | State::Clean | State::Cold(_) => {
                self.slots.enter(frame, State::Dirty(mark))
            }
            State::Fetching(_) => self.slots.enter(frame, State::Superseded(mark)),
            State::Sending(sent) => self
                .slots
                .enter(frame, State::Resend { sent, unsent: mark }),
            // The older write is still owed, and this one rides with it.
            State::Superseded(_) | State::Dirty(_) | State::Resend { .. } => {}
        }
        Write::Into(frame)
    }

    /// The next run to write back: the oldest Dirty block, with its Dirty neighbours as far as the
    /// aligned stretch of [`Limits::run`] blocks around it goes.
    pub fn next(&mut self, now: Duration) -> Action {
        let block = match self.due(now) {
            Ok(block) => block,
            Err(until) => return Action::Wait(until),
        };
        let stretch = block - block % self.limits.run;
        let stretch_end = stretch.saturating_add(self.limits.run);
        let mut blocks = block..block + 1;
        while blocks.start > stretch && self.is_dirty(blocks.start - 1) {
            blocks.start -= 1;
        }
        while blocks.end < stretch_end && self.is_dirty(blocks.end) {
            blocks.end += 1;
        }
        for block in blocks.clone() {
            if let Some((frame, slot)) = self.slots.find(block)
                && let State::Dirty(mark) = slot.state
            {
                self.slots.enter(frame, State::Sending(mark));
            }
        }
        Action::Write(WriteBack { blocks })
    }

    /// The block that has to be written now, or else when to ask again.
    pub fn due(&self, now: Duration) -> Result<u64, Option<Duration>> {
        let full = self.slots.sending > 0
            && self.slots.sending + self.limits.run as usize > self.limits.sending;
        if self.paused || self.halted || full {
            return Err(None);
        }
        let Some((block, mark)) = self.slots.oldest_ready() else {
            return Err(None);
        };
        let old_enough = mark.at.saturating_add(self.limits.age);
        let wanted = mark.sequence <= self.flush_target || self.slots.ready() > self.limits.low;
        if wanted || now >= old_enough {
            Ok(block)
        } else {
            Err(Some(old_enough))
        }
    }

    fn is_dirty(&self, block: u64) -> bool {
        let state = self.slots.find(block).map(|(_, slot)| slot.state);
        matches!(state, Some(State::Dirty(_)))
    }

    pub fn written(&mut self, send: WriteBack) {
        for block in send.blocks {
            let Some((frame, slot)) = self.slots.find(block) else {
                continue;
            };
            match slot.state {
                State::Sending(_) if slot.read => self.slots.enter(frame, State::Clean),
                State::Sending(_) => self.slots.enter_cold(frame),
                State::Resend { unsent, .. } => self.slots.enter(frame, State::Dirty(unsent)),
                _ => {}
            }
        }
    }

    /// A write failed, wholly or in part: its blocks are owed as before, and nothing is sent any
    /// more, because what was promised in order can no longer be kept.
    pub fn write_failed(&mut self, send: WriteBack) {
        self.halted = true;
        for block in send.blocks {
            let Some((frame, slot)) = self.slots.find(block) else {
                continue;
            };
            match slot.state {
                State::Sending(sent) | State::Resend { sent, .. } => {
                    self.slots.enter(frame, State::Dirty(sent));
                }
                _ => {}
            }
        }
    }

    // ---- flushing ------------------------------------------------------------------------------

    /// A flush comes: its number, by which [`Table::flush_step`] knows it. It has a number of its
    /// own, so that a flush of the inner device that began earlier never counts for it.
    pub fn flush_begin(&mut self) -> Sequence {
        self.sequence.0 += 1;
        self.flush_target = self.sequence;
        self.sequence
    }

    pub fn flush_step(&mut self, target: Sequence) -> Flush {
        let owed = self.slots.oldest_owed();
        if self.synced >= target {
            return Flush::Done;
        }
        if self.syncing || owed.is_some_and(|owed| owed <= target) {
            return Flush::Wait;
        }
        self.syncing = true;
        let through = owed.map_or(self.sequence, |owed| Sequence(owed.0 - 1));
        Flush::Sync(InnerFlush { through })
    }

    pub fn synced(&mut self, sync: InnerFlush) {
        self.syncing = false;
        self.synced = self.synced.max(sync.through);
    }

    /// The inner flush failed: what it should have kept may be lost, so nothing is sent any more.
    pub fn sync_failed(&mut self, _: InnerFlush) {
        self.syncing = false;
        self.halted = true;
    }

    // ---- discarding and resizing ---------------------------------------------------------------

    /// While paused no new write begins.
    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Whether any block of `range` has an I/O in flight.
    pub fn is_busy(&self, range: &Range<u64>) -> bool {
        self.slots.iter().any(|(_, slot)| {
            range.contains(&slot.block)
                && matches!(
                    slot.state,
                    State::Fetching(_)
                        | State::Superseded(_)
                        | State::Sending(_)
                        | State::Resend { .. }
                )
        })
    }

    /// Forgets the blocks of `range`, Dirty ones too. Those with an I/O in flight stay, so the
    /// caller pauses, and waits until none [is busy](Table::is_busy).
    pub fn remove(&mut self, range: &Range<u64>) {
        let idle =
            |slot: &Slot| matches!(slot.state, State::Clean | State::Cold(_) | State::Dirty(_));
        let frames: Vec<Frame> = self
            .slots
            .iter()
            .filter(|(_, slot)| range.contains(&slot.block) && idle(slot))
            .map(|(frame, _)| frame)
            .collect();
        for frame in frames {
            self.slots.release(frame);
        }
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "table_model.rs"]
mod model;
