//! Flushing: what a sync on one session would not cover is sent again, then everything is synced.
//!
//! What is sent again goes in batches, several at a time, so that a long link is full; a place is
//! on its way only once at a time all the same. It is synced in steps meanwhile, so that a link
//! which breaks again and again gets on: a step that breaks halves the next, one that succeeds
//! doubles it.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::super::engine::{Chunk, Engine};
use super::super::lanes::{Errand, Session};
use super::super::verdict;
use super::{FLUSH_ABOVE, LOOK_EVERY, Shared, lock};
use crate::error::{Attempt, Error, Kind, Result};
use crate::units::{KIB, MIB};

/// What was written is flushed after this time in any case.
const FLUSH_AFTER: Duration = Duration::from_secs(5);

/// So much that is sent again is synced at once: at first, at least, and at most. No more is under
/// way at a time, since a sync comes after what was sent before it.
const STEP: u64 = 4 * MIB;
const STEP_MIN: u64 = 64 * KIB;
const STEP_MAX: u64 = 16 * MIB;

/// What is sent again as one errand, in bytes and in ranges: two of them fill what a session may
/// have under way.
const BATCH: u64 = MIB;
const BATCH_RANGES: usize = 128;

/// Ranges that are sent again as one errand.
type Batch = Vec<Range<u64>>;

/// How far one flush has come, over all the sessions that it needs.
struct Course {
    /// Since when no sync has succeeded.
    failing_since: Option<Instant>,
    step: u64,
}

/// What did not go well.
enum Failure {
    Sending(Error),
    Syncing(Error),
}

impl Shared {
    pub(super) fn flush(&self) -> Result<()> {
        let _one = lock(&self.flushing);
        let mut course = Course {
            failing_since: None,
            step: STEP,
        };
        loop {
            let Some(oldest) = lock(&self.kept).log.oldest() else {
                return self.lanes.over().map_or(Ok(()), Err);
            };
            let syncing = self.lanes.for_sync(oldest)?;
            let session = syncing.session();
            let synced = self.send_older(session, &mut course);
            match synced.and_then(|()| self.sync_on(session).map_err(Failure::Syncing)) {
                Ok(()) => return Ok(()),
                Err(Failure::Sending(error)) => return Err(error),
                Err(Failure::Syncing(error)) => self.sync_failed(session, &mut course, error)?,
            }
        }
    }

    /// Syncs on a session, and lets go of what that covers.
    fn sync_on(&self, session: &Arc<Session>) -> Result<()> {
        let begun = self.lanes.tick();
        self.handle(session).and_then(|handle| handle.sync())?;
        let mut kept = lock(&self.kept);
        kept.log.synced(session.number, begun);
        kept.since = kept.log.owes().then(Instant::now);
        drop(kept);
        self.freed.notify_all();
        Ok(())
    }

    /// Ok when another session is to be tried.
    fn sync_failed(&self, session: &Arc<Session>, course: &mut Course, error: Error) -> Result<()> {
        if session.is_dead() {
            course.step = (course.step / 2).max(STEP_MIN);
            let since = *course.failing_since.get_or_insert_with(Instant::now);
            return self.lanes.lost(session, since, &error);
        }
        lock(&self.kept).log.doubt(self.lanes.tick());
        Err(error)
    }

    /// Sends again what a flush on this session would not cover, and syncs most of it.
    fn send_older(&self, session: &Arc<Session>, course: &mut Course) -> Result<(), Failure> {
        let uncovered = lock(&self.kept).log.uncovered(session.number);
        if uncovered.is_empty() {
            return Ok(());
        }
        debug!(ranges = uncovered.len(), "sending again what may be lost");
        let most = BATCH.min(course.step / 2);
        let batches = batches(&uncovered, most);
        let senders = batches.len().min((course.step / most) as usize);
        let queue = Mutex::new(Some(batches.into_iter()));
        let (sender, sent) = mpsc::channel();
        let send = |sender: mpsc::Sender<Result<u64>>| {
            let next = || lock(&queue).as_mut().and_then(Iterator::next);
            while let Some(batch) = next() {
                let len = batch.iter().map(|range| range.end - range.start).sum();
                let outcome = self.send_batch(&batch, session).map(|()| len);
                // Nobody takes it when another one has failed.
                if sender.send(outcome).is_err() {
                    return;
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..senders {
                let (send, sender) = (&send, sender.clone());
                let thread = thread::Builder::new().name("link-resend".into());
                thread
                    .spawn_scoped(scope, move || send(sender))
                    .attempt(|| "start a thread")
                    .inspect_err(|_| *lock(&queue) = None)
                    .map_err(Failure::Sending)?;
            }
            drop(sender);
            let stop = |failure| {
                *lock(&queue) = None;
                Err(failure)
            };
            let mut owed = 0;
            for outcome in sent {
                match outcome {
                    Ok(len) => owed += len,
                    Err(error) => return stop(Failure::Sending(error)),
                }
                if owed < course.step && !session.is_dead() {
                    continue;
                }
                owed = 0;
                match self.sync_on(session) {
                    Ok(()) => {
                        course.failing_since = None;
                        course.step = (course.step * 2).min(STEP_MAX);
                    }
                    Err(error) => return stop(Failure::Syncing(error)),
                }
            }
            Ok(())
        })
    }

    /// Sends what is kept of these ranges once more, unless a flush on the session `covering`
    /// covers it by now: newer data may have been sent meanwhile. When that session breaks, the
    /// rest of it stays what it was.
    fn send_batch(&self, batch: &Batch, covering: &Arc<Session>) -> Result<()> {
        if covering.is_dead() {
            return Ok(());
        }
        let mut busy = Vec::new();
        let mut pieces = Vec::new();
        let mut kept = lock(&self.kept);
        for range in batch {
            match kept.log.is_busy(range) {
                true => busy.push(range),
                false if kept.log.is_uncovered(range, covering.number) => {
                    pieces.append(&mut kept.log.begin_again(range));
                }
                false => {}
            }
        }
        drop(kept);
        let mut outcome = self.send_pieces(pieces, covering);
        for range in busy {
            let pieces = outcome.and_then(|()| self.begin_when_free(range, covering));
            outcome = pieces.and_then(|pieces| self.send_pieces(pieces, covering));
        }
        outcome
    }

    /// Puts what is kept of a range on its way once more when its turn has come.
    fn begin_when_free(
        &self,
        range: &Range<u64>,
        covering: &Arc<Session>,
    ) -> Result<Vec<(u64, Chunk)>> {
        let mut kept = lock(&self.kept);
        while kept.log.is_uncovered(range, covering.number) {
            if !kept.log.is_busy(range) {
                return Ok(kept.log.begin_again(range));
            }
            if let Some(why) = self.lanes.over() {
                return Err(why);
            }
            let waited = self.freed.wait_timeout(kept, LOOK_EVERY);
            kept = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Vec::new())
    }

    /// Sends pieces that were put on their way, all of them at once.
    fn send_pieces(&self, mut pieces: Vec<(u64, Chunk)>, covering: &Arc<Session>) -> Result<()> {
        if pieces.is_empty() {
            return Ok(());
        }
        let load = pieces.iter().map(|(_, data)| data.range.len()).sum();
        let mut refused = None;
        let sent = self.lanes.run(Errand::Write(load), |session| {
            if covering.is_dead() {
                return Ok(());
            }
            let handle = self.handle(session)?;
            let engine = &session.files.engine;
            let number = self.lanes.tick();
            let outcomes = write_all(engine, handle.bytes(), &pieces);
            let broken = session.is_dead();
            let until = Instant::now() + engine.late_writes();
            let mut kept = lock(&self.kept);
            let at = self.lanes.tick();
            let mut lost = None;
            let mut rest = Vec::new();
            for (piece, outcome) in pieces.drain(..).zip(outcomes) {
                let range = piece.0..piece.0 + piece.1.range.len() as u64;
                match outcome {
                    Ok(()) => kept.log.answered(&range, number, at),
                    Err(error) if broken => {
                        kept.log.suspect(range, until);
                        rest.push(piece);
                        lost = lost.or(Some(error));
                    }
                    Err(error) => {
                        kept.log.refused_again(&range);
                        refused.get_or_insert(error);
                    }
                }
            }
            drop(kept);
            self.freed.notify_all();
            pieces = rest;
            lost.map_or(Ok(()), Err)
        });
        // Each that is still on its way has to be taken off it.
        let mut kept = lock(&self.kept);
        for (offset, data) in pieces {
            let range = offset..offset + data.range.len() as u64;
            kept.log.refused_again(&range);
        }
        drop(kept);
        self.freed.notify_all();
        sent.and(refused.map_or(Ok(()), Err))
    }

    /// The flushing thread's life.
    pub(super) fn flush_by_and_by(&self) {
        let mut kept = lock(&self.kept);
        let mut not_before = Instant::now();
        while !kept.closed {
            if kept.log.end_suspicions(Instant::now()) {
                debug!("no late writes any more: writing once more what was held");
                kept.since.get_or_insert_with(Instant::now);
                not_before = Instant::now();
            }
            let old = kept
                .since
                .is_some_and(|since| since.elapsed() >= FLUSH_AFTER);
            let much = kept.log.bytes() >= FLUSH_ABOVE;
            // What is only on its way cannot be synced yet.
            let answered = kept.log.oldest().is_some();
            let may = Instant::now() >= not_before && self.lanes.over().is_none();
            if (old || much) && answered && may {
                drop(kept);
                if let Err(error) = self.flush() {
                    // Whoever flushes next hears of it, or of what comes of it.
                    let why = error.chain().join(": ");
                    match self.lanes.over() {
                        None => warn!("cannot sync {}: {why}", self.name),
                        Some(_) => debug!("cannot sync {}: {why}", self.name),
                    }
                    not_before = Instant::now() + FLUSH_AFTER;
                }
                kept = lock(&self.kept);
                continue;
            }
            let waited = self.work.wait_timeout(kept, LOOK_EVERY);
            kept = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Ranges, cut to at most `most` bytes and put together to about as many.
fn batches(ranges: &[Range<u64>], most: u64) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut room = 0;
    for range in ranges {
        let mut rest = range.clone();
        while !rest.is_empty() {
            let full = batches.last().is_none_or(|last| last.len() >= BATCH_RANGES);
            if room == 0 || full {
                batches.push(Batch::new());
                room = most;
            }
            let part = rest.start..rest.end.min(rest.start + room);
            rest.start = part.end;
            room -= part.end - part.start;
            if let Some(last) = batches.last_mut() {
                last.push(part);
            }
        }
    }
    batches
}

/// Writes these pieces, as many at once as the engine lets; how it went with each. Nothing of them
/// is under way any more then, unless the session is over.
fn write_all(engine: &Engine, handle: &[u8], pieces: &[(u64, Chunk)]) -> Vec<Result<()>> {
    let (to, completions) = mpsc::channel();
    let mut outcomes: Vec<Result<()>> = pieces.iter().map(|_| Ok(())).collect();
    let mut in_flight = 0;
    let parts = pieces.iter().enumerate().flat_map(|(tag, (offset, data))| {
        let (len, most) = (data.range.len(), engine.write_chunk());
        let starts = (0..len).step_by(most);
        starts.map(move |at| (tag, offset + at as u64, data.part(at, len.min(at + most))))
    });
    for (tag, at, part) in parts {
        match engine.submit_write(handle, at, part, tag, &to) {
            Ok(()) => in_flight += 1,
            // What comes after it fails as well: the session is over.
            Err(error) => outcomes[tag] = Err(error),
        }
    }
    drop(to);
    for (tag, reply) in completions {
        in_flight -= 1;
        if let Err(error) = reply.and_then(|reply| verdict::done(&reply)) {
            outcomes[tag] = Err(error);
        }
    }
    // Each is answered once; were it not so, nothing of it could be believed.
    if in_flight > 0 {
        let silent = || Error::new(Kind::Disconnected, "nobody answers any more");
        outcomes.fill_with(|| Err(silent()));
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_have_every_byte_once_and_no_more_than_they_may() {
        let many = (0..1000).map(|n| n * 100..n * 100 + 7);
        let ranges: Vec<Range<u64>> = many.chain([200_000..205_001, 300_000..300_000]).collect();
        for most in [1, 5, 64, 1000, 1 << 20] {
            let batches = batches(&ranges, most);
            let bytes = |batch: &Batch| batch.iter().map(|r| r.end - r.start).sum::<u64>();
            assert!(batches.iter().all(|b| (1..=most).contains(&bytes(b))));
            assert!(batches.iter().all(|b| b.len() <= BATCH_RANGES));
            let flat = batches.iter().flatten().flat_map(Clone::clone);
            assert!(flat.eq(ranges.iter().flat_map(Clone::clone)), "{most}");
        }
        assert!(batches(&[], 10).is_empty());
    }
}
