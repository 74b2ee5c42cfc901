//! What all benchmarks measure with. The machine may be busy: contenders take turns, are charged
//! processor time where one thread works, and the median of their ratios counts.

#![allow(dead_code)] // each benchmark uses some of it

use std::ffi::c_int;
use std::hint::black_box;
use std::time::Duration;

pub const ROUNDS: usize = 31;
/// A sample repeats its work until it has taken this long.
const SAMPLE: Duration = Duration::from_millis(2);

/// What the processor has spent on this thread.
pub fn thread_time() -> Duration {
    #[repr(C)]
    struct Timespec {
        seconds: i64,
        nanoseconds: i64,
    }
    unsafe extern "C" {
        fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int;
    }
    const CLOCK_THREAD_CPUTIME_ID: c_int = 3;
    let mut time = Timespec {
        seconds: 0,
        nanoseconds: 0,
    };
    // SAFETY: the structure of Linux on 64-bit machines.
    let done = unsafe { clock_gettime(CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(done, 0);
    Duration::new(time.seconds as u64, time.nanoseconds as u32)
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub type Work<'a> = Box<dyn FnMut(&mut [u8]) + 'a>;

/// Bytes per second of processor time.
fn sample(work: &mut Work, data: &mut [u8]) -> f64 {
    let begin = thread_time();
    let mut bytes = 0.0;
    loop {
        // Looking at the clock costs more than a sector does.
        for _ in 0..(1_usize << 18).div_ceil(data.len()) {
            work(black_box(data));
            bytes += data.len() as f64;
        }
        let spent = thread_time() - begin;
        if spent >= SAMPLE {
            return bytes / spent.as_secs_f64();
        }
    }
}

/// The speeds of contenders over the same working set.
pub struct Race {
    names: Vec<String>,
    /// Bytes a second, by contender and round.
    samples: Vec<Vec<f64>>,
}

impl Race {
    pub fn run(contenders: &mut [(String, Work)], data: &mut [u8]) -> Race {
        let mut samples = vec![Vec::new(); contenders.len()];
        let rounds = if data.len() > 1 << 22 {
            ROUNDS / 3
        } else {
            ROUNDS
        };
        for round in 0..=rounds {
            for ((_, work), samples) in contenders.iter_mut().zip(&mut samples) {
                let speed = sample(work, data);
                // The first round fills caches and buffers.
                if round > 0 {
                    samples.push(speed);
                }
            }
        }
        let names = contenders.iter().map(|(name, _)| name.clone()).collect();
        Race { names, samples }
    }

    fn at(&self, name: &str) -> usize {
        let found = self.names.iter().position(|known| known == name);
        found.expect("a contender")
    }

    /// How many times as fast as `than` the contender `name` is.
    pub fn ratio(&self, name: &str, than: &str) -> f64 {
        let pairs = self.samples[self.at(name)]
            .iter()
            .zip(&self.samples[self.at(than)]);
        median(pairs.map(|(a, b)| a / b).collect())
    }

    pub fn print(&self, than: &str) {
        for (name, samples) in self.names.iter().zip(&self.samples) {
            println!(
                "  {name:<12} {:6.2} GB/s  {:5.2} x {than}",
                median(samples.clone()) / 1e9,
                self.ratio(name, than)
            );
        }
    }
}

/// Copies the working set to another place.
pub fn memcpy() -> (String, Work<'static>) {
    let mut target = Vec::new();
    let copy = move |data: &mut [u8]| {
        target.resize(data.len(), 0);
        target.copy_from_slice(black_box(data));
        black_box(&mut target);
    };
    ("memcpy".to_string(), Box::new(copy))
}
