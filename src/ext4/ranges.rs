//! Sets of bytes or blocks, as sorted ranges.

use std::ops::Range;

/// Ascending, neither touching nor overlapping.
pub type Ranges = Vec<Range<u64>>;

/// Sorts ranges and joins those that touch or overlap.
pub fn merged(mut ranges: Vec<Range<u64>>) -> Ranges {
    ranges.sort_unstable_by_key(|range| (range.start, range.end));
    let mut joined: Ranges = Vec::with_capacity(ranges.len());
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What of `from` is not in `what`; both merged.
pub fn without(from: &[Range<u64>], what: &[Range<u64>]) -> Ranges {
    let mut rest = Ranges::new();
    let mut what = what.iter().peekable();
    for range in from {
        let mut start = range.start;
        while let Some(cut) = what.peek() {
            if cut.start >= range.end {
                break;
            }
            if cut.start > start {
                rest.push(start..cut.start);
            }
            start = start.max(cut.end);
            if cut.end > range.end {
                break;
            }
            what.next();
        }
        if start < range.end {
            rest.push(start..range.end);
        }
    }
    rest
}

/// What is in both; both merged.
pub(super) fn intersection(a: &[Range<u64>], b: &[Range<u64>]) -> Ranges {
    without(a, &without(a, b))
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // sets of ranges, some with one
mod tests {
    use super::*;

    #[test]
    fn ranges_are_sets() {
        let merged = merged(vec![5..7, 0..2, 2..3, 6..9, 4..4]);
        assert_eq!(merged, [0..3, 5..9]);
        assert_eq!(without(&merged, &[1..2, 6..7]), [0..1, 2..3, 5..6, 7..9]);
        assert_eq!(without(&merged, &[0..100]), Ranges::new());
        assert_eq!(
            without(&[0..3, 5..9, 12..14], &[2..6, 8..13]),
            [0..2, 6..8, 13..14]
        );
        assert_eq!(intersection(&merged, &[2..6]), [2..3, 5..6]);
    }
}
