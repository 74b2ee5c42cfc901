//! Choices that a seed repeats.

/// Sebastiano Vigna's SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// What becomes of each block: nothing since the flush is kept, all is; each block by itself,
    /// rarely, evenly or mostly; only what is newer, or older, than some moment, as when an order
    /// was not kept; all but a few, or only a few.
    pub fn chooser(mut self, moment: u32) -> impl FnMut(&[u32]) -> usize {
        let way = self.below(9);
        move |candidates| {
            let (newest, any) = (candidates.len(), 1 + self.below(candidates.len()));
            let of_16 = self.below(16);
            let newer = candidates.iter().rposition(|version| *version >= moment);
            let older = candidates.iter().rposition(|version| *version < moment);
            match way {
                0 => 0,
                1 => newest,
                2 if of_16 < 1 => any,
                3 if of_16 < 8 => any,
                4 if of_16 < 15 => any,
                5 => newer.map_or(0, |_| newest),
                6 => older.map_or(0, |at| at + 1),
                7 if self.below(50) > 0 => newest,
                8 if self.below(50) == 0 => newest,
                _ => 0,
            }
        }
    }
}
