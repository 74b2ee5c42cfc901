//! The oracle: two trees compared by rsync, which knows nothing of this program, and by a walk of
//! our own for what rsync does not tell: which names are one file, and how they differ.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{run, tool};

/// What two files must have in common, beside content and attributes.
#[derive(Debug, PartialEq, Eq)]
struct Face {
    mode: u32,
    owner: (u32, u32),
    /// Of what is not a directory: theirs is up to the filesystem.
    size: Option<u64>,
    mtime: (i64, i64),
    device: Option<u64>,
    links: Option<u64>,
    target: Option<PathBuf>,
    /// The first name, in order, that is the same file.
    same_as: PathBuf,
}

/// Fails unless both trees are the same in content, names, types, modes, owners, times, links,
/// ACLs and extended attributes.
pub fn assert_same_tree(a: &Path, b: &Path) {
    let found = differences(a, b);
    assert!(
        found.is_empty(),
        "{} and {} differ in {} places:\n{}",
        a.display(),
        b.display(),
        found.len(),
        shortened(&found)
    );
}

/// Enough of it to see what is wrong.
fn shortened(lines: &[String]) -> String {
    let short = |line: &String| line.chars().take(600).collect::<String>();
    let lines: Vec<String> = lines.iter().take(20).map(short).collect();
    lines.join("\n")
}

/// What differs, a line each.
pub fn differences(a: &Path, b: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let (left, right) = (faces(a), faces(b));
    for (path, face) in &left {
        match right.get(path) {
            None => found.push(format!("missing: {path:?}")),
            Some(other) if other != face => {
                found.push(format!("{path:?}: {face:?}\n    but {other:?}"));
            }
            Some(_) => {}
        }
    }
    let added = right.keys().filter(|path| !left.contains_key(*path));
    found.extend(added.map(|path| format!("added: {path:?}")));

    let with_slash = |path: &Path| format!("{}/", path.display());
    let mut command = tool("rsync");
    command.args(["-naHAXi", "--checksum", "--delete"]);
    command.args(["--numeric-ids", "--modify-window=-1"]);
    let told = run(command.args([with_slash(a), with_slash(b)]));
    found.extend(told.lines().map(|line| format!("rsync: {line}")));
    found
}

fn faces(top: &Path) -> BTreeMap<PathBuf, Face> {
    let mut paths = vec![PathBuf::new()];
    let mut next = 0;
    while next < paths.len() {
        let path = top.join(&paths[next]);
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir());
        if is_dir {
            for entry in fs::read_dir(&path).unwrap_or_else(|e| panic!("{path:?}: {e}")) {
                let name = entry.expect("an entry").file_name();
                let inside = paths[next].join(name);
                paths.push(inside);
            }
        }
        next += 1;
    }
    paths.sort();
    let mut first_names = HashMap::new();
    let mut found = BTreeMap::new();
    for path in paths {
        let full = top.join(&path);
        let metadata = fs::symlink_metadata(&full).unwrap_or_else(|e| panic!("{full:?}: {e}"));
        let kind = metadata.file_type();
        let first = first_names
            .entry((metadata.dev(), metadata.ino()))
            .or_insert_with(|| path.clone());
        let face = Face {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            size: (!kind.is_dir()).then_some(metadata.size()),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            device: is_device(&metadata).then_some(metadata.rdev()),
            links: (!kind.is_dir()).then_some(metadata.nlink()),
            target: fs::read_link(&full).ok(),
            same_as: first.clone(),
        };
        found.insert(path, face);
    }
    found
}

fn is_device(metadata: &fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let kind = metadata.file_type();
    kind.is_block_device() || kind.is_char_device()
}
