//! What is done with hostile bytes, target by target. libFuzzer calls it (`fuzz_targets/`), and so
//! does `tests/fuzz_corpus.rs` with every file of `corpus/`.
//!
//! A body never fails for bytes being bad, only for what must hold whatever they are.

mod cache;
mod documents;
mod image;
mod input;
mod luks;
mod sample;
pub mod seeds;
mod sftp;
mod steps;
mod words;

/// What a target does with its input.
pub type Body = fn(&[u8]);

/// Every target by its name, which is also that of its corpus.
pub const TARGETS: &[(&str, Body)] = &[
    ("luks_binary", luks::binary),
    ("luks_json", luks::json),
    ("luks_keyslot", luks::keyslot),
    ("sftp_request", sftp::request),
    ("sftp_reply", sftp::reply),
    ("sftp_conversation", sftp::conversation),
    ("words", words::words),
    ("documents", documents::documents),
    ("cache", cache::cache),
    ("image", image::image),
];

/// Does with `data` what the target of this name does.
pub fn run(target: &str, data: &[u8]) {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    let (_, body) = found.unwrap_or_else(|| panic!("there is no target {target}"));
    body(data);
}
