//! Long runs of sectors over several processors.
//!
//! A run is halved until the parts are short or every processor has one. The threads live as long
//! as the run: a pool would have to be woken as well, and would not survive a `fork`.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{Builder, available_parallelism, scope};

use aes::cipher::InOutBuf;

use super::{SectorSize, Tweak};

/// The shortest part that is worth a thread: starting one takes about 30 us, in which one
/// processor does half a MiB.
const PART_MIN: usize = 2 << 20;
const _: () = assert!(PART_MIN.is_multiple_of(SectorSize::MAX.0));

/// More threads than this wait for the memory.
const THREADS_MAX: usize = 8;

/// The bytes to work on.
pub(super) enum Run<'a> {
    InPlace(&'a mut [u8]),
    Across(&'a [u8], &'a mut [u8]),
}

impl Run<'_> {
    fn len(&self) -> usize {
        match self {
            Run::InPlace(data) => data.len(),
            Run::Across(from, _) => from.len(),
        }
    }
}

impl<'a> Run<'a> {
    fn split_at(self, middle: usize) -> (Run<'a>, Run<'a>) {
        match self {
            Run::InPlace(data) => {
                let (left, right) = data.split_at_mut(middle);
                (Run::InPlace(left), Run::InPlace(right))
            }
            Run::Across(from, to) => {
                let (from_left, from_right) = from.split_at(middle);
                let (to_left, to_right) = to.split_at_mut(middle);
                (
                    Run::Across(from_left, to_left),
                    Run::Across(from_right, to_right),
                )
            }
        }
    }
}

impl<'a> From<Run<'a>> for InOutBuf<'a, 'a, u8> {
    fn from(run: Run<'a>) -> Self {
        match run {
            Run::InPlace(data) => data.into(),
            // OK to unwrap: `Key::encrypt_into` has compared the lengths, and both are split alike.
            Run::Across(from, to) => InOutBuf::new(from, to).expect("equal lengths"),
        }
    }
}

/// How many threads may work at once; asked only once, since it reads files.
pub(super) fn processors() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| available_parallelism().map_or(1, |count| count.get().min(THREADS_MAX)))
}

/// Does `work` on all of `run`, whose first sector has the tweak `first`, on up to `threads`
/// threads. What no thread could be started for is done by the caller.
pub(super) fn split(
    work: &(impl Fn(Tweak, Run) + Sync),
    first: Tweak,
    run: Run<'_>,
    threads: usize,
) {
    if threads < 2 || run.len() < 2 * PART_MIN {
        return work(first, run);
    }
    let middle = (run.len() / 2).next_multiple_of(SectorSize::MAX.0);
    let (left, right) = run.split_at(middle);
    let second = Tweak::at(first, middle as u64);
    let right = Mutex::new(Some(right));
    let take_right = || {
        let right = right.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(right) = right {
            split(work, second, right, threads / 2);
        }
    };
    scope(|scope| {
        let started = Builder::new().spawn_scoped(scope, take_right);
        split(work, first, left, threads - threads / 2);
        // A thread that has not begun yet finds nothing left to do.
        take_right();
        drop(started);
    });
}
