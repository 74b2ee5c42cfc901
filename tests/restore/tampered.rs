//! Sources that lie, break or are stopped in the middle.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use e2ebak::error::{Error, Kind, Result};
use e2ebak::progress::{Event, Monitor, Silent};
use e2ebak::restore::{
    Attribute, Content, Entry, LISTED_MAX, Metadata, MountedTree, Options, Overwrite, Piece,
    Source, copy,
};

use crate::support::{
    KEEP, REPLACE, Scratch, differences, equipped, errors, leftovers, read, restore, run, set_mode,
    write,
};

/// A tree with something wrong in it.
struct Tampered<'test> {
    tree: MountedTree,
    /// Names that every directory is said to hold as well.
    extra: Vec<&'static [u8]>,
    /// Called before each piece of the file that is read.
    before_piece: &'test (dyn Fn(usize) -> Result<()> + Sync),
    pieces: AtomicUsize,
}

impl<'test> Tampered<'test> {
    fn new(root: &Path, before_piece: &'test (dyn Fn(usize) -> Result<()> + Sync)) -> Self {
        Tampered {
            tree: MountedTree::open(root).expect("opens"),
            extra: Vec::new(),
            before_piece,
            pieces: AtomicUsize::new(0),
        }
    }
}

impl Source for Tampered<'_> {
    fn go(&mut self, path: &[u8]) -> Result<()> {
        self.tree.go(path)
    }
    fn enter(&mut self, name: &[u8]) -> Result<()> {
        self.tree.enter(name)
    }
    fn leave(&mut self) -> Result<()> {
        self.tree.leave()
    }
    fn list(&mut self) -> Result<Vec<Entry>> {
        let mut entries = self.tree.list()?;
        entries.extend(self.extra.iter().map(|name| Entry {
            name: name.to_vec(),
            kind: None,
            inode: 1,
        }));
        Ok(entries)
    }
    fn metadata(&mut self, name: &[u8]) -> Result<Metadata> {
        let real = match name {
            b"itself" => b".".as_slice(),
            name => name,
        };
        self.tree.metadata(real)
    }
    fn read_link(&mut self, name: &[u8]) -> Result<Vec<u8>> {
        self.tree.read_link(name)
    }
    fn attributes(&mut self, name: &[u8]) -> Result<Vec<Attribute>> {
        self.tree.attributes(name)
    }
    fn open(&mut self, name: &[u8]) -> Result<Box<dyn Content + '_>> {
        Ok(Box::new(TamperedContent {
            content: self.tree.open(name)?,
            before_piece: self.before_piece,
            pieces: &self.pieces,
        }))
    }
}

struct TamperedContent<'source> {
    content: Box<dyn Content + 'source>,
    before_piece: &'source (dyn Fn(usize) -> Result<()> + Sync),
    pieces: &'source AtomicUsize,
}

impl Content for TamperedContent<'_> {
    fn next(&mut self, buf: &mut [u8]) -> Result<Piece> {
        (self.before_piece)(self.pieces.fetch_add(1, Ordering::Relaxed))?;
        self.content.next(buf)
    }
}

#[test]
fn hostile_names_are_refused_one_by_one() {
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    fs::create_dir_all(root.join("tree")).expect("mkdir");
    write(root.join("tree/file"), b"good");
    write(root.join("evil"), b"evil");
    let mut source = Tampered::new(&root, &|_| Ok(()));
    source.extra = vec![
        b"",
        b".",
        b"..",
        b"../evil",
        b"/etc/passwd",
        b"file/",
        b"file\0",
        &[b'x'; 256],
        b"itself",
    ];
    let dest_of = |name| dest.join(name);
    let outcome = copy(&mut source, Path::new("tree"), &dest_of("a"), KEEP, &Silent);
    let outcome = outcome.expect("goes on");
    assert_eq!(outcome.errors.count(), 9, "{:?}", errors(&outcome));
    let all_corrupt = |failure: &e2ebak::restore::Failure| failure.error.kind() == Kind::Corrupt;
    assert!(outcome.errors.listed().iter().all(all_corrupt));
    assert_eq!(outcome.files, 1);
    assert_eq!(fs::read_dir(dest_of("a")).expect("list").count(), 1);
    assert_eq!(read(dest_of("a/file")), b"good");
}

#[test]
fn a_name_that_is_listed_twice_leaves_nothing_behind() {
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    fs::create_dir_all(root.join("tree")).expect("mkdir");
    write(root.join("tree/file"), b"good");
    fs::hard_link(root.join("tree/file"), root.join("tree/link")).expect("link");
    let mut source = Tampered::new(&root, &|_| Ok(()));
    source.extra = vec![b"link", b"file"];
    let outcome = copy(&mut source, Path::new("tree"), &dest, REPLACE, &Silent);
    assert_eq!(outcome.expect("restores").errors.count(), 0);
    assert_eq!(fs::read_dir(dest.join("tree")).expect("list").count(), 2);
    assert_eq!(read(dest.join("tree/link")), b"good");
}

#[test]
fn what_cannot_be_read_is_recorded_and_the_rest_comes() {
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    fs::create_dir_all(root.join("tree")).expect("mkdir");
    for number in 0..LISTED_MAX + 100 {
        write(root.join(format!("tree/{number}")), b"content");
    }
    // Every file fails at its second piece, but for the first three.
    let broken = |piece: usize| match piece {
        0..6 => Ok(()),
        piece if piece % 2 == 0 => Ok(()),
        _ => Err(Error::new(Kind::Io, "read a bad sector")),
    };
    struct Heard(Mutex<Vec<Event>>);
    impl Monitor for Heard {
        fn report(&self, event: Event) {
            self.0.lock().expect("not poisoned").push(event);
        }
    }
    let heard = Heard(Mutex::new(Vec::new()));
    let mut source = Tampered::new(&root, &broken);
    let outcome = copy(&mut source, Path::new("tree"), &dest, KEEP, &heard).expect("goes on");
    assert_eq!(outcome.files, 3);
    assert_eq!(outcome.errors.count(), LISTED_MAX as u64 + 97);
    assert_eq!(outcome.errors.listed().len(), LISTED_MAX);
    assert_eq!(fs::read_dir(dest.join("tree")).expect("list").count(), 3);
    let heard = heard.0.into_inner().expect("not poisoned");
    let count = |which: fn(&Event) -> bool| heard.iter().filter(|event| which(event)).count();
    assert_eq!(
        count(|event| matches!(event, Event::Warning(_))),
        LISTED_MAX
    );
    assert!(count(|event| matches!(event, Event::Progress(_))) < 100);
    assert!(heard.contains(&Event::Phase("sync")));
}

#[test]
fn a_file_that_appears_meanwhile_stays() {
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    write(root.join("file"), b"from the snapshot");
    let appear = |_| {
        write(dest.join("file"), b"by somebody else");
        Ok(())
    };
    let mut source = Tampered::new(&root, &appear);
    let outcome = copy(&mut source, Path::new("file"), &dest, KEEP, &Silent).expect("restores");
    assert_eq!(outcome.skipped_existing.listed(), [dest.join("file")]);
    assert_eq!(outcome.files, 0);
    assert_eq!(read(dest.join("file")), b"by somebody else");
    assert_eq!(leftovers(&dest), "");
}

#[test]
fn a_run_that_is_stopped_leaves_no_half_file_and_can_go_on() {
    if !equipped(&["rsync"]) {
        return;
    }
    let scratch = Scratch::new();
    let (root, dest) = (scratch.dir("root"), scratch.dir("dest"));
    fs::create_dir_all(root.join("tree/sub")).expect("mkdir");
    for name in ["a", "b", "sub/c", "sub/d"] {
        write(root.join("tree").join(name), &vec![b'x'; 3 << 20]);
        set_mode(&root.join("tree").join(name), 0o640);
    }
    let stop = AtomicBool::new(false);
    let in_the_middle = |piece: usize| {
        stop.fetch_or(piece == 20, Ordering::Relaxed);
        Ok(())
    };
    let mut source = Tampered::new(&root, &in_the_middle);
    let options = Options {
        overwrite: Overwrite::Never,
        wants: None,
        totals: None,
        stop: &stop,
    };
    let error = copy(&mut source, Path::new("tree"), &dest, options, &Silent).unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted, "{}", error.report());
    assert_eq!(leftovers(&dest), "");
    let listed = run(Command::new("find")
        .arg(&dest)
        .args(["-type", "f", "-printf", "%s %m\n"]));
    assert_eq!(listed, "3145728 640\n");

    let outcome = restore(&root, "tree", &dest, KEEP).expect("goes on");
    assert_eq!((outcome.files, outcome.skipped_existing.count()), (3, 1));
    assert_eq!(differences(&root.join("tree"), &dest.join("tree")), "");
}
