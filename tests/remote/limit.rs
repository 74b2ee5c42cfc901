//! Limits on the rate of a link.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use e2ebak::link::Occasion;
use e2ebak::link::limit::{Limit, RATE_MIN, limited};
use e2ebak::remote::Store;
use e2ebak::remote::engine::{Bounds, Engine};
use e2ebak::remote::sftp_store::SftpStore;

use crate::rig::{Rig, pattern};

const MIB: u64 = 1 << 20;

fn stores(rig: Rig, limit: Limit, bounds: Bounds, count: usize) -> (Rig, Vec<SftpStore>) {
    let mut rig = rig;
    let dial = rig.dial.take().expect("remote");
    let dial = limited(dial, limit);
    let store = |_| {
        let stream = dial.dial(Occasion::Again).expect("starts");
        let engine = Engine::start(stream, bounds).unwrap_or_else(|e| panic!("{}", e.report()));
        SftpStore::over(Arc::new(engine), &rig.remote_path(), "a")
    };
    let stores = (0..count).map(store).collect();
    (rig, stores)
}

#[test]
fn two_streams_share_each_direction() {
    let Some(rig) = Rig::pipes() else { return };
    let limit = Limit {
        upload: Some(4 * MIB),
        download: Some(8 * MIB),
    };
    let (_rig, stores) = stores(rig, limit, Bounds::default(), 2);
    let device = stores[0].create(16 * MIB).expect("creates");
    let other = stores[1]
        .open(e2ebak::remote::Access::ReadWrite)
        .expect("opens");
    let data = pattern(3 * MIB as usize, 1);
    // 6 MiB up at 4 MiB/s, then 6 MiB down at 8 MiB/s; a little is credit.
    for (up, least) in [(true, 1400), (false, 650)] {
        let begun = Instant::now();
        thread::scope(|scope| {
            for (device, at) in [(&device, 0), (&other, 8 * MIB)] {
                let data = &data;
                scope.spawn(move || match up {
                    true => device.write_all_at(data, at).expect("writes"),
                    false => {
                        let mut back = vec![0; data.len()];
                        device.read_exact_at(&mut back, at).expect("reads");
                        assert!(back == *data);
                    }
                });
            }
        });
        let took = begun.elapsed();
        assert!(took > Duration::from_millis(least), "up: {up}, {took:?}");
        assert!(took < Duration::from_secs(30), "up: {up}, {took:?}");
    }
}

/// At the lowest rate the other stream's read is answered while megabytes are on their way up,
/// and nobody takes our own slowness for the server's silence.
#[test]
fn a_bulk_stream_starves_nobody_and_is_not_taken_for_silent() {
    let Some(rig) = Rig::pipes() else { return };
    let limit = Limit {
        upload: Some(RATE_MIN),
        download: Some(RATE_MIN),
    };
    let bounds = Bounds {
        silence: Duration::from_secs(5),
        ..Bounds::default()
    };
    let (rig, stores) = stores(rig, limit, bounds, 2);
    let device = stores[0].create(16 * MIB).expect("creates");
    let other = stores[1]
        .open(e2ebak::remote::Access::ReadWrite)
        .expect("opens");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (device, done) = (&device, &done);
        scope.spawn(move || {
            // 512 KiB: eight seconds.
            let data = pattern(MIB as usize / 2, 1);
            device.write_all_at(&data, 0).expect("writes");
            done.store(true, Ordering::Relaxed);
        });
        thread::sleep(Duration::from_millis(500));
        let mut longest = Duration::ZERO;
        for _ in 0..10 {
            let begun = Instant::now();
            other.read_exact_at(&mut [0; 4096], 8 * MIB).expect("reads");
            longest = longest.max(begun.elapsed());
        }
        assert!(longest < Duration::from_secs(2), "{longest:?}");
        assert!(
            !done.load(Ordering::Relaxed),
            "the bulk is still on its way"
        );
    });
    // The file has them: what was slow was not lost.
    let file = std::fs::read(rig.image()).expect("read");
    assert!(file[..MIB as usize / 2] == pattern(MIB as usize / 2, 1));
}
