//! sshfs and sftp as a user runs them, with the cipher that e2ebak asks for.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::common::{kill, tool};
use crate::rig::Rig;
use crate::stop;

const BOUND: Duration = Duration::from_secs(60);

/// The server's directory, mounted.
pub struct Sshfs {
    child: Child,
    pub at: PathBuf,
}

impl Sshfs {
    pub fn mount(rig: &Rig, rtt: u64) -> Self {
        Sshfs::mount_with(rig, rig.port(rtt), "sshfs", &[])
    }

    pub fn mount_with(rig: &Rig, port: u16, name: &str, options: &[&str]) -> Self {
        let at = rig.sandbox.dir(name);
        let mut command = tool("setpriv");
        command.args(["--pdeathsig", "TERM", "--", "sshfs", "-f"]);
        command.args(options);
        command.arg("-F").arg(rig.peers_config());
        command.args(["-p", &port.to_string()]);
        command.arg(format!("127.0.0.1:{}", rig.store().display()));
        let child = command.arg(&at).spawn().expect("setpriv");
        let mut sshfs = Sshfs { child, at };
        let end = Instant::now() + BOUND;
        while !rig.sandbox.mounts().contains(&sshfs.at) {
            stop::check();
            let ended = sshfs.child.try_wait().expect("a child");
            assert!(ended.is_none(), "sshfs does not mount: {ended:?}");
            assert!(Instant::now() < end, "sshfs does not mount");
            std::thread::sleep(Duration::from_millis(10));
        }
        sshfs
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }
}

impl Drop for Sshfs {
    fn drop(&mut self) {
        let _ = tool("umount").arg(&self.at).stderr(Stdio::null()).status();
        let end = Instant::now() + Duration::from_secs(10);
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > end {
                let _ = self.child.kill();
                let _ = tool("umount").arg("-l").arg(&self.at).status();
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.wait();
    }
}

/// A session of sftp that is logged in and takes commands.
pub struct Sftp {
    child: Child,
    commands: ChildStdin,
    lines: Receiver<String>,
}

impl Sftp {
    pub fn start(rig: &Rig, rtt: u64) -> Self {
        let mut command = tool("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "sftp", "-q", "-b", "-"]);
        command.arg("-F").arg(rig.peers_config());
        command.args(["-P", &rig.port(rtt).to_string(), "127.0.0.1"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("setpriv");
        let commands = child.stdin.take().expect("a pipe");
        let out = child.stdout.take().expect("a pipe");
        let (hand, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if hand.send(line).is_err() {
                    return;
                }
            }
        });
        let mut sftp = Sftp {
            child,
            commands,
            lines,
        };
        sftp.wait();
        sftp
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `-f`: synced on the server when it returns.
    pub fn put(&mut self, local: &Path, remote: &Path) {
        self.run(&format!("put -f {} {}", local.display(), remote.display()));
    }

    pub fn get(&mut self, remote: &Path, local: &Path) {
        self.run(&format!("get {} {}", remote.display(), local.display()));
    }

    fn run(&mut self, command: &str) {
        writeln!(self.commands, "{command}").expect("sftp listens");
        self.wait();
    }

    /// Until it has done all commands.
    fn wait(&mut self) {
        const MARK: &str = "all done";
        writeln!(self.commands, "!echo {MARK}").expect("sftp listens");
        loop {
            match self.lines.recv_timeout(Duration::from_millis(50)) {
                Ok(line) if line == MARK => return,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => stop::check(),
                Err(RecvTimeoutError::Disconnected) => {
                    stop::check();
                    panic!("sftp has ended: {:?}", self.child.wait());
                }
            }
        }
    }
}

impl Drop for Sftp {
    fn drop(&mut self) {
        kill(self.child.id(), Signal::KILL);
        let _ = self.child.wait();
    }
}
