//! What tells whether an image was written to: noted once before, and once after.

use std::thread::{Builder, scope};

use crate::device::Device;
use crate::error::Result;
use crate::remote::Store;
use crate::remote::lease::{Holder, Lease};

/// Bytes that are noted at each place.
const BLOCK: u64 = 4096;

/// Who holds the lease, and some blocks of the image file. The block where the volume begins changes
/// whenever somebody mounts the filesystem for writing, the one where the image begins whenever
/// a key changes.
#[derive(PartialEq, Eq)]
pub struct Marks {
    /// The nonce; empty for a lease that cannot be read.
    lease: Option<String>,
    blocks: Vec<u8>,
}

impl Marks {
    /// Reads the lease, and `image` at these offsets, in bytes.
    pub fn take(store: &dyn Store, image: &dyn Device, at: &[u64]) -> Result<Marks> {
        let peek = || Lease::peek(store);
        let (lease, blocks) = scope(|scope| {
            let peeking = Builder::new().spawn_scoped(scope, peek);
            let blocks = Marks::read(image, at);
            // Without a thread it is asked for here.
            let lease = peeking.ok().and_then(|thread| thread.join().ok());
            (lease.unwrap_or_else(peek), blocks)
        });
        match lease {
            Err(error) if error.kind().may_be_retried() => Err(error),
            lease => Ok(Marks::of(&lease, blocks?)),
        }
    }

    /// With what was said of the lease, and what [`Marks::read`] has read.
    pub fn of(lease: &Result<Option<Holder>>, blocks: Vec<u8>) -> Marks {
        let lease = match lease {
            Ok(holder) => holder.as_ref().map(|holder| holder.nonce.clone()),
            Err(_) => Some(String::new()),
        };
        Marks { lease, blocks }
    }

    /// The blocks at these offsets, as the server has them; zeros beyond the end.
    pub fn read(image: &dyn Device, at: &[u64]) -> Result<Vec<u8>> {
        let mut blocks = vec![0; at.len() * BLOCK as usize];
        for (block, at) in blocks.chunks_exact_mut(BLOCK as usize).zip(at) {
            if at.checked_add(BLOCK).is_some_and(|end| end <= image.size()) {
                image.read_exact_at(block, *at)?;
            }
        }
        Ok(blocks)
    }

    /// Whether there is a lease, whoever holds it.
    pub fn has_lease(&self) -> bool {
        self.lease.is_some()
    }
}
