//! rsync's command line, and what it says while it runs.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::record::ERRORS_KEPT;
use crate::progress::Progress;

/// What is left out.
#[derive(Clone, Debug, Default)]
pub struct Filters {
    /// rsync patterns; one that begins with a slash is a full path.
    pub exclude: Vec<OsString>,
    /// Files of such patterns.
    pub exclude_from: Vec<PathBuf>,
    pub one_file_system: bool,
    /// Leave out the content of directories tagged by `CACHEDIR.TAG`.
    pub exclude_caches: bool,
}

/// The options that make a snapshot a faithful copy: everything `-a` keeps, hard links, ACLs,
/// extended attributes, owners by number, holes. `--relative` keeps full paths. No temporary
/// `--inplace`: a file may be a hard link into a published snapshot.
const FAITHFUL: [&str; 5] = [
    "-aHAX",
    "--sparse",
    "--numeric-ids",
    "--relative",
    "--delete",
];

/// By default rsync compares times by the second, and takes a change that keeps the size and follows
/// within one for no change. Only for a filesystem that keeps nanoseconds: on another one, such as
/// what fuse2fs shows, every file would have changed.
pub const BY_THE_NANOSECOND: &str = "--modify-window=-1";

/// Plain digits, progress as lines, the sums at the end.
const TALKATIVE: [&str; 3] = [
    "--no-human-readable",
    "--info=progress2,stats2",
    "--outbuf=L",
];

/// The argument list for one run.
pub fn arguments(
    sources: &[PathBuf],
    filters: &Filters,
    leave_out: &[PathBuf],
    caches: &[PathBuf],
    link_from: &[PathBuf],
    into: &Path,
) -> Vec<OsString> {
    let mut args: Vec<OsString> = FAITHFUL
        .iter()
        .chain(&TALKATIVE)
        .map(OsString::from)
        .collect();
    if filters.one_file_system {
        args.push("--one-file-system".into());
    }
    for path in leave_out {
        args.push(option("--exclude=", &pattern(path, "")));
    }
    for path in caches {
        args.push(option("--include=", &pattern(path, "/CACHEDIR.TAG")));
        args.push(option("--exclude=", &pattern(path, "/*")));
    }
    for pattern in &filters.exclude {
        args.push(option("--exclude=", pattern));
    }
    for file in &filters.exclude_from {
        args.push(option("--exclude-from=", file.as_os_str()));
    }
    for earlier in link_from {
        args.push(option("--link-dest=", earlier.as_os_str()));
    }
    args.push("--".into());
    args.extend(sources.iter().map(|s| s.clone().into_os_string()));
    args.push(into.as_os_str().to_os_string());
    args
}

fn option(name: &str, value: &OsStr) -> OsString {
    let mut option = OsString::from(name);
    option.push(value);
    option
}

/// A full path as an rsync pattern that matches nothing else. rsync reads a backslash as an escape
/// only in a pattern that has a wildcard (rsync(1), "PATTERN MATCHING RULES").
fn pattern(path: &Path, suffix: &str) -> OsString {
    let bytes = path.as_os_str().as_bytes();
    let wild = |b: &u8| matches!(b, b'*' | b'?' | b'[');
    let escape = bytes.iter().any(wild) || suffix.as_bytes().iter().any(wild);
    let mut pattern = Vec::with_capacity(bytes.len() + suffix.len());
    for &byte in bytes {
        if escape && (wild(&byte) || byte == b'\\') {
            pattern.push(b'\\');
        }
        pattern.push(byte);
    }
    pattern.extend_from_slice(suffix.as_bytes());
    OsString::from_vec(pattern)
}

/// What rsync has said so far.
#[derive(Debug, Default)]
pub struct Account {
    pub progress: Progress,
    pub files: u64,
    pub bytes: u64,
    pub new_files: u64,
    pub new_bytes: u64,
    pub error_count: u64,
    /// The first [`ERRORS_KEPT`] messages.
    pub errors: Vec<String>,
    /// Files that were gone when their turn came.
    pub vanished: u64,
    /// The writing side failed: the copy is not what the source is.
    pub destination_failed: bool,
}

impl Account {
    /// Takes in one line of standard output, or one update of the progress line.
    pub fn hear(&mut self, line: &str) {
        let line = line.trim();
        let number = |text: &str| -> Option<u64> {
            let digits: String = text
                .trim()
                .chars()
                .take_while(char::is_ascii_digit)
                .collect();
            digits.parse().ok()
        };
        let sums: [(&str, &mut u64); 4] = [
            ("Number of files:", &mut self.files),
            ("Number of regular files transferred:", &mut self.new_files),
            ("Total file size:", &mut self.bytes),
            ("Total transferred file size:", &mut self.new_bytes),
        ];
        for (name, sum) in sums {
            if let Some(value) = line.strip_prefix(name).and_then(number) {
                *sum = value;
                return;
            }
        }
        // `1238099 100%  146.38kB/s  0:00:08 (xfr#5, to-chk=169/396)`; `ir-chk` while still listing.
        let Some((bytes, rest)) = line.split_once(' ') else {
            return;
        };
        if !rest
            .trim_start()
            .split(' ')
            .next()
            .is_some_and(|word| word.ends_with('%'))
        {
            return;
        }
        self.progress.bytes = bytes.parse().ok().or(self.progress.bytes);
        if let Some((_, counts)) = rest.split_once("-chk=") {
            let mut counts = counts
                .trim_end_matches(')')
                .split('/')
                .map(str::parse::<u64>);
            if let (Some(Ok(left)), Some(Ok(total))) = (counts.next(), counts.next()) {
                self.progress.files = total.checked_sub(left);
                self.progress.files_total = Some(total);
            }
        }
    }

    /// Takes in one line of standard error.
    pub fn hear_error(&mut self, line: &str) {
        // `file has vanished: "/x"`, and the same of a directory.
        if line.contains(" has vanished: ") && !line.starts_with("rsync") {
            self.vanished += 1;
            return;
        }
        // The closing line only says that there were others.
        if line.trim().is_empty()
            || line.starts_with("rsync error:")
            || line.starts_with("rsync warning:")
        {
            return;
        }
        // EIO, ENOSPC, EROFS, EDQUOT on our side.
        let ours = line.contains("[receiver]") || line.contains("[generator]");
        // ext4 says so of an attribute that is too large for it, however much room there is.
        let ours = ours && !line.contains("rsync_xal_set");
        if ours
            && ["(5)", "(28)", "(30)", "(122)"]
                .iter()
                .any(|errno| line.ends_with(errno))
        {
            self.destination_failed = true;
        }
        self.error_count += 1;
        if self.errors.len() < ERRORS_KEPT {
            self.errors.push(line.trim().to_string());
        }
    }
}

/// What an exit code of rsync means for the snapshot (rsync(1), "EXIT VALUES").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Whole.
    Complete,
    /// Whole but for what could not be read; published, and said so.
    WithErrors,
    /// Not to be published.
    Failed,
}

pub fn verdict(exit_code: Option<i32>, account: &Account) -> Verdict {
    match exit_code {
        _ if account.destination_failed => Verdict::Failed,
        Some(0 | 24) => Verdict::Complete,
        Some(23) => Verdict::WithErrors,
        _ => Verdict::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_patterns_that_match_only_themselves() {
        for (path, suffix, expected) in [
            ("/a/b", "", "/a/b"),
            ("/a\\b", "", "/a\\b"),
            ("/a/b", "/*", "/a/b/*"),
            ("/a[1]*", "", "/a\\[1]\\*"),
            ("/a\\b", "/*", "/a\\\\b/*"),
        ] {
            assert_eq!(pattern(Path::new(path), suffix), expected, "{path}{suffix}");
        }
    }

    #[test]
    fn progress_and_sums_are_read() {
        let mut account = Account::default();
        account.hear("      1238099 100%  146.38kB/s    0:00:08 (xfr#5, to-chk=169/396)");
        assert_eq!(account.progress.bytes, Some(1_238_099));
        assert_eq!(
            (account.progress.files, account.progress.files_total),
            (Some(227), Some(396))
        );
        account.hear("Number of files: 1234 (reg: 1000, dir: 234)");
        account.hear("Total transferred file size: 77 bytes");
        account.hear("Number of regular files transferred: 3");
        account.hear("Total file size: 99999 bytes");
        assert_eq!(
            (
                account.files,
                account.bytes,
                account.new_files,
                account.new_bytes
            ),
            (1234, 99999, 3, 77)
        );
        account.hear("nonsense without end");
        account.hear("");
    }

    #[test]
    fn an_unreadable_source_is_published_with_errors_but_a_failing_destination_is_not() {
        let mut account = Account::default();
        account.hear_error(r#"file has vanished: "/home/ann/x""#);
        assert_eq!((account.vanished, account.error_count), (1, 0));
        account.hear_error(
            r#"rsync: [sender] send_files failed to open "/x": Permission denied (13)"#,
        );
        account.hear_error(
            "rsync error: some files/attrs were not transferred (code 23) at main.c(1338)",
        );
        assert_eq!(account.error_count, 1);
        assert_eq!(verdict(Some(23), &account), Verdict::WithErrors);
        assert_eq!(verdict(Some(24), &account), Verdict::Complete);
        assert_eq!(verdict(Some(11), &account), Verdict::Failed);
        assert_eq!(verdict(None, &account), Verdict::Failed);
        account.hear_error(
            r#"rsync: [generator] recv_generator: mkdir "/x" failed: No space left on device (28)"#,
        );
        assert_eq!(verdict(Some(23), &account), Verdict::Failed);
    }
}
