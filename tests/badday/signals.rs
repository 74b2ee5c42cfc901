//! Signals and kills at any moment.

use super::*;

fn backup_that_takes_a_while(place: &Place) -> Running {
    place.backup(&place.sandbox.path("source")).spawn()
}

fn source_for_a_while(sandbox: &Sandbox) -> PathBuf {
    let source = sandbox.dir("source");
    plain_tree(&source, 300);
    large_file(&source.join("large"), 150 * MIB, 1);
    source
}

/// The moments: from before the passphrase is read to the middle of the copying and beyond.
const MOMENTS_MS: [u64; 10] = [2, 20, 60, 120, 200, 350, 500, 800, 1200, 2000];

#[test]
fn a_signal_at_any_moment_tears_down_in_order() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    let source = source_for_a_while(&sandbox);
    place.init("100G").ok();
    let mut published = 0;
    for (i, moment) in MOMENTS_MS.into_iter().enumerate() {
        let backup = backup_that_takes_a_while(&place);
        std::thread::sleep(Duration::from_millis(moment));
        // By turns to the process and, as Ctrl-C does, to its whole group.
        match i % 3 {
            0 => backup.signal_group(Signal::INT),
            1 => backup.signal(Signal::TERM),
            _ => backup.signal_group(Signal::TERM),
        }
        let ran = backup.wait();
        match interrupted(&ran, moment) {
            true => {}
            false => published += 1,
        }
        place.assert_closed();
    }
    assert!(published < MOMENTS_MS.len(), "no moment was early enough");
    assert_eq!(place.ids().len(), published);
    place.backup(&source).ok();
    place.assert_latest_is(&source);
    place.assert_closed();
}

/// Whether the run was interrupted; it may also have been done before the signal came.
fn interrupted(ran: &Ran, moment: u64) -> bool {
    // Ctrl-C breaks no connection of ours, whatever ssh would do.
    let broken = "may still reach the server";
    assert!(!ran.to_string().contains(broken), "{ran}");
    match ran.status.code() {
        Some(130) => true,
        Some(0) => false,
        // Before the handler stands, the kernel's default ends the process.
        None if moment <= 30 => true,
        _ => panic!("after a signal at {moment} ms: {ran}"),
    }
}

#[test]
fn an_interrupted_init_leaves_no_half_image() {
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    for moment in [2, 30, 80, 150, 300, 600] {
        let init = place.init("5T").spawn();
        std::thread::sleep(Duration::from_millis(moment));
        init.signal_group(Signal::INT);
        if interrupted(&init.wait(), moment) {
            assert!(!place.stored.exists(), "half an image after {moment} ms");
        } else {
            place.program("snapshots").ok();
            fs::remove_file(&place.stored).expect("removed");
        }
        place.assert_closed();
    }
    place.init("5T").ok();
}

#[test]
fn after_sigkill_the_next_run_clears_the_lease_and_resumes() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let source = source_for_a_while(&sandbox);
    place.init("100G").ok();
    let unsaved = common::stored_bytes(&place.stored);
    for everything in [false, true] {
        let backup = backup_that_takes_a_while(&place);
        wait_for("half of the data", Duration::from_secs(60), || {
            common::stored_bytes(&place.stored) > unsaved + 80 * MIB
        });
        if everything {
            sandbox.kill_processes();
        } else {
            backup.signal(Signal::KILL);
        }
        drop(backup);
        wait_for("the end of its processes", Duration::from_secs(30), || {
            sandbox.processes().is_empty()
        });
        sandbox.assert_nothing_left();
        assert_eq!(place.ids().len(), 0);
    }
    let ran = place.backup(&source).arg("--json").ok();
    let summary = ran.stdout.lines().last().expect("a summary");
    let summary: serde_json::Value = serde_json::from_str(summary).expect("JSON");
    let sent = summary["sent_bytes"].as_u64().expect("sent_bytes");
    eprintln!("sent after two kills: {} MiB of 150", sent / MIB);
    let restored = sandbox.path("restored");
    place
        .restore(&format!("latest:{}", source.display()), &restored)
        .ok();
    assert_same_tree(&source, &restored);
    assert_eq!(place.ids().len(), 1);
    place.assert_closed();
}

/// What has arrived before a kill is not copied again.
#[test]
fn an_interrupted_run_is_taken_up_not_started_over() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let source = sandbox.dir("source");
    // Twice what may be under way in the kernel's page cache and ours.
    for i in 0..200 {
        large_file(&source.join(format!("{i:03}")), 2 * MIB, i);
    }
    place.init("100G").ok();
    let empty = common::stored_bytes(&place.stored);
    let backup = place.backup(&source).spawn();
    wait_for("a part of the data", Duration::from_secs(60), || {
        common::stored_bytes(&place.stored) > empty + 100 * MIB
    });
    backup.signal(Signal::TERM);
    if backup.wait().code_of(&[0, 130]).status.code() == Some(0) {
        panic!("the backup was done before it could be interrupted");
    }
    let ran = place.backup(&source).ok();
    assert!(ran.took < Duration::from_secs(120), "{ran}");
    let new_bytes = place.snapshots()[0]["new_bytes"]
        .as_u64()
        .expect("new_bytes");
    assert!(new_bytes < 320 * MIB, "{new_bytes} bytes were copied again");
    let stored = common::stored_bytes(&place.stored) - empty;
    assert!(stored < 480 * MIB, "400 MiB take {} MiB", stored / MIB);
    place.assert_latest_is(&source);
    place.assert_closed();
}

/// Nobody is there to hear how a session in the background has failed; the next to come is told.
#[test]
fn a_daemon_that_could_not_sync_is_found_out() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    place.init("10G").ok();
    let mounted = sandbox.dir("mnt");
    let mount = place.program("mount").arg(&mounted);
    mount.args(["--io-deadline", "0"]).ok();
    fs::write(mounted.join("never synced"), "content").expect("written");
    sshd.cut_sessions();
    // It succeeds or not, as the kernel likes: the filesystem has turned read-only.
    let _ = tool("umount").arg(&mounted).output();
    let umount = || Program::new(&sandbox, "umount").arg(&mounted);
    wait_for("the session has ended", Duration::from_secs(60), || {
        sandbox
            .processes()
            .iter()
            .all(|(_, line)| !line.contains("session-process"))
    });
    umount().run().code(14).says("the session has failed");
    umount().run().code(1).says("nothing of yours is mounted");
    place.program("mount").arg(&mounted).ok();
    umount().ok();
}

/// A filesystem that can no longer be synced still goes, and the failure is told.
#[test]
fn a_mount_whose_link_broke_can_be_unmounted() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    place.init("10G").ok();
    let mounted = sandbox.dir("mnt");
    let mount = place.program("mount").arg(&mounted);
    mount.args(["--io-deadline", "0"]).ok();
    fs::write(mounted.join("never synced"), "content").expect("written");
    sshd.cut_sessions();
    let ran = Program::new(&sandbox, "umount").arg(&mounted).run();
    ran.code_of(&[1, 14]);
    assert!(sandbox.mounts().is_empty(), "{:?}", sandbox.mounts());
    place.program("mount").arg(&mounted).ok();
    Program::new(&sandbox, "umount").arg(&mounted).ok();
    place.assert_closed();
}

#[test]
fn a_killed_mount_daemon_can_be_cleared_away() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("10G").ok();
    let mounted = sandbox.dir("mnt");
    place.program("mount").arg(&mounted).ok();
    fs::write(mounted.join("synced"), "content").expect("written");
    run(tool("sync").arg("-f").arg(mounted.join("synced")));
    sandbox.kill_processes();
    // The mount is dead; either umount frees it, and the next mount clears the lease of the dead.
    let umount = || Program::new(&sandbox, "umount").arg(&mounted);
    umount().run().code(3).says("not yet synced is lost");
    place.program("mount").arg(&mounted).ok();
    assert_eq!(fs::read(mounted.join("synced")).expect("there"), b"content");
    sandbox.kill_processes();
    run(tool("umount").arg("-l").arg(&mounted));
    place.program("mount").arg(&mounted).ok();
    umount().ok();
    place.assert_closed();
}
