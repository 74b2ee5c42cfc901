//! Write-back and read-ahead in memory, over a device whose every request costs a round trip; and
//! requests of any length at any offset, over one that has an alignment.
//!
//! ```text
//! callers  --read, write, flush-->  Table (pure: table.rs)  <--next?--  workers
//!            copy under the lock      Frames (the bytes)                  I/O outside the lock
//!                                     Readahead (pure: readahead.rs)
//! ```
//!
//! One mutex holds table, frames and policy; no I/O is made under it. A read that misses makes its
//! own fetch; what else it wants or is expected to want is fetched by the workers, which also do
//! all writing. `shell.rs` is the callers' side, `worker.rs` the workers'.
//!
//! - **Writing back** begins when more than [`LOW_MARK`] is dirty, when a flush waits for it, or
//!   when a block has been dirty for a second; so small rewrites coalesce. A writer waits while
//!   half of the cache is owed to the inner device.
//! - **Flush** waits for the writes before it, not for those after, then flushes the inner device;
//!   flushes that wait at the same time share one.
//! - **Errors.** A failed fetch fails its readers and nothing else; one that failed together with
//!   its neighbours is first tried without them. A failed write or inner flush is final: from then
//!   on every write and flush returns it, and what is cached can still be read.
//! - **Memory** is [`Settings::size_bytes`], taken as it is used, plus a buffer for each I/O in
//!   flight, which for writes lives until the inner device lets go of it, plus some 100 bytes a block.

mod frames;
pub mod readahead;
mod shell;
mod slots;
mod table;
mod worker;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::device::{Caps, Device, Discard, check_range};
use crate::error::{Attempt, Error, Kind, Result};
use crate::units::{Bytes, KIB, MIB};
use shell::Shared;
use table::Limits;

/// The unit of caching, in bytes. The inner device's alignment divides it.
pub const BLOCK: usize = 4096;

/// The longest request to the inner device, in blocks: 1 MiB.
pub const RUN: u64 = 256;

/// The default size. With the buffers a process stays under 300 MiB.
pub const SIZE_DEFAULT_BYTES: u64 = 128 * MIB;

/// The smallest size that keeps every bound apart from the others.
pub const SIZE_MIN_BYTES: u64 = 128 * KIB;

/// Above this many dirty bytes writing back starts at once: four full runs.
pub const LOW_MARK: u64 = 4 * MIB;

/// Bytes being written at once: what keeps eight SSH channels of 2 MiB each full.
pub const SENDING_MAX: u64 = 24 * MIB;

/// Threads. A device call blocks, so this is also how many requests overlap: small scattered
/// writes need far more of them than full runs do, and those stop at [`SENDING_MAX`].
pub const WORKERS: usize = 256;

/// Workers that write at the same time; the others are left for fetches, which somebody awaits.
pub const SENDERS_MAX: usize = 224; // 4480 scattered blocks a second at 50 ms

/// How long a block stays dirty before it is written without any other reason.
pub const AGE_MAX: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct Settings {
    /// Memory for cached blocks, in bytes; at least [`SIZE_MIN_BYTES`].
    pub size_bytes: u64,
    pub readahead: readahead::Parameters,
    /// See [`AGE_MAX`].
    pub age_max: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            size_bytes: SIZE_DEFAULT_BYTES,
            readahead: readahead::Parameters::default(),
            age_max: AGE_MAX,
        }
    }
}

impl Settings {
    fn limits(&self) -> Result<Limits> {
        let frames = self.size_bytes / BLOCK as u64;
        if self.size_bytes < SIZE_MIN_BYTES || frames > u64::from(u32::MAX) {
            return Err(Error::new(
                Kind::Usage,
                format!(
                    "{} is no size for a cache; {} is the least",
                    Bytes(self.size_bytes),
                    Bytes(SIZE_MIN_BYTES)
                ),
            ));
        }
        let blocks = |bytes: u64| bytes / BLOCK as u64;
        let dirty = frames / 2;
        let sending = blocks(SENDING_MAX).min(dirty);
        Ok(Limits {
            frames: frames as usize,
            dirty: dirty as usize,
            low: blocks(LOW_MARK).min(dirty / 4) as usize,
            sending: sending as usize,
            fetching: (frames / 4) as usize,
            // The largest power of two that leaves room for two of them.
            run: RUN.min(1 << (sending / 2).ilog2()),
            age: self.age_max,
        })
    }
}

/// What the cache has done, and what it still has to do. All in bytes unless it says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Accepted and not yet on the inner device: what the link still owes.
    pub dirty_bytes: u64,
    /// Blocks read that were there.
    pub hits: u64,
    /// Blocks read that had to be waited for.
    pub misses: u64,
    /// Reads of the inner device, and the bytes they brought.
    pub fetches: u64,
    pub fetched_bytes: u64,
    /// Writes to the inner device, and the bytes they took there.
    pub writes: u64,
    pub written_back_bytes: u64,
    /// Flushes of the inner device.
    pub flushes: u64,
    /// Memory taken for blocks.
    pub resident_bytes: u64,
}

/// A cache over a device that nobody else uses meanwhile.
///
/// Only [`Cache::close`], or a flush, makes what was written durable. Dropping the cache stops its
/// threads as soon as their current requests end, and loses what was not yet written.
pub struct Cache {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl Cache {
    /// Starts the workers. [`Kind::Unsupported`] if the inner device's alignment does not divide
    /// [`BLOCK`] or its size; the size itself need be no multiple of [`BLOCK`].
    pub fn new(inner: Arc<dyn Device>, settings: Settings) -> Result<Cache> {
        let alignment = inner.caps().alignment;
        if alignment == 0 || !(BLOCK as u64).is_multiple_of(u64::from(alignment)) {
            return Err(Error::new(
                Kind::Unsupported,
                format!("cannot cache blocks of {BLOCK} bytes over an alignment of {alignment}"),
            ));
        }
        check_size(inner.size(), alignment)?;
        let shared = Arc::new(Shared::new(inner, &settings, settings.limits()?));
        let cache = Cache {
            shared: Arc::clone(&shared),
            workers: Mutex::default(),
        };
        for number in 0..WORKERS {
            let shared = Arc::clone(&shared);
            // On failure `cache` is dropped, which ends the threads that did start.
            let worker = std::thread::Builder::new()
                .name(format!("cache-{number}"))
                .spawn(move || worker::run(&shared))
                .attempt(|| format!("start cache thread {number}"))?;
            lock(&cache.workers).push(worker);
        }
        Ok(cache)
    }

    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Reads ahead by other parameters from now on.
    pub fn adapt_readahead(&self, parameters: readahead::Parameters) {
        self.shared.adapt_readahead(parameters);
    }

    /// Flushes, then ends the threads and waits for them. Whatever the result, reads and writes
    /// fail from now on. A second call repeats the flush only.
    pub fn close(&self) -> Result<()> {
        self.shared.refuse_requests();
        let flushed = self.shared.flush();
        self.stop();
        flushed
    }

    /// Ends the threads without writing anything more: somebody else may be the writer by now.
    /// Reads and writes fail from now on.
    pub fn abandon(&self) {
        self.shared.refuse_requests();
        self.stop();
    }

    fn stop(&self) {
        self.shared.stop();
        for worker in lock(&self.workers).drain(..) {
            if worker.join().is_err() {
                tracing::error!("a cache thread panicked");
            }
        }
    }

    /// As [`Cache::enter`], if that is possible now.
    fn enter_at_once(&self) -> Option<RwLockReadGuard<'_, ()>> {
        let gate = self.shared.gate.try_read().ok()?;
        self.shared.check_open().ok()?;
        Some(gate)
    }

    /// Holds off `discard`, `resize` and `close` while a request is served.
    fn enter(&self) -> Result<RwLockReadGuard<'_, ()>> {
        let gate = self.shared.gate.read();
        let gate = gate.unwrap_or_else(PoisonError::into_inner);
        self.shared.check_open()?;
        Ok(gate)
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.stop();
        let lost = self.stats().dirty_bytes;
        if lost > 0 {
            tracing::error!(lost, "cache dropped with data not yet written");
        }
    }
}

impl Device for Cache {
    fn caps(&self) -> Caps {
        Caps {
            alignment: 1,
            io_best: (RUN as usize * BLOCK) as u32,
            ..self.shared.inner.caps()
        }
    }

    fn size(&self) -> u64 {
        self.shared.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let _gate = self.enter()?;
        check_range(self.caps(), self.size(), offset, buf.len())?;
        self.shared.read(buf, offset)
    }

    /// Waits while half of the cache is owed to the inner device, however long that takes to
    /// accept or to refuse it.
    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let _gate = self.enter()?;
        self.check_writable()?;
        check_range(self.caps(), self.size(), offset, data.len())?;
        self.shared.write(data, offset)
    }

    /// True when all of it is cached.
    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> bool {
        let gate = self.enter_at_once();
        gate.is_some()
            && check_range(self.caps(), self.size(), offset, buf.len()).is_ok()
            && self.shared.read_at_once(buf, offset)
    }

    fn fetch(&self, ranges: &[Range<u64>]) {
        if let Ok(_gate) = self.enter() {
            self.shared.fetch_all(ranges);
        }
    }

    /// Takes blocks as long as there is room, and none of them has to be fetched first.
    fn write_at_once(&self, data: &[u8], offset: u64) -> usize {
        let gate = self.enter_at_once();
        let may = gate.is_some()
            && self.check_writable().is_ok()
            && check_range(self.caps(), self.size(), offset, data.len()).is_ok();
        if may {
            self.shared.write_at_once(data, offset)
        } else {
            0
        }
    }

    fn flush(&self) -> Result<()> {
        self.shared.flush()
    }

    /// Discards the whole blocks inside the range, and writes zeros to what it holds of others.
    fn discard(&self, range: Range<u64>) -> Result<()> {
        let gate = self.shared.gate.write();
        let _gate = gate.unwrap_or_else(PoisonError::into_inner);
        self.shared.check_open()?;
        self.check_writable()?;
        let caps = self.caps();
        let length = range.end.checked_sub(range.start);
        let length = length.and_then(|length| usize::try_from(length).ok());
        let Some(length) = length else {
            return Err(Error::new(Kind::Usage, format!("{range:?} is no range")));
        };
        check_range(caps, self.size(), range.start, length)?;
        if caps.discard == Discard::Refused {
            return Err(Error::new(
                Kind::Unsupported,
                "the device under the cache cannot discard",
            ));
        }
        self.shared.discard(range)
    }

    fn resize(&self, size: u64) -> Result<()> {
        let gate = self.shared.gate.write();
        let _gate = gate.unwrap_or_else(PoisonError::into_inner);
        self.shared.check_open()?;
        self.check_writable()?;
        check_size(size, self.shared.inner.caps().alignment)?;
        self.shared.resize(size)
    }
}

impl Cache {
    fn check_writable(&self) -> Result<()> {
        match self.shared.inner.caps().writable {
            true => Ok(()),
            false => Err(Error::new(
                Kind::ReadOnly,
                "the device under the cache is read-only",
            )),
        }
    }
}

fn check_size(size: u64, alignment: u32) -> Result<()> {
    match size.is_multiple_of(u64::from(alignment)) {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Unsupported,
            format!("a size of {size} bytes is no multiple of the alignment of {alignment}"),
        )),
    }
}

/// A thread that panicked under the lock left nothing half done that matters more than going on.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::{Cache, SIZE_MIN_BYTES, Settings};
    use crate::device::{Caps, Device, Discard};
    use crate::layer::conformance;
    use crate::layer::memory::Memory;

    fn over(memory: Memory) -> Cache {
        let settings = Settings {
            size_bytes: SIZE_MIN_BYTES,
            ..Settings::default()
        };
        Cache::new(Arc::new(memory), settings).expect("a cache")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_cache_is_a_device(
            steps in conformance::steps(),
            log in 0..=12_u32,
            size in 1..60_u64,
            refuses in any::<bool>(),
        ) {
            let caps = Caps {
                alignment: 1 << log,
                discard: if refuses { Discard::Refused } else { Discard::Zeros },
                ..Memory::new(0).caps()
            };
            // Also where it ends within a block.
            let cache = over(Memory::with_caps(size * 5 * (4096 + (1 << log)), caps));
            conformance::check(&cache, &steps)?;
            cache.close().expect("closes");
        }
    }
}
