//! `e2ebak mount` as a user runs it, and the raw engine.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use e2ebak::image::{self, LinkSettings};
use e2ebak::location::Location;
use e2ebak::remote::Access;
use rustix::process::Signal;

use crate::common::{PASSPHRASE, Program, kill, run, tool};
use crate::rig::Rig;
use crate::stop;
use crate::work::Engine;

/// Longer is hung.
const BOUND: Duration = Duration::from_secs(120);

/// A mounted image.
pub struct Ours {
    child: Child,
    pub pid: u32,
    pub at: PathBuf,
    /// The decrypted volume as the loop device sees it.
    pub volume: PathBuf,
}

impl Ours {
    pub fn mount(rig: &Rig, rtt: u64) -> Self {
        Ours::mount_through(rig, &rig.location("image", rtt))
    }

    pub fn mount_through(rig: &Rig, location: &str) -> Self {
        let at = rig.sandbox.dir("ours");
        // Taken down also when the benchmark is killed.
        let mut command = tool("setpriv");
        command.args(["--pdeathsig", "TERM", "--"]);
        command
            .arg(Program::binary())
            .args(["mount", "--foreground"]);
        command.args(rig.options()).arg(location).arg(&at);
        command.env("E2EBAK_PASSPHRASE", PASSPHRASE);
        let log = rig.sandbox.path("e2ebak.log");
        let errors = File::options().create(true).append(true).open(&log);
        command
            .stdout(Stdio::piped())
            .stderr(errors.expect("a log"));
        let mut child = command.spawn().expect("setpriv");
        let mut line = String::new();
        let out = child.stdout.take().expect("a pipe");
        BufReader::new(out).read_line(&mut line).expect("a pipe");
        if !line.starts_with("mounted") {
            let _ = child.kill();
            stop::check();
            let told = fs::read_to_string(log).unwrap_or_default();
            panic!("e2ebak does not mount: {:?}\n{told}", child.wait());
        }
        let (session, pid) = session_of(&at);
        Ours {
            child,
            pid,
            volume: session.join("fuse/volume"),
            at,
        }
    }

    pub fn open_volume(&self) -> File {
        open(&self.volume, true)
    }

    /// Unmounts, and returns when everything is synced on the server.
    pub fn unmount(mut self) {
        run(tool("umount").arg(&self.at));
        self.wait();
    }

    fn wait(&mut self) {
        let end = Instant::now() + BOUND;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > end {
                eprintln!("e2ebak mount does not end; it is killed");
                let _ = self.child.kill();
                kill(self.pid, Signal::KILL);
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.wait();
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            kill(self.child.id(), Signal::TERM);
            self.wait();
        }
    }
}

/// The directory and the process that serve a mountpoint.
fn session_of(at: &Path) -> (PathBuf, u32) {
    for entry in fs::read_dir("/run/e2ebak").expect("sessions").flatten() {
        let state = fs::read(entry.path().join("state.json")).unwrap_or_default();
        let Ok(state) = serde_json::from_slice::<serde_json::Value>(&state) else {
            continue;
        };
        if state["mountpoint"].as_str() == at.to_str() {
            let pid = state["pid"].as_u64().expect("a process");
            return (entry.path(), pid as u32);
        }
    }
    panic!("no session serves {}", at.display());
}

pub fn open(path: &Path, direct: bool) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if direct {
        options.custom_flags(libc::O_DIRECT);
    }
    options
        .open(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The file `raw` through the engine alone, in this process.
pub fn raw_engine(rig: &Rig, rtt: u64) -> Engine {
    let location: Location = rig.location("raw", rtt).parse().expect("a location");
    let link = LinkSettings {
        ssh_options: rig.ssh_settings(),
        ..LinkSettings::default()
    };
    let store = image::connect(&location, &link).unwrap_or_else(|e| panic!("{}", e.report()));
    let device = store
        .open(Access::ReadWrite)
        .unwrap_or_else(|e| panic!("{}", e.report()));
    Engine {
        device,
        _store: store,
    }
}
