//! The link loses no write, whatever becomes of its sessions. Every test keeps what the caller
//! wrote, byte by byte, and compares it with what the server has stored at the end.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use e2ebak::device::Device;
use e2ebak::error::{Error, Kind, Result};
use e2ebak::location::RemotePath;
use e2ebak::remote::engine::Bounds;
use e2ebak::remote::sftp_store::SftpStore;
use e2ebak::remote::{Access, Link, Store};

use crate::model_server::{Act, IMAGE, Model, Seen, UUID, What, head};
use crate::rig::pattern;

const SIZE: usize = 256 << 10;
const LATE: Duration = Duration::from_millis(150);
/// What takes longer hangs.
const HANG: Duration = Duration::from_secs(10);

pub fn bounds(sessions: usize) -> Bounds {
    Bounds {
        greeting: Duration::from_secs(2),
        silence: Duration::from_millis(500),
        silence_of_disk: Duration::from_millis(500),
        sessions: Some(sessions),
        io_deadline: Duration::from_secs(20),
        late_after_end: LATE,
        late_after_silence: LATE,
        ..Bounds::default()
    }
}

fn connect(model: &Model, bounds: Bounds) -> SftpStore {
    let path = RemotePath::new(IMAGE).expect("a path");
    SftpStore::connect(Arc::new(model.clone()), &path, "nas:a.img", bounds)
        .unwrap_or_else(|e| panic!("{}", e.report()))
}

/// A store and its image, opened as the program does: the header is read first.
pub fn open(model: &Model, bounds: Bounds) -> (SftpStore, Arc<dyn Device>) {
    let store = connect(model, bounds);
    let device = store.open(Access::ReadWrite).expect("opens");
    device.read_exact_at(&mut [0; 4096], 0).expect("a header");
    (store, device)
}

pub fn told<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|e| panic!("{}", e.report()))
}

pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + HANG;
    while !is_so() {
        assert!(Instant::now() < end, "no {what} within {HANG:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Pseudo-random numbers that a seed replays.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Writes, reads back and flushes within `place`; gives what it must hold then.
fn write_about(device: &dyn Device, place: Range<usize>, steps: usize, seed: u64) -> Vec<u8> {
    let mut dice = Dice::new(seed);
    let mut plain = vec![0; place.len()];
    for step in 0..steps {
        let len = 1 + dice.below(12_000.min(place.len() as u64)) as usize;
        let start = dice.below((place.len() - len + 1) as u64) as usize;
        let data = pattern(len, dice.next());
        told(device.write_all_at(&data, (place.start + start) as u64));
        plain[start..start + len].copy_from_slice(&data);
        if dice.below(3) == 0 {
            let mut read = vec![0; place.len()];
            told(device.read_exact_at(&mut read, place.start as u64));
            assert!(read == plain, "step {step} of {place:?} reads back");
        }
        if dice.below(5) == 0 {
            told(device.flush());
        }
    }
    plain
}

/// Several writers, each in a place of its own, and two in a common one; then the end of a run.
/// Compares the server's stored bytes with what was written.
fn job(model: &Model, bounds: Bounds, writers: usize, steps: usize, seed: u64) {
    let (store, device) = open(model, bounds);
    let part = (SIZE - 8192) / writers;
    let common = |value: u8| vec![value; 512];
    let (plain, last): (Vec<Vec<u8>>, Vec<u8>) = thread::scope(|scope| {
        let device = &*device;
        let apart: Vec<_> = (0..writers)
            .map(|n| {
                let place = 8192 + n * part..8192 + (n + 1) * part;
                scope.spawn(move || write_about(device, place, steps, seed + n as u64))
            })
            .collect();
        let together: Vec<_> = (0..2u8)
            .map(|n| {
                scope.spawn(move || {
                    let mut value = n;
                    for step in 0..steps as u8 {
                        value = n + 2 * step;
                        told(device.write_all_at(&common(value), 4096));
                        let mut read = vec![0; 512];
                        told(device.read_exact_at(&mut read, 4096));
                        assert!(read.iter().all(|b| *b == read[0]), "torn: {read:?}");
                    }
                    value
                })
            })
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Vec<u8>>| thread.join().expect("writes");
        let plain = apart.into_iter().map(join).collect();
        let last = together.into_iter().map(|t| t.join().expect("writes"));
        (plain, last.collect())
    });
    told(device.flush());
    model.apply_late();
    told(store.settle(&|_| {}));
    let stored = model.synced(IMAGE);
    for (n, plain) in plain.iter().enumerate() {
        let start = 8192 + n * part;
        assert!(
            stored[start..start + part] == **plain,
            "place {n}, seed {seed}"
        );
    }
    let value = stored[4096];
    assert!(last.contains(&value), "{value} and not one of {last:?}");
    assert!(stored[4096..4608] == common(value), "torn");
    assert!(stored.starts_with(&head(UUID)));
    let violations = model.violations();
    assert!(violations.is_empty(), "{violations:#?}");
}

/// Runs the job with `act` at the 1st, 2nd, 3rd... request, until a run has fewer.
fn at_every_request(act: Act, sessions: usize) {
    let (writers, steps) = if sessions == 1 { (1, 5) } else { (2, 4) };
    for number in 1.. {
        let model = Model::new(SIZE);
        // The four of connecting and opening: limits, open, fstat and the header's read.
        let hit = number + 4;
        model.script(move |seen| if seen.number == hit { act } else { Act::Serve });
        job(&model, bounds(sessions), writers, steps, 7);
        if model.world().requests < hit {
            assert!(number > 20, "{number} requests only");
            return;
        }
    }
}

macro_rules! at_every_request {
    ($($name:ident: $act:ident $sessions:literal,)*) => {
        $(#[test]
        fn $name() {
            at_every_request(Act::$act, $sessions);
        })*
    };
}

at_every_request! {
    a_break_before_any_request_loses_nothing: EndBefore 1,
    a_break_after_any_request_loses_nothing: EndAfter 1,
    a_break_after_any_answer_loses_nothing: EndAnswered 1,
    one_of_three_breaks_before_any_request: EndBefore 3,
    one_of_three_breaks_after_any_request: EndAfter 3,
    one_of_three_breaks_after_any_answer: EndAnswered 3,
    a_restart_before_any_request_loses_nothing: CrashBefore 1,
    a_restart_after_any_request_loses_nothing: CrashAfter 1,
    a_restart_after_any_answer_loses_nothing: CrashAnswered 1,
    a_restart_under_three_sessions_loses_nothing: CrashAfter 3,
    a_restart_after_any_answer_under_three_sessions_loses_nothing: CrashAnswered 3,
    writes_held_back_at_any_request_do_no_harm: Hold 1,
    writes_held_back_at_any_request_of_three_sessions_do_no_harm: Hold 3,
}

#[test]
fn a_restart_that_some_sessions_have_not_noticed_loses_nothing() {
    for rounds in 0..4 {
        let model = Model::new(SIZE);
        let (store, device) = open(&model, bounds(3));
        until("three sessions", || model.sessions() == 3);
        let data = pattern(20_000, rounds);
        told(device.write_all_at(&data, 8192));
        // The next read ends the fast lane; the others seem to be up, and are not.
        let mut done = false;
        model.script(move |seen| match seen.what {
            What::Read if !done => {
                done = true;
                Act::CrashQuietly
            }
            _ => Act::Serve,
        });
        let mut read = vec![0; 20_000];
        told(device.read_exact_at(&mut read, 8192));
        assert!(read == data, "what the server forgot is read from here");
        told(device.flush());
        assert!(model.synced(IMAGE)[8192..28_192] == data);
        told(store.settle(&|_| {}));
    }
}

#[test]
fn a_failed_sync_is_not_made_good_by_the_next_alone() {
    let model = Model::new(SIZE);
    let (_store, device) = open(&model, bounds(1));
    told(device.write_all_at(&[7; 5000], 8192));
    model.script(|seen| match seen.what {
        What::Sync => Act::Fail,
        _ => Act::Serve,
    });
    assert_eq!(device.flush().expect_err("fails").kind(), Kind::Io);
    // As a kernel does: what could not be stored is dropped, and the error is told once.
    {
        let image = model.synced(IMAGE);
        let mut world = model.world();
        world.set_volatile(IMAGE, &image);
        world.script = Box::new(|_| Act::Serve);
    }
    told(device.flush());
    assert!(model.synced(IMAGE)[8192..13_192] == [7; 5000]);
}

#[test]
fn a_resend_that_is_refused_is_not_forgotten() {
    let model = Model::new(SIZE);
    let (_store, device) = open(&model, bounds(1));
    told(device.write_all_at(&[7; 5000], 8192));
    model.crash();
    model.script(|seen| match seen.what {
        What::Write => Act::Fail,
        _ => Act::Serve,
    });
    assert_eq!(device.flush().expect_err("fails").kind(), Kind::Io);
    assert_eq!(device.flush().expect_err("still").kind(), Kind::Io);
    model.script(|_| Act::Serve);
    told(device.flush());
    assert!(model.synced(IMAGE)[8192..13_192] == [7; 5000]);
}

#[test]
fn an_old_write_that_lands_late_is_written_over() {
    for act in [Act::Hold, Act::Swallow] {
        let model = Model::new(SIZE);
        let late = Duration::from_millis(2500);
        model.world().late_max = Duration::from_secs(2);
        // Each kind of end has a bound of its own.
        let (late_after_end, late_after_silence) = match act {
            Act::Hold => (late, LATE),
            _ => (LATE, late),
        };
        let bounds = Bounds {
            late_after_end,
            late_after_silence,
            ..bounds(1)
        };
        let (store, device) = open(&model, bounds);
        let mut done = false;
        model.script(move |seen| match seen.what {
            What::Write if !done => {
                done = true;
                act
            }
            _ => Act::Serve,
        });
        told(device.write_all_at(&[1; 20_000], 8192));
        let broken = Instant::now();
        told(device.write_all_at(&[2; 6000], 12_000));
        told(device.flush());
        assert!(model.synced(IMAGE)[12_000..18_000] == [2; 6000]);
        assert!(model.apply_late() > 0, "the old write lands");
        assert!(
            model.volatile(IMAGE)[12_000..18_000] != [2; 6000],
            "{act:?}"
        );
        let newest = || {
            let mut plain = vec![1; 20_000];
            plain[12_000 - 8192..18_000 - 8192].fill(2);
            plain
        };
        let mut read = vec![0; 20_000];
        told(device.read_exact_at(&mut read, 8192));
        assert!(read == newest(), "a read meanwhile");
        told(store.settle(&|_| {}));
        assert!(
            broken.elapsed() + Duration::from_millis(50) >= late,
            "it waits"
        );
        assert!(model.synced(IMAGE)[8192..28_192] == newest(), "{act:?}");
    }
}

/// ssh gives up a silent server by itself, and then it looks as if the connection had ended.
#[test]
fn a_connection_that_was_silent_before_it_ended_counts_as_silent() {
    let model = Model::new(SIZE);
    let late = Duration::from_secs(2);
    let bounds = Bounds {
        silence: Duration::from_secs(20),
        late_after_silence: late,
        ..bounds(1)
    };
    let (store, device) = open(&model, bounds);
    model.script(|seen| match seen.what {
        What::Write => Act::Swallow,
        _ => Act::Serve,
    });
    let broken = thread::scope(|scope| {
        scope.spawn(|| told(device.write_all_at(&[1; 4096], 8192)));
        until("a write", || model.world().writes > 0);
        thread::sleep(Duration::from_millis(3300));
        model.script(|_| Act::Serve);
        let broken = Instant::now();
        model.end_all();
        broken
    });
    told(device.write_all_at(&[2; 4096], 8192));
    told(store.settle(&|_| {}));
    assert!(broken.elapsed() + Duration::from_millis(50) >= late);
    assert!(model.synced(IMAGE)[8192..12_288] == [2; 4096]);
}

#[test]
fn without_settling_a_held_place_is_written_again_by_and_by() {
    let model = Model::new(SIZE);
    let (_store, device) = open(&model, bounds(1));
    let mut done = false;
    model.script(move |seen| match seen.what {
        What::Write if !done => {
            done = true;
            Act::Hold
        }
        _ => Act::Serve,
    });
    model.world().late_max = LATE;
    told(device.write_all_at(&[1; 4096], 8192));
    told(device.write_all_at(&[2; 4096], 8192));
    told(device.flush());
    assert!(model.apply_late() > 0);
    until("second writing", || {
        model.synced(IMAGE)[8192..12_288] == [2; 4096]
    });
}

#[test]
fn reads_wait_for_the_link_and_then_succeed() {
    let model = Model::new(SIZE);
    let (store, device) = open(&model, bounds(3));
    told(device.write_all_at(&[5; 3000], 9000));
    model.refuse_dials(Duration::from_millis(300));
    model.end_all();
    let mut read = [0; 3000];
    let begun = Instant::now();
    thread::scope(|scope| {
        let reader = scope.spawn(|| told(device.read_exact_at(&mut read, 9000)));
        until("break", || matches!(store.link(), Link::Down { .. }));
        let Link::Down { attempts, why, .. } = store.link() else {
            return;
        };
        let _ = (attempts, Error::from(why).report());
        reader.join().expect("reads");
    });
    assert!(begun.elapsed() >= Duration::from_millis(200));
    assert_eq!(read, [5; 3000]);
    assert!(matches!(store.link(), Link::Up { .. }));
}

#[test]
fn a_write_that_waits_for_the_link_costs_no_processor_time() {
    let model = Model::new(SIZE);
    let (_store, device) = open(&model, bounds(1));
    model.refuse_dials(Duration::from_secs(8));
    model.end_all();
    thread::scope(|scope| {
        let write = scope.spawn(|| told(device.write_all_at(&[7; 4096], 0)));
        // Until what is old would be flushed.
        thread::sleep(Duration::from_secs(6));
        let before = processor_time();
        thread::sleep(Duration::from_secs(1));
        let spent = processor_time() - before;
        assert!(!write.is_finished(), "the link is down");
        assert!(spent < Duration::from_millis(300), "{spent:?} of a second");
    });
    told(device.flush());
}

/// Of this process, user and system (proc(5); USER_HZ is 100).
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("proc");
    let (_, after_name) = stat.rsplit_once(") ").expect("a name");
    let ticks = after_name.split(' ').skip(11).take(2);
    let ticks = ticks.map(|field| field.parse::<u64>().expect("a number"));
    Duration::from_millis(ticks.sum::<u64>() * 10)
}

#[test]
fn after_the_deadline_everybody_is_told_and_nothing_is_tried_any_more() {
    let model = Model::new(SIZE);
    let bounds = Bounds {
        io_deadline: Duration::from_millis(600),
        ..bounds(3)
    };
    let (store, device) = open(&model, bounds);
    told(device.write_all_at(&[5; 3000], 9000));
    model.refuse_dials(Duration::from_secs(3600));
    model.end_all();
    let begun = Instant::now();
    let broken = |result: Result<()>| {
        let error = result.expect_err("broken");
        assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
        assert!(error.report().contains("within"), "{}", error.report());
    };
    thread::scope(|scope| {
        scope.spawn(|| broken(device.read_exact_at(&mut [0; 100], 0)));
        scope.spawn(|| broken(device.write_all_at(&[0; 100], 9000)));
        scope.spawn(|| broken(device.flush()));
        scope.spawn(|| broken(store.read_side(".x").map(drop)));
    });
    assert!(begun.elapsed() >= Duration::from_millis(500) && begun.elapsed() < HANG);
    // Though it could be dialled again now.
    model.refuse_dials(Duration::ZERO);
    let begun = Instant::now();
    broken(device.write_all_at(&[0; 100], 9000));
    broken(device.flush());
    broken(store.settle(&|_| {}));
    assert!(matches!(store.link(), Link::Over(_)));
    drop((device, store));
    assert!(begun.elapsed() < Duration::from_secs(2), "quickly");
}

#[test]
fn with_no_deadline_the_first_break_is_the_end() {
    let model = Model::new(SIZE);
    let bounds = Bounds {
        io_deadline: Duration::ZERO,
        ..bounds(1)
    };
    let (_store, device) = open(&model, bounds);
    model.end_all();
    let error = device.write_all_at(&[1; 10], 0).expect_err("broken");
    assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
    assert_eq!(model.world().dials, 1);
}

fn lease(nonce: &str) -> String {
    let holder = serde_json::json!({
        "version": 1, "host": "other", "boot_id": "b", "pid": 1, "pid_namespace": "n",
        "start_ticks": 1, "user": "u", "program": "p", "since": "2026-01-01T00:00:00Z",
        "renewed": "2026-01-01T00:00:00Z", "nonce": nonce,
    });
    holder.to_string()
}

/// Breaks the link, changes something behind it, and sees that nothing is written there.
fn impostor(kind: Kind, says: &str, change: impl Fn(&Model)) {
    let model = Model::new(SIZE);
    let nonce = "0123456789abcdef0123456789abcdef";
    model.put(&format!("{IMAGE}.lease"), lease(nonce).as_bytes());
    let (store, device) = open(&model, bounds(3));
    until("three sessions", || model.sessions() == 3);
    store.use_lease(Some(nonce));
    // It is looked at after every break, not only the first.
    told(device.write_all_at(&[4; 3000], 9000));
    model.end_all();
    told(device.flush());
    told(device.write_all_at(&[5; 3000], 9000));
    model.refuse_dials(Duration::from_secs(3600));
    model.end_all();
    change(&model);
    let writes = model.world().writes;
    model.refuse_dials(Duration::ZERO);
    for result in [
        device.flush(),
        device.write_all_at(&[1; 10], 9000),
        device.read_exact_at(&mut [0; 10], 9000),
    ] {
        let error = result.expect_err("another image");
        assert_eq!(error.kind(), kind, "{}", error.report());
        assert!(error.report().contains(says), "{}", error.report());
    }
    assert_eq!(model.world().writes, writes, "nothing is written there");
}

#[test]
fn another_image_in_its_place_is_not_written_to() {
    impostor(Kind::Corrupt, "UUID", |model| {
        let mut other = head("99999999-2222-4333-8444-555555555555");
        other.resize(SIZE, 0);
        model.put(IMAGE, &other);
    });
    impostor(Kind::Corrupt, "bytes long now", |model| {
        model.resize(IMAGE, SIZE + 4096);
    });
}

/// A session is asked for its proof while others, which still lead to the old image, are up.
#[test]
fn each_session_has_to_lead_to_the_same_image() {
    let model = Model::new(SIZE);
    let (_store, device) = open(&model, bounds(3));
    until("three sessions", || model.sessions() == 3);
    let mut other = head("99999999-2222-4333-8444-555555555555");
    other.resize(SIZE, 0);
    model.put(IMAGE, &other);
    let mut broken = false;
    model.script(move |seen| match seen.what {
        What::Write if !broken => {
            broken = true;
            Act::EndBefore
        }
        _ => Act::Serve,
    });
    let mut error = None;
    until("refusal", || {
        error = device.write_all_at(&[1; 3000], 9000).err();
        error.is_some()
    });
    let error = error.expect("refused");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.report());
    assert!(model.volatile(IMAGE) == other, "nothing is written there");
}

#[test]
fn without_its_lease_nothing_is_written() {
    let name = format!("{IMAGE}.lease");
    impostor(Kind::InUse, "was removed", |model| model.remove(&name));
    impostor(Kind::InUse, "taken over", |model| {
        model.put(&name, lease("ffffffffffffffff0123456789abcdef").as_bytes());
    });
}

#[test]
fn a_server_that_has_not_mounted_its_disk_yet_is_waited_for() {
    let model = Model::new(SIZE);
    let (_store, device) = open(&model, bounds(1));
    told(device.write_all_at(&[5; 3000], 9000));
    let image = model.synced(IMAGE);
    model.remove(IMAGE);
    model.end_all();
    thread::scope(|scope| {
        let flush = scope.spawn(|| told(device.flush()));
        until("attempt", || model.world().dials > 2);
        model.put(IMAGE, &image);
        flush.join().expect("flushes");
    });
    assert!(model.synced(IMAGE)[9000..12_000] == [5; 3000]);
}

#[test]
fn a_resize_survives_a_break_at_any_request() {
    for act in [
        Act::EndBefore,
        Act::EndAfter,
        Act::CrashAfter,
        Act::CrashAnswered,
    ] {
        for number in 1..=3 {
            let model = Model::new(SIZE);
            let (_store, device) = open(&model, bounds(1));
            let mut seen_since = 0;
            model.script(move |_| {
                seen_since += 1;
                if seen_since == number {
                    act
                } else {
                    Act::Serve
                }
            });
            told(device.resize(SIZE as u64 + 8192));
            told(device.write_all_at(&[9; 8192], SIZE as u64));
            told(device.flush());
            let stored = model.synced(IMAGE);
            assert!(stored.len() == SIZE + 8192 && stored[SIZE..] == [9; 8192]);
        }
    }
}

#[test]
fn a_resize_that_broke_cannot_cut_off_what_comes_after() {
    let model = Model::new(SIZE);
    let (_store, device) = open(&model, bounds(1));
    let mut tries = 0;
    model.script(move |seen| match seen.what {
        What::Resize => {
            tries += 1;
            if tries == 1 {
                Act::EndBefore
            } else {
                Act::Serve
            }
        }
        _ => Act::Serve,
    });
    let begun = Instant::now();
    told(device.resize(SIZE as u64 + 8192));
    told(device.resize(SIZE as u64 + 16384));
    assert!(
        begun.elapsed() >= LATE,
        "the second waits until the first cannot come any more"
    );
    assert_eq!(model.synced(IMAGE).len(), SIZE + 16384);
}

#[test]
fn a_removal_that_broke_cannot_hit_what_comes_after() {
    let model = Model::new(SIZE);
    let side = format!("{IMAGE}.x");
    model.put(&side, b"ours");
    let (store, _device) = open(&model, bounds(1));
    let mut tries = 0;
    model.script(move |seen| match seen.what {
        What::Remove => {
            tries += 1;
            if tries == 1 {
                Act::EndBefore
            } else {
                Act::Serve
            }
        }
        _ => Act::Serve,
    });
    let begun = Instant::now();
    thread::scope(|scope| {
        let removal = scope.spawn(|| told(store.remove_side(".x")));
        thread::sleep(LATE / 2);
        assert!(
            model.has(&side),
            "it stays until no late removal can hit another"
        );
        removal.join().expect("removes");
    });
    assert!(begun.elapsed() >= LATE && !model.has(&side));
}

/// Sets it at the end of its life.
struct Sets<'a>(&'a AtomicBool);

impl Drop for Sets<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_long_link_gets_more_sessions_and_a_server_that_bears_few_is_content() {
    for (most, wanted) in [(100, 3..=8), (2, 1..=2)] {
        let model = Model::new(8 << 20);
        {
            let mut world = model.world();
            world.round_trip = Duration::from_millis(20);
            world.sessions_max = most;
        }
        let bounds = Bounds {
            sessions: None,
            silence: Duration::from_secs(5),
            silence_of_disk: Duration::from_secs(5),
            ..bounds(1)
        };
        let (store, device) = open(&model, bounds);
        let done = AtomicBool::new(false);
        let mut seen_most = 0;
        thread::scope(|scope| {
            for n in 0..8u64 {
                let (device, done) = (&device, &done);
                scope.spawn(move || {
                    let data = pattern(1 << 19, n);
                    while !done.load(Ordering::Relaxed) {
                        told(device.write_all_at(&data, 4096 + n * (1 << 19)));
                    }
                });
            }
            let _ends = Sets(&done); // also when an assertion fails
            let mut dials = false;
            until(&format!("growth with at most {most}"), || {
                seen_most = seen_most.max(model.sessions());
                dials |= model.world().dials > 2;
                dials && wanted.contains(&model.sessions()) && (most > 2 || seen_most <= 2)
            });
            // Losing one of them stalls nobody.
            model.script(|seen| {
                if seen.what == What::Write && seen.number % 97 == 0 {
                    Act::EndAfter
                } else {
                    Act::Serve
                }
            });
            thread::sleep(Duration::from_millis(500));
            model.script(|_| Act::Serve);
        });
        told(device.flush());
        model.apply_late();
        told(store.settle(&|_| {}));
        let stored = model.synced(IMAGE);
        for n in 0..8usize {
            let at = 4096 + n * (1 << 19);
            let expected = pattern(1 << 19, n as u64);
            let len = expected.len().min(stored.len() - at);
            assert!(stored[at..at + len] == expected[..len], "writer {n}");
        }
        assert_eq!(model.violations(), Vec::<String>::new());
    }
}

#[test]
fn short_reads_and_slow_answers_with_breaks() {
    let model = Model::new(SIZE);
    {
        let mut world = model.world();
        world.round_trip = Duration::from_millis(3);
        world.read_max = 4000;
    }
    model.script(|seen| {
        if seen.number % 151 == 150 {
            Act::EndAfter
        } else {
            Act::Serve
        }
    });
    job(&model, bounds(4), 4, 12, 3);
}

/// Everything at once, by chance.
fn chance(seed: u64) -> impl FnMut(Seen) -> Act + Send + 'static {
    let mut dice = Dice::new(seed);
    let rate = 20 + dice.below(120);
    move |_| {
        if dice.below(rate) != 0 {
            return Act::Serve;
        }
        let acts = [
            Act::EndBefore,
            Act::EndAfter,
            Act::EndAnswered,
            Act::CrashBefore,
            Act::CrashAfter,
            Act::CrashAnswered,
            Act::Hold,
            Act::Hold,
            Act::Hold,
        ];
        acts[dice.below(acts.len() as u64) as usize]
    }
}

#[test]
fn whatever_happens_by_chance_nothing_is_lost() {
    let one = std::env::var("E2EBAK_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seeds = one.map_or(1..120, |seed: u64| seed..seed + 1);
    for seed in seeds {
        let mut dice = Dice::new(seed);
        let model = Model::new(SIZE);
        {
            let mut world = model.world();
            world.restart_takes = Duration::from_millis(dice.below(30));
            world.round_trip = Duration::from_micros(dice.below(800));
        }
        let sessions = 1 + dice.below(4) as usize;
        let (writers, steps) = (1 + dice.below(4) as usize, 4 + dice.below(10) as usize);
        // A failure names its seed; `E2EBAK_SEED` plays it alone.
        println!("seed {seed}: {sessions} sessions, {writers} writers, {steps} steps");
        let late = model.clone();
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let pauses = 5 + dice.below(40);
        // Within the bound after the break: that is what the bound means.
        let applier = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(pauses));
                late.apply_late();
            }
        });
        // The first requests connect and open: nothing is tried again there.
        let mut script = chance(seed);
        model.script(move |seen| {
            if seen.number <= 4 {
                Act::Serve
            } else {
                script(seen)
            }
        });
        job(&model, bounds(sessions), writers, steps, seed);
        over.store(true, Ordering::Relaxed);
        applier.join().expect("ends");
    }
}

/// Of the image while it is another's copy, for example: what is written to it then must not be found
/// under its name.
#[test]
fn a_file_keeps_the_name_that_it_was_given_through_a_crash() {
    let model = Model::new(SIZE);
    let (store, device) = open(&model, bounds(1));
    drop(device);
    told(store.rename("", ".part"));
    model.crash();
    assert!(model.has("dir/a.img.part") && !model.has(IMAGE));
}

#[test]
fn settling_waits_for_what_its_own_flush_lost() {
    let model = Model::new(SIZE);
    let late = Duration::from_secs(1);
    model.world().late_max = late;
    let bounds = Bounds {
        late_after_end: late,
        ..bounds(1)
    };
    let (store, device) = open(&model, bounds);
    let hold_first = || {
        let mut done = false;
        move |seen: Seen| match seen.what {
            What::Write if !done => {
                done = true;
                Act::Hold
            }
            _ => Act::Serve,
        }
    };
    model.script(hold_first());
    told(device.write_all_at(&[1; 4096], 8192));
    told(device.write_all_at(&[2; 4096], 8192));
    told(device.flush());
    let broken = Arc::new(AtomicBool::new(false));
    let is_broken = broken.clone();
    let mut script = hold_first();
    model.script(move |seen| {
        let act = script(seen);
        is_broken.fetch_or(act == Act::Hold, Ordering::Relaxed);
        act
    });
    told(store.settle(&|_| {}));
    assert!(broken.load(Ordering::Relaxed), "sent again");
    // The lease is released now; the next client writes.
    let mut next = model.synced(IMAGE);
    next[8192..12_288].fill(3);
    model.world().set_volatile(IMAGE, &next);
    model.apply_late();
    assert!(
        model.volatile(IMAGE)[8192..12_288] == [3; 4096],
        "next client's data are overwritten"
    );
}

#[test]
fn a_sync_that_fails_in_a_resizing_is_not_made_good_by_the_next() {
    let model = Model::new(SIZE);
    let (_store, device) = open(&model, bounds(1));
    told(device.write_all_at(&[7; 5000], 8192));
    model.script(|seen| match seen.what {
        What::Sync => Act::Fail,
        _ => Act::Serve,
    });
    device.resize(SIZE as u64 + 8192).expect_err("fails");
    {
        let mut image = model.synced(IMAGE);
        image.resize(SIZE + 8192, 0);
        let mut world = model.world();
        world.set_volatile(IMAGE, &image);
        world.script = Box::new(|_| Act::Serve);
    }
    told(device.flush());
    assert!(model.synced(IMAGE)[8192..13_192] == [7; 5000]);
}

#[test]
fn settling_waits_for_a_late_resizing() {
    let model = Model::new(SIZE);
    let (store, device) = open(&model, bounds(1));
    let mut tries = 0;
    model.script(move |seen| match seen.what {
        What::Resize => {
            tries += 1;
            if tries == 1 {
                Act::EndBefore
            } else {
                Act::Serve
            }
        }
        _ => Act::Serve,
    });
    let begun = Instant::now();
    told(device.resize(SIZE as u64 + 8192));
    told(device.flush());
    told(store.settle(&|_| {}));
    assert!(begun.elapsed() >= LATE);
}

#[test]
fn a_new_image_is_settled_before_its_lease_is_released() {
    use e2ebak::image::{Creation, create};
    let model = Model::new(4096);
    model.remove(IMAGE);
    let late = Duration::from_secs(5);
    model.world().late_max = late;
    let bounds = Bounds {
        late_after_end: late,
        silence: Duration::from_secs(5),
        silence_of_disk: Duration::from_secs(5),
        ..bounds(1)
    };
    let store: Arc<dyn Store> = Arc::new(connect(&model, bounds));
    let mut large = 0;
    let held = Arc::new(AtomicBool::new(false));
    let is_held = held.clone();
    model.script(move |seen| {
        // The lease is written by the first ones.
        if seen.what == What::Write {
            large += 1;
            if large == 4 {
                is_held.store(true, Ordering::Relaxed);
                return Act::Hold;
            }
        }
        Act::Serve
    });
    let creation = Creation {
        size: 128 << 20,
        label: "x".into(),
        kdf_memory: Some(1 << 20),
        kdf_time: Some(4),
    };
    let mut key = || Ok(e2ebak::secret::Secret::new(b"key".to_vec()));
    told(create(
        &store,
        "nas:a.img",
        &creation,
        &mut key,
        &e2ebak::progress::Silent,
        &|| Ok(()),
    ));
    assert!(held.load(Ordering::Relaxed));
    assert!(!model.has(&format!("{IMAGE}.lease")), "released");
    let mut next = model.synced(IMAGE);
    next.fill(3);
    model.world().set_volatile(IMAGE, &next);
    model.apply_late();
    let overwritten = model.volatile(IMAGE).iter().filter(|b| **b != 3).count();
    assert_eq!(overwritten, 0, "bytes of the next client");
}

/// One session of three falls silent, the others are well.
#[test]
fn one_silent_session_of_three_does_not_end_everything() {
    let model = Model::new(SIZE);
    let bounds = Bounds {
        silence: Duration::from_millis(600),
        silence_of_disk: Duration::from_millis(600),
        io_deadline: Duration::from_millis(500),
        ..bounds(3)
    };
    let (_store, device) = open(&model, bounds);
    until("three sessions", || model.sessions() == 3);
    let mut done = false;
    model.script(move |seen| match seen.what {
        What::Read if !done => {
            done = true;
            Act::Swallow
        }
        _ => Act::Serve,
    });
    told(device.read_exact_at(&mut [0; 4096], 8192));
}
