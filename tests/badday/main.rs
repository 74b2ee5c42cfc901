//! Bad input and bad days: a clear error with its exit code, nothing lost, nothing left behind.

#[path = "../common/mod.rs"]
mod common;

mod force;
mod images;
mod links;
mod places;
mod signals;
mod together;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{
    PASSPHRASE, Place, Program, Ran, Running, Sandbox, Sshd, assert_same_tree, large_file, output,
    plain_tree, root_or_skip, run, tool, wait_for,
};
use rustix::process::Signal;
use sha2::{Digest, Sha256};

const MIB: u64 = 1 << 20;

/// What the program needs root for is not tested here: these verbs open the image and no more.
const LOOKING: [&[&str]; 3] = [
    &["info"],
    &["snapshots"],
    &["restore", "latest", "restored"],
];

/// Every verb that opens an image fails at this one, in the same way.
fn every_verb_says(place: &Place, codes: &[i32], says: &str) {
    for words in LOOKING {
        let program = place.program(words[0]).args(&words[1..]);
        let ran = program.run().code_of(codes).says(says);
        assert!(ran.stderr.starts_with("error: "), "{ran}");
    }
    if root_or_skip() {
        let source = place.sandbox.dir("source");
        place.backup(&source).run().code_of(codes).says(says);
        let mountpoint = place.sandbox.dir("mnt");
        place
            .program("mount")
            .arg(&mountpoint)
            .run()
            .code_of(codes)
            .says(says);
    }
    place.assert_closed();
}
