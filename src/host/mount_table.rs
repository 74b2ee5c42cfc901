//! What is mounted where, read from the kernel's table without touching any filesystem.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Result};

/// One mount, as `proc_pid_mountinfo(5)` tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Minor number of its device (field 3). For FUSE also the number of the connection.
    pub minor: u32,
    /// The mountpoint (field 5).
    pub at: PathBuf,
    /// `ext4`, `fuse.ext4` (field 9).
    pub kind: String,
    /// What is mounted, a device or any text (field 10).
    pub source: PathBuf,
}

/// The mount that is seen at `at`: of several on one mountpoint the last. `at` must be absolute
/// and free of links.
pub fn topmost(at: &Path) -> Result<Option<Entry>> {
    // The thread's table, since a namespace belongs to a thread.
    read("/proc/thread-self/mountinfo", at)
}

/// The same in the mount namespace of another process.
pub(super) fn topmost_of(pid: u32, at: &Path) -> Result<Option<Entry>> {
    read(&format!("/proc/{pid}/mountinfo"), at)
}

fn read(path: &str, at: &Path) -> Result<Option<Entry>> {
    let table = fs::read(path).attempt(|| format!("read {path}"))?;
    Ok(find(&table, at))
}

fn find(table: &[u8], at: &Path) -> Option<Entry> {
    let lines = table.split(|byte| *byte == b'\n');
    lines.rev().filter_map(parse).find(|entry| entry.at == at)
}

fn parse(line: &[u8]) -> Option<Entry> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    // Optional fields stand between field 6 and a lone dash.
    let dash = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    let device = text(fields.get(2)?);
    Some(Entry {
        minor: device.split_once(':')?.1.parse().ok()?,
        at: unescape(fields.get(4)?),
        kind: text(fields.get(dash + 1)?),
        source: unescape(fields.get(dash + 2)?),
    })
}

/// Blanks, newlines and backslashes stand in octal: `\040`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..3).filter(|_| *first == b'\\');
        let code = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
        40 22 0:51 / /run/a\\040b rw,nosuid shared:1 master:2 - fuse.e2ebak e2ebak rw\n\
        41 22 7:3 / /run/a\\040b rw - ext4 /dev/loop3 rw\n\
        42 22 0:53 / /run/a\\134b\xff rw - tmpfs \\011 rw\n";

    #[test]
    fn the_topmost_mount_on_a_path_counts() {
        let entry = find(TABLE, Path::new("/run/a b")).expect("mounted");
        assert_eq!((entry.minor, entry.kind.as_str()), (3, "ext4"));
        assert_eq!(entry.source, Path::new("/dev/loop3"));
        assert_eq!(find(TABLE, Path::new("/")).expect("mounted").minor, 1);
        assert_eq!(find(TABLE, Path::new("/run")), None);
    }

    #[test]
    fn any_byte_may_be_in_a_path() {
        let path: PathBuf = OsString::from_vec(b"/run/a\\b\xff".to_vec()).into();
        let entry = find(TABLE, &path).expect("mounted");
        assert_eq!(entry.source, Path::new("\t"));
    }

    #[test]
    fn nonsense_is_passed_over() {
        for line in [
            "",
            "\n\n",
            "1 2 3",
            "1 2 x / / rw - a b c",
            "1 2 0:9 / \\9 rw -",
            "\\",
        ] {
            assert_eq!(find(line.as_bytes(), Path::new("/")), None, "{line}");
        }
    }

    #[test]
    fn the_root_of_this_machine_is_mounted() {
        assert!(topmost(Path::new("/proc")).expect("readable").is_some());
    }
}
