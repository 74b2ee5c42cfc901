//! Holes where nothing is any more: each back-end on a real server, judged by the server's `stat` and
//! by e2fsck with noise in every hole.

use std::fs;

use rustix::process::Signal;

use super::common::{
    Place, Sandbox, Sshd, assert_same_tree, large_file, root_or_skip, run, stored_bytes, tool,
};
use super::{Mount, assert_filesystem_clean, wait_until};

const MIB: u64 = 1 << 20;

/// An image with a small snapshot, in which `mib` MiB were written and deleted again.
fn loosened(place: &Place, size: &str, mib: u64) {
    let source = place.sandbox.dir("source");
    large_file(&source.join("small"), 3 * MIB, 5);
    place.init(size).ok();
    place.backup(&source).ok();
    fill_and_empty(place, mib);
}

fn fill_and_empty(place: &Place, mib: u64) {
    let mount = Mount::of(place);
    for part in 0..10 {
        large_file(
            &mount.at.join(format!("ballast {part}")),
            mib / 10 * MIB,
            part,
        );
        // Something between them that stays.
        fs::write(
            mount.at.join(format!("kept {part}")),
            vec![part as u8; 40_000],
        )
        .expect("written");
    }
    run(tool("sync").arg("-f").arg(&mount.at));
    for part in 0..10 {
        fs::remove_file(mount.at.join(format!("ballast {part}"))).expect("removed");
    }
    mount.close();
}

fn used(place: &Place) -> u64 {
    let usage = place.program("usage").arg("--json").ok().json();
    usage["filesystem_used_bytes"].as_u64().expect("a number")
}

/// Trims, and proves that it freed what it should and nothing else. Gives what it printed.
fn trims(place: &Place, backend: &str) -> String {
    let source = place.sandbox.path("source");
    let size = fs::metadata(&place.stored).expect("the image").len();
    let before = stored_bytes(&place.stored);
    assert!(before > 120 * MIB, "{before} bytes before");
    let ran = place.program("trim").ok();
    assert!(ran.stdout.contains(backend), "not by {backend}: {ran}");
    let after = stored_bytes(&place.stored);
    let used = used(place);
    let bound = used + used / 20 + 64 * MIB;
    assert!(bound < before, "the bound proves nothing");
    assert!(
        after <= bound,
        "{after} bytes stored after, {used} in use: {ran}"
    );
    assert_eq!(fs::metadata(&place.stored).expect("the image").len(), size);
    place.assert_closed();

    assert_filesystem_clean(place);
    let restored = place.sandbox.path("restored");
    place
        .restore(&format!("latest:{}", source.display()), &restored)
        .ok();
    assert_same_tree(&source, &restored);
    let mount = Mount::of(place);
    for part in 0..10_u8 {
        let kept = fs::read(mount.at.join(format!("kept {part}"))).expect("there");
        assert!(kept == vec![part; 40_000], "kept {part}");
    }
    mount.close();
    let again = place.program("trim").ok();
    let more = stored_bytes(&place.stored);
    assert!(
        more <= after + 2 * MIB,
        "a second run: {after}, then {more}: {again}"
    );
    place.backup(&source).ok();
    place.assert_closed();
    ran.stdout
}

#[test]
fn a_local_file_by_its_own_fallocate() {
    if root_or_skip() {
        let sandbox = Sandbox::new();
        let place = Place::local(&sandbox);
        loosened(&place, "700M", 160);
        let told = trims(&place, "local file");
        assert!(told.contains("freed 1"), "{told}");
    }
}

#[test]
fn a_server_with_commands_by_fallocate_there() {
    if root_or_skip() {
        let sandbox = Sandbox::new();
        let sshd = Sshd::start(&sandbox);
        let place = Place::over(&sandbox, &sshd);
        loosened(&place, "700M", 160);
        let inode = |place: &Place| {
            std::os::unix::fs::MetadataExt::ino(&fs::metadata(&place.stored).expect("there"))
        };
        let before = inode(&place);
        let told = trims(&place, "fallocate on the server");
        assert!(told.contains("freed 1"), "{told}");
        assert_eq!(inode(&place), before, "in place");
        assert_eq!(sshd.sessions(), 0);
    }
}

#[test]
fn a_server_for_sftp_alone_by_a_sparse_copy() {
    if root_or_skip() {
        let sandbox = Sandbox::new();
        let sshd = Sshd::with(&sandbox, &["ForceCommand internal-sftp"]);
        let place = Place::over(&sandbox, &sshd);
        loosened(&place, "700M", 160);
        let mode = |place: &Place| {
            std::os::unix::fs::MetadataExt::mode(&fs::metadata(&place.stored).expect("there"))
        };
        run(tool("chmod").arg("640").arg(&place.stored));
        let before = mode(&place);
        let told = trims(&place, "copy-data");
        assert!(told.contains("does not tell how much"), "{told}");
        assert_eq!(mode(&place), before);
        // A large image: what was never written is not written now.
        assert_eq!(place.side_files(), Vec::<String>::new());
    }
}

#[test]
fn a_command_instead_of_ssh_by_a_sparse_copy() {
    if root_or_skip() {
        let sandbox = Sandbox::new();
        let place = Place::piped(&sandbox);
        loosened(&place, "100G", 160);
        trims(&place, "copy-data");
    }
}

#[test]
fn a_server_that_offers_no_way_is_told_what_it_lacks_and_nothing_happens() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let rules = ["ForceCommand internal-sftp -P copy-data"];
    let sshd = Sshd::with(&sandbox, &rules);
    let place = Place::over(&sandbox, &sshd);
    loosened(&place, "700M", 160);
    let before = stored_bytes(&place.stored);
    let ran = place.program("trim").run().code(1);
    ran.says("copy-data").says("no commands").says("fallocate");
    assert_eq!(stored_bytes(&place.stored), before);
    place.assert_closed();
    assert_eq!(place.ids().len(), 1);
}

#[test]
fn a_copy_that_finds_no_room_leaves_the_image_alone() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let store = sandbox.dir("store");
    let source = sandbox.dir("source");
    large_file(&source.join("large"), 150 * MIB, 5);
    run(tool("mount")
        .args(["-t", "tmpfs", "-o", "size=400m", "none"])
        .arg(&store));
    place.init("700M").ok();
    place.backup(&source).ok();
    fill_and_empty(&place, 100);
    let ran = place.program("trim").run();
    let told = ran.code(1);
    told.says("room for a second copy")
        .says("free on the server");
    assert_eq!(place.side_files(), Vec::<String>::new());
    place
        .restore(&format!("latest:{}", source.display()), &sandbox.path("r"))
        .ok();
    assert_same_tree(&source, &sandbox.path("r"));
    place.assert_closed();
}

/// Killed or stopped half way, and at moments left to chance, over each back-end: the image is
/// whole, and the next run finishes.
#[test]
fn an_interrupted_trim_harms_nothing() {
    if !root_or_skip() {
        return;
    }
    for (rules, signal, wait) in [
        (&[][..], Signal::KILL, "fallocate"),
        (&["ForceCommand internal-sftp"][..], Signal::KILL, "copy"),
        (&["ForceCommand internal-sftp"][..], Signal::INT, "copy"),
    ] {
        let sandbox = Sandbox::new();
        let sshd = Sshd::with(&sandbox, rules);
        let place = Place::over(&sandbox, &sshd);
        loosened(&place, "700M", 120);
        let before = stored_bytes(&place.stored);
        let mut running = place.program("trim").args(["--granularity", "4K"]).spawn();
        let copy = sandbox.path("store/a.img.trim");
        let begun = || match wait {
            "copy" => copy.exists(),
            _ => stored_bytes(&place.stored) < before,
        };
        wait_until(&mut running, begun);
        running.signal_group(signal);
        let ran = running.wait();
        if signal == Signal::INT {
            assert!(matches!(ran.status.code(), Some(0 | 130)), "{ran}");
        }
        assert_filesystem_clean(&place);
        let ran = place.program("trim").ok();
        assert_eq!(place.side_files(), Vec::<String>::new(), "{ran}");
        let after = stored_bytes(&place.stored);
        assert!(after + 90 * MIB < before, "{before} to {after}: {ran}");
        place.program("check").arg("--read-data").ok();
        let source = sandbox.path("source");
        place
            .restore(&format!("latest:{}", source.display()), &sandbox.path("r"))
            .ok();
        assert_same_tree(&source, &sandbox.path("r"));
        place.assert_closed();
    }
}

#[test]
fn a_sparse_copy_killed_at_any_moment_leaves_the_image_or_the_copy() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    loosened(&place, "300M", 60);
    let mut seed = 98_765_u64;
    for _ in 0..6 {
        let mut running = place.program("trim").spawn();
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let delay = std::time::Duration::from_millis((seed >> 33) % 900);
        let start = std::time::Instant::now();
        while !running.is_over() && start.elapsed() < delay {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        running.signal_group(Signal::KILL);
        running.wait();
        let ran = place.program("check").arg("--read-data").ok();
        assert!(ran.stdout.contains("1 complete"), "{ran}");
    }
    assert_filesystem_clean(&place);
    place.program("trim").ok();
    assert_eq!(place.side_files(), Vec::<String>::new());
    place.assert_closed();
}

#[test]
fn what_cannot_be_is_refused() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    fs::create_dir(sandbox.path("source")).expect("made");
    place.program("trim").run().code(10);
    place.init("200M").ok();
    for wrong in ["0", "100K", "2G", "512", "soon"] {
        place
            .program("trim")
            .args(["--granularity", wrong])
            .run()
            .code(2);
    }
    place
        .program("trim")
        .env("E2EBAK_PASSPHRASE", "wrong")
        .run()
        .code(12);
    let mount = Mount::of(&place);
    place.program("trim").run().code(11);
    mount.close();
    place.program("trim").ok();
    place.assert_closed();
}

#[test]
fn prune_trims_when_told_so() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    large_file(&source.join("file"), MIB, 1);
    place.init("700M").ok();
    place.backup(&source).ok();
    super::forge(
        &place,
        &["2020-01-01T00-00-00Z", "2021-01-01T00-00-00Z"],
        60 * MIB,
    );
    let before = stored_bytes(&place.stored);
    let ran = place
        .program("prune")
        .args(["--keep-last", "1", "--trim"])
        .ok();
    assert!(ran.stdout.contains("freed"), "{ran}");
    let after = stored_bytes(&place.stored);
    assert!(after + 110 * MIB < before, "{before} to {after}");
    assert_filesystem_clean(&place);
}
