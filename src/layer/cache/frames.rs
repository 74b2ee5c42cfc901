//! The bytes of the cached blocks.
//! Memory is taken as it is used, a chunk at a time, and kept.

use super::BLOCK;
use super::table::Frame;

const FRAMES_PER_CHUNK: usize = 256;

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
