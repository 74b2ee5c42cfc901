//! Crash consistency: real jobs are recorded on their way to the server; the image is rebuilt as a
//! crash of the server could have left it at any moment; and each such image must open, replay its
//! journal, satisfy e2fsck, and hold every published snapshot whole and none in part.
//!
//! `scripts/crash --cuts N --seed S` runs it at length. As a test it makes [`CI_CUTS`] cuts. This
//! program has no harness, since it is its own relay and `fallocate`: `relay` or `punch` is its first
//! argument then.

#[path = "../common/mod.rs"]
mod common;

mod cuts;
mod history;
mod jobs;
mod judge;
mod kernel;
mod lies;
mod log;
mod random;
mod relay;
mod tree;

use std::process::ExitCode;

use common::{Sandbox, root_or_skip};
use cuts::{Found, Look, cut};
use jobs::{Jobs, record};
use random::Random;

/// What a minute of two cores is enough for, with the recordings.
const CI_CUTS: usize = 2000;
/// The jobs are recorded anew after so many.
const CUTS_OF_ONE: usize = 1000;
const CI_SEED: u64 = 1;
/// Enough to find every lie of [`LIES`], which ends at the first that is found.
const LIAR_CUTS: usize = 400;
/// Enough to find every lie of [`lies::of_trims`].
const TRIM_CUTS: usize = 100;
/// One flush of so many is done, none for 0; the others are only answered.
const LIES: [u32; 2] = [0, 10];

const TESTS: [(&str, fn()); 4] = [
    ("no_crash_loses_or_tears_a_snapshot", || {
        if root_or_skip() {
            let found = all(CI_CUTS, CI_SEED, 1);
            assert_eq!((found.lost, found.torn), (0, 0));
        }
    }),
    ("a_swallowed_flush_is_found_out", || {
        if root_or_skip() {
            for lie in LIES {
                let recording = record(&Sandbox::new(), Jobs::All, lie, CI_SEED);
                let found = cut(&recording, LIAR_CUTS, CI_SEED, Look::UntilFound);
                assert!(
                    found.lost + found.torn > 0,
                    "one flush of {lie} was done, and nobody noticed"
                );
            }
        }
    }),
    ("a_trim_that_loses_is_found_out", || {
        if root_or_skip() {
            let recording = record(&Sandbox::new(), Jobs::Trims, 1, CI_SEED);
            let honest = cut(&recording, TRIM_CUTS, CI_SEED, Look::TrimsUntilFound);
            assert_eq!((honest.lost, honest.torn), (0, 0));
            for (lie, recording) in lies::of_trims(&recording) {
                let found = cut(&recording, TRIM_CUTS, CI_SEED, Look::TrimsUntilFound);
                assert!(found.lost + found.torn > 0, "{lie}, and nobody noticed");
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
    if arguments.first().is_some_and(|first| first == "punch") {
        return ExitCode::from(relay::punch(&arguments[1..]) as u8);
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
    let found = all(cuts as usize, seed, done);
    println!("cuts: {cuts}, lost: {}, torn: {}", found.lost, found.torn);
    ExitCode::from(u8::from(found.lost + found.torn > 0))
}

/// So many cuts, of as many recordings as that takes.
fn all(cuts: usize, seed: u64, done: u32) -> Found {
    let mut found = Found::default();
    let mut random = Random(seed);
    let mut left = cuts;
    while left > 0 {
        let seed = random.next();
        let here = left.min(CUTS_OF_ONE);
        let recording = record(&Sandbox::new(), Jobs::All, done, seed);
        let more = cut(&recording, here, seed, Look::All);
        found.lost += more.lost;
        found.torn += more.torn;
        found.judged += more.judged;
        left -= here;
    }
    found
}
