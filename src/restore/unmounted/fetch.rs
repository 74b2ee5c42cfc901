//! Reading ahead: what will be needed is brought into the cache below, in large runs and several at
//! a time. Nothing here can fail: what could not be fetched is read, and its error told, later.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::PoisonError;

use super::Filesystem;
use super::content::Map;
use crate::ext4::{Format, Inode};

/// Ranges this close to each other are fetched as one, in bytes.
const GAP: u64 = 32 << 10;
/// The longest single read, in bytes.
const RUN: u64 = 512 << 10;
/// Reads at the same time; 16 of 512 KiB are 8 MiB, which a round trip of 50 ms brings at 160 MB/s.
const AT_ONCE: usize = 16;
/// Inodes of one call: even if each lies alone they fit into the cache.
const INODES: usize = 4096;
/// Of a directory or file, as much is fetched; a larger one is read in order anyway.
const EACH_MAX: u64 = 1 << 20;
/// Of a large directory, as much is fetched at once.
pub(super) const NAMES: u64 = 4 << 20;

impl Filesystem {
    /// Fetches these ranges of the volume, in bytes.
    pub(super) fn fetch(&self, ranges: Vec<Range<u64>>) {
        let end = self.device.size();
        let mut runs = runs(ranges, end);
        if runs.len() < 2 && runs.iter().all(|run| run.end - run.start <= GAP) {
            return; // reading it does as well
        }
        runs.reverse();
        let threads = runs.len().min(AT_ONCE);
        let runs = Mutex::new(runs);
        let work = || {
            let mut scratch = Vec::new();
            loop {
                let next = runs.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let Some(run) = next else { return };
                scratch.resize((run.end - run.start) as usize, 0);
                if let Err(error) = self.device.read_exact_at(&mut scratch, run.start) {
                    tracing::debug!(?run, %error, "not fetched ahead");
                    return;
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // Fewer threads do as well.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
    }

    /// Fetches what [`Filesystem::inode`] will read for each of these.
    pub fn fetch_inodes(&self, inodes: &[u32]) {
        for chunk in inodes.chunks(INODES) {
            let size = self.superblock.inode_size() as u64;
            let mut groups: Vec<u64> = chunk
                .iter()
                .filter_map(|number| Some(self.superblock.locate(*number)?.0))
                .collect();
            groups.sort_unstable();
            groups.dedup();
            let descriptor = self.superblock.descriptor_size() as u64;
            let at = |group| self.superblock.descriptor_at(group);
            self.fetch(groups.iter().map(|g| at(*g)..at(*g) + descriptor).collect());
            let found = chunk
                .iter()
                .filter_map(|number| self.inode_at(*number).ok());
            self.fetch(found.map(|at| at..at + size).collect());
        }
    }

    /// Fetches the beginning of what these hold: names or data.
    pub fn fetch_content<'i>(&self, inodes: impl Iterator<Item = &'i Inode>) {
        let ranges = inodes.flat_map(|inode| self.places(inode, 0, EACH_MAX));
        self.fetch(ranges.collect());
    }

    /// Fetches part of what a file or directory holds, from a block of it on.
    pub(super) fn fetch_part(&self, inode: &Inode, block: u64, bytes: u64) {
        self.fetch(self.places(inode, block, bytes));
    }

    /// Where these bytes of a file or directory are on the volume.
    fn places(&self, inode: &Inode, from: u64, bytes: u64) -> Vec<Range<u64>> {
        let size = self.superblock.block_size;
        let mut ranges = Vec::new();
        if matches!(inode.format, Format::Inline | Format::ShortLink) {
            return ranges;
        }
        let end = inode
            .size
            .min(from.saturating_mul(size).saturating_add(bytes));
        let (mut block, end) = (from, end.div_ceil(size));
        while block < end {
            let Ok(run) = Map::new(self, inode).at(block) else {
                break;
            };
            let length = run.length.min(end - block);
            if let Some(start) = run.start {
                ranges.push(start * size..(start + length) * size);
            }
            block += length;
        }
        ranges
    }
}

/// Sorts, joins what is close, and cuts what is long.
fn runs(mut ranges: Vec<Range<u64>>, end: u64) -> Vec<Range<u64>> {
    ranges.retain(|range| range.start < range.end && range.end <= end);
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end + GAP => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    let cut = |range: Range<u64>| {
        let starts = (range.start..range.end).step_by(RUN as usize);
        starts.map(move |start| start..(start + RUN).min(range.end))
    };
    joined.into_iter().flat_map(cut).collect()
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // sets of ranges, one with one
mod tests {
    use super::*;

    #[test]
    fn what_is_close_is_one_run_and_what_is_long_is_cut() {
        let k = |n: u64| n << 10;
        let ranges = vec![
            k(100)..k(101),
            k(0)..k(1),
            k(20)..k(24),
            5..5,
            k(9000)..k(9999),
        ];
        assert_eq!(
            runs(ranges, k(9500)),
            [k(0)..k(24), k(100)..k(101)],
            "what reaches beyond the end is left out"
        );
        let long = runs(vec![0..k(1100)], k(2000));
        assert_eq!(long, [0..k(512), k(512)..k(1024), k(1024)..k(1100)]);
    }
}
