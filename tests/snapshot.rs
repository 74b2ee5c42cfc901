//! Snapshots by the real rsync, into a plain directory in place of a mounted filesystem.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use e2ebak::error::{Kind, Result};
use e2ebak::progress::{Event, Monitor, Progress};
use e2ebak::snapshot::{self, Catalogue, Filters, Job, MountedFiles, Outcome};

#[derive(Default)]
struct Heard(Mutex<Vec<Event>>);

impl Monitor for Heard {
    fn report(&self, event: Event) {
        self.0.lock().expect("not poisoned").push(event);
    }
}

struct Bench {
    _directory: tempfile::TempDir,
    root: PathBuf,
    source: PathBuf,
    filters: Filters,
    stop: AtomicBool,
    heard: Heard,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let top = fs::canonicalize(directory.path()).expect("real");
        let (root, source) = (top.join("root"), top.join("source"));
        fs::create_dir(&root).expect("made");
        fs::create_dir(&source).expect("made");
        fs::write(source.join("same"), "never changes").expect("written");
        fs::write(source.join("other"), "one").expect("written");
        Bench {
            _directory: directory,
            root,
            source,
            filters: Filters::default(),
            stop: AtomicBool::new(false),
            heard: Heard::default(),
        }
    }

    fn take(&self) -> Result<Outcome> {
        self.take_of(&self.source)
    }

    fn take_of(&self, source: &PathBuf) -> Result<Outcome> {
        let sources = snapshot::resolve_sources(std::slice::from_ref(source)).expect("resolved");
        snapshot::take(&Job {
            root: &self.root,
            sources: &sources,
            filters: &self.filters,
            leave_out: &[],
            host: "laptop",
            stop: &self.stop,
            monitor: &self.heard,
            link: &Progress::default,
        })
    }

    fn catalogue(&self) -> Catalogue {
        Catalogue::load(&mut MountedFiles(self.root.clone())).expect("a catalogue")
    }

    /// Where a file of the source is in a snapshot.
    fn copy(&self, id: &str, name: &str) -> PathBuf {
        let source = self.source.strip_prefix("/").expect("absolute");
        self.root.join("snapshots").join(id).join(source).join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.join("snapshots")).expect("listed");
        let mut names: Vec<_> = entries
            .map(|e| {
                e.expect("an entry")
                    .file_name()
                    .into_string()
                    .expect("text")
            })
            .collect();
        names.sort();
        names
    }
}

fn inode(path: &Path) -> u64 {
    fs::symlink_metadata(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        .ino()
}

#[test]
fn unchanged_files_are_hard_links_and_changed_ones_are_not() {
    let bench = Bench::new();
    let first = bench.take().expect("taken").record;
    fs::write(bench.source.join("other"), "other content").expect("written");
    let second = bench.take().expect("taken").record;

    assert!(first.id < second.id);
    assert_eq!(
        inode(&bench.copy(&first.id, "same")),
        inode(&bench.copy(&second.id, "same"))
    );
    assert_ne!(
        inode(&bench.copy(&first.id, "other")),
        inode(&bench.copy(&second.id, "other"))
    );
    assert_eq!(
        fs::read_to_string(bench.copy(&first.id, "other")).expect("read"),
        "one"
    );
    assert_eq!((second.new_files, second.new_bytes), (1, 13));
    assert_eq!((first.new_files, first.bytes), (2, 16));
    let latest = fs::read_link(bench.root.join("latest")).expect("a link");
    assert_eq!(latest, Path::new("snapshots").join(&second.id));
    assert_eq!(bench.catalogue().complete.len(), 2);
}

#[test]
fn a_run_of_other_sources_in_between_costs_no_full_copy() {
    let bench = Bench::new();
    let inside = bench.source.join("inside");
    fs::create_dir(&inside).expect("made");
    fs::write(inside.join("deep"), "deep").expect("written");
    bench.take().expect("taken");
    let part = bench.take_of(&inside).expect("taken").record;
    assert_eq!(part.new_files, 0, "linked from a snapshot of other sources");
    let again = bench.take().expect("taken").record;
    assert_eq!(again.new_files, 0, "linked from the one before the last");
}

#[test]
fn an_interrupted_run_publishes_nothing_and_is_taken_up() {
    let bench = Bench::new();
    let first = bench.take().expect("taken").record;
    fs::write(bench.source.join("third"), "new").expect("written");

    // What a killed run leaves: part of the tree, one file of it linked into the first snapshot.
    let inflight = "2026-01-01T00-00-00Z.inflight";
    let left = bench.copy(inflight, "");
    fs::create_dir_all(&left).expect("made");
    fs::hard_link(bench.copy(&first.id, "same"), left.join("same")).expect("linked");
    fs::copy(bench.source.join("third"), left.join("third")).expect("copied");
    let times = fs::File::options()
        .write(true)
        .open(left.join("third"))
        .expect("opened");
    let modified = fs::metadata(bench.source.join("third"))
        .expect("there")
        .modified()
        .expect("a time");
    times.set_modified(modified).expect("set");
    let arrived = inode(&left.join("third"));
    assert_eq!(bench.catalogue().complete.len(), 1);

    // Attributes that change meanwhile must not reach the published file through its link.
    fs::set_permissions(bench.source.join("same"), fs::Permissions::from_mode(0o600)).expect("set");
    let second = bench.take().expect("taken").record;

    assert_eq!(
        inode(&bench.copy(&second.id, "third")),
        arrived,
        "sent a second time"
    );
    let mode = |id: &str| fs::metadata(bench.copy(id, "same")).expect("there").mode() & 0o777;
    assert_eq!((mode(&first.id), mode(&second.id)), (0o644, 0o600));
    assert!(
        !bench.names().contains(&inflight.to_string()),
        "{:?}",
        bench.names()
    );
}

#[test]
fn a_request_to_stop_publishes_nothing() {
    let bench = Bench::new();
    bench.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = bench.take().unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted);
    assert!(bench.catalogue().complete.is_empty());
    bench
        .stop
        .store(false, std::sync::atomic::Ordering::Relaxed);
    bench.take().expect("taken");
    assert_eq!(bench.names().len(), 2, "{:?}", bench.names());
}

#[test]
fn leftovers_of_a_run_that_died_while_publishing_do_not_count() {
    let bench = Bench::new();
    let first = bench.take().expect("taken").record;
    let snapshots = bench.root.join("snapshots");
    // Record written, tree not yet renamed; and a tree whose record is gone.
    fs::write(snapshots.join("2027-01-01T00-00-00Z.json"), "{}").expect("written");
    fs::create_dir(snapshots.join("2027-01-02T00-00-00Z")).expect("made");
    let catalogue = bench.catalogue();
    assert_eq!(catalogue.latest().expect("one").record, first);
    assert_eq!(catalogue.damaged.len(), 2);

    // Though the clock is behind the newest name, the new snapshot sorts last.
    let second = bench.take().expect("taken").record;
    assert_eq!(second.id, "2027-01-02T00-00-01Z");
    assert_eq!(bench.catalogue().latest().expect("one").record, second);
    assert!(!snapshots.join("2027-01-01T00-00-00Z.json").exists());
    assert!(
        snapshots.join("2027-01-02T00-00-00Z").exists(),
        "a tree was removed"
    );
    let warned = |text: &str| {
        let heard = bench.heard.0.lock().expect("not poisoned");
        heard
            .iter()
            .any(|e| matches!(e, Event::Warning(w) if w.contains(text)))
    };
    assert!(warned("clock") && warned("2027-01-02T00-00-00Z"));
}

#[test]
fn filters_leave_out_what_they_name_and_nothing_else() {
    let mut bench = Bench::new();
    let cache = bench.source.join("a [cache] *");
    fs::create_dir(&cache).expect("made");
    fs::write(
        cache.join("CACHEDIR.TAG"),
        "Signature: 8a477f597d28d172789f06886806bc55\n",
    )
    .expect("written");
    fs::write(cache.join("big"), "x").expect("written");
    fs::create_dir(bench.source.join("a c x")).expect("made");
    fs::write(bench.source.join("a c x/big"), "x").expect("written");
    fs::write(bench.source.join("core"), "x").expect("written");
    fs::write(bench.source.join("old~"), "x").expect("written");
    let patterns = bench.root.join("../patterns");
    fs::write(&patterns, "*~\n").expect("written");
    bench.filters = Filters {
        exclude: vec!["core".into()],
        exclude_from: vec![patterns],
        exclude_caches: true,
        one_file_system: true,
    };
    let id = bench.take().expect("taken").record.id;
    let there = |name: &str| bench.copy(&id, name).exists();
    assert!(there("same") && there("a c x/big") && there("a [cache] */CACHEDIR.TAG"));
    assert!(!there("a [cache] */big") && !there("core") && !there("old~"));
}

#[test]
fn a_destination_that_fails_publishes_nothing() {
    let bench = Bench::new();
    bench.take().expect("taken");
    // A tree that rsync cannot write into, as when the filesystem has turned read-only.
    let failing = bench.root.join("snapshots");
    let status = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=16k,nr_inodes=4", "tmpfs"])
        .arg(&failing)
        .status();
    if !status.is_ok_and(|s| s.success()) {
        assert!(
            std::env::var_os("CI").is_none(),
            "mounting a tmpfs needs root"
        );
        eprintln!("skipped: mounting a tmpfs needs root");
        return;
    }
    let outcome = bench.take();
    let published = bench.names().iter().any(|n| n.ends_with('Z'));
    let unmounted = std::process::Command::new("umount").arg(&failing).status();
    assert!(unmounted.is_ok_and(|s| s.success()));
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{}", error.report());
    assert!(!published);
}
