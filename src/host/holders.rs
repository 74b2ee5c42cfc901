//! Who keeps a mount busy, as fuser(1) would tell: from the links in `/proc`, which are read and
//! not followed, so that a filesystem that hangs cannot stop us.

use std::fs;
use std::path::Path;

/// More names than this help nobody.
const NAMES_MAX: usize = 5;

/// Processes that have a file open, run, or stand somewhere at or below `at`: `bash (pid 4711)`.
/// Without root only one's own are seen; those who hold a file by a memory map alone never.
pub fn of(at: &Path) -> Vec<String> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut names = Vec::new();
    for process in processes.flatten() {
        let number = process.file_name();
        let Some(number) = number.to_str().filter(|n| n.parse::<u32>().is_ok()) else {
            continue;
        };
        if holds(&process.path(), at) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            names.push(format!("{} (pid {number})", name.trim()));
        }
    }
    names
}

/// The same as a sentence: `held by bash (pid 4711) and 3 more`; `None` when nobody is seen.
pub fn sentence(at: &Path) -> Option<String> {
    let names = of(at);
    let (shown, more) = names.split_at(names.len().min(NAMES_MAX));
    match (shown.is_empty(), more.len()) {
        (true, _) => None,
        (false, 0) => Some(format!("held by {}", shown.join(", "))),
        (false, more) => Some(format!("held by {} and {more} more", shown.join(", "))),
    }
}

fn holds(process: &Path, at: &Path) -> bool {
    let inside = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(at));
    let standing = ["cwd", "root", "exe"];
    if standing.iter().any(|link| inside(&process.join(link))) {
        return true;
    }
    let open = fs::read_dir(process.join("fd")).into_iter().flatten();
    open.flatten().any(|file| inside(&file.path()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn an_open_file_and_a_working_directory_are_found() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = directory.path().canonicalize().expect("it exists");
        assert_eq!(sentence(&at), None);

        let _open = fs::File::create(at.join("file")).expect("created");
        let ours = format!("(pid {})", std::process::id());
        assert!(sentence(&at).expect("held").contains(&ours));

        let mut child = Command::new("sleep")
            .arg("60")
            .current_dir(&at)
            .stdin(Stdio::null())
            .spawn()
            .expect("sleep runs");
        let names = of(&at);
        child.kill().expect("killed");
        child.wait().expect("reaped");
        let theirs = format!("sleep (pid {})", child.id());
        assert!(names.contains(&theirs), "{names:?}");
    }
}
