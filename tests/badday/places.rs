//! Command lines, mountpoints, sources and tools that do not fit.

use super::*;

#[test]
fn bad_usage_is_exit_2() {
    let sandbox = Sandbox::new();
    let source = sandbox.dir("source");
    for location in [
        "",
        "nas:",
        "sftp://nas",
        "http://nas/a",
        "-oProxyCommand=touch x:a",
        "nas:a/",
    ] {
        let program = Program::new(&sandbox, "backup")
            .arg("--")
            .arg(location)
            .arg(&source);
        let ran = program.run().code(2);
        assert!(ran.stderr.contains(location), "{ran}");
    }
    Program::bare(&sandbox).run().code(2);
    Program::bare(&sandbox)
        .arg("no-such-verb")
        .run()
        .code(2)
        .says("no-such-verb");
    let place = Place::local(&sandbox);
    for size in ["0", "-1", "1", "5X", "99999999999T", "4096", "1000001"] {
        place.init(size).run().code(2);
        assert!(!place.stored.exists(), "an image of {size} was made");
    }
    place.program("backup").run().code(2);
    place.assert_closed();
}

#[test]
fn a_source_that_does_not_exist_is_named_before_anything_is_done() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("1G").ok();
    place
        .backup(Path::new("/no/such/source"))
        .run()
        .code_of(&[1, 2])
        .says("/no/such/source");
    assert_eq!(place.ids().len(), 0);
    place.assert_closed();
}

#[test]
fn an_image_in_use_is_exit_11() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    place.init("1G").ok();
    let (source, mounted) = (sandbox.dir("source"), sandbox.dir("mnt"));
    place.program("mount").arg(&mounted).ok();
    let ran = place.backup(&source).run().code(11);
    // Who holds it: this machine and a process.
    let node = run(tool("uname").arg("-n"));
    assert!(ran.stderr.contains(node.trim()), "{ran}");
    place
        .program("mount")
        .arg(sandbox.dir("elsewhere"))
        .run()
        .code(11);
    place
        .program("mount")
        .arg(&mounted)
        .run()
        .code_of(&[1, 11])
        .says("mnt");
    assert!(fs::write(mounted.join("still"), "works").is_ok());
    Program::new(&sandbox, "umount").arg(&mounted).ok();
    place.assert_closed();
}

#[test]
fn a_mountpoint_that_cannot_be_one_is_refused() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("1G").ok();
    let full = sandbox.dir("full");
    fs::write(full.join("file"), "mine").expect("a file");
    let file = sandbox.file("file", "no directory");
    let busy = sandbox.dir("busy");
    run(tool("mount").args(["-t", "tmpfs", "none"]).arg(&busy));
    let missing = sandbox.path("missing");
    for mountpoint in [&full, &file, &busy, &missing] {
        let name = mountpoint
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name");
        let ran = place.program("mount").arg(mountpoint).run();
        ran.code_of(&[1, 2, 11]).says(name);
        assert_eq!(place.side_files(), [""; 0]);
    }
    assert_eq!(fs::read(full.join("file")).expect("there"), b"mine");
    run(tool("umount").arg(&busy));
    Program::new(&sandbox, "umount")
        .arg(&busy)
        .run()
        .code(1)
        .says("busy");
    place.assert_closed();
}

/// Hides a program, with `$1` an empty directory and `$2` a pattern of names, from all the places
/// where it may be looked for.
const HIDE: &str = "mount -t tmpfs none \"$1\"; d=$1; p=$2; for b in /usr/bin /usr/sbin; do
        mkdir -p \"$d$b/upper\" \"$d$b/work\"
        mount -t overlay -o \"lowerdir=$b,upperdir=$d$b/upper,workdir=$d$b/work\" none $b
    done
    rm -f /usr/bin/$p /usr/sbin/$p";

#[test]
fn a_missing_program_names_its_debian_package() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    let empty = sandbox.dir("empty");
    let without = |program: Program<'_>, names: &str| {
        let ran = program.after(HIDE, &[&empty, Path::new(names)]).run();
        place.assert_closed();
        ran
    };
    let ran = without(place.init("1G"), "mk*fs*");
    ran.code(1).says("e2fsprogs");
    assert!(
        !place.stored.exists(),
        "an image without a filesystem was left"
    );
    place.init("1G").ok();
    without(place.backup(&source), "rsync")
        .code(1)
        .says("package rsync");
    let ran = without(place.backup(&source), "mount");
    ran.code(1).says("package mount");
    let ran = without(place.backup(&source), "losetup");
    // mount(8) makes loop devices without it.
    if ran.status.code() != Some(0) {
        ran.code(1).says("package mount");
    }
    let remote = || Program::new(&sandbox, "snapshots").arg("nas:a.img");
    without(remote(), "ssh").code(1).says("openssh-client");
}

/// An rsync that does its work and then ends with another exit code.
fn rsync_that_exits(sandbox: &Sandbox, code: i32, says: &str) -> PathBuf {
    let bin = sandbox.dir(&format!("rsync-{code}"));
    let script =
        format!("#!/bin/sh\n/usr/bin/rsync \"$@\" || exit $?\necho '{says}' >&2\nexit {code}\n");
    fs::write(bin.join("rsync"), script).expect("a script");
    fs::set_permissions(bin.join("rsync"), fs::Permissions::from_mode(0o755)).expect("a mode");
    bin
}

#[test]
fn what_rsync_says_decides_what_is_published() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    plain_tree(&source, 10);
    place.init("10G").ok();
    let backup = |code: i32, says: &str| {
        let bin = rsync_that_exits(&sandbox, code, says);
        let path = format!("{}:/usr/sbin:/usr/bin", bin.display());
        std::thread::sleep(Duration::from_millis(1100));
        let ran = place.backup(&source).env("PATH", path).run();
        place.assert_closed();
        ran
    };
    let vanished = "file has vanished: \"/tmp/gone\"";
    let ran = backup(24, vanished).code(0);
    let told = ran.stdout.clone() + &ran.stderr;
    assert!(told.contains("vanished"), "{ran}");
    assert_eq!(place.ids().len(), 1);

    let denied = "rsync: [sender] send_files failed to open \"/secret\": Permission denied (13)";
    backup(23, denied).code(3).says("/secret");
    assert_eq!(place.ids().len(), 2);

    for code in [1, 11, 12, 20, 30] {
        backup(code, "rsync: [sender] something else")
            .code(1)
            .says("rsync");
        assert_eq!(place.ids().len(), 2, "published after rsync exit {code}");
    }
    backup(24, vanished).code(0);
    assert_eq!(place.ids().len(), 3);
}

/// Names that would be options, commands or two lines to a careless program.
#[test]
fn odd_names_of_sources_and_images_are_only_names() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let mut place = Place::local(&sandbox);
    place.stored = sandbox
        .dir("store")
        .join("an image; touch boom\n$(touch boom).img");
    place.location = place.stored.display().to_string();
    place.init("1G").ok();
    for name in [
        "-e sh",
        "new\nline",
        "wild*card [x]?",
        "colon:name",
        " space ",
        "--delete",
    ] {
        let source = sandbox.dir(name);
        plain_tree(&source, 3);
        std::thread::sleep(Duration::from_millis(1100));
        place.program("backup").arg("--").arg(name).ok();
        let restored = sandbox.path("restored");
        place
            .restore(&format!("latest:{}", source.display()), &restored)
            .ok();
        assert_same_tree(&source, &restored);
        fs::remove_dir_all(&restored).expect("removed");
    }
    let boom = output(tool("find").arg(sandbox.root()).args(["-name", "boom"]));
    assert!(boom.stdout.is_empty());
    sandbox.assert_nothing_left();
}

/// Without root and without FUSE one sentence says what is missing.
#[test]
fn without_root_or_fuse_the_need_is_said() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("1G").ok();
    sandbox.open_to(65_534);
    let program = place.backup(&sandbox.dir("source"));
    let program = program.after(common::NO_FUSE, &[]).by_user(65_534);
    let ran = program.run().code(1).says("root");
    assert_eq!(ran.stderr.matches("error:").count(), 1, "{ran}");
    place.assert_closed();
}
