//! A device that can be held up and made to fail, and the world around an export of it.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use e2ebak::device::{Caps, Device, Discard, Durability, check_range};
use e2ebak::error::{Error, Kind, Result};
use e2ebak::export::{Export, Options};
use e2ebak::host::mkfs;
use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;

pub const MIB: u64 = 1 << 20;
pub const SOON: Duration = Duration::from_secs(20);

pub struct Rig {
    pub file: File,
    pub size: u64,
    pub writable: bool,
    pub flushes: AtomicU64,
    /// Requests that touch this range wait until it is `None`.
    gate: Mutex<Option<Range<u64>>>,
    opened: Condvar,
    pub waiting: AtomicU64,
    pub failing: Mutex<Option<Kind>>,
}

impl Rig {
    pub fn new(path: &Path, size: u64) -> Arc<Rig> {
        let mut how = File::options();
        how.read(true).write(true).create(true).truncate(false);
        let file = how.open(path).expect("a file");
        file.set_len(size).expect("room");
        Arc::new(Rig {
            file,
            size,
            writable: true,
            flushes: AtomicU64::new(0),
            gate: Mutex::default(),
            opened: Condvar::new(),
            waiting: AtomicU64::new(0),
            failing: Mutex::default(),
        })
    }

    pub fn set_gate(&self, range: Option<Range<u64>>) {
        *self.gate.lock().unwrap() = range;
        self.opened.notify_all();
    }

    fn pass(&self, offset: u64, len: usize) -> Result<()> {
        let end = offset + len as u64;
        let shut = |gate: &mut Option<Range<u64>>| {
            gate.as_ref()
                .is_some_and(|g| offset < g.end && g.start < end)
        };
        self.waiting.fetch_add(1, Ordering::SeqCst);
        drop(self.opened.wait_while(self.gate.lock().unwrap(), shut));
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        match *self.failing.lock().unwrap() {
            Some(kind) => Err(Error::new(kind, "as the test wants")),
            None => check_range(self.caps(), self.size, offset, len),
        }
    }
}

impl Device for Rig {
    fn caps(&self) -> Caps {
        Caps {
            alignment: 1,
            io_best: 1 << 20,
            writable: self.writable,
            durability: Durability::Stable,
            discard: Discard::Refused,
        }
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.pass(offset, buf.len())?;
        Ok(self.file.read_exact_at(buf, offset)?)
    }
    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.pass(offset, data.len())?;
        Ok(self.file.write_all_at(data, offset)?)
    }
    fn flush(&self) -> Result<()> {
        self.pass(0, 0)?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, _: Range<u64>) -> Result<()> {
        panic!("nobody may discard through an export")
    }
    fn resize(&self, _: u64) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "it has the size it has"))
    }
}

/// A scratch directory in a mount namespace of this test's own, which takes every mount with it.
pub struct World {
    pub directory: tempfile::TempDir,
}

impl World {
    /// `None`, with the reason printed, where the test cannot run; a failure on CI.
    pub fn new() -> Option<World> {
        let root = rustix::process::geteuid().is_root();
        if !root || !Path::new("/dev/fuse").exists() {
            assert!(std::env::var("CI").is_err(), "CI needs root and /dev/fuse");
            println!("skipped: needs root and /dev/fuse");
            return None;
        }
        // SAFETY: not UnshareFlags::FILES.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.expect("unshared");
        let private = MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM;
        rustix::mount::mount_change("/", private).expect("private");
        let directory = tempfile::tempdir().expect("a directory");
        Some(World { directory })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn make_directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).expect("created");
        path
    }

    pub fn rig(&self) -> Arc<Rig> {
        Rig::new(&self.path("image"), 4 * MIB)
    }

    pub fn export(&self, device: Arc<dyn Device>, options: Options) -> Export {
        Export::mount(device, &self.make_directory("fuse"), options).expect("exported")
    }
}

pub fn shell(script: &str, argument: &Path) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", script, "sh"])
        .arg(argument)
        .env("LC_ALL", "C");
    command
}

/// Runs `script` with the path as `$1` and gives back what it said on both outputs.
pub fn say(script: &str, argument: &Path) -> (bool, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = shell(script, argument).output().expect("sh runs");
    let text = [stdout, stderr].concat();
    (
        status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

pub fn do_or_panic(script: &str, argument: &Path) {
    let (done, said) = say(script, argument);
    assert!(done, "{script}: {said}");
}

/// Waits until `is` holds.
pub fn eventually(what: &str, is: impl Fn() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < SOON, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The loop devices on any file of that name below the test's directory.
pub fn loop_devices_on(path: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").expect("readable").flatten();
    devices
        .filter_map(|device| {
            let file = fs::read_to_string(device.path().join("loop/backing_file")).ok()?;
            let ours = file.trim_end().starts_with(path.to_str()?);
            ours.then(|| device.file_name().to_string_lossy().into_owned())
        })
        .collect()
}

/// Bytes that look like what dm-crypt makes of a hole.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let word = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(word).flatten().take(len).collect()
}

/// A file of noise.
pub fn noisy(path: &Path, size: u64) -> Arc<Rig> {
    let rig = Rig::new(path, size);
    for block in 0..size / MIB {
        let bytes = noise(block + 1, MIB as usize);
        rig.file.write_all_at(&bytes, block * MIB).expect("written");
    }
    rig
}

pub fn format(rig: &Rig) {
    let mut write = |offset, run: &[u8]| rig.write_all_at(run, offset);
    mkfs::make_ext4(rig.size, "test", None, &mut write).expect("made");
}

/// A file of noise with an ext4 in it.
pub fn noisy_ext4(path: &Path, size: u64) -> Arc<Rig> {
    let rig = noisy(path, size);
    format(&rig);
    rig
}

/// This binary again, as one of the tests below named `role_..`, which does nothing otherwise.
pub fn role(name: &str, argument: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command
        .args(["--exact", name, "--nocapture"])
        .env("EXPORT_TEST_ROLE", argument);
    command
}

pub fn role_argument() -> Option<PathBuf> {
    std::env::var_os("EXPORT_TEST_ROLE").map(PathBuf::from)
}
