//! Trees to back up.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, chownat, lsetxattr, makedev,
    mknodat, utimensat,
};

use super::{run, tool};

/// A small tree of plain files: `files` of them, a few KiB each, and a few directories deep.
pub fn plain_tree(dir: &Path, files: usize) {
    for i in 0..files {
        let inside = dir.join(format!("{:02}/{:02}", i % 7, i % 11));
        fs::create_dir_all(&inside).expect("a directory");
        let content = format!("file {i}\n").repeat(1 + i * 37 % 900);
        fs::write(inside.join(format!("{i}.txt")), content).expect("a file");
    }
}

/// A file of bytes that do not repeat and do not compress; another `seed`, other bytes.
pub fn large_file(path: &Path, size: u64, seed: u64) {
    let mut file = File::create(path).expect("a file");
    let mut state = seed | 1;
    let mut chunk = vec![0; 1 << 20];
    let mut left = size;
    while left > 0 {
        for word in chunk.chunks_exact_mut(8) {
            // Marsaglia's xorshift64.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let part = left.min(chunk.len() as u64);
        file.write_all(&chunk[..part as usize]).expect("written");
        left -= part;
    }
}

/// Every odd kind of file. Needs root, for device nodes, owners and trusted attributes.
pub fn odd_tree(dir: &Path) {
    fs::create_dir_all(dir).expect("a directory");
    names(dir);
    contents(dir);
    links(dir);
    specials(dir);
    modes_and_owners(dir);
    attributes(dir);
    // Last: whatever is made in a directory sets its time.
    times(dir);
}

fn names(dir: &Path) {
    let deep: PathBuf = dir.join("names").join(["deep"; 20].join("/"));
    fs::create_dir_all(&deep).expect("directories");
    fs::write(deep.join("file"), "deep").expect("a file");
    let longest = "n".repeat(255);
    for name in [
        b"new\nline".as_slice(),
        b"carriage\rreturn",
        b"not utf-8 \xff\xfe\x80",
        b"tab\tand\x1b[31mescape",
        b" leading and trailing space ",
        b"-rf",
        b"--delete",
        b"*?[a-z]{x,y}",
        b"quote\"s and 'quotes' and \\back\\slash",
        b"$(touch boom) `boom` ; | & #",
        "Größe – 漢字 – 🗄".as_bytes(),
        b"colon:in:name",
        b".hidden",
        b"...",
        longest.as_bytes(),
    ] {
        let path = dir.join("names").join(OsStr::from_bytes(name));
        fs::write(&path, name).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    }
}

fn contents(dir: &Path) {
    let dir = dir.join("contents");
    fs::create_dir(&dir).expect("a directory");
    fs::write(dir.join("empty"), "").expect("a file");
    for size in [1, 511, 4095, 4096, 4097, 65_537, 3_000_000] {
        large_file(&dir.join(size.to_string()), size, size);
    }
    fs::write(dir.join("zeros"), vec![0; 100_000]).expect("a file");
    let sparse = File::create(dir.join("sparse")).expect("a file");
    sparse.set_len(64 << 20).expect("grown");
    sparse.write_all_at(b"middle", 33 << 20).expect("written");
    let hollow = File::create(dir.join("only a hole")).expect("a file");
    hollow.set_len(10_000_000).expect("grown");
    // More extents than an inode holds.
    let shredded = File::create(dir.join("shredded")).expect("a file");
    for i in 0..400 {
        let at = i * 12_288;
        shredded.write_all_at(b"shred", at).expect("written");
    }
}

fn links(dir: &Path) {
    let dir = dir.join("links");
    fs::create_dir_all(dir.join("elsewhere")).expect("a directory");
    fs::write(dir.join("one"), "three names").expect("a file");
    fs::hard_link(dir.join("one"), dir.join("two")).expect("a link");
    fs::hard_link(dir.join("one"), dir.join("elsewhere/three")).expect("a link");
    symlink("one", dir.join("to one")).expect("a symlink");
    symlink("nowhere/at all", dir.join("dangling")).expect("a symlink");
    symlink("/etc/passwd", dir.join("absolute")).expect("a symlink");
    symlink("../..", dir.join("upwards")).expect("a symlink");
    symlink("circle", dir.join("circle")).expect("a symlink");
    symlink("x".repeat(4000), dir.join("long")).expect("a symlink");
    // ext4 keeps up to 59 bytes in the inode.
    symlink("y".repeat(59), dir.join("59")).expect("a symlink");
    symlink("y".repeat(60), dir.join("60")).expect("a symlink");
    let odd = OsStr::from_bytes(b"not utf-8 \xff\nnewline");
    symlink(odd, dir.join("odd")).expect("a symlink");
    fs::hard_link(dir.join("dangling"), dir.join("dangling too")).expect("a link");
}

fn specials(dir: &Path) {
    let dir = dir.join("specials");
    fs::create_dir(&dir).expect("a directory");
    let mode = Mode::from_raw_mode(0o640);
    let make = |name: &str, kind: FileType, major: u32, minor: u32| {
        let path = dir.join(name);
        mknodat(CWD, &path, kind, mode, makedev(major, minor))
            .unwrap_or_else(|e| panic!("{path:?}: {e}"));
    };
    make("null", FileType::CharacterDevice, 1, 3);
    make("large numbers", FileType::CharacterDevice, 300, 70_000);
    make("disk", FileType::BlockDevice, 7, 200);
    make("fifo", FileType::Fifo, 0, 0);
    make("socket", FileType::Socket, 0, 0);
    fs::hard_link(dir.join("fifo"), dir.join("fifo too")).expect("a link");
}

fn modes_and_owners(dir: &Path) {
    let dir = dir.join("modes");
    fs::create_dir(&dir).expect("a directory");
    for mode in [0o4755, 0o2755, 0o6711, 0o1777, 0o000, 0o444, 0o666] {
        let path = dir.join(format!("{mode:04o}"));
        fs::write(&path, "mode").expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
        let path = dir.join(format!("directory {mode:04o}"));
        fs::create_dir(&path).expect("a directory");
        fs::write(path.join("inside"), "mode").expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
    }
    for (name, uid, gid) in [
        ("nobody", 65_534, 65_534),
        ("unnamed", 54_321, 12_345),
        ("beyond 16 bits", 1_000_000, 2_000_000),
    ] {
        let path = dir.join(name);
        fs::write(&path, "owner").expect("a file");
        let (uid, gid) = (
            rustix::fs::Uid::from_raw(uid),
            rustix::fs::Gid::from_raw(gid),
        );
        chownat(CWD, &path, Some(uid), Some(gid), AtFlags::empty()).expect("an owner");
        symlink("nobody", dir.join(format!("link of {name}"))).expect("a symlink");
        let link = dir.join(format!("link of {name}"));
        chownat(CWD, link, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).expect("an owner");
    }
}

fn attributes(dir: &Path) {
    let dir = dir.join("attributes");
    fs::create_dir_all(dir.join("directory")).expect("a directory");
    let file = |name: &str| {
        let path = dir.join(name);
        fs::write(&path, name).expect("a file");
        path
    };
    let set = |path: &Path, name: &str, value: &[u8]| {
        lsetxattr(path, name, value, XattrFlags::empty())
            .unwrap_or_else(|e| panic!("{name} of {path:?}: {e}"));
    };
    let user = file("user");
    set(&user, "user.comment", b"binary \0\xff\n value");
    set(&user, "user.empty", b"");
    for i in 0..20 {
        set(&user, &format!("user.many.{i}"), &[i; 40]);
    }
    set(&file("large"), "user.large", &[b'v'; 3000]);
    set(&file("trusted"), "trusted.test", b"only root sees it");
    set(&dir.join("directory"), "user.of", b"a directory");
    // cap_net_bind_service=ep, as `struct vfs_cap_data` of version 2.
    let mut capability = [0; 20];
    capability[..4].copy_from_slice(&0x0200_0001_u32.to_le_bytes());
    capability[4..8].copy_from_slice(&(1_u32 << 10).to_le_bytes());
    set(&file("capability"), "security.capability", &capability);
    let acl = |rules: &str, path: &Path| {
        run(tool("setfacl").args(["-m", rules]).arg(path));
    };
    acl("u:1:rw,g:65534:r,u:54321:rwx", &file("access list"));
    acl("d:u:1:rwx,d:o::-,u:2:rx", &dir.join("directory"));
    fs::write(dir.join("directory/heir"), "inherits").expect("a file");
}

fn times(dir: &Path) {
    let path = dir.join("times");
    fs::create_dir(&path).expect("a directory");
    let set = |path: &Path, seconds: i64, nanoseconds: i64| {
        let time = Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        };
        let both = Timestamps {
            last_access: time,
            last_modification: time,
        };
        utimensat(CWD, path, &both, AtFlags::SYMLINK_NOFOLLOW).expect("a time");
    };
    for (name, seconds, nanoseconds) in [
        ("epoch", 0, 0),
        ("one nanosecond", 1_000_000_000, 1),
        ("last nanosecond", 1_234_567_890, 999_999_999),
        ("1960", -315_619_200, 500_000_000),
        ("1902", -2_145_916_800, 0),
        ("after 2038", 2_500_000_000, 123_456_789),
        ("2400", 13_569_465_600, 7),
    ] {
        let file = path.join(name);
        fs::write(&file, name).expect("a file");
        set(&file, seconds, nanoseconds);
    }
    symlink("epoch", path.join("link")).expect("a symlink");
    set(&path.join("link"), 987_654_321, 123_456_789);
    set(&path, 1_111_111_111, 222_222_222);
    set(&dir.join("names"), 999_999_999, 5);
    set(dir, 1_400_000_000, 40);
}

/// A socket that somebody listens on, as long as what is returned lives.
pub fn listening_socket(path: &Path) -> UnixListener {
    UnixListener::bind(path).expect("a socket")
}
