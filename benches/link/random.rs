//! Reading and writing 4 KiB here and there, so many at a time.

use std::time::Duration;

use crate::ours;
use crate::report::{ENGINE, OURS, Report, SSHFS};
use crate::rig::{Turn, VOLUME_BASE};
use crate::work::{Work, scatter};

pub const DEPTHS: [usize; 3] = [1, 16, 64];

pub fn read_at(depth: usize) -> String {
    format!("random 4 KiB reads, depth {depth}")
}

pub fn write_at(depth: usize) -> String {
    format!("random 4 KiB writes, depth {depth}")
}

pub fn measure(turn: &Turn<'_>, report: &mut Report) {
    for depth in DEPTHS {
        for tool in turn.rotated(vec![OURS, SSHFS, ENGINE]) {
            let done = work(turn, tool, false, depth);
            let rate = done.requests as f64 / done.answered.as_secs_f64();
            report.add(read_at(depth), turn.rtt, tool, "ops_per_s", rate);
        }
        for tool in turn.rotated(vec![OURS, SSHFS, ENGINE]) {
            let done = work(turn, tool, true, depth);
            let requests = done.requests as f64;
            let acknowledged = requests / done.answered.as_secs_f64();
            let what = write_at(depth);
            report.add(&what, turn.rtt, tool, "acknowledged_per_s", acknowledged);
            report.add(
                &what,
                turn.rtt,
                tool,
                "ops_per_s",
                requests / done.synced.as_secs_f64(),
            );
        }
    }
}

fn work(turn: &Turn<'_>, tool: &str, write: bool, depth: usize) -> crate::work::Done {
    let amounts = turn.rig.amounts;
    let places = amounts.places();
    let (place, span) = match write {
        true => (places.write_by_chance, amounts.there / 4),
        false => (places.read_by_chance, amounts.scattered),
    };
    let base = if tool == OURS { VOLUME_BASE } else { 0 };
    // Nobody meets places again that it has seen in this run.
    let seed = scatter((turn.run as u64) << 20 | (depth as u64) << 8 | turn.rtt);
    let work = Work {
        write,
        block: 4096,
        from: base + place,
        span,
        random: Some(seed),
        depth,
        requests: if write {
            amounts.random_writes(turn.rtt)
        } else {
            u64::MAX
        },
        // A depth of one would take for ever.
        time: match write {
            true => 2 * amounts.random_time,
            false => amounts.random_time,
        },
        sync: write,
    };
    match tool {
        OURS => work.run(&turn.ours.open_volume()),
        SSHFS => work.run(&ours::open(&turn.sshfs.file("peer"), true)),
        _ => work.run(&turn.raw),
    }
}

/// A depth of one, at places that were not read before.
pub fn reads(turn: &Turn<'_>, base: u64, time: Duration) -> Work {
    let amounts = turn.rig.amounts;
    Work {
        write: false,
        block: 4096,
        from: base + amounts.places().read_by_chance,
        span: amounts.scattered,
        random: Some(scatter(77 + turn.run as u64)),
        depth: 1,
        requests: u64::MAX,
        time,
        sync: false,
    }
}
