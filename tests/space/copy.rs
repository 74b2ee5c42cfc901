//! Copies: between this machine and servers, interrupted at any moment, and brought up to date.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use super::common::{
    Place, Program, Sandbox, Sshd, assert_same_tree, large_file, root_or_skip, run, stored_bytes,
    tool,
};
use super::{Mount, assert_filesystem_clean};

const MIB: u64 = 1 << 20;

fn filled(place: &Place, size: &str, mib: u64) {
    let source = place.sandbox.dir("source");
    large_file(&source.join("large"), mib * MIB, 3);
    place.init(size).ok();
    place.backup(&source).ok();
}

fn copy<'a>(place: &Place<'a>, to: &str) -> Program<'a> {
    place
        .program("copy")
        .arg(to)
        .env_remove("E2EBAK_PASSPHRASE")
}

fn summary(place: &Place, to: &str) -> serde_json::Value {
    let ran = copy(place, to).arg("--json").ok();
    serde_json::from_str(ran.stdout.lines().last().expect("a line")).expect("JSON")
}

fn written(place: &Place, to: &str) -> u64 {
    summary(place, to)["written_bytes"]
        .as_u64()
        .expect("a number")
}

fn assert_same_image(place: &Place, to: &Path) {
    run(tool("cmp").arg(&place.stored).arg(to));
    let (from, there) = (stored_bytes(&place.stored), stored_bytes(to));
    assert!(
        there <= from + 24 * MIB,
        "{there} bytes stored, {from} in the original"
    );
    let part = PathBuf::from(format!("{}.part", to.display()));
    assert!(!part.exists());
    assert!(!PathBuf::from(format!("{}.lease", to.display())).exists());
}

#[test]
fn to_a_server_and_back_sends_what_has_changed() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::with(&sandbox, &["ForceCommand internal-sftp"]);
    let local = Place::local(&sandbox);
    filled(&local, "150M", 20);
    let remote = Place::over(&sandbox, &sshd);
    let options = sshd.options();
    let there = sshd.location("copy.img");
    let to = sshd.stored("copy.img");
    let push = |place: &Place| {
        let ran = copy(place, &there).args(&options).arg("--json").ok();
        let last: serde_json::Value =
            serde_json::from_str(ran.stdout.lines().last().expect("a line")).expect("JSON");
        last["written_bytes"].as_u64().expect("a number")
    };
    let first = push(&local);
    assert!((20 * MIB..80 * MIB).contains(&first), "{first}");
    assert_same_image(&local, &to);
    assert_eq!(push(&local), 0);
    large_file(&sandbox.path("source/new"), 3 * MIB, 77);
    local.backup(&sandbox.path("source")).ok();
    let second = push(&local);
    assert!((3 * MIB..16 * MIB).contains(&second), "{second} of {first}");
    assert_same_image(&local, &to);

    // From one place on a server to another, and to this machine.
    let mut from = remote;
    from.location = there.clone();
    from.stored = to.clone();
    let second_copy = sshd.location("second.img");
    assert!(written(&from, &second_copy) > 0);
    assert_same_image(&from, &sshd.stored("second.img"));
    let home = sandbox.path("home.img");
    assert!(written(&from, home.to_str().expect("text")) > 0);
    assert_same_image(&from, &home);
    let restored = sandbox.path("restored");
    let source = sandbox.path("source");
    Program::new(&sandbox, "restore")
        .arg(&home)
        .arg(format!("latest:{}", source.display()))
        .arg(&restored)
        .ok();
    assert_same_tree(&source, &restored);
    assert_eq!(sshd.sessions(), 0);
}

#[test]
fn of_an_image_on_a_server_with_commands_only_what_it_holds_is_read() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    filled(&place, "100G", 5);
    let there = sandbox.path("copy.img");
    let told = summary(&place, there.to_str().expect("text"));
    let read = told["read_bytes"].as_u64().expect("a number");
    assert!((5 * MIB..300 * MIB).contains(&read), "{told}");
    let (from, to) = (stored_bytes(&place.stored), stored_bytes(&there));
    assert!(
        to <= from + 24 * MIB,
        "{to} bytes stored, {from} in the original"
    );
    let mut copied = Place::local(&sandbox);
    copied.location = there.display().to_string();
    copied.stored = there;
    copied.program("check").arg("--read-data").ok();
}

/// Whenever it is killed: what has the name is whole, and the next run goes on.
#[test]
fn a_killed_copy_goes_on_where_it_stopped() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    filled(&place, "400M", 150);
    let to = sandbox.path("store/copy.img");
    let part = sandbox.path("store/copy.img.part");
    let there = format!("pipe:{}", to.display());
    let mut seed = 12345_u64;
    for round in 0..5 {
        let mut running = copy(&place, &there).spawn();
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let delay = Duration::from_millis(60 + (seed >> 33) % 700);
        let start = std::time::Instant::now();
        while !running.is_over() && start.elapsed() < delay {
            std::thread::sleep(Duration::from_millis(2));
        }
        let signal = if round == 4 {
            Signal::INT
        } else {
            Signal::KILL
        };
        running.signal_group(signal);
        let ran = running.wait();
        if signal == Signal::INT && !ran.status.success() {
            let ran = ran.code(130);
            assert!(ran.stderr.contains("goes on"), "{ran}");
        }
        if to.exists() {
            run(tool("cmp").arg(&place.stored).arg(&to));
            fs::rename(&to, &part).expect("begun again");
        }
    }
    let kept = stored_bytes(&part);
    let last = written(&place, &there);
    assert!(
        last < 200 * MIB,
        "{last} sent in the end, {kept} were there"
    );
    assert_same_image(&place, &to);
    let mut copied = Place::piped(&sandbox);
    copied.location = there;
    copied.stored = to;
    copied.program("check").arg("--read-data").ok();
    assert_filesystem_clean(&copied);
}

/// What has arrived is not sent again.
#[test]
fn what_was_sent_stays() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    filled(&place, "400M", 150);
    let to = sandbox.path("copy.img");
    let mut running = copy(&place, to.to_str().expect("text")).spawn();
    let part = sandbox.path("copy.img.part");
    super::wait_until(&mut running, || {
        part.exists() && stored_bytes(&part) > 100 * MIB
    });
    running.signal_group(Signal::KILL);
    running.wait();
    let first = if to.exists() { 0 } else { stored_bytes(&part) };
    let second = written(&place, to.to_str().expect("text"));
    let all = stored_bytes(&place.stored);
    assert!(
        second + 30 * MIB < all,
        "{second} of {all} sent again, {first} were there"
    );
    assert_same_image(&place, &to);
}

#[test]
fn what_would_harm_an_image_is_refused() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let there = sandbox.path("copy.img");
    let to = there.to_str().expect("text");
    copy(&place, to).run().code(10);
    filled(&place, "150M", 5);
    let same = place.location.clone();
    copy(&place, &same).run().code(2).says("the same image");
    copy(&place, "/nowhere/copy.img").run().code(1);
    copy(&place, "").run().code(2);

    let mount = Mount::of(&place);
    copy(&place, to).run().code(11);
    mount.close();
    assert!(!there.exists());

    // Another image, and something that is none.
    Program::new(&sandbox, "init")
        .arg(&there)
        .args(["--size", "100M", "--kdf-memory", "32M", "--kdf-time", "4"])
        .ok();
    let before = fs::read(&there).expect("read");
    copy(&place, to)
        .run()
        .code(1)
        .says("another image")
        .says("--force");
    assert!(fs::read(&there).expect("read") == before);
    copy(&place, to).arg("--force").ok();
    assert_same_image(&place, &there);
    fs::write(&there, "a letter").expect("written");
    copy(&place, to).run().code(1).says("no LUKS2 image");
    assert_eq!(fs::read(&there).expect("read"), b"a letter");
    copy(&place, to).arg("--force").ok();
    assert_same_image(&place, &there);

    // A copy that is in use, and one that was written to: its changes go.
    let mut copied = Place::local(&sandbox);
    copied.location = to.into();
    copied.stored = there.clone();
    let mount = Mount::of(&copied);
    copy(&place, to).run().code(11);
    fs::write(mount.at.join("more"), "more").expect("written");
    mount.close();
    copy(&place, to).ok().says("changed by somebody else");
    assert_same_image(&place, &there);
    // A letter is no image.
    fs::write(&place.stored, "a letter").expect("written");
    copy(&place, to).run().code(13);
    let header = &mut [0; 6];
    fs::File::open(&there)
        .expect("opens")
        .read_exact_at(header, 0)
        .expect("read");
    assert_eq!(&header[..4], b"LUKS");
}
