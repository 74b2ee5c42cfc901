//! fio writes, remembers what it wrote, and reads it back: on the ext4 of a mounted image, and on the
//! file of an export itself; before and after a remount.

mod common;
#[path = "exercise/volume.rs"]
#[allow(dead_code)]
mod volume;
#[path = "export/world.rs"]
#[allow(dead_code)]
mod world;

use std::path::Path;
use std::sync::Arc;

use common::{Place, Program, Sandbox, root_or_skip, run, tool, tool_or_skip};
use e2ebak::export::{Export, Options};
use e2ebak::remote::local::LocalStore;
use e2ebak::remote::{Access, Store};
use volume::{OFFSET, cached};
use world::World;

/// Of each file; E2EBAK_FIO_SIZE sets another one.
const SIZE_DEFAULT: &str = "24m";

/// In `directory`.
fn fio(directory: &Path, words: &[&str]) {
    let place = format!("--directory={}", directory.display());
    fio_on(&place, directory, words);
}

fn fio_on(place: &str, directory: &Path, words: &[&str]) {
    let size = std::env::var("E2EBAK_FIO_SIZE").unwrap_or(SIZE_DEFAULT.into());
    let mut fio = tool("fio");
    fio.args(["--ioengine=psync", "--verify=crc32c", "--verify_fatal=1"])
        .args(["--output-format=terse", "--randseed=1"])
        .arg(format!("--size={size}"))
        .arg(place);
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

/// The file that the loop device of a mount uses, without the loop device and the filesystem.
#[test]
fn fio_reads_what_it_wrote_to_the_exported_file() {
    const MIB: u64 = 1 << 20;
    if !tool_or_skip("fio") {
        return;
    }
    let Some(world) = World::new() else { return };
    let image = LocalStore::new(world.path("image"));
    image.create(OFFSET + 64 * MIB).expect("created");
    let directory = world.make_directory("fuse");
    let mounted = |work: &dyn Fn(&str)| {
        // Far less than is written.
        let device = image.open(Access::ReadWrite).expect("opens");
        let cache = Arc::new(cached(device, 4096, 2 * MIB));
        let export = Export::mount(cache.clone(), &directory, Options::default());
        let export = export.unwrap_or_else(|e| panic!("{}", e.report()));
        work(&format!("--filename={}", export.file().display()));
        export.unmount().expect("unmounted");
        cache.close().expect("closes");
    };
    let scratch = world.make_directory("states");
    let each_job = |place: &str, words: &[&str]| {
        // Each job has a half of the file.
        for (job, offset) in JOBS.into_iter().zip(["--offset=0", "--offset=32m"]) {
            let words = [job, &[offset, "--size=24m"], words].concat();
            fio_on(place, &scratch, &words);
        }
    };
    let of_the_file = ["--fallocate=none", "--allow_file_create=0"];
    mounted(&|place| each_job(place, &of_the_file));
    let again = [&of_the_file[..], &["--verify_only=1"]].concat();
    for _ in 0..2 {
        mounted(&|place| each_job(place, &again));
    }
    // That it can fail: a block that nobody wrote.
    let device = image.open(Access::ReadWrite).expect("opens");
    let damaged = OFFSET + 40 * MIB;
    device.write_all_at(&[1; 4096], damaged).expect("in range");
    drop(device);
    let blame = || mounted(&|place| each_job(place, &again));
    let blamed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(blame));
    assert!(blamed.is_err(), "fio does not see a damaged block");
}
