//! How long one read of 4 KiB takes while more is written than the link carries.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::measure::{median, percentile};
use crate::ours;
use crate::random;
use crate::report::{OURS, Report, SSHFS};
use crate::rig::{Turn, VOLUME_BASE};
use crate::stop;
use crate::work::{MIB, Target};

pub const WHAT: &str = "4 KiB read while bulk writes are queued";

/// Until the queues are full.
const RUN_UP: Duration = Duration::from_millis(1500);

pub fn measure(turn: &Turn<'_>, report: &mut Report) {
    for tool in turn.rotated(vec![OURS, SSHFS]) {
        let (file, base) = match tool {
            OURS => (turn.ours.open_volume(), VOLUME_BASE),
            _ => (ours::open(&turn.sshfs.file("peer"), true), 0),
        };
        let latencies = under_load(turn, &file, base);
        let (middle, most) = (median(&latencies), percentile(&latencies, 95));
        let mut add = |metric, value| report.add(WHAT, turn.rtt, tool, metric, value);
        add("median_ms", middle * 1e3);
        add("p95_ms", most * 1e3);
        if turn.rtt > 0 {
            let trip = turn.rtt as f64 / 1e3;
            add("median_round_trips", middle / trip);
            add("p95_round_trips", most / trip);
        }
    }
}

fn under_load(turn: &Turn<'_>, file: &File, base: u64) -> Vec<f64> {
    let amounts = turn.rig.amounts;
    let time = amounts
        .random_time
        .max(Duration::from_millis(20 * turn.rtt));
    let reads = random::reads(turn, base, time);
    let enough = AtomicBool::new(false);
    let latencies = std::thread::scope(|scope| {
        for number in 0..4 {
            let enough = &enough;
            scope.spawn(move || {
                let data = vec![number as u8; MIB as usize + 4096];
                let aligned = data.as_ptr().align_offset(4096);
                let data = &data[aligned..aligned + MIB as usize];
                let places = amounts.there / MIB;
                for i in (number..).step_by(4) {
                    if enough.load(Ordering::Relaxed) || stop::asked() {
                        return;
                    }
                    file.write(data, base + amounts.places().write + i % places * MIB);
                }
            });
        }
        std::thread::sleep(RUN_UP);
        let reads = scope.spawn(move || reads.run(file));
        let done = reads.join();
        enough.store(true, Ordering::Relaxed);
        done.map(|done| done.latencies).unwrap_or_default()
    });
    stop::check();
    file.sync();
    latencies
}
