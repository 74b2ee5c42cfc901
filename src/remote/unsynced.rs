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
use std::sync::Arc;
use std::time::Instant;

use super::packets::Chunk;
use crate::buffer::Buffer;

/// When a write was sent and answered, by the counter.
#[derive(Clone, Copy, Debug)]
struct Answered {
    sent: u64,
    at: u64,
}

/// Older than every session: no flush covers it before it is sent again.
const LOST: Answered = Answered { sent: 0, at: 0 };

#[derive(Clone, Debug)]
struct Entry {
    data: Chunk,
    /// On its way to the server.
    sending: bool,
    /// What a flush has yet to cover: the data, once they are answered; while they are on their
    /// way, what had been answered in their place.
    owed: Option<Answered>,
    /// It lies over a suspect range.
    held: bool,
}

impl Entry {
    fn len(&self) -> u64 {
        self.data.range.len() as u64
    }

    /// Whether a flush on the session `number` would leave something of it uncovered.
    fn is_older(&self, number: u64) -> bool {
        self.owed.is_some_and(|owed| owed.sent < number)
    }

    /// Nothing is to be done for it but to wait for the end of a suspicion.
    fn rests(&self) -> bool {
        !self.sending && self.owed.is_none()
    }
}

#[derive(Clone, Debug)]
struct Suspect {
    range: Range<u64>,
    until: Instant,
}

fn is_suspect(suspects: &[Suspect], range: &Range<u64>) -> bool {
    let overlaps = |s: &Suspect| s.range.start < range.end && range.start < s.range.end;
    suspects.iter().any(overlaps)
}

/// Puts pieces, each with its offset, over a buffer that begins at `offset`.
pub fn lay_over(buf: &mut [u8], offset: u64, pieces: &[(u64, Chunk)]) {
    for (at, data) in pieces {
        let start = (at - offset) as usize;
        if let Some(into) = buf.get_mut(start..start + data.range.len()) {
            into.copy_from_slice(data.as_slice());
        }
    }
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
    /// When a flush last failed.
    doubted: u64,
}

impl Unsynced {
    /// Bytes kept.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether anything awaits an answer or a flush.
    pub fn owes(&self) -> bool {
        self.entries.values().any(|entry| !entry.rests())
    }

    /// Whether any of the range is on its way to the server: a place is so only once at a time.
    pub fn is_busy(&self, range: &Range<u64>) -> bool {
        let before = self.in_flight.range(..range.end).next_back();
        before.is_some_and(|(_, end)| *end > range.start)
    }

    /// Takes new data and puts its range on its way. The range must not be busy.
    pub fn begin(&mut self, offset: u64, data: Chunk) {
        let range = offset..offset + data.range.len() as u64;
        self.split(range.start);
        self.split(range.end);
        let before = self.entries.range(range.clone());
        let owed = before.filter_map(|(_, entry)| entry.owed).reduce(|a, b| {
            let (sent, at) = (a.sent.min(b.sent), a.at.max(b.at));
            Answered { sent, at }
        });
        self.cut_out(&range);
        self.bytes += data.range.len() as u64;
        self.in_flight.insert(range.start, range.end);
        let entry = Entry {
            data,
            sending: true,
            owed,
            held: is_suspect(&self.suspects, &range),
        };
        self.entries.insert(offset, entry);
    }

    /// Puts what is kept of a range on its way once more, piece by piece. None of it may be busy.
    pub fn begin_again(&mut self, range: &Range<u64>) -> Vec<(u64, Chunk)> {
        // So that what is marked as sent is what is sent, no more.
        self.split(range.start);
        self.split(range.end);
        let mut pieces = Vec::new();
        for (offset, entry) in self.entries.range_mut(range.clone()) {
            entry.sending = true;
            self.in_flight.insert(*offset, offset + entry.len());
            pieces.push((*offset, entry.data.clone()));
        }
        pieces
    }

    /// The data of `range`, sent under the number `sent`, were answered when the counter stood at
    /// `at`.
    pub fn answered(&mut self, range: &Range<u64>, sent: u64, at: u64) {
        self.arrived(range, Answered { sent, at });
    }

    /// A write of `range` that had been answered before was refused when it was sent again. It
    /// may be tried once more.
    pub fn refused_again(&mut self, range: &Range<u64>) {
        self.arrived(range, LOST);
    }

    fn arrived(&mut self, range: &Range<u64>, owed: Answered) {
        let owed = if owed.sent < self.doubted { LOST } else { owed };
        self.in_flight.remove(&range.start);
        for (_, entry) in self.entries.range_mut(range.clone()) {
            entry.sending = false;
            entry.owed = Some(owed);
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

    /// A flush has failed: the server may have dropped what it could not store, and would not say
    /// so a second time. All that it should have covered is to be sent again.
    pub fn doubt(&mut self, now: u64) {
        self.doubted = now;
        for owed in self.entries.values_mut().filter_map(|e| e.owed.as_mut()) {
            *owed = LOST;
        }
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

    /// When the last suspicion ends; `None` when there is none.
    pub fn suspicious_until(&self) -> Option<Instant> {
        self.suspects.iter().map(|suspect| suspect.until).max()
    }

    /// Whether anything has to be written once more at the end of a suspicion.
    pub fn holds(&self) -> bool {
        self.entries.values().any(|entry| entry.held)
    }

    /// Lets suspicions end. What was held for them alone counts as lost from then on, so that the
    /// next flush sends it once more; whether there is such. What is on its way right now may have
    /// arrived before a late write did, and stays held until it is answered.
    pub fn end_suspicions(&mut self, now: Instant) -> bool {
        self.suspects.retain(|suspect| suspect.until > now);
        let mut freed = false;
        for (offset, entry) in &mut self.entries {
            let range = *offset..*offset + entry.len();
            if entry.held && !entry.sending && !is_suspect(&self.suspects, &range) {
                entry.held = false;
                entry.owed = Some(LOST);
                freed = true;
            }
        }
        freed
    }

    /// What is kept of `range`, in order.
    pub fn pieces(&self, range: &Range<u64>) -> Vec<(u64, Chunk)> {
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

    /// Whether a flush on the session `number` would not cover all of a range.
    pub fn is_uncovered(&self, range: &Range<u64>, number: u64) -> bool {
        let first = self.entries.range(..range.start).next_back();
        let first = first.filter(|(offset, entry)| **offset + entry.len() > range.start);
        let mut entries = first.into_iter().chain(self.entries.range(range.clone()));
        entries.any(|(_, entry)| entry.is_older(number))
    }

    /// The ranges of which a flush on the session `number` would not cover all.
    pub fn uncovered(&self, number: u64) -> Vec<Range<u64>> {
        let entries = self.entries.iter();
        entries
            .filter(|(_, entry)| entry.is_older(number))
            .map(|(offset, entry)| *offset..offset + entry.len())
            .collect()
    }

    /// The number below which a session covers the most; `None` when there is nothing to flush.
    pub fn oldest(&self) -> Option<u64> {
        let owed = self.entries.values().filter_map(|entry| entry.owed);
        // What is sent again anyway is covered by any session.
        owed.map(|owed| if owed.sent > 0 { owed.sent } else { u64::MAX })
            .min()
    }

    /// A flush on the session `number` has succeeded; when it began, the counter stood at `begun`.
    pub fn synced(&mut self, number: u64, begun: u64) {
        let mut gone = 0;
        self.entries.retain(|_, entry| {
            if entry.owed.is_some_and(|o| number < o.sent && o.at < begun) {
                entry.owed = None;
            }
            let keep = entry.held || !entry.rests();
            if !keep {
                gone += entry.len();
            }
            keep
        });
        self.bytes -= gone;
    }

    /// Has an entry begin at `at`, if one lies there.
    fn split(&mut self, at: u64) {
        let before = self.entries.range_mut(..at).next_back();
        let Some((offset, entry)) = before.filter(|(offset, e)| **offset + e.len() > at) else {
            return;
        };
        let (middle, end) = ((at - offset) as usize, entry.data.range.len());
        let mut rest = entry.clone();
        rest.data = compact(entry.data.part(middle, end));
        entry.data = compact(entry.data.part(0, middle));
        self.entries.insert(at, rest);
    }

    /// Removes a range; of an entry that reaches beyond it, the rest stays.
    fn cut_out(&mut self, range: &Range<u64>) {
        self.split(range.start);
        self.split(range.end);
        let inside = self.entries.extract_if(range.clone(), |_, _| true);
        self.bytes -= inside.map(|(_, entry)| entry.len()).sum::<u64>();
    }
}

/// Lets go of a buffer of which little is left: what is kept is bounded by its visible bytes.
fn compact(data: Chunk) -> Chunk {
    let len = data.range.len();
    if len >= data.bytes.len() / 2 {
        return data;
    }
    Chunk {
        bytes: Arc::new(Buffer::from(data.as_slice())),
        range: 0..len,
    }
}

#[cfg(test)]
#[expect(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is meant"
)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn slice(bytes: &[u8]) -> Chunk {
        Chunk {
            bytes: Arc::new(Buffer::from(bytes)),
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
        assert!(!log.end_suspicions(now) && log.holds());
        assert!(log.end_suspicions(later) && !log.holds());
        assert_eq!(
            (log.oldest(), log.uncovered(1)),
            (Some(u64::MAX), vec![0..2])
        );
        log.begin_again(&(0..2));
        log.synced(1, 6);
        assert_eq!(log.bytes(), 2, "on its way once more");
        log.answered(&(0..2), 6, 6);
        log.synced(1, 7);
        assert!(log.bytes() == 0 && log.suspicious_until().is_none());
    }

    #[test]
    fn sent_again_in_part_the_rest_is_still_older() {
        let mut log = Unsynced::default();
        wrote(&mut log, 0, b"0123456789", 3);
        log.begin_again(&(4..6));
        log.answered(&(4..6), 8, 8);
        assert_eq!(log.uncovered(5), [0..4, 6..10]);
        log.synced(5, 9);
        assert_eq!(log.bytes(), 8);
    }

    #[test]
    fn what_is_written_over_is_owed_until_the_new_data_are_answered() {
        let mut log = Unsynced::default();
        wrote(&mut log, 0, b"old", 3);
        log.begin(0, slice(b"newer"));
        // Either of the two must be stored by a flush that begins now.
        assert_eq!((log.oldest(), log.uncovered(5)), (Some(3), vec![0..5]));
        log.synced(1, 4);
        assert_eq!((log.oldest(), log.bytes()), (None, 5));
        log.answered(&(0..5), 6, 7);
        assert_eq!(log.oldest(), Some(6));
    }

    #[test]
    fn after_a_failed_flush_everything_is_sent_again() {
        let mut log = Unsynced::default();
        wrote(&mut log, 0, b"data", 3);
        log.doubt(3);
        log.synced(1, 4);
        assert_eq!((log.bytes(), log.uncovered(1)), (4, vec![0..4]));
        // Refused then, it is not forgotten either.
        log.begin_again(&(0..4));
        log.refused_again(&(0..4));
        assert_eq!((log.bytes(), log.uncovered(1)), (4, vec![0..4]));
        assert!(!log.is_busy(&(0..4)));
    }

    #[test]
    fn what_was_on_its_way_when_a_flush_failed_is_sent_again() {
        let mut log = Unsynced::default();
        // Sent under 3; the server has it in memory when a flush fails and drops it; the answer
        // (of the last of its parts) comes after that.
        log.begin(0, slice(b"data"));
        log.doubt(5);
        log.answered(&(0..4), 3, 8);
        log.synced(1, 9);
        assert_eq!(
            log.bytes(),
            4,
            "let go of by a flush that tells nothing of it"
        );
    }

    #[test]
    fn one_suspicion_less_does_not_release_what_lies_over_another() {
        let mut log = Unsynced::default();
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        log.suspect(0..4, at(1));
        log.suspect(6..8, at(9));
        wrote(&mut log, 2, b"across", 2);
        log.synced(1, 3);
        assert!(!log.end_suspicions(at(5)) && log.holds());
        // On its way while the last one ends: it may have arrived before a late write.
        log.begin(2, slice(b"across"));
        assert!(!log.end_suspicions(at(10)) && log.holds());
        log.answered(&(2..8), 4, 4);
        assert!(log.end_suspicions(at(10)) && !log.holds());
    }

    #[test]
    fn a_small_rest_does_not_keep_a_large_buffer() {
        let mut log = Unsynced::default();
        wrote(&mut log, 0, &[1; 1000], 2);
        wrote(&mut log, 10, &[2; 990], 3);
        let buffers = log.entries.values().map(|e| e.data.bytes.len());
        assert_eq!(buffers.sum::<usize>(), 1000);
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
            lay_over(&mut read, 0, &log.pieces(&(0..100)));
            prop_assert_eq!(&read, &plain);
            let mut part = vec![0u8; 30];
            lay_over(&mut part, 25, &log.pieces(&(25..55)));
            prop_assert_eq!(&part[..], &plain[25..55]);
            let kept: u64 = log.pieces(&(0..100)).iter().map(|(_, data)| data.range.len() as u64).sum();
            prop_assert_eq!(kept, log.bytes());
        }
    }
}
