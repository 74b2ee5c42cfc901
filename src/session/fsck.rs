//! Has the filesystem checked by its own program, without writing to the image.
//!
//! The program sees the volume as a file. What it writes stays in memory: the journal of a run that
//! was cut off is replayed there first, since nothing is whole before.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::Device;
use crate::error::{Error, Kind, Result};
use crate::export::{Export, Options};
use crate::host::Tool;
use crate::layer::Overlay;
use crate::progress::{Event, Monitor};

/// Replaying the journal of ext4 changes no more than twice what it holds, and e2fsck -n nothing.
const CHANGED_MAX: u64 = 512 << 20;

/// Where ext4's superblock says what must be understood, and which bit of it: there is a journal to
/// replay (Linux, `Documentation/filesystems/ext4/super.rst`).
const INCOMPAT: usize = 0x60;
const RECOVER: u8 = 0x4;

/// As much of what a checker says is kept.
const LINES_MAX: usize = 40;

/// What a filesystem's own program found.
pub struct Fscked {
    /// `ext4`, `xfs`, `btrfs`.
    pub filesystem: &'static str,
    pub program: &'static str,
    /// Whether a journal had to be replayed, in memory.
    pub replayed: bool,
    /// What is wrong, in the program's words; empty when nothing is.
    pub found: Vec<String>,
    /// The filesystem as it is after the replay.
    pub volume: Arc<dyn Device>,
}

/// Checks the filesystem in `volume`. `directory` is empty, in a mount namespace of our own.
///
/// # Errors
/// [`Kind::MissingTool`]; [`Kind::Denied`] where FUSE is not allowed; [`Kind::Unsupported`] for a
/// filesystem that is none of the three; [`Kind::Interrupted`].
pub fn fsck(
    volume: Arc<dyn Device>,
    directory: &Path,
    stop: &AtomicBool,
    monitor: &dyn Monitor,
) -> Result<Fscked> {
    let filesystem = kind_of(&*volume)?;
    let mut begin = [0; 4096];
    volume.read_exact_at(&mut begin, 0)?;
    let needs_replay = begin[1024 + INCOMPAT] & RECOVER != 0;
    let overlay = Arc::new(Overlay::with_limit(volume, CHANGED_MAX));
    let export = Export::mount(overlay.clone(), directory, Options::default())
        .map_err(|e| e.hint("checking the filesystem needs root, or the use of /dev/fuse"))?;
    let checked = match filesystem {
        "ext4" => ext4(&export.file(), needs_replay, stop, monitor),
        "xfs" => other("xfs_repair", &["-n", "-f"], &export.file(), stop, monitor),
        _ => other(
            "btrfs",
            &["check", "--readonly"],
            &export.file(),
            stop,
            monitor,
        ),
    };
    let unmounted = export.unmount();
    let (program, replayed, found) = checked?;
    unmounted?;
    Ok(Fscked {
        filesystem,
        program,
        replayed,
        found,
        volume: overlay,
    })
}

fn kind_of(volume: &dyn Device) -> Result<&'static str> {
    let holds = |at: u64, magic: &[u8]| -> Result<bool> {
        if volume.size() < at + 4096 {
            return Ok(false);
        }
        let mut found = vec![0; 4096];
        let begin = at / 4096 * 4096;
        volume.read_exact_at(&mut found, begin)?;
        Ok(found[(at - begin) as usize..].starts_with(magic))
    };
    Ok(match () {
        () if holds(1024 + 0x38, &[0x53, 0xEF])? => "ext4",
        () if holds(0, b"XFSB")? => "xfs",
        () if holds(0x1_0040, b"_BHRfS_M")? => "btrfs",
        () => {
            let why = "the volume holds none of ext4, xfs and btrfs";
            return Err(Error::new(Kind::Unsupported, why));
        }
    })
}

type Checked = (&'static str, bool, Vec<String>);

fn ext4(
    file: &Path,
    needs_replay: bool,
    stop: &AtomicBool,
    monitor: &dyn Monitor,
) -> Result<Checked> {
    if needs_replay {
        monitor.report(Event::Phase("replay the journal in memory"));
        // With -p, which refuses where -y would repair: what is wrong is to be seen below.
        let replay = Tool::new("e2fsck").args(["-p", "-E", "journal_only"]);
        let output = replay.arg(file).deaf().run_to_any_end()?;
        if !matches!(output.code(), Some(0 | 1)) {
            let said = output.text() + "\n" + &output.stderr;
            return Ok(("e2fsck", false, said.lines().map(String::from).collect()));
        }
    }
    monitor.report(Event::Phase("check the filesystem"));
    let tool = Tool::new("e2fsck")
        .args(["-fn", "-C", "1"])
        .arg(file)
        .deaf();
    let (code, said) = follow(&tool, stop, monitor)?;
    match code {
        Some(0) => Ok(("e2fsck", needs_replay, Vec::new())),
        Some(4 | 12) => Ok(("e2fsck", needs_replay, said)),
        _ => Err(broken("e2fsck", code, &said)),
    }
}

fn other(
    program: &'static str,
    args: &[&str],
    file: &Path,
    stop: &AtomicBool,
    monitor: &dyn Monitor,
) -> Result<Checked> {
    monitor.report(Event::Phase("check the filesystem"));
    let tool = Tool::new(program).args(args).arg(file).deaf();
    match follow(&tool, stop, monitor)? {
        (Some(0), _) => Ok((program, false, Vec::new())),
        (Some(1 | 2), said) => Ok((program, false, said)),
        (code, said) => Err(broken(program, code, &said)),
    }
}

fn broken(program: &str, code: Option<i32>, said: &[String]) -> Error {
    let how = match code {
        Some(code) => format!("{program} ended with exit code {code}"),
        None => format!("{program} was killed"),
    };
    Error::new(Kind::Io, how).because(said.join("; "))
}

/// Runs a checker; gives its exit code and what it said, without its figures.
fn follow(
    tool: &Tool,
    stop: &AtomicBool,
    monitor: &dyn Monitor,
) -> Result<(Option<i32>, Vec<String>)> {
    let said = Mutex::new(Vec::new());
    let pass = Cell::new(0);
    let hear = |line: &str| {
        if let Some(now) = pass_of(line) {
            if pass.replace(now) != now {
                monitor.report(Event::Phase(PASSES[now.min(PASSES.len() - 1)]));
            }
            return;
        }
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if !line.trim().is_empty() && said.len() < LINES_MAX {
            said.push(line.trim().to_string());
        }
    };
    let status = tool.stream(&hear, &hear, &|| (), stop)?;
    if stop.load(Ordering::Relaxed) {
        return Err(Error::new(Kind::Interrupted, "interrupted by a signal"));
    }
    let said = said.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Its greeting and the headings of its passes are no findings.
    let findings = said
        .into_iter()
        .filter(|line| !line.starts_with("e2fsck ") && !line.starts_with("Pass "));
    Ok((status.code(), findings.collect()))
}

const PASSES: [&str; 6] = [
    "check the filesystem",
    "check inodes, blocks and sizes",
    "check directories",
    "check that everything can be reached",
    "check reference counts",
    "check group summaries",
];

/// `1 3 100 /dev/x`: what e2fsck -C prints (e2fsck(8)).
fn pass_of(line: &str) -> Option<usize> {
    let mut words = line.split_whitespace();
    let pass: usize = words.next()?.parse().ok()?;
    let numbers = [words.next()?, words.next()?];
    let are_numbers = numbers.iter().all(|word| word.parse::<u64>().is_ok());
    (pass <= 5 && are_numbers).then_some(pass)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_e2fsck_are_told_from_what_it_says() {
        assert_eq!(pass_of("1 3 100 /tmp/x"), Some(1));
        assert_eq!(pass_of("5 100 100 /tmp/x"), Some(5));
        for line in [
            "",
            "Pass 1: Checking",
            "12 links",
            "7 1 2 /x",
            "Inode 12 has 3",
        ] {
            assert_eq!(pass_of(line), None, "{line}");
        }
    }
}
