//! Finds directories that say of themselves that they are caches (Cache Directory Tagging
//! Specification, <https://bford.info/cachedir/>): they hold a file `CACHEDIR.TAG` that begins
//! with a fixed signature.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

const TAG: &str = "CACHEDIR.TAG";
const SIGNATURE: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// All tagged directories below `roots`, not looking inside a tagged one. What cannot be read is
/// passed over: rsync will report it. With `one_filesystem` other mounts are not entered. Ends early
/// at `stop`.
pub fn find(roots: &[PathBuf], one_filesystem: bool, stop: &AtomicBool) -> Vec<PathBuf> {
    let mut tagged = Vec::new();
    for root in roots {
        let Ok(top) = fs::symlink_metadata(root) else {
            continue;
        };
        let mut pending = vec![root.clone()];
        while let Some(directory) = pending.pop().filter(|_| !stop.load(Ordering::Relaxed)) {
            if is_tagged(&directory) {
                tagged.push(directory);
                continue;
            }
            let Ok(entries) = fs::read_dir(&directory) else {
                continue;
            };
            for entry in entries.flatten() {
                let is_directory = entry.file_type().is_ok_and(|t| t.is_dir());
                let stays =
                    || !one_filesystem || entry.metadata().is_ok_and(|m| m.dev() == top.dev());
                if is_directory && stays() {
                    pending.push(entry.path());
                }
            }
        }
    }
    tagged.sort();
    tagged
}

fn is_tagged(directory: &Path) -> bool {
    let tag = directory.join(TAG);
    // A fifo of that name would block the open for ever.
    if !fs::symlink_metadata(&tag).is_ok_and(|m| m.is_file()) {
        return false;
    }
    let mut start = [0; SIGNATURE.len()];
    File::open(&tag)
        .and_then(|mut f| f.read_exact(&mut start))
        .is_ok()
        && start == SIGNATURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_signature_makes_a_cache() {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, content) in [
            (
                "real",
                &b"Signature: 8a477f597d28d172789f06886806bc55\nmore"[..],
            ),
            ("fake", b"Signature: nope"),
            ("short", b""),
        ] {
            fs::create_dir_all(dir.path().join(name).join("inner")).expect("made");
            fs::write(dir.path().join(name).join(TAG), content).expect("written");
        }
        assert_eq!(
            find(&[dir.path().into()], true, &AtomicBool::new(false)),
            [dir.path().join("real")]
        );
    }
}
