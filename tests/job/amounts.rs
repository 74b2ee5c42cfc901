//! How much is stored, sent and held in memory.

use super::resources::{MEMORY_MAX, Most};
use super::*;

#[test]
fn a_second_snapshot_of_the_same_adds_no_data() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let source = sandbox.dir("source");
    plain_tree(&source, 200);
    large_file(&source.join("large"), 64 * MIB, 7);
    place.init("100G").ok();
    place.backup(&source).ok();
    let once = stored_bytes(&place.stored);
    assert!(
        once > 64 * MIB,
        "64 MiB of noise are stored in {once} bytes"
    );
    another_second();
    place.backup(&source).ok();
    let twice = stored_bytes(&place.stored);
    assert!(
        twice - once < 8 * MIB,
        "it grew from {once} to {twice} bytes"
    );

    let listed = place.snapshots();
    let new = |snapshot: &serde_json::Value| snapshot["new_bytes"].as_u64().expect("new_bytes");
    assert!(new(&listed[0]) >= 64 * MIB, "{listed:?}");
    assert_eq!(new(&listed[1]), 0, "{listed:?}");

    // Hard links, seen with the kernel's own eyes.
    let mounted = sandbox.dir("mnt");
    place.program("mount").arg("--read-only").arg(&mounted).ok();
    let dirs: Vec<PathBuf> = snapshot_dirs(&mounted).into_values().collect();
    assert_eq!(dirs.len(), 2);
    let inside = source.strip_prefix("/").expect("an absolute path");
    let mut files = 0;
    for file in run(tool("find").args([".", "-type", "f"]).current_dir(&source)).lines() {
        let inode = |dir: &Path| {
            fs::metadata(dir.join(inside).join(file))
                .expect("a file")
                .ino()
        };
        assert_eq!(inode(&dirs[0]), inode(&dirs[1]), "{file} is stored twice");
        files += 1;
    }
    assert_eq!(files, 201);
    Program::new(&sandbox, "umount").arg(&mounted).ok();
    place.assert_closed();
}

/// Where the snapshots are in a mounted filesystem, by their ids.
fn snapshot_dirs(mounted: &Path) -> BTreeMap<String, PathBuf> {
    let entries = fs::read_dir(mounted.join("snapshots"))
        .expect("snapshots")
        .flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    dirs.map(|entry| {
        (
            entry.file_name().to_string_lossy().into_owned(),
            entry.path(),
        )
    })
    .collect()
}

#[test]
fn only_what_changed_is_stored_anew() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    large_file(&source.join("large"), 32 * MIB, 7);
    fs::write(source.join("changes"), "aaaa").expect("a file");
    fs::write(source.join("goes"), "away").expect("a file");
    place.init("10G").ok();
    place.backup(&source).ok();
    another_second();
    // The same size within one second: only the nanoseconds tell.
    let metadata = fs::metadata(source.join("changes")).expect("a file");
    fs::write(source.join("changes"), "bbbb").expect("a file");
    let within = metadata.mtime_nsec() ^ 1;
    let stamp = format!("@{}.{within:09}", metadata.mtime());
    run(tool("touch")
        .args(["-d", &stamp])
        .arg(source.join("changes")));
    fs::remove_file(source.join("goes")).expect("removed");
    large_file(&source.join("comes"), MIB, 9);
    place.backup(&source).ok();

    let new_bytes = place.snapshots()[1]["new_bytes"].as_u64();
    assert_eq!(new_bytes, Some(MIB + 4));
    let ids = place.ids();
    let restore = |id: &str, name: &str| {
        let to = sandbox.path(name);
        place
            .restore(&format!("{id}:{}", source.display()), &to)
            .ok();
        to
    };
    assert_same_tree(&source, &restore(&ids[1], "second"));
    let first = restore(&ids[0], "first");
    assert_eq!(fs::read(first.join("changes")).expect("a file"), b"aaaa");
    assert_eq!(fs::read(first.join("goes")).expect("a file"), b"away");
    assert!(!first.join("comes").exists());
}

/// 1 GiB there and back, into an image of 5 TiB, within the memory that is promised.
#[test]
fn a_gibibyte_over_sshd() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    let source = sandbox.dir("source");
    for i in 0..4 {
        large_file(&source.join(format!("large {i}")), 240 * MIB, i + 1);
    }
    for i in 0..1024 {
        large_file(&source.join(format!("small {i}")), 64 << 10, 1000 + i);
    }
    place.init("5T").ok();
    let mut backup = place.backup(&source).spawn();
    let mut most = Most::default();
    while !backup.is_over() {
        most.look(&sandbox);
        std::thread::sleep(Duration::from_millis(100));
    }
    let memory = most.memory;
    let backup = backup.wait().code(0);
    assert!(memory > 0, "nothing was measured");
    assert!(
        memory < MEMORY_MAX,
        "a process of the program took {memory} bytes"
    );
    place.assert_closed();
    let began = Instant::now();
    let restored = sandbox.path("restored");
    place
        .restore(&format!("latest:{}", source.display()), &restored)
        .ok();
    eprintln!(
        "backup {:?}, restore {:?}, at most {} MiB",
        backup.took,
        began.elapsed(),
        memory / MIB
    );
    assert_same_tree(&source, &restored);
    place.assert_closed();
}
