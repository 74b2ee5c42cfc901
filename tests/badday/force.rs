//! `umount --force`: whatever the session and its server do, the mountpoint is free afterwards.

use super::*;

/// A mount with something synced and something that is not.
fn mounted(place: &Place) -> PathBuf {
    let at = place.sandbox.dir("mnt");
    place.init("10G").ok();
    place.program("mount").arg(&at).ok();
    fs::write(at.join("synced"), "content").expect("written");
    run(tool("sync").arg("-f").arg(at.join("synced")));
    large_file(&at.join("not synced"), 8 * MIB, 1);
    at
}

fn find(sandbox: &Sandbox, words: &str) -> u32 {
    let processes = sandbox.processes();
    let found = processes.iter().find(|(_, line)| line.contains(words));
    found
        .unwrap_or_else(|| panic!("no {words}: {processes:?}"))
        .0
}

fn forced(sandbox: &Sandbox, at: &Path) -> Ran {
    let ran = Program::new(sandbox, "umount").arg("--force").arg(at).run();
    assert!(ran.took < Duration::from_secs(60), "{ran}");
    ran
}

/// Nothing is left, and what was synced is there at the next mount.
fn is_free(place: &Place, at: &Path) {
    place.sandbox.assert_nothing_left();
    place.program("mount").arg(at).ok();
    assert_eq!(fs::read(at.join("synced")).expect("there"), b"content");
    Program::new(place.sandbox, "umount").arg(at).ok();
    place.assert_closed();
}

#[test]
fn a_dead_session_is_cleared_away() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let at = mounted(&place);
    sandbox.kill_processes();
    forced(&sandbox, &at).code(3).says("lost");
    is_free(&place, &at);
}

#[test]
fn a_stopped_session_is_waited_for_and_by_force_is_not() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let at = mounted(&place);
    common::kill(find(&sandbox, "session-process"), Signal::STOP);
    let patient = Program::new(&sandbox, "umount").arg(&at).spawn();
    patient.until_says("--force");
    forced(&sandbox, &at).code(3).says("ended by force");
    assert!(!patient.wait().status.success());
    is_free(&place, &at);
}

#[test]
fn a_session_whose_server_is_frozen_is_ended_by_force() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let at = mounted(&place);
    common::kill(find(&sandbox, "sftp-server -e"), Signal::STOP);
    // What a user does first, and what then keeps the session busy.
    let mut plain = tool("umount").arg(&at).spawn().expect("umount runs");
    let patient = Program::new(&sandbox, "umount").arg(&at).spawn();
    patient.until_says("--force");
    forced(&sandbox, &at).code(3).says("lost");
    drop(patient);
    let _ = plain.wait().expect("it ends");
    is_free(&place, &at);
}

/// A server that answers loses nothing, though somebody has a file open.
#[test]
fn a_busy_mount_goes_by_force_and_loses_nothing() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let at = mounted(&place);
    large_file(&sandbox.path("expected"), 8 * MIB, 1);
    let holder = File::open(at.join("not synced")).expect("opened");
    let umount = Program::new(&sandbox, "umount").arg(&at);
    umount.run().code(11).says("held by");
    let ran = forced(&sandbox, &at).code_of(&[1, 3, 11]);
    assert!(!sandbox.mounts().contains(&at), "{ran}");
    drop(holder);
    sandbox.assert_nothing_left();
    place.program("mount").arg(&at).ok();
    run(tool("cmp")
        .arg(sandbox.path("expected"))
        .arg(at.join("not synced")));
    Program::new(&sandbox, "umount").arg(&at).ok();
    place.assert_closed();
}

/// A container or `unshare --mount` that began meanwhile has copies of all mounts.
#[test]
fn a_copy_of_the_mount_in_another_namespace_hangs_nobody() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let at = mounted(&place);
    // Of the volume's file alone: where the filesystem is copied as well, it stays mounted.
    let script = "umount \"$1\"; : > \"$2\"; exec sleep 600";
    let ready = sandbox.path("ready");
    let mut elsewhere = common::private_shell(script);
    let mut elsewhere = elsewhere
        .arg("sh")
        .arg(&at)
        .arg(&ready)
        .spawn()
        .expect("runs");
    common::wait_for("a namespace", Duration::from_secs(30), || ready.exists());
    let ran = Program::new(&sandbox, "umount").arg(&at).run();
    let _ = elsewhere.kill();
    let _ = elsewhere.wait();
    assert!(ran.took < Duration::from_secs(60), "{ran}");
    ran.code(0);
    is_free(&place, &at);
}
