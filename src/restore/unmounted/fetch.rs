//! Reading ahead: what will be needed is brought into the cache below, in large runs and several at
//! a time. Nothing here can fail: what could not be fetched is read, and its error told, later.

use std::ops::Range;

use super::Filesystem;
use super::content::Map;
use crate::ext4::{Format, Inode};

/// Ranges this close to each other are fetched as one, in bytes.
const GAP: u64 = 32 << 10;
/// Inodes of one call: even if each lies alone they fit into the cache.
const INODES: usize = 4096;
/// Of a directory or file, as much is fetched; a larger one is read in order anyway.
const EACH_MAX: u64 = 1 << 20;
/// Of a large directory, as much is fetched at once.
pub(super) const NAMES: u64 = 4 << 20;

impl Filesystem {
    /// Fetches these ranges of the volume, in bytes.
    pub(super) fn fetch(&self, ranges: Vec<Range<u64>>) {
        let runs = runs(ranges, self.device.size());
        if runs.len() < 2 && runs.iter().all(|run| run.end - run.start <= GAP) {
            return; // reading it does as well
        }
        self.device.fetch(&runs);
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
        self.fetch_parts(inodes.map(|inode| (inode, 0..EACH_MAX)));
    }

    /// Fetches some bytes of what each of these holds, and its attributes.
    pub(super) fn fetch_parts<'i>(&self, parts: impl Iterator<Item = (&'i Inode, Range<u64>)>) {
        let mut ranges = Vec::new();
        for (inode, bytes) in parts {
            let size = self.superblock.block_size;
            let attributes = inode.attribute_block.saturating_mul(size);
            if attributes > 0 {
                ranges.push(attributes..attributes.saturating_add(size));
            }
            self.places(inode, bytes, &mut ranges);
        }
        self.fetch(ranges);
    }

    /// Adds where these bytes of a file or directory are on the volume.
    fn places(&self, inode: &Inode, bytes: Range<u64>, ranges: &mut Vec<Range<u64>>) {
        let size = self.superblock.block_size;
        if matches!(inode.format, Format::Inline | Format::ShortLink) {
            return;
        }
        let mut block = bytes.start / size;
        let end = bytes.end.min(inode.size).div_ceil(size);
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
    }
}

/// Sorts, and joins what is close.
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
    joined
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // sets of ranges, one with one
mod tests {
    use super::*;

    #[test]
    fn what_is_close_is_one_run() {
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
    }
}
