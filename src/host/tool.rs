//! Running another program to its end, with its output captured.
//!
//! A tool gets no terminal, speaks the C locale, never sees our own settings (`E2EBAK_*`, which
//! may hold a passphrase), and dies with the thread that runs it. Arguments are logged, so no
//! secret may ever be one.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use tracing::debug;

use super::spawn::{Fate, hide_settings, prepare};
use super::view::View;
use crate::error::{Attempt, Error, Kind, Result};

/// Looked at after `PATH`: cron and ordinary users have no sbin in theirs, and some have no `PATH`.
const SYSTEM_DIRECTORIES: [&str; 6] = [
    "/usr/sbin",
    "/sbin",
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/bin",
    "/bin",
];

/// The Debian package that brings each program that this crate runs.
const PACKAGES: &[(&str, &str)] = &[
    ("cat", "coreutils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("resize2fs", "e2fsprogs"),
    ("dumpe2fs", "e2fsprogs"),
    ("fuse2fs", "fuse2fs"),
    ("fusermount3", "fuse3"),
    ("mount", "mount"),
    ("umount", "mount"),
    ("losetup", "mount"),
    ("fstrim", "util-linux"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
    ("rsync", "rsync"),
    ("ssh", "openssh-client"),
    ("cryptsetup", "cryptsetup-bin"),
];

/// How many of the last lines on standard error an error repeats.
const ERROR_LINES: usize = 6;

/// A program with its arguments, ready to run.
#[derive(Clone, Debug)]
pub struct Tool {
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    accepted: Vec<i32>,
    fate: Fate,
    view: View,
}

/// What a tool left behind.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Tool {
    /// `program` is a name to search for, or a path if it holds a slash.
    pub fn new(program: impl Into<OsString>) -> Self {
        Tool {
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            accepted: vec![0],
            fate: Fate {
                die_with_parent: true,
                ..Fate::default()
            },
            view: View::Own,
        }
    }

    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    pub fn args<S: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Exit codes that [`Tool::run`] takes for success; 0 alone unless told.
    pub fn accept(mut self, codes: &[i32]) -> Self {
        self.accepted = codes.to_vec();
        self
    }

    /// A Ctrl-C shall not stop it half way: for steps that undo others.
    pub fn deaf(mut self) -> Self {
        self.fate.deaf_to_signals = true;
        self
    }

    /// It shall not die with the thread that starts it, but end on its own terms.
    pub fn outlive(mut self) -> Self {
        self.fate.die_with_parent = false;
        self
    }

    /// It shall run in another mount namespace, in its root directory.
    pub fn inside(mut self, view: View) -> Self {
        self.view = view;
        self
    }

    /// The command as it would be run, with standard input from `/dev/null`; for callers that
    /// follow the output while it comes.
    ///
    /// # Errors
    /// [`Kind::MissingTool`], with the package that brings it, when the program is not found.
    pub fn command(&self) -> Result<Command> {
        let path = find(&self.program).ok_or_else(|| missing(&self.program))?;
        let mut command = self.begin(path)?;
        command.args(&self.arguments).stdin(Stdio::null());
        hide_settings(&mut command);
        command
            .env("LC_ALL", "C")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        prepare(&mut command, self.fate);
        debug!(argv = %self.argv(), "run");
        Ok(command)
    }

    /// nsenter(1) becomes the program that it starts. A child of ours that went inside by itself
    /// would for a moment hold our descriptors there.
    fn begin(&self, program: PathBuf) -> Result<Command> {
        let View::Of(pid) = self.view else {
            return Ok(Command::new(program));
        };
        let nsenter = OsStr::new("nsenter");
        let mut command = Command::new(find(nsenter).ok_or_else(|| missing(nsenter))?);
        command
            .arg(format!("--mount=/proc/{pid}/ns/mnt"))
            .arg(format!("--root=/proc/{pid}/root"))
            .arg(format!("--wd=/proc/{pid}/root"))
            .arg("--")
            .arg(program);
        Ok(command)
    }

    /// Runs it to its end, whatever that is.
    ///
    /// # Errors
    /// [`Kind::MissingTool`], or what the system said when it would not start.
    pub fn run_to_any_end(&self) -> Result<Output> {
        self.finish(self.command()?)
    }

    /// Runs it to a good end.
    ///
    /// # Errors
    /// [`Kind::MissingTool`]; [`Kind::Io`] with the exit status and the last lines of standard
    /// error when it ends with a code that is not accepted.
    pub fn run(&self) -> Result<Output> {
        self.judge(self.run_to_any_end()?)
    }

    /// As [`Tool::run`], with a file as standard input, which the tool may open again as
    /// `/proc/self/fd/0`.
    ///
    /// # Errors
    /// As [`Tool::run`].
    pub fn run_on(&self, input: OwnedFd) -> Result<Output> {
        let mut command = self.command()?;
        command.stdin(input);
        self.judge(self.finish(command)?)
    }

    fn finish(&self, mut command: Command) -> Result<Output> {
        let output = command
            .output()
            .attempt(|| format!("start {}", self.name()))?;
        Ok(Output {
            status: output.status,
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    fn judge(&self, output: Output) -> Result<Output> {
        match output.status.code() {
            Some(code) if self.accepted.contains(&code) => Ok(output),
            _ => Err(self.failed(&output)),
        }
    }

    /// The error for an end that was not good, of which no more is known.
    pub(super) fn ended(&self, status: ExitStatus) -> Error {
        Error::new(Kind::Io, format!("{} ended with {status}", self.name()))
    }

    /// The error for an end that was not good.
    pub fn failed(&self, output: &Output) -> Error {
        let error = self.ended(output.status);
        let said = last_lines(&output.stderr);
        debug!(argv = %self.argv(), status = %output.status, said, "failed");
        match said.is_empty() {
            true => error,
            false => error.because(said),
        }
    }

    pub(super) fn name(&self) -> String {
        let name = Path::new(&self.program).file_name();
        name.unwrap_or(&self.program).to_string_lossy().into_owned()
    }

    fn argv(&self) -> String {
        let words = std::iter::once(&self.program).chain(&self.arguments);
        shell_words::join(words.map(|word| word.to_string_lossy()))
    }
}

impl Output {
    /// Standard output as text, without white space around it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_string()
    }

    /// The exit code; `None` after a signal.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }
}

/// Fails with [`Kind::MissingTool`] when `program` is not installed.
pub fn require(program: &str) -> Result<()> {
    find(program)
        .map(drop)
        .ok_or_else(|| missing(OsStr::new(program)))
}

/// Where `program` is, in `PATH` or the system's own directories.
pub fn find(program: impl AsRef<OsStr>) -> Option<PathBuf> {
    let program = Path::new(program.as_ref());
    if program.as_os_str().as_bytes().contains(&b'/') {
        return runs(program).then(|| program.to_path_buf());
    }
    find_in(&std::env::var_os("PATH").unwrap_or_default(), program)
}

fn find_in(path: &OsStr, program: &Path) -> Option<PathBuf> {
    std::env::split_paths(path)
        // An empty entry would mean the current directory, which a backup must not run from.
        .filter(|directory| directory.is_absolute())
        .chain(SYSTEM_DIRECTORIES.iter().map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| runs(candidate))
}

fn runs(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
}

fn missing(program: &OsStr) -> Error {
    let name = program.to_string_lossy();
    let error = Error::new(Kind::MissingTool, format!("{name} is not installed"));
    match PACKAGES.iter().find(|(known, _)| *known == name) {
        Some((_, package)) => error.hint(format!(
            "on Debian and Ubuntu it is in the package {package}"
        )),
        None => error,
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let lines: Vec<&str> = lines.into_iter().filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(ERROR_LINES)..].join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Tool {
        Tool::new("sh").args(["-c", script])
    }

    #[test]
    fn a_missing_program_names_its_package() {
        let error = missing(OsStr::new("fuse2fs"));
        assert_eq!(error.kind(), Kind::MissingTool);
        assert!(error.report().contains("package fuse2fs"));
        let error = Tool::new("no-such-program").run().unwrap_err();
        assert_eq!(error.kind(), Kind::MissingTool);
    }

    #[test]
    fn a_failure_says_status_and_last_words() {
        let error = shell("seq 1 9 >&2; exit 3").run().unwrap_err();
        let report = error.report();
        assert!(report.contains("sh ended with exit status: 3"), "{report}");
        assert!(report.contains("because: 4; 5; 6; 7; 8; 9"), "{report}");
        assert_eq!(shell("exit 3").accept(&[3]).run().unwrap().code(), Some(3));
        assert!(shell("kill -9 $$").run().is_err());
    }

    #[test]
    fn a_tool_sees_no_terminal_no_locale_and_none_of_our_settings() {
        // SAFETY: nextest runs each test in a process of its own, with one thread so far.
        unsafe { std::env::set_var("E2EBAK_PASSPHRASE", "hunter2") };
        let output = shell("cat; echo $LC_ALL; env").run().unwrap();
        assert!(output.text().starts_with("C\n"), "{}", output.text());
        assert!(!output.text().contains("hunter2"));
    }

    #[test]
    fn sbin_is_searched_though_path_lacks_it_and_the_current_directory_never() {
        let find = |program| find_in(OsStr::new(":.:/usr/bin:/bin"), Path::new(program));
        assert!(find("sh").is_some() && find("losetup").is_some());
        assert!(
            find_in(OsStr::new(""), Path::new("sh")).is_some(),
            "no PATH"
        );
        let here = tempfile::tempdir_in(".").expect("a directory");
        let script = here.path().join("script");
        std::fs::write(&script, "").expect("written");
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).expect("allowed");
        assert!(runs(&script));
        let relative = Path::new(here.path().file_name().expect("a name")).join("script");
        assert!(find_in(OsStr::new(":."), &relative).is_none());
    }
}
