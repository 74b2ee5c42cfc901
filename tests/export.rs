//! An exported device as other processes see it: through the kernel's FUSE, a loop device and
//! ext4 on top. Needs root and `/dev/fuse`.
//!
//! Whoever serves a mount must not touch it, so everything that looks at one runs in a child: dd,
//! umount, or this test binary again in a [`role`].

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use e2ebak::error::Kind;
use e2ebak::export::{Export, Options, abort_connection};
use e2ebak::host::View;
use e2ebak::host::keeper::Keeper;
use e2ebak::host::mount::{Driver, mount_volume};
use e2ebak::host::namespace;
use e2ebak::host::privilege::Means;

use rustix::process::{Pid, Signal};

#[path = "export/world.rs"]
mod world;

use world::*;

// ---- One file.

#[test]
fn the_file_is_the_device() {
    let Some(world) = World::new() else { return };
    let rig = world.rig();
    let start = noise(7, rig.size as usize);
    rig.file.write_all_at(&start, 0).expect("written");
    let export = world.export(rig.clone(), Options::default());
    let listing = "test \"$(stat -c '%s %a %u' $1)\" = '4194304 600 0' && \
                   test \"$(ls -a ${1%/*})\" = \"$(printf '.\n..\nvolume')\"";
    do_or_panic(listing, &export.file());

    let status = role("role_use_the_file", &export.file()).status();
    assert!(status.expect("runs").success());
    assert!(
        rig.flushes.load(Ordering::SeqCst) >= 10,
        "one for each fsync"
    );
    let model = fs::read(world.path("model")).expect("the role left it");
    assert!(fs::read(world.path("image")).expect("read") == model);
    export.unmount().expect("unmounted");
    assert!(!export.file().exists());
    export.unmount().expect("twice is no error");
}

/// Reads and writes at odd places and lengths, and leaves what the file must hold now.
#[test]
fn role_use_the_file() {
    let Some(path) = role_argument() else { return };
    let file = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .expect("opens");
    let mut model = fs::read(&path).expect("read whole");
    let mut dice = noise(3, 1 << 16).into_iter();
    let mut roll = |below: usize| {
        let bytes: [u8; 4] = std::array::from_fn(|_| dice.next().expect("enough dice"));
        u32::from_le_bytes(bytes) as usize % below
    };
    for step in 0..1000 {
        let offset = roll(model.len());
        let len = roll(600_000).min(model.len() - offset);
        if roll(2) == 0 {
            let data = noise(step, len);
            file.write_all_at(&data, offset as u64).expect("written");
            model[offset..offset + len].copy_from_slice(&data);
        } else {
            let mut data = vec![0; len];
            file.read_exact_at(&mut data, offset as u64).expect("read");
            assert!(data == model[offset..offset + len], "{len} at {offset}");
        }
        if step % 100 == 0 {
            file.sync_all().expect("synced");
        }
    }
    let beyond = file
        .read_at(&mut [0; 10], model.len() as u64 - 4)
        .expect("read");
    assert_eq!(beyond, 4);
    file.write_all_at(&[1; 8], model.len() as u64 - 4)
        .expect_err("no room");
    let world = path
        .parent()
        .and_then(Path::parent)
        .expect("above the mount");
    fs::write(world.join("model"), model).expect("written");
}

#[test]
fn a_read_that_waits_holds_up_nobody() {
    let Some(world) = World::new() else { return };
    let rig = world.rig();
    let export = world.export(rig.clone(), Options::default());
    rig.set_gate(Some(0..MIB));
    let read = "dd if=$1 of=/dev/null bs=4096 count=1 skip=";
    let mut waiting: Vec<Child> = (0..40)
        .map(|block| {
            let child = shell(&format!("{read}{block} 2>&1"), &export.file())
                .stdout(Stdio::null())
                .spawn();
            child.expect("sh runs")
        })
        .collect();
    eventually("40 reads wait", || rig.waiting.load(Ordering::SeqCst) == 40);

    let start = Instant::now();
    do_or_panic(&format!("{read}300"), &export.file());
    do_or_panic(
        "dd if=/dev/zero of=$1 bs=64k seek=20 count=20 conv=notrunc,fsync",
        &export.file(),
    );
    do_or_panic("stat $1", &export.file());
    assert!(start.elapsed() < SOON / 2);
    assert!(
        waiting
            .iter_mut()
            .all(|child| child.try_wait().expect("ours").is_none())
    );
    rig.set_gate(None);
    for mut child in waiting {
        assert!(child.wait().expect("ours").success());
    }
    export.unmount().expect("unmounted");
}

#[test]
fn each_failure_has_its_errno() {
    let Some(world) = World::new() else { return };
    let rig = world.rig();
    let export = world.export(rig.clone(), Options::default());
    let (read, write) = (
        "dd if=$1 of=/dev/null count=1",
        "dd if=/dev/zero of=$1 count=1 conv=notrunc",
    );
    for (kind, script, said) in [
        (Kind::Disconnected, read, "Input/output error"),
        (Kind::Corrupt, read, "Input/output error"),
        (Kind::NoSpace, write, "No space left on device"),
        (Kind::ReadOnly, write, "Read-only file system"),
        (
            Kind::TimedOut,
            "dd if=/dev/null of=$1 conv=notrunc,fsync",
            "Input/output error",
        ),
    ] {
        *rig.failing.lock().unwrap() = Some(kind);
        let (done, text) = say(script, &export.file());
        assert!(!done && text.contains(said), "{kind:?}: {text}");
    }
    *rig.failing.lock().unwrap() = None;
    do_or_panic(read, &export.file());
    export.unmount().expect("unmounted");
}

#[test]
fn holes_sizes_names_and_modes_cannot_be_made() {
    let Some(world) = World::new() else { return };
    let export = world.export(world.rig(), Options::default());
    for (script, said) in [
        (
            "fallocate --punch-hole --offset 0 --length 4096 $1",
            "supported",
        ),
        (
            "fallocate --zero-range --offset 0 --length 4096 $1",
            "supported",
        ),
        ("fallocate --length 8M $1", "supported"),
        ("truncate -s 8M $1", "supported"),
        ("truncate -s 0 $1", "Operation not permitted"),
        ("chmod 666 $1", "Operation not permitted"),
        ("touch $1.new", "not implemented"),
        ("rm $1", "not implemented"),
    ] {
        let (done, text) = say(script, &export.file());
        assert!(!done && text.contains(said), "{script}: {text}");
    }
    do_or_panic("truncate -s 4M $1 && touch $1", &export.file());
    export.unmount().expect("unmounted");
}

#[test]
fn read_only_is_read_only() {
    let Some(world) = World::new() else { return };
    let options = Options {
        read_only: true,
        ..Options::default()
    };
    let export = world.export(world.rig(), options);
    do_or_panic(
        "dd if=$1 of=/dev/null && test $(stat -c %a $1) = 400",
        &export.file(),
    );
    let (done, text) = say("dd if=/dev/zero of=$1 count=1 conv=notrunc", &export.file());
    assert!(!done && text.contains("Read-only file system"), "{text}");
    export.unmount().expect("unmounted");

    // A device that cannot be written is exported read-only without being asked.
    let mut rig = Arc::into_inner(world.rig()).expect("ours alone");
    rig.writable = false;
    let export = Export::mount(Arc::new(rig), &world.path("fuse"), Options::default());
    let export = export.expect("exported");
    assert!(!say("dd if=/dev/zero of=$1 count=1 conv=notrunc", &export.file()).0);
}

#[test]
fn who_does_not_own_it_does_not_see_it() {
    let Some(world) = World::new() else { return };
    let export = world.export(world.rig(), Options::default());
    fs::set_permissions(world.directory.path(), PermissionsExt::from_mode(0o755)).expect("set");
    let output = shell("cat $1", &export.file())
        .uid(1000)
        .gid(1000)
        .output()
        .expect("runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Permission denied"), "{said}");
    export.unmount().expect("unmounted");
}

// ---- How it ends.

#[test]
fn a_held_file_keeps_the_mount_and_dropping_takes_it_out_of_sight() {
    let Some(world) = World::new() else { return };
    let export = world.export(world.rig(), Options::default());
    let mut holder = shell("exec sleep 60 <$1", &export.file())
        .spawn()
        .expect("runs");
    std::thread::sleep(Duration::from_millis(200));
    let error = export.unmount().unwrap_err();
    assert_eq!(error.kind(), Kind::InUse);
    do_or_panic("dd if=$1 of=/dev/null count=1", &export.file());

    let file = export.file();
    drop(export);
    assert!(!file.exists());
    holder.kill().expect("killed");
    holder.wait().expect("reaped");
}

/// The mount is in a namespace that has other members; whoever killed the keeper has taken the way in.
#[test]
fn it_ends_although_its_keeper_was_killed() {
    let Some(world) = World::new() else { return };
    let mut member = Command::new("unshare")
        .args(["--mount", "sh", "-c", "echo; exec sleep 600"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("runs");
    let mut line = String::new();
    let mut said = BufReader::new(member.stdout.take().expect("piped"));
    said.read_line(&mut line).expect("a line");
    let keeper = Keeper::start(View::Of(member.id())).expect("starts");
    let View::Of(number) = keeper.view() else {
        panic!("it keeps our own namespace");
    };
    let options = Options {
        view: keeper.view(),
        ..Options::default()
    };
    let export = Arc::new(world.export(world.rig(), options));
    let dead = Pid::from_raw(number as i32).expect("a number");
    rustix::process::kill_process(dead, Signal::KILL).expect("killed");
    eventually("the keeper is dead", || {
        fs::read(format!("/proc/{number}/mountinfo")).is_err()
    });
    let (sender, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(export.unmount()));
    let outcome = ended.recv_timeout(SOON);
    member.kill().expect("killed");
    member.wait().expect("reaped");
    outcome.expect("it ends").expect("in order");
}

#[test]
fn an_abort_frees_who_waits_for_a_device_that_hangs() {
    let Some(world) = World::new() else { return };
    let rig = world.rig();
    let export = world.export(rig.clone(), Options::default());
    rig.set_gate(Some(0..MIB));
    let read = || shell("exec dd if=$1 of=/dev/null count=1", &export.file()).spawn();
    let mut reader = read().expect("runs");
    eventually("a read waits", || rig.waiting.load(Ordering::SeqCst) == 1);
    // Unkillable, as it waits for an answer that does not come.
    reader.kill().expect("sent");
    std::thread::sleep(Duration::from_millis(200));
    assert!(
        reader.try_wait().expect("ours").is_none(),
        "if this ends, the test tests nothing"
    );

    export.abort().expect("aborted");
    reader.wait().expect("it ends");
    assert!(export.wait_closed(SOON));
    rig.set_gate(None);
    export.unmount().expect("nothing left to unmount");
}

#[test]
fn an_abort_by_number_works_or_says_what_would() {
    let Some(world) = World::new() else { return };
    let export = world.export(world.rig(), Options::default());
    match abort_connection(export.connection()) {
        Ok(()) => assert!(export.wait_closed(SOON)),
        Err(error) => {
            assert_eq!(error.kind(), Kind::NotFound, "{}", error.report());
            assert!(!Path::new("/sys/fs/fuse/connections/").join("*").exists());
            assert!(error.deepest_hint().is_some());
        }
    }
    assert_eq!(
        abort_connection(u32::MAX).unwrap_err().kind(),
        Kind::NotFound
    );
}

// ---- With a filesystem on top.

const FILL: &str = "for i in $(seq 200); do \
    mkdir -p $1/d$((i % 7)) && head -c $((i * 997)) /dev/urandom >$1/d$((i % 7))/f$i || exit 1; \
    done; cd $1 && find d* -type f | sort | xargs sha256sum >sums && sync -f .";

const CHECK: &str = "cd $1 && sha256sum --quiet -c sums && test $(wc -l <sums) = 200";

fn fsck(image: &Path) {
    do_or_panic("e2fsck -fn $1 2>&1", image);
}

#[test]
fn a_plain_umount_is_heard_and_leaves_a_clean_filesystem_over_noise() {
    let Some(world) = World::new() else { return };
    let rig = noisy_ext4(&world.path("image"), 64 * MIB);
    let export = world.export(rig.clone(), Options::default());
    let at = world.make_directory("at");
    let mut mounted = mount_volume(&export.file(), &at, Driver::Kernel, false).expect("mounted");
    assert!(mounted.is_mounted() && !export.wait_closed(Duration::ZERO));
    do_or_panic(FILL, &at);
    // fstrim says it is done, as the block layer hides our refusal; but the bytes stay.
    let trim = "yes 'still there' | head -c 100k >$1/gone && sync -f $1 && rm $1/gone && \
                sync -f $1 && fstrim $1";
    do_or_panic(trim, &at);
    do_or_panic("grep -aq 'still there' $1", &world.path("image"));
    assert!(
        !export.wait_closed(Duration::from_millis(500)),
        "still mounted"
    );

    do_or_panic("umount $1", &at);
    assert!(export.wait_closed(SOON));
    assert!(!mounted.is_mounted());
    mounted
        .unmount()
        .expect("somebody was faster, which is fine");
    export.unmount().expect("unmounted");
    assert!(rig.flushes.load(Ordering::SeqCst) > 0);
    assert_eq!(loop_devices_on(world.directory.path()), [""; 0]);
    fsck(&world.path("image"));
}

#[test]
fn two_sessions_at_once_do_not_meet() {
    let Some(world) = World::new() else { return };
    let sessions: Vec<_> = ["one", "two"]
        .map(|name| {
            let rig = noisy_ext4(&world.path(&format!("{name}.image")), 64 * MIB);
            let fuse = world.make_directory(&format!("{name}.fuse"));
            let export = Export::mount(rig, &fuse, Options::default()).expect("exported");
            let at = world.make_directory(name);
            let mounted = mount_volume(&export.file(), &at, Driver::Kernel, false);
            (export, mounted.expect("mounted"))
        })
        .into();
    assert_ne!(sessions[0].0.connection(), sessions[1].0.connection());
    std::thread::scope(|scope| {
        for (_, mounted) in &sessions {
            scope.spawn(|| do_or_panic(FILL, mounted.at()));
        }
    });
    for (export, mut mounted) in sessions {
        do_or_panic(CHECK, mounted.at());
        mounted.unmount().expect("unmounted");
        export.unmount().expect("unmounted");
    }
    fsck(&world.path("one.image"));
    fsck(&world.path("two.image"));
    assert_eq!(loop_devices_on(world.directory.path()), [""; 0]);
}

#[test]
fn who_holds_a_mount_is_named_and_a_read_only_mount_reads() {
    let Some(world) = World::new() else { return };
    let rig = noisy_ext4(&world.path("image"), 64 * MIB);
    let export = world.export(rig, Options::default());
    let at = world.make_directory("at");
    let mut mounted = mount_volume(&export.file(), &at, Driver::Kernel, false).expect("mounted");
    let mut holder = shell("cd $1 && exec sleep 60", &at).spawn().expect("runs");
    do_or_panic(FILL, &at);
    let error = mounted.unmount().unwrap_err();
    assert_eq!(error.kind(), Kind::InUse);
    let named = format!("held by sleep (pid {})", holder.id());
    assert!(error.report().contains(&named), "{}", error.report());
    holder.kill().expect("killed");
    holder.wait().expect("reaped");
    let again = mount_volume(&export.file(), &at, Driver::Kernel, false);
    assert_eq!(
        again.unwrap_err().kind(),
        Kind::InUse,
        "the mountpoint is taken"
    );
    mounted.unmount().expect("unmounted");
    export.unmount().expect("unmounted");

    let options = Options {
        read_only: true,
        ..Options::default()
    };
    let rig = Rig::new(&world.path("image"), 64 * MIB);
    let export = Export::mount(rig, &world.path("fuse"), options).expect("exported");
    let mut mounted = mount_volume(&export.file(), &at, Driver::Kernel, true).expect("mounted");
    do_or_panic(CHECK, &at);
    assert!(!say("touch $1/new", &at).0);
    mounted.unmount().expect("unmounted");
    export.unmount().expect("unmounted");
}

// ---- In a process of its own.

/// Serves and mounts the image in the directory that is its argument, tells when it is ready, and
/// waits to be killed, or for an end of its input to unmount.
#[test]
fn role_serve() {
    let Some(world) = role_argument() else { return };
    let driver = match rustix::process::geteuid().is_root() {
        true => Driver::Kernel,
        false => Driver::Fuse2fs,
    };
    let size = fs::metadata(world.join("image")).expect("the image").len();
    let rig = Rig::new(&world.join("image"), size);
    if driver == Driver::Fuse2fs {
        format(&rig); // by the user himself, so that its root directory is his
    }
    let export = Export::mount(rig, &world.join("fuse"), Options::default()).expect("exported");
    let at = world.join("at");
    let mut mounted = mount_volume(&export.file(), &at, driver, false).expect("mounted");
    do_or_panic(FILL, &at);
    do_or_panic(CHECK, &at);
    println!("\nready");
    std::io::stdin().lines().for_each(drop);
    mounted.unmount().expect("unmounted");
    export.unmount().expect("unmounted");
}

/// Starts [`role_serve`] in a private namespace and waits until it is ready.
fn serve(world: &World, user: u32) -> Child {
    let mut command = role("role_serve", world.directory.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    if user != 0 {
        command.uid(user).gid(user).env_remove("XDG_RUNTIME_DIR");
    }
    // SAFETY: the child of a fork has one thread, as enter_private wants; that it allocates there
    // is allowed by this libc, whose allocator is safe after fork.
    unsafe {
        command.pre_exec(|| {
            namespace::enter_private(&[]).map(drop).map_err(|error| {
                eprintln!("{}", error.report());
                std::io::Error::from(&error)
            })
        });
    }
    let mut child = command.spawn().expect("this binary runs again");
    let mut lines = BufReader::new(child.stdout.as_mut().expect("piped")).lines();
    let ready = lines.any(|line| line.is_ok_and(|line| line == "ready"));
    assert!(ready, "the server ended early: {:?}", child.wait());
    child
}

/// Processes with the path among their arguments.
fn processes_about(path: &Path) -> Vec<String> {
    let path = path.to_str().expect("text");
    let processes = fs::read_dir("/proc").expect("readable").flatten();
    let lines = processes.filter_map(|process| {
        let number = process.file_name().to_str()?.parse::<u32>().ok()?;
        let line = fs::read_to_string(process.path().join("cmdline")).ok()?;
        let about = number != std::process::id() && line.contains(path);
        about.then(|| line.replace('\0', " "))
    });
    lines.collect()
}

#[test]
fn a_killed_server_leaves_nothing_but_what_was_synced() {
    let Some(world) = World::new() else { return };
    drop(noisy_ext4(&world.path("image"), 64 * MIB));
    world.make_directory("fuse");
    let at = world.make_directory("at");
    let mut child = serve(&world, 0);
    assert_eq!(loop_devices_on(world.directory.path()).len(), 1);
    assert!(!at.join("sums").exists(), "mounted where everybody sees it");
    child.kill().expect("killed");
    child.wait().expect("reaped");

    eventually("the loop device is free", || {
        loop_devices_on(world.directory.path()).is_empty()
    });
    assert_eq!(processes_about(world.directory.path()), [""; 0]);
    // The journal is all that tells a killed session from a finished one.
    do_or_panic("e2fsck -fp $1; test $? -le 1", &world.path("image"));
    fsck(&world.path("image"));
    do_or_panic("mount -o loop $1 ${1%/*}/at", &world.path("image"));
    do_or_panic(CHECK, &at);
    do_or_panic("umount $1", &at);
}

/// Exports the image in the directory that is its argument, lets a child read it, and unmounts.
#[test]
fn role_export() {
    let Some(world) = role_argument() else { return };
    assert_eq!(Means::of_this_process(), Means::UserNamespace);
    let rig = Rig::new(&world.join("image"), 4 * MIB);
    let export = Export::mount(rig, &world.join("fuse"), Options::default()).expect("exported");
    do_or_panic("cmp $1 ${1%/fuse/volume}/image", &export.file());
    let mut holder = shell("exec sleep 60 <$1", &export.file())
        .spawn()
        .expect("runs");
    std::thread::sleep(Duration::from_millis(200));
    holder.kill().expect("killed");
    holder.wait().expect("reaped");
    assert!(export.wait_closed(SOON));
    export.unmount().expect("unmounted");
    assert!(!export.file().exists());
}

/// What udev and the installation of fuse3 do on systems where users may mount.
fn let_users_mount(world: &World) {
    let script = "mount -t tmpfs tmpfs $1 && mknod -m 666 $1/fuse c 10 229 && \
                  mount --bind $1/fuse /dev/fuse";
    do_or_panic(script, &world.make_directory("dev"));
}

#[test]
fn without_namespaces_fusermount_mounts_and_unmounts() {
    let Some(world) = World::new() else { return };
    let_users_mount(&world);
    drop(noisy(&world.path("image"), 4 * MIB));
    world.make_directory("fuse");
    do_or_panic(
        "chmod 755 $1 && chown 1000:1000 $1/image $1/fuse",
        world.directory.path(),
    );
    let mut command = role("role_export", world.directory.path());
    let status = command.uid(1000).gid(1000).status();
    assert!(status.expect("runs").success());
}

#[test]
fn an_ordinary_user_mounts_in_a_namespace_of_his_own() {
    let Some(world) = World::new() else { return };
    const USER: u32 = 1000;
    let_users_mount(&world);
    drop(noisy(&world.path("image"), 64 * MIB));
    for name in ["fuse", "at"] {
        world.make_directory(name);
    }
    do_or_panic(
        "chmod 755 $1 && chown -R 1000:1000 $1/image $1/fuse $1/at",
        world.directory.path(),
    );
    let mut child = serve(&world, USER);
    let fuse2fs = || !processes_about(&world.path("at")).is_empty();
    assert!(fuse2fs());
    drop(child.stdin.take());
    assert!(child.wait().expect("ours").success());
    fsck(&world.path("image"));

    do_or_panic("mount -o loop $1 ${1%/*}/at", &world.path("image"));
    do_or_panic(CHECK, &world.path("at"));
    do_or_panic("rm -r $1/d* $1/sums; umount $1", &world.path("at"));

    let mut child = serve(&world, USER);
    child.kill().expect("killed");
    child.wait().expect("reaped");
    eventually("fuse2fs died with its parent", || !fuse2fs());
    let _ = fs::remove_dir("/tmp/e2ebak-1000"); // the runtime directory, if nobody else uses it
}
