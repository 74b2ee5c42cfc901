//! What is read, cut into windows of the image.

use std::ops::Range;

use super::{Reading, Subset};
use crate::ext4::Piece;
use crate::units::MIB;

/// What is read at once: a window of the image, from the first wanted byte in it to the last.
const WINDOW: u64 = MIB;

/// Part of the volume, no longer than [`WINDOW`], that begins and ends with something wanted.
pub struct Window<'a> {
    pub range: Range<u64>,
    /// Those that reach into it.
    pub pieces: &'a [Piece],
    /// Bytes of them in it.
    pub wanted: u64,
}

pub struct Windows<'a> {
    rest: &'a [Piece],
    /// Nothing before it is handed out any more.
    from: u64,
    subset: Subset,
    seed: u64,
    total: u64,
}

impl<'a> Windows<'a> {
    pub fn of(job: &Reading<'a>, seed: u64, total: u64) -> Self {
        Windows {
            rest: job.pieces,
            from: 0,
            subset: job.subset,
            seed,
            total,
        }
    }
}

impl<'a> Iterator for Windows<'a> {
    type Item = Window<'a>;

    fn next(&mut self) -> Option<Window<'a>> {
        loop {
            let first = self.rest.first()?;
            let start = first.range.start.max(self.from);
            let number = start / WINDOW;
            let limit = (number + 1) * WINDOW;
            let count = self
                .rest
                .iter()
                .take_while(|piece| piece.range.start < limit)
                .count();
            let pieces = &self.rest[..count];
            let (mut end, mut wanted) = (start, 0);
            for piece in pieces {
                let inside = piece.range.start.max(start)..piece.range.end.min(limit);
                end = end.max(inside.end);
                wanted += inside.end.saturating_sub(inside.start);
            }
            // Only the last of them can reach beyond; blocks belong to one piece.
            let over = pieces.last().is_some_and(|piece| piece.range.end > limit);
            self.rest = &self.rest[count - usize::from(over)..];
            self.from = limit;
            if self.subset.has(number, self.seed, self.total) {
                return Some(Window {
                    range: start..end,
                    pieces,
                    wanted,
                });
            }
        }
    }
}

/// What of a range is in another.
pub fn cut(range: &Range<u64>, to: &Range<u64>) -> Range<u64> {
    let start = range.start.max(to.start);
    start..range.end.min(to.end).max(start)
}

pub fn len(range: &Range<u64>) -> u64 {
    range.end - range.start
}

#[cfg(test)]
mod tests {
    use super::super::tests::{job, pieces};
    use super::*;
    use crate::layer::memory::Memory;

    #[test]
    fn windows_have_every_byte_of_every_piece_once() {
        let pieces = pieces();
        let memory = Memory::new(MIB);
        let job = job(&memory, &pieces, Subset::All);
        let mut seen = Vec::new();
        for window in Windows::of(&job, 0, 0) {
            assert!(len(&window.range) <= WINDOW);
            for piece in window.pieces {
                let inside = cut(&piece.range, &window.range);
                seen.push((inside.start, inside.end));
            }
        }
        let all = [
            (4096, 12288),
            (MIB - 4096, MIB),
            (MIB, 2 * MIB),
            (2 * MIB, 2 * MIB + 8192),
            (5 * MIB, 5 * MIB + 4096),
        ];
        assert_eq!(seen, all);
    }
}
