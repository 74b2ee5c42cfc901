//! Files ahead of their use: while one is written, the next ones are on their way.
//!
//! Several threads take a batch of the [plan](Plan)'s row each and bring its blocks, and no others,
//! into the cache below. The reader waits for a batch that is on its way instead of reading by itself: a read
//! that misses brings neighbours along, and those are fetched anyway, or are of no use.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::plan::{INODE, Part, Plan};
use super::{FileContent, Filesystem};
use crate::error::{Error, Kind, Result};
use crate::ext4::Inode;
use crate::restore::source::{Content, Piece};

/// Bytes fetched and not yet used: a quarter of the cache, and what 1 Gbit/s brings in 250 ms.
const WINDOW: u64 = 32 << 20;
/// Bytes and files of one batch, which is fetched in two steps: the inodes, then the rest.
const BATCH: u64 = 4 << 20;
const BATCH_FILES: usize = 256;
/// How often who waits looks whether to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Batches at a time.
const THREADS: usize = 6;
/// After so many files in a row whose data nobody read, those of the next ones are not fetched.
const UNREAD: usize = 64;

/// Fetches until it is dropped.
pub struct Ahead {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    plan: Arc<Plan>,
    stop: Arc<AtomicBool>,
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
    /// Nobody waits any more once `stop` is set.
    pub fn start(filesystem: &Arc<Filesystem>, plan: Arc<Plan>, stop: Arc<AtomicBool>) -> Ahead {
        let shared = Arc::new(Shared {
            plan,
            stop,
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

    /// Says that an inode is used now, and waits for it if it is on its way. [`Kind::Interrupted`] if
    /// that is not wanted any more.
    pub fn await_inode(&self, inode: u32) -> Result<()> {
        let Some(mut state) = self.reach(inode, 0) else {
            return Ok(());
        };
        state.unread += 1;
        let place = state.used;
        self.shared.await_that(state, |state| {
            let mut before = state.under_way.iter().filter(|b| b.row.contains(&place));
            place < state.next && before.all(|batch| batch.has_inodes)
        })
    }

    /// The same of some bytes of what an inode holds.
    fn await_bytes(&self, inode: u32, bytes: Range<u64>, is_data: bool) -> Result<()> {
        let from = INODE.saturating_add(bytes.start);
        let length = (bytes.end - bytes.start).min(BATCH);
        let Some(mut state) = self.reach(inode, from) else {
            return Ok(());
        };
        if is_data && std::mem::take(&mut state.unread) >= UNREAD {
            state.next = state.used; // what was fetched from here on lacks the data
            self.shared.nudge(&state);
        }
        let end = state
            .used
            .saturating_add(length)
            .min(self.shared.plan.end());
        let wanted = state.used..end;
        self.shared.await_that(state, |state| {
            let meets = |b: &Batch| b.row.start < wanted.end && wanted.start < b.row.end;
            wanted.end <= state.next && !state.under_way.iter().any(meets)
        })
    }

    /// The names in a directory are read now.
    pub fn await_names(&self, directory: &Inode) -> Result<()> {
        self.await_bytes(directory.number, 0..directory.size, false)
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

    /// Moves the reader on to a place that is `after` bytes after the beginning of a file. None if that
    /// lies behind it, or nothing is fetched at all.
    fn reach(&self, inode: u32, after: u64) -> Option<MutexGuard<'_, State>> {
        if self.threads.is_empty() {
            return None;
        }
        let plan = &self.shared.plan;
        let mut state = self.shared.lock();
        let mut places = plan.places(inode).map(|at| at.saturating_add(after));
        let place = places.find(|place| (state.used..plan.end()).contains(place))?;
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
            self.ahead.await_bytes(self.inode, at..end, true)?;
        }
        self.content.next(buf)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn await_that(
        &self,
        mut state: MutexGuard<'_, State>,
        is_so: impl Fn(&State) -> bool,
    ) -> Result<()> {
        while !is_so(&state) {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Interrupted, "stopped on request"));
            }
            let waited = self.arrived.wait_timeout(state, LOOK_EVERY);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
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
        next < self.plan.end() && next < state.used.saturating_add(WINDOW)
    }

    fn run(&self, filesystem: &Filesystem) {
        while let Some(batch) = self.take() {
            let mut under_way = UnderWay {
                shared: self,
                batch,
            };
            let parts: Vec<Part> = self.plan.parts(&under_way.batch.row).collect();
            let numbers: Vec<u32> = parts.iter().map(|part| part.inode).collect();
            filesystem.fetch_inodes(&numbers);
            if self.lock().is_over {
                return;
            }
            let inode = |part: Part| Some((filesystem.inode(part.inode).ok()?, part.bytes));
            let parts: Vec<(Inode, Range<u64>)> = parts.into_iter().filter_map(inode).collect();
            // Attributes that have no room in the inode.
            filesystem.fetch_parts(parts.iter().map(|(inode, _)| (inode, 0..0)));
            under_way.has_inodes();
            if self.lock().is_over {
                return;
            }
            let with_data = under_way.batch.with_data;
            let wanted = parts.iter().filter(|(i, _)| with_data || !i.is_regular());
            filesystem.fetch_parts(wanted.map(|(inode, bytes)| (inode, bytes.clone())));
        }
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
        let end = self
            .plan
            .after(start, BATCH_FILES)
            .min(start.saturating_add(BATCH));
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
        let mut state = self.shared.lock();
        state.is_over = true;
        let is_idle = state.under_way.is_empty();
        drop(state);
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            // What is on its way may take minutes, and nobody wants it: such a thread ends by itself.
            if is_idle {
                let _ = thread.join();
            }
        }
    }
}
