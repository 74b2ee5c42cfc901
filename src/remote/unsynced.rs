//! What was written since the last flush, byte by byte the newest: kept so that it can be sent
//! again after a break. Pure: no I/O, no clock of its own.
//!
//! **When a flush lets go of data.** A server that answers a write has it in memory only. If the
//! server restarts before the flush, the write is gone though it was answered, and nothing tells.
//! So every write and every session gets a number from one counter: a session when it is up, a
//! write when it is sent. A flush that succeeds on session S covers the writes with a number above
//! S's: they were sent while S was up, S still is, so the server has not restarted in between.
//! Older ones are sent again first.
//!
//! **Late writes.** A write that was under way when its connection broke may reach the file much
//! later, from a buffer on the way or a stopped server process. Its range is *suspect* until that
//! cannot happen any more. Sent again with the same bytes it does no harm; but newer data over it
//! are *held* beyond their flush, and written once more when the suspicion has ended.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use super::packets::Chunk;

/// When a write was sent and answered, by the counter.
#[derive(Clone, Copy, Debug)]
struct Answered {
    sent: u64,
    at: u64,
}

#[derive(Clone, Debug)]
struct Entry {
    data: Chunk,
    /// `None` until it is answered.
    answered: Option<Answered>,
    /// It lies over a suspect range.
    held: bool,
    /// Nothing is to be done for it until the suspicion ends.
    synced: bool,
}

impl Entry {
    fn len(&self) -> u64 {
        self.data.range.len() as u64
    }

    /// Whether it was sent before the session `number` was up, and no flush has covered it.
    fn is_older(&self, number: u64) -> bool {
        !self.synced && self.answered.is_some_and(|a| a.sent < number)
    }
}

#[derive(Clone, Debug)]
struct Suspect {
    range: Range<u64>,
    until: Instant,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Unsynced {
    /// By offset; they do not overlap.
    entries: BTreeMap<u64, Entry>,
    bytes: u64,
    /// Ranges on their way to the server; they do not overlap.
    in_flight: BTreeMap<u64, u64>,
    suspects: Vec<Suspect>,
}

impl Unsynced {
    /// Bytes kept.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether anything awaits an answer or a flush.
    pub fn owes(&self) -> bool {
        self.entries.values().any(|entry| !entry.synced)
    }

    /// Whether any of the range is on its way to the server: a place is so only once at a time.
    pub fn is_busy(&self, range: &Range<u64>) -> bool {
        let before = self.in_flight.range(..range.end).next_back();
        before.is_some_and(|(_, end)| *end > range.start)
    }

    /// Takes new data and puts its range on its way. The range must not be busy.
    pub fn begin(&mut self, offset: u64, data: Chunk) {
        let range = offset..offset + data.range.len() as u64;
        let held = self.is_suspect(&range);
        self.cut_out(&range);
        self.bytes += data.range.len() as u64;
        self.in_flight.insert(range.start, range.end);
        let entry = Entry {
            data,
            answered: None,
            held,
            synced: false,
        };
        self.entries.insert(offset, entry);
    }

    /// Puts what is kept of a range on its way once more, piece by piece. None of it may be busy.
    pub fn begin_again(&mut self, range: &Range<u64>) -> Vec<(u64, Chunk)> {
        let pieces = self.pieces(range);
        for (offset, data) in &pieces {
            let end = offset + data.range.len() as u64;
            self.in_flight.insert(*offset, end);
        }
        pieces
    }

    /// The data of `range`, sent under the number `sent`, were answered when the counter stood at
    /// `at`.
    pub fn answered(&mut self, range: &Range<u64>, sent: u64, at: u64) {
        self.in_flight.remove(&range.start);
        for (_, entry) in self.entries.range_mut(range.start..range.end) {
            entry.answered = Some(Answered { sent, at });
        }
    }

    /// The write of `range` was refused: nobody counts on it any more.
    pub fn refused(&mut self, range: &Range<u64>) {
        self.in_flight.remove(&range.start);
        self.cut_out(range);
    }

    /// The file ends at `size`: what was written beyond it is no more.
    pub fn truncate(&mut self, size: u64) {
        self.cut_out(&(size..u64::MAX));
    }

    /// The connection that carried `range` broke before the answer; what it carried may still
    /// arrive until `until`.
    pub fn suspect(&mut self, range: Range<u64>, until: Instant) {
        if let Some(known) = self.suspects.iter_mut().find(|s| s.range == range) {
            known.until = known.until.max(until);
            return;
        }
        self.suspects.push(Suspect { range, until });
    }

    fn is_suspect(&self, range: &Range<u64>) -> bool {
        let overlaps = |s: &Suspect| s.range.start < range.end && range.start < s.range.end;
        self.suspects.iter().any(overlaps)
    }

    /// When the last suspicion ends; `None` when there is none.
    pub fn suspicious_until(&self) -> Option<Instant> {
        self.suspects.iter().map(|suspect| suspect.until).max()
    }

    /// Lets suspicions end, and gives the held ranges that are free of them now: they are to be
    /// sent once more.
    pub fn end_suspicions(&mut self, now: Instant) -> Vec<Range<u64>> {
        self.suspects.retain(|suspect| suspect.until > now);
        let held = self.entries.iter().filter(|(_, entry)| entry.held);
        let ranges: Vec<_> = held
            .map(|(offset, entry)| *offset..offset + entry.len())
            .collect();
        let free = |range: &Range<u64>| !self.is_suspect(range);
        ranges.into_iter().filter(free).collect()
    }

    /// The range is on its way for the last time: the next flush may let go of it.
    pub fn release(&mut self, range: &Range<u64>) {
        for (_, entry) in self.entries.range_mut(range.start..range.end) {
            entry.held = false;
            entry.synced = false;
            entry.answered = None;
        }
    }

    /// What is kept of `range`, in order.
    fn pieces(&self, range: &Range<u64>) -> Vec<(u64, Chunk)> {
        let first = self.entries.range(..range.start).next_back();
        let first = first.filter(|(offset, entry)| **offset + entry.len() > range.start);
        let rest = self.entries.range(range.start..range.end);
        let cut = |(offset, entry): (&u64, &Entry)| {
            let from = range.start.saturating_sub(*offset);
            let to = (range.end - offset).min(entry.len());
            (offset + from, entry.data.part(from as usize, to as usize))
        };
        first.into_iter().chain(rest).map(cut).collect()
    }

    /// Puts what is kept over what the server gave for `offset`.
    pub fn patch(&self, buf: &mut [u8], offset: u64) {
        if self.entries.is_empty() {
            return;
        }
        let range = offset..offset + buf.len() as u64;
        for (at, data) in self.pieces(&range) {
            let start = (at - offset) as usize;
            if let Some(into) = buf.get_mut(start..start + data.range.len()) {
                into.copy_from_slice(data.as_slice());
            }
        }
    }

    /// Whether any of a range is an answered write that a flush on the session `number` would not
    /// cover.
    pub fn is_uncovered(&self, range: &Range<u64>, number: u64) -> bool {
        let mut entries = self.entries.range(range.start..range.end);
        entries.any(|(_, entry)| entry.is_older(number))
    }

    /// The ranges of answered writes that a flush on the session `number` would not cover.
    pub fn uncovered(&self, number: u64) -> Vec<Range<u64>> {
        let entries = self.entries.iter();
        entries
            .filter(|(_, entry)| entry.is_older(number))
            .map(|(offset, entry)| *offset..offset + entry.len())
            .collect()
    }

    /// The lowest number under which an answered write was sent.
    pub fn oldest(&self) -> Option<u64> {
        let owed = self.entries.values().filter(|entry| !entry.synced);
        owed.filter_map(|entry| Some(entry.answered?.sent)).min()
    }

    /// A flush on the session `number` has succeeded; when it began, the counter stood at `begun`.
    pub fn synced(&mut self, number: u64, begun: u64) {
        let mut gone = 0;
        self.entries.retain(|_, entry| {
            let covered = entry
                .answered
                .is_some_and(|a| number < a.sent && a.at < begun);
            entry.synced |= covered;
            let keep = entry.held || !covered;
            if !keep {
                gone += entry.len();
            }
            keep
        });
        self.bytes -= gone;
    }

    /// Removes a range; of an entry that reaches beyond it, the rest stays.
    fn cut_out(&mut self, range: &Range<u64>) {
        let before = self.entries.range(..range.end).rev();
        let overlapping = before.take_while(|(offset, entry)| **offset + entry.len() > range.start);
        let offsets: Vec<u64> = overlapping.map(|(offset, _)| *offset).collect();
        for offset in offsets {
            let Some(entry) = self.entries.remove(&offset) else {
                continue;
            };
            let end = offset + entry.len();
            self.bytes -= entry.len();
            let mut keep = |from: u64, to: u64| {
                let data = entry
                    .data
                    .part((from - offset) as usize, (to - offset) as usize);
                let rest = Entry {
                    data,
                    ..entry.clone()
                };
                self.bytes += rest.len();
                self.entries.insert(from, rest);
            };
            if offset < range.start {
                keep(offset, range.start);
            }
            if range.end < end {
                keep(range.end, end);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::time::Duration;

    fn slice(bytes: &[u8]) -> Chunk {
        Chunk {
            bytes: Arc::new(bytes.to_vec()),
            range: 0..bytes.len(),
        }
    }

    fn wrote(log: &mut Unsynced, offset: u64, bytes: &[u8], sent: u64) {
        log.begin(offset, slice(bytes));
        log.answered(&(offset..offset + bytes.len() as u64), sent, sent);
    }

    #[test]
    fn a_flush_covers_what_was_sent_while_its_session_was_up() {
        let mut log = Unsynced::default();
        wrote(&mut log, 0, b"old", 3);
        wrote(&mut log, 10, b"new", 7);
        assert_eq!(log.uncovered(5), vec![0..3]);
        log.synced(5, 8);
        assert_eq!(log.bytes(), 3);
        log.begin_again(&(0..3));
        log.answered(&(0..3), 9, 9);
        log.synced(5, 9); // the flush had begun before it was sent again
        assert_eq!(log.bytes(), 3);
        log.synced(5, 10);
        assert!(!log.owes() && log.bytes() == 0);
    }

    #[test]
    fn what_is_not_answered_is_never_let_go() {
        let mut log = Unsynced::default();
        log.begin(0, slice(b"data"));
        assert!(log.is_busy(&(3..5)) && !log.is_busy(&(4..5)));
        log.synced(0, 100);
        assert_eq!(log.bytes(), 4);
        // Sent before the flush and answered after it: the server may have taken it after it, too.
        log.answered(&(0..4), 5, 8);
        log.synced(1, 7);
        assert_eq!(log.bytes(), 4);
    }

    #[test]
    fn newer_data_over_a_suspect_place_are_held_and_sent_once_more() {
        let mut log = Unsynced::default();
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(60));
        wrote(&mut log, 0, b"v1", 2);
        log.suspect(0..2, later);
        wrote(&mut log, 0, b"v2", 3);
        wrote(&mut log, 8, b"elsewhere", 4);
        log.synced(1, 5);
        assert_eq!(log.bytes(), 2, "held, the other one is let go");
        assert_eq!((log.oldest(), log.uncovered(9)), (None, vec![]));
        assert!(log.end_suspicions(now).is_empty());
        assert_eq!(log.end_suspicions(later), vec![0..2]);
        log.release(&(0..2));
        log.begin_again(&(0..2));
        log.synced(1, 6);
        assert_eq!(log.bytes(), 2, "on its way once more");
        log.answered(&(0..2), 6, 6);
        log.synced(1, 7);
        assert!(log.bytes() == 0 && log.suspicious_until().is_none());
    }

    proptest! {
        /// Against plain bytes: patching gives the newest data, everywhere.
        #[test]
        fn the_newest_data_win(writes in prop::collection::vec((0u64..60, 1usize..20, any::<u8>()), 1..40)) {
            let mut log = Unsynced::default();
            let mut plain = vec![0u8; 100];
            for (sent, (offset, len, byte)) in writes.into_iter().enumerate() {
                let start = offset as usize;
                plain[start..start + len].fill(byte);
                wrote(&mut log, offset, &vec![byte; len], sent as u64 + 1);
            }
            let mut read = vec![0u8; 100];
            log.patch(&mut read, 0);
            prop_assert_eq!(&read, &plain);
            let mut part = vec![0u8; 30];
            log.patch(&mut part, 25);
            prop_assert_eq!(&part[..], &plain[25..55]);
            let kept: u64 = log.pieces(&(0..100)).iter().map(|(_, data)| data.range.len() as u64).sum();
            prop_assert_eq!(kept, log.bytes());
        }
    }
}
