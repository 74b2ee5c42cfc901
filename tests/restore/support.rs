//! What the tests of restore stand on: scratch places, the judge, and shorthand.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use e2ebak::error::Result;
use e2ebak::progress::Silent;
use e2ebak::restore::{MountedTree, Options, Outcome, Overwrite, TEMPORARY_PREFIX, copy};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};

/// Whether the test can run: as root, with the tools. In CI it must.
pub fn equipped(tools: &[&str]) -> bool {
    let found = |tool: &&&str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|dir| dir.join(tool).exists())
    };
    let missing = tools.iter().find(|tool| !found(tool)).copied();
    let missing = missing.or((!rustix::process::geteuid().is_root()).then_some("root"));
    match missing {
        Some(missing) if std::env::var_os("CI").is_some_and(|ci| ci == "true") => {
            panic!("this test needs {missing}")
        }
        Some(missing) => eprintln!("skipped: needs {missing}"),
        None => {}
    }
    missing.is_none()
}

/// A directory that goes with all its depth.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("e2ebak-restore-test-")
            .tempdir()
            .expect("a directory");
        let path = dir.keep();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        Scratch(path)
    }

    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir(&path).expect("mkdir");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = Command::new("rm").arg("-rf").arg(&self.0).status();
    }
}

/// A filesystem in memory that is unmounted however the test ends.
pub struct InMemory(PathBuf);

impl InMemory {
    pub fn mount(at: PathBuf, options: &str) -> Self {
        InMemory::mount_kind("tmpfs", at, options)
    }

    pub fn mount_kind(kind: &str, at: PathBuf, options: &str) -> Self {
        run(Command::new("mount")
            .args(["-t", kind, "-o", options, kind])
            .arg(&at));
        InMemory(at)
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("starts");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub static GO_ON: AtomicBool = AtomicBool::new(false);

pub const KEEP: Options<'static> = Options {
    overwrite: Overwrite::Never,
    wants: None,
    totals: None,
    stop: &GO_ON,
};
pub const REPLACE: Options<'static> = Options {
    overwrite: Overwrite::Always,
    wants: None,
    totals: None,
    stop: &GO_ON,
};

pub fn restore(root: &Path, from: &str, dest: &Path, options: Options<'_>) -> Result<Outcome> {
    let mut source = MountedTree::open(root).expect("opens");
    copy(&mut source, Path::new(from), dest, options, &Silent)
}

pub fn errors(outcome: &Outcome) -> Vec<String> {
    let listed = outcome.errors.listed().iter();
    listed
        .map(|failure| {
            let chain = failure.error.chain().join(": ");
            format!("{}: {chain}", failure.path.display())
        })
        .collect()
}

#[track_caller]
pub fn assert_whole(outcome: &Outcome) {
    assert_eq!(errors(outcome), Vec::<String>::new());
    assert_eq!(outcome.skipped_existing.count(), 0);
    assert_eq!(outcome.shortfall, Default::default());
}

/// Everything that rsync would change to make `copy` what `original` is.
pub fn differences(original: &Path, copy: &Path) -> String {
    let slash = |path: &Path| {
        let mut path = path.as_os_str().to_owned();
        path.push("/");
        path
    };
    run(Command::new("rsync")
        .args(["-naHAXi", "--delete", "--numeric-ids", "--checksum"])
        .arg("--modify-window=-1") // nanoseconds too
        .arg(slash(original))
        .arg(slash(copy)))
}

pub fn write(path: impl AsRef<Path>, content: &[u8]) {
    fs::write(path, content).expect("write");
}

pub fn read(path: impl AsRef<Path>) -> Vec<u8> {
    fs::read(path).expect("read")
}

pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

pub fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("utimens");
}

pub fn set_attribute(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).expect("setxattr");
}

/// Names of temporary files that were left in a tree.
pub fn leftovers(tree: &Path) -> String {
    run(Command::new("find")
        .arg(tree)
        .args(["-name", &format!("{TEMPORARY_PREFIX}*")]))
}

/// Runs as an ordinary user: on Linux the credentials are a thread's own.
pub fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    let (uid, gid) = (
        rustix::fs::Uid::from_raw(65_534),
        rustix::fs::Gid::from_raw(65_534),
    );
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            set_thread_groups(&[]).expect("setgroups");
            set_thread_res_gid(gid, gid, gid).expect("setresgid");
            set_thread_res_uid(uid, uid, uid).expect("setresuid");
            work()
        });
        thread.join().expect("does not panic")
    })
}

pub fn read_attribute(path: &Path, name: &str) -> Vec<u8> {
    let mut value = Vec::with_capacity(1000);
    rustix::fs::lgetxattr(path, name, rustix::buffer::spare_capacity(&mut value)).expect("xattr");
    value
}
