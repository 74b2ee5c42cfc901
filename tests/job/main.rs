//! The main job with nothing but real parts: OpenSSH's sshd and sftp-server, rsync, the kernel's ext4
//! on a loop device, and stock cryptsetup as the judge of the image.

#[path = "../common/mod.rs"]
mod common;

mod amounts;
mod choices;
mod mounts;
mod resources;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{
    PASSPHRASE, Place, Program, Sandbox, Sshd, assert_same_tree, large_file, odd_tree, plain_tree,
    root_or_skip, run, stored_bytes, tool, wait_for,
};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

#[test]
fn the_whole_job_on_a_local_file() {
    if root_or_skip() {
        let sandbox = Sandbox::new();
        the_whole_job(&Place::local(&sandbox));
    }
}

#[test]
fn the_whole_job_over_sftp_server_on_pipes() {
    if root_or_skip() {
        let sandbox = Sandbox::new();
        the_whole_job(&Place::piped(&sandbox));
    }
}

#[test]
fn the_whole_job_over_sshd() {
    if root_or_skip() {
        let sandbox = Sandbox::new();
        let sshd = Sshd::start(&sandbox);
        the_whole_job(&Place::over(&sandbox, &sshd));
        assert_eq!(sshd.sessions(), 0, "a session is still logged in");
    }
}

/// `sshd` with its internal server and nothing else allowed, as hosters offer it.
#[test]
fn a_server_that_allows_sftp_only_is_enough() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let rules = [
        "ForceCommand internal-sftp",
        "AllowTcpForwarding no",
        "PermitTTY no",
    ];
    let sshd = Sshd::with(&sandbox, &rules);
    let place = Place::over(&sandbox, &sshd);
    let source = sandbox.dir("source");
    plain_tree(&source, 20);
    place.init("10G").ok();
    place.backup(&source).ok();
    place
        .restore(
            &format!("latest:{}", source.display()),
            &sandbox.path("restored"),
        )
        .ok();
    assert_same_tree(&source, &sandbox.path("restored"));
    place.assert_closed();
}

fn the_whole_job(place: &Place) {
    let sandbox = place.sandbox;
    let source = sandbox.path("source");
    odd_tree(&source);

    let created = place.init("5T").ok();
    assert!(created.took < Duration::from_secs(30), "{created}");
    let metadata = fs::metadata(&place.stored).expect("the image");
    assert_eq!(metadata.len(), 5 << 40);
    let stored = stored_bytes(&place.stored);
    assert!(stored < 64 * MIB, "an empty image takes {stored} bytes");
    place.assert_closed();
    refuses_to_overwrite(place);

    let first = place.backup(&source).ok();
    for figure in ["files", "new", "sent"] {
        let told = first.stdout.to_lowercase() + &first.stderr.to_lowercase();
        assert!(told.contains(figure), "no word of `{figure}`: {first}");
    }
    place.assert_closed();
    another_second();
    place.backup(&source).ok();
    place.assert_closed();
    let ids = place.ids();
    assert_eq!(ids.len(), 2, "{ids:?}");
    let table = place.program("snapshots").ok().stdout;
    for id in &ids {
        assert!(table.contains(id.as_str()), "{table}");
    }

    for (what, name) in [("latest", "restored"), (&*ids[0], "restored first")] {
        let restored = sandbox.path(name);
        place
            .restore(&format!("{what}:{}", source.display()), &restored)
            .ok();
        assert_same_tree(&source, &restored);
    }
    place.assert_closed();

    let told = place.program("info").ok().stdout;
    let dump = place.luks_dump();
    let uuid = dump.lines().find_map(|line| line.strip_prefix("UUID:"));
    assert!(
        told.contains(uuid.expect("a UUID").trim()),
        "{told}\n{dump}"
    );
    assert!(
        dump.contains("cipher: aes-xts-plain64") && dump.contains("sector: 4096"),
        "{dump}"
    );
    assert!(dump.contains("argon2id"), "{dump}");
    stock_cryptsetup_opens(&place.stored);
    place.assert_closed();
}

fn refuses_to_overwrite(place: &Place) {
    let before = fs::metadata(&place.stored).expect("the image");
    place.init("5T").run().code(1).says("already");
    let after = fs::metadata(&place.stored).expect("the image");
    assert_eq!((before.len(), before.ino()), (after.len(), after.ino()));
    assert_eq!(
        (before.mtime(), before.mtime_nsec()),
        (after.mtime(), after.mtime_nsec())
    );
    place.assert_closed();
}

fn stock_cryptsetup_opens(image: &Path) {
    let key = tempfile::NamedTempFile::new().expect("a file");
    fs::write(key.path(), PASSPHRASE).expect("a key file");
    let mut command = tool("cryptsetup");
    command.args(["open", "--test-passphrase", "--key-file"]);
    run(command.arg(key.path()).arg(image));
}

/// Snapshots are named by the second.
fn another_second() {
    std::thread::sleep(Duration::from_millis(1100));
}
