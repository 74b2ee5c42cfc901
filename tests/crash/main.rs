//! Crash consistency: real jobs are recorded on their way to the server; the image is rebuilt as a
//! crash of the server could have left it at any moment; and each such image must open, replay its
//! journal, satisfy e2fsck, and hold every published snapshot whole and none in part.
//!
//! `scripts/crash --cuts N --seed S` runs it at length. As a test it makes [`CI_CUTS`] cuts. This
//! program has no harness, since it is its own relay: `relay` is its first argument then.

#[path = "../common/mod.rs"]
mod common;

mod history;
mod jobs;
mod judge;
mod log;
mod relay;
mod tree;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use common::{PASSPHRASE, Sandbox, root_or_skip};
use history::{Event, History, Walk};
use jobs::Recording;
use judge::{Judge, Published, Verdict};

const CI_CUTS: usize = 2000;
const CI_SEED: u64 = 1;
/// Enough to find every lie of [`LIES`].
const LIAR_CUTS: usize = 200;
/// One flush of so many is done, none for 0; the others are only answered.
const LIES: [u32; 3] = [0, 3, 7];
/// Blocks among which the moment lies that parts what is kept from what is lost.
const RECENT: usize = 400;
/// Failures shown in full.
const SHOWN: usize = 5;

const TESTS: [(&str, fn()); 3] = [
    ("no_crash_loses_or_tears_a_snapshot", || {
        if root_or_skip() {
            let found = cut(&jobs::record(&Sandbox::new(), 1), CI_CUTS, CI_SEED);
            assert_eq!((found.lost, found.torn), (0, 0));
        }
    }),
    ("a_swallowed_flush_is_found_out", || {
        if root_or_skip() {
            for lie in LIES {
                let found = cut(&jobs::record(&Sandbox::new(), lie), LIAR_CUTS, CI_SEED);
                assert!(
                    found.lost + found.torn > 0,
                    "one flush of {lie} was done, and nobody noticed"
                );
            }
        }
    }),
    (
        "a_torn_record_costs_no_other",
        log::a_torn_record_costs_no_other,
    ),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    if arguments.first().is_some_and(|first| first == "relay") {
        return ExitCode::from(relay::run(&arguments[1..]) as u8);
    }
    if has("--list") {
        if !has("--ignored") {
            TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        }
        return ExitCode::SUCCESS;
    }
    if has("--cuts") {
        return at_length(&arguments);
    }
    let named: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    for (name, test) in TESTS {
        if named.is_empty() || named.iter().any(|wanted| name.contains(wanted.as_str())) {
            eprintln!("test {name}");
            test();
        }
    }
    ExitCode::SUCCESS
}

fn at_length(arguments: &[String]) -> ExitCode {
    let value = |name: &str| -> Option<u64> {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)?.parse().ok()
    };
    let (Some(cuts), seed) = (value("--cuts"), value("--seed").unwrap_or(CI_SEED)) else {
        eprintln!("--cuts N [--seed S]");
        return ExitCode::from(2);
    };
    assert!(root_or_skip(), "the jobs need root");
    let done = value("--done").unwrap_or(1) as u32;
    let found = cut(&jobs::record(&Sandbox::new(), done), cuts as usize, seed);
    println!("cuts: {cuts}, lost: {}, torn: {}", found.lost, found.torn);
    ExitCode::from(u8::from(found.lost + found.torn > 0))
}

#[derive(Default)]
struct Found {
    lost: usize,
    torn: usize,
}

/// One moment, and the number that decides what is kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cut {
    at: usize,
    seed: u64,
}

fn cut(recording: &Recording, count: usize, seed: u64) -> Found {
    let started = Instant::now();
    let cuts = moments(&recording.history, count, seed);
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let found = Mutex::new(Found::default());
    thread::scope(|scope| {
        for part in cuts.chunks(cuts.len().div_ceil(workers)) {
            scope.spawn(|| work(recording, part, &found));
        }
    });
    eprintln!("{count} cuts in {:.1} s", started.elapsed().as_secs_f64());
    found.into_inner().expect("no panic")
}

/// In order of time. Half of them right after a flush, each flush in turn; half anywhere. All are
/// after the image was created: before that nothing is promised.
fn moments(history: &History, count: usize, seed: u64) -> Vec<Cut> {
    let is_init = |event: &Event| matches!(event, Event::Seen(text) if text == "init");
    let first = history.events.iter().position(is_init).expect("created") + 1;
    let end = history.events.len();
    let flushed = (first..end).filter(|i| matches!(history.events[*i], Event::Synced(_)));
    let flushed: Vec<usize> = flushed.map(|i| i + 1).collect();
    let writes = history
        .events
        .iter()
        .filter(|e| matches!(e, Event::Write(_)));
    eprintln!(
        "recorded: {} writes, {} flushes since init",
        writes.count(),
        flushed.len()
    );
    let mut random = Random(seed);
    let mut cuts = Vec::new();
    for i in 0..count {
        let at = match i % 2 {
            0 if !flushed.is_empty() => flushed[i / 2 % flushed.len()],
            _ => first + random.below(end - first + 1),
        };
        cuts.push(Cut {
            at,
            seed: random.next(),
        });
    }
    cuts.sort_unstable();
    cuts
}

fn work(recording: &Recording, cuts: &[Cut], found: &Mutex<Found>) {
    let scratch = scratch();
    let mut judge = Judge {
        history: &recording.history,
        trees: &recording.trees,
        source: &recording.source,
        passphrase: PASSPHRASE,
        scratch: &scratch.path().join("volume"),
        opened: BTreeMap::new(),
    };
    let mut walk = Walk::new(&recording.history);
    for cut in cuts {
        walk.go(cut.at);
        let mut random = Random(cut.seed);
        // Of the last few hundred blocks that were sent.
        let newest = walk.newest();
        let moment = newest.saturating_sub(random.below(RECENT) as u32);
        let image = walk.cut(random.chooser(moment));
        let promised: Vec<Published> = walk
            .seen
            .iter()
            .filter_map(|seen| {
                let mut words = seen.strip_prefix("published ")?.split(' ');
                let id = words.next()?;
                let tree = words.next()?.parse::<usize>().ok()?;
                Some(Published {
                    id,
                    tree: &recording.trees[tree],
                })
            })
            .collect();
        report(*cut, judge.judge(&image, &promised), found);
    }
}

fn report(cut: Cut, verdict: Verdict, found: &Mutex<Found>) {
    let mut found = found.lock().expect("no panic");
    let bad = !verdict.lost.is_empty() || !verdict.torn.is_empty();
    if bad && found.lost + found.torn < SHOWN {
        eprintln!("after event {}, kept by {:#x}:", cut.at, cut.seed);
        verdict
            .lost
            .iter()
            .for_each(|why| eprintln!("  lost: {why}"));
        verdict
            .torn
            .iter()
            .for_each(|why| eprintln!("  torn: {why}"));
    }
    found.lost += usize::from(!verdict.lost.is_empty());
    found.torn += usize::from(!verdict.torn.is_empty());
}

/// In memory where that is possible: two million blocks are written and thrown away.
fn scratch() -> tempfile::TempDir {
    let memory = PathBuf::from("/dev/shm");
    let mut builder = tempfile::Builder::new();
    builder.prefix("e2ebak-crash-");
    let made = match memory.is_dir() {
        true => builder.tempdir_in(memory),
        false => builder.tempdir(),
    };
    made.expect("a directory")
}

/// Sebastiano Vigna's SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// What becomes of each block: nothing since the flush is kept, all is; each block by itself,
    /// rarely, evenly or mostly; only what is newer, or older, than some moment, as when an order
    /// was not kept; all but a few, or only a few.
    fn chooser(mut self, moment: u32) -> impl FnMut(&[u32]) -> usize {
        let way = self.below(9);
        move |candidates| {
            let (newest, any) = (candidates.len(), 1 + self.below(candidates.len()));
            let of_16 = self.below(16);
            let newer = candidates.iter().rposition(|version| *version >= moment);
            let older = candidates.iter().rposition(|version| *version < moment);
            match way {
                0 => 0,
                1 => newest,
                2 if of_16 < 1 => any,
                3 if of_16 < 8 => any,
                4 if of_16 < 15 => any,
                5 => newer.map_or(0, |_| newest),
                6 => older.map_or(0, |at| at + 1),
                7 if self.below(50) > 0 => newest,
                8 if self.below(50) == 0 => newest,
                _ => 0,
            }
        }
    }
}
