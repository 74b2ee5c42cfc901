//! File data ahead of use: while one file is written, the next ones are on their way. Several
//! threads take batches of files from a list in the order of use, and bring their blocks into the
//! cache below, no further ahead of the reader than [`WINDOW`].

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::Filesystem;
use crate::ext4::Inode;

/// Bytes fetched and not yet used: a quarter of the cache, and what 1 Gbit/s brings in 250 ms.
const WINDOW: u64 = 32 << 20;
/// Bytes and files of one batch; a batch is fetched with many reads at a time.
const BATCH: u64 = 4 << 20;
const BATCH_FILES: usize = 256;
/// A larger file is read ahead by the cache below; its beginning comes from here.
const EACH: u64 = 1 << 20;
/// Batches at a time: one is being fetched while another one's blocks are looked up.
const THREADS: usize = 3;
/// A file that is not among so many of the next ones was read out of order, or for a second time.
const NEAR: usize = 4096;

/// A file to be read: its inode, and its size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub inode: u32,
    pub size: u64,
}

/// Reads ahead until it is dropped.
pub struct Ahead {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    files: Vec<Wanted>,
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    /// The next file to fetch, and the bytes of all before it.
    fetched: usize,
    fetched_bytes: u64,
    /// The same for what is in use.
    used: usize,
    used_bytes: u64,
    is_over: bool,
}

impl Ahead {
    /// `files` in the order in which they will be read.
    pub fn start(filesystem: &Arc<Filesystem>, files: Vec<Wanted>) -> Ahead {
        let shared = Arc::new(Shared {
            files,
            state: Mutex::default(),
            moved: Condvar::new(),
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

    /// Says that a file is being read now.
    pub fn reached(&self, inode: u32) {
        let files = &self.shared.files;
        let mut state = self.shared.lock();
        let near = files.iter().skip(state.used).take(NEAR);
        let Some(found) = near.clone().position(|file| file.inode == inode) else {
            return;
        };
        state.used_bytes += near
            .take(found)
            .map(|file| file.size.min(EACH))
            .sum::<u64>();
        state.used += found;
        drop(state);
        self.shared.moved.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, filesystem: &Filesystem) {
        while let Some(batch) = self.next() {
            let inodes = batch
                .iter()
                .filter_map(|file| filesystem.inode(file.inode).ok());
            let inodes: Vec<Inode> = inodes.collect();
            filesystem.fetch_content(inodes.iter());
        }
    }

    fn next(&self) -> Option<&[Wanted]> {
        let mut state = self.lock();
        loop {
            // What the reader has passed is of no use any more.
            if state.fetched < state.used {
                (state.fetched, state.fetched_bytes) = (state.used, state.used_bytes);
            }
            if state.is_over || state.fetched >= self.files.len() {
                return None;
            }
            if state.fetched_bytes < state.used_bytes + WINDOW {
                break;
            }
            state = self
                .moved
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let first = state.fetched;
        let mut bytes = 0;
        while state.fetched < self.files.len()
            && state.fetched - first < BATCH_FILES
            && bytes < BATCH
        {
            bytes += self.files[state.fetched].size.min(EACH);
            state.fetched += 1;
        }
        state.fetched_bytes += bytes;
        Some(&self.files[first..state.fetched])
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.moved.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
