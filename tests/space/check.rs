//! A sound image is found sound, and each kind of damage is found for what it is.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::common::{
    Place, Program, Sandbox, Sshd, large_file, output, plain_tree, root_or_skip, run, tool,
    wait_for,
};
use super::{Mount, decrypted, forge};

const MIB: u64 = 1 << 20;
const DATA: u64 = 16 * MIB;

fn filled<'a>(place: &Place<'a>) {
    let source = place.sandbox.dir("source");
    plain_tree(&source, 30);
    large_file(&source.join("large"), 9 * MIB, 3);
    place.init("300M").ok();
    place.backup(&source).ok();
}

fn check<'a>(place: &Place<'a>) -> Program<'a> {
    place.program("check")
}

fn hash(path: &Path) -> Vec<u8> {
    Sha256::digest(fs::read(path).expect("read")).to_vec()
}

/// The result in what `check --json` printed.
fn summary(place: &Place, args: &[&str]) -> serde_json::Value {
    let ran = check(place).arg("--json").args(args).ok();
    let last = ran.stdout.lines().last().expect("a line");
    serde_json::from_str(last).expect("JSON")
}

#[test]
fn a_sound_image_is_sound_and_nothing_is_written() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    filled(&place);
    place.backup(&sandbox.path("source")).ok();
    let before = hash(&place.stored);

    let ran = check(&place).ok();
    for word in [
        "both copies agree",
        "e2fsck finds nothing",
        "2 complete",
        "nothing is wrong",
    ] {
        assert!(ran.stdout.contains(word), "{word}: {ran}");
    }
    assert_eq!(check(&place).arg("--quiet").ok().stdout, "");

    let all = summary(&place, &["--read-data"]);
    assert_eq!(all["sound"], true, "{all}");
    assert_eq!(all["snapshots"]["complete"], 2);
    let number = |of: &serde_json::Value, name: &str| of["data"][name].as_u64().expect("a number");
    let total = number(&all, "total_bytes");
    assert!((9 * MIB..20 * MIB).contains(&total), "{all}");
    assert_eq!(number(&all, "read_bytes"), total);
    let halves = ["1/2", "2/2"].map(|part| {
        let half = summary(&place, &["--read-data", "--subset", part]);
        number(&half, "read_bytes")
    });
    assert!(halves.iter().all(|half| *half > 0 && *half < total));
    assert_eq!(halves.iter().sum::<u64>(), total);
    let none = summary(&place, &["--read-data", "--max-duration", "0"]);
    assert_eq!(none["data"]["out_of_time"], true, "{none}");
    assert_eq!(number(&none, "read_bytes"), 0);

    assert!(hash(&place.stored) == before, "the image was written to");
    place.assert_closed();
}

#[test]
fn a_header_that_is_damaged_is_found() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    filled(&place);
    let image = File::options()
        .write(true)
        .open(&place.stored)
        .expect("opens");
    let mut head = vec![0; 32 << 10];
    let whole = File::open(&place.stored).expect("opens");
    whole.read_exact_at(&mut head, 0).expect("read");

    image
        .write_all_at(b"damage", 0x4000 + 300)
        .expect("written");
    let ran = check(&place).run().code(13);
    assert!(ran.stdout.contains("secondary LUKS2 header"), "{ran}");
    assert!(ran.stdout.contains("cryptsetup repair"), "{ran}");

    image.write_all_at(&head, 0).expect("written");
    image.write_all_at(b"damage", 300).expect("written");
    let ran = check(&place).run().code(13);
    assert!(ran.stdout.contains("primary LUKS2 header"), "{ran}");
    // The other copy is used, and all the rest is looked at.
    assert!(ran.stdout.contains("1 complete"), "{ran}");

    image
        .write_all_at(b"damage", 0x4000 + 300)
        .expect("written");
    let ran = check(&place).run().code(13);
    assert!(ran.stdout.contains("luksHeaderRestore"), "{ran}");
    place.assert_closed();
}

#[test]
fn a_filesystem_that_is_damaged_is_found() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    filled(&place);
    let plain = decrypted(&place);
    let table = |name: &str| {
        let mut dumpe2fs = tool("dumpe2fs");
        let told = output(dumpe2fs.arg(&plain)).stdout;
        let told = String::from_utf8_lossy(&told).into_owned();
        let line = told.lines().find(|line| line.contains(name)).expect(name);
        let at = line.split(" at ").nth(1).expect(name);
        let digits: String = at.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().expect(name)
    };
    let block = table("Inode table at");
    let image = File::options()
        .write(true)
        .open(&place.stored)
        .expect("opens");
    image
        .write_all_at(&[0x5A; 4096], DATA + block * 4096)
        .expect("written");
    let ran = check(&place).run().code(13);
    assert!(ran.stdout.contains("WRONG filesystem"), "{ran}");
    assert!(ran.stdout.contains("what to do"), "{ran}");
    place.assert_closed();
}

#[test]
fn records_and_trees_that_do_not_belong_together_are_found() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    filled(&place);
    let ids = [
        "2020-01-01T00-00-00Z",
        "2021-01-01T00-00-00Z",
        "2022-01-01T00-00-00Z",
        "2023-01-01T00-00-00Z",
        "2024-01-01T00-00-00Z",
    ];
    forge(&place, &ids, 0);
    check(&place).ok();
    let mount = Mount::of(&place);
    let at = |name: String| mount.at.join("snapshots").join(name);
    let record = fs::read(at(format!("{}.json", ids[0]))).expect("a record");
    fs::write(at(format!("{}.json", ids[0])), &record[..record.len() / 2]).expect("cut");
    fs::remove_file(at(format!("{}.json", ids[1]))).expect("removed");
    fs::remove_dir_all(at(ids[2].into())).expect("removed");
    let inside =
        |id: &str| at(id.into()).join(sandbox.path("source").strip_prefix("/").expect("/"));
    fs::remove_file(inside(ids[3]).join("large")).expect("removed");
    fs::remove_dir_all(inside(ids[4])).expect("removed");
    mount.close();
    let ran = check(&place).run().code(13);
    for (id, why) in [
        (ids[0], "is damaged"),
        (ids[1], "record of 2021-01-01T00-00-00Z is missing"),
        (ids[2], "tree of 2022-01-01T00-00-00Z is missing"),
        (ids[3], "its record says"),
        (ids[4], "is missing in its tree"),
    ] {
        let line = ran.stdout.lines().find(|line| line.contains(id));
        assert!(line.is_some_and(|line| line.contains(why)), "{id}: {ran}");
    }
    assert_eq!(ran.stdout.matches("WRONG").count(), 5, "{ran}");
    place.assert_closed();
}

#[test]
fn data_that_the_server_has_lost_are_found() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::with(&sandbox, &["ForceCommand internal-sftp"]);
    let place = Place::over(&sandbox, &sshd);
    filled(&place);
    let plain = decrypted(&place);
    let inside = sandbox.path("source/large");
    let path = format!("/snapshots/{}{}", place.ids()[0], inside.display());
    let mut debugfs = tool("debugfs");
    let told = run(debugfs.arg("-R").arg(format!("blocks {path}")).arg(&plain));
    let blocks: Vec<u64> = told.split_whitespace().flat_map(str::parse).collect();
    assert!(blocks.len() >= 9 * 256, "{told}");
    let lost = DATA + blocks[700] * 4096;
    let mut fallocate = tool("fallocate");
    fallocate.args(["-p", "-l", "8192", "-o", &lost.to_string()]);
    run(fallocate.arg(&place.stored));

    // The filesystem does not know.
    check(&place).ok();
    let ran = check(&place).arg("--read-data").run().code(13);
    assert!(ran.stdout.contains("lost 8.0 KiB"), "{ran}");
    assert!(
        ran.stdout
            .contains(&format!("8192 bytes at {lost} (inode ")),
        "{ran}"
    );
    place.assert_closed();
}

#[test]
fn what_a_killed_run_has_left_is_sound_and_a_writer_is_waited_for() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    filled(&place);
    let mount = Mount::of(&place);
    let ran = check(&place).run().code(11);
    assert!(ran.stderr.contains("--wait"), "{ran}");
    large_file(&mount.at.join("snapshots/half"), 3 * MIB, 8);
    run(tool("sync").arg("-f").arg(&mount.at));
    fs::write(mount.at.join("more"), "more").expect("written");
    sandbox.kill_processes();
    let _ = Program::new(&sandbox, "umount").arg(&mount.at).run();
    let before = hash(&place.stored);
    let ran = check(&place).ok();
    assert!(
        ran.stderr.contains("journal was replayed in memory"),
        "{ran}"
    );
    assert!(hash(&place.stored) == before, "the image was written to");
}

/// It has let go of the image before the check looks who writes.
#[test]
fn a_backup_that_came_and_went_meanwhile_is_no_damage() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    filled(&place);
    // The check's own e2fsck waits until the backup is over. What was read before it is cached.
    let (began, go_on) = (sandbox.path("began"), sandbox.path("go on"));
    let bin = sandbox.dir("bin");
    let script = format!(
        "#!/bin/sh\ntouch '{}'\nwhile [ ! -e '{}' ]; do sleep 0.05; done\nexec {} \"$@\"\n",
        began.display(),
        go_on.display(),
        tool("e2fsck").get_program().display()
    );
    fs::write(bin.join("e2fsck"), script).expect("written");
    fs::set_permissions(bin.join("e2fsck"), fs::Permissions::from_mode(0o755)).expect("chmod");
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", bin.display());
    let checking = check(&place).env("PATH", path).spawn();
    wait_for("e2fsck", Duration::from_secs(60), || began.exists());
    large_file(&sandbox.path("source/later"), 9 * MIB, 4);
    place.backup(&sandbox.path("source")).ok();
    fs::write(&go_on, "").expect("written");
    let ran = checking.wait().code(11);
    assert!(ran.stderr.contains("written to it meanwhile"), "{ran}");
    check(&place).ok();
    place.assert_closed();
}

#[test]
fn what_cannot_be_is_refused() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    check(&place).run().code(10);
    place.init("100M").ok();
    check(&place).args(["--subset", "5%"]).run().code(2);
    check(&place).args(["--max-duration", "1h"]).run().code(2);
    for wrong in ["0%", "7/5", "some", "-1"] {
        let subset = format!("--subset={wrong}");
        check(&place).args(["--read-data", &subset]).run().code(2);
    }
    check(&place)
        .env("E2EBAK_PASSPHRASE", "wrong")
        .run()
        .code(12);
    fs::write(&place.stored, "no image").expect("written");
    check(&place).run().code(13);
}
