//! The same work on many items, several at a time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::error::{Attempt, Result};

/// Reads and writes at the same time.
const WORKERS: usize = 8;

/// Does something with all items, several at a time; gives the results in their order, or the first
/// error.
pub fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let queue = Mutex::new(items.iter().enumerate());
    let results = Mutex::new(Vec::with_capacity(items.len()));
    let (stop, failure) = (AtomicBool::new(false), Mutex::new(None));
    let worker = || {
        while !stop.load(Ordering::Relaxed) {
            let Some((place, item)) = lock(&queue).next() else {
                return;
            };
            match work(item) {
                Ok(result) => lock(&results).push((place, result)),
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    lock(&failure).get_or_insert(error);
                }
            }
        }
    };
    thread::scope(|scope| -> Result<()> {
        for _ in 0..WORKERS.min(items.len()) {
            let started = thread::Builder::new()
                .name("copy".into())
                .spawn_scoped(scope, worker);
            let started = started.attempt(|| "start a thread");
            started.inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    })?;
    if let Some(error) = lock(&failure).take() {
        return Err(error);
    }
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_unstable_by_key(|(place, _)| *place);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
