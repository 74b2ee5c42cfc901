//! On the filesystem in the image: one large file, and a tree of many small ones.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::tool;
use crate::ours::Ours;
use crate::peers::Sshfs;
use crate::report::{OURS, Report, SSHFS};
use crate::rig::Rig;
use crate::stop;
use crate::tree;
use crate::work::Work;

pub const READ: &str = "file on ext4, read";
pub const WRITE: &str = "file on ext4, write and fsync";
pub const UNPACK: &str = "unpack a source tree, sync";

/// The file's pages are written back and read ahead by the kernel. Beside it stands what sshfs
/// does with a file of its own: the rows of sequential I/O.
pub fn measure_file(rig: &Rig, rtt: u64, report: &mut Report) {
    let bytes = rig.amounts.there / 8;
    let ours = Ours::mount(rig, rtt);
    let file = File::create_new(ours.at.join("file")).expect("a file");
    let done = Work::sequential(true, 0, bytes, 1).run(&file);
    report.add(WRITE, rtt, OURS, "mb_per_s", done.mb_per_s(1 << 20));
    drop(file);
    ours.unmount();
    // Mounted anew, nothing of it is remembered.
    let ours = Ours::mount(rig, rtt);
    let path = ours.at.join("file");
    let done = Work::sequential(false, 0, bytes, 1).run(&File::open(&path).expect("a file"));
    report.add(READ, rtt, OURS, "mb_per_s", done.mb_per_s(1 << 20));
    std::fs::remove_file(path).expect("a file");
    ours.unmount();
}

/// Without a delay, and with the longest, in turns.
pub fn measure_unpacking(rig: &Rig, trips: &[u64], report: &mut Report) {
    rig.drop_peers();
    let quick = rig.args.quick;
    let all = rig.local("tree.tar");
    let count = if quick { 1_000 } else { 50_000 };
    let bytes = tree::write(&all, count);
    eprintln!("-- a tree of {count} files, {} MiB", bytes >> 20);
    let part = rig.local("part.tar");
    let longest = trips.iter().copied().max().unwrap_or(0);
    let mut trips = vec![0, longest];
    trips.dedup();
    for run in 0..rig.args.runs().min(3) {
        for &rtt in &trips {
            eprintln!("-- unpacking at {rtt} ms, run {}", run + 1);
            let ours = Ours::mount(rig, rtt);
            let took = unpack(&all, &ours.at);
            let mut add = |tool, metric, value| report.add(UNPACK, rtt, tool, metric, value);
            add(OURS, "seconds", took.as_secs_f64());
            add(OURS, "files_per_s", f64::from(count) / took.as_secs_f64());
            add(OURS, "rss_mib", crate::measure::peak_memory_mib(ours.pid));
            let _ = std::fs::remove_dir_all(ours.at.join("unpacked"));
            ours.unmount();

            // Each file takes sshfs several round trips: a part of the tree has to do.
            let few = match (quick, rtt) {
                (true, _) => 20,
                (false, 0) => 5_000,
                (false, _) => 100,
            };
            tree::write(&part, few);
            let sshfs = Sshfs::mount(rig, rtt);
            let took = unpack(&part, &sshfs.at);
            add(SSHFS, "files_per_s", f64::from(few) / took.as_secs_f64());
            drop(sshfs);
            let _ = std::fs::remove_dir_all(rig.stored("unpacked"));
        }
    }
}

fn unpack(tar: &Path, into: &Path) -> Duration {
    let at = into.join("unpacked");
    std::fs::create_dir(&at).expect("a directory");
    let start = Instant::now();
    patiently(tool("tar").arg("-xf").arg(tar).arg("-C").arg(&at));
    patiently(tool("sync").arg("-f").arg(&at));
    start.elapsed()
}

/// Runs it to its end, or to a signal.
pub fn patiently(command: &mut Command) {
    let mut child = command.stdin(Stdio::null()).spawn().expect("starts");
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            stop::check();
            assert!(status.success(), "{command:?}: {status}");
            return;
        }
        if stop::asked() {
            let _ = child.kill();
            let _ = child.wait();
            stop::check();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
