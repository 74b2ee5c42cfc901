//! What replaying the journal would change, without changing it: for each block of the volume that
//! the log holds a committed copy of, where in the log the newest one is.
//!
//! Two passes, as the kernel makes them: how far the log goes and what it revokes; then what it
//! holds. Copies are read when they are needed, so this costs memory for numbers only.

use std::collections::{BTreeMap, HashMap};

use super::Filesystem;
use super::content::Map;
use crate::error::Result;
use crate::ext4::journal::{Block, Log};
use crate::ext4::{Fault, Inode};

/// Blocks of a journal: 1 GiB of 4 KiB. `mkfs` makes 128 MiB, or 1 GiB where it is told.
const BLOCKS_MAX: u32 = 1 << 18;
/// Revocations remembered, 16 bytes and some each. A transaction has some thousands.
const REVOKED_MAX: usize = 1 << 21;

/// The copy of a block in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Logged {
    /// Where on the volume.
    pub block: u64,
    /// Its first bytes have to be put back.
    pub is_escaped: bool,
}

pub(super) type Replayed = BTreeMap<u64, Logged>;

pub(super) fn replay(filesystem: &Filesystem) -> Result<Replayed> {
    let Some(number) = filesystem.superblock.journal else {
        let what = "a journal on another device that was not replayed";
        return Err(Fault::Unsupported(what.into()).into());
    };
    let inode = filesystem.inode(number)?;
    let journal = Journal::open(filesystem, &inode)?;
    let Some(start) = journal.log.start else {
        return Ok(Replayed::new());
    };
    journal.prefetch();
    let (end, revoked) = journal.scan(start)?;
    journal.collect(start, end, &revoked)
}

struct Journal<'a> {
    filesystem: &'a Filesystem,
    inode: &'a Inode,
    log: Log,
}

/// For each block, the newest transaction that revokes it.
type Revoked = HashMap<u64, u32>;

impl<'a> Journal<'a> {
    fn open(filesystem: &'a Filesystem, inode: &'a Inode) -> Result<Journal<'a>> {
        let size = filesystem.superblock.block_size;
        let first = Map::new(filesystem, inode).at(0)?;
        let raw = match first.start {
            Some(block) => filesystem.read_block(block)?,
            None => return Err(Fault::Damaged("the journal is a hole".into()).into()),
        };
        let log = Log::parse(&raw, size)?;
        if log.blocks > BLOCKS_MAX || u64::from(log.blocks) > inode.size / size {
            let what = "the journal is larger than its file, or than any that is made";
            return Err(Fault::Damaged(what.into()).into());
        }
        Ok(Journal {
            filesystem,
            inode,
            log,
        })
    }

    /// Where block `block` of the journal is on the volume.
    fn place(&self, block: u32) -> Result<u64> {
        match Map::new(self.filesystem, self.inode)
            .at(block.into())?
            .start
        {
            Some(place) => Ok(place),
            None => Err(Fault::Damaged("the journal has a hole".into()).into()),
        }
    }

    fn read(&self, block: u32) -> Result<Vec<u8>> {
        self.filesystem.read_block(self.place(block)?)
    }

    /// How much of the log there is, nobody says before it was read; the first part is likely.
    fn prefetch(&self) {
        const LIKELY: u64 = 4 << 20;
        let start = u64::from(self.log.start.unwrap_or(0));
        if let Ok(place) = self.place(start as u32) {
            let at = place * self.filesystem.superblock.block_size;
            let likely = std::iter::once(at..at + LIKELY);
            self.filesystem.fetch(likely.collect());
        }
    }

    /// The first transaction that is not whole, and what those before it revoke.
    fn scan(&self, start: u32) -> Result<(u32, Revoked)> {
        let mut revoked = Revoked::new();
        // Those of a transaction count when it is committed.
        let mut pending = Vec::new();
        let (mut at, mut sequence) = (start, self.log.sequence);
        let mut left = self.log.blocks;
        while left > 0 {
            let raw = self.read(at)?;
            let mut used = 1;
            match self.log.parse_block(&raw, sequence) {
                None => break,
                Some(Block::Tags(tags)) => used += tags.len() as u32,
                Some(Block::Revoked(blocks)) => pending.extend(blocks),
                Some(Block::Commit) => {
                    revoked.extend(pending.drain(..).map(|block| (block, sequence)));
                    sequence = sequence.wrapping_add(1);
                }
            }
            if revoked.len() + pending.len() > REVOKED_MAX {
                let what = "more revocations in its journal than this program remembers";
                return Err(Fault::Unsupported(what.into()).into());
            }
            for _ in 0..used.min(left) {
                at = self.log.after(at);
            }
            left = left.saturating_sub(used);
        }
        Ok((sequence, revoked))
    }

    fn collect(&self, start: u32, end: u32, revoked: &Revoked) -> Result<Replayed> {
        let mut replayed = Replayed::new();
        let (mut at, mut sequence) = (start, self.log.sequence);
        while sequence != end {
            let raw = self.read(at)?;
            at = self.log.after(at);
            match self.log.parse_block(&raw, sequence) {
                None => return Err(Fault::Damaged("the journal changes".into()).into()),
                Some(Block::Commit) => sequence = sequence.wrapping_add(1),
                Some(Block::Revoked(_)) => {}
                Some(Block::Tags(tags)) => {
                    for tag in tags {
                        let place = self.place(at)?;
                        at = self.log.after(at);
                        // Numbers of transactions wrap around.
                        let is_revoked = revoked
                            .get(&tag.block)
                            .is_some_and(|by| by.wrapping_sub(sequence) as i32 >= 0);
                        if is_revoked {
                            continue;
                        }
                        let copy = self.filesystem.read_block(place)?;
                        if !self.log.is_whole(&tag, sequence, &copy) {
                            let what =
                                format!("the journal holds a damaged copy of block {}", tag.block);
                            return Err(Fault::Damaged(what).into());
                        }
                        let logged = Logged {
                            block: place,
                            is_escaped: tag.is_escaped,
                        };
                        replayed.insert(tag.block, logged);
                    }
                }
            }
        }
        Ok(replayed)
    }
}
