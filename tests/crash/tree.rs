//! A tree of files as one value: names, modes, owners, content.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sha2::{Digest, Sha256};

/// Path below the root, and everything that is compared of it.
pub type Tree = BTreeMap<Vec<u8>, String>;

pub fn on_disk(root: &Path) -> Tree {
    let mut tree = Tree::new();
    visit_disk(root, b"", &mut tree);
    tree
}

fn visit_disk(at: &Path, name: &[u8], tree: &mut Tree) {
    let about = fs::symlink_metadata(at).expect("there");
    let content = if about.is_file() {
        describe(b'f', &fs::read(at).expect("readable"))
    } else if about.is_symlink() {
        describe(
            b'l',
            fs::read_link(at).expect("a link").as_os_str().as_bytes(),
        )
    } else {
        describe(b'd', b"")
    };
    let owner = (about.uid(), about.gid());
    tree.insert(name.to_vec(), line(about.mode(), owner, &content));
    if about.is_dir() {
        for entry in fs::read_dir(at).expect("readable").flatten() {
            let below = [name, b"/", entry.file_name().as_bytes()].concat();
            visit_disk(&entry.path(), &below, tree);
        }
    }
}

fn describe(kind: u8, content: &[u8]) -> String {
    let sum: String = Sha256::digest(content)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    format!("{} {} {sum}", char::from(kind), content.len())
}

fn line(mode: u32, (user, group): (u32, u32), content: &str) -> String {
    format!("{:04o} {user}:{group} {content}", mode & 0o7777)
}
