//! A child process of a link: started, listened to, ended and reaped.
//!
//! Two threads belong to it. The *keeper* starts it, waits for it and reaps it; it lives exactly as
//! long as the child, as `PR_SET_PDEATHSIG` demands, which looks at the thread that started a child
//! and not at the process. The *listener* reads standard error to its end, which comes later where
//! a descendant (a ControlPersist master) keeps it open; so nobody waits for the listener for long.
//!
//! The child hears no signal of the terminal or the service manager: it ends when its input does,
//! or by SIGKILL. It dies with us, however we die.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions};
use tracing::{debug, info, warn};

use crate::error::{Error, Kind, Result, Told};
use crate::host::spawn::{Fate, hide_settings, prepare};

/// How long after SIGKILL the keeper is waited for. Only a child stuck in the kernel needs more,
/// and the keeper then waits on alone.
const KILL_TIME: Duration = Duration::from_secs(2);

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
    /// Whether its standard output has given a byte.
    pub answered: bool,
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

    /// Whether one of the last lines contains `mark`.
    pub fn says(&self, mark: &str) -> bool {
        self.words.iter().any(|line| line.contains(mark))
    }
}

/// The process group of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Ours: it can ask on the terminal, and hears Ctrl-C if it wants to.
    Ours,
    /// One of its own, for a program that would end at Ctrl-C whatever it was told.
    Own,
}

/// A child that runs, will run, or has ended.
#[derive(Clone)]
pub struct Process {
    life: Arc<Life>,
}

impl Process {
    /// Starts it, with its standard error for us to read.
    ///
    /// [`Kind::MissingTool`] when there is no such program.
    pub fn start(command: Command) -> Result<Self> {
        let (process, started) = Process::begin(move |_| Ok((command, Group::Ours)))?;
        let gone = |_| Error::new(Kind::Io, "the thread that starts it ended");
        started.recv().map_err(gone)??;
        Ok(process)
    }

    /// Starts it later: `make` may wait for what must be there before it. Where that fails, no
    /// child runs, and [`Process::failure`] tells why.
    pub fn start_when(
        make: impl FnOnce(&Gate<'_>) -> Result<(Command, Group)> + Send + 'static,
    ) -> Result<Self> {
        Process::begin(make).map(|(process, _)| process)
    }

    fn begin(
        make: impl FnOnce(&Gate<'_>) -> Result<(Command, Group)> + Send + 'static,
    ) -> Result<(Self, mpsc::Receiver<Result<()>>)> {
        let life = Arc::new(Life::default());
        let (tell, started) = mpsc::channel();
        let process = Process { life: life.clone() };
        thread::Builder::new()
            .name("link-keeper".into())
            .spawn(move || keep(make, &life, &tell))?;
        Ok((process, started))
    }

    pub fn has_ended(&self) -> bool {
        self.life.lock().over
    }

    /// Waits at most `time` for its end; false when it has not come.
    pub fn wait_for_end(&self, time: Duration) -> bool {
        self.life.wait(time, |state| state.over).over
    }

    /// Waits at most `leave` for it to end by itself, and kills it then. It is reaped either way.
    pub fn end(&self, leave: Duration) {
        self.life.lock().closing = true;
        self.life.changed.notify_all();
        let mut state = self.life.wait(leave, |state| state.over);
        state.kill();
        drop(state);
        if !self.wait_for_end(KILL_TIME) {
            warn!("the link's process does not end");
        }
    }

    /// Why it never ran.
    pub fn failure(&self) -> Option<Error> {
        self.life.lock().failure.clone().map(Error::from)
    }

    /// How it stands, after at most `time` for its end and its last words.
    pub fn ending(&self, time: Duration) -> Ending {
        let until = Instant::now() + time;
        drop(self.life.wait(time, |state| state.over));
        let left = until.saturating_duration_since(Instant::now());
        let state = self.life.wait(left, |state| state.said_all);
        state.ending()
    }

    /// How it stands now.
    pub fn ending_now(&self) -> Ending {
        self.life.lock().ending()
    }
}

/// For who prepares a child: somebody may not want it any more.
pub struct Gate<'a>(&'a Life);

impl Gate<'_> {
    /// Waits; true when the child is not wanted any more.
    pub fn closes_within(&self, time: Duration) -> bool {
        self.0.wait(time, |state| state.closing).closing
    }
}

/// What the threads of one child and its owners share.
#[derive(Default)]
struct Life {
    state: Mutex<LifeState>,
    changed: Condvar,
}

#[derive(Default)]
struct LifeState {
    /// Taken out when it has been reaped; its pid means nothing after that.
    child: Option<Child>,
    /// It has been reaped, or will never run.
    over: bool,
    /// It shall end.
    closing: bool,
    failure: Option<Told>,
    status: Option<ExitStatus>,
    words: VecDeque<String>,
    said_all: bool,
}

impl LifeState {
    fn kill(&mut self) {
        let Some(child) = &mut self.child else { return };
        debug!(pid = child.id(), "kill the link's process");
        if let Err(error) = child.kill() {
            warn!(%error, pid = child.id(), "cannot kill the link's process");
        }
    }

    fn ending(&self) -> Ending {
        Ending {
            status: self.status,
            words: self.words.iter().cloned().collect(),
            answered: false,
        }
    }
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

    fn never(&self, why: &Error) {
        let mut state = self.lock();
        state.failure = Some(Told::from(why));
        state.over = true;
        state.said_all = true;
        drop(state);
        self.changed.notify_all();
    }
}

/// The keeper: starts the child, tells whether that worked, waits for its end and reaps it.
fn keep(
    make: impl FnOnce(&Gate<'_>) -> Result<(Command, Group)>,
    life: &Arc<Life>,
    tell: &mpsc::Sender<Result<()>>,
) {
    let spawned = make(&Gate(life)).and_then(|(mut command, group)| {
        command.stderr(Stdio::piped());
        prepare(
            &mut command,
            Fate {
                die_with_parent: true,
                deaf_to_signals: true,
                new_group: group == Group::Own,
            },
        );
        debug!(?command, "start a process of the link");
        hide_settings(&mut command); // what the log shows is the command alone
        let program = command.get_program().to_owned();
        let child = command
            .spawn()
            .map_err(|error| not_started(&program, error));
        // With `command` go the child's ends of its streams: while we held them too, no end of
        // file would come.
        child.map(|child| (child, program))
    });
    let (mut child, program) = match spawned {
        Ok(spawned) => spawned,
        Err(error) => {
            life.never(&error);
            let _ = tell.send(Err(error)); // it may not have been waited for
            return;
        }
    };
    let pid = Pid::from_child(&child);
    let stderr = child.stderr.take();
    let mut state = life.lock();
    state.child = Some(child);
    drop(state);
    let _ = tell.send(Ok(()));

    match stderr.map(|stderr| listen(stderr, &program, life)) {
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
    state.over = true;
    debug!(status = ?state.status, "the link's process has ended");
    drop(state);
    life.changed.notify_all();
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
pub fn printable(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let shown = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    shown.collect::<String>().trim().to_string()
}
