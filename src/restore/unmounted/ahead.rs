//! Files ahead of their use: while one is written, the next ones are on their way.
//!
//! What will be used is taken as one long row: of each file in its turn the inode, then what it
//! holds. Several threads take a batch of the row each and bring its blocks, and no others, into the
//! cache below. The reader waits for a batch that is on its way instead of reading by itself: a read
//! that misses brings neighbours along, and those are fetched anyway, or are of no use.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::{FileContent, Filesystem, Node, Tree};
use crate::error::Result;
use crate::ext4::Inode;
use crate::restore::source::{Content, FileKind, Piece};

/// Bytes fetched and not yet used: a quarter of the cache, and what 1 Gbit/s brings in 250 ms.
const WINDOW: u64 = 32 << 20;
/// Bytes and files of one batch, which is fetched in two steps: the inodes, then the rest.
const BATCH: u64 = 4 << 20;
const BATCH_FILES: usize = 256;
/// Batches at a time.
const THREADS: usize = 6;
/// What a file counts besides its bytes, for its inode and the rest of its last block.
const INODE: u64 = 4096;
/// A file that is not among so many of the next ones is used out of order, or for a second time.
const NEAR: usize = 4096;
/// After so many files in a row whose data nobody read, those of the next ones are not fetched.
const UNREAD: usize = 64;

/// What will be used, in the order of its use.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    files: Vec<Planned>,
    /// Where the row ends.
    end: u64,
    /// Files with several names that have come up.
    linked: HashSet<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Planned {
    inode: u32,
    /// Where it begins in the row.
    at: u64,
}

impl Plan {
    /// What a copy uses of a tree, from one of its directories or files down: each directory when its
    /// turn comes, and its names in the order of [`sort_for_popping`](crate::restore::source::sort_for_popping).
    pub fn of_copy(tree: &Tree, top: Node, wants: impl Fn(Node) -> bool) -> Plan {
        let mut plan = Plan::default();
        let mut stack = vec![top];
        while let Some(node) = stack.pop() {
            if !wants(node) {
                continue;
            }
            let mut children: Vec<Node> = tree.children(node).collect();
            children.sort_by_key(|child| Reverse(tree.inode(*child)));
            stack.extend(children);
            plan.add_node(tree, node, true);
        }
        plan
    }

    /// What an archive of a tree uses: the names are known by now, and in their order.
    pub fn of_archive(tree: &Tree) -> Plan {
        let mut plan = Plan::default();
        for node in tree.walk() {
            plan.add_node(tree, node, false);
        }
        plan
    }

    fn add_node(&mut self, tree: &Tree, node: Node, with_names: bool) {
        let Some(metadata) = tree.metadata(node) else {
            return;
        };
        let inode = tree.inode(node);
        let is_directory = metadata.kind == FileKind::Directory;
        // Under its second name a file is not read again.
        if metadata.links > 1 && !is_directory && !self.linked.insert(inode) {
            return;
        }
        let bytes = match metadata.kind {
            FileKind::Regular | FileKind::Symlink => metadata.size,
            FileKind::Directory if with_names => metadata.size,
            _ => 0,
        };
        self.add(inode, bytes);
    }

    /// Adds an inode, and so many bytes of what it holds.
    pub fn add(&mut self, inode: u32, bytes: u64) {
        self.files.push(Planned {
            inode,
            at: self.end,
        });
        self.end = self.end.saturating_add(INODE).saturating_add(bytes);
    }

    /// Where in the row a file's bytes are.
    fn content(&self, index: usize) -> Range<u64> {
        let end = self.files.get(index + 1).map_or(self.end, |next| next.at);
        self.files[index].at.saturating_add(INODE).min(end)..end
    }

    /// The file that a place of the row belongs to.
    fn index(&self, place: u64) -> usize {
        self.files
            .partition_point(|file| file.at <= place)
            .saturating_sub(1)
    }
}

/// Fetches until it is dropped.
pub struct Ahead {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    plan: Plan,
    state: Mutex<State>,
    /// Threads wait here for room in the window, the reader for what is on its way.
    room: Condvar,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    /// Where in the row the reader is, and where the next batch begins.
    used: u64,
    next: u64,
    under_way: Vec<Batch>,
    /// Files that the reader has passed since it last read any data.
    unread: usize,
    is_over: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Batch {
    row: Range<u64>,
    /// Its inodes are there.
    has_inodes: bool,
    /// Data of regular files are fetched as well.
    with_data: bool,
}

impl Ahead {
    pub fn start(filesystem: &Arc<Filesystem>, plan: Plan) -> Ahead {
        let shared = Arc::new(Shared {
            plan,
            state: Mutex::default(),
            room: Condvar::new(),
            arrived: Condvar::new(),
        });
        let threads = (0..THREADS).filter_map(|number| {
            let (shared, filesystem) = (Arc::clone(&shared), Arc::clone(filesystem));
            let thread = std::thread::Builder::new().name(format!("ahead-{number}"));
            // Without it everything is read when it is needed.
            thread.spawn(move || shared.run(&filesystem)).ok()
        });
        let threads = threads.collect();
        Ahead { shared, threads }
    }

    /// Says that an inode is used now, and waits for it if it is on its way.
    pub fn await_inode(&self, inode: u32) {
        let Some(mut state) = self.reach(inode, 0) else {
            return;
        };
        state.unread += 1;
        let place = state.used;
        self.shared.await_that(state, |state| {
            let mut before = state.under_way.iter().filter(|b| b.row.contains(&place));
            place < state.next && before.all(|batch| batch.has_inodes)
        });
    }

    /// The same of some bytes of what an inode holds.
    fn await_bytes(&self, inode: u32, bytes: Range<u64>, is_data: bool) {
        let from = INODE.saturating_add(bytes.start);
        let length = (bytes.end - bytes.start).min(BATCH);
        let Some(mut state) = self.reach(inode, from) else {
            return;
        };
        if is_data && std::mem::take(&mut state.unread) >= UNREAD {
            state.next = state.used; // what was fetched from here on lacks the data
            self.shared.nudge(&state);
        }
        let end = state.used.saturating_add(length).min(self.shared.plan.end);
        let wanted = state.used..end;
        self.shared.await_that(state, |state| {
            let meets = |b: &Batch| b.row.start < wanted.end && wanted.start < b.row.end;
            wanted.end <= state.next && !state.under_way.iter().any(meets)
        });
    }

    /// The names in a directory are read now.
    pub fn await_names(&self, directory: &Inode) {
        self.await_bytes(directory.number, 0..directory.size, false);
    }

    /// The content of a file that is read in order, each piece of it awaited.
    pub fn follow<'a>(&'a self, inode: &Inode, content: FileContent<'a>) -> impl Content + use<'a> {
        Followed {
            ahead: self,
            inode: inode.number,
            size: inode.size,
            content,
        }
    }

    /// Moves the reader to a place that is after one of a file. None if the file is not among the
    /// next ones, or nothing is fetched at all.
    fn reach(&self, inode: u32, after: u64) -> Option<MutexGuard<'_, State>> {
        if self.threads.is_empty() {
            return None;
        }
        let plan = &self.shared.plan;
        let mut state = self.shared.lock();
        let current = plan.index(state.used);
        let mut near = plan.files.iter().skip(current).take(NEAR);
        let file = near.find(|file| file.inode == inode)?;
        let place = file.at.saturating_add(after);
        if place < state.used || place >= plan.end {
            return None;
        }
        state.used = place;
        self.shared.nudge(&state);
        Some(state)
    }
}

struct Followed<'a> {
    ahead: &'a Ahead,
    inode: u32,
    size: u64,
    content: FileContent<'a>,
}

impl Content for Followed<'_> {
    fn next(&mut self, buf: &mut [u8]) -> Result<Piece> {
        let at = self.content.position();
        let end = at.saturating_add(buf.len() as u64).min(self.size);
        if at < end {
            self.ahead.await_bytes(self.inode, at..end, true);
        }
        self.content.next(buf)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn await_that(&self, mut state: MutexGuard<'_, State>, is_so: impl Fn(&State) -> bool) {
        while !is_so(&state) {
            let waited = self.arrived.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Wakes a thread if there is a batch to take; who takes one wakes the next.
    fn nudge(&self, state: &State) {
        if self.is_due(state) {
            self.room.notify_one();
        }
    }

    /// What the reader has passed is of no use any more.
    fn is_due(&self, state: &State) -> bool {
        let next = state.next.max(state.used);
        next < self.plan.end && next < state.used.saturating_add(WINDOW)
    }

    fn run(&self, filesystem: &Filesystem) {
        while let Some(batch) = self.take() {
            let mut under_way = UnderWay {
                shared: self,
                batch,
            };
            let files = self.files(&under_way.batch.row);
            let numbers = files.clone().map(|index| self.plan.files[index].inode);
            filesystem.fetch_inodes(&numbers.clone().collect::<Vec<u32>>());
            let inodes: Vec<Option<Inode>> = numbers.map(|n| filesystem.inode(n).ok()).collect();
            under_way.has_inodes();
            let Batch { row, with_data, .. } = under_way.batch.clone();
            let parts = files.zip(&inodes).filter_map(|(index, inode)| {
                let inode = inode.as_ref()?;
                let content = self.plan.content(index);
                let part = content.start.max(row.start)..content.end.min(row.end);
                let is_wanted = part.start < part.end && (with_data || !inode.is_regular());
                let bytes = match is_wanted {
                    true => part.start - content.start..part.end - content.start,
                    false => 0..0, // its attributes only
                };
                Some((inode, bytes))
            });
            filesystem.fetch_parts(parts);
        }
    }

    /// The files that have a part in a stretch of the row.
    fn files(&self, row: &Range<u64>) -> Range<usize> {
        self.plan.index(row.start)..self.plan.index(row.end - 1) + 1
    }

    /// The next batch, when it is time for it.
    fn take(&self) -> Option<Batch> {
        let mut state = self.lock();
        while !state.is_over && !self.is_due(&state) {
            let waited = self.room.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        if state.is_over {
            return None;
        }
        let start = state.next.max(state.used);
        let first_after = self.plan.index(start) + BATCH_FILES;
        let after = self.plan.files.get(first_after).map(|file| file.at);
        let end = start.saturating_add(BATCH).min(self.plan.end);
        let end = after.map_or(end, |after| end.min(after));
        state.next = end;
        let batch = Batch {
            row: start..end,
            has_inodes: false,
            with_data: state.unread < UNREAD,
        };
        state.under_way.push(batch.clone());
        self.nudge(&state);
        Some(batch)
    }
}

/// A batch is under way until this is dropped, whatever happens.
struct UnderWay<'a> {
    shared: &'a Shared,
    batch: Batch,
}

impl UnderWay<'_> {
    fn has_inodes(&mut self) {
        self.batch.has_inodes = true;
        let mut state = self.shared.lock();
        let own = state.under_way.iter_mut().find(|b| b.row == self.batch.row);
        if let Some(batch) = own {
            batch.has_inodes = true;
        }
        self.shared.arrived.notify_all();
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let own = state.under_way.iter().position(|b| b.row == self.batch.row);
        if let Some(index) = own {
            state.under_way.swap_remove(index);
        }
        self.shared.arrived.notify_all();
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
