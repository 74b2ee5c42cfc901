//! The threads that answer: few when little is asked, one for each request in flight at most.
//!
//! A read that misses every cache waits for the server, and must hold up nobody else. So the event
//! loops only take requests in, and hand them over here. (An event loop for each request in
//! flight would do as well, but every loop of fuser keeps a buffer of 16 MiB.)
//!
//! Starting (a job finds nobody idle) -> working -> idle -> working .. -> gone after [`IDLE_LIMIT`].

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tracing::warn;

/// Answers one request; the buffer is the thread's own, kept from job to job.
pub type Job = Box<dyn FnOnce(&mut Vec<u8>) + Send>;

/// A thread that had nothing to do for so long ends, and its buffer with it.
const IDLE_LIMIT: Duration = Duration::from_secs(5);

/// A device call goes through the cache, the cipher and the SFTP queue, none of which recurses.
const STACK_SIZE: usize = 512 << 10;

pub struct Handlers {
    limit: usize,
    state: Mutex<State>,
    /// A job was queued, or it is time to end.
    wake: Condvar,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// No bound of its own: the kernel keeps a bounded number of requests in flight.
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
    ending: bool,
}

impl Handlers {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Handlers {
            limit,
            state: Mutex::default(),
            wake: Condvar::new(),
            ended: Condvar::new(),
        })
    }

    /// Hands a job over. Does not wait, unless no thread at all can be started.
    pub fn run(self: &Arc<Self>, job: Job) {
        let mut state = self.state();
        state.queue.push_back(job);
        if state.queue.len() <= state.idle {
            self.wake.notify_one();
            return;
        }
        if state.threads >= self.limit {
            return; // the next that is done takes it
        }
        let handlers = self.clone();
        let started = std::thread::Builder::new()
            .name("volume".into())
            .stack_size(STACK_SIZE)
            .spawn(move || handlers.work());
        match started {
            Ok(_) => state.threads += 1,
            Err(error) if state.threads == 0 => {
                warn!(%error, "no thread to serve the volume with");
                let job = state.queue.pop_back();
                drop(state);
                job.into_iter().for_each(|job| job(&mut Vec::new()));
            }
            Err(_) => {}
        }
    }

    /// Lets the threads end when the queue is empty, and waits for them; `false` when `limit`
    /// passed first, and some then end by themselves when the device lets go of them.
    pub fn finish(&self, limit: Duration) -> bool {
        let start = Instant::now();
        let mut state = self.state();
        state.ending = true;
        self.wake.notify_all();
        while state.threads > 0 {
            let Some(left) = limit.checked_sub(start.elapsed()) else {
                return false;
            };
            let waited = self.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
        true
    }

    fn work(&self) {
        let _leaving = Leaving(self);
        let mut buffer = Vec::new();
        while let Some(job) = self.next() {
            job(&mut buffer);
        }
    }

    /// The next job; `None` when this thread is no longer needed.
    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if let Some(job) = state.queue.pop_front() {
                return Some(job);
            }
            if state.ending {
                return None;
            }
            state.idle += 1;
            let waited = self.wake.wait_timeout(state, IDLE_LIMIT);
            let (woken, timeout) = waited.unwrap_or_else(|e| e.into_inner());
            state = woken;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() {
                return None;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Counts a thread out, also when its job panicked (fuser then answers with EIO).
struct Leaving<'a>(&'a Handlers);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.state().threads -= 1;
        self.0.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn blocked_jobs_hold_up_nobody_while_there_are_threads() {
        let handlers = Handlers::new(4);
        let (done, heard) = mpsc::channel();
        let gates: Vec<_> = (0..3)
            .map(|_| {
                let (open, gate) = mpsc::channel::<()>();
                handlers.run(Box::new(move |_| assert!(gate.recv().is_err())));
                open
            })
            .collect();
        for number in 0..100 {
            let done = done.clone();
            handlers.run(Box::new(move |_| done.send(number).expect("heard")));
        }
        for number in 0..100 {
            assert_eq!(
                heard.recv_timeout(SOON),
                Ok(number),
                "in order, by one thread"
            );
        }
        assert!(
            !handlers.finish(Duration::from_millis(50)),
            "three still wait"
        );
        drop(gates);
        assert!(handlers.finish(SOON));
    }

    #[test]
    fn no_more_threads_than_allowed_and_none_more_than_needed() {
        let handlers = Handlers::new(2);
        let (done, heard) = mpsc::channel();
        for _ in 0..20 {
            let done = done.clone();
            handlers.run(Box::new(move |_| done.send(()).expect("heard")));
            heard.recv_timeout(SOON).expect("done");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(handlers.state().threads, 1, "one after the other needs one");
        for _ in 0..20 {
            handlers.run(Box::new(|_| std::thread::sleep(Duration::from_millis(2))));
        }
        assert_eq!(handlers.state().threads, 2);
        assert!(handlers.finish(SOON), "and what was queued is done first");
        assert!(handlers.state().queue.is_empty());
    }

    #[test]
    fn a_panic_costs_one_thread_and_no_job() {
        let handlers = Handlers::new(1);
        handlers.run(Box::new(|_| panic!("as the test wants")));
        assert!({
            let start = Instant::now();
            while handlers.state().threads > 0 && start.elapsed() < SOON {
                std::thread::yield_now();
            }
            handlers.state().threads == 0
        });
        let (done, heard) = mpsc::channel();
        handlers.run(Box::new(move |_| done.send(()).expect("heard")));
        assert!(heard.recv_timeout(SOON).is_ok());
    }
}
