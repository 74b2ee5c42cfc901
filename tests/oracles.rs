//! fio writes, remembers what it wrote, and reads it back: on the ext4 of a mounted image, before and
//! after a remount.

mod common;

use std::path::Path;

use common::{Place, Program, Sandbox, root_or_skip, run, tool, tool_or_skip};

/// Of each file; E2EBAK_FIO_SIZE sets another one.
const SIZE_DEFAULT: &str = "24m";

fn fio(directory: &Path, words: &[&str]) {
    let size = std::env::var("E2EBAK_FIO_SIZE").unwrap_or(SIZE_DEFAULT.into());
    let mut fio = tool("fio");
    fio.args(["--ioengine=psync", "--verify=crc32c", "--verify_fatal=1"])
        .args(["--output-format=terse", "--randseed=1"])
        .arg(format!("--size={size}"))
        .arg(format!("--directory={}", directory.display()));
    run(fio.args(words).current_dir(directory));
}

/// Small writes at random with a sync now and then, and large ones in a row.
const JOBS: [&[&str]; 2] = [
    &[
        "--name=random",
        "--rw=randwrite",
        "--bs=512-24k",
        "--bs_unaligned=1",
        "--fdatasync=100",
    ],
    &["--name=sequential", "--rw=write", "--bs=1m"],
];

#[test]
fn fio_reads_what_it_wrote_also_after_a_remount() {
    if !root_or_skip() || !tool_or_skip("fio") {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    place.init("4G").ok();
    let at = sandbox.dir("mnt");
    place.program("mount").arg(&at).ok();
    for job in JOBS {
        fio(&at, job);
    }
    for _ in 0..2 {
        Program::new(&sandbox, "umount").arg(&at).ok();
        place.program("mount").arg(&at).ok();
        for job in JOBS {
            fio(&at, &[job, &["--verify_only=1"]].concat());
        }
    }
    // That it can fail: a byte that nobody wrote.
    let file = at.join("sequential.0.0");
    let damage = "printf x | dd of=\"$1\" bs=1 seek=1000000 conv=notrunc status=none";
    run(tool("env").args(["sh", "-c", damage, "sh"]).arg(&file));
    let job = [JOBS[1], &["--verify_only=1"]].concat();
    let blamed = std::panic::catch_unwind(|| fio(&at, &job));
    assert!(blamed.is_err(), "fio does not see a damaged byte");
    Program::new(&sandbox, "umount").arg(&at).ok();
    place.assert_closed();
}
