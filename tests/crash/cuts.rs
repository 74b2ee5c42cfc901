//! The moments at which the image is rebuilt and judged.

use std::collections::{BTreeMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use super::common::PASSPHRASE;
use super::history::{Event, History, Walk};
use super::jobs::{Recording, TRIMMED, TRIMMING};
use super::judge::{Judge, Promised, Published, Verdict};
use super::random::Random;

/// Blocks among which the moment lies that parts what is kept from what is lost.
const RECENT: usize = 400;
/// Choices that are tried until one leaves an image that was not judged yet.
const CHOICES: u64 = 8;
/// One cut of so many is made while space is given back; even.
const TRIM_EVERY: usize = 16;
/// One cut of so many is mounted by the kernel, too.
const KERNEL_EVERY: usize = 50;
/// Failures shown in full.
const SHOWN: usize = 5;

/// Cuts at which something promised was gone, and at which something there was not whole.
#[derive(Default)]
pub struct Found {
    pub lost: usize,
    pub torn: usize,
    /// Images that were judged: those of several cuts can be the same.
    pub judged: usize,
}

/// What is cut, and how long.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Look {
    All,
    /// Until a bad one is found.
    UntilFound,
    /// Only while space is given back.
    TrimsUntilFound,
}

/// One moment, and the number that decides what is kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cut {
    at: usize,
    seed: u64,
}

/// Judges `count` cuts.
pub fn cut(recording: &Recording, count: usize, seed: u64, what: Look) -> Found {
    let started = Instant::now();
    let cuts = moments(&recording.history, count, seed, what);
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let found = Mutex::new(Found::default());
    let enough = || {
        let found = found.lock().expect("no panic");
        what != Look::All && found.lost + found.torn > 0
    };
    thread::scope(|scope| {
        for part in cuts.chunks(cuts.len().div_ceil(workers)) {
            scope.spawn(|| work(recording, part, &found, &enough));
        }
    });
    let found = found.into_inner().expect("no panic");
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("{count} cuts, {} images in {seconds:.1} s", found.judged);
    found
}

/// In order of time. Half of them right after a flush, each flush in turn; some while space is given
/// back, which takes few events; the others anywhere. All are after the image was created: before
/// that nothing is promised.
fn moments(history: &History, count: usize, seed: u64, what: Look) -> Vec<Cut> {
    let is_init = |event: &Event| matches!(event, Event::Seen(text) if text == "init");
    let first = history.events.iter().position(is_init).expect("created") + 1;
    let end = history.events.len();
    let flushed = (first..end).filter(|i| matches!(history.events[*i], Event::Synced(..)));
    let flushed: Vec<usize> = flushed.map(|i| i + 1).collect();
    let writes = history
        .events
        .iter()
        .filter(|e| matches!(e, Event::Write(..)));
    eprintln!(
        "recorded: {} writes, {} flushes since init",
        writes.count(),
        flushed.len()
    );
    let trims = trims(history);
    let mut random = Random(seed);
    let mut cuts = Vec::new();
    for i in 0..count {
        let at = match i % 2 {
            _ if what == Look::TrimsUntilFound || i % TRIM_EVERY == 1 => {
                trims[random.below(trims.len())]
            }
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

/// The moments of trims, each until a flush after it, from when on no cut undoes it.
fn trims(history: &History) -> Vec<usize> {
    let mut moments = Vec::new();
    let (mut under_way, mut after) = (false, false);
    for (at, event) in history.events.iter().enumerate() {
        match event {
            Event::Seen(text) if text == TRIMMING => under_way = true,
            Event::Seen(text) if text == TRIMMED => (under_way, after) = (false, true),
            Event::Synced(..) => after = false,
            _ => {}
        }
        if under_way || after {
            moments.push(at + 1);
        }
    }
    moments
}

fn work(recording: &Recording, cuts: &[Cut], found: &Mutex<Found>, enough: &dyn Fn() -> bool) {
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
    let (mut judged, hasher) = (HashSet::new(), RandomState::new());
    for (number, cut) in cuts.iter().enumerate() {
        if enough() {
            return;
        }
        walk.go(cut.at);
        let (mut cut, mut image, mut is_new) = (*cut, BTreeMap::new(), false);
        // Right after a flush there is little to choose from.
        for seed in (0..CHOICES).map(|choice| cut.seed.wrapping_add(choice)) {
            image = chosen(&walk, seed);
            is_new = judged.insert(hasher.hash_one((&image, walk.seen.len())));
            if is_new {
                cut.seed = seed;
                break;
            }
        }
        let promised = promised(recording, &walk);
        // One that is half grown wants e2fsck before the kernel may have it.
        let by_kernel = number % KERNEL_EVERY == KERNEL_EVERY - 1 && !promised.growing;
        if !is_new && !by_kernel {
            continue;
        }
        found.lock().expect("no panic").judged += 1;
        report(cut, judge.judge(&image, &promised, by_kernel), found);
    }
}

/// What is left if the power goes now.
fn chosen(walk: &Walk, seed: u64) -> BTreeMap<u64, u32> {
    let mut random = Random(seed);
    // Of the last few hundred blocks that were sent.
    let moment = walk.newest().saturating_sub(random.below(RECENT) as u32);
    let is_lost = random.below(2) == 0;
    walk.cut(is_lost, random.chooser(moment))
}

/// What was published by now and not deleted on purpose, and what else was said.
fn promised<'a>(recording: &'a Recording, walk: &Walk<'a>) -> Promised<'a> {
    let mut promised = Promised::default();
    let published = &mut promised.published;
    for seen in &walk.seen {
        let words: Vec<&str> = seen.split(' ').collect();
        match words[..] {
            ["published", id, tree] => published.push(Published {
                id,
                tree: &recording.trees[tree.parse::<usize>().expect("a number")],
                pinned: false,
            }),
            ["pinned", id] => published
                .iter_mut()
                .filter(|snapshot| snapshot.id == id)
                .for_each(|snapshot| snapshot.pinned = true),
            ["deleting", gone] => published.retain(|snapshot| snapshot.id != gone),
            ["deleted", gone] => promised.deleted.push(gone),
            ["growing"] => promised.growing = true,
            ["grown"] => promised.growing = false,
            _ => {}
        }
    }
    promised
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
