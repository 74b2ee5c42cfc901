//! The tools of the other tests can fail: the oracle sees every kind of difference, and the sandbox
//! finds and removes what a test leaves behind.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use common::{
    Sandbox, Sshd, assert_same_tree, differences, odd_tree, output, private_shell, root_or_skip,
    run, tool, wait_for,
};

fn copy(from: &Path, to: &Path) {
    let mut rsync = tool("rsync");
    // By default rsync takes two times in one second for the same.
    rsync.args(["-aHAX", "--numeric-ids", "--sparse", "--modify-window=-1"]);
    run(rsync.args([format!("{}/", from.display()), format!("{}/", to.display())]));
}

#[test]
fn a_faithful_copy_of_the_odd_tree_compares_equal() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    odd_tree(&sandbox.path("source"));
    copy(&sandbox.path("source"), &sandbox.path("copy"));
    assert_same_tree(&sandbox.path("source"), &sandbox.path("copy"));
}

#[test]
fn the_oracle_sees_every_kind_of_difference() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    odd_tree(&sandbox.path("source"));
    let shell = |script: &'static str| {
        move |dir: &Path| {
            drop(run(Command::new("sh")
                .args(["-ec", script])
                .current_dir(dir)))
        }
    };
    type Damage<'a> = (&'a str, Box<dyn Fn(&Path)>);
    let damages: [Damage; 10] = [
        (
            "content",
            Box::new(shell(
                "touch -r contents/4097 ref; printf x | dd of=contents/4097 bs=1 seek=99 conv=notrunc status=none; touch -r ref contents/4097; rm ref; touch -d @1400000000.000000040 .",
            )),
        ),
        ("a name", Box::new(shell("mv names/-rf names/-fr"))),
        ("a mode", Box::new(shell("chmod 0755 modes/4755"))),
        ("an owner", Box::new(shell("chown 1 modes/nobody"))),
        (
            "a nanosecond",
            Box::new(shell(
                "touch -d @1000000000.000000002 'times/one nanosecond'",
            )),
        ),
        (
            "an attribute",
            Box::new(shell("setfattr -x user.empty attributes/user")),
        ),
        (
            "an ACL",
            Box::new(shell("setfacl -x u:1 'attributes/access list'")),
        ),
        (
            "a device",
            Box::new(shell("rm specials/null; mknod -m 640 specials/null c 1 5")),
        ),
        (
            "a hard link",
            Box::new(shell("cp -a links/two links/new; mv links/new links/two")),
        ),
        (
            "a symlink",
            Box::new(|dir| {
                fs::remove_file(dir.join("links/to one")).expect("removed");
                symlink("two", dir.join("links/to one")).expect("a symlink");
            }),
        ),
    ];
    for (what, damage) in damages {
        let copied = sandbox.dir("copy");
        copy(&sandbox.path("source"), &copied);
        damage(&copied);
        let found = differences(&sandbox.path("source"), &copied);
        assert!(
            !found.is_empty(),
            "{what} was changed, and nothing was seen"
        );
        fs::remove_dir_all(&copied).expect("removed");
    }
}

#[test]
fn a_dropped_sandbox_takes_processes_mounts_and_loops_with_it() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let root = sandbox.root().to_path_buf();
    let mnt = sandbox.dir("mnt");
    fs::File::create(sandbox.path("disk"))
        .and_then(|file| file.set_len(8 << 20))
        .expect("a file");
    run(tool("mkfs.ext4").arg("-q").arg(sandbox.path("disk")));
    run(tool("mount")
        .args(["-o", "loop"])
        .arg(sandbox.path("disk"))
        .arg(&mnt));
    let mut sleeper = tool("sleep")
        .arg("600")
        .current_dir(&root)
        .spawn()
        .expect("sleep");
    assert_eq!(sandbox.mounts(), [mnt]);
    assert_eq!(sandbox.loops().len(), 1);
    assert_eq!(sandbox.processes().len(), 1);
    let blamed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        sandbox.assert_nothing_left();
    }));
    assert!(blamed.is_err(), "the sandbox does not see what is left");
    drop(sandbox);
    assert!(!sleeper.wait().expect("waited").success());
    assert!(!root.exists(), "the directory is still there");
    let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
    assert!(!mounts.contains(root.to_str().expect("a path")));
    let loops = || run(tool("losetup").arg("-l"));
    wait_for(
        "the loop device's end",
        std::time::Duration::from_secs(5),
        || !loops().contains(root.to_str().expect("a path")),
    );
}

#[test]
fn a_private_shell_leaves_no_mount() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let script = "mount -t tmpfs none \"$0\" && touch \"$0/inside\"";
    run(private_shell(script).arg(sandbox.path("tmp")));
    assert!(sandbox.mounts().is_empty());
    assert!(!sandbox.path("tmp/inside").exists());
}

/// sftp(1) as the client, so that a failure of the server is known from one of the program.
#[test]
fn the_throw_away_sshd_serves_files_and_can_be_cut_and_restarted() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let mut sshd = Sshd::start(&sandbox);
    fs::set_permissions(sshd.store(), fs::Permissions::from_mode(0o755)).expect("a mode");
    let list = |sshd: &Sshd| {
        let batch = sandbox.file("batch", format!("ls {}\n", sshd.store().display()));
        let mut sftp = tool("sftp");
        for option in sshd.ssh_config().lines() {
            sftp.args(["-o", &option.replacen(' ', "=", 1)]);
        }
        sftp.arg("-b")
            .arg(batch)
            .arg("-P")
            .arg(sshd.port().to_string());
        output(sftp.arg("127.0.0.1")).status.success()
    };
    assert!(list(&sshd), "no login");
    sshd.stop();
    assert!(!list(&sshd), "a login with no server");
    sshd.restart();
    assert!(list(&sshd), "no login after a restart");
    sshd.change_host_key();
    assert!(!list(&sshd), "a login at another host key");
}
