//! What every store does, whatever is below it. Each function is one behaviour.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Barrier};
use std::thread;

use e2ebak::buffer::Buffer;
use e2ebak::error::Kind;
use e2ebak::remote::{Access, SIDE_MAX};

use crate::rig::{Rig, pattern};

const MIB: u64 = 1 << 20;

pub fn a_new_image_is_sparse_and_reads_as_zeros(rig: &Rig) {
    let device = rig.store().create(64 * MIB).expect("creates");
    assert_eq!(device.size(), 64 * MIB);
    let mut buf = vec![0xff; 3 * MIB as usize];
    device.read_exact_at(&mut buf, 61 * MIB).expect("reads");
    assert!(buf.iter().all(|byte| *byte == 0));
    let file = fs::metadata(rig.image()).expect("there");
    assert_eq!(file.len(), 64 * MIB);
    assert!(file.blocks() < 2048, "{} blocks", file.blocks());
    assert_eq!(file.mode() & 0o777, 0o600);
}

pub fn what_is_written_is_read_whatever_its_size_and_place(rig: &Rig) {
    let store = rig.store();
    let device = store.create(16 * MIB).expect("creates");
    let cases = [
        (0, 1),
        (4096, 4096),
        (7, 130_000),
        (261_119, 261_121),
        (MIB, 5 * MIB as usize + 17),
        (16 * MIB - 1, 1),
        (3, 0),
    ];
    for (seed, (offset, len)) in cases.into_iter().enumerate() {
        for seed in [seed as u64 + 100, seed as u64] {
            let data = pattern(len, seed);
            let written = match seed {
                100.. => device.write_buffer_at(Buffer::from(&data[..]), offset),
                _ => device.write_all_at(&data, offset),
            };
            written.expect("writes");
            let mut back = vec![0; len];
            device.read_exact_at(&mut back, offset).expect("reads");
            assert!(back == data, "{len} bytes at {offset}");
        }
    }
    device.flush().expect("syncs");
    // The file itself has them, in their places.
    let file = fs::read(rig.image()).expect("read");
    assert!(file[MIB as usize..][..5 * MIB as usize + 17] == pattern(5 * MIB as usize + 17, 4));
    assert_eq!(file.last(), pattern(1, 5).last());
}

pub fn many_threads_at_once_stay_apart(rig: &Rig) {
    const THREADS: u64 = 8;
    const PART: u64 = MIB;
    let store = rig.store();
    let device = store.create(THREADS * PART).expect("creates");
    thread::scope(|scope| {
        for n in 0..THREADS {
            let device = device.clone();
            scope.spawn(move || {
                let mut model = vec![0; PART as usize];
                let steps = pattern(8 * 100, n + 1);
                for (step, bytes) in steps.chunks_exact(8).enumerate() {
                    let random = u64::from_le_bytes(bytes.try_into().expect("eight"));
                    let at = (random % (PART - 40_000)) as usize;
                    let len = (random >> 32) as usize % 40_000;
                    let offset = n * PART + at as u64;
                    if step % 3 == 2 {
                        let mut back = vec![0; len];
                        device.read_exact_at(&mut back, offset).expect("reads");
                        assert!(back == model[at..at + len], "thread {n} step {step}");
                    } else {
                        let data = pattern(len, random);
                        device.write_all_at(&data, offset).expect("writes");
                        model[at..at + len].copy_from_slice(&data);
                    }
                }
                let mut back = vec![0; PART as usize];
                device.read_exact_at(&mut back, n * PART).expect("reads");
                assert!(back == model, "thread {n}");
            });
        }
    });
}

pub fn nothing_is_created_over_what_exists(rig: &Rig) {
    fs::write(rig.image(), b"precious").expect("written");
    let error = rig.store().create(MIB).map(drop).expect_err("refuses");
    assert_eq!(error.kind(), Kind::Exists, "{}", error.report());
    assert_eq!(fs::read(rig.image()).expect("read"), b"precious");
}

pub fn no_image_is_said_so(rig: &Rig) {
    let store = rig.store();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let error = store.open(access).map(drop).expect_err("refuses");
        assert_eq!(error.kind(), Kind::NoImage, "{}", error.report());
    }
    assert_eq!(store.remove().expect_err("refuses").kind(), Kind::NoImage);
}

pub fn a_directory_is_no_image(rig: &Rig) {
    fs::create_dir(rig.image()).expect("made");
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let error = rig.store().open(access).map(drop).expect_err("refuses");
        assert!(
            matches!(error.kind(), Kind::Usage | Kind::Io),
            "{}",
            error.report()
        );
        let report = error.report();
        assert!(
            report.contains("not a regular file") || report.contains("directory"),
            "{report}"
        );
    }
}

pub fn resizing_grows_by_holes_and_cuts_the_tail(rig: &Rig) {
    let device = rig.store().create(MIB).expect("creates");
    device
        .write_all_at(&pattern(MIB as usize, 1), 0)
        .expect("writes");
    device.resize(9 * MIB).expect("grows");
    assert_eq!(device.size(), 9 * MIB);
    let mut buf = vec![1; MIB as usize];
    device.read_exact_at(&mut buf, 8 * MIB).expect("reads");
    assert!(buf.iter().all(|byte| *byte == 0));
    device.resize(MIB / 2).expect("shrinks");
    assert_eq!(fs::metadata(rig.image()).expect("there").len(), MIB / 2);
    assert!(device.read_exact_at(&mut buf, 0).is_err());
    device.resize(MIB).expect("grows");
    device.read_exact_at(&mut buf, 0).expect("reads");
    assert!(buf[..MIB as usize / 2] == pattern(MIB as usize, 1)[..MIB as usize / 2]);
    assert!(buf[MIB as usize / 2..].iter().all(|byte| *byte == 0));
}

pub fn beyond_the_end_is_an_error_before_anything_is_done(rig: &Rig) {
    let device = rig.store().create(8192).expect("creates");
    for (offset, len) in [(8192, 1), (0, 8193), (4096, 5000), (u64::MAX, 1)] {
        let error = device
            .write_all_at(&vec![1; len], offset)
            .expect_err("too far");
        assert_eq!(error.kind(), Kind::Usage, "{}", error.report());
        let error = device
            .read_exact_at(&mut vec![1; len], offset)
            .expect_err("too far");
        assert_eq!(error.kind(), Kind::Usage, "{}", error.report());
    }
    assert_eq!(fs::read(rig.image()).expect("read"), vec![0; 8192]);
}

pub fn a_file_cut_off_behind_our_back_is_an_error_not_zeros(rig: &Rig) {
    let device = rig.store().create(MIB).expect("creates");
    let file = fs::File::options()
        .write(true)
        .open(rig.image())
        .expect("opens");
    file.set_len(300_000).expect("cut");
    let mut buf = vec![0; MIB as usize];
    let error = device.read_exact_at(&mut buf, 0).expect_err("cut off");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.report());
}

pub fn opened_for_reading_nothing_can_be_changed(rig: &Rig) {
    let store = rig.store();
    let made = store.create(MIB).expect("creates");
    made.write_all_at(b"as it was", 0).expect("writes");
    let device = store.open(Access::ReadOnly).expect("opens");
    assert!(!device.caps().writable && made.caps().writable);
    for refused in [device.write_all_at(b"x", 0), device.resize(1)] {
        assert_eq!(refused.expect_err("refuses").kind(), Kind::ReadOnly);
    }
    assert!(device.discard(0..4096).is_err());
    device.flush().expect("nothing to be done");
    let mut buf = [0; 9];
    device.read_exact_at(&mut buf, 0).expect("reads");
    assert_eq!(&buf, b"as it was");
}

pub fn discard_gives_zeros_or_changes_nothing(rig: &Rig) {
    let device = rig.store().create(MIB).expect("creates");
    let data = pattern(MIB as usize, 9);
    device.write_all_at(&data, 0).expect("writes");
    let done = device.discard(4096..MIB / 2);
    let mut back = vec![0; MIB as usize];
    device.read_exact_at(&mut back, 0).expect("reads");
    let mut expected = data;
    match done {
        Ok(()) => expected[4096..MIB as usize / 2].fill(0),
        Err(error) => assert_eq!(error.kind(), Kind::Unsupported, "{}", error.report()),
    }
    assert!(back == expected);
}

pub fn an_image_outlives_its_session(rig: &Rig) {
    let data = pattern(300_000, 3);
    let first = rig.store();
    let device = first.create(MIB).expect("creates");
    device.write_all_at(&data, 1234).expect("writes");
    device.flush().expect("syncs");
    drop((device, first));
    let device = rig.store().open(Access::ReadWrite).expect("opens");
    assert_eq!(device.size(), MIB);
    let mut back = vec![0; data.len()];
    device.read_exact_at(&mut back, 1234).expect("reads");
    assert!(back == data);
}

pub fn a_removed_image_is_gone(rig: &Rig) {
    let store = rig.store();
    store.create(MIB).expect("creates");
    store.create_side(".lease", b"x").expect("creates");
    store.remove().expect("removes");
    assert!(!rig.image().exists());
    assert_eq!(
        store.read_side(".lease").expect("reads").as_deref(),
        Some(&b"x"[..])
    );
}

pub fn side_files_are_made_read_replaced_and_removed(rig: &Rig) {
    let store = rig.store();
    assert_eq!(store.read_side(".x").expect("none"), None);
    store.create_side(".x", b"one").expect("creates");
    assert_eq!(
        store.read_side(".x").expect("reads").as_deref(),
        Some(&b"one"[..])
    );
    let error = store.create_side(".x", b"two").expect_err("refuses");
    assert_eq!(error.kind(), Kind::Exists, "{}", error.report());
    assert_eq!(
        store.read_side(".x").expect("reads").as_deref(),
        Some(&b"one"[..])
    );
    let long = pattern(SIDE_MAX, 4);
    store.replace_side(".x", &long).expect("replaces");
    assert!(store.read_side(".x").expect("reads").as_deref() == Some(&long[..]));
    store.replace_side(".x", b"").expect("replaces");
    assert_eq!(
        store.read_side(".x").expect("reads").as_deref(),
        Some(&b""[..])
    );
    store.replace_side(".new", b"n").expect("makes");
    store.remove_side(".new").expect("removes");
    store.remove_side(".x").expect("removes");
    store.remove_side(".x").expect("is gone anyway");
    assert_eq!(store.read_side(".x").expect("none"), None);
    let left = fs::read_dir(rig.dir.path()).expect("read").count();
    assert_eq!(left, 0, "nothing is left behind");
}

pub fn side_files_have_a_largest_size(rig: &Rig) {
    let store = rig.store();
    let error = store
        .create_side(".x", &pattern(SIDE_MAX + 1, 1))
        .expect_err("too long");
    assert_eq!(error.kind(), Kind::Usage, "{}", error.report());
    let mut name = rig.image().into_os_string();
    name.push(".big");
    fs::write(name, pattern(SIDE_MAX + 1, 1)).expect("written");
    let error = store.read_side(".big").expect_err("too long");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.report());
}

pub fn of_many_creators_of_a_side_file_one_wins(rig: &Rig) {
    const RACERS: usize = 4;
    let stores: Vec<_> = (0..RACERS).map(|_| rig.store()).collect();
    for round in 0..10 {
        let suffix = format!(".race{round}");
        let start = Arc::new(Barrier::new(RACERS));
        let racers: Vec<_> = (0..RACERS)
            .map(|n| {
                let (store, start, suffix) = (stores[n].clone(), start.clone(), suffix.clone());
                thread::spawn(move || {
                    start.wait();
                    store.create_side(&suffix, format!("racer {n}").as_bytes())
                })
            })
            .collect();
        let ends: Vec<_> = racers
            .into_iter()
            .map(|r| r.join().expect("ends"))
            .collect();
        let winners: Vec<usize> = (0..RACERS).filter(|n| ends[*n].is_ok()).collect();
        let [winner] = winners[..] else {
            panic!("winners: {winners:?}, {ends:?}");
        };
        for end in ends.into_iter().filter_map(Result::err) {
            assert_eq!(end.kind(), Kind::Exists, "{}", end.report());
        }
        let content = stores[0].read_side(&suffix).expect("reads").expect("there");
        assert_eq!(content, format!("racer {winner}").as_bytes());
    }
}

pub fn a_missing_directory_is_named(rig: &Rig) {
    fs::remove_dir(rig.dir.path()).expect("removed");
    let error = rig.store().create(MIB).map(drop).expect_err("refuses");
    assert_eq!(error.kind(), Kind::NotFound, "{}", error.report());
    fs::create_dir(rig.dir.path()).expect("made again");
}

pub fn room_is_told_where_it_can_be(rig: &Rig) {
    let Some(space) = rig.store().space().expect("asks") else {
        return; // a server without statvfs
    };
    assert!(space.free <= space.total && space.total > MIB, "{space:?}");
}

pub fn traffic_is_counted(rig: &Rig) {
    let store = rig.store();
    let device = store.create(MIB).expect("creates");
    let before = store.traffic();
    device
        .write_all_at(&pattern(MIB as usize, 1), 0)
        .expect("writes");
    let between = store.traffic();
    device
        .read_exact_at(&mut vec![0; MIB as usize], 0)
        .expect("reads");
    let after = store.traffic();
    if rig.dial.is_none() {
        assert_eq!(after.sent + after.received, 0);
        return;
    }
    let near_a_mebibyte = MIB..MIB + MIB / 50;
    assert!(near_a_mebibyte.contains(&(between.sent - before.sent)));
    assert!(near_a_mebibyte.contains(&(after.received - between.received)));
    assert!(between.received - before.received < MIB / 50);
}
