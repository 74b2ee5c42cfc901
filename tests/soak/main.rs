//! The kill matrix: something dies, freezes or fills up at a random moment of a backup. The next run
//! then succeeds by itself, nothing is left behind, the tree restored equals the tree saved, and the
//! snapshot before it is still there and still the same.
//!
//! `scripts/soak --rounds N --seed S` runs it at length; as a test it makes [`CI_ROUNDS`] rounds. With
//! `--disaster N` all rounds are struck by that one of [`disaster::DISASTERS`].

#[path = "../common/mod.rs"]
mod common;

mod disaster;
mod rounds;

use std::process::ExitCode;

use common::{root_or_skip, tool_or_skip};
use disaster::FAKETIME;
use rounds::Soak;

const CI_ROUNDS: u64 = 12;
const CI_SEED: u64 = 1;
const NAME: &str = "whatever_dies_nothing_is_lost_and_nothing_is_stuck";

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
    if !root_or_skip() || !tool_or_skip(FAKETIME) {
        return ExitCode::SUCCESS;
    }
    let rounds = value("--rounds").unwrap_or(CI_ROUNDS);
    let mut soak = Soak::new(value("--seed").unwrap_or(CI_SEED), rounds > CI_ROUNDS);
    soak.only = value("--disaster");
    let found = soak.all(rounds);
    eprintln!("{} struck before the run was over", found.struck);
    println!(
        "rounds: {rounds}, lost: {}, stuck: {}",
        found.lost, found.stuck
    );
    ExitCode::from(u8::from(found.lost + found.stuck > 0))
}
