//! Opening a header, looking for holes, and the cache's hits and misses, beside memcpy.

mod measure;

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use e2ebak::device::{Caps, Device};
use e2ebak::error::Result;
use e2ebak::layer::crypt::{Crypt, Segment};
use e2ebak::layer::memory::Memory;
use e2ebak::layer::{Cache, cache};
use e2ebak::luks::kdf::Costs;
use e2ebak::luks::{Format, load};
use e2ebak::secret::Secret;
use e2ebak::xts::{Key, SectorSize, Tweak};
use measure::{Race, Work};

/// A device that costs nothing: what was in the buffer is what it holds.
struct Nothing(u64);

impl Device for Nothing {
    fn caps(&self) -> Caps {
        Caps {
            alignment: 4096,
            ..Memory::new(0).caps()
        }
    }
    fn size(&self) -> u64 {
        self.0
    }
    fn read_exact_at(&self, _: &mut [u8], _: u64) -> Result<()> {
        Ok(())
    }
    fn write_all_at(&self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _: Range<u64>) -> Result<()> {
        Ok(())
    }
    fn resize(&self, _: u64) -> Result<()> {
        Ok(())
    }
}

fn volume(size: u64) -> Crypt {
    let segment = Segment {
        offset: 0,
        size: None,
        sector_size: SectorSize::MAX,
        first_tweak: Tweak(0),
    };
    let key = Key::new(&[7; 64]).expect("64 bytes");
    Crypt::new(Arc::new(Nothing(size)), key, segment).expect("fits")
}

/// Nanoseconds of one call, by the clock on the wall; the best of many.
fn best_ns(calls: usize, mut work: impl FnMut(usize)) -> f64 {
    let mut round = || {
        let begin = Instant::now();
        (0..calls).for_each(&mut work);
        begin.elapsed().as_secs_f64() * 1e9 / calls as f64
    };
    (0..measure::ROUNDS)
        .map(|_| round())
        .fold(f64::MAX, f64::min)
}

fn header_open() -> String {
    let costs = Costs {
        memory_kib: 32,
        time: 4,
        lanes: 1,
    };
    let format = Format::new(32 << 20, "6f3c1dd6-0f04-4c1e-8a43-6d5a3c1b2e90", costs);
    let mut noise = |out: &mut [u8]| {
        getrandom::fill(out).expect("random bytes");
        Ok(())
    };
    let made = format
        .make(&Secret::new(b"x".to_vec()), &mut noise)
        .expect("makes");
    let mut image = vec![0; 32 << 20];
    for write in made.writes {
        image[write.offset as usize..][..write.bytes.len()].copy_from_slice(&write.bytes);
    }
    let mut read = |offset: u64, out: &mut [u8]| {
        out.copy_from_slice(&image[offset as usize..][..out.len()]);
        Ok(())
    };
    let open = best_ns(100, |_| {
        black_box(load(&mut read, 32 << 20).expect("sound"));
    });
    format!("header open: {:.0} us, both copies", open / 1e3)
}

/// A read of nothing but holes is a scan for anything else.
fn hole_scan(label: &str, len: usize) -> String {
    let volume = volume(len as u64);
    let scan = |data: &mut [u8]| volume.read_exact_at(data, 0).expect("in range");
    let scan: (String, Work) = ("hole scan".to_string(), Box::new(scan));
    let race = Race::run(&mut [scan, measure::memcpy()], &mut vec![0; len]);
    println!("\nholes {label}");
    race.print("memcpy");
    format!(
        "hole scan {label}: {:.2} x memcpy",
        race.ratio("hole scan", "memcpy")
    )
}

fn cached(size: u64) -> Cache {
    Cache::new(Arc::new(volume(size)), cache::Settings::default()).expect("a cache")
}

fn hit(label: &str, len: usize) -> String {
    // Two thirds of the cache.
    let size = 80 << 20;
    let cache = cached(size);
    let mut buf = vec![0; 1 << 20];
    for offset in (0..size).step_by(buf.len()) {
        cache.read_exact_at(&mut buf, offset).expect("in range");
    }
    let places = size as usize / len;
    let before = cache.stats().misses;
    let read = |data: &mut [u8]| {
        let mut at = 0;
        for data in data.chunks_mut(len) {
            // Far apart, as a filesystem reads.
            at = (at + 7919) % places;
            cache
                .read_exact_at(data, (at * len) as u64)
                .expect("in range");
        }
    };
    let read: (String, Work) = ("cache hit".to_string(), Box::new(read));
    let race = Race::run(
        &mut [read, measure::memcpy()],
        &mut vec![1; len.max(1 << 18)],
    );
    assert_eq!(cache.stats().misses, before);
    println!("\ncache hits of {label}");
    race.print("memcpy");
    format!(
        "cache hit {label}: {:.2} x memcpy",
        race.ratio("cache hit", "memcpy")
    )
}

fn miss(label: &str, len: usize) -> String {
    let size = 1 << 40;
    let cache = cached(size);
    let mut buf = vec![0; len];
    let places = size / len as u64;
    let mut at = 0;
    let took = best_ns(2000, |_| {
        at = (at + 6_700_417 * 4093) % places;
        cache
            .read_exact_at(&mut buf, at * len as u64)
            .expect("in range");
    });
    format!(
        "cache miss {label}: {:.1} us, {:.2} GB/s, below it nothing but XTS",
        took / 1e3,
        len as f64 / took
    )
}

fn main() {
    let lines = [
        header_open(),
        hole_scan("64M", 64 << 20),
        hole_scan("256k", 256 << 10),
        hole_scan("4k", 4 << 10),
        hit("4k", 4 << 10),
        hit("256k", 256 << 10),
        miss("4k", 4 << 10),
        miss("256k", 256 << 10),
    ];
    println!("\n{}", lines.join("\n"));
}
