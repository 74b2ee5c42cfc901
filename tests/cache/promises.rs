//! What a flush has promised is kept through crashes and failures.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use e2ebak::device::Device;
use e2ebak::error::Kind;
use e2ebak::layer::cache::{BLOCK, Cache, Settings};

use crate::below::{Below, Io, KIB, MIB, Random, cache, cache_threads, read, wait_for};

/// Blocks are stamped with the number of the epoch, and every epoch ends with a flush. At any
/// moment the power may go: then all of the epochs whose flush has returned must be there, and a
/// later epoch's stamp only if everything before it is.
#[test]
fn a_crash_keeps_what_was_flushed_and_the_order_of_epochs() {
    const BLOCKS: u64 = 96;
    const CRASHES: usize = 100;
    let below = Below::new(BLOCKS * BLOCK as u64, Duration::from_micros(300));
    below.state.lock().unwrap().data.fill(0);
    below.state.lock().unwrap().durable.fill(0);
    let cache = cache(&below, 256 * KIB);
    // Which epochs wrote a block, in order.
    let history: Vec<Mutex<Vec<u64>>> = (0..BLOCKS).map(|_| Mutex::default()).collect();
    let returned = AtomicU64::new(0);
    let crashes = AtomicUsize::new(0);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut random = Random(4711);
            for epoch in 1.. {
                for _ in 0..random.below(60) {
                    let block = random.below(BLOCKS);
                    history[block as usize].lock().unwrap().push(epoch);
                    let stamp = epoch.to_le_bytes().repeat(BLOCK / 8);
                    cache
                        .write_all_at(&stamp, block * BLOCK as u64)
                        .expect("writable");
                }
                cache.flush().expect("flushes");
                returned.store(epoch, Ordering::SeqCst);
                if crashes.load(Ordering::SeqCst) >= CRASHES {
                    break;
                }
            }
        });
        while !writer.is_finished() {
            let flushed = returned.load(Ordering::SeqCst);
            let image = below.crash();
            let stamps: Vec<u64> = image
                .chunks(8)
                .map(|s| u64::from_le_bytes(s.try_into().expect("8 bytes")))
                .collect();
            let newest = stamps.iter().copied().max().unwrap_or(0);
            let whole = flushed.max(newest.saturating_sub(1));
            for (i, &stamp) in stamps.iter().enumerate() {
                let history = history[i * 8 / BLOCK].lock().unwrap();
                let least = history.iter().copied().filter(|&e| e <= whole).max();
                assert!(
                    stamp >= least.unwrap_or(0),
                    "{stamp} where {least:?} was promised; newest {newest}, flushed {flushed}"
                );
            }
            crashes.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_micros(200));
        }
    });
    cache.close().expect("closes");
}

#[test]
fn a_flush_does_not_wait_for_writes_that_come_after_it() {
    let below = Below::new(MIB, Duration::from_millis(2));
    let cache = cache(&below, 256 * KIB);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for thread in 0..2 {
            let (cache, done) = (&cache, &done);
            scope.spawn(move || {
                let mut random = Random(5 + thread);
                while !done.load(Ordering::SeqCst) {
                    let block = random.below(MIB / BLOCK as u64);
                    let data = [random.below(256) as u8; BLOCK];
                    cache
                        .write_all_at(&data, block * BLOCK as u64)
                        .expect("writable");
                }
            });
        }
        let begun = Instant::now();
        for _ in 0..10 {
            cache.flush().expect("flushes");
        }
        done.store(true, Ordering::SeqCst);
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "{:?}",
            begun.elapsed()
        );
    });
}

#[test]
fn flushes_at_the_same_time_share_the_inner_one() {
    let below = Below::new(MIB, Duration::from_millis(20));
    let cache = cache(&below, MIB);
    cache.write_all_at(&[1; BLOCK], 0).expect("writable");
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                cache.flush().expect("flushes");
            });
        }
    });
    assert!(
        (1..=3).contains(&below.count(Io::Flush)),
        "{}",
        below.count(Io::Flush)
    );
    assert_eq!(cache.stats().flushes, below.count(Io::Flush) as u64);
}

#[test]
fn closing_makes_durable_and_dropping_does_not() {
    let below = Below::new(MIB, Duration::from_millis(5));
    let closed = cache(&below, MIB);
    closed.write_all_at(&[9; 5000], 3).expect("writable");
    closed.close().expect("closes");
    closed.close().expect("is closed");
    assert_eq!(below.state.lock().unwrap().durable[3..5003], [9; 5000]);
    assert_eq!(
        closed.read_exact_at(&mut [0], 0).unwrap_err().kind(),
        Kind::Usage
    );
    assert_eq!(
        closed.write_all_at(&[0], 0).unwrap_err().kind(),
        Kind::Usage
    );
    assert!(!closed.read_at_once(&mut [0], 3), "though it is cached");
    assert_eq!(closed.write_at_once(&[0], 3), 0);
    assert_eq!(cache_threads(), 0);

    let lazy = Settings {
        age_max: Duration::from_secs(3600),
        ..Settings::default()
    };
    let dropped = Cache::new(below.clone(), lazy).expect("a cache");
    wait_for("the threads", || cache_threads() > 1);
    let writes = below.count(Io::Write);
    dropped.write_all_at(&[8; BLOCK], 0).expect("writable");
    drop(dropped);
    assert_eq!(below.count(Io::Write), writes);
    assert_eq!(cache_threads(), 0);
}

#[test]
fn at_once_is_what_needs_no_waiting() {
    let below = Below::new(4 * MIB, Duration::from_millis(200));
    let cache = cache(&below, MIB);
    let block = BLOCK as u64;
    let mut found = [0; BLOCK];

    assert!(!cache.read_at_once(&mut found, 0), "not here yet");
    assert_eq!(cache.write_at_once(&[7; 100], 5), 0, "part of a block");
    cache.read_exact_at(&mut found, 0).expect("readable");
    assert!(cache.read_at_once(&mut found, 0));
    assert_eq!(cache.write_at_once(&[7; 100], 5), 100);
    assert!(cache.read_at_once(&mut found, 0));
    assert_eq!(found[5..105], [7; 100]);

    let fetches = below.count(Io::Read);
    assert!(!cache.read_at_once(&mut [0; 2 * BLOCK], 300 * block));
    assert_eq!(below.count(Io::Read), fetches, "asked for nothing");

    // Half of the cache may be owed.
    let data = vec![8; 1 << 20];
    let taken = cache.write_at_once(&data, MIB);
    assert!((BLOCK..data.len()).contains(&taken), "{taken}");
    cache
        .write_all_at(&data[taken..], MIB + taken as u64)
        .expect("writable");
    cache.close().expect("closes");
    let state = below.state.lock().unwrap();
    assert!(state.durable[MIB as usize..2 << 20] == data);
}

/// A fetch on demand brings what it was asked for, at the same time, and no neighbours.
#[test]
#[allow(clippy::reversed_empty_ranges)] // what is no range
fn what_is_fetched_is_there_and_nothing_beside_it() {
    let below = Below::new(8 * MIB, Duration::from_millis(20));
    let cache = cache(&below, 4 * MIB);
    let block = BLOCK as u64;
    let wanted = [
        3 * block..5 * block,
        MIB..MIB + 1,
        2 * MIB..3 * MIB + 100,
        7 * MIB..7 * MIB,
    ];
    cache.fetch(&wanted);
    assert!(below.state.lock().unwrap().most_in_flight >= 3);
    let mut fetched: Vec<u64> = Vec::new();
    for (_, range) in &below.state.lock().unwrap().log {
        fetched.extend((range.start / block)..(range.end / block));
    }
    fetched.sort_unstable();
    let expected: Vec<u64> = [3..5, 256..257, 512..769].into_iter().flatten().collect();
    assert_eq!(fetched, expected);
    let expected = below.data();
    let at_once = |offset: u64, length: usize| {
        let mut found = vec![0; length];
        let is_here = cache.read_at_once(&mut found, offset);
        is_here && found == expected[offset as usize..][..length]
    };
    assert!(at_once(3 * block, 2 * BLOCK) && at_once(2 * MIB, (1 << 20) + BLOCK));
    assert!(!at_once(5 * block, 1) && !at_once(2 * block, 1) && !at_once(2 * MIB - 1, 1));

    let before = below.count(Io::Read);
    cache.fetch(&wanted);
    assert_eq!(below.count(Io::Read), before, "it is here");
    // More than the cache holds, what is no range, and what is beyond the end.
    cache.fetch(&[0..8 * MIB, 2 * MIB..MIB, 8 * MIB..9 * MIB, 0..u64::MAX]);
    assert!(read(&cache, 0, 1 << 20) == expected[..1 << 20]);
}

#[test]
#[allow(clippy::single_range_in_vec_init)] // sets of ranges, one with one
fn what_was_here_when_it_was_wanted_stays_until_it_is_read() {
    let below = Below::new(8 * MIB, Duration::ZERO);
    let cache = cache(&below, 4 * MIB);
    cache.fetch(&[0..4 * MIB]);
    cache.fetch(&[0..MIB]);
    cache.fetch(&[4 * MIB..6 * MIB]);
    let mut found = vec![0; 1 << 20];
    assert!(cache.read_at_once(&mut found, 0));
    assert!(!cache.read_at_once(&mut found, MIB), "something had to go");
}

#[test]
#[allow(clippy::single_range_in_vec_init)] // sets of ranges, one with one
fn a_fetch_that_fails_is_told_to_who_reads() {
    let below = Below::new(MIB, Duration::ZERO);
    let cache = cache(&below, MIB);
    below.fail(|io, range| (io == Io::Read && range.contains(&40_960)).then_some(Kind::Corrupt));
    cache.fetch(&[0..MIB]);
    assert!(read(&cache, 0, 40_960) == below.data()[..40_960]);
    let error = cache.read_exact_at(&mut [0; 10], 41_000).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
}

// ---- failures --------------------------------------------------------------------------------------

#[test]
fn a_failed_write_is_final_and_what_is_cached_can_be_read() {
    let below = Below::new(4 * MIB, Duration::ZERO);
    let cache = cache(&below, MIB);
    let expected = below.data();
    cache.write_all_at(&[6; BLOCK], 0).expect("writable");
    let broken = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&broken);
    below.fail(move |io, _| {
        (io == Io::Write && switch.load(Ordering::SeqCst)).then_some(Kind::NoSpace)
    });
    assert_eq!(cache.flush().unwrap_err().kind(), Kind::NoSpace);
    broken.store(false, Ordering::SeqCst);
    let writes = below.count(Io::Write);
    for _ in 0..3 {
        assert_eq!(cache.flush().unwrap_err().kind(), Kind::NoSpace);
        assert_eq!(
            cache.write_all_at(&[1; 10], 0).unwrap_err().kind(),
            Kind::NoSpace
        );
    }
    assert_eq!(cache.discard(0..MIB).unwrap_err().kind(), Kind::NoSpace);
    assert_eq!(cache.resize(8 * MIB).unwrap_err().kind(), Kind::NoSpace);
    assert_eq!(read(&cache, 0, BLOCK), [6; BLOCK]);
    assert!(read(&cache, MIB, 2 << 20) == expected[MIB as usize..3 << 20]);
    assert_eq!(cache.stats().dirty_bytes, BLOCK as u64);
    assert_eq!(cache.close().unwrap_err().kind(), Kind::NoSpace);
    assert_eq!(below.count(Io::Write), writes, "written after a failure");
    assert_eq!(cache_threads(), 0);
}

#[test]
fn writers_that_wait_hear_of_the_failure() {
    let below = Below::new(4 * MIB, Duration::ZERO);
    let cache = cache(&below, MIB);
    below.fail(|io, _| (io == Io::Write).then_some(Kind::Disconnected));
    let data = vec![1; 2 << 20];
    assert_eq!(
        cache.write_all_at(&data, 0).unwrap_err().kind(),
        Kind::Disconnected
    );
}

#[test]
fn a_failed_inner_flush_is_final() {
    let below = Below::new(MIB, Duration::ZERO);
    let cache = cache(&below, MIB);
    cache.write_all_at(&[6; BLOCK], 0).expect("writable");
    let mut left = 1;
    below.fail(move |io, _| {
        let fails = io == Io::Flush && left > 0;
        left -= i32::from(fails);
        fails.then_some(Kind::TimedOut)
    });
    for _ in 0..3 {
        assert_eq!(cache.flush().unwrap_err().kind(), Kind::TimedOut);
    }
    assert_eq!(
        cache.write_all_at(&[1], 0).unwrap_err().kind(),
        Kind::TimedOut
    );
    assert_eq!(cache.write_at_once(&[1], 0), 0);
    assert_eq!(below.count(Io::Flush), 1);
}

#[test]
fn a_failed_fetch_fails_its_readers_only() {
    let below = Below::new(MIB, Duration::ZERO);
    let cache = cache(&below, MIB);
    let expected = below.data();
    // One bad block at 40,960; fetches that avoid it succeed.
    below.fail(|io, range| (io == Io::Read && range.contains(&40_960)).then_some(Kind::Corrupt));
    assert!(
        read(&cache, 0, 40_960) == expected[..40_960],
        "its neighbours are fetched alone"
    );
    let error = cache.read_exact_at(&mut [0; 10], 41_000).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert_eq!(
        cache.write_all_at(&[1], 41_000).unwrap_err().kind(),
        Kind::Corrupt
    );
    cache
        .write_all_at(&[4; BLOCK], 40_960)
        .expect("a whole block needs no read");
    assert_eq!(read(&cache, 41_000, 10), [4; 10]);
    cache.flush().expect("nothing else has failed");
    below.fail(|_, _| None);
    assert!(read(&cache, 45_056, 4096) == expected[45_056..49_152]);
}

#[test]
fn all_readers_of_a_fetch_hear_that_the_link_is_gone() {
    let below = Below::new(MIB, Duration::from_millis(20));
    let cache = cache(&below, MIB);
    below.fail(|_, _| Some(Kind::Disconnected));
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for thread in 0..8 {
            let (cache, barrier) = (&cache, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let result = cache.read_exact_at(&mut [0; 512], thread * 512);
                assert_eq!(result.unwrap_err().kind(), Kind::Disconnected);
            });
        }
    });
    // A thread may come so late that the fetch is over.
    assert!(
        below.count(Io::Read) <= 3,
        "{} fetches",
        below.count(Io::Read)
    );
    below.fail(|_, _| None);
    assert_eq!(read(&cache, 0, 512), below.data()[..512]);
}

/// Fails the first I/O, then the second, and so on, until a run meets no failure.
#[test]
fn whichever_io_fails_no_flush_lies() {
    let mut met = 0;
    for failing in 1.. {
        let below = Below::new(2 * MIB, Duration::ZERO);
        let cache = cache(&below, 128 * KIB);
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        below.fail(move |_, _| {
            (counter.fetch_add(1, Ordering::SeqCst) + 1 == failing).then_some(Kind::Io)
        });
        let mut random = Random(99);
        let mut model = below.data();
        let mut failed = false;
        for round in 0..6 {
            for _ in 0..12 {
                let at = random.below(2 * MIB - 30_000) as usize;
                let length = 1 + random.below(30_000) as usize;
                let data = vec![random.below(256) as u8; length];
                if random.below(3) == 0 {
                    let mut found = vec![0; length];
                    if cache.read_exact_at(&mut found, at as u64).is_ok() && !failed {
                        assert!(found == model[at..at + length], "I/O {failing}");
                    }
                } else if cache.write_all_at(&data, at as u64).is_ok() {
                    model[at..at + length].copy_from_slice(&data);
                } else {
                    // Which part of it was accepted is not told.
                    failed = true;
                }
            }
            let flushed = cache.flush();
            if flushed.is_ok() && !failed {
                let durable = &below.state.lock().unwrap().durable;
                assert!(*durable == model, "I/O {failing}, round {round}");
            }
        }
        drop(cache);
        assert!(!below.overlapped.load(Ordering::SeqCst));
        if count.load(Ordering::SeqCst) < failing {
            break;
        }
        met += 1;
    }
    assert!(met > 50, "only {met} failures met");
}
