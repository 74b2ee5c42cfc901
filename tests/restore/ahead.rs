//! What is fetched ahead of a copy: all of it, once, and nothing else.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use e2ebak::layer::{Cache, cache};
use e2ebak::progress::Silent;
use e2ebak::remote::local::LocalStore;
use e2ebak::remote::{Access, Store};
use e2ebak::restore::{
    Ahead, Filesystem, Options, Outcome, Overwrite, Plan, ROOT, Tree, UnmountedTree, copy, verify,
};

use crate::support::{KEEP, Scratch, assert_whole, equipped, write};
use crate::unmounted::{Mounted, TOOLS, shell};

const MIB: u64 = 1 << 20;
const DIRECTORIES: u64 = 75;

/// A filesystem behind a cache that remembers what it has fetched.
struct Image {
    cache: Arc<Cache>,
    filesystem: Arc<Filesystem>,
}

impl Image {
    fn open(path: &Path) -> Image {
        let device = LocalStore::new(path).open(Access::ReadOnly);
        let device = device.expect("opens");
        let settings = cache::Settings {
            size_bytes: 64 * MIB,
            ..cache::Settings::default()
        };
        let cache = Cache::new(device, settings).expect("a cache");
        let cache = Arc::new(cache);
        let filesystem = Filesystem::open(cache.clone()).expect("an ext4");
        let filesystem = Arc::new(filesystem);
        Image { cache, filesystem }
    }

    fn tree(&self) -> UnmountedTree {
        let tree = Tree::load(&self.filesystem, ROOT, None).expect("a tree");
        let plan = Plan::of_copy(&tree, tree.root(), |_| true);
        let ahead = Ahead::start(&self.filesystem, Arc::new(plan), Arc::default());
        UnmountedTree::new(Arc::clone(&self.filesystem), ROOT).with_ahead(ahead)
    }

    fn restore(&self, dest: &Path, options: Options<'_>) -> Outcome {
        let copied = copy(&mut self.tree(), "/".as_ref(), dest, options, &Silent);
        copied.expect("restores")
    }
}

/// Some 100 MiB, more than the cache holds, in files of all sizes.
fn make(scratch: &Scratch) -> (Mounted, std::path::PathBuf) {
    let made = scratch.0.join("made");
    shell(&format!(
        "truncate -s 250M {0}; mkfs.ext4 -q -F -N 16384 {0} 2>/dev/null",
        made.display()
    ));
    let mounted = Mounted::new(&made, scratch.0.join("mount"), "user_xattr");
    let bytes: Vec<u8> = (0..8_u32 << 20)
        .map(|i| (i.wrapping_mul(i) >> 7) as u8)
        .collect();
    for directory in 0..DIRECTORIES {
        let directory = mounted.0.join(format!("directory {directory}"));
        fs::create_dir(&directory).expect("mkdir");
        for file in 0..40_usize {
            let size = file * file * 60;
            write(directory.join(format!("file {file}")), &bytes[..size]);
        }
        fs::hard_link(directory.join("file 39"), directory.join("another")).expect("a link");
    }
    write(mounted.0.join("large"), &bytes);
    (mounted, made)
}

#[test]
fn a_tree_is_fetched_once_and_what_is_the_same_already_is_not() {
    if !equipped(TOOLS) {
        return;
    }
    let scratch = Scratch::new();
    let (mounted, made) = make(&scratch);
    let used = String::from_utf8(
        std::process::Command::new("du")
            .args(["-s", "--block-size=1"])
            .arg(&mounted.0)
            .output()
            .expect("du")
            .stdout,
    );
    let used = used.expect("text");
    let used: u64 = used.split_whitespace().next().unwrap().parse().unwrap();
    assert!(used > 90 * MIB, "{used}");
    let image = scratch.0.join("image");
    let source = scratch.dir("source");
    shell(&format!(
        "cp -a {}/. {}",
        mounted.0.display(),
        source.display()
    ));
    mounted.settle(&made, &image);

    let whole = Image::open(&image);
    let dest = scratch.dir("dest");
    assert_whole(&whole.restore(&dest, KEEP));
    let (source, copied) = (source.display(), dest.display());
    shell(&format!("diff -r --no-dereference {source} {copied}"));
    let stats = whole.cache.stats();
    let fetched = stats.fetched_bytes;
    assert!(fetched < used + used / 20, "{fetched} of {used} bytes");
    assert!(stats.misses < 50, "{} reads had to wait", stats.misses);

    let again = Image::open(&image);
    let changed = Options {
        overwrite: Overwrite::IfChanged,
        ..KEEP
    };
    let outcome = again.restore(&dest, changed);
    assert_whole(&outcome);
    let landing = outcome.landing.clone();
    assert_eq!(
        (outcome.files, outcome.unchanged),
        (0, DIRECTORIES * 41 + 1)
    );
    let fetched = again.cache.stats().fetched_bytes;
    assert!(fetched < used / 2, "{fetched} of {used} bytes");

    let compared = Image::open(&image);
    let from = "/".as_ref();
    let found = verify(&mut compared.tree(), from, &landing, KEEP, &Silent).expect("verifies");
    assert_eq!(found.count(), 0);
    let fetched = compared.cache.stats().fetched_bytes;
    assert!(fetched < used + used / 20, "{fetched} of {used} bytes");
}

/// Whatever a list says, its reader does not wait for ever.
#[test]
fn a_plan_may_promise_what_is_not_there() {
    if !equipped(TOOLS) {
        return;
    }
    let scratch = Scratch::new();
    let made = scratch.0.join("made");
    shell(&format!(
        "truncate -s 20M {0}; mkfs.ext4 -q -F {0} 2>/dev/null",
        made.display()
    ));
    let image = Image::open(&made);
    let wanted = [
        (ROOT, 100 * MIB),
        (4_000_000_000, 70),
        (11, 1 << 62),
        (ROOT, u64::MAX),
        (12, 5),
    ];
    let plan = Plan::new(wanted.into_iter());
    let ahead = Ahead::start(&image.filesystem, Arc::new(plan), Arc::default());
    let mut root = image.filesystem.inode(ROOT).expect("the root");
    root.size = 100 * MIB;
    ahead.await_inode(ROOT).expect("goes on");
    ahead.await_names(&root).expect("goes on");
    ahead.await_inode(4_000_000_000).expect("goes on");
    ahead.await_inode(99).expect("goes on");
    let mut lost = image.filesystem.inode(11).expect("lost+found");
    lost.size = 1 << 62;
    ahead.await_names(&lost).expect("goes on");
    ahead.await_inode(12).expect("goes on");
    ahead.await_inode(ROOT).expect("goes on");
}
