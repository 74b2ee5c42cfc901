//! What may happen to a backup.

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use rustix::process::Signal;

use super::common::{Place, Program, Running, Sandbox, Sshd, is_server, kill, tool};

/// What sets the clock.
pub const FAKETIME: &str = "faketime";
const FAKETIME_LIBRARY: &str = "/usr/$LIB/faketime/libfaketimeMT.so.1";

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Disaster {
    /// SIGKILL to whose command line has this in it.
    Killed(&'static str),
    /// SIGKILL to all that is the client's.
    AllKilled,
    /// The server's side of the connection is killed.
    Cut,
    /// The whole server goes away for some seconds.
    ServerDown,
    /// The server's side freezes for some seconds: shorter, or longer, than the client waits
    /// before it dials again; or until the client gives up at a signal.
    Frozen(Thaw),
    /// The client is stopped for some seconds.
    Stopped,
    /// The server is full, until the next run.
    ServerFull,
    /// The disk of the client's temporary and runtime files is full.
    ClientFull,
    /// The client's clock is set back by a day and more.
    ClockSetBack,
    Signal(Signal),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Thaw {
    Soon,
    /// The client has gone on over another connection by then; what was frozen arrives late.
    Late,
    Never,
}

pub const DISASTERS: [Disaster; 16] = [
    Disaster::Killed("e2ebak backup"),
    Disaster::Killed("session-process"),
    Disaster::Killed("ssh -"),
    Disaster::Killed("rsync"),
    Disaster::AllKilled,
    Disaster::Cut,
    Disaster::Frozen(Thaw::Late),
    Disaster::Frozen(Thaw::Never),
    Disaster::Stopped,
    Disaster::ServerFull,
    Disaster::ClientFull,
    Disaster::ClockSetBack,
    // Those that CI does without.
    Disaster::Killed("/cat"),
    Disaster::ServerDown,
    Disaster::Frozen(Thaw::Soon),
    Disaster::Signal(Signal::TERM),
];

/// A client that is asked for a sign of life every second gives up after two or three.
const LATE: Duration = Duration::from_secs(6);
const SOME_SECONDS: Duration = Duration::from_secs(2);
const A_DAY_AND_MORE: &str = "-100000";

impl Disaster {
    /// The backup that it will happen to.
    pub fn prepare<'a>(self, place: &Place<'a>, source: &std::path::Path) -> Program<'a> {
        let sandbox = place.sandbox;
        // No connection here outlives these, frozen or not; 30 s and 5 min are what the program
        // takes for safe over a network.
        let late_writes = match self {
            Disaster::Frozen(_) => "8s",
            _ => "1s",
        };
        let backup = place
            .backup(source)
            .args(["--late-writes", late_writes, "--io-deadline", "60s"])
            .args(["--ssh-option", "ServerAliveInterval=1"])
            .args(["--ssh-option", "ServerAliveCountMax=1"]);
        match self {
            Disaster::ClientFull => {
                let script = "mount -t tmpfs -o size=128k,mode=700 none \"$1\"
                    mkdir -p /run/e2ebak; mount --bind \"$1\" /run/e2ebak";
                let disk = sandbox.dir("disk");
                backup.env("TMPDIR", &disk).after(script, &[&disk])
            }
            Disaster::ClockSetBack => {
                let clock = sandbox.file("clock", "+0");
                backup
                    .env("LD_PRELOAD", FAKETIME_LIBRARY)
                    .env("FAKETIME_TIMESTAMP_FILE", clock)
                    .env("FAKETIME_NO_CACHE", "1")
                    .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
                    // Only the clock lies; times of files are told, and set, as they are.
                    .env("NO_FAKE_STAT", "1")
                    .env("FAKE_UTIME", "0")
            }
            _ => backup,
        }
    }

    /// `stop` is how long a stopped client stays so. Says whether there was anything to strike.
    pub fn strike(
        self,
        place: &Place,
        sshd: &mut Sshd,
        backup: &mut Running,
        stop: Duration,
    ) -> bool {
        let sandbox = place.sandbox;
        match self {
            // As soon as it is there.
            Disaster::Killed(words) => {
                while !backup.is_over() {
                    if signal_all(sandbox, words, Signal::KILL) > 0 {
                        return true;
                    }
                    sleep(Duration::from_millis(5));
                }
                return false;
            }
            Disaster::AllKilled => drop(signal_all(sandbox, "", Signal::KILL)),
            Disaster::Cut => sshd.cut_sessions(),
            Disaster::ServerDown => {
                sshd.stop();
                sleep(SOME_SECONDS);
                sshd.restart();
            }
            Disaster::Frozen(thaw) => {
                let frozen = sshd.signal_sessions(Signal::STOP);
                match thaw {
                    Thaw::Soon => sleep(SOME_SECONDS / 2),
                    Thaw::Late => sleep(LATE),
                    Thaw::Never => {
                        sleep(SOME_SECONDS);
                        backup.signal(Signal::TERM);
                        sleep(SOME_SECONDS);
                        backup.signal(Signal::TERM);
                    }
                }
                if thaw != Thaw::Never {
                    frozen.into_iter().for_each(|pid| kill(pid, Signal::CONT));
                }
            }
            Disaster::Stopped => {
                let stopped = signal_all(sandbox, "", Signal::STOP);
                sleep(stop);
                signal_all(sandbox, "", Signal::CONT);
                return stopped > 0;
            }
            Disaster::ServerFull => fill(&ballast(place)),
            Disaster::ClientFull => {
                let disk = sandbox.path("disk/ballast");
                let disk = disk.strip_prefix("/").expect("absolute");
                fill(&PathBuf::from(format!("/proc/{}/root", backup.pid())).join(disk));
            }
            Disaster::ClockSetBack => {
                fs::write(sandbox.path("clock"), A_DAY_AND_MORE).expect("written");
            }
            Disaster::Signal(signal) => backup.signal(signal),
        }
        true
    }

    /// When the run has ended.
    pub fn repair(self, place: &Place, sshd: &Sshd) {
        match self {
            Disaster::ServerFull => fs::remove_file(ballast(place)).expect("removed"),
            Disaster::Frozen(Thaw::Never) => sshd.cut_sessions(),
            _ => {}
        }
    }
}

/// To all of the client whose command line has `words` in it; says to how many.
fn signal_all(sandbox: &Sandbox, words: &str, signal: Signal) -> usize {
    let mut processes = sandbox.processes();
    processes.retain(|(_, line)| line.contains(words) && !is_server(line));
    processes.iter().for_each(|(pid, _)| kill(*pid, signal));
    processes.len()
}

fn ballast(place: &Place) -> PathBuf {
    place.stored.with_file_name("ballast")
}

/// Ends when there is no more room.
fn fill(file: &std::path::Path) {
    let file = format!("of={}", file.display());
    let _ = tool("dd").args(["if=/dev/zero", "bs=4K", &file]).output();
}
