//! The image decrypted by other means than our own stack: once by cryptsetup itself, whose offline
//! re-encryption works on files and without device-mapper, and once by the crate `xts-mode` with the
//! volume key that cryptsetup tells. A hole, which is all zeros, is decrypted like any other sector
//! and so becomes noise, as it would under dm-crypt. e2fsck and the kernel then must find nothing
//! wrong: what is published depends on no block that was never written.

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use common::{
    PASSPHRASE, Place, Program, SECTOR, Sandbox, assert_same_tree, decrypt, is_clean, large_file,
    odd_tree, output, plain_tree, private_shell, root_or_skip, run, tool,
};

/// The same by cryptsetup alone, in place of a copy.
fn decrypted_by_cryptsetup(sandbox: &Sandbox, image: &Path) -> PathBuf {
    let copy = sandbox.path("decrypted by cryptsetup");
    let header = sandbox.path("detached header");
    let _ = fs::remove_file(&header);
    run(tool("cp").arg("--sparse=always").arg(image).arg(&copy));
    let passphrase = sandbox.file("passphrase", PASSPHRASE);
    let mut decrypt = tool("cryptsetup");
    decrypt.args([
        "reencrypt",
        "--decrypt",
        "--force-offline-reencrypt",
        "--batch-mode",
    ]);
    decrypt
        .arg("--header")
        .arg(header)
        .arg("--key-file")
        .arg(passphrase);
    run(decrypt.arg(&copy));
    copy
}

#[test]
fn with_noise_in_every_hole_nothing_is_wrong() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let source = sandbox.path("source");
    odd_tree(&source.join("odd"));
    plain_tree(&source.join("plain"), 300);
    large_file(&source.join("large"), 40 << 20, 1);
    place.init("1G").ok();
    let fresh = decrypt(&sandbox, &place.stored);
    assert!(
        fresh.holes * 10 > fresh.sectors * 9,
        "{} of {}",
        fresh.holes,
        fresh.sectors
    );
    is_clean(&fresh.path);
    let judge = decrypted_by_cryptsetup(&sandbox, &place.stored);
    let mut same = tool("cmp");
    // Behind the data cryptsetup leaves what the header had taken.
    same.arg("-n")
        .arg((fresh.sectors * SECTOR as u64).to_string());
    run(same.arg(&judge).arg(&fresh.path));

    place.backup(&source).ok();
    // A life: things come, change and go.
    fs::remove_file(source.join("large")).expect("removed");
    plain_tree(&source.join("plain"), 350);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    place.backup(&source).ok();

    let plain = decrypt(&sandbox, &place.stored);
    assert!(
        plain.holes > 10_000,
        "only {} holes: this shows nothing",
        plain.holes
    );
    assert!(
        plain.sectors - plain.holes > 10_000,
        "hardly anything is stored"
    );
    is_clean(&plain.path);

    // A full read by the kernel, then the newest snapshot against its source.
    let mounted = sandbox.dir("mnt");
    let copied = sandbox.path("copied");
    let script = "mount -o loop,ro \"$1\" \"$2\"
        find \"$2\" -type f -exec cat {} + > /dev/null
        cp -a --sparse=always \"$2/snapshots/$(readlink \"$2/latest\" | sed s,.*/,,)$3\" \"$4\"";
    let mut command = private_shell(script);
    run(command
        .arg("sh")
        .arg(&plain.path)
        .arg(&mounted)
        .arg(&source)
        .arg(&copied));
    assert_same_tree(&source, &copied);
    sandbox.assert_nothing_left();
}

/// A crash in the middle: the journal is replayed over the same noise.
#[test]
fn with_noise_in_every_hole_a_crash_is_replayed() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let source = sandbox.dir("source");
    plain_tree(&source, 100);
    place.init("1G").ok();
    place.backup(&source).ok();
    let before = common::stored_bytes(&place.stored);
    large_file(&source.join("large"), 200 << 20, 1);
    let backup = place.backup(&source).spawn();
    common::wait_for("some data", std::time::Duration::from_secs(60), || {
        common::stored_bytes(&place.stored) > before + (60 << 20)
    });
    sandbox.kill_processes();
    drop(backup);
    let plain = decrypt(&sandbox, &place.stored);
    assert!(
        plain.holes > 10_000,
        "only {} holes: this shows nothing",
        plain.holes
    );
    // What the kernel would do at the next mount.
    let replayed = output(
        tool("e2fsck")
            .args(["-fy", "-E", "journal_only"])
            .arg(&plain.path),
    );
    assert!(
        replayed.status.code().is_some_and(|code| code <= 1),
        "{replayed:?}"
    );
    is_clean(&plain.path);
    let mounted = sandbox.dir("mnt");
    let copied = sandbox.path("copied");
    let script = "mount -o loop,ro \"$1\" \"$2\"
        cp -a \"$2/snapshots/$(readlink \"$2/latest\" | sed s,.*/,,)$3\" \"$4\"";
    let mut command = private_shell(script);
    run(command
        .arg("sh")
        .arg(&plain.path)
        .arg(&mounted)
        .arg(&source)
        .arg(&copied));
    fs::remove_file(source.join("large")).expect("removed");
    // The directory's time is that of the removal.
    run(tool("touch").arg("-r").arg(&copied).arg(&source));
    assert_same_tree(&source, &copied);
    sandbox.assert_nothing_left();
}

/// The other way round: what cryptsetup encrypts, with our own defaults and with its older ones, we
/// open.
#[test]
fn what_cryptsetup_encrypts_can_be_mounted() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    sandbox.dir("store");
    let source = sandbox.path("source");
    odd_tree(&source.join("odd"));
    large_file(&source.join("large"), 10 << 20, 1);
    let passphrase = sandbox.file("passphrase", PASSPHRASE);
    let mounted = sandbox.dir("mnt");
    let ways: [&[&str]; 3] = [
        &[
            "--sector-size=4096",
            "--pbkdf=argon2id",
            "--pbkdf-memory=32768",
            "--pbkdf-force-iterations=4",
        ],
        &[
            "--sector-size=512",
            "--pbkdf=pbkdf2",
            "--hash=sha512",
            "--pbkdf-force-iterations=1000",
        ],
        &[
            "--sector-size=2048",
            "--pbkdf=argon2i",
            "--pbkdf-memory=32768",
            "--pbkdf-force-iterations=4",
        ],
    ];
    for way in ways {
        let image = File::create(&place.stored).expect("a file");
        image.set_len(256 << 20).expect("grown");
        // ext4 made by hand, with room behind it for the header.
        let mut make = tool("mkfs.ext4");
        make.args(["-q", "-b", "4096", "-m", "0"])
            .arg(&place.stored);
        run(make.arg("200M"));
        let script = "mount -o loop \"$1\" \"$2\"; cp -a \"$3/.\" \"$2\"; umount \"$2\"";
        let mut fill = private_shell(script);
        run(fill.arg("sh").arg(&place.stored).arg(&mounted).arg(&source));
        let mut encrypt = tool("cryptsetup");
        encrypt.args([
            "reencrypt",
            "--encrypt",
            "--type=luks2",
            "--reduce-device-size=32M",
        ]);
        encrypt
            .args(["--batch-mode", "--resilience=none"])
            .args(way);
        run(encrypt
            .arg("--key-file")
            .arg(&passphrase)
            .arg(&place.stored));

        place.program("mount").arg("--read-only").arg(&mounted).ok();
        let copied = sandbox.path("copied");
        run(tool("cp")
            .args(["-a", "--sparse=always"])
            .arg(&mounted)
            .arg(&copied));
        Program::new(&sandbox, "umount").arg(&mounted).ok();
        fs::remove_dir(copied.join("lost+found")).expect("removed");
        run(tool("touch").arg("-r").arg(&source).arg(&copied));
        assert_same_tree(&source, &copied);
        fs::remove_dir_all(&copied).expect("removed");
        place.assert_closed();
    }
}
