//! Restores real trees on real filesystems, and lets rsync judge whether the copy is the original.

#[path = "restore/ahead.rs"]
mod ahead;
#[path = "restore/odd.rs"]
mod odd;
#[path = "restore/support.rs"]
mod support;
#[path = "restore/tampered.rs"]
mod tampered;
#[path = "restore/unmounted.rs"]
mod unmounted;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use e2ebak::error::Kind;
use e2ebak::progress::Silent;
use e2ebak::restore::{MountedTree, verify};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};

use odd::odd_tree;
use support::{
    InMemory, KEEP, REPLACE, Scratch, as_nobody, assert_whole, differences, equipped, errors,
    leftovers, read, read_attribute, restore, run, set_attribute, set_mode, set_mtime, write,
};

/// Where a file has data: the offsets at which data and holes begin.
fn data_map(path: &Path) -> Vec<u64> {
    use rustix::fs::SeekFrom;
    let file = File::open(path).expect("open");
    let mut map = Vec::new();
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, SeekFrom::Hole(data)).expect("seek");
        map.extend([data, at]);
    }
    map
}

#[test]
fn every_kind_of_file_comes_back_as_it_was() {
    if !equipped(&["rsync", "setfacl"]) {
        return;
    }
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    odd_tree(&root.join("tree"));
    // A default ACL of DEST must not reach into the copy.
    run(Command::new("setfacl")
        .args(["-m", "d:u:4321:rwx,d:m::rwx"])
        .arg(&dest));

    let outcome = restore(&root, "tree", &dest, KEEP).expect("restores");
    assert_whole(&outcome);
    let (tree, copied) = (root.join("tree"), dest.join("tree"));
    assert_eq!(differences(&tree, &copied), "");
    let inode = |name: &str| copied.join(name).symlink_metadata().expect("stat").ino();
    assert_eq!(inode("three"), inode("links/one"));
    assert_eq!(inode("three"), inode("links/far/two"));
    assert_eq!(inode("up"), inode("links/up again"));
    let capability = read_attribute(&copied.join("capable"), "security.capability");
    assert_eq!(capability.len(), 20);

    let count = |kind: &[&str]| {
        let listed = run(Command::new("find")
            .arg(&tree)
            .args(kind)
            .args(["-printf", "."]));
        listed.len() as u64
    };
    assert_eq!(outcome.directories, count(&["-type", "d"]));
    assert_eq!(outcome.files, count(&["!", "-type", "d"]));

    let outcome = restore(&root, "tree", &scratch.0.join("as this"), KEEP).expect("restores");
    assert_whole(&outcome);
    assert_eq!(differences(&tree, &scratch.0.join("as this")), "");

    // A second run keeps everything, a third replaces everything: the same tree each time.
    let outcome = restore(&root, "tree", &dest, KEEP).expect("restores");
    assert_eq!(errors(&outcome), Vec::<String>::new());
    assert_eq!(
        (outcome.files, outcome.bytes),
        (0, 0),
        "nothing read in vain"
    );
    assert_eq!(
        outcome.skipped_existing.count(),
        count(&["!", "-type", "d"])
    );
    assert_eq!(differences(&tree, &copied), "");
    let outcome = restore(&root, "tree", &dest, REPLACE).expect("restores");
    assert_whole(&outcome);
    assert_eq!(differences(&tree, &copied), "");
    assert_eq!(leftovers(&dest).lines().count(), 1, "the tree's own");
}

#[test]
fn holes_stay_holes_and_zeros_stay_data() {
    if !equipped(&["rsync"]) {
        return;
    }
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    fs::create_dir(root.join("tree")).expect("mkdir");
    let sparse = File::create(root.join("tree/sparse")).expect("create");
    sparse.set_len(1 << 30).expect("truncate");
    for (at, byte, bytes) in [(5 << 20, b'x', 4096), (300 << 20, b'y', 1_000_000)] {
        sparse.write_all_at(&vec![byte; bytes], at).expect("write");
    }
    sparse
        .write_all_at(&[0; 1 << 20], 700 << 20)
        .expect("write");
    let hole = File::create(root.join("tree/only a hole")).expect("create");
    hole.set_len(67_108_863).expect("truncate");
    let ends = File::create(root.join("tree/ends in data")).expect("create");
    ends.write_all_at(b"end", 9_999_999).expect("write");
    for file in [&sparse, &hole, &ends] {
        file.sync_all().expect("sync");
    }

    let outcome = restore(&root, "tree", &dest, KEEP).expect("restores");
    assert_whole(&outcome);
    assert!(outcome.bytes < 3 << 20, "{} bytes were read", outcome.bytes);
    assert_eq!(differences(&root.join("tree"), &dest.join("tree")), "");
    for name in ["sparse", "only a hole", "ends in data"] {
        let (a, b) = (root.join("tree").join(name), dest.join("tree").join(name));
        assert_eq!(data_map(&a), data_map(&b), "{name}");
        let blocks = |path| fs::metadata(path).expect("stat").blocks();
        assert_eq!(blocks(&a), blocks(&b), "{name}");
    }
    assert!(data_map(&dest.join("tree/sparse")).contains(&(700 << 20)));
}

#[test]
fn a_path_means_what_it_means_to_cp() {
    if !equipped(&["cp", "find"]) {
        return;
    }
    let scratch = Scratch::new();
    let root = scratch.dir("root");
    fs::create_dir_all(root.join("dir/sub")).expect("mkdir");
    write(root.join("dir/file"), b"file");
    write(root.join("dir/sub/deep"), b"deep");
    symlink("dir", root.join("link")).expect("symlink");
    symlink("sub/deep", root.join("dir/to deep")).expect("symlink");

    for (from, to) in [
        ("dir", ""),
        ("dir", "new"),
        ("dir", "new/"),
        ("dir/", "new"),
        ("dir/", ""),
        ("dir/.", ""),
        ("dir/.", "new"),
        ("dir/sub/..", ""),
        ("dir//sub", ""),
        ("link", ""),
        ("link", "new"),
        ("link/", ""),
        ("link/", "new"),
        ("link/sub", ""),
        ("link/file", ""),
        ("link/file", "new"),
        ("link/to deep", "new"),
        (".", ""),
        (".", "new"),
        ("dir/file", "new/"),
        ("dir/file", "no/new"),
        ("dir/file/", "new"),
        ("absent", ""),
    ] {
        let (ours, theirs) = (scratch.dir("ours"), scratch.dir("theirs"));
        let done = restore(&root, from, &ours.join(to), KEEP);
        let copied = Command::new("cp")
            .args(["-a", "--"])
            .arg(format!("{}/{from}", root.display()))
            .arg(theirs.join(to))
            .output()
            .expect("starts");
        assert_eq!(
            done.is_ok(),
            copied.status.success(),
            "{from} to {to}: {done:?}"
        );
        let list = |dir: &Path| {
            let format = "%P %y %l\n";
            let mut find = Command::new("find");
            let listed = run(find.arg(dir).args(["-mindepth", "1", "-printf", format]));
            let mut lines: Vec<_> = listed.lines().map(String::from).collect();
            lines.sort();
            lines
        };
        assert_eq!(list(&ours), list(&theirs), "{from} to {to}");
        for dir in [ours, theirs] {
            fs::remove_dir_all(dir).expect("remove");
        }
    }
}

#[test]
fn links_on_the_way_into_the_source_stay_inside_it() {
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    write(scratch.0.join("secret"), b"outside");
    fs::create_dir_all(root.join("etc/sub")).expect("mkdir");
    write(root.join("etc/passwd"), b"inside");
    write(root.join("secret"), b"inside");
    symlink("/etc", root.join("absolute")).expect("symlink");
    symlink("../../..", root.join("etc/sub/up")).expect("symlink");

    for (from, name) in [
        ("absolute/passwd", "a"),
        ("etc/sub/up/etc/passwd", "b"),
        ("etc/sub/up/secret", "c"),
        ("/../../secret", "d"),
    ] {
        assert_whole(&restore(&root, from, &dest.join(name), KEEP).expect("restores"));
        assert_eq!(read(dest.join(name)), b"inside", "{from}");
    }
    let error = restore(&root, "proc/self/root", &dest, KEEP).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
}

#[test]
fn what_is_there_stays_unless_it_may_be_replaced() {
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    fs::create_dir_all(root.join("t/dir")).expect("mkdir");
    fs::create_dir_all(dest.join("t/file in the source")).expect("mkdir");
    for name in ["same", "dir/new", "file in the source"] {
        write(root.join("t").join(name), b"from the snapshot");
    }
    fs::create_dir(root.join("t/dir in the source")).expect("mkdir");
    write(root.join("t/dir in the source/below"), b"lost");
    write(dest.join("t/dir in the source"), b"a file");
    write(dest.join("t/same"), b"older");
    write(dest.join("t/other"), b"not in the snapshot");
    write(scratch.0.join("pointed at"), b"older");
    write(root.join("t/link"), b"from the snapshot");
    symlink(scratch.0.join("pointed at"), dest.join("t/link")).expect("symlink");

    let outcome = restore(&root, "t", &dest, KEEP).expect("restores");
    let mut skipped = outcome.skipped_existing.listed().to_vec();
    skipped.sort();
    assert_eq!(skipped, [dest.join("t/link"), dest.join("t/same")]);
    assert_eq!(errors(&outcome).len(), 2, "{:?}", errors(&outcome));
    assert_eq!(read(dest.join("t/same")), b"older");
    assert_eq!(read(dest.join("t/dir/new")), b"from the snapshot");
    assert_eq!(outcome.files, 1);

    let outcome = restore(&root, "t", &dest, REPLACE).expect("restores");
    let failed = errors(&outcome).join("\n");
    assert_eq!(outcome.errors.count(), 2, "{failed}");
    assert!(failed.contains("t/file in the source") && failed.contains("t/dir in the source"));
    assert_eq!(outcome.files, 3);
    for name in ["same", "link", "dir/new"] {
        assert_eq!(read(dest.join("t").join(name)), b"from the snapshot");
    }
    assert_eq!(read(dest.join("t/other")), b"not in the snapshot");
    assert_eq!(read(scratch.0.join("pointed at")), b"older");
    assert!(dest.join("t/file in the source").is_dir());
    assert_eq!(leftovers(&dest), "");
}

#[test]
fn a_link_in_place_of_a_directory_leads_nowhere() {
    let scratch = Scratch::new();
    let (root, dest, outside) = (
        scratch.dir("root"),
        scratch.dir("dest"),
        scratch.dir("outside"),
    );
    fs::create_dir_all(root.join("tree/sub/deeper")).expect("mkdir");
    write(root.join("tree/sub/file"), b"must not get out");
    write(root.join("tree/beside"), b"is restored");
    fs::create_dir(dest.join("tree")).expect("mkdir");
    symlink(&outside, dest.join("tree/sub")).expect("symlink");

    for options in [KEEP, REPLACE] {
        let outcome = restore(&root, "tree", &dest, options).expect("restores");
        assert_eq!(errors(&outcome).len(), 1, "{:?}", errors(&outcome));
        assert_eq!(outcome.errors.listed()[0].error.kind(), Kind::Exists);
        assert_eq!(read(dest.join("tree/beside")), b"is restored");
        assert_eq!(fs::read_dir(&outside).expect("list").count(), 0);
    }
    // DEST itself is the user's word.
    symlink(&outside, scratch.0.join("way")).expect("symlink");
    assert_whole(&restore(&root, "tree", &scratch.0.join("way"), KEEP).expect("restores"));
    assert_eq!(read(outside.join("tree/sub/file")), b"must not get out");
}

#[test]
fn a_directory_that_turns_into_a_link_meanwhile_leads_nowhere() {
    let scratch = Scratch::new();
    let (root, dest, outside) = (
        scratch.dir("root"),
        scratch.dir("dest"),
        scratch.dir("outside"),
    );
    for number in 0..20 {
        fs::create_dir_all(root.join(format!("tree/sub/{number}/x"))).expect("mkdir");
        write(root.join(format!("tree/sub/{number}/x/file")), b"inside");
    }
    fs::create_dir_all(dest.join("tree/sub")).expect("mkdir");
    let elsewhere = dest.join("tree/elsewhere");
    fs::create_dir(&elsewhere).expect("mkdir");
    let (real, trap) = (dest.join("tree/sub"), dest.join("tree/trap"));
    for bait in [&outside, Path::new("elsewhere")] {
        let is_link = |path: &Path| {
            path.symlink_metadata()
                .is_ok_and(|found| found.is_symlink())
        };
        let link = if is_link(&real) { &real } else { &trap };
        let _ = fs::remove_file(link);
        symlink(bait, link).expect("symlink");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                while !done.load(Ordering::Relaxed) {
                    let _ = rustix::fs::renameat_with(CWD, &real, CWD, &trap, exchange);
                }
            });
            for _ in 0..100 {
                let _ = restore(&root, "tree", &dest, REPLACE);
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(fs::read_dir(&outside).expect("list").count(), 0);
        assert_eq!(fs::read_dir(&elsewhere).expect("list").count(), 0);
    }
}

#[test]
fn depth_costs_neither_stack_nor_descriptors() {
    if !equipped(&["find", "rm"]) {
        return;
    }
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let top = rustix::fs::open(&root, flags, Mode::empty()).expect("open");
    let mut here = top.try_clone().expect("dup");
    let long = "l".repeat(255);
    for level in 0..2000 {
        let name = if level % 40 == 39 { long.as_str() } else { "d" };
        rustix::fs::mkdirat(&here, name, Mode::RWXU).expect("mkdir");
        here = rustix::fs::openat(&here, name, flags, Mode::empty()).expect("open");
    }
    // The first and the last level share a file, so that the link reaches all the way.
    rustix::fs::symlinkat("shared", &here, "bottom").expect("symlink");
    rustix::fs::linkat(&here, "bottom", &top, "d/top", AtFlags::empty()).expect("link");

    let outcome = restore(&root, "d", &dest, KEEP).expect("restores");
    assert_whole(&outcome);
    assert_eq!((outcome.directories, outcome.files), (2000, 2));
    let list = |dir: &Path| {
        run(Command::new("find")
            .arg("d")
            .current_dir(dir)
            .args(["-printf", "%d %f %y %m %n %T@\n"]))
    };
    assert!(list(&root) == list(&dest));
}

#[test]
fn a_full_disk_ends_the_run_and_leaves_no_half_file() {
    if !equipped(&["mount", "umount"]) {
        return;
    }
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    fs::create_dir(root.join("tree")).expect("mkdir");
    for number in 0..8 {
        write(root.join(format!("tree/{number}")), &vec![number; 3 << 20]);
    }
    let small = InMemory::mount(dest.clone(), "size=10m");
    let error = restore(&root, "tree", &dest, KEEP).unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{}", error.report());
    assert_eq!(leftovers(&dest), "");
    let whole = fs::read_dir(dest.join("tree")).expect("list").count();
    assert_eq!(whole, 3);
    for entry in fs::read_dir(dest.join("tree")).expect("list") {
        assert_eq!(
            entry.expect("entry").metadata().expect("stat").len(),
            3 << 20
        );
    }
    // With room, the same call takes the rest.
    run(Command::new("mount")
        .args(["-o", "remount,size=100m"])
        .arg(&dest));
    let outcome = restore(&root, "tree", &dest, KEEP).expect("restores");
    assert_eq!((outcome.files, outcome.skipped_existing.count()), (5, 3));
    drop(small);
}

#[test]
fn a_dest_that_can_do_less_gets_what_it_can_hold() {
    if !equipped(&["mount", "umount", "setfacl"]) {
        return;
    }
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    fs::create_dir_all(root.join("tree/sub")).expect("mkdir");
    write(root.join("tree/sub/guarded"), b"not for the group");
    run(Command::new("setfacl")
        .args(["-m", "u::rw,u:1234:rw,g::-,o::-,m::rw"])
        .arg(root.join("tree/sub/guarded")));
    write(root.join("tree/a"), b"two names");
    fs::hard_link(root.join("tree/a"), root.join("tree/sub/a")).expect("link");
    // Neither attributes nor ACLs, and another filesystem in the middle of DEST.
    fs::create_dir_all(dest.join("tree/sub")).expect("mkdir");
    let _other = InMemory::mount_kind("ramfs", dest.join("tree/sub"), "mode=755");

    let outcome = restore(&root, "tree", &dest, KEEP).expect("restores");
    assert_eq!(errors(&outcome), Vec::<String>::new());
    assert_eq!(outcome.shortfall.attributes, 1);
    assert_eq!(outcome.shortfall.hard_links, 1);
    assert_eq!(read(dest.join("tree/sub/a")), b"two names");
    let guarded = fs::metadata(dest.join("tree/sub/guarded")).expect("stat");
    assert_eq!(
        guarded.mode() & 0o777,
        0o600,
        "the mask is not the group's right"
    );
}

#[test]
fn another_filesystem_in_the_source_is_not_entered() {
    if !equipped(&["mount", "umount"]) {
        return;
    }
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    fs::create_dir_all(root.join("tree/mounted")).expect("mkdir");
    let _other = InMemory::mount(root.join("tree/mounted"), "size=1m");
    write(root.join("tree/mounted/file"), b"elsewhere");
    let outcome = restore(&root, "tree", &dest, KEEP).expect("restores");
    assert_eq!(errors(&outcome).len(), 1, "{:?}", errors(&outcome));
    assert!(!dest.join("tree/mounted/file").exists());
    assert!(restore(&root, "tree/mounted/file", &dest, KEEP).is_err());
}

#[test]
fn a_dest_inside_the_source_is_not_copied_into_itself() {
    let scratch = Scratch::new();
    let root = scratch.dir("root");
    fs::create_dir_all(root.join("tree/dest")).expect("mkdir");
    write(root.join("tree/file"), b"content");
    let dest = root.join("tree/dest");
    let outcome = restore(&root, "tree", &dest, KEEP).expect("restores");
    assert_eq!(errors(&outcome).len(), 1, "{:?}", errors(&outcome));
    assert_eq!(read(dest.join("tree/file")), b"content");
    let outcome = restore(&root, "tree", &root.join("tree/new"), KEEP).expect("restores");
    assert_eq!(outcome.files, 0);
    assert_eq!(errors(&outcome).len(), 1, "{:?}", errors(&outcome));
}

#[test]
fn an_ordinary_user_gets_what_is_to_be_had() {
    if !equipped(&["rsync", "setfacl"]) {
        return;
    }
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    std::os::unix::fs::chown(&dest, Some(65_534), Some(65_534)).expect("chown");
    let tree = root.join("tree");
    fs::create_dir_all(tree.join("sub")).expect("mkdir");
    for (name, mode) in [("mine", 0o644), ("sub/setuid", 0o6755), ("secret", 0o600)] {
        write(tree.join(name), b"content");
        set_mode(&tree.join(name), mode);
    }
    std::os::unix::fs::chown(tree.join("mine"), Some(65_534), Some(65_534)).expect("chown");
    run(Command::new("setfacl")
        .args(["-m", "u:1234:rw"])
        .arg(tree.join("mine")));
    set_attribute(&tree.join("mine"), "user.kept", b"value");
    set_attribute(&tree.join("mine"), "security.e2ebak", b"label");
    set_mode(&tree.join("sub"), 0o555);
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(
        CWD,
        tree.join("null"),
        FileType::CharacterDevice,
        Mode::RUSR,
        null,
    )
    .expect("mknod");
    rustix::fs::mknodat(CWD, tree.join("fifo"), FileType::Fifo, Mode::RUSR, 0).expect("mkfifo");
    symlink("mine", tree.join("link")).expect("symlink");

    let outcome = as_nobody(|| restore(&root, "tree", &dest, KEEP)).expect("restores");
    let failed = errors(&outcome).join("\n");
    assert_eq!(outcome.errors.count(), 2, "{failed}");
    assert!(
        failed.contains("tree/null") && failed.contains("tree/secret"),
        "{failed}"
    );
    // The tree, `sub`, `setuid`, `fifo` and `link` are root's.
    assert_eq!(outcome.shortfall.owners, 5);
    assert_eq!(outcome.shortfall.attributes, 1);
    let copied = dest.join("tree");
    assert_eq!(read_attribute(&copied.join("mine"), "user.kept"), b"value");
    let mode = |name: &str| fs::metadata(copied.join(name)).expect("stat").mode() & 0o7777;
    assert_eq!(mode("sub/setuid"), 0o755, "no setuid for another owner");
    assert_eq!(mode("sub"), 0o555);
    let acl = run(Command::new("getfacl").arg("-np").arg(copied.join("mine")));
    assert!(acl.contains("user:1234:rw-"), "{acl}");

    // What already is the user's own gives nothing to complain of.
    let again = dest.join("again");
    let outcome = as_nobody(|| restore(&root, "tree/mine", &again, KEEP)).expect("restores");
    assert_eq!((outcome.errors.count(), outcome.shortfall.owners), (0, 0));
}

#[test]
fn the_access_time_comes_back_too() {
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    write(root.join("file"), b"content");
    set_mtime(&root.join("file"), 1_500_000_000, 3);
    restore(&root, "file", &dest, KEEP).expect("restores");
    let copied = fs::metadata(dest.join("file")).expect("stat");
    assert_eq!((copied.atime(), copied.atime_nsec()), (1_500_000_000, 3));
    assert_eq!((copied.mtime(), copied.mtime_nsec()), (1_500_000_000, 3));
}

#[test]
fn what_was_restored_is_compared_where_it_has_landed() {
    let scratch = Scratch::new();
    let root = scratch.dir("root");
    fs::create_dir_all(root.join("x/x")).expect("mkdir");
    write(root.join("x/x/deep"), b"deep");
    write(root.join("x/file"), b"file");
    scratch.dir("there");
    for (from, to, file) in [
        ("x", "new", "new/file"),
        ("x", "there", "there/x/file"),
        ("x/.", "contents", "contents/file"),
        ("x/file", "named", "named"),
    ] {
        let outcome = restore(&root, from, &scratch.0.join(to), KEEP).expect("restores");
        let different = || {
            let mut source = MountedTree::open(&root).expect("opens");
            let landing = &outcome.landing;
            let found = verify(&mut source, from.as_ref(), landing, KEEP, &Silent);
            found.expect("compares").count()
        };
        assert_eq!(different(), 0, "{from} to {to}");
        write(scratch.0.join(file), b"other");
        assert_eq!(different(), 1, "{from} to {to}");
    }
}
