//! A device that is slow, reorders, fails and crashes on demand, and that panics the request that
//! overlaps another; and what the tests over it share.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use e2ebak::device::{Caps, Device, Discard, Durability};
use e2ebak::error::{Error, Kind, Result};
use e2ebak::layer::cache::{Cache, Settings};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// xorshift64*
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16) % bound
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Io {
    Read,
    Write,
    Flush,
    Discard,
}

/// Whether, and how, an I/O fails.
pub type Fault = Box<dyn FnMut(Io, Range<u64>) -> Option<Kind> + Send>;

/// A device in memory with a cache of its own that a crash loses.
pub struct Below {
    pub caps: Caps,
    delay: Duration,
    pub state: Mutex<State>,
    opened: Condvar,
    /// Called for every I/O before it takes effect.
    fault: Mutex<Fault>,
    pub overlapped: AtomicBool,
}

pub struct State {
    pub data: Vec<u8>,
    pub durable: Vec<u8>,
    pub unflushed: Vec<(u64, Vec<u8>)>,
    pub in_flight: Vec<(u64, Io, Range<u64>)>,
    pub log: Vec<(Io, Range<u64>)>,
    pub most_in_flight: usize,
    pub next: u64,
    pub held: bool,
    pub random: Random,
}

impl Below {
    pub fn new(size: u64, delay: Duration) -> Arc<Self> {
        Below::with_alignment(size, delay, 512)
    }

    pub fn with_alignment(size: u64, delay: Duration, alignment: u32) -> Arc<Self> {
        let mut random = Random(0x9E37_79B9);
        let data: Vec<u8> = (0..size).map(|_| random.below(256) as u8).collect();
        Arc::new(Below {
            caps: Caps {
                alignment,
                io_best: 1 << 20,
                writable: true,
                durability: Durability::Stable,
                discard: Discard::Zeros,
            },
            delay,
            state: Mutex::new(State {
                durable: data.clone(),
                data,
                unflushed: Vec::new(),
                in_flight: Vec::new(),
                log: Vec::new(),
                most_in_flight: 0,
                next: 0,
                held: false,
                random,
            }),
            opened: Condvar::new(),
            fault: Mutex::new(Box::new(|_, _| None)),
            overlapped: AtomicBool::new(false),
        })
    }

    pub fn fail(&self, fault: impl FnMut(Io, Range<u64>) -> Option<Kind> + Send + 'static) {
        *self.fault.lock().unwrap() = Box::new(fault);
    }

    /// While held no I/O ends.
    pub fn hold(&self, held: bool) {
        self.state.lock().unwrap().held = held;
        self.opened.notify_all();
    }

    pub fn count(&self, io: Io) -> usize {
        let state = self.state.lock().unwrap();
        state.log.iter().filter(|(i, _)| *i == io).count()
    }

    pub fn in_flight(&self) -> usize {
        self.state.lock().unwrap().in_flight.len()
    }

    pub fn data(&self) -> Vec<u8> {
        self.state.lock().unwrap().data.clone()
    }

    /// What is left if the power goes now: what was flushed, and any of the rest, torn at sectors.
    pub fn crash(&self) -> Vec<u8> {
        let state = &mut *self.state.lock().unwrap();
        let mut image = state.durable.clone();
        for (offset, data) in &state.unflushed {
            for (i, sector) in data.chunks(512).enumerate() {
                if state.random.below(2) == 0 {
                    let at = *offset as usize + i * 512;
                    image[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        image
    }

    fn begin(&self, io: Io, range: Range<u64>) -> Result<u64> {
        let failure = (self.fault.lock().unwrap())(io, range.clone());
        let mut state = self.state.lock().unwrap();
        let alignment = u64::from(self.caps.alignment);
        assert!(range.start.is_multiple_of(alignment) && range.end.is_multiple_of(alignment));
        assert!(range.end <= state.data.len() as u64, "{range:?} is beyond");
        for (_, other, place) in &state.in_flight {
            let both_read = io == Io::Read && *other == Io::Read;
            let overlap = range.start < place.end && place.start < range.end;
            if (overlap && !both_read) || (io == Io::Flush && *other == Io::Flush) {
                self.overlapped.store(true, Ordering::SeqCst);
                panic!("{io:?} {range:?} overlaps {other:?} {place:?}");
            }
        }
        state.next += 1;
        let id = state.next;
        state.log.push((io, range.clone()));
        state.in_flight.push((id, io, range));
        state.most_in_flight = state.most_in_flight.max(state.in_flight.len());
        let micros = self.delay.as_micros() as u64;
        let delay = Duration::from_micros(micros / 2 + state.random.below(micros + 1));
        while state.held {
            state = self.opened.wait(state).unwrap();
        }
        drop(state);
        if micros > 0 {
            thread::sleep(delay);
        }
        match failure {
            None => Ok(id),
            Some(kind) => {
                self.end(id, |_| {});
                Err(Error::new(kind, format!("{io:?} fails on demand")))
            }
        }
    }

    fn end(&self, id: u64, effect: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap();
        effect(&mut state);
        state.in_flight.retain(|(i, _, _)| *i != id);
    }
}

impl Device for Below {
    fn caps(&self) -> Caps {
        self.caps
    }

    fn size(&self) -> u64 {
        self.state.lock().unwrap().data.len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let id = self.begin(Io::Read, offset..offset + buf.len() as u64)?;
        self.end(id, |state| {
            buf.copy_from_slice(&state.data[offset as usize..][..buf.len()]);
        });
        Ok(())
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let id = self.begin(Io::Write, offset..offset + data.len() as u64)?;
        self.end(id, |state| {
            state.data[offset as usize..][..data.len()].copy_from_slice(data);
            state.unflushed.push((offset, data.to_vec()));
        });
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let covered = self.state.lock().unwrap().unflushed.len();
        let id = self.begin(Io::Flush, 0..0)?;
        self.end(id, |state| {
            for (offset, data) in state.unflushed.drain(..covered) {
                state.durable[offset as usize..][..data.len()].copy_from_slice(&data);
            }
        });
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        let id = self.begin(Io::Discard, range.clone())?;
        self.end(id, |state| {
            let zeros = vec![0; (range.end - range.start) as usize];
            state.data[range.start as usize..range.end as usize].fill(0);
            state.unflushed.push((range.start, zeros));
        });
        Ok(())
    }

    fn resize(&self, size: u64) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        assert!(state.in_flight.is_empty(), "resized during I/O");
        state.data.resize(size as usize, 0);
        state.durable.resize(size as usize, 0);
        Ok(())
    }
}

pub fn cache(below: &Arc<Below>, size_bytes: u64) -> Cache {
    let settings = Settings {
        size_bytes,
        ..Settings::default()
    };
    Cache::new(Arc::clone(below) as Arc<dyn Device>, settings).expect("a cache")
}

pub fn read(device: &dyn Device, offset: u64, length: usize) -> Vec<u8> {
    let mut buf = vec![0; length];
    device.read_exact_at(&mut buf, offset).expect("readable");
    buf
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} does not come");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Threads of this process with a name that the cache gives.
pub fn cache_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("proc");
    let is_ours = |comm: String| {
        let number = comm.trim_end().strip_prefix("cache-");
        number.is_some_and(|n| n.len() <= 2 && n.parse::<u8>().is_ok())
    };
    tasks
        .map(|task| task.expect("proc").path().join("comm"))
        // One that ends meanwhile is gone.
        .filter(|comm| std::fs::read_to_string(comm).is_ok_and(is_ours))
        .count()
}
