//! A child process whose standard input and output speak SFTP: `ssh`, or whatever the user names.
//!
//! Input and output are one socket pair each: OpenSSH moves 1.2 to 1.6 times as much through a
//! socket as through a pipe. Two threads belong to a child. The *keeper* starts it, waits for it
//! and reaps it; it lives exactly as long as the child, as `PR_SET_PDEATHSIG` demands, which looks
//! at the thread that started a child and not at the process. The *listener* reads standard error
//! to its end, which comes later where a descendant (a ControlPersist master) keeps it open; so
//! nobody waits for the listener for long.
//!
//! The child hears no signal of the terminal or the service manager: it ends when its input does,
//! or by SIGKILL. It dies with us, however we die.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions};
use tracing::{debug, info, warn};

use super::{Dial, Handle, Occasion, Stream};
use crate::error::{Attempt, Error, Kind, Result};
use crate::host::spawn::{Fate, prepare};

/// How long a child may take to leave once its input has ended; then it is killed. sftp-server
/// behind ssh needs one round trip.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// How long after SIGKILL the keeper is waited for. Only a child stuck in the kernel needs more,
/// and the keeper then waits on alone.
const KILL_TIME: Duration = Duration::from_secs(2);

/// How long a diagnosis waits for the child's end and its last words.
const WORDS_TIME: Duration = Duration::from_millis(500);

/// Lines of standard error that are kept (ssh needs 14 to say that a host key has changed), those
/// of them that are shown, and bytes of each.
const WORDS_KEPT: usize = 24;
const WORDS_SHOWN: usize = 4;
const LINE_MAX: u64 = 1000;

/// How a child ended and what it last said.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    /// `None` while it runs.
    pub status: Option<ExitStatus>,
    /// The last lines of its standard error, oldest first, without control characters.
    pub words: Vec<String>,
}

impl Ending {
    /// The status as a sentence about `program`, with its last words as the cause.
    pub fn error(&self, kind: Kind, program: &str) -> Error {
        let said = match self.status {
            None => format!("{program} is still running"),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("{program} ended with exit code {code}"),
                (None, Some(signal)) => format!("{program} was killed by signal {signal}"),
                (None, None) => format!("{program} ended"),
            },
        };
        let error = Error::new(kind, said);
        let shown = &self.words[self.words.len().saturating_sub(WORDS_SHOWN)..];
        match shown.is_empty() {
            true => error,
            false => error.because(shown.join("; ")),
        }
    }
}

/// Makes an error of an ending.
pub type Explain = Box<dyn Fn(&Ending) -> Error + Send + Sync>;

/// Dials by starting a command: `--ssh-command`.
#[derive(Clone, Debug)]
pub struct CommandDial {
    argv: Vec<OsString>,
}

impl CommandDial {
    /// `None` when there is no word at all.
    pub fn new(argv: impl IntoIterator<Item = impl Into<OsString>>) -> Option<Self> {
        let argv: Vec<OsString> = argv.into_iter().map(Into::into).collect();
        (!argv.is_empty()).then_some(CommandDial { argv })
    }

    /// Splits a command line into words as a shell does; nothing in it is expanded.
    pub fn from_line(line: &str) -> Result<Self> {
        let words = shell_words::split(line)
            .map_err(|e| Error::new(Kind::Usage, format!("`{line}` is no command: {e}")))?;
        CommandDial::new(words).ok_or_else(|| Error::new(Kind::Usage, "the command is empty"))
    }
}

impl Dial for CommandDial {
    fn dial(&self, _: Occasion) -> Result<Stream> {
        let explain =
            |ending: &Ending| ending.error(Kind::Disconnected, "the command that carries SFTP");
        start(&self.argv, Box::new(explain))
    }
}

/// Starts `argv[0]` with the other words as its arguments.
///
/// [`Kind::MissingTool`] when there is no such program.
pub fn start(argv: &[OsString], explain: Explain) -> Result<Stream> {
    let program = argv.first().map(OsString::as_os_str).unwrap_or_default();
    start_child(argv, explain).attempt(|| format!("start {}", program.display()))
}

fn start_child(argv: &[OsString], explain: Explain) -> Result<Stream> {
    let (program, arguments) = argv
        .split_first()
        .ok_or_else(|| Error::new(Kind::Usage, "the command is empty"))?;
    let (input, child_input) = UnixStream::pair()?;
    let (output, child_output) = UnixStream::pair()?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(OwnedFd::from(child_input))
        .stdout(OwnedFd::from(child_output))
        .stderr(Stdio::piped());
    prepare(
        &mut command,
        Fate {
            die_with_parent: true,
            deaf_to_signals: true,
            new_group: false, // in another group it could not ask on the terminal
        },
    );
    debug!(argv = ?argv, "start a link");

    let life = Arc::new(Life::default());
    let (started, starting) = mpsc::channel();
    let keeper = {
        let life = life.clone();
        let name = program.clone();
        move || keep(command, &name, &life, &started)
    };
    thread::Builder::new()
        .name("link-keeper".into())
        .spawn(keeper)?;
    match starting.recv() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(not_started(program, error)),
        Err(_) => return Err(Error::new(Kind::Io, "the thread that starts it ended")),
    }
    let handle = ChildHandle {
        life,
        ends: [input.try_clone()?, output.try_clone()?],
        explain,
    };
    Ok(Stream {
        reader: Box::new(output),
        writer: Box::new(input),
        handle: Arc::new(handle),
    })
}

fn not_started(program: &OsStr, error: io::Error) -> Error {
    let missing = error.kind() == io::ErrorKind::NotFound;
    let error = Error::from(error);
    match missing {
        true => Error::new(
            Kind::MissingTool,
            format!("{} is not installed", program.display()),
        )
        .because(error),
        false => error,
    }
}

/// What the threads of one child and its handle share.
#[derive(Default)]
struct Life {
    state: Mutex<LifeState>,
    changed: Condvar,
}

#[derive(Default)]
struct LifeState {
    /// Taken out when it has been reaped; its pid means nothing after that.
    child: Option<Child>,
    status: Option<ExitStatus>,
    words: VecDeque<String>,
    said_all: bool,
}

impl Life {
    fn lock(&self) -> MutexGuard<'_, LifeState> {
        // No code panics with the lock held; if it did, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, at most `time`. Gives the state, done or not.
    fn wait(&self, time: Duration, done: impl Fn(&LifeState) -> bool) -> MutexGuard<'_, LifeState> {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), time, |state| !done(state));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// The keeper: starts the child, tells whether that worked, waits for its end and reaps it.
fn keep(
    mut command: Command,
    program: &OsStr,
    life: &Arc<Life>,
    started: &mpsc::Sender<io::Result<()>>,
) {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let _ = started.send(Err(error)); // it waits for this
            return;
        }
    };
    // The child's ends of the sockets: while we hold them too, no end of file would come.
    drop(command);
    let pid = Pid::from_child(&child);
    let stderr = child.stderr.take();
    life.lock().child = Some(child);
    let _ = started.send(Ok(()));

    match stderr.map(|stderr| listen(stderr, program, life)) {
        Some(Ok(())) => {}
        _ => life.lock().said_all = true,
    }

    // Without reaping: until `child` is taken out, others may send it a signal by its pid.
    let ended = loop {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        match rustix::process::waitid(WaitId::Pid(pid), options) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other,
        }
    };
    if let Err(error) = ended {
        warn!(%error, "cannot wait for the link's process");
    }
    let mut state = life.lock();
    state.status = state.child.take().and_then(|mut child| child.wait().ok());
    debug!(status = ?state.status, "the link's process has ended");
    life.changed.notify_all();
}

/// Starts the listener.
fn listen(stderr: ChildStderr, program: &OsStr, life: &Arc<Life>) -> io::Result<()> {
    let program = program.display().to_string();
    let life = life.clone();
    let listener = move || {
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        // A line longer than the bound goes on as the next one.
        while let Ok(1..) = reader.by_ref().take(LINE_MAX).read_until(b'\n', &mut line) {
            let words = printable(&line);
            if !words.is_empty() {
                info!(program, "{words}");
                let mut state = life.lock();
                state.words.push_back(words);
                if state.words.len() > WORDS_KEPT {
                    state.words.pop_front();
                }
            }
            line.clear();
        }
        life.lock().said_all = true;
        life.changed.notify_all();
    };
    thread::Builder::new()
        .name("link-listener".into())
        .spawn(listener)
        .map(drop)
}

/// What a person may see of a line: the server's banner is in it, which must not steer a terminal.
fn printable(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let shown = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    shown.collect::<String>().trim().to_string()
}

struct ChildHandle {
    life: Arc<Life>,
    ends: [UnixStream; 2],
    explain: Explain,
}

impl Handle for ChildHandle {
    fn close(&self) {
        for end in &self.ends {
            let _ = end.shutdown(Shutdown::Both); // it may have been shut down before
        }
        let reaped = |state: &LifeState| state.child.is_none();
        let mut state = self.life.wait(LEAVE_TIME, reaped);
        if let Some(child) = &mut state.child {
            debug!(pid = child.id(), "kill the link's process");
            if let Err(error) = child.kill() {
                warn!(%error, pid = child.id(), "cannot kill the link's process");
            }
        }
        drop(state);
        if self.life.wait(KILL_TIME, reaped).child.is_some() {
            warn!("the link's process does not end");
        }
    }

    fn diagnosis(&self) -> Option<Error> {
        let until = Instant::now() + WORDS_TIME;
        drop(self.life.wait(WORDS_TIME, |s| s.child.is_none()));
        let left = until.saturating_duration_since(Instant::now());
        let state = self.life.wait(left, |s| s.said_all);
        let ending = Ending {
            status: state.status,
            words: state.words.iter().cloned().collect(),
        };
        drop(state);
        let silent = ending.status.is_none() && ending.words.is_empty();
        (!silent).then(|| (self.explain)(&ending))
    }
}

impl Drop for ChildHandle {
    fn drop(&mut self) {
        self.close();
    }
}
