//! An ordinary user, with fuse2fs in a user and mount namespace. Where /dev/fuse is root's alone,
//! the test gives this user one of its own in a private mount namespace.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use common::{
    PASSPHRASE, Place, Program, Sandbox, assert_same_tree, have, large_file, output, plain_tree,
    private_shell, root_or_skip, run, tool, tool_or_skip, wait_for,
};

/// An account that need not exist.
const UID: u32 = 1234;

/// A /dev/fuse and an account: sftp-server and fusermount3 want to know the user's name.
const OWN_FUSE: &str = "mount -t tmpfs -o dev none \"$1\"; mknod -m 666 \"$1/fuse\" c 10 229
    mount --bind \"$1/fuse\" /dev/fuse; cp /etc/passwd \"$1/passwd\"
    echo tester:x:1234:1234::/tmp:/bin/sh >> \"$1/passwd\"; mount --bind \"$1/passwd\" /etc/passwd";

fn possible() -> bool {
    if !root_or_skip() || !tool_or_skip("fuse2fs") {
        return false;
    }
    let mut try_it = tool("setpriv");
    try_it.args(["--reuid=1234", "--regid=1234", "--clear-groups"]);
    try_it.args(["unshare", "--user", "--map-root-user", "--mount", "true"]);
    have(
        output(&mut try_it).status.success(),
        "user namespaces for everybody",
    )
}

fn own(path: &Path) {
    run(tool("chown")
        .arg("-R")
        .arg(format!("{UID}:{UID}"))
        .arg(path));
}

fn as_user<'a>(program: Program<'a>, sandbox: &Sandbox) -> Program<'a> {
    program.after(OWN_FUSE, &[&sandbox.dir("dev")]).by_user(UID)
}

#[test]
fn an_ordinary_user_backs_up_and_restores() {
    if !possible() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.open_to(UID);
    let place = Place::piped(&sandbox);
    let source = sandbox.dir("source");
    plain_tree(&source, 40);
    run(tool("ln")
        .arg(source.join("00/00/0.txt"))
        .arg(source.join("a hard link")));
    run(tool("setfattr")
        .args(["-n", "user.comment", "-v", "value"])
        .arg(source.join("00/00/0.txt")));
    // fuse2fs shows whole seconds.
    run(tool("find")
        .arg(&source)
        .args(["-exec", "touch", "-h", "-d", "@1700000000", "{}", "+"]));
    own(&source);

    as_user(place.init("10G"), &sandbox).ok();
    for expected in 1..=2 {
        as_user(place.backup(&source), &sandbox).ok();
        let listed = as_user(place.program("snapshots").arg("--json"), &sandbox)
            .ok()
            .json();
        assert_eq!(listed.as_array().map(Vec::len), Some(expected), "{listed}");
        std::thread::sleep(std::time::Duration::from_millis(1100));
    }
    assert_eq!(place.snapshots()[1]["new_bytes"].as_u64(), Some(0));
    let restored = sandbox.path("restored");
    fs::create_dir(&restored).expect("a directory");
    own(&restored);
    let what = format!("latest:{}", source.display());
    as_user(place.restore(&what, &restored.join("source")), &sandbox).ok();
    assert_same_tree(&source, &restored.join("source"));
    place.assert_closed();
}

/// The session is a member of the namespace that it mounts in; fuse2fs above it waits for nobody.
#[test]
fn everything_can_be_killed_at_once_in_any_order() {
    if !possible() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.open_to(UID);
    let place = Place::piped(&sandbox);
    let source = sandbox.dir("source");
    plain_tree(&source, 40);
    large_file(&source.join("large"), 60 << 20, 1);
    own(&source);
    // fuse2fs writes no journal: what a kill leaves may need a repair by hand.
    let init = || {
        let _ = fs::remove_file(&place.stored);
        let _ = fs::remove_file(place.stored.with_extension("img.lease"));
        as_user(place.init("10G"), &sandbox).ok();
    };
    for round in 0..9_u64 {
        init();
        let backup = as_user(place.backup(&source), &sandbox).spawn();
        let is = |words: &'static str| move |line: &str| line.contains(words);
        let (session, fuse2fs) = (is("session-process"), is("fuse2fs"));
        wait_for("fuse2fs", Duration::from_secs(60), || {
            sandbox.processes().iter().any(|(_, line)| fuse2fs(line))
        });
        std::thread::sleep(Duration::from_millis(100 + round * 70));
        match round % 3 {
            0 => sandbox.kill_processes_by(|(_, line)| session(line)),
            1 => sandbox.kill_processes_by(|(_, line)| !session(line)),
            _ => sandbox.kill_processes_by(|(_, line)| !fuse2fs(line)),
        }
        drop(backup);
        sandbox.assert_nothing_left();
    }
    init();
    as_user(place.backup(&source), &sandbox).ok();
    place.assert_closed();
}

#[test]
fn a_file_that_may_not_be_read_makes_exit_3_and_is_listed() {
    if !possible() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.open_to(UID);
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    plain_tree(&source, 5);
    own(&source);
    let secret = source.join("somebody else's");
    fs::write(&secret, "secret").expect("a file");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("a mode");
    as_user(place.init("10G"), &sandbox).ok();
    as_user(place.backup(&source), &sandbox)
        .run()
        .code(3)
        .says("somebody else's");
    // Published all the same.
    assert_eq!(place.ids().len(), 1);
    place.assert_closed();
}

/// `mount` serves a filesystem that the user's own processes see, from within one namespace.
#[test]
fn an_ordinary_user_mounts_and_unmounts() {
    if !possible() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.open_to(UID);
    let place = Place::local(&sandbox);
    as_user(place.init("10G"), &sandbox).ok();
    let mounted = sandbox.dir("mnt");
    own(&mounted);
    let script = format!(
        "{OWN_FUSE}
        cd \"$2\"
        exec setpriv --reuid={UID} --regid={UID} --clear-groups env -i PATH=/usr/sbin:/usr/bin \
            HOME=\"$2/home\" XDG_RUNTIME_DIR=\"$2/run\" TMPDIR=\"$2/tmp\" E2EBAK_PASSPHRASE='{PASSPHRASE}' \
            sh -euc '
                ./e2ebak mount store/a.img mnt
                echo hello > mnt/file
                test \"$(cat mnt/file)\" = hello
                ./e2ebak umount mnt
                test ! -e mnt/file
                ./e2ebak mount --read-only store/a.img mnt
                test \"$(cat mnt/file)\" = hello
                ./e2ebak umount mnt
            '"
    );
    let mut command = private_shell(&script);
    run(command
        .arg("sh")
        .arg(sandbox.dir("dev"))
        .arg(sandbox.root()));
    place.assert_closed();
}

/// What needs neither root nor FUSE works without both; what does says so.
#[test]
fn looking_needs_neither_root_nor_fuse() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.open_to(UID);
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    plain_tree(&source, 5);
    own(&source);
    let plain = |program: Program<'_>| program.after(common::NO_FUSE, &[]).by_user(UID).run();
    let succeeds = |program| drop(plain(program).code(0));
    succeeds(place.init("10G"));
    place.backup(&source).ok();
    succeeds(place.program("snapshots"));
    succeeds(place.program("info"));
    let what = format!("latest:{}", source.display());
    let restored = sandbox.path("tmp/restored");
    succeeds(place.restore(&what, &restored));
    assert_same_tree(&source, &restored);
    let mounted = sandbox.dir("mnt");
    own(&mounted);
    plain(place.program("mount").arg(&mounted))
        .code(1)
        .says("mounting needs root");
    place.assert_closed();
}
