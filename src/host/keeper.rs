//! A process that keeps a mount namespace until the one that serves its filesystems has ended.
//!
//! Without it a server that is killed as the last process of its namespace never dies. Its exit
//! closes `/dev/fuse` and gives up the namespace in one go, and Linux (6.18, `do_exit`) takes down
//! the mounts before it lets go of the closed files: the filesystem on top is synced, the sync
//! waits for an answer from FUSE, and FUSE waits for the very exit that is waiting. The loop
//! device, and every losetup(8) on the machine, then hang until somebody aborts the connection.
//!
//! The keeper waits for the end of a pipe that the server holds open. So the server always exits
//! first, FUSE fails all that is pending, and the mounts go down with the keeper.

use std::process::{Child, Stdio};

use tracing::warn;

use super::tool::Tool;
use crate::error::{Attempt, Result};

/// Keeps the mount namespace of the thread that started it. Dropping it ends it.
#[derive(Debug)]
pub struct Keeper(Child);

impl Keeper {
    /// Start it before `/dev/fuse` is opened. It hears no signal but SIGKILL, and does not die with
    /// the thread that started it: other threads may still be serving.
    pub fn start() -> Result<Keeper> {
        let mut command = Tool::new("cat").deaf().outlive().command()?;
        command
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn();
        Ok(Keeper(
            child.attempt(|| "start a keeper of the mount namespace")?,
        ))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        if let Err(error) = self.0.wait() {
            warn!(%error, "the keeper of the mount namespace was not reaped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn it_stands_in_no_directory_and_ends_when_dropped() {
        let keeper = Keeper::start().expect("cat runs");
        let process = PathBuf::from(format!("/proc/{}", keeper.0.id()));
        let cwd = std::fs::read_link(process.join("cwd")).expect("it runs");
        assert_eq!(cwd, PathBuf::from("/"));
        drop(keeper);
        assert!(!process.exists());
    }

    #[test]
    fn it_outlives_the_thread_that_started_it() {
        let keeper = std::thread::spawn(Keeper::start).join().expect("no panic");
        let mut keeper = keeper.expect("cat runs");
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(keeper.0.try_wait().expect("ours").is_none());
    }
}
