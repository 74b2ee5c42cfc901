//! Where the journal of a closed filesystem lies: its blocks hold nothing that anybody reads.

use std::ops::Range;

use super::map::Read;
use super::{Format, Group, IN_INODE, Inode, Step, Superblock, parse_node};

const JOURNAL_MAGIC: u32 = 0xC03B_3998;

/// The blocks of the journal after its first, if it is as simple as mkfs makes it and closed.
pub(super) fn read_journal<E>(
    fs: &Superblock,
    groups: &[Group],
    read: Read<'_, E>,
) -> Result<Vec<Range<u64>>, E> {
    let Some(number) = fs.journal.filter(|number| *number > 0) else {
        return Ok(Vec::new());
    };
    let Some((group, place)) = fs.locate(number) else {
        return Ok(Vec::new());
    };
    let Some(group) = groups.get(group as usize) else {
        return Ok(Vec::new());
    };
    let at = group.inode_table * fs.block_size + place * fs.inode_size as u64;
    let mut inode = vec![0; fs.inode_size];
    read(at, &mut inode)?;
    let inode = Inode::parse(fs, number, &inode);
    let Some(extents) = inode.ok().and_then(|inode| journal_extents(fs, &inode)) else {
        return Ok(Vec::new());
    };
    let mut head = [0; 32];
    match extents.first() {
        Some(first) => read(first.start * fs.block_size, &mut head)?,
        None => return Ok(Vec::new()),
    }
    let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    // No transaction is waiting (jbd2, `s_start`).
    if word(0) != JOURNAL_MAGIC || word(0x1C) != 0 {
        return Ok(Vec::new());
    }
    let mut runs = extents;
    runs[0].start += 1;
    runs.retain(|run| !run.is_empty());
    Ok(runs)
}

/// The extents of the journal's inode, in the order of the file; `None` in any doubt.
fn journal_extents(fs: &Superblock, inode: &Inode) -> Option<Vec<Range<u64>>> {
    if inode.format != Format::Extents {
        return None;
    }
    let node = parse_node(fs, inode, IN_INODE, &inode.root).ok()?;
    if node.depth != 0 {
        return None;
    }
    let blocks = inode.size / fs.block_size;
    let mut runs = Vec::new();
    let mut next = 0;
    while next < blocks {
        let Step::Run(run) = node.find(next, blocks) else {
            return None;
        };
        // A hole, or blocks that were never written, which a journal has not.
        let start = run.start?;
        runs.push(start..start + run.length);
        next += run.length;
    }
    (inode.size == next * fs.block_size).then_some(runs)
}
