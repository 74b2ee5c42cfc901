//! Larger images, finished whenever they were interrupted.

use std::fs;

use rustix::process::Signal;

use super::common::{
    Place, Sandbox, Sshd, assert_same_tree, large_file, plain_tree, root_or_skip, run,
    stored_bytes, tool,
};
use super::{Mount, assert_filesystem_clean, decrypted, wait_until};

const MIB: u64 = 1 << 20;

fn filled(place: &Place, size: &str) {
    let source = place.sandbox.dir("source");
    plain_tree(&source, 200);
    large_file(&source.join("large"), 8 * MIB, 3);
    place.init(size).ok();
    place.backup(&source).ok();
}

/// Bytes of the filesystem by e2fsprogs, which must find it in order.
fn filesystem_size(place: &Place) -> u64 {
    let plain = decrypted(place);
    run(tool("e2fsck").arg("-fn").arg(&plain));
    let told = run(tool("dumpe2fs").arg("-h").arg(&plain));
    let field = |name: &str| -> u64 {
        let line = told
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .expect("told");
        line.trim().parse().expect("a number")
    };
    fs::remove_file(plain).expect("removed");
    field("Block count:") * field("Block size:")
}

fn still_restores(place: &Place) {
    let source = place.sandbox.path("source");
    let to = place.sandbox.path("restored");
    let _ = fs::remove_dir_all(&to);
    place
        .restore(&format!("latest:{}", source.display()), &to)
        .ok();
    assert_same_tree(&source, &to);
}

fn image_size(place: &Place) -> u64 {
    fs::metadata(&place.stored).expect("the image").len()
}

#[test]
fn a_local_image_grows_and_is_whole() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    filled(&place, "200M");
    place.program("grow").arg("900M").ok();
    assert_eq!(image_size(&place), 900 * MIB);
    assert_eq!(filesystem_size(&place), 884 * MIB);
    assert_filesystem_clean(&place); // with noise in every hole
    still_restores(&place);
    let again = place.program("grow").arg("900M").ok();
    assert!(again.stdout.contains("already"), "{again}");
    place.program("grow").arg("+100M").ok();
    assert_eq!(filesystem_size(&place), 984 * MIB);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    place.backup(&sandbox.path("source")).ok();
    still_restores(&place);
    place.assert_closed();
}

#[test]
fn terabytes_grow_over_sftp_by_sending_little() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::with(&sandbox, &["ForceCommand internal-sftp"]);
    let place = Place::over(&sandbox, &sshd);
    filled(&place, "100G");
    let before = stored_bytes(&place.stored);
    place.program("grow").arg("8T").ok();
    let grown = stored_bytes(&place.stored) - before;
    assert!(
        grown < 256 * MIB,
        "growing to 8 TiB has stored {grown} bytes"
    );
    assert_eq!(image_size(&place), 8 << 40);
    assert_eq!(filesystem_size(&place), (8 << 40) - 16 * MIB);
    still_restores(&place);
    place.assert_closed();
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("200M").ok();
    let grow = |size: &str| place.program("grow").arg(size).run();
    grow("100M").code(2).says("never gets smaller");
    grow("1X").code(2).says("1X");
    grow("+").code(2);
    grow("65T").code(2).says("64.0 TiB");
    grow("209715712").code(2).says("multiple of 4096");
    // More than this ext4 or tmpfs here takes in a file, or more than is free: a warning.
    let ran = grow("40T").code_of(&[0, 1]);
    match ran.status.success() {
        true => drop(ran.says("free on the server")),
        false => {
            ran.says("40.0 TiB");
            assert_eq!(image_size(&place), 200 * MIB, "nothing has changed");
        }
    }
    place
        .program("grow")
        .arg("1G")
        .env("E2EBAK_PASSPHRASE", "wrong")
        .run()
        .code(12);
    place.assert_closed();
}

/// The image has grown already, or resize2fs is at work, or what it changed is being written.
#[test]
fn interrupted_at_any_point_it_is_finished_by_running_it_again() {
    if !root_or_skip() {
        return;
    }
    for millis in [0, 60, 200, 400] {
        let sandbox = Sandbox::new();
        let place = Place::local(&sandbox);
        filled(&place, "200M");
        let mut running = place.program("grow").arg("900M").spawn();
        wait_until(&mut running, || image_size(&place) > 200 * MIB);
        std::thread::sleep(std::time::Duration::from_millis(millis));
        running.signal_group(Signal::KILL);
        sandbox.kill_processes();
        let _ = running.wait();
        still_restores(&place);
        place.program("grow").arg("900M").ok();
        assert_eq!(
            filesystem_size(&place),
            884 * MIB,
            "killed after {millis} ms"
        );
        still_restores(&place);
        place.assert_closed();
    }
}

#[test]
fn a_mounted_image_grows_while_it_is_in_use() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    filled(&place, "200M");
    let mount = Mount::of(&place);
    let ran = place.program("grow").arg("900M").run();
    assert_eq!(image_size(&place), 900 * MIB, "{ran}");
    // The volume and the loop device have grown in any case; the kernel grows an ext4 only for
    // one who has CAP_SYS_RESOURCE.
    let ran = ran.code_of(&[0, 1]);
    let room = rustix::fs::statvfs(&mount.at).expect("mounted");
    let live = ran.status.success();
    match live {
        true => assert!(room.f_blocks * room.f_frsize > 700 * MIB, "{ran}"),
        false => drop(ran.says("CAP_SYS_RESOURCE")),
    }
    fs::write(mount.at.join("written after"), vec![7; 100_000]).expect("still in use");
    mount.close();
    place.program("grow").arg("900M").ok();
    assert_eq!(filesystem_size(&place), 884 * MIB);
    still_restores(&place);
    place.assert_closed();
}

#[test]
fn a_segment_of_fixed_size_is_refused_by_name() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let image = &place.stored;
    let key = sandbox.file("key", super::common::PASSPHRASE);
    let plain = sandbox.path("plain.img");
    run(tool("truncate").args(["-s", "80M"]).arg(&plain));
    run(tool("mkfs.ext4").arg("-q").arg(&plain));
    // cryptsetup writes a fixed size while it encrypts a device in place.
    let mut encrypt = tool("cryptsetup");
    encrypt.args([
        "reencrypt",
        "--encrypt",
        "--init-only",
        "--batch-mode",
        "--reduce-device-size",
        "32M",
    ]);
    encrypt.args([
        "--pbkdf-memory",
        "32768",
        "--pbkdf-force-iterations",
        "4",
        "--key-file",
    ]);
    run(encrypt.arg(key).arg(&plain));
    fs::rename(plain, image).expect("renamed");
    place.program("grow").arg("900M").run().code_of(&[1, 13]);
    assert_eq!(image_size(&place), 80 * MIB);
}
