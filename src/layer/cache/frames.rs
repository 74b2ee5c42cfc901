//! The bytes of the cached blocks, and the buffers that carry them here from the inner device.
//! Memory is taken as it is used, a chunk at a time, and kept.

use super::table::Frame;
use super::{BLOCK, RUN};

const FRAMES_PER_CHUNK: usize = 256;

/// Buffers kept for reuse; those beyond it, when many threads read at once, are given back.
const SPARE_MAX: usize = 32;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

#[derive(Default)]
pub struct Frames {
    /// Empty until one of its frames is written to.
    chunks: Vec<Box<[u8]>>,
}

impl Frames {
    pub fn get(&self, frame: Frame) -> &[u8] {
        let chunk = self.chunks.get(frame.index() / FRAMES_PER_CHUNK);
        let at = frame.index() % FRAMES_PER_CHUNK * BLOCK;
        chunk
            .and_then(|chunk| chunk.get(at..at + BLOCK))
            .unwrap_or(&ZEROS)
    }

    pub fn get_mut(&mut self, frame: Frame) -> &mut [u8] {
        let index = frame.index() / FRAMES_PER_CHUNK;
        if self.chunks.len() <= index {
            self.chunks.resize_with(index + 1, Box::default);
        }
        let chunk = &mut self.chunks[index];
        if chunk.is_empty() {
            *chunk = vec![0; FRAMES_PER_CHUNK * BLOCK].into_boxed_slice();
        }
        let at = frame.index() % FRAMES_PER_CHUNK * BLOCK;
        &mut chunk[at..at + BLOCK]
    }

    /// Bytes of memory taken so far.
    pub fn resident(&self) -> u64 {
        self.chunks.iter().map(|chunk| chunk.len() as u64).sum()
    }
}

/// Buffers for what is fetched, the large ones kept for reuse.
#[derive(Default)]
pub struct Incoming {
    /// Of one run each.
    spare: Vec<Box<[u8]>>,
}

const RUN_BYTES: usize = RUN as usize * BLOCK;

/// Up to here a buffer is cheaper made than kept.
const SMALL_BYTES: usize = 64 << 10;

impl Incoming {
    /// At least this many bytes; at most one run.
    pub fn take(&mut self, length: usize) -> Box<[u8]> {
        if length <= SMALL_BYTES {
            return vec![0; length].into_boxed_slice();
        }
        let spare = self.spare.pop();
        spare.unwrap_or_else(|| vec![0; RUN_BYTES].into_boxed_slice())
    }

    pub fn give(&mut self, buffer: Box<[u8]>) {
        if buffer.len() == RUN_BYTES && self.spare.len() < SPARE_MAX {
            self.spare.push(buffer);
        }
    }
}
