//! Who holds the file open, counted, and waiting for the last to let go.
//!
//! Unused (nobody yet) -> Open(n) -> Closed (n = 0 again) -> Open(n) .. -> Gone (the mount ended).
//! Closed counts as closed after it has lasted for [`SETTLE`]: mount(8) and losetup(8) open the
//! file, close it and open it again.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

const SETTLE: Duration = Duration::from_millis(250);

#[derive(Default)]
pub struct Opens {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    open: u64,
    /// When `open` last fell to 0; `None` before the first open.
    closed_at: Option<Instant>,
    gone: bool,
}

impl Opens {
    pub fn opened(&self) {
        self.state().open += 1;
    }

    pub fn released(&self) {
        let mut state = self.state();
        state.open = state.open.saturating_sub(1);
        if state.open == 0 {
            state.closed_at = Some(Instant::now());
            self.changed.notify_all();
        }
    }

    /// The mount has ended: nobody will open or release any more.
    pub fn gone(&self) {
        self.state().gone = true;
        self.changed.notify_all();
    }

    /// Waits for Closed, settled, or Gone; `false` when `limit` passed first.
    pub fn wait_closed(&self, limit: Duration) -> bool {
        let start = Instant::now();
        let mut state = self.state();
        loop {
            let settled = match (state.gone, state.open, state.closed_at) {
                (true, ..) => return true,
                (false, 0, Some(at)) => SETTLE.checked_sub(at.elapsed()),
                _ => Some(limit),
            };
            let left = limit.checked_sub(start.elapsed());
            let (Some(settled), Some(left)) = (settled, left) else {
                return settled.is_none();
            };
            state = self.wait(state, settled.min(left));
        }
    }

    /// Waits until nobody holds it, ever opened or not; `false` when `limit` passed first.
    pub fn wait_released(&self, limit: Duration) -> bool {
        let start = Instant::now();
        let mut state = self.state();
        while state.open > 0 && !state.gone {
            let Some(left) = limit.checked_sub(start.elapsed()) else {
                return false;
            };
            state = self.wait(state, left);
        }
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, limit: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, limit);
        waited.unwrap_or_else(|e| e.into_inner()).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;
    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn unused_is_not_closed_but_is_released() {
        let opens = Opens::default();
        assert!(!opens.wait_closed(NOW) && opens.wait_released(NOW));
    }

    #[test]
    fn closed_must_last() {
        let opens = Opens::default();
        opens.opened();
        assert!(!opens.wait_closed(SETTLE) && !opens.wait_released(NOW));
        opens.released();
        assert!(!opens.wait_closed(NOW), "not settled yet");
        opens.opened();
        assert!(!opens.wait_closed(SETTLE * 2), "opened again");
        opens.released();
        let start = Instant::now();
        assert!(opens.wait_closed(LONG));
        assert!(start.elapsed() < LONG / 2);
    }

    #[test]
    fn two_holders_count_as_two() {
        let opens = Opens::default();
        opens.opened();
        opens.opened();
        opens.released();
        assert!(!opens.wait_closed(SETTLE * 2));
    }

    #[test]
    fn an_ended_mount_wakes_everybody() {
        let opens = Opens::default();
        opens.opened();
        std::thread::scope(|scope| {
            let closed = scope.spawn(|| opens.wait_closed(LONG));
            let released = scope.spawn(|| opens.wait_released(LONG));
            opens.gone();
            assert!(closed.join().unwrap() && released.join().unwrap());
        });
    }
}
