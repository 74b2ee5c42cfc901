//! Bytes that are handed on instead of copied, in memory that is used again: a page that is fresh from
//! the kernel costs as much as all else that is done with it.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// The longest request that the cache makes: 1 MiB.
const LEN: usize = 1 << 20;
/// A shorter one gets memory of its own if it may live long, as it would hold much more than it needs.
const LEN_MIN: usize = 768 << 10;
/// Up to here memory is cheaper made than kept.
const SMALL: usize = 64 << 10;

/// So many are kept while nobody uses them: as much as one flush lets go of.
const SPARE_MAX: usize = 32;

type Spare = Mutex<Vec<Box<[u8]>>>;

/// Bytes whose memory goes back to where it is from when it is dropped, wherever that is.
#[derive(Debug)]
pub struct Buffer {
    memory: Box<[u8]>,
    len: usize,
    home: Weak<Spare>,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

/// Memory of its own.
impl From<&[u8]> for Buffer {
    fn from(bytes: &[u8]) -> Self {
        Buffer {
            memory: bytes.into(),
            len: bytes.len(),
            home: Weak::new(),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            let mut spare = lock(&home);
            if spare.len() < SPARE_MAX {
                spare.push(std::mem::take(&mut self.memory));
            }
        }
    }
}

/// Where buffers are from.
pub struct Buffers {
    spare: Arc<Spare>,
    /// The shortest that are kept.
    shortest: usize,
}

impl Buffers {
    /// For buffers that may be handed on and live long.
    pub fn long_lived() -> Self {
        Buffers {
            spare: Arc::default(),
            shortest: LEN_MIN,
        }
    }

    /// For buffers that live as long as a request. Each takes as much memory as the longest.
    pub fn short_lived() -> Self {
        Buffers {
            spare: Arc::default(),
            shortest: SMALL + 1,
        }
    }

    /// So many bytes, of any content.
    pub fn take(&self, len: usize) -> Buffer {
        if !(self.shortest..=LEN).contains(&len) {
            return Buffer {
                memory: vec![0; len].into(),
                len,
                home: Weak::new(),
            };
        }
        let spare = lock(&self.spare).pop();
        Buffer {
            memory: spare.unwrap_or_else(|| vec![0; LEN].into()),
            len,
            home: Arc::downgrade(&self.spare),
        }
    }
}

fn lock(spare: &Spare) -> MutexGuard<'_, Vec<Box<[u8]>>> {
    // Nothing panics with the lock held.
    spare.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_buffer_is_used_again_and_a_small_one_is_not() {
        let buffers = Buffers::long_lived();
        let first = buffers.take(LEN);
        let at = first.as_ptr();
        drop(first);
        let second = buffers.take(LEN_MIN);
        assert_eq!((second.as_ptr(), second.len()), (at, LEN_MIN));
        drop(buffers.take(4096));
        drop(buffers.take(4 * LEN));
        assert!(lock(&buffers.spare).is_empty());
        drop(second);
        assert_eq!(lock(&buffers.spare).len(), 1);
    }

    #[test]
    fn no_more_is_kept_than_a_flush_lets_go_of() {
        let buffers = Buffers::short_lived();
        let many: Vec<Buffer> = (0..SPARE_MAX + 5)
            .map(|_| buffers.take(SMALL + 1))
            .collect();
        drop(many);
        assert_eq!(lock(&buffers.spare).len(), SPARE_MAX);
        let outlives = buffers.take(LEN);
        drop(buffers);
        drop(outlives);
    }
}
