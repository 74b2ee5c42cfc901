//! What will be used of a filesystem, in the order of its use, as one long row: of each file in its turn
//! the inode, then what it holds.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::ops::Range;

use super::{Node, Tree};
use crate::restore::source::FileKind;

/// What an inode counts for in the row, with the rest of the last block of what it holds.
pub(super) const INODE: u64 = 4096;

/// What will be used, in the order of its use.
#[derive(Debug, Default)]
pub struct Plan {
    files: Vec<Planned>,
    /// Inodes, and which of the files they are; sorted.
    by_inode: Vec<(u32, u32)>,
    /// Where the row ends.
    end: u64,
}

/// Some bytes, or none, of what an inode holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub inode: u32,
    pub bytes: Range<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Planned {
    inode: u32,
    /// Where it begins in the row.
    at: u64,
}

impl Plan {
    /// What a copy uses of a tree, from one of its directories or files down: each directory when its
    /// turn comes, and its names in the order of `restore::source::sort_for_popping`.
    pub fn of_copy(tree: &Tree, top: Node, wants: impl Fn(Node) -> bool) -> Plan {
        let mut nodes = Vec::new();
        let mut stack = vec![top];
        while let Some(node) = stack.pop() {
            if wants(node) {
                let mut children: Vec<Node> = tree.children(node).collect();
                children.sort_by_key(|child| Reverse(tree.inode(*child)));
                stack.extend(children);
                nodes.push(node);
            }
        }
        Plan::of_nodes(tree, nodes.into_iter(), true)
    }

    /// What an archive of a tree uses: the names are known by now, and in their order.
    pub fn of_archive(tree: &Tree) -> Plan {
        Plan::of_nodes(tree, tree.walk(), false)
    }

    fn of_nodes(tree: &Tree, nodes: impl Iterator<Item = Node>, with_names: bool) -> Plan {
        let mut linked = HashSet::new();
        let wanted = nodes.filter_map(|node| {
            let metadata = tree.metadata(node)?;
            let inode = tree.inode(node);
            let is_directory = metadata.kind == FileKind::Directory;
            // Under its second name a file is not read again.
            if metadata.links > 1 && !is_directory && !linked.insert(inode) {
                return None;
            }
            let bytes = match metadata.kind {
                FileKind::Regular | FileKind::Symlink => metadata.size,
                FileKind::Directory if with_names => metadata.size,
                _ => 0,
            };
            Some((inode, bytes))
        });
        Plan::new(wanted)
    }

    /// Inodes in the order of their use, and how many bytes are used of what each holds.
    pub fn new(wanted: impl Iterator<Item = (u32, u64)>) -> Plan {
        let mut plan = Plan::default();
        for (index, (inode, bytes)) in (0..).zip(wanted) {
            plan.files.push(Planned {
                inode,
                at: plan.end,
            });
            plan.by_inode.push((inode, index));
            plan.end = plan.end.saturating_add(INODE).saturating_add(bytes);
        }
        plan.by_inode.sort_unstable();
        plan
    }

    /// Where the row ends.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Where the inode is in the row, in order; more than once if it was planned more than once.
    pub(super) fn places(&self, inode: u32) -> impl Iterator<Item = u64> {
        let first = self.by_inode.partition_point(|(other, _)| *other < inode);
        let own = self.by_inode[first..].iter();
        own.take_while(move |(other, _)| *other == inode)
            .map(|(_, index)| self.files[*index as usize].at)
    }

    /// Where the row has got when so many files are used after a place.
    pub(super) fn after(&self, place: u64, files: usize) -> u64 {
        let next = self.files.get(self.index(place) + files);
        next.map_or(self.end, |file| file.at)
    }

    /// What lies in a stretch of the row, which is not empty.
    pub(super) fn parts(&self, row: &Range<u64>) -> impl Iterator<Item = Part> {
        (self.index(row.start)..=self.index(row.end - 1)).map(|index| {
            let file = self.files[index];
            let start = file.at.saturating_add(INODE);
            let end = self.files.get(index + 1).map_or(self.end, |next| next.at);
            let part = row.start.max(start)..row.end.min(end);
            let bytes = match part.is_empty() {
                true => 0..0,
                false => part.start - start..part.end - start,
            };
            Part {
                inode: file.inode,
                bytes,
            }
        })
    }

    /// The file that a place of the row belongs to.
    fn index(&self, place: u64) -> usize {
        let after = self.files.partition_point(|file| file.at <= place);
        after.saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(inode: u32, bytes: Range<u64>) -> Part {
        Part { inode, bytes }
    }

    #[test]
    fn a_stretch_of_the_row_is_made_of_parts_of_files() {
        let plan = Plan::new([(7, 10_000), (3, 0), (9, 50)].into_iter());
        assert_eq!(plan.end(), 3 * INODE + 10_050);
        let parts = |row| plan.parts(&row).collect::<Vec<Part>>();
        assert_eq!(
            parts(0..plan.end()),
            [part(7, 0..10_000), part(3, 0..0), part(9, 0..50)]
        );
        assert_eq!(parts(0..INODE), [part(7, 0..0)]);
        assert_eq!(parts(INODE + 5..INODE + 6), [part(7, 5..6)]);
        let second = INODE + 10_000;
        assert_eq!(
            parts(second - 1..second + INODE + 1),
            [part(7, 9_999..10_000), part(3, 0..0), part(9, 0..0)]
        );
        assert_eq!(plan.places(3).collect::<Vec<u64>>(), [second]);
        assert_eq!(plan.places(4).count(), 0);
        assert_eq!(plan.after(5, 1), second);
        assert_eq!(plan.after(second, 9), plan.end());
    }

    #[test]
    fn sizes_that_lie_end_the_row() {
        let plan = Plan::new([(1, u64::MAX), (2, 1 << 63), (1, 5)].into_iter());
        assert_eq!(plan.end(), u64::MAX);
        assert_eq!(plan.places(1).collect::<Vec<u64>>(), [0, u64::MAX]);
        let parts: Vec<Part> = plan.parts(&(u64::MAX - 1..u64::MAX)).collect();
        assert_eq!(parts.len(), 1);
    }
}
