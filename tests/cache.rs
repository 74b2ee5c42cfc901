//! The cache with its threads: what readers and writers see, and what reaches the device below.

#[path = "cache/below.rs"]
mod below;
#[path = "cache/linearizable.rs"]
mod linearizable;
#[path = "cache/promises.rs"]
mod promises;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use e2ebak::device::Device;
use e2ebak::error::{Kind, Result};
use e2ebak::layer::cache::{BLOCK, Cache, SENDERS_MAX, Settings};

use below::{Below, Io, KIB, MIB, Random, cache, cache_threads, read, wait_for};

// ---- data ------------------------------------------------------------------------------------------

/// Threads that own every n-th stripe of bytes, so that they share blocks, against their own
/// memory; a cache far smaller than the device.
fn hammer(delay: Duration, size_bytes: u64, operations: u64) {
    const THREADS: u64 = 4;
    const STRIPE: u64 = 1500;
    let size = MIB + 512;
    let below = Below::new(size, delay);
    let cache = cache(&below, size_bytes);
    let before = below.data();
    let models: Vec<HashMap<u64, u8>> = thread::scope(|scope| {
        let work = |thread: u64| {
            let (cache, before) = (&cache, &before);
            move || {
                let mut random = Random(77 + thread);
                let mut model = HashMap::new();
                for operation in 0..operations {
                    let stripe = random.below(size / STRIPE / THREADS) * THREADS + thread;
                    let from = random.below(STRIPE);
                    let length = 1 + random.below(STRIPE - from);
                    let offset = stripe * STRIPE + from;
                    match random.below(20) {
                        0..10 => {
                            let data: Vec<u8> =
                                (0..length).map(|_| random.below(256) as u8).collect();
                            cache.write_all_at(&data, offset).expect("writable");
                            model.extend((offset..).zip(data));
                        }
                        10..19 => {
                            let found = read(cache, offset, length as usize);
                            for (at, byte) in (offset..).zip(found) {
                                let known = model.get(&at).copied();
                                let expected = known.unwrap_or(before[at as usize]);
                                assert_eq!(byte, expected, "at {at}, operation {operation}");
                            }
                        }
                        _ => cache.flush().expect("flushes"),
                    }
                }
                model
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|t| scope.spawn(work(t))).collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("agrees"))
            .collect()
    });
    cache.close().expect("closes");
    assert!(!below.overlapped.load(Ordering::SeqCst));
    let mut expected = before;
    for (at, byte) in models.into_iter().flatten() {
        expected[at as usize] = byte;
    }
    let state = below.state.lock().unwrap();
    assert!(
        state.durable == expected,
        "what was closed is not what was written"
    );
}

#[test]
fn threads_that_share_blocks_see_their_own_bytes() {
    hammer(Duration::from_micros(300), 256 * KIB, 1500);
}

#[test]
fn and_do_so_with_the_smallest_cache() {
    hammer(Duration::from_micros(50), 128 * KIB, 1500);
}

#[test]
fn and_over_a_fast_device() {
    hammer(Duration::ZERO, MIB / 2, 4000);
}

#[test]
fn large_requests_go_through_a_small_cache() {
    let below = Below::new(4 * MIB, Duration::from_micros(100));
    let cache = cache(&below, 128 * KIB);
    let expected = below.data();
    assert!(read(&cache, 100, 3_000_001) == expected[100..3_000_101]);
    let data: Vec<u8> = expected.iter().rev().copied().collect();
    cache.write_all_at(&data, 0).expect("writable");
    assert!(read(&cache, 0, data.len()) == data);
    cache.close().expect("closes");
    assert!(below.data() == data);
}

#[test]
fn empty_requests_and_those_beyond_the_end() {
    let below = Below::new(MIB, Duration::ZERO);
    let cache = cache(&below, MIB);
    cache.read_exact_at(&mut [], MIB).expect("nothing");
    cache.write_all_at(&[], 5).expect("nothing");
    for offset in [MIB, MIB - 1, u64::MAX - 1, u64::MAX] {
        let error = cache.read_exact_at(&mut [0; 2], offset).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert_eq!(
            cache.write_all_at(&[0; 2], offset).unwrap_err().kind(),
            Kind::Usage
        );
    }
    assert_eq!(below.count(Io::Read) + below.count(Io::Write), 0);
}

#[test]
fn the_size_may_end_within_a_block() {
    for size in [512, BLOCK as u64 - 512, MIB + 1536] {
        let below = Below::new(size, Duration::ZERO);
        let cache = cache(&below, MIB);
        let last = size - 512;
        let expected = below.data();
        assert_eq!(read(&cache, last, 512), expected[last as usize..]);
        cache.write_all_at(&[7; 100], size - 100).expect("writable");
        cache.flush().expect("flushes");
        assert_eq!(below.data()[size as usize - 100..], [7; 100]);
        cache.close().expect("closes");
    }
}

#[test]
fn what_cannot_be_cached_is_refused() {
    for (size, alignment) in [(MIB, 8192), (MIB + 512, 4096), (1000, 512)] {
        let below = Below::with_alignment(size, Duration::ZERO, alignment);
        let result = Cache::new(below, Settings::default());
        assert_eq!(result.err().map(|e| e.kind()), Some(Kind::Unsupported));
    }
    let small = Settings {
        size_bytes: 64 * KIB,
        ..Settings::default()
    };
    let result = Cache::new(Below::new(MIB, Duration::ZERO), small);
    assert_eq!(result.err().map(|e| e.kind()), Some(Kind::Usage));
    assert_eq!(cache_threads(), 0);
}

#[test]
fn a_read_only_device_is_cached_and_not_written() {
    let mut below = Below::new(MIB, Duration::ZERO);
    Arc::get_mut(&mut below).expect("alone").caps.writable = false;
    let cache = cache(&below, MIB);
    assert_eq!(read(&cache, 1, 10), below.data()[1..11]);
    let kind = |result: Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(cache.write_all_at(&[1], 1)), Kind::ReadOnly);
    assert_eq!(kind(cache.discard(0..MIB)), Kind::ReadOnly);
    assert_eq!(kind(cache.resize(2 * MIB)), Kind::ReadOnly);
    cache.close().expect("nothing to write");
}

// ---- writing back ----------------------------------------------------------------------------------

#[test]
fn rewrites_coalesce_and_age_sends_them() {
    let below = Below::new(MIB, Duration::ZERO);
    let cache = cache(&below, 16 * MIB);
    for i in 0..1000_u64 {
        cache
            .write_all_at(&i.to_le_bytes().repeat(512), 8192)
            .expect("writable");
    }
    assert_eq!(cache.stats().dirty_bytes, BLOCK as u64);
    wait_for("write-back by age", || cache.stats().dirty_bytes == 0);
    assert!(
        below.count(Io::Write) <= 2,
        "{} writes",
        below.count(Io::Write)
    );
    assert_eq!(below.count(Io::Flush), 0);
    assert_eq!(below.data()[8192..8200], 999_u64.to_le_bytes());
}

#[test]
fn a_stream_of_small_writes_leaves_in_aligned_runs_of_1_mib() {
    let below = Below::new(64 * MIB, Duration::from_millis(10));
    let cache = cache(&below, 32 * MIB);
    for at in (0..64 * MIB).step_by(16 * KIB as usize) {
        cache
            .write_all_at(&[at as u8; 16 << 10], at)
            .expect("writable");
    }
    cache.close().expect("closes");
    let state = below.state.lock().unwrap();
    let writes: Vec<_> = state
        .log
        .iter()
        .filter(|(io, _)| *io == Io::Write)
        .collect();
    assert!(writes.len() < 96, "{} writes", writes.len());
    let crossing = writes
        .iter()
        .any(|(_, r)| r.start / MIB != (r.end - 1) / MIB);
    assert!(!crossing, "a run crosses a multiple of 1 MiB");
    assert!(state.most_in_flight > 2, "{} at once", state.most_in_flight);
}

#[test]
fn memory_and_dirty_bytes_stay_within_their_bounds() {
    let below = Below::new(8 * MIB, Duration::from_micros(200));
    let cache = cache(&below, MIB);
    let (done, worst) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|thread| {
                let cache = &cache;
                scope.spawn(move || {
                    let mut random = Random(thread + 1);
                    for _ in 0..600 {
                        let at = random.below(8 * MIB - 70_000);
                        let length = 1 + random.below(65_536) as usize;
                        match random.below(3) {
                            0 => drop(read(cache, at, length)),
                            _ => cache.write_all_at(&vec![1; length], at).expect("writable"),
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let stats = cache.stats();
                worst.fetch_max(stats.dirty_bytes, Ordering::SeqCst);
                assert!(stats.dirty_bytes <= MIB / 2, "{stats:?}");
                assert!(stats.resident_bytes <= MIB, "{stats:?}");
            }
        });
        for writer in writers {
            writer.join().expect("writes");
        }
        done.store(true, Ordering::SeqCst);
    });
    assert!(
        worst.load(Ordering::SeqCst) > MIB / 4,
        "the bound was never near"
    );
}

#[test]
fn memory_is_taken_as_it_is_used() {
    let below = Below::new(8 * MIB, Duration::ZERO);
    let cache = cache(&below, 128 * MIB);
    assert_eq!(cache.stats().resident_bytes, 0);
    cache.write_all_at(&[1; 4096], 0).expect("writable");
    assert!(cache.stats().resident_bytes <= MIB);
}

#[test]
fn a_writer_waits_at_the_bound_and_goes_on() {
    let below = Below::new(4 * MIB, Duration::ZERO);
    let cache = cache(&below, MIB);
    below.hold(true);
    let written = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for at in (0..2 * MIB).step_by(BLOCK) {
                cache.write_all_at(&[3; BLOCK], at).expect("writable");
                written.fetch_add(1, Ordering::SeqCst);
            }
        });
        wait_for("back-pressure", || cache.stats().dirty_bytes == MIB / 2);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(written.load(Ordering::SeqCst), 128);
        below.hold(false);
    });
    assert_eq!(written.load(Ordering::SeqCst), 512);
}

#[test]
fn a_flush_sends_scattered_blocks_side_by_side() {
    let below = Below::new(64 * MIB, Duration::from_millis(10));
    let never_by_age = Settings {
        age_max: Duration::from_secs(3600),
        ..Settings::default()
    };
    let cache = Cache::new(below.clone(), never_by_age).expect("a cache");
    for stretch in 0..64 {
        cache
            .write_all_at(&[1; BLOCK], stretch * MIB)
            .expect("writable");
    }
    // Those that the writes have woken go back to sleep.
    thread::sleep(Duration::from_millis(200));
    cache.flush().expect("flushes");
    assert_eq!(below.count(Io::Write), 64);
    let most = below.state.lock().unwrap().most_in_flight;
    assert!((12..=SENDERS_MAX).contains(&most), "{most} at once");
}

// ---- reading ---------------------------------------------------------------------------------------

#[test]
fn readers_of_one_block_share_a_fetch() {
    let below = Below::new(MIB, Duration::from_millis(20));
    let cache = cache(&below, MIB);
    let expected = below.data();
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for thread in 0..8 {
            let (cache, barrier, expected) = (&cache, &barrier, &expected);
            scope.spawn(move || {
                barrier.wait();
                let at = thread * 512;
                assert_eq!(read(cache, at, 512), expected[at as usize..][..512]);
            });
        }
    });
    assert_eq!(below.count(Io::Read), 1);
    assert_eq!(cache.stats().fetches, 1);
}

#[test]
fn a_whole_write_during_a_fetch_wins_and_needs_no_read() {
    let below = Below::new(MIB, Duration::ZERO);
    let cache = cache(&below, MIB);
    let expected = below.data();
    below.hold(true);
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(&cache, 4096, 4096));
        wait_for("the fetch", || below.in_flight() == 1);
        cache.write_all_at(&[5; 4096], 8192).expect("needs no read");
        assert_eq!(read(&cache, 8192, 4096), [5; 4096]);
        below.hold(false);
        assert_eq!(reader.join().expect("reads"), expected[4096..8192]);
    });
    assert_eq!(read(&cache, 8192, 4096), [5; 4096]);
    assert_eq!(below.count(Io::Read), 1);
    cache.close().expect("closes");
    assert_eq!(below.data()[8192..12288], [5; 4096]);
}

#[test]
fn a_stream_is_fetched_ahead_in_large_pieces_and_several_at_once() {
    let below = Below::new(64 * MIB, Duration::from_millis(10));
    let cache = cache(&below, 128 * MIB);
    let expected = below.data();
    for at in (0..64 * MIB).step_by(32 << 10) {
        assert!(read(&cache, at, 32 << 10) == expected[at as usize..][..32 << 10]);
    }
    let reads = below.count(Io::Read);
    assert!(reads < 90, "{reads} fetches");
    let most = below.state.lock().unwrap().most_in_flight;
    assert!(most >= 4, "{most} at once");
}

#[test]
fn scattered_metadata_comes_in_few_fetches() {
    let below = Below::new(64 * MIB, Duration::from_micros(100));
    let cache = cache(&below, 128 * MIB);
    for block in (1..641).chain([1300, 1301, 9_000, 9_256, 16_000]) {
        read(&cache, block * BLOCK as u64, BLOCK);
    }
    assert!(
        below.count(Io::Read) <= 16,
        "{} fetches",
        below.count(Io::Read)
    );
    let stats = cache.stats();
    assert_eq!(stats.hits + stats.misses, 645);
    assert!(stats.fetched_bytes < 8 * MIB, "{stats:?}");
}

// ---- discarding and resizing -----------------------------------------------------------------------

#[test]
fn discard_drops_whole_blocks_and_zeroes_parts() {
    let below = Below::new(MIB + 512, Duration::ZERO);
    let cache = cache(&below, 4 * MIB);
    cache.write_all_at(&[1; 40_000], 0).expect("writable");
    cache.discard(100..20_000).expect("discards");
    assert_eq!(read(&cache, 0, 100), [1; 100]);
    assert_eq!(read(&cache, 100, 19_900), [0; 19_900]);
    assert_eq!(read(&cache, 20_000, 20_000), [1; 20_000]);
    assert_eq!(below.count(Io::Discard), 1);
    cache.discard(20..40).expect("no whole block is in it");
    assert_eq!(read(&cache, 0, 60), [[1; 20], [0; 20], [1; 20]].concat());
    assert_eq!(below.count(Io::Discard), 1);
    cache
        .discard(MIB - 4096..MIB + 512)
        .expect("the short last block counts as whole");
    assert_eq!(read(&cache, MIB - 4096, 4608), [0; 4608]);
    cache.close().expect("closes");
    let data = below.data();
    assert_eq!(data[100..20_000], [0; 19_900]);
    assert_eq!(data[20_000..40_000], [1; 20_000]);
    let backwards = Range { start: 8, end: 4 };
    assert!(cache.discard(backwards).is_err());
}

#[test]
fn a_discard_that_fails_changes_nothing() {
    let below = Below::new(MIB, Duration::ZERO);
    let cache = cache(&below, MIB);
    cache.write_all_at(&[1; 40_000], 0).expect("writable");
    below.fail(|io, _| (io == Io::Discard).then_some(Kind::Unsupported));
    assert_eq!(cache.discard(0..MIB).unwrap_err().kind(), Kind::Unsupported);
    assert_eq!(read(&cache, 0, 40_000), [1; 40_000]);
    cache.close().expect("closes");
    assert_eq!(below.data()[..40_000], [1; 40_000]);
}

#[test]
fn discards_and_resizes_wait_for_io_in_flight() {
    let below = Below::new(4 * MIB, Duration::from_micros(300));
    let cache = cache(&below, MIB);
    thread::scope(|scope| {
        for thread in 0..3 {
            let cache = &cache;
            scope.spawn(move || {
                let mut random = Random(thread + 11);
                for _ in 0..400 {
                    let at = random.below(3 * MIB - 70_000);
                    let length = 1 + random.below(65_536) as usize;
                    match random.below(2) {
                        0 => drop(read(cache, at, length)),
                        _ => cache.write_all_at(&vec![1; length], at).expect("writable"),
                    }
                }
            });
        }
        let mut random = Random(3);
        for i in 0..40 {
            let at = random.below(2 * MIB);
            cache.discard(at..at + random.below(MIB)).expect("discards");
            cache.resize((3 + i % 2) * MIB).expect("resizes");
            cache.flush().expect("flushes");
        }
    });
    assert!(!below.overlapped.load(Ordering::SeqCst));
    cache.close().expect("closes");
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    let below = Below::new(MIB, Duration::ZERO);
    let cache = cache(&below, 4 * MIB);
    cache.write_all_at(&[1; 40_960], 0).expect("writable");
    cache.resize(10_240).expect("shrinks");
    assert_eq!(cache.size(), 10_240);
    assert_eq!(
        cache.read_exact_at(&mut [0], 10_240).unwrap_err().kind(),
        Kind::Usage
    );
    cache.resize(20_480).expect("grows");
    assert_eq!(read(&cache, 0, 10_240), [1; 10_240]);
    assert_eq!(read(&cache, 10_240, 10_240), [0; 10_240]);
    assert_eq!(cache.resize(20_000).unwrap_err().kind(), Kind::Unsupported);
    cache.close().expect("closes");
    let data = below.data();
    assert_eq!(data[..10_240], [1; 10_240]);
    assert_eq!(data[10_240..], [0; 10_240]);
}

#[test]
fn what_a_device_grows_by_reads_as_zeros() {
    for written in [false, true] {
        let below = Below::new(MIB + 512, Duration::ZERO);
        let cache = cache(&below, 128 * KIB);
        // Every frame, and every buffer, has held something else before.
        read(&cache, 0, MIB as usize);
        cache
            .write_all_at(&vec![0xFF; MIB as usize], 0)
            .expect("writable");
        match written {
            true => cache.write_all_at(&[1; 512], MIB).expect("writable"),
            false => drop(read(&cache, MIB, 512)),
        }
        cache.resize(MIB + 4096).expect("grows");
        assert_eq!(
            read(&cache, MIB + 512, 3584),
            [0; 3584],
            "written: {written}"
        );
        cache.write_all_at(&[2], MIB).expect("writable");
        cache.close().expect("closes");
        assert_eq!(below.data()[MIB as usize + 512..], [0; 3584]);
    }
}
