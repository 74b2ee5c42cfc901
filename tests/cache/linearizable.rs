//! Many threads read and write the same few places at once, over a device that dawdles by a seed:
//! what each has seen must fit one order in which every request happens at some moment while it runs.
//!
//! Every write has a number of its own, so that a read tells which write it has seen. The judgement is
//! that of Gibbons and Korach for registers whose values are unique ("Testing shared memories", 1997):
//! all requests that saw or wrote one value have to fit between two moments, and those zones may
//! neither overlap nor contain one another where both reach forward. After a flush the device below is
//! looked at, too: it may be ahead of that flush, not behind.
//!
//! `E2EBAK_STRESS_SEED` repeats the choices of a run, `E2EBAK_STRESS_ROUNDS` makes it longer. What the
//! scheduler does, no seed repeats.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use e2ebak::device::Device;
use e2ebak::layer::Cache;
use e2ebak::layer::cache::Settings;
use e2ebak::layer::fault::Faulty;
use e2ebak::layer::memory::Memory;

use crate::below::{KIB, Random};

/// Four in a block: most writes change a part of one, which has to be fetched first.
const PLACE: usize = 1024;
/// Places that half of all requests begin at.
const FOUGHT_FOR: u64 = 8;
const THREADS: u64 = 8;
const OPERATIONS: u64 = 1200;

/// One request as one place has seen it, from the moment before it to the moment after it.
#[derive(Clone, Copy, Debug)]
struct Seen {
    value: u64,
    begun: u64,
    ended: u64,
    is_write: bool,
}

/// Why the requests of one place fit no order, if so. 0 is what it held before all of them.
fn judge(requests: &[Seen]) -> Result<(), String> {
    struct Zone {
        value: u64,
        /// The first end and the last begin of all that saw it.
        first_end: u64,
        last_begin: u64,
        written: u64,
    }
    let mut zones: HashMap<u64, Zone> = HashMap::new();
    let before = Seen {
        value: 0,
        begun: 0,
        ended: 0,
        is_write: true,
    };
    for seen in requests.iter().chain([&before]).filter(|s| s.is_write) {
        let zone = Zone {
            value: seen.value,
            first_end: seen.ended,
            last_begin: seen.begun,
            written: seen.begun,
        };
        assert!(zones.insert(seen.value, zone).is_none(), "not unique");
    }
    for read in requests.iter().filter(|s| !s.is_write) {
        let Some(zone) = zones.get_mut(&read.value) else {
            return Err(format!("{read:?}: nobody wrote that"));
        };
        if read.ended < zone.written {
            return Err(format!("{read:?}: it was written later"));
        }
        zone.first_end = zone.first_end.min(read.ended);
        zone.last_begin = zone.last_begin.max(read.begun);
    }
    // Forward: from its first end to its last begin the place must have held it.
    let (mut forward, backward): (Vec<Zone>, Vec<Zone>) = zones
        .into_values()
        .partition(|z| z.first_end < z.last_begin);
    forward.sort_by_key(|zone| zone.first_end);
    for pair in forward.windows(2) {
        if pair[1].first_end < pair[0].last_begin {
            return Err(format!("{} and {} at once", pair[0].value, pair[1].value));
        }
    }
    for zone in &backward {
        // The last that begins before it; they do not overlap.
        let at = forward.partition_point(|f| f.first_end < zone.last_begin);
        let around = at.checked_sub(1).map(|at| &forward[at]);
        if let Some(around) = around.filter(|around| zone.first_end < around.last_begin) {
            return Err(format!("{} while it was {}", zone.value, around.value));
        }
    }
    Ok(())
}

/// What the device below held at one place after a flush, and when the flush began.
#[derive(Clone, Copy, Debug)]
struct Below {
    value: u64,
    begun: u64,
}

/// Whether the device held what was written before the flush, or something newer.
fn judge_below(requests: &[Seen], below: &[Below]) -> Result<(), String> {
    let writes: Vec<&Seen> = requests.iter().filter(|s| s.is_write).collect();
    let ended: HashMap<u64, u64> = writes.iter().map(|w| (w.value, w.ended)).collect();
    for held in below {
        let ended = match held.value {
            0 => 0,
            value => *ended.get(&value).ok_or("nobody wrote that")?,
        };
        let newer = |write: &&&Seen| ended < write.begun && write.ended < held.begun;
        if let Some(missing) = writes.iter().find(newer) {
            return Err(format!("{held:?} below: {missing:?} was flushed"));
        }
    }
    Ok(())
}

/// What one place has seen.
#[derive(Clone, Default)]
struct Place {
    requests: Vec<Seen>,
    below: Vec<Below>,
}

/// What the first places of the device hold.
fn values(device: &Memory, places: u64) -> Vec<u64> {
    let mut bytes = vec![0; places as usize * PLACE];
    device.read_exact_at(&mut bytes, 0).expect("reads");
    bytes.chunks(PLACE).map(value_of).collect()
}

/// The number that fills a place.
fn value_of(place: &[u8]) -> u64 {
    let (words, _) = place.as_chunks::<8>();
    assert!(words.iter().all(|word| *word == words[0]), "torn");
    u64::from_le_bytes(words[0])
}

/// A run; gives what each place has seen.
fn stress(seed: u64, cache_bytes: u64, places: u64) -> Vec<Place> {
    let memory = Arc::new(Memory::new(places * PLACE as u64));
    let device = Faulty::new(memory.clone());
    device.faults().delay(Duration::from_micros(150), seed);
    let settings = Settings {
        size_bytes: cache_bytes,
        age_max: Duration::from_millis(1),
        ..Settings::default()
    };
    let cache = Cache::new(Arc::new(device), settings).expect("a cache");
    let (clock, numbers, barrier) = (
        AtomicU64::new(1),
        AtomicU64::new(1),
        Barrier::new(THREADS as usize),
    );
    let tick = || clock.fetch_add(1, Ordering::SeqCst);
    let work = |thread: u64| {
        let mut random = Random(seed.wrapping_mul(THREADS) + thread + 1);
        let (mut seen, mut below) = (Vec::new(), Vec::new());
        barrier.wait();
        for _ in 0..OPERATIONS {
            // A few that all fight for, and all others.
            let first = match random.below(2) {
                0 => random.below(FOUGHT_FOR),
                _ => random.below(places),
            };
            let count = 1 + random.below(6).min(places - first - 1);
            let at = first * PLACE as u64;
            let mut bytes = vec![0; count as usize * PLACE];
            let what = random.below(20);
            let value = numbers.fetch_add(1, Ordering::SeqCst);
            let begun = tick();
            match what {
                0 => cache.flush().expect("flushes"),
                1..10 => {
                    bytes = value.to_le_bytes().repeat(bytes.len() / 8);
                    let taken = match value % 2 {
                        0 => cache.write_at_once(&bytes, at),
                        _ => 0,
                    };
                    let rest = cache.write_all_at(&bytes[taken..], at + taken as u64);
                    rest.expect("writes");
                }
                _ if value % 2 == 0 && cache.read_at_once(&mut bytes, at) => {}
                _ => cache.read_exact_at(&mut bytes, at).expect("reads"),
            }
            let ended = tick();
            if what == 0 {
                for (place, value) in values(&memory, FOUGHT_FOR).into_iter().enumerate() {
                    below.push((place, Below { value, begun }));
                }
                continue;
            }
            for (place, bytes) in (first..).zip(bytes.chunks(PLACE)) {
                let is_write = what < 10;
                let request = Seen {
                    value: value_of(bytes),
                    begun,
                    ended,
                    is_write,
                };
                seen.push((place as usize, request));
            }
        }
        (seen, below)
    };
    let mut all = vec![Place::default(); places as usize];
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || work(thread)))
            .collect();
        for thread in threads {
            let (seen, below) = thread.join().expect("no panic");
            for (place, request) in seen {
                all[place].requests.push(request);
            }
            for (place, held) in below {
                all[place].below.push(held);
            }
        }
    });
    let begun = tick();
    cache.close().expect("closes");
    for (place, value) in all.iter_mut().zip(values(&memory, places)) {
        place.below.push(Below { value, begun });
    }
    all
}

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
}

#[test]
fn every_place_is_read_and_written_as_if_one_after_the_other() {
    let seed = number("E2EBAK_STRESS_SEED", u64::from(std::process::id()));
    println!("E2EBAK_STRESS_SEED={seed}");
    for round in 0..number("E2EBAK_STRESS_ROUNDS", 3) {
        // Far smaller than the device, and larger.
        for (cache, places) in [(128 * KIB, 1024), (1024 * KIB, 64)] {
            let all = stress(seed + round, cache, places);
            let busiest = all.iter().map(|place| place.requests.len()).max();
            let busiest = busiest.unwrap_or(0);
            assert!(busiest > 500, "no place was fought for: {busiest}");
            for (place, seen) in all.iter().enumerate() {
                let below = || judge_below(&seen.requests, &seen.below);
                let judged = judge(&seen.requests).and_then(|()| below());
                assert_eq!(judged, Ok(()), "place {place}, seed {}", seed + round);
            }
        }
    }
}

#[test]
fn what_fits_no_order_is_found_out() {
    let request = |is_write, value, begun, ended| Seen {
        value,
        begun,
        ended,
        is_write,
    };
    let (write, read) = (true, false);
    let fits = [
        vec![],
        vec![request(write, 1, 1, 2), request(read, 1, 3, 4)],
        // Both at once: either comes first.
        vec![request(write, 1, 1, 4), request(read, 0, 2, 3)],
        vec![request(write, 1, 1, 4), request(read, 1, 2, 3)],
        vec![
            request(write, 1, 1, 9),
            request(write, 2, 2, 8),
            request(read, 2, 3, 4),
            request(read, 1, 5, 6),
        ],
    ];
    for requests in fits {
        assert_eq!(judge(&requests), Ok(()), "{requests:?}");
    }
    let misfits = [
        // An old value, after a write was over.
        vec![request(write, 1, 1, 2), request(read, 0, 3, 4)],
        // One that nobody wrote, and one of the future.
        vec![request(read, 7, 1, 2)],
        vec![request(read, 1, 1, 2), request(write, 1, 3, 4)],
        // New, then old again.
        vec![
            request(write, 1, 1, 9),
            request(read, 1, 2, 3),
            request(read, 0, 4, 5),
        ],
        // Two readers that disagree about the order of two writes.
        vec![
            request(write, 1, 1, 12),
            request(write, 2, 2, 13),
            request(read, 1, 3, 4),
            request(read, 2, 5, 6),
            request(read, 1, 7, 8),
        ],
        // Lost: overwritten by nobody.
        vec![
            request(write, 1, 1, 2),
            request(write, 2, 3, 4),
            request(read, 1, 5, 6),
        ],
    ];
    for requests in misfits {
        assert!(judge(&requests).is_err(), "{requests:?}");
    }
    let requests = [request(write, 1, 1, 2), request(write, 2, 3, 5)];
    let below = |value, begun| judge_below(&requests, &[Below { value, begun }]);
    assert_eq!((below(1, 4), below(2, 4)), (Ok(()), Ok(())));
    assert!(below(1, 6).is_err() && below(0, 4).is_err() && below(7, 9).is_err());
}
