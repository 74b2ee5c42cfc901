//! A process that keeps a mount namespace.
//!
//! A namespace lives as long as its last member. A server that is killed as the last member of the
//! one that its filesystem is mounted in never dies: its exit closes `/dev/fuse` and gives up the
//! namespace in one go, and Linux (6.18, `do_exit`) takes down the mounts before it lets go of the
//! closed files: the filesystem on top is synced, the sync waits for an answer from FUSE, and FUSE
//! for the very exit that is waiting. The loop device, and every losetup(8) on the machine, then
//! hang until somebody aborts the connection.
//!
//! So a server stays out of the namespace where it can ([`View::Of`]), and a keeper is its member
//! there when the command that made it is gone. Where it cannot, the keeper waits for the end of a
//! pipe that the server holds open, and outlives the server if the two are not killed at once.

use std::io::{Read, Write};
use std::process::{Child, Stdio};

use tracing::warn;

use super::tool::Tool;
use super::view::View;
use crate::error::{Attempt, Error, Kind, Result};

/// Keeps a mount namespace. Dropping it ends it.
#[derive(Debug)]
pub struct Keeper(Child);

impl Keeper {
    /// Start it before `/dev/fuse` is opened. It hears no signal but SIGKILL, and does not die with
    /// the thread that started it: other threads may still be serving. It is a member of the
    /// namespace when this returns.
    pub fn start(view: View) -> Result<Keeper> {
        let mut command = Tool::new("cat").inside(view).deaf().outlive().command()?;
        command
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut start = || -> Result<Keeper> {
            let mut keeper = Keeper(command.spawn()?);
            keeper.greet()?;
            Ok(keeper)
        };
        start().attempt(|| "start a keeper of the mount namespace")
    }

    /// What is sent comes back once the program runs.
    fn greet(&mut self) -> Result<()> {
        let (Some(to), Some(mut from)) = (&mut self.0.stdin, self.0.stdout.take()) else {
            return Err(Error::new(Kind::Io, "it has no pipes"));
        };
        let mut back = [0];
        to.write_all(b"\n")
            .and_then(|()| from.read_exact(&mut back))
            .attempt(|| "hear from it")
    }

    /// The namespace that it keeps, as long as it lives.
    pub fn view(&self) -> View {
        View::Of(self.0.id())
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
        let keeper = Keeper::start(View::Own).expect("cat runs");
        let process = PathBuf::from(format!("/proc/{}", keeper.0.id()));
        let cwd = std::fs::read_link(process.join("cwd")).expect("it runs");
        assert_eq!(cwd, PathBuf::from("/"));
        drop(keeper);
        assert!(!process.exists());
    }

    #[test]
    fn it_outlives_the_thread_that_started_it() {
        let start = || Keeper::start(View::Own);
        let keeper = std::thread::spawn(start).join().expect("no panic");
        let mut keeper = keeper.expect("cat runs");
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(keeper.0.try_wait().expect("ours").is_none());
    }

    #[test]
    fn a_namespace_that_is_gone_cannot_be_kept() {
        let nobody = View::Of(u32::MAX);
        let error = Keeper::start(nobody).unwrap_err();
        assert!(error.report().contains("keeper"), "{}", error.report());
    }
}
