//! The kill matrix: something dies, freezes or fills up at a random moment of a backup. The next run
//! then succeeds by itself, nothing is left behind, and the tree restored equals the tree saved.
//!
//! `scripts/soak --rounds N --seed S` runs it at length; as a test it makes [`CI_ROUNDS`] rounds.

#[path = "../common/mod.rs"]
mod common;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Place, Running, Sandbox, Sshd, differences, kill, large_file, plain_tree};
use common::{root_or_skip, run, stored_bytes, tool};
use rustix::process::Signal;

/// Each disaster once.
const CI_ROUNDS: u64 = DISASTERS.len() as u64;
const CI_SEED: u64 = 1;
const NAME: &str = "whatever_dies_nothing_is_lost_and_nothing_is_stuck";
/// A backup takes one or two seconds.
const MOMENTS_MS: u64 = 2000;
/// A run that has not ended so long after its disaster is stuck.
const END_LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// A larger image is begun anew, so that the server's memory stays small.
const IMAGE_MAX: u64 = 150 * MIB;

#[derive(Clone, Copy, Debug)]
enum Disaster {
    /// SIGKILL to whose command line has this in it.
    Killed(&'static str),
    /// SIGKILL to all that is the client's.
    AllKilled,
    /// The server's side of the connection is killed.
    Cut,
    /// The server's side freezes, for some seconds or until the client gives up at a signal.
    Frozen {
        wakes: bool,
    },
    /// The client is stopped for some seconds.
    Stopped,
    /// The server is full, until the next run.
    Full,
    Signal(Signal),
}

const DISASTERS: [Disaster; 12] = [
    Disaster::Killed("e2ebak backup"),
    Disaster::Killed("session-process"),
    Disaster::Killed("/ssh "),
    Disaster::Killed("rsync"),
    Disaster::Killed("/cat"),
    Disaster::AllKilled,
    Disaster::Cut,
    Disaster::Frozen { wakes: true },
    Disaster::Frozen { wakes: false },
    Disaster::Stopped,
    Disaster::Full,
    Disaster::Signal(Signal::TERM),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    let value = |name: &str| -> Option<u64> {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)?.parse().ok()
    };
    if has("--list") {
        if !has("--ignored") {
            println!("{NAME}: test");
        }
        return ExitCode::SUCCESS;
    }
    if !root_or_skip() {
        return ExitCode::SUCCESS;
    }
    let rounds = value("--rounds").unwrap_or(CI_ROUNDS);
    let (lost, stuck) = Soak::new(value("--seed").unwrap_or(CI_SEED)).all(rounds);
    println!("rounds: {rounds}, lost: {lost}, stuck: {stuck}");
    ExitCode::from(u8::from(lost + stuck > 0))
}

struct Soak {
    sandbox: Sandbox,
    random: u64,
}

impl Soak {
    fn new(seed: u64) -> Self {
        Soak {
            sandbox: Sandbox::new(),
            random: seed,
        }
    }

    /// Sebastiano Vigna's SplitMix64.
    fn below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn all(mut self, rounds: u64) -> (u64, u64) {
        let store = self.sandbox.dir("store");
        run(tool("mount")
            .args(["-t", "tmpfs", "-o", "size=300M", "none"])
            .arg(&store));
        let sshd = Sshd::start(&self.sandbox);
        let source = self.sandbox.dir("source");
        plain_tree(&source, 100);
        let (mut lost, mut stuck) = (0, 0);
        for round in 0..rounds {
            // Every disaster in turn, so that a few rounds see them all.
            let disaster = DISASTERS[(round % DISASTERS.len() as u64) as usize];
            let moment = Duration::from_millis(self.below(MOMENTS_MS));
            let file = source.join(format!("changes {}", self.below(4)));
            large_file(&file, self.below(12 * MIB), self.random);
            let outcome = self.round(&sshd, &source, disaster, moment);
            if let Err((kind, why)) = outcome {
                eprintln!("round {round}: {disaster:?} after {moment:?}: {why}");
                match kind {
                    Wrong::Lost => lost += 1,
                    Wrong::Stuck => stuck += 1,
                }
            }
        }
        drop(sshd);
        (lost, stuck)
    }

    fn round(
        &mut self,
        sshd: &Sshd,
        source: &Path,
        disaster: Disaster,
        moment: Duration,
    ) -> Result<(), (Wrong, String)> {
        let sandbox = &self.sandbox;
        let place = Place::over(sandbox, sshd);
        let is_large = place.stored.exists() && stored_bytes(&place.stored) > IMAGE_MAX;
        if is_large || !place.stored.exists() {
            let _ = fs::remove_file(&place.stored);
            place.init("1G").ok();
        }
        let mut backup = place.backup(source).spawn();
        std::thread::sleep(moment);
        strike(disaster, sandbox, sshd, &place, &backup);
        let end = Instant::now() + END_LIMIT;
        while !backup.is_over() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        if !backup.is_over() {
            sandbox.kill_processes();
            sshd.cut_sessions();
            return Err((Wrong::Stuck, "the run does not end".into()));
        }
        drop(backup);
        let _ = fs::remove_file(ballast(&place));
        if let Disaster::Frozen { wakes: false } = disaster {
            sshd.cut_sessions();
        }
        let left = || sandbox.assert_nothing_left();
        // The session of a command that was killed drains by itself.
        common::wait_for("the session's end", END_LIMIT, || {
            sandbox
                .processes()
                .iter()
                .all(|(_, line)| !line.contains("session-process"))
        });
        if catch_unwind(AssertUnwindSafe(left)).is_err() {
            return Err((Wrong::Stuck, "something is left behind".into()));
        }
        // Snapshots are named by the second.
        std::thread::sleep(Duration::from_millis(1100));
        let next = place.backup(source).run();
        if !next.status.success() {
            return Err((Wrong::Lost, format!("the next run fails: {next}")));
        }
        let restored: PathBuf = sandbox.path("restored");
        let _ = fs::remove_dir_all(&restored);
        let what = format!("latest:{}", source.display());
        let restore = place.restore(&what, &restored).run();
        let different = match restore.status.success() {
            true => differences(source, &restored),
            false => vec![restore.to_string()],
        };
        match different.is_empty() {
            true => Ok(()),
            false => Err((Wrong::Lost, format!("not what was saved: {different:?}"))),
        }
    }
}

enum Wrong {
    Lost,
    Stuck,
}

fn strike(disaster: Disaster, sandbox: &Sandbox, sshd: &Sshd, place: &Place, backup: &Running) {
    let all = |words: &str, signal| {
        let processes = sandbox.processes().into_iter();
        let named = processes.filter(|(_, line)| line.contains(words) && !line.contains("sshd"));
        named.for_each(|(pid, _)| kill(pid, signal));
    };
    let some_seconds = Duration::from_secs(3);
    match disaster {
        Disaster::Killed(words) => all(words, Signal::KILL),
        Disaster::AllKilled => all("", Signal::KILL),
        Disaster::Cut => sshd.cut_sessions(),
        Disaster::Frozen { wakes } => {
            sshd.signal_sessions(Signal::STOP);
            std::thread::sleep(some_seconds);
            match wakes {
                true => sshd.signal_sessions(Signal::CONT),
                false => {
                    backup.signal(Signal::TERM);
                    std::thread::sleep(some_seconds);
                    backup.signal(Signal::TERM);
                }
            }
        }
        Disaster::Stopped => {
            all("", Signal::STOP);
            std::thread::sleep(some_seconds);
            all("", Signal::CONT);
        }
        Disaster::Full => {
            let mut fill = tool("dd");
            let file = format!("of={}", ballast(place).display());
            // It ends when there is no more room.
            let _ = fill.args(["if=/dev/zero", "bs=64K", &file]).output();
        }
        Disaster::Signal(signal) => backup.signal(signal),
    }
}

fn ballast(place: &Place) -> PathBuf {
    place.stored.with_file_name("ballast")
}
