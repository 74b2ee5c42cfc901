//! A tree of everything that a file can be.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use e2ebak::restore::TEMPORARY_PREFIX;
use rustix::fs::{CWD, FileType, Mode};

use crate::support::{run, set_attribute, set_mode, set_mtime, write};

/// One of every kind of file that there is, and then some.
pub fn odd_tree(tree: &Path) {
    for dir in ["links/far", "modes", "acl", "times", "owners", "empty"] {
        fs::create_dir_all(tree.join(dir)).expect("mkdir");
    }
    write(tree.join("plain"), b"plain content");
    write(tree.join("nothing"), b"");
    write(tree.join("new\nline\x1b[31m"), b"named to mislead");
    write(
        tree.join(OsStr::from_bytes(b"\xff\xfe not UTF-8")),
        b"bytes",
    );
    write(tree.join("n".repeat(255)), b"longest");
    write(tree.join(format!("{TEMPORARY_PREFIX}00000000")), b"mine");

    write(tree.join("links/one"), b"one inode");
    fs::hard_link(tree.join("links/one"), tree.join("links/far/two")).expect("link");
    fs::hard_link(tree.join("links/one"), tree.join("three")).expect("link");
    for (name, to) in [
        ("dangling", "nowhere"),
        ("absolute", "/etc/passwd"),
        ("up", "../../.."),
        ("same", "links/one"),
    ] {
        symlink(to, tree.join(name)).expect("symlink");
        set_mtime(&tree.join(name), 1_000_000_007, 7);
    }
    fs::hard_link(tree.join("up"), tree.join("links/up again")).expect("link");
    // A filesystem with small blocks takes no longer ones than a block.
    let long = tree.join("long link");
    let longest = symlink("x".repeat(4000), &long).or_else(|_| symlink("x".repeat(1000), &long));
    longest.expect("symlink");
    set_attribute(&tree.join("dangling"), "trusted.of", b"a link");

    for (name, kind, device) in [
        ("null", FileType::CharacterDevice, (1, 3)),
        ("disk", FileType::BlockDevice, (259, 70_000)),
        ("fifo", FileType::Fifo, (0, 0)),
        ("socket", FileType::Socket, (0, 0)),
    ] {
        let device = rustix::fs::makedev(device.0, device.1);
        let path = tree.join(name);
        rustix::fs::mknodat(CWD, &path, kind, Mode::empty(), device).expect("mknod");
        set_mode(&path, 0o4632);
        set_mtime(&path, 2_000_000, 2);
        rustix::fs::chown(&path, Some(rustix::fs::Uid::from_raw(77)), None).expect("chown");
        set_mode(&path, 0o4632);
    }
    set_attribute(&tree.join("null"), "trusted.on", b"a device");

    for mode in [0o0, 0o555, 0o1777, 0o2755, 0o4111, 0o7777] {
        let dir = tree.join(format!("modes/dir {mode:o}"));
        fs::create_dir(&dir).expect("mkdir");
        write(dir.join("inside"), b"content");
        let file = tree.join(format!("modes/file {mode:o}"));
        write(&file, b"content");
        for path in [&dir, &file] {
            std::os::unix::fs::chown(path, Some(1001), Some(4_000_000_000)).expect("chown");
            set_mode(path, mode);
        }
    }
    write(tree.join("owners/big"), b"");
    std::os::unix::fs::chown(
        tree.join("owners/big"),
        Some(u32::MAX - 1),
        Some(3_000_000_000),
    )
    .expect("chown");

    let acl = |args: &[&str], name: &str| {
        run(Command::new("setfacl").args(args).arg(tree.join(name)));
    };
    write(tree.join("acl/file"), b"shared");
    acl(&["-m", "u:1234:rw,g::---,g:99:r,m::rw"], "acl/file");
    acl(&["-m", "u:1234:rwx", "-m", "d:u:1234:rwx,d:g:99:r"], "acl");
    write(tree.join("acl/inherits"), b"");
    write(tree.join("acl/plain"), b"");
    acl(&["-b"], "acl/plain");

    write(tree.join("attributes"), b"");
    for (name, value) in [
        ("user.text", &b"text"[..]),
        ("user.empty", b""),
        ("user.bytes", b"\0\xff\n"),
        ("trusted.secret", b"root's"),
        ("security.e2ebak", b"label"),
    ] {
        set_attribute(&tree.join("attributes"), name, value);
        set_attribute(&tree.join("empty"), name, value);
    }
    // cap_net_raw=ep, version 2 (linux/capability.h): chown would clear it.
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    write(tree.join("capable"), b"");
    std::os::unix::fs::chown(tree.join("capable"), Some(5), Some(5)).expect("chown");
    set_attribute(&tree.join("capable"), "security.capability", &capability);

    for (name, seconds, nanoseconds) in [
        ("nanoseconds", 1_700_000_000, 123_456_789),
        ("1905", -2_050_000_000, 999_999_999),
        ("2100", 4_102_444_800, 1),
    ] {
        let path = tree.join("times").join(name);
        write(&path, b"");
        set_mtime(&path, seconds, nanoseconds);
    }
    set_mtime(&tree.join("times"), -1, 500_000_000);
}
