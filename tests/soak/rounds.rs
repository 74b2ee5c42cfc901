//! Rounds of a backup that is struck, the next one, and what is restored of both.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::common::{
    Place, Sandbox, Sshd, differences, large_file, plain_tree, run, stored_bytes, tool,
};
use super::disaster::{DISASTERS, Disaster};

/// A backup takes a second or two; what is killed is waited for.
const MOMENTS_MS: u64 = 1000;
/// A run that has not ended so long after its disaster is stuck.
const END_LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// A larger image is begun anew, so that the server's memory stays small.
const IMAGE_MAX: u64 = 150 * MIB;
/// How long a client is stopped: in CI, and at length.
const STOPS: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(60)];

#[derive(Default)]
pub struct Found {
    pub lost: u64,
    pub stuck: u64,
    /// Rounds in which the run was not yet over and what was to die was there.
    pub struck: u64,
}

enum Wrong {
    Lost(String),
    Stuck(String),
}

struct Ended {
    struck: bool,
    latest: String,
}

pub struct Soak {
    sandbox: Sandbox,
    random: u64,
    stop: Duration,
    /// The number of the disaster that strikes all rounds, if not each in turn.
    pub only: Option<u64>,
    found: Found,
    /// The newest snapshot that is known to be whole; what it holds is in `before`.
    kept: Option<String>,
}

impl Soak {
    pub fn new(seed: u64, at_length: bool) -> Self {
        Soak {
            sandbox: Sandbox::new(),
            random: seed,
            stop: STOPS[usize::from(at_length)],
            only: None,
            found: Found::default(),
            kept: None,
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

    pub fn all(&mut self, rounds: u64) -> Found {
        let store = self.sandbox.dir("store");
        run(tool("mount")
            .args(["-t", "tmpfs", "-o", "size=300M", "none"])
            .arg(&store));
        let mut sshd = Sshd::start(&self.sandbox);
        let source = self.sandbox.dir("source");
        plain_tree(&source, 100);
        for round in 0..rounds {
            // Every disaster in turn, so that a few rounds see them all.
            let number = self.only.unwrap_or(round) % DISASTERS.len() as u64;
            let disaster = DISASTERS[number as usize];
            let moment = Duration::from_millis(self.below(MOMENTS_MS));
            let file = source.join(format!("changes {}", self.below(4)));
            large_file(&file, self.below(12 * MIB), self.random);
            let started = Instant::now();
            let outcome = self.round(&mut sshd, &source, disaster, moment);
            let took = started.elapsed().as_secs_f64();
            eprint!("round {round}: {disaster:?} after {moment:?}: {took:.1} s, ");
            match outcome {
                Ok(Ended { struck, latest }) => {
                    eprintln!("{}", if struck { "struck" } else { "was over" });
                    self.found.struck += u64::from(struck);
                    self.keep(latest);
                    continue;
                }
                Err(Wrong::Lost(why)) => {
                    eprintln!("lost: {why}");
                    self.found.lost += 1;
                }
                Err(Wrong::Stuck(why)) => {
                    eprintln!("stuck: {why}");
                    self.found.stuck += 1;
                }
            }
            // What it has left must not be blamed on the next.
            self.sandbox.kill_processes();
            sshd.restart();
            let _ = fs::remove_file(sshd.stored("a.img"));
        }
        std::mem::take(&mut self.found)
    }

    /// What is in `restored` is what the snapshot must still hold a round later.
    fn keep(&mut self, id: String) {
        let before = self.sandbox.path("before");
        let _ = fs::remove_dir_all(&before);
        fs::rename(self.sandbox.path("restored"), before).expect("renamed");
        self.kept = Some(id);
    }

    fn round(
        &self,
        sshd: &mut Sshd,
        source: &Path,
        disaster: Disaster,
        moment: Duration,
    ) -> Result<Ended, Wrong> {
        let place = Place::over(&self.sandbox, sshd);
        let mut kept = self.kept.as_ref();
        let is_large = place.stored.exists() && stored_bytes(&place.stored) > IMAGE_MAX;
        if is_large || !place.stored.exists() {
            let _ = fs::remove_file(&place.stored);
            place.init("1G").ok();
            kept = None;
        }
        let mut backup = disaster.prepare(&place, source).spawn();
        std::thread::sleep(moment);
        let was_over = backup.is_over();
        let hit = disaster.strike(&place, sshd, &mut backup, self.stop);
        let end = Instant::now() + END_LIMIT;
        // The session of a command that was killed drains by itself.
        let runs = || {
            let processes = self.sandbox.processes();
            processes.iter().any(|(_, l)| l.contains("session-process"))
        };
        while !backup.is_over() || runs() {
            if Instant::now() > end {
                let left = states(&self.sandbox);
                return Err(Wrong::Stuck(format!("the run does not end: {left:#?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(backup);
        disaster.repair(&place, sshd);
        let nothing_left = AssertUnwindSafe(|| self.sandbox.assert_nothing_left());
        if catch_unwind(nothing_left).is_err() {
            return Err(Wrong::Stuck("something is left behind".into()));
        }
        let next = place.backup(source).run();
        if !next.status.success() {
            return Err(Wrong::Lost(format!("the next run fails: {next}")));
        }
        if let Some(kept) = kept {
            self.holds(&place, kept, source, &self.sandbox.path("before"))?;
        }
        self.holds(&place, "latest", source, source)?;
        let latest = place.ids().pop().expect("just restored");
        Ok(Ended {
            struck: hit && !was_over,
            latest,
        })
    }

    /// Restored, `snapshot` of `source` is as `expected`.
    fn holds(
        &self,
        place: &Place,
        snapshot: &str,
        source: &Path,
        expected: &Path,
    ) -> Result<(), Wrong> {
        let restored: PathBuf = self.sandbox.path("restored");
        let _ = fs::remove_dir_all(&restored);
        let what = format!("{snapshot}:{}", source.display());
        let restore = place.restore(&what, &restored).run();
        let different = match restore.status.success() {
            true => differences(expected, &restored),
            false => {
                let _ = fs::remove_dir_all(&restored);
                let again = place.restore(&what, &restored).run();
                let kernel = run(tool("dmesg").arg("--time-format=iso"));
                let kernel: Vec<&str> = kernel.lines().rev().take(40).collect();
                vec![format!(
                    "{restore}\nonce more: {again}\nkernel: {kernel:#?}"
                )]
            }
        };
        match different.is_empty() {
            true => Ok(()),
            false => Err(Wrong::Lost(format!(
                "{snapshot} is not what was saved: {different:?}"
            ))),
        }
    }
}

/// Who is left, and where in the kernel each of its threads waits.
fn states(sandbox: &Sandbox) -> Vec<String> {
    let of = |(pid, line): (u32, String)| {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        let tasks = tasks.into_iter().flatten().flatten();
        let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
        let mut waits: Vec<String> = tasks
            .map(|task| {
                let at = task.path();
                let name = read(at.join("comm"));
                format!("{}@{}", name.trim_end(), read(at.join("wchan")))
            })
            .filter(|wait| !wait.starts_with("cache-"))
            .collect();
        waits.sort_unstable();
        format!("{pid} {line}: {}", waits.join(" "))
    };
    sandbox.processes().into_iter().map(of).collect()
}
