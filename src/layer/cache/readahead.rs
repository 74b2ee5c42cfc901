//! How much to fetch: decides from the order of reads alone, with no I/O, clock or data.
//!
//! A long link makes a fetch of 1 MiB hardly dearer than one of 4 KiB, so what is near a miss
//! comes along. Mounting a 5 TiB ext4 reads 645 blocks of 4 KiB that lie in a few places.
//!
//! The policy remembers the last few places where something was fetched, each a trail:
//! - a miss far from all of them fetches the smallest aligned window around it;
//! - a miss near one, or at its end, doubles that trail's window up to the largest;
//! - when miss after miss is far from all of them, neighbours are of no use and are left alone;
//! - reads that follow each other along a trail make it a stream, which is fetched ahead of its
//!   reader, half as far as the reader has come in sequence but no further than `lead_max`.

use std::ops::Range;
use std::time::Duration;

use super::BLOCK;

/// What the policy may do, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Fetched for an isolated miss; a power of two.
    pub window_min: u64,
    /// The most fetched at once; a power of two. It pays while its transfer takes less than a
    /// round trip.
    pub window_max: u64,
    /// A miss no further than this from a recent fetch belongs to it.
    pub near: u64,
    /// How far a stream is fetched ahead of its reader: the bytes the link carries in a round
    /// trip, and some more.
    pub lead_max: u64,
    /// Places remembered at once.
    pub trails_max: usize,
}

impl Default for Parameters {
    /// 64 KiB to 1 MiB; 2 MiB is near; 16 MiB ahead fill 1.2 Gbit/s at 100 ms.
    fn default() -> Self {
        Parameters {
            window_min: 16,
            window_max: 256,
            near: 512,
            lead_max: 4096,
            trails_max: 16,
        }
    }
}

impl Parameters {
    /// For a link with this round trip and these bytes per second (0: not known).
    ///
    /// A fetch is longest where its transfer takes as long as a round trip. A stream is led by four
    /// round trips' worth: it never runs dry while the next replies are on their way, and a link that
    /// can do more than it was seen to do is asked for more.
    pub fn for_link(round_trip: Duration, bytes_per_second: u64) -> Parameters {
        let usual = Parameters::default();
        if bytes_per_second == 0 {
            return usual;
        }
        let a_round_trip = (bytes_per_second as f64 * round_trip.as_secs_f64()) as u64;
        let blocks = a_round_trip / BLOCK as u64;
        Parameters {
            window_max: blocks
                .next_power_of_two()
                .clamp(4 * usual.window_min, usual.window_max),
            lead_max: (4 * blocks).clamp(LEAD_LEAST, LEAD_MOST),
            ..usual
        }
    }
}

/// Bounds of how far a stream is led, in blocks: 4 and 32 MiB, a quarter of the usual cache.
const LEAD_LEAST: u64 = 1024;
const LEAD_MOST: u64 = 8192;

/// Reads that overtake each other by this many times their length are still in sequence: several
/// threads serve one reader.
const REORDER: u64 = 4;

/// Reads in sequence that make a stream. One says nothing.
const STREAM_READS: u32 = 2;

/// Isolated misses after which reads count as scattered, and the most that are remembered.
const SCATTERED: u32 = 16;
const SCATTERED_MAX: u32 = 24;

/// A read near a recent fetch outweighs so many isolated misses.
const NEAR_WEIGHT: u32 = 4;

#[derive(Clone, Debug)]
struct Trail {
    /// What was fetched last, with what came right before it.
    fetched: Range<u64>,
    window: u64,
    /// Where a read in sequence would start.
    next: u64,
    /// Blocks read in sequence, and in how many reads.
    run: u64,
    reads: u32,
}

pub struct Readahead {
    parameters: Parameters,
    /// Most recently used last.
    trails: Vec<Trail>,
    /// Isolated misses, less what was read near a recent fetch.
    isolated: u32,
    /// The read that is told of next has missed.
    missed: bool,
}

impl Readahead {
    pub fn new(parameters: Parameters) -> Self {
        Readahead {
            parameters,
            trails: Vec::new(),
            isolated: 0,
            missed: false,
        }
    }

    /// Goes on with the trails by other parameters.
    pub fn adapt(&mut self, parameters: Parameters) {
        self.parameters = parameters;
    }

    /// Forgets all trails.
    pub fn reset(&mut self) {
        self.trails.clear();
    }

    /// The window to fetch around these blocks that are missing; it contains them.
    pub fn miss(&mut self, missing: Range<u64>) -> Range<u64> {
        self.missed = true;
        let p = self.parameters;
        let near = self.nearest(missing.start);
        self.isolated = match near {
            Some(_) => self.isolated.saturating_sub(NEAR_WEIGHT),
            None => (self.isolated + 1).min(SCATTERED_MAX),
        };
        let grown = match near {
            Some(i) => (self.trails[i].window * 2).clamp(p.window_min, p.window_max),
            None if self.isolated >= SCATTERED => 1,
            None => p.window_min,
        };
        let length = (missing.end - missing.start).next_power_of_two();
        let window = grown.max(length.min(p.window_max));
        let start = missing.start - missing.start % window;
        let range = start..start.saturating_add(window).max(missing.end);

        let mut trail = match near {
            Some(i) => self.trails.remove(i),
            None => Trail {
                fetched: range.clone(),
                window,
                next: missing.start,
                run: 0,
                reads: 0,
            },
        };
        trail.window = window;
        let continues = (trail.fetched.start..=trail.fetched.end).contains(&missing.start);
        if near.is_some() && continues {
            trail.fetched.end = trail.fetched.end.max(range.end);
        } else if near.is_some() {
            trail.fetched = range.clone();
            trail.next = missing.start;
            trail.run = 0;
            trail.reads = 0;
        }
        self.keep(trail);
        range
    }

    /// A read, after [`Readahead::miss`] if it missed: what to fetch ahead of the next one, not
    /// more than `room` blocks.
    pub fn read(&mut self, blocks: Range<u64>, room: u64) -> Option<Range<u64>> {
        let contains = |t: &Trail| (t.fetched.start..=t.fetched.end).contains(&blocks.start);
        let missed = std::mem::take(&mut self.missed);
        let mut trail = self.trails.remove(self.trails.iter().rposition(contains)?);
        if !missed {
            self.isolated = self.isolated.saturating_sub(NEAR_WEIGHT);
        }
        let ahead = trail.advance(&blocks, room, &self.parameters);
        self.keep(trail);
        ahead
    }

    fn keep(&mut self, trail: Trail) {
        if self.trails.len() >= self.parameters.trails_max.max(1) {
            self.trails.remove(0);
        }
        self.trails.push(trail);
    }

    /// The trail that a miss at this block belongs to.
    fn nearest(&self, block: u64) -> Option<usize> {
        let distance = |t: &Trail| {
            let before = t.fetched.start.saturating_sub(block);
            before.max(block.saturating_sub(t.fetched.end))
        };
        let distances = self.trails.iter().map(distance).enumerate();
        distances
            .filter(|&(_, distance)| distance <= self.parameters.near)
            .min_by_key(|&(_, distance)| distance)
            .map(|(index, _)| index)
    }
}

impl Trail {
    fn advance(&mut self, blocks: &Range<u64>, room: u64, p: &Parameters) -> Option<Range<u64>> {
        if blocks.end <= self.next {
            return None;
        }
        let slack = (blocks.end - blocks.start) * REORDER;
        if blocks.start > self.next.saturating_add(slack) {
            (self.run, self.reads) = (0, 0);
        }
        self.run += blocks.end - self.next.max(blocks.start);
        self.reads = self.reads.saturating_add(1);
        self.next = blocks.end;
        // What lies far behind a long stream is another place.
        let behind = self.next.saturating_sub(p.window_max);
        self.fetched.start = self.fetched.start.max(behind).min(self.fetched.end);

        if self.reads < STREAM_READS || self.run < self.window / 2 {
            return None;
        }
        let window = (self.window * 2).min(p.window_max);
        let lead = (self.run / 2).max(window).min(p.lead_max);
        let goal = self.next.saturating_add(lead).next_multiple_of(window);
        let from = self.fetched.end.max(self.next);
        // Whole windows, or the stream would be fetched in crumbs.
        let to = goal.min(from.saturating_add(room));
        let to = to - to % window;
        if to <= from {
            return None;
        }
        self.window = window;
        self.fetched.end = to;
        Some(from..to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const ROOM: u64 = u64::MAX;

    /// Reads blocks one by one through the policy; counts fetches as the cache makes them.
    #[derive(Default)]
    struct Reader {
        cached: HashSet<u64>,
        missed: usize,
        ahead: usize,
        blocks: u64,
    }

    impl Reader {
        fn fetch(&mut self, from: u64, window: Range<u64>) {
            let mut range = from..from + 1;
            while range.end < window.end && !self.cached.contains(&range.end) {
                range.end += 1;
            }
            while range.start > window.start && !self.cached.contains(&(range.start - 1)) {
                range.start -= 1;
            }
            self.blocks += range.end - range.start;
            self.cached.extend(range);
        }

        fn read(&mut self, policy: &mut Readahead, block: u64) {
            if !self.cached.contains(&block) {
                let window = policy.miss(block..block + 1);
                assert!(window.contains(&block), "{window:?} misses {block}");
                self.missed += 1;
                self.fetch(block, window);
            }
            if let Some(range) = policy.read(block..block + 1, ROOM) {
                self.ahead += 1;
                self.blocks += range.end - range.start;
                self.cached.extend(range);
            }
        }
    }

    #[test]
    fn an_isolated_miss_fetches_64_kib_aligned() {
        let mut policy = Readahead::new(Parameters::default());
        assert_eq!(
            policy.miss(1_000_003..1_000_004),
            1_000_000 / 16 * 16..1_000_016
        );
        assert_eq!(policy.miss(7..8), 0..16);
    }

    #[test]
    fn misses_in_sequence_double_the_window() {
        let mut policy = Readahead::new(Parameters::default());
        let mut at = 0;
        let mut lengths = Vec::new();
        for _ in 0..7 {
            let window = policy.miss(at..at + 1);
            lengths.push(window.end - window.start);
            at = window.end;
        }
        assert_eq!(lengths, [16, 32, 64, 128, 256, 256, 256]);
    }

    #[test]
    fn a_miss_near_a_recent_fetch_doubles_and_one_far_away_does_not() {
        let mut policy = Readahead::new(Parameters::default());
        policy.miss(10_000..10_001);
        let near = policy.miss(10_300..10_301);
        assert_eq!(near.end - near.start, 32);
        let far = policy.miss(20_000..20_001);
        assert_eq!(far.end - far.start, 16);
    }

    #[test]
    fn a_request_longer_than_the_window_is_fetched_whole() {
        let mut policy = Readahead::new(Parameters::default());
        let window = policy.miss(100..1000);
        assert!(window.start <= 100 && window.end >= 1000);
    }

    /// Group descriptors in sequence, then bitmaps in a few clusters.
    fn ext4_mount() -> Vec<u64> {
        let mut blocks: Vec<u64> = (1..641).collect();
        blocks.extend([1300, 1301, 9_000_000, 9_000_256, 500_000_000]);
        blocks
    }

    #[test]
    fn mounting_a_5_tib_ext4_takes_about_15_fetches() {
        let mut policy = Readahead::new(Parameters::default());
        let mut reader = Reader::default();
        for block in ext4_mount() {
            reader.read(&mut policy, block);
        }
        assert!(
            reader.missed + reader.ahead <= 15,
            "{} + {}",
            reader.missed,
            reader.ahead
        );
        assert!(reader.missed <= 6, "{} waits", reader.missed);
        assert!(reader.blocks < 1500, "{} blocks", reader.blocks);
    }

    #[test]
    fn the_order_of_the_metadata_reads_matters_little() {
        let mut policy = Readahead::new(Parameters::default());
        let mut reader = Reader::default();
        let mut blocks = ext4_mount();
        let mut random = 1_u64;
        for i in (1..blocks.len()).rev() {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            blocks.swap(i, (random >> 33) as usize % (i + 1));
        }
        for block in blocks {
            reader.read(&mut policy, block);
        }
        assert!(
            reader.missed + reader.ahead <= 20,
            "{} + {}",
            reader.missed,
            reader.ahead
        );
    }

    #[test]
    fn a_stream_stops_missing_and_keeps_its_lead() {
        let mut policy = Readahead::new(Parameters::default());
        let mut reader = Reader::default();
        for block in 0..100_000 {
            reader.read(&mut policy, block);
        }
        assert_eq!(reader.missed, 1);
        assert!((100_000 + 3500..=100_000 + 4096 + 256).contains(&reader.blocks));
        assert!(reader.ahead < 100_000 / 256 + 30, "{} pieces", reader.ahead);
    }

    #[test]
    fn reads_of_a_stream_may_overtake_each_other() {
        let mut policy = Readahead::new(Parameters::default());
        let mut fetched = policy.miss(0..32);
        let mut ahead = 0;
        for pair in 0..100 {
            for at in [pair * 64 + 32, pair * 64] {
                if at + 32 > fetched.end {
                    fetched.end = policy.miss(at..at + 32).end;
                }
                if let Some(range) = policy.read(at..at + 32, ROOM) {
                    assert!(range.start >= fetched.end);
                    fetched.end = range.end;
                    ahead += 1;
                }
            }
        }
        assert!(ahead >= 10, "{ahead}");
    }

    #[test]
    fn scattered_reads_fetch_nothing_ahead() {
        let mut policy = Readahead::new(Parameters::default());
        for i in 0..1000_u64 {
            let block = i * 7_919_003 % 1_000_000_007;
            policy.miss(block..block + 1);
            assert_eq!(policy.read(block..block + 1, ROOM), None);
        }
    }

    #[test]
    fn neighbours_are_left_alone_while_reads_are_scattered_and_no_longer() {
        let mut policy = Readahead::new(Parameters::default());
        let mut length = |block: u64| {
            let window = policy.miss(block..block + 1);
            policy.read(block..block + 1, ROOM);
            window.end - window.start
        };
        let scattered: Vec<u64> = (1..100).map(|i| length(i * 1_000_000)).collect();
        assert_eq!(scattered[0], 16);
        assert_eq!(scattered[98], 1);
        // One that is near by chance changes nothing.
        assert_eq!(length(99 * 1_000_000 + 100), 16);
        assert_eq!(length(200_000_000), 1);
        for near in 1..4 {
            length(200_000_000 + near * 300);
        }
        assert_eq!(length(300_000_000), 16);
    }

    #[test]
    fn room_bounds_what_is_fetched_ahead() {
        let mut policy = Readahead::new(Parameters::default());
        policy.miss(0..256);
        assert_eq!(policy.read(0..256, 0), None);
        policy.miss(256..512);
        assert_eq!(policy.read(256..512, 100), None);
        policy.miss(512..768);
        let range = policy.read(512..768, 300).expect("room for a window");
        assert!(range.end - range.start <= 300);
    }
}
