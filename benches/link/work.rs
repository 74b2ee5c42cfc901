//! Requests against a file or a device, so many at a time, and how long they took.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use e2ebak::device::Device;
use e2ebak::remote::Store;

use crate::stop;

pub const MIB: u64 = 1 << 20;

/// What can be read and written at an offset.
pub trait Target: Sync {
    fn read(&self, into: &mut [u8], offset: u64);
    fn write(&self, data: &[u8], offset: u64);
    fn sync(&self);
}

impl Target for File {
    fn read(&self, into: &mut [u8], offset: u64) {
        self.read_exact_at(into, offset).expect("a read");
    }
    fn write(&self, data: &[u8], offset: u64) {
        self.write_all_at(data, offset).expect("a write");
    }
    fn sync(&self) {
        self.sync_all().expect("fsync");
    }
}

/// A device, and the store that it is in, which lives as long.
pub struct Engine {
    pub device: Arc<dyn Device>,
    pub _store: Arc<dyn Store>,
}

impl Target for Engine {
    fn read(&self, into: &mut [u8], offset: u64) {
        self.device.read_exact_at(into, offset).expect("a read");
    }
    fn write(&self, data: &[u8], offset: u64) {
        self.device.write_all_at(data, offset).expect("a write");
    }
    fn sync(&self) {
        self.device.flush().expect("a flush");
    }
}

/// Which requests are made.
#[derive(Clone, Copy)]
pub struct Work {
    pub write: bool,
    /// Bytes of a request.
    pub block: u64,
    /// Where requests go.
    pub from: u64,
    pub span: u64,
    /// Places by chance; else one after the other.
    pub random: Option<u64>,
    pub depth: usize,
    /// What ends it, whichever comes first.
    pub requests: u64,
    pub time: Duration,
    /// A sync at the end is part of it.
    pub sync: bool,
}

pub struct Done {
    pub requests: u64,
    /// Until the last request was answered.
    pub answered: Duration,
    /// Until the sync was done, if there was one.
    pub synced: Duration,
    /// Of each request, in seconds.
    pub latencies: Vec<f64>,
}

impl Work {
    pub fn sequential(write: bool, from: u64, bytes: u64, depth: usize) -> Self {
        Work {
            write,
            block: MIB,
            from,
            span: bytes,
            random: None,
            depth,
            requests: bytes / MIB,
            time: Duration::MAX,
            sync: write,
        }
    }

    /// Does it, with a thread for each request in flight.
    pub fn run(&self, target: &dyn Target) -> Done {
        let next = AtomicU64::new(0);
        let all = Mutex::new(Vec::new());
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..self.depth {
                scope.spawn(|| {
                    let latencies = self.one_thread(target, &next, start);
                    all.lock().expect("whole").extend(latencies);
                });
            }
        });
        let answered = start.elapsed();
        if self.sync && !stop::asked() {
            target.sync();
        }
        stop::check();
        let latencies: Vec<f64> = all.into_inner().expect("whole");
        Done {
            requests: latencies.len() as u64,
            answered,
            synced: start.elapsed(),
            latencies,
        }
    }

    fn one_thread(&self, target: &dyn Target, next: &AtomicU64, start: Instant) -> Vec<f64> {
        let mut buffer = Aligned::new(self.block as usize);
        let mut latencies = Vec::new();
        let places = self.span / self.block;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= self.requests || start.elapsed() >= self.time || stop::asked() {
                return latencies;
            }
            let place = match self.random {
                None => number % places,
                Some(seed) => scatter(seed.wrapping_add(number)) % places,
            };
            let offset = self.from + place * self.block;
            let began = Instant::now();
            match self.write {
                true => {
                    // No two requests carry the same bytes.
                    buffer.stamp(scatter(offset ^ number));
                    target.write(buffer.bytes(), offset);
                }
                false => target.read(buffer.bytes(), offset),
            }
            latencies.push(began.elapsed().as_secs_f64());
        }
    }
}

impl Done {
    pub fn mb_per_s(&self, block: u64) -> f64 {
        (self.requests * block) as f64 / 1e6 / self.synced.as_secs_f64()
    }
}

/// splitmix64
pub fn scatter(seed: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A buffer where O_DIRECT wants one.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let mut bytes = vec![0; len + 4096];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (i * 31 + i / 251) as u8;
        }
        let start = bytes.as_ptr().align_offset(4096);
        Aligned { bytes, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }

    fn stamp(&mut self, value: u64) {
        for (i, page) in self.bytes().chunks_mut(4096).enumerate() {
            page[..8].copy_from_slice(&(value + i as u64).to_le_bytes());
        }
    }
}
