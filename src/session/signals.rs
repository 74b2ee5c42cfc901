//! Signals that ask a command to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::error::{Attempt, Kind, Result};

/// How often is looked whether one has come.
const POLL: Duration = Duration::from_millis(100);

/// So many signals end a command at once, or the session that works for it.
pub const ENOUGH_SIGNALS: usize = 2;

/// Counts SIGINT, SIGTERM and SIGHUP, and sets `stop` at the first.
pub fn count_signals() -> Result<(Arc<AtomicUsize>, Arc<AtomicBool>)> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let count = Arc::new(AtomicUsize::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])
        .attempt(|| "listen for signals")?;
    let (counted, stopped) = (count.clone(), stop.clone());
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                counted.fetch_add(1, Ordering::Relaxed);
                stopped.store(true, Ordering::Relaxed);
            }
        })
        .attempt(|| "start a thread")?;
    Ok((count, stop))
}

/// Ends the program at a signal, for verbs that hold and write nothing; counts them for the prompt,
/// which turns the echo on again first.
pub fn end_at_signals() -> Result<Arc<AtomicUsize>> {
    let (count, _) = count_signals()?;
    end_at(1, &count)?;
    Ok(count)
}

/// Ends the program at the second signal, for verbs that end in order at the first and may have to
/// wait for a link that is down. What they hold is a lease, which the next one on this machine takes
/// over.
pub fn end_at_second_signal(count: &Arc<AtomicUsize>) -> Result<()> {
    end_at(ENOUGH_SIGNALS, count)
}

/// Ends the program at the first signal until there is something to be ended in order, and at the
/// second from then on. `stopping` is called at the first of those.
pub fn end_at_signals_until(
    count: &Arc<AtomicUsize>,
    begun: &Arc<AtomicBool>,
    stopping: impl Fn() + Send + 'static,
) -> Result<()> {
    let (counted, begun) = (count.clone(), begun.clone());
    let mut told = false;
    end_when(move || {
        let count = counted.load(Ordering::Relaxed);
        let in_order = begun.load(Ordering::Relaxed);
        if count > 0 && in_order && !told {
            told = true;
            stopping();
        }
        count >= if in_order { ENOUGH_SIGNALS } else { 1 }
    })
}

fn end_at(enough: usize, count: &Arc<AtomicUsize>) -> Result<()> {
    let counted = count.clone();
    end_when(move || counted.load(Ordering::Relaxed) >= enough)
}

fn end_when(mut is_time: impl FnMut() -> bool + Send + 'static) -> Result<()> {
    let watch = move || {
        while !is_time() {
            thread::sleep(POLL);
        }
        thread::sleep(5 * POLL);
        std::process::exit(i32::from(Kind::Interrupted.exit_code()));
    };
    let started = thread::Builder::new()
        .name("signals-end".into())
        .spawn(watch);
    started.map(drop).attempt(|| "start a thread")
}
