//! What the recipe of sshfs, a file on it and a filesystem in that does when the link drops for a
//! while, and what e2ebak does: `scripts/compare-recipe`.
//!
//! The recipe has dm-crypt between file and filesystem. It is left out here, as many machines for
//! tests have no device-mapper; it would pass every error on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{output, run, tool};
use crate::ours::Ours;
use crate::peers::Sshfs;
use crate::rig::{Rig, VOLUME_BASE};
use crate::stop;

/// What takes longer is told as hung.
const PATIENCE: Duration = Duration::from_secs(60);
/// Until a filesystem has noticed.
const AFTERWARDS: Duration = Duration::from_secs(10);
const PIECE: usize = 1 << 20;

/// What was tried, and what came of it.
type Outcomes = Vec<(&'static str, String)>;

/// Prints a table: each step, and what each of them did.
pub fn compare(rig: &Rig, outage: Duration) {
    let columns = [
        ("sshfs", with_sshfs(rig, outage, &[])),
        (
            "sshfs -o reconnect",
            with_sshfs(
                rig,
                outage,
                &["-o", "reconnect", "-o", "ServerAliveInterval=5"],
            ),
        ),
        ("e2ebak mount", with_ours(rig, outage)),
    ];
    let seconds = outage.as_secs_f32();
    println!("The connection breaks, and the server can be reached again {seconds} s later.\n");
    let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
    println!("| step | {} |", names.join(" | "));
    println!("|---|{}", "---|".repeat(columns.len()));
    for (i, (step, _)) in columns[0].1.iter().enumerate() {
        let cells: Vec<&str> = columns.iter().map(|(_, all)| all[i].1.as_str()).collect();
        println!("| {step} | {} |", cells.join(" | "));
    }
}

fn with_sshfs(rig: &Rig, outage: Duration, options: &[&str]) -> Outcomes {
    eprintln!("-- sshfs {}", options.join(" "));
    let image = rig.stored("recipe.img");
    fs::write(rig.stored("plain"), b"").expect("room");
    let made = File::create(&image).and_then(|file| file.set_len(1 << 30));
    made.expect("room");
    run(tool("mkfs.ext4").args(["-q", "-F"]).arg(&image));
    let sshfs = Sshfs::mount_with(rig, rig.proxied(), "recipe", options);
    let at = rig.sandbox.dir("recipe-files");
    let mounted = LoopMount::new(&sshfs.file("recipe.img"), &at);
    let mut outcomes = drop_link(rig, outage, &sshfs.file("plain"), 0, &at);
    outcomes.push(("unmounting", patiently(tool("umount").arg(&at))));
    drop(mounted);
    // Whatever still waits gets an error with the end of sshfs.
    drop(sshfs);
    let check = output(tool("e2fsck").args(["-fn"]).arg(&image));
    let again = LoopMount::new(&image, &at);
    let clean = match check.status.success() {
        true => "e2fsck finds nothing",
        false => "**e2fsck finds errors**",
    };
    outcomes.push((
        "afterwards, on the server",
        format!("{clean}; {}", found(&at)),
    ));
    drop(again);
    outcomes
}

/// A filesystem in a file, mounted by way of a loop device; taken down however it ends.
struct LoopMount<'a> {
    device: String,
    at: &'a Path,
}

impl<'a> LoopMount<'a> {
    fn new(image: &Path, at: &'a Path) -> Self {
        let device = run(tool("losetup").args(["--find", "--show"]).arg(image));
        let mount = LoopMount {
            device: device.trim().into(),
            at,
        };
        run(tool("mount").arg(&mount.device).arg(at));
        mount
    }
}

impl Drop for LoopMount<'_> {
    fn drop(&mut self) {
        let mounted = || state_of(self.at) != NOT_MOUNTED;
        if mounted() && patiently(tool("umount").arg(self.at)) != "ok" {
            let _ = patiently(tool("umount").arg("-l").arg(self.at));
        }
        let _ = patiently(tool("losetup").arg("-d").arg(&self.device));
    }
}

fn with_ours(rig: &Rig, outage: Duration) -> Outcomes {
    eprintln!("-- e2ebak mount");
    let ours = Ours::mount_through(rig, &rig.location_at("image", rig.proxied()));
    let at = ours.at.clone();
    let mut outcomes = drop_link(rig, outage, &ours.volume, VOLUME_BASE, &at);
    outcomes.push(("unmounting", patiently(tool("umount").arg(&at))));
    drop(ours);
    stop::check();
    let _ = patiently(tool("umount").arg("-l").arg(&at));
    let again = Ours::mount(rig, 0);
    let check = check_volume(&again);
    outcomes.push((
        "afterwards, on the server",
        format!("{check}; {}", found(&at)),
    ));
    again.unmount();
    outcomes
}

/// The filesystem as it is on the volume; its mount is made to rest meanwhile.
fn check_volume(ours: &Ours) -> &'static str {
    let at = &ours.at;
    let frozen = tool("fsfreeze").arg("-f").arg(at).status();
    let check = output(tool("e2fsck").args(["-fn"]).arg(&ours.volume));
    let _ = tool("fsfreeze").arg("-u").arg(at).status();
    let text = String::from_utf8_lossy(&check.stdout).into_owned();
    match check.status.success() && frozen.is_ok_and(|s| s.success()) {
        true => "e2fsck finds nothing",
        false => {
            eprintln!("{text}{}", String::from_utf8_lossy(&check.stderr));
            "**e2fsck finds errors**"
        }
    }
}

/// Writes, drops the link, and writes again: to the image by the handle that is open on it, and on
/// the filesystem in it.
fn drop_link(rig: &Rig, outage: Duration, image: &Path, base: u64, at: &Path) -> Outcomes {
    let mut outcomes = Outcomes::new();
    let handle = OpenOptions::new().read(true).write(true).open(image);
    let handle = handle.expect("the image");
    let file = File::create(at.join("open before")).expect("a file");
    let clone = |file: &File| file.try_clone().expect("a descriptor");

    let (raw, open) = (clone(&handle), clone(&file));
    let before = attempt(move || {
        raw.write_all_at(&vec![1; PIECE], base)?;
        raw.sync_all()?;
        (&open).write_all(&vec![1; PIECE])?;
        open.sync_all()
    });
    outcomes.push(("before: write and sync", before));

    rig.drop_link(outage);
    let raw = clone(&handle);
    let by_handle = attempt(move || {
        raw.write_all_at(&vec![2; PIECE], base + PIECE as u64)?;
        raw.sync_all()
    });
    outcomes.push(("the open image file: write and sync", by_handle));
    let raw = clone(&handle);
    let again = attempt(move || {
        let mut back = vec![0; PIECE];
        raw.read_exact_at(&mut back, base + PIECE as u64)?;
        match back.iter().all(|byte| *byte == 2) {
            true => Ok(()),
            false => Err(io::Error::other("it reads as something else")),
        }
    });
    outcomes.push(("the same, read back", again));
    let open = clone(&file);
    let on_it = attempt(move || {
        (&open).write_all(&vec![2; PIECE])?;
        open.sync_all()
    });
    outcomes.push(("a file open on the filesystem: write and sync", on_it));
    let path = at.join("new after");
    let new = attempt(move || {
        let file = File::create(path)?;
        (&file).write_all(&vec![2; PIECE])?;
        file.sync_all()
    });
    outcomes.push(("a new file on it", new));
    thread::sleep(AFTERWARDS);
    let path = at.join("new later");
    let later = attempt(move || {
        let file = File::create(path)?;
        (&file).write_all(&vec![3; PIECE])?;
        file.sync_all()
    });
    outcomes.push(("another new file, 10 s later", later));
    outcomes.push(("the filesystem then", state_of(at)));
    stop::check();
    outcomes
}

/// Does it in a thread, as it may hang.
fn attempt(what: impl FnOnce() -> io::Result<()> + Send + 'static) -> String {
    let (done, outcome) = mpsc::channel();
    let start = Instant::now();
    thread::spawn(move || {
        let _ = done.send(what()); // too late, and nobody listens any more
    });
    let outcome = outcome.recv_timeout(PATIENCE);
    let took = start.elapsed().as_secs_f32();
    match outcome {
        Ok(Ok(())) => format!("ok ({took:.1} s)"),
        Ok(Err(error)) => format!("**{error}** ({took:.1} s)"),
        Err(_) => format!("**hangs** for {took:.0} s"),
    }
}

fn patiently(command: &mut Command) -> String {
    command.stdin(Stdio::null());
    let stderr = command.stderr(Stdio::piped()).stdout(Stdio::null());
    let mut child = stderr.spawn().expect("starts");
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            return match status.success() {
                true => "ok".into(),
                false => format!("**fails** ({status})"),
            };
        }
        if Instant::now() > end {
            let _ = child.kill();
            return "**hangs**".into();
        }
        thread::sleep(Duration::from_millis(20));
    }
}

const NOT_MOUNTED: &str = "**not mounted any more**";

/// How the kernel has it mounted.
fn state_of(at: &Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let line = mounts.lines().find(|l| l.split(' ').nth(1) == at.to_str());
    let flags = line
        .and_then(|line| line.split(' ').nth(3))
        .unwrap_or_default();
    let flag = |name| flags.split(',').any(|flag| flag == name);
    match (line.is_some(), flag("ro") || flag("emergency_ro")) {
        (false, _) => NOT_MOUNTED.into(),
        (true, true) => "**read-only**".into(),
        (true, false) => "writable".into(),
    }
}

/// Which of the two files hold what was written.
fn found(at: &Path) -> String {
    let whole = |name: &str, pieces: &[u8]| {
        let path: PathBuf = at.join(name);
        let expected: Vec<u8> = pieces.iter().flat_map(|p| vec![*p; PIECE]).collect();
        fs::read(path).is_ok_and(|content| content == expected)
    };
    let first = match () {
        () if whole("open before", &[1, 2]) => "the open file is whole",
        () if whole("open before", &[1]) => "**the open file has only what came before**",
        () => "**the open file is damaged**",
    };
    let second = match whole("new after", &[2]) {
        true => "the new file is there",
        false => "**the new file is lost**",
    };
    format!("{first}, {second}")
}
