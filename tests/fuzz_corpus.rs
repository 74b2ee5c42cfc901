//! Every file of the fuzzers' corpora, run through the same code as under libFuzzer.

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// More would make a clone slow and a review impossible.
const FILE_MAX: usize = 16 << 10;

fn replay(target: &str) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let entries = fs::read_dir(&directory).expect("the target has a corpus");
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("readable").path())
        .collect();
    files.sort();
    assert!(
        files.len() >= 5,
        "only {} files in {}",
        files.len(),
        directory.display()
    );
    for file in files {
        let data = fs::read(&file).expect("readable");
        assert!(data.len() <= FILE_MAX, "{} is too long", file.display());
        // Seen only if it fails.
        println!("{}", file.display());
        fuzz::run(target, &data);
    }
}

/// With cryptsetup and `sftp-server` at work.
#[test]
#[ignore = "writes the seeds of the corpora anew"]
fn seeds() {
    fuzz::seeds::write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus"));
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test] fn $name() { replay(stringify!($name)); })*

        #[test]
        fn every_target_is_replayed_and_built() {
            let here = BTreeSet::from([$(stringify!($name)),*]);
            let known: BTreeSet<&str> = fuzz::TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(here, known);
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
            for target in known {
                let source = root.join(format!("fuzz_targets/{target}.rs"));
                let source = fs::read_to_string(source).expect("the target is there");
                assert!(source.contains(&format!("run(\"{target}\"")));
            }
            let corpora = fs::read_dir(root.join("corpus")).expect("readable").count();
            assert_eq!(corpora, here.len());
        }
    };
}

targets! {
    luks_binary luks_json luks_keyslot sftp_request sftp_reply sftp_conversation
    words documents cache image
}
