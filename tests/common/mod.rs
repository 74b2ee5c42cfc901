//! What the tests of the whole program share: a sandbox, the program, a real sshd, trees of every
//! odd kind of file, and an oracle that compares them.

// Every test binary uses a part of it.
#![allow(dead_code, unused_imports)]

mod decrypted;
mod place;
mod program;
mod proxy;
mod same;
mod sandbox;
mod sshd;
mod tree;

pub use decrypted::{Decrypted, SECTOR, decrypt, is_clean};
pub use place::Place;
pub use program::{PASSPHRASE, Program, Ran, Running};
pub use proxy::{Proxy, Shape};
pub use same::{assert_same_tree, differences};
pub use sandbox::{Sandbox, is_server, kill, with_descendants};
pub use sshd::Sshd;
pub use tree::{large_file, listening_socket, odd_tree, plain_tree};

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// False when this process is not root, after having said so: the test returns then. Under CI=true
/// it fails instead.
pub fn root_or_skip() -> bool {
    have(rustix::process::geteuid().is_root(), "root")
}

/// The same for a program that must be installed.
pub fn tool_or_skip(program: &str) -> bool {
    have(find_tool(program).is_some(), program)
}

/// The same for any condition.
pub fn have(there: bool, what: &str) -> bool {
    if !there {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "this test needs {what}, and may not skip under CI=true"
        );
        eprintln!("skipped: this test needs {what}");
    }
    there
}

const TOOL_DIRECTORIES: [&str; 5] = [
    "/usr/local/sbin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/usr/lib/openssh",
];

pub fn find_tool(program: &str) -> Option<PathBuf> {
    let path = TOOL_DIRECTORIES
        .iter()
        .map(|dir| Path::new(dir).join(program));
    path.into_iter().find(|file| file.exists())
}

/// A tool with the C locale and a PATH that has the system's directories.
pub fn tool(program: &str) -> Command {
    let found = find_tool(program).unwrap_or_else(|| panic!("{program} is not installed"));
    let mut command = Command::new(found);
    command.env("LC_ALL", "C").stdin(Stdio::null());
    command.env(
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    );
    command
}

/// Runs a command that must succeed, and returns what it printed.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn output(command: &mut Command) -> Output {
    command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Runs a script in a mount namespace of its own: what it mounts is gone when it ends.
pub fn private_shell(script: &str) -> Command {
    let mut command = tool("unshare");
    command.args(["--mount", "--propagation", "private", "/bin/sh", "-euc"]);
    command.arg(script);
    command
}

/// A script that leaves an ordinary user without a /dev/fuse.
pub const NO_FUSE: &str = "mount -t tmpfs none /mnt; touch /mnt/fuse; chmod 0 /mnt/fuse
    mount --bind /mnt/fuse /dev/fuse; umount /mnt";

/// Waits until `done` holds; fails naming `what` when it has not after `bound`.
pub fn wait_for(what: &str, bound: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + bound;
    while !done() {
        assert!(Instant::now() < end, "{what} has not come after {bound:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Bytes a file really occupies.
pub fn stored_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    metadata.blocks() * 512
}
