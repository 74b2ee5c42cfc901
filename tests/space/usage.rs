//! Where the space goes.

use std::fs;

use super::common::{
    Place, Sandbox, Sshd, large_file, plain_tree, root_or_skip, run, stored_bytes, tool,
};
use super::forge;

const MIB: u64 = 1 << 20;

#[test]
fn unique_bytes_are_what_deleting_a_snapshot_frees() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    let source = sandbox.dir("source");
    plain_tree(&source, 30);
    large_file(&source.join("large"), 7 * MIB, 9);
    place.init("1G").ok();
    place.backup(&source).ok();
    forge(
        &place,
        &["2020-01-01T00-00-00Z", "2021-01-01T00-00-00Z"],
        5 * MIB,
    );

    let usage = |place: &Place| place.program("usage").arg("--json").ok().json();
    let before = usage(&place);
    let stored = stored_bytes(&place.stored);
    assert_eq!(before["stored_bytes"].as_u64(), Some(stored));
    assert_eq!(before["image_bytes"], 1 << 30);
    assert!(
        before["server_free_bytes"]
            .as_u64()
            .is_some_and(|free| free > 0)
    );
    let snapshots = before["snapshots"].as_array().expect("all");
    assert_eq!(snapshots.len(), 3, "{before}");
    let number = |value: &serde_json::Value| value.as_u64().expect("a number");
    let first = &snapshots[0];
    assert!(
        (5 * MIB..6 * MIB).contains(&number(&first["unique_bytes"])),
        "{first}"
    );
    assert!(
        (7 * MIB..9 * MIB).contains(&number(&first["shared_bytes"])),
        "{first}"
    );

    place.program("prune").args(["--keep-last", "2"]).ok();
    let after = usage(&place);
    let freed = number(&before["filesystem_used_bytes"]) - number(&after["filesystem_used_bytes"]);
    assert_eq!(freed, number(&first["unique_bytes"]), "{before}\n{after}");

    let table = place.program("usage").ok().stdout;
    for word in ["reclaimable", "2021-01-01T00-00-00Z", "unique"] {
        assert!(table.contains(word), "{table}");
    }
    place.assert_closed();
}

#[test]
fn what_the_server_does_not_tell_is_unknown() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::with(&sandbox, &["ForceCommand internal-sftp"]);
    let place = Place::over(&sandbox, &sshd);
    place.init("200M").ok();
    let usage = place.program("usage").arg("--json").ok().json();
    assert!(usage["stored_bytes"].is_null() && usage["reclaimable_bytes"].is_null());
    let told = place.program("usage").ok().stdout;
    assert!(told.contains("stored       unknown"), "{told}");
    assert!(told.contains("quota        unknown"), "{told}");
    assert!(usage["server_quota"].is_null(), "{usage}");
    place.assert_closed();
}

#[test]
fn a_quota_on_the_server_is_told() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    // What quota(1) prints is its manual's; filesystems with quotas are not for every machine.
    let bin = sandbox.dir("bin");
    let script = "#!/bin/sh\necho 'Disk quotas for user root (uid 0):'\n\
        echo 'Filesystem blocks quota limit grace files quota limit grace'\n\
        echo \"$(df -P . | tail -n 1 | cut -d ' ' -f 1) 2048 0 1048576 1 0 0\"\n";
    let quota = bin.join("quota");
    fs::write(&quota, script).expect("written");
    run(tool("chmod").arg("755").arg(&quota));
    let path = format!(
        "SetEnv PATH={}:/usr/sbin:/usr/bin:/sbin:/bin",
        bin.display()
    );
    let sshd = Sshd::with(&sandbox, &[&path]);
    let place = Place::over(&sandbox, &sshd);
    place.init("200M").ok();
    let usage = place.program("usage").arg("--json").ok().json();
    let quota = &usage["server_quota"];
    assert_eq!(quota["limit_bytes"].as_u64(), Some(1 << 30), "{usage}");
    assert_eq!(quota["used_bytes"].as_u64(), Some(2 << 20), "{usage}");
    let told = place.program("usage").ok().stdout;
    assert!(told.contains("used of 1.0 GiB"), "{told}");
    place.assert_closed();
}
