//! Filesystems, loop devices and namespaces of this machine, on plain files. Needs root.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use e2ebak::error::Kind;
use e2ebak::host::mount::{Driver, mount_volume};
use e2ebak::host::privilege::Means;
use e2ebak::host::{mkfs, mount_table, namespace};
use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;

const MIB: u64 = 1 << 20;

/// A scratch directory in a mount namespace of this test's own, which takes every mount with it.
struct World {
    directory: tempfile::TempDir,
}

impl World {
    /// `None`, with the reason printed, where the test cannot run; a failure on CI.
    fn new() -> Option<World> {
        if Means::of_this_process() != Means::Root {
            assert!(
                std::env::var("CI").is_err(),
                "CI needs root and loop devices"
            );
            println!("skipped: needs root and loop devices");
            return None;
        }
        // SAFETY: not UnshareFlags::FILES.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.expect("unshared");
        let private = MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM;
        rustix::mount::mount_change("/", private).expect("private");
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("at")).expect("created");
        Some(World { directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

fn shell(script: &str, argument: &Path) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", script, "sh"])
        .arg(argument)
        .env("LC_ALL", "C");
    command
}

/// Runs `script` with the path as `$1`, and gives back what it printed.
fn printed(mut command: Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("it runs");
    let stdout = String::from_utf8(stdout).expect("text");
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}: {status} {stdout} {stderr}");
    stdout
}

fn run(script: &str, argument: &Path) -> String {
    printed(shell(script, argument))
}

/// Makes a file of noise, never zero anywhere, with an ext4 written into it.
fn noisy_ext4(path: &Path, size: u64) {
    let file = File::create_new(path).expect("created");
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = vec![0; MIB as usize];
    for block in 0..size / MIB {
        for word in noise.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all_at(&noise, block * MIB).expect("written");
    }
    let written = mkfs::make_ext4(size, "noise", None, &mut |offset, run| {
        Ok(file.write_all_at(run, offset)?)
    });
    assert!(written.expect("made") < size / 100 + MIB);
}

#[test]
fn the_least_and_a_common_size_of_ext4_stand_on_noise() {
    let Some(world) = World::new() else { return };
    for mebibytes in [32, 100, 500] {
        let image = world.path(&mebibytes.to_string());
        noisy_ext4(&image, mebibytes * MIB);
        run("e2fsck -fn $1 2>&1", &image);
        let features = run("dumpe2fs -h $1 2>/dev/null", &image);
        for word in ["has_journal", "metadata_csum", "resize_inode", "noise"] {
            assert!(
                features.contains(word),
                "{mebibytes} MiB lack {word}: {features}"
            );
        }
        fs::remove_file(&image).expect("removed");
    }
}

/// Fills it to the last block, empties half, fills it again, grows it: whatever the kernel and
/// resize2fs take for granted in blocks that were never written would show.
#[test]
fn a_full_gibibyte_of_ext4_stands_on_noise() {
    let Some(world) = World::new() else { return };
    let (image, at) = (world.path("image"), world.path("at"));
    noisy_ext4(&image, 1024 * MIB);
    let fill = "cd $1 && mkdir $2 && n=0 && while mkdir $2/d$n; do for i in $(seq 100); do \
        head -c $((i * i * 61)) /dev/urandom >$2/d$n/f$i || exit 0; done; n=$((n + 1)); done \
        2>/dev/null; true";
    let fill = |name: &str| {
        let mut command = shell(fill, &at);
        command.arg(name);
        printed(command);
        let free = run("df --output=avail -BM $1 | tail -1 | tr -d M", &at);
        assert!(
            free.trim().parse::<u64>().expect("a number") < 4,
            "{free} MiB are free"
        );
    };
    let sums = "cd $1 && find . -type f | sort | xargs sha256sum | sha256sum";

    let mut mounted = mount_volume(&image, &at, Driver::Kernel, false).expect("mounted");
    fill("first");
    run("rm -r $1/first/d*[02468]", &at);
    mounted.unmount().expect("unmounted");
    run("e2fsck -fn $1 2>&1", &image);

    let mut mounted = mount_volume(&image, &at, Driver::Kernel, false).expect("mounted");
    fill("second");
    let before = run(sums, &at);
    mounted.unmount().expect("unmounted");
    run("e2fsck -fn $1 2>&1", &image);

    // Growing over noise: the new room was never written either.
    run(
        "head -c 256M /dev/urandom >>$1 && e2fsck -fp $1 && resize2fs $1 2>&1 && e2fsck -fn $1 2>&1",
        &image,
    );
    let mut mounted = mount_volume(&image, &at, Driver::Kernel, false).expect("mounted");
    assert_eq!(run(sums, &at), before);
    fill("third");
    mounted.unmount().expect("unmounted");
    run("e2fsck -fn $1 2>&1", &image);
}

#[test]
fn a_loop_device_is_tuned_while_it_is_ours_and_leaves_nothing() {
    let Some(world) = World::new() else { return };
    let (image, at) = (world.path("image"), world.path("at"));
    noisy_ext4(&image, 64 * MIB);
    let mut mounted = mount_volume(&image, &at, Driver::Kernel, false).expect("mounted");
    let entry = mount_table::topmost(&at.canonicalize().expect("there")).expect("readable");
    let entry = entry.expect("mounted");
    assert_eq!(entry.kind, "ext4");
    let name = entry
        .source
        .file_name()
        .expect("a name")
        .to_str()
        .expect("text");
    let setting = |path: &str| {
        let text = fs::read_to_string(format!("/sys/block/{name}/{path}"));
        text.unwrap_or_default().trim().to_string()
    };
    // Freed with its last user, whatever happens to us; in flight many at once.
    assert_eq!(setting("loop/autoclear"), "1");
    assert_eq!(setting("loop/dio"), "1");
    assert_eq!(setting("bdi/strict_limit"), "1");
    assert_eq!(setting("queue/read_ahead_kb"), "8192");
    let dirty_max: u64 = setting("bdi/max_bytes").parse().expect("a number");
    assert!(dirty_max <= 64 * MIB, "{dirty_max}");
    let options = run("grep \" $1 \" /proc/self/mountinfo", mounted.at());
    for option in [
        "nosuid",
        "nodev",
        "noatime",
        "errors=remount-ro",
        "noinit_itable",
    ] {
        assert!(options.contains(option), "{option}: {options}");
    }

    mounted.unmount().expect("unmounted");
    assert!(!mounted.is_mounted());
    assert_ne!(setting("loop/backing_file"), image.to_str().expect("text"));
    assert_eq!(setting("bdi/strict_limit"), "0");
    assert_ne!(setting("queue/read_ahead_kb"), "8192");
}

#[test]
fn a_journal_left_behind_does_not_keep_a_read_only_mount_from_reading() {
    let Some(world) = World::new() else { return };
    let (image, at) = (world.path("image"), world.path("at"));
    noisy_ext4(&image, 64 * MIB);
    let mut mounted = mount_volume(&image, &at, Driver::Kernel, false).expect("mounted");
    run("echo kept >$1/file && sync -f $1", &at);
    // What a crash leaves: the file as it is while mounted.
    run("cp $1/image $1/crashed", world.directory.path());
    mounted.unmount().expect("unmounted");
    let crashed = world.path("crashed");
    assert!(run("dumpe2fs -h $1 2>/dev/null", &crashed).contains("needs_recovery"));

    // Read only for who uses the mount; the filesystem itself replays its journal into the file.
    let mut mounted = mount_volume(&crashed, &at, Driver::Kernel, true).expect("mounted");
    let options = run("grep \" $1 \" /proc/self/mountinfo", mounted.at());
    assert!(
        options.contains(" ro,") && !options.contains("norecovery"),
        "{options}"
    );
    assert_eq!(run("cat $1/file", &at), "kept\n");
    run("! touch $1/another 2>/dev/null", &at);
    mounted.unmount().expect("unmounted");
    assert!(!run("dumpe2fs -h $1 2>/dev/null", &crashed).contains("needs_recovery"));
}

#[test]
fn what_is_no_ext4_is_refused_and_leaves_no_loop_device() {
    let Some(world) = World::new() else { return };
    let image = world.path("image");
    fs::write(&image, vec![0x5a; MIB as usize]).expect("written");
    let error = mount_volume(&image, &world.path("at"), Driver::Kernel, false).unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
    assert!(
        error.report().contains("wrong fs type"),
        "{}",
        error.report()
    );
    assert_eq!(run("losetup -j $1", &image), "");

    let error = mount_volume(&image, &world.path("at"), Driver::Fuse2fs, false).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.report());
    let error = mount_volume(&image, &world.path("at"), Driver::Fuse2fs, true).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.report());
    assert!(error.chain().last().is_some_and(|said| !said.is_empty()));
}

// ---- Namespaces. Entered between fork and exec, where a process has one thread.

fn in_private(mut command: Command) -> Command {
    // SAFETY: enter_private allocates, which this libc's allocator allows after fork.
    unsafe {
        command.pre_exec(|| {
            namespace::enter_private(&[]).map(drop).map_err(|error| {
                eprintln!("{}", error.report());
                std::io::Error::from(&error)
            })
        });
    }
    command
}

#[test]
fn mounts_in_a_private_namespace_are_seen_by_nobody_and_those_of_the_host_go() {
    let Some(world) = World::new() else { return };
    // Shared, as systemd makes the host's mounts: else nothing would reach a slave.
    let shared = MountPropagationFlags::REC | MountPropagationFlags::SHARED;
    rustix::mount::mount_change("/", shared).expect("shared");
    let (at, disk) = (world.path("at"), world.path("disk"));
    fs::create_dir(&disk).expect("created");
    run("mount -t tmpfs disk $1", &disk);

    let inside = "mount -t tmpfs inside $1/at && touch $1/at/here && \
        stat -f -c %T /run/e2ebak && stat -c %a /run/e2ebak && \
        nsenter --mount=/proc/$PPID/task/$2/ns/mnt umount $1/disk && \
        grep -c \" $1/disk \" /proc/self/mountinfo; true";
    let mut command = in_private(shell(inside, world.directory.path()));
    command.arg(rustix::thread::gettid().as_raw_nonzero().to_string());
    assert_eq!(printed(command), "tmpfs\n700\n0\n");
    assert!(!at.join("here").exists());
}

#[test]
fn a_user_may_mount_in_his_namespace_and_stays_himself() {
    let Some(world) = World::new() else { return };
    run("chmod 755 $1", world.directory.path());
    let script = "id -u && id -g && grep CapAmb /proc/self/status && cat /proc/self/uid_map && \
        mount -t tmpfs x /tmp && touch /tmp/here && ls /tmp && losetup -f 2>&1";
    let mut command = shell(script, world.directory.path());
    command.uid(1000).gid(1000).env_remove("XDG_RUNTIME_DIR");
    let output = in_private(command).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let mut lines = said.lines();
    assert_eq!(lines.next(), Some("1000"), "{output:?}");
    assert_eq!(lines.next(), Some("1000"));
    // CAP_SYS_ADMIN is number 21, and nothing else is kept.
    assert_eq!(lines.next(), Some("CapAmb:\t0000000000200000"));
    let map: Vec<_> = lines.next().expect("a map").split_whitespace().collect();
    assert_eq!(map, ["1000", "1000", "1"]);
    let _ = fs::remove_dir("/tmp/e2ebak-1000");
}
