//! What is sent again after a break: many places at once, newest bytes, and further with each break.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use e2ebak::device::Device;
use e2ebak::remote::Store;
use e2ebak::remote::engine::Bounds;

use crate::model_server::{Act, IMAGE, Model, What, head};
use crate::redial::{bounds, open, told, until};
use crate::rig::pattern;

const KIB: usize = 1 << 10;

#[test]
fn many_places_are_sent_again_at_once() {
    let model = Model::new(4096 * KIB);
    let (_store, device) = open(&model, bounds(1));
    let places: Vec<u64> = (1..200).map(|n| n * 16 * KIB as u64).collect();
    for place in &places {
        told(device.write_all_at(&pattern(4 * KIB, *place), *place));
    }
    model.crash();
    {
        let mut world = model.world();
        world.round_trip = Duration::from_millis(20);
        world.most_under_way = 0;
    }
    told(device.flush());
    let stored = model.synced(IMAGE);
    for place in &places {
        let at = *place as usize;
        assert!(stored[at..at + 4 * KIB] == pattern(4 * KIB, *place));
    }
    let most = model.world().most_under_way;
    assert!(most > 64, "{most} at once");
}

#[test]
fn a_link_that_breaks_again_and_again_gets_on() {
    let model = Model::new(2048 * KIB);
    let (_store, device) = open(&model, bounds(1));
    let data = pattern(1536 * KIB, 9);
    told(device.write_all_at(&data, 8192));
    // A write of the model is 8 KiB: no session lives for more than 200 KiB.
    let mut writes = 0;
    model.script(move |seen| match seen.what {
        What::Write => {
            writes += 1;
            match writes % 25 {
                0 => Act::EndAfter,
                _ => Act::Serve,
            }
        }
        _ => Act::Serve,
    });
    model.crash();
    told(device.flush());
    assert!(model.synced(IMAGE)[8192..8192 + data.len()] == data);
    let dials = model.world().dials;
    assert!(dials > 8, "only {dials} sessions: this shows nothing");
}

#[test]
fn newer_data_win_over_what_is_sent_again_meanwhile() {
    for round in 0..6 {
        let model = Model::new(1024 * KIB);
        model.world().round_trip = Duration::from_millis(2);
        let (_store, device) = open(&model, bounds(1 + round % 3));
        until("sessions", || model.sessions() == 1 + round % 3);
        let places: Vec<u64> = (1..60).map(|n| n * 16 * KIB as u64).collect();
        let write = |value: u8, place: u64| {
            told(device.write_all_at(&vec![value; 12 * KIB], place));
        };
        places.iter().for_each(|place| write(1, *place));
        model.crash();
        thread::scope(|scope| {
            let (device, write, places) = (&device, &write, &places);
            scope.spawn(move || told(device.flush()));
            for writer in 0..3 {
                scope.spawn(move || {
                    let own = places.iter().skip(writer).step_by(3);
                    own.for_each(|place| write(2, *place));
                });
            }
        });
        told(device.flush());
        let stored = model.synced(IMAGE);
        for place in &places {
            let at = *place as usize;
            assert!(
                stored[at..at + 12 * KIB].iter().all(|byte| *byte == 2),
                "{place}, round {round}"
            );
        }
        assert_eq!(model.violations(), Vec::<String>::new());
    }
}

#[test]
fn what_is_sent_again_may_land_late_as_well() {
    let model = Model::new(256 * KIB);
    model.world().late_max = Duration::from_secs(2);
    let bounds = Bounds {
        late_after_end: Duration::from_millis(2500),
        ..bounds(1)
    };
    let (store, device) = open(&model, bounds);
    told(device.write_all_at(&[1; 4096], 8192));
    model.end_all();
    let mut done = false;
    model.script(move |seen| match seen.what {
        What::Write if !done => {
            done = true;
            Act::Hold
        }
        _ => Act::Serve,
    });
    told(device.flush());
    told(device.write_all_at(&[2; 4096], 8192));
    told(device.flush());
    assert!(model.apply_late() > 0, "the old write lands");
    assert!(model.volatile(IMAGE)[8192..12_288] == [1; 4096]);
    told(store.settle(&|_| {}));
    assert!(model.synced(IMAGE)[8192..12_288] == [2; 4096]);
}

/// A session that was begun before a write and is up after the server has forgotten it: to sync on it
/// covers nothing.
#[test]
fn a_session_counts_from_when_it_is_up() {
    let model = Model::new(256 * KIB);
    model.world().dials_held_from = 2;
    let (_store, device) = open(&model, bounds(2));
    until("a second dial", || model.world().dials > 1);
    let data = pattern(20_000, 4);
    told(device.write_all_at(&data, 8192));
    model.crash();
    model.world().dials_held_from = u64::MAX;
    told(device.flush());
    assert!(model.synced(IMAGE)[8192..28_192] == data);
}

/// What newer data that are still on their way lie over was answered, and a flush covers it.
#[test]
fn a_flush_covers_what_newer_data_are_about_to_replace() {
    let model = Model::new(256 * KIB);
    let (_store, device) = open(&model, bounds(1));
    told(device.write_all_at(&[1; 4096], 8192));
    {
        let mut world = model.world();
        world.round_trip = Duration::from_millis(200);
        world.most_under_way = 0;
    }
    thread::scope(|scope| {
        scope.spawn(|| told(device.write_all_at(&[2; 4096], 8192)));
        until("write under way", || model.world().most_under_way > 0);
        told(device.flush());
        let stored = model.synced(IMAGE)[8192..12_288].to_vec();
        assert!(stored == [1; 4096] || stored == [2; 4096], "neither is");
    });
}

/// What a restarted server has forgotten is sent again, synced and let go while it is being read.
#[test]
fn a_read_sees_what_is_let_go_meanwhile() {
    let model = Model::new(256 * KIB);
    let (_store, device) = open(&model, bounds(1));
    told(device.write_all_at(&[1; 8192], 8192));
    model.crash();
    // A read takes sixteen round trips, sending again and syncing two.
    {
        let mut world = model.world();
        world.round_trip = Duration::from_millis(20);
        world.read_max = 512;
    }
    let reads = Arc::new(AtomicUsize::new(0));
    let seen_reads = reads.clone();
    model.script(move |seen| {
        let is_read = seen.what == What::Read;
        seen_reads.fetch_add(is_read.into(), Ordering::Relaxed);
        Act::Serve
    });
    thread::scope(|scope| {
        let read = scope.spawn(|| {
            let mut read = [0; 8192];
            told(device.read_exact_at(&mut read, 8192));
            assert!(read == [1; 8192]);
        });
        // The first one is the proof's.
        until("reads", || reads.load(Ordering::Relaxed) > 3);
        told(device.flush());
        read.join().expect("reads");
    });
}

#[test]
fn what_a_resize_cut_off_is_not_sent_again() {
    let model = Model::new(256 * KIB);
    let (_store, device) = open(&model, bounds(1));
    let end = 248 * KIB as u64;
    told(device.write_all_at(&[1; 8192], end));
    told(device.resize(end));
    model.crash();
    told(device.flush());
    assert_eq!(model.synced(IMAGE).len() as u64, end);
}

/// A server that forgets a header that was not synced is still the same one.
#[test]
fn a_header_identifies_the_image_when_it_is_synced() {
    let model = Model::new(256 * KIB);
    let (_store, device) = open(&model, bounds(1));
    let new = head("99999999-2222-4333-8444-555555555555");
    told(device.write_all_at(&new, 0));
    let mut read = vec![0; new.len()];
    told(device.read_exact_at(&mut read, 0));
    assert!(read == new);
    model.crash();
    told(device.flush());
    assert!(model.synced(IMAGE).starts_with(&new));
}

#[test]
fn writers_wait_while_much_is_kept() {
    const MIB: usize = 1 << 20;
    /// What is kept at most is 96 MiB.
    const KEPT: usize = 96;
    const ALL: usize = KEPT + 4;
    let model = Model::new((ALL + 1) * MIB);
    let (_store, device) = open(&model, bounds(1));
    model.script(|seen| match seen.what {
        What::Sync => Act::Fail,
        _ => Act::Serve,
    });
    let written = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..=ALL {
                told(device.write_all_at(&vec![n as u8; MIB], (n * MIB) as u64));
                written.store(n, Ordering::Relaxed);
            }
        });
        until("writes", || written.load(Ordering::Relaxed) == KEPT);
        thread::sleep(Duration::from_millis(300));
        assert_eq!(written.load(Ordering::Relaxed), KEPT);
        model.script(|_| Act::Serve);
        // What failed to be synced is told once, and is sent again.
        let _ = device.flush();
    });
    told(device.flush());
    let stored = model.synced(IMAGE);
    assert!((1..=ALL).all(|n| stored[n * MIB..(n + 1) * MIB].iter().all(|b| *b == n as u8)));
}
