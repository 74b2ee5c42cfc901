//! The workers' side of the cache: fetches first, as somebody will want them; then write-back.

use std::sync::PoisonError;

use super::shell::{Guard, Shared};
use super::table::{Action, WriteBack};
use super::{BLOCK, SENDERS_MAX, lock};

pub fn run(shared: &Shared) {
    let mut state = lock(&shared.state);
    while !state.stop {
        if let Some(fetch) = state.queue.pop_front() {
            shared.nudge(&state);
            // Who waits for it hears of its failure; nobody else minds.
            (state, _) = shared.fetch(state, fetch);
            continue;
        }
        let action = match state.senders < SENDERS_MAX {
            true => state.table.next(shared.now()),
            false => Action::Wait(None),
        };
        state = match action {
            Action::Write(run) => send(shared, state, run),
            Action::Wait(None) => {
                state.idle += 1;
                let woken = shared.work.wait(state);
                let mut state = woken.unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                state
            }
            Action::Wait(Some(until)) => {
                state.idle += 1;
                state.armed += 1;
                let timeout = until.saturating_sub(shared.now());
                let woken = shared.work.wait_timeout(state, timeout);
                let (mut state, _) = woken.unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                state.armed -= 1;
                state
            }
        };
    }
}

/// Writes one run back.
fn send<'a>(shared: &'a Shared, mut guard: Guard<'a>, run: WriteBack) -> Guard<'a> {
    let state = &mut *guard;
    let blocks = run.blocks();
    let bytes = shared.bytes_of(&blocks);
    let mut buffer = shared.outgoing.take((bytes.end - bytes.start) as usize);
    for (block, into) in blocks.clone().zip(buffer.chunks_mut(BLOCK)) {
        if let Some(frame) = state.table.frame_of(block) {
            // The last block may reach beyond the device.
            into.copy_from_slice(&state.frames.get(frame)[..into.len()]);
        }
    }
    state.senders += 1;
    shared.nudge(state);
    drop(guard);

    tracing::trace!(offset = bytes.start, length = buffer.len(), "write back");
    let result = shared.inner.write_buffer_at(buffer, bytes.start);

    let mut guard = lock(&shared.state);
    let state = &mut *guard;
    state.senders -= 1;
    match result {
        Ok(()) => {
            state.stats.writes += 1;
            state.stats.written_back_bytes += bytes.end - bytes.start;
            state.table.written(run);
        }
        Err(error) => {
            state.table.write_failed(run);
            state.fail(&error, "write to the device under the cache");
        }
    }
    shared.tell_waiters(state);
    guard
}
