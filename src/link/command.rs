//! A child process whose standard input and output speak SFTP: `ssh`, or whatever the user names.
//!
//! Input and output are one socket pair each: OpenSSH moves 1.2 to 1.6 times as much through a
//! socket as through a pipe.

use std::ffi::OsString;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::child::{Ending, Gate, Group, Process};
use super::{Dial, Handle, Occasion, Stream};
use crate::error::{Attempt, Error, Kind, Result};

/// How long a child may take to leave once its input has ended; then it is killed. sftp-server
/// behind ssh needs one round trip.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// How long a diagnosis waits for the child's end and its last words.
const WORDS_TIME: Duration = Duration::from_millis(500);

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
    let begin = |ends: Ends| Process::start(ends.command(argv)?);
    stream(begin, explain).attempt(|| format!("start {}", program.display()))
}

/// Returns at once, and starts what `make` gives when it gives it. Closing the stream meanwhile
/// tells `make` so; where it fails, the stream ends and its diagnosis is that error.
pub fn start_when(
    make: impl FnOnce(&Gate<'_>) -> Result<(Vec<OsString>, Group)> + Send + 'static,
    explain: Explain,
) -> Result<Stream> {
    let begin = |ends: Ends| {
        Process::start_when(move |gate| {
            let (argv, group) = make(gate)?;
            Ok((ends.command(&argv)?, group))
        })
    };
    stream(begin, explain)
}

/// The child's ends of its input and output.
struct Ends([UnixStream; 2]);

impl Ends {
    fn command(self, argv: &[OsString]) -> Result<Command> {
        let (program, arguments) = argv
            .split_first()
            .ok_or_else(|| Error::new(Kind::Usage, "the command is empty"))?;
        let mut command = Command::new(program);
        let [input, output] = self.0;
        command
            .args(arguments)
            .stdin(OwnedFd::from(input))
            .stdout(OwnedFd::from(output));
        Ok(command)
    }
}

fn stream(begin: impl FnOnce(Ends) -> Result<Process>, explain: Explain) -> Result<Stream> {
    let (input, child_input) = UnixStream::pair()?;
    let (output, child_output) = UnixStream::pair()?;
    let ends = [input.try_clone()?, output.try_clone()?];
    let process = begin(Ends([child_input, child_output]))?;
    let answered = Arc::new(AtomicBool::new(false));
    Ok(Stream {
        reader: Box::new(Output {
            output,
            answered: answered.clone(),
        }),
        writer: Box::new(input),
        handle: Arc::new(ChildHandle {
            process,
            ends,
            answered,
            explain,
        }),
    })
}

/// Notes whether anything has come.
struct Output {
    output: UnixStream,
    answered: Arc<AtomicBool>,
}

impl Read for Output {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.output.read(buf)?;
        if len > 0 {
            self.answered.store(true, Ordering::Relaxed);
        }
        Ok(len)
    }
}

struct ChildHandle {
    process: Process,
    ends: [UnixStream; 2],
    answered: Arc<AtomicBool>,
    explain: Explain,
}

impl Handle for ChildHandle {
    fn close(&self) {
        for end in &self.ends {
            let _ = end.shutdown(Shutdown::Both); // it may have been shut down before
        }
        self.process.end(LEAVE_TIME);
    }

    fn diagnosis(&self) -> Option<Error> {
        let mut ending = self.process.ending(WORDS_TIME);
        ending.answered = self.answered.load(Ordering::Relaxed);
        if let Some(failure) = self.process.failure() {
            return Some(failure);
        }
        let silent = ending.status.is_none() && ending.words.is_empty();
        (!silent).then(|| (self.explain)(&ending))
    }
}

impl Drop for ChildHandle {
    fn drop(&mut self) {
        self.close();
    }
}
