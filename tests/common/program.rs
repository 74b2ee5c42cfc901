//! Runs the program in an environment that holds nothing but what a test puts there.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::sandbox::kill;
use super::{Sandbox, private_shell, wait_for};

pub const PASSPHRASE: &str = "correct horse battery staple";

/// A run that takes longer has hung: the slowest, 1 GiB through a debug build, takes a fifth of it.
const RUN_BOUND: Duration = Duration::from_secs(300);

pub struct Program<'a> {
    sandbox: &'a Sandbox,
    file: PathBuf,
    wrapper: Vec<OsString>,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    cwd: PathBuf,
}

/// A run that has ended.
pub struct Ran {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
    line: String,
}

impl<'a> Program<'a> {
    /// The program with the test's passphrase and a verb; in the environment are the directories
    /// of the sandbox and the system's PATH.
    pub fn new(sandbox: &'a Sandbox, verb: &str) -> Self {
        let keyless = Program::bare(sandbox).arg(verb);
        keyless.env("E2EBAK_PASSPHRASE", PASSPHRASE)
    }

    /// The program with no verb and no passphrase.
    pub fn bare(sandbox: &'a Sandbox) -> Self {
        let program = Program {
            sandbox,
            file: Program::binary(),
            wrapper: Vec::new(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: sandbox.root().into(),
        };
        program
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", sandbox.path("home"))
            .env("XDG_RUNTIME_DIR", sandbox.path("run"))
            .env("TMPDIR", sandbox.path("tmp"))
            .env("LC_ALL", "C.UTF-8")
            .env("RUST_BACKTRACE", "1")
    }

    pub fn binary() -> PathBuf {
        env!("CARGO_BIN_EXE_e2ebak").into()
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().into());
        self
    }

    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().into()));
        self
    }

    /// Sets a variable, also one that was set before.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self = self.env_remove(&name);
        self.env.push((name.as_ref().into(), value.as_ref().into()));
        self
    }

    pub fn env_remove(mut self, name: impl AsRef<OsStr>) -> Self {
        self.env.retain(|(n, _)| n != name.as_ref());
        self
    }

    pub fn cwd(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = dir.into();
        self
    }

    /// Runs the program by way of another one: `setpriv`, `unshare`, `sh -c`. Called twice, the
    /// first is the outer one.
    pub fn through<S: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        let words = words.into_iter().map(|word| word.as_ref().into());
        self.wrapper.extend(words);
        self
    }

    /// Runs it as an ordinary user to whom [`Sandbox::open_to`] has opened the sandbox.
    pub fn by_user(mut self, uid: u32) -> Self {
        self.file = self.sandbox.path("e2ebak");
        let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={uid}"));
        self.through(["/usr/bin/setpriv", &uid, &gid, "--clear-groups"])
    }

    /// Runs the program in a mount namespace of its own, after a script that sees `args` as `$1`
    /// and so on. What the script mounts is gone when the program ends.
    pub fn after(self, script: &str, args: &[&Path]) -> Self {
        let script = format!("{script}\nshift {}\nexec \"$@\"", args.len());
        let shell = private_shell(&script);
        let mut words = vec![shell.get_program().to_owned()];
        words.extend(shell.get_args().map(OsStr::to_owned));
        words.push("sh".into());
        words.extend(args.iter().map(|arg| arg.as_os_str().to_owned()));
        self.through(words)
    }

    pub fn spawn(self) -> Running {
        let mut words = self.wrapper;
        words.push(self.file.into());
        words.extend(self.args);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env_clear().envs(self.env);
        command.current_dir(self.cwd).stdin(Stdio::null());
        // So that a test can do what Ctrl-C does: signal all of it at once.
        command.process_group(0);
        // Into files: a daemon that keeps the descriptors would keep a pipe open for ever.
        let capture = |kind: &str| -> (File, PathBuf) {
            let file = tempfile::Builder::new().prefix(kind).tempfile_in(
                self.sandbox.path("tmp"), // its name must outlive the handle
            );
            let (file, path) = file.expect("a file").keep().expect("a kept file");
            (file, path)
        };
        let (stdout, stdout_path) = capture("stdout");
        let (stderr, stderr_path) = capture("stderr");
        command.stdout(stdout).stderr(stderr);
        let line = format!("{command:?}");
        let child = command.spawn().unwrap_or_else(|e| panic!("{line}: {e}"));
        Running {
            child,
            line,
            since: Instant::now(),
            stdout: stdout_path,
            stderr: stderr_path,
            over: false,
        }
    }

    pub fn run(self) -> Ran {
        self.spawn().wait()
    }

    /// Runs and expects exit code 0.
    pub fn ok(self) -> Ran {
        self.run().code(0)
    }
}

/// A run under way. Dropped, it is killed.
pub struct Running {
    child: Child,
    line: String,
    since: Instant,
    stdout: PathBuf,
    stderr: PathBuf,
    over: bool,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its standard error goes while it runs.
    pub fn stderr_path(&self) -> PathBuf {
        self.stderr.clone()
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal);
    }

    /// As Ctrl-C in a terminal: the program and every child in its process group.
    pub fn signal_group(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let _ = kill_process_group(pid.expect("a pid"), signal);
    }

    pub fn is_over(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_some()
    }

    /// Waits until it says that it has mounted.
    pub fn until_mounted(&self) {
        wait_for("the mount", Duration::from_secs(30), || {
            fs::read_to_string(&self.stdout).is_ok_and(|told| told.starts_with("mounted"))
        });
    }

    /// Waits until standard error has this in it.
    pub fn until_says(&self, text: &str) {
        wait_for(text, Duration::from_secs(60), || {
            fs::read_to_string(&self.stderr).is_ok_and(|told| told.contains(text))
        });
    }

    /// Waits for the end. A run beyond all bounds is asked to stop, then killed, and the test fails.
    pub fn wait(mut self) -> Ran {
        let mut hung = false;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            if self.since.elapsed() > RUN_BOUND && !hung {
                hung = true;
                self.signal(Signal::TERM);
            }
            if self.since.elapsed() > RUN_BOUND + Duration::from_secs(20) {
                self.signal(Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        self.over = true;
        let read = |path: &PathBuf| -> String {
            let mut bytes = Vec::new();
            let file = File::open(path);
            file.and_then(|mut file| file.read_to_end(&mut bytes))
                .expect("the captured output");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let ran = Ran {
            status,
            stdout: read(&self.stdout),
            stderr: read(&self.stderr),
            took: self.since.elapsed(),
            line: self.line.clone(),
        };
        let _ = fs::remove_file(&self.stdout);
        let _ = fs::remove_file(&self.stderr);
        assert!(!hung, "hung for {RUN_BOUND:?}: {ran}");
        let panicked = ran.stderr.contains("panicked at") || ran.stdout.contains("panicked at");
        assert!(!panicked, "{ran}");
        ran
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.over {
            self.signal(Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

impl Ran {
    /// Expects this exit code.
    pub fn code(self, code: i32) -> Self {
        assert!(self.status.code() == Some(code), "not exit {code}: {self}");
        self
    }

    /// Expects one of these exit codes.
    pub fn code_of(self, codes: &[i32]) -> Self {
        let code = self.status.code();
        let expected = code.is_some_and(|code| codes.contains(&code));
        assert!(expected, "not one of exit {codes:?}: {self}");
        self
    }

    /// Expects an error message with this in it, whatever the case.
    pub fn says(self, text: &str) -> Self {
        let found = self.stderr.to_lowercase().contains(&text.to_lowercase());
        assert!(found, "standard error does not say `{text}`: {self}");
        self
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self}"))
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n{}", self.line, self.status)?;
        if let Some(signal) = self.status.signal() {
            write!(f, " (signal {signal})")?;
        }
        writeln!(f, " after {:?}", self.took)?;
        write!(
            f,
            "--- stdout\n{}\n--- stderr\n{}",
            self.stdout, self.stderr
        )
    }
}
