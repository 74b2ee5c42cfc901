//! A tree of files as one value: what is on disk, and what a snapshot holds.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ext4_view::{Ext4, Ext4Error, Metadata, PathBuf};
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

/// The tree at `root` in a filesystem, as far as it can be read.
pub fn in_image(filesystem: &Ext4, root: &str) -> Result<Tree, Ext4Error> {
    let mut tree = Tree::new();
    let root = PathBuf::try_from(root).expect("an absolute path");
    let about = filesystem.symlink_metadata(&root)?;
    visit_image(filesystem, &root, &about, b"", &mut tree)?;
    Ok(tree)
}

/// A path is looked up once: each look-up sums up every directory on the way.
fn visit_image(
    filesystem: &Ext4,
    at: &PathBuf,
    about: &Metadata,
    name: &[u8],
    tree: &mut Tree,
) -> Result<(), Ext4Error> {
    let content = if about.is_dir() {
        describe(b'd', b"")
    } else if about.is_symlink() {
        describe(b'l', filesystem.read_link(at)?.as_ref())
    } else {
        describe(b'f', &filesystem.read(at)?)
    };
    let owner = (about.uid(), about.gid());
    tree.insert(name.to_vec(), line(about.mode().into(), owner, &content));
    if about.is_dir() {
        for entry in filesystem.read_dir(at)? {
            let entry = entry?;
            let file = entry.file_name();
            let bytes: &[u8] = file.as_ref();
            if bytes != b"." && bytes != b".." {
                let below = [name, b"/", bytes].concat();
                visit_image(filesystem, &entry.path(), &entry.metadata()?, &below, tree)?;
            }
        }
    }
    Ok(())
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
