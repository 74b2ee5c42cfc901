//! Signals end the benchmark by unwinding, so that everything it made is taken down.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT, SIGTERM and SIGHUP are heard by [`check`].
pub fn at_signals() {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).expect("signals");
    std::thread::spawn(move || {
        for _ in signals.forever() {
            ASKED.store(true, Ordering::SeqCst);
        }
    });
}

pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Unwinds, without a word, when a signal has come.
pub fn check() {
    if asked() && !std::thread::panicking() {
        std::panic::resume_unwind(Box::new("interrupted"));
    }
}
