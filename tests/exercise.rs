//! Random reads, writes, discards, resizes, flushes and remounts against a vector of bytes, as fsx
//! does it: on the stack of a volume over memory and over a real sftp-server, and through the kernel on
//! the file that an export shows.
//!
//! `E2EBAK_EXERCISE_SEED` repeats a run, `E2EBAK_EXERCISE_OPERATIONS` makes it longer.

#[path = "exercise/operations.rs"]
mod operations;
#[path = "crash/random.rs"]
#[allow(dead_code)]
mod random;
#[path = "exercise/volume.rs"]
mod volume;
#[path = "export/world.rs"]
#[allow(dead_code)]
mod world;

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use e2ebak::device::Device;
use e2ebak::error::{Kind, Result};
use e2ebak::export::Options;
use e2ebak::layer::Cache;
use e2ebak::layer::memory::Memory;
use e2ebak::link::command::CommandDial;
use e2ebak::location::RemotePath;
use e2ebak::remote::engine::Bounds;
use e2ebak::remote::local::LocalStore;
use e2ebak::remote::sftp_store::SftpStore;
use e2ebak::remote::{Access, Store};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use operations::{Exerciser, Subject, operations_or, seed};
use volume::{OFFSET, cached, decrypted};
use world::World;

const SERVER: &str = "/usr/lib/openssh/sftp-server";
const SIZE: u64 = 4 << 20;
/// Bytes that are encrypted as one: ours, and the least that others make.
const SECTORS: [u64; 2] = [4096, 512];
/// Small, so that it has to make room; and one that holds everything.
const CACHES: [u64; 3] = [128 << 10, 1 << 20, 16 << 20];

/// A volume over a device that is opened anew for each mount.
struct Stack<'a> {
    open: &'a dyn Fn() -> Arc<dyn Device>,
    sector: u64,
    mounted: Option<Cache>,
    mounts: usize,
}

impl<'a> Stack<'a> {
    fn new(open: &'a dyn Fn() -> Arc<dyn Device>, sector: u64) -> Self {
        let mut stack = Stack {
            open,
            sector,
            mounted: None,
            mounts: 0,
        };
        stack.remount();
        stack
    }

    fn volume(&self) -> &Cache {
        self.mounted.as_ref().expect("mounted")
    }
}

fn done(outcome: Result<()>) -> bool {
    match outcome {
        Ok(()) => true,
        Err(error) if error.kind() == Kind::Unsupported => false,
        Err(error) => panic!("{}", error.report()),
    }
}

impl Subject for Stack<'_> {
    fn read(&mut self, at: u64, into: &mut [u8]) {
        let volume = self.volume();
        let at_once = at.is_multiple_of(2) && volume.read_at_once(into, at);
        assert!(at_once || done(volume.read_exact_at(into, at)));
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        let volume = self.volume();
        let taken = match at % 2 {
            0 => volume.write_at_once(data, at),
            _ => 0,
        };
        assert!(done(volume.write_all_at(&data[taken..], at + taken as u64)));
    }

    fn discard(&mut self, at: u64, len: u64) -> bool {
        done(self.volume().discard(at..at + len))
    }

    fn resize(&mut self, size: u64) -> bool {
        done(self.volume().resize(size))
    }

    fn flush(&mut self) {
        assert!(done(self.volume().flush()));
    }

    fn remount(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            assert!(done(mounted.close()));
        }
        let size = CACHES[self.mounts % CACHES.len()];
        self.mounts += 1;
        self.mounted = Some(cached((self.open)(), self.sector, size));
    }
}

/// Exercises the stack; then what the device holds, decrypted without a cache, must be the model.
fn exercise(open: &dyn Fn() -> Arc<dyn Device>, sector: u64, usual: usize) {
    let mut exerciser = Exerciser::new(seed(), vec![0; SIZE as usize], sector);
    let mut stack = Stack::new(open, sector);
    exerciser.run(&mut stack, operations_or(usual));
    assert!(done(stack.volume().close()));
    drop(stack);
    let volume = decrypted(open(), sector);
    let mut seen = vec![0; volume.size() as usize];
    volume.read_exact_at(&mut seen, 0).expect("in range");
    exerciser.compare(0, &seen);
}

#[test]
fn a_volume_over_memory_is_a_vector_of_bytes() {
    for sector in SECTORS {
        let memory = Arc::new(Memory::new(OFFSET + SIZE));
        exercise(&|| memory.clone(), sector, 10_000);
    }
}

#[test]
fn a_volume_over_an_sftp_server_is_a_vector_of_bytes() {
    if !Path::new(SERVER).exists() {
        assert!(std::env::var("CI").is_err(), "CI needs {SERVER}");
        println!("skipped: needs {SERVER}");
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("a.img");
    LocalStore::new(&image)
        .create(OFFSET + SIZE)
        .expect("created");
    let open = || {
        let argv: Vec<OsString> = vec![SERVER.into(), "-e".into()];
        let dial = Arc::new(CommandDial::new(argv).expect("a command"));
        let path = RemotePath::new(image.to_str().expect("text")).expect("a path");
        let bounds = Bounds {
            sessions: Some(3),
            ..Bounds::default()
        };
        let store = SftpStore::connect(dial, &path, "nas:a.img", bounds);
        let store = store.unwrap_or_else(|e| panic!("{}", e.report()));
        store.open(Access::ReadWrite).expect("opens")
    };
    exercise(&open, SECTORS[0], 4000);
}

/// The file of an export, opened anew for each remount. The kernel keeps nothing of it.
struct Through<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> Through<'a> {
    fn new(path: &'a Path) -> Self {
        let how = File::options().read(true).write(true).open(path);
        Through {
            path,
            file: how.expect("opens"),
        }
    }
}

impl Subject for Through<'_> {
    fn read(&mut self, at: u64, into: &mut [u8]) {
        self.file.read_exact_at(into, at).expect("read");
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        self.file.write_all_at(data, at).expect("written");
    }

    /// Refused: a hole would read as noise under dm-crypt.
    fn discard(&mut self, at: u64, len: u64) -> bool {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = fallocate(&self.file, punch, at, len.max(1));
        assert_eq!(punched, Err(Errno::OPNOTSUPP));
        false
    }

    fn resize(&mut self, _: u64) -> bool {
        false
    }

    fn flush(&mut self) {
        self.file.sync_all().expect("synced");
    }

    fn remount(&mut self) {
        *self = Through::new(self.path);
    }
}

/// Each round a mount of its own over the same image, used by a process of its own.
#[test]
fn the_file_of_an_export_is_a_vector_of_bytes() {
    const ROUNDS: u64 = 4;
    let Some(world) = World::new() else { return };
    let image = LocalStore::new(world.path("image"));
    image.create(OFFSET + SIZE).expect("created");
    fs::write(world.path("model"), vec![0; SIZE as usize]).expect("written");
    let directory = world.make_directory("fuse");
    let operations = operations_or(6000) / ROUNDS as usize;
    for round in 0..ROUNDS {
        let device = image.open(Access::ReadWrite).expect("opens");
        let cache = Arc::new(cached(
            device,
            SECTORS[0],
            CACHES[round as usize % CACHES.len()],
        ));
        let export = e2ebak::export::Export::mount(cache.clone(), &directory, Options::default());
        let export = export.unwrap_or_else(|e| panic!("{}", e.report()));
        let mut role = world::role("role_exercise_the_file", &export.file());
        role.env("E2EBAK_EXERCISE_SEED", (seed() + round).to_string())
            .env("E2EBAK_EXERCISE_OPERATIONS", operations.to_string());
        assert!(role.status().expect("runs").success(), "round {round}");
        export.unmount().expect("unmounted");
        cache.close().expect("closes");
    }
    let volume = decrypted(image.open(Access::ReadOnly).expect("opens"), SECTORS[0]);
    let mut seen = vec![0; SIZE as usize];
    volume.read_exact_at(&mut seen, 0).expect("in range");
    assert!(seen == fs::read(world.path("model")).expect("the role left it"));
}

#[test]
fn role_exercise_the_file() {
    let Some(path) = world::role_argument() else {
        return;
    };
    let world = path.parent().and_then(Path::parent).expect("a mount");
    let model = world.join("model");
    let mut exerciser = Exerciser::new(seed(), fs::read(&model).expect("there"), SECTORS[0]);
    exerciser.run(&mut Through::new(&path), operations_or(400));
    fs::write(&model, exerciser.model()).expect("written");
}

/// That it can fail: a subject that forgets one write of a hundred.
#[test]
fn a_write_that_is_lost_is_found() {
    struct Forgetful(Vec<u8>, u32);
    impl Subject for Forgetful {
        fn read(&mut self, at: u64, into: &mut [u8]) {
            into.copy_from_slice(&self.0[at as usize..][..into.len()]);
        }
        fn write(&mut self, at: u64, data: &[u8]) {
            self.1 += 1;
            if !self.1.is_multiple_of(100) {
                self.0[at as usize..][..data.len()].copy_from_slice(data);
            }
        }
        fn discard(&mut self, _: u64, _: u64) -> bool {
            false
        }
        fn resize(&mut self, _: u64) -> bool {
            false
        }
        fn flush(&mut self) {}
        fn remount(&mut self) {}
    }
    let model = vec![0; SIZE as usize];
    let mut exerciser = Exerciser::new(seed(), model.clone(), SECTORS[0]);
    let run = || exerciser.run(&mut Forgetful(model, 0), 2000);
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    assert!(found.is_err());
}
