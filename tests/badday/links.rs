//! Servers that are not there, not the right ones, or full.

use super::*;

#[test]
fn an_unreachable_host_is_exit_14() {
    let sandbox = Sandbox::new();
    for location in ["sftp://127.0.0.1:1/a.img", "no-such-host.invalid:a.img"] {
        let program = Program::new(&sandbox, "snapshots").arg(location);
        let ran = program.run().code(14);
        assert!(
            ran.stderr.contains("127.0.0.1") || ran.stderr.contains("no-such-host"),
            "{ran}"
        );
        assert!(ran.took < Duration::from_secs(60), "{ran}");
    }
    // A program that is no SFTP server.
    for (command, says) in [
        ("true", "exit code 0"),
        ("cat /dev/zero", "packet"),
        ("/no/such/program", "/no/such"),
    ] {
        let program = Program::new(&sandbox, "snapshots").arg("x:a.img");
        program
            .args(["--ssh-command", command])
            .run()
            .code_of(&[1, 13, 14])
            .says(says);
    }
    sandbox.assert_nothing_left();
}

#[test]
fn a_login_that_is_refused_says_so() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    fs::write(sandbox.path("sshd/authorized_keys"), "").expect("written");
    place
        .program("snapshots")
        .run()
        .code(1)
        .says("Permission denied");
    place.assert_closed();
}

#[test]
fn a_changed_host_key_is_not_accepted() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let mut sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    place.init("1G").ok();
    sshd.change_host_key();
    every_verb_says(&place, &[14], "host key");
}

#[test]
fn a_link_that_breaks_during_a_backup_publishes_nothing() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let mut sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    let source = sandbox.dir("source");
    plain_tree(&source, 50);
    place.init("10G").ok();
    place.backup(&source).ok();
    large_file(&source.join("large"), 400 * MIB, 1);
    let backup = place.backup(&source).args(["--io-deadline", "2s"]).spawn();
    wait_for("some data", Duration::from_secs(60), || {
        common::stored_bytes(&place.stored) > 60 * MIB
    });
    sshd.stop();
    backup.wait().code(14);
    sandbox.assert_nothing_left();

    // The server comes back: what was published is there, and the next run goes through.
    sshd.restart();
    assert_eq!(place.ids().len(), 1);
    place.backup(&source).ok();
    place.assert_latest_is(&source);
    place.assert_closed();
}

#[test]
fn a_full_server_fails_the_backup_and_loses_nothing() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let store = sandbox.dir("store");
    let mut mount = tool("mount");
    mount.args(["-t", "tmpfs", "-o", "size=100M", "none"]);
    run(mount.arg(&store));
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    let small = sandbox.dir("small");
    plain_tree(&small, 100);
    place.init("10G").ok();
    place.backup(&small).ok();

    let large = sandbox.dir("large");
    large_file(&large.join("file"), 200 * MIB, 1);
    let ran = place.backup(&large).run();
    assert!(ran.status.code() == Some(1), "{ran}");
    assert!(ran.stderr.contains("no space on server"), "{ran}");
    place.assert_closed();
    // Still full: what was published can be listed and restored.
    assert_eq!(place.ids().len(), 1);
    let restored = sandbox.path("restored");
    place
        .restore(&format!("latest:{}", small.display()), &restored)
        .ok();
    assert_same_tree(&small, &restored);
    // Room again: the next run goes through.
    run(tool("mount").args(["-o", "remount,size=600M"]).arg(&store));
    place.backup(&large).ok();
    place
        .restore(
            &format!("latest:{}", large.display()),
            &sandbox.path("restored large"),
        )
        .ok();
    assert_same_tree(&large, &sandbox.path("restored large"));
    assert_eq!(place.ids().len(), 2);
    place.assert_closed();
}
