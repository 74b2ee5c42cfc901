//! A connection that logs in once and then carries every stream: `ssh -N` with a control socket.
//!
//! Starting -> Ready (its socket is there) -> Ended. It is nobody's stream, so no stream ends
//! another by ending: a stream is one channel, held by a small ssh of its own that hands its
//! input and output to the master. The master ends when the last stream and the dial are gone.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::child::{Ending, Gate, Process};
use super::socket_dir::SocketDir;
use crate::error::{Error, Kind, Result};

/// How often it is looked whether the socket is there: often at first, since a login takes tens of
/// milliseconds on a fast link.
const LOOK: Duration = Duration::from_millis(4);
const LOOK_SELDOM: Duration = Duration::from_millis(50);
const SOON: Duration = Duration::from_secs(2);

/// How long the end of a stream and the end of its master may lie apart.
const TOGETHER: Duration = Duration::from_millis(200);

/// How long its last words may take after that.
const WORDS_TIME: Duration = Duration::from_millis(200);

/// What ssh says when it cannot be a master, or goes on without being one.
const CANNOT: [&str; 5] = [
    "disabling multiplexing",
    "muxserver_listen",
    "unix_listener",
    "too long for Unix domain socket",
    "configuration option: control",
];

pub struct Master {
    process: Process,
    dir: SocketDir,
    born: Instant,
    /// How long it may take to log in.
    patience: Duration,
}

/// How the wait for a master ended.
pub enum Start {
    Ready,
    /// This ssh connects, or may connect, but not as a master.
    Unable,
    /// It could not connect or log in.
    Failed(Ending),
}

impl Master {
    /// Starts one whose command line is made by `argv` for a socket.
    pub fn start(patience: Duration, argv: impl FnOnce(&Path) -> Vec<OsString>) -> Result<Self> {
        let dir = SocketDir::new()?;
        let argv = argv(&dir.socket());
        let (program, arguments) = argv
            .split_first()
            .ok_or_else(|| Error::new(Kind::Usage, "the command is empty"))?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Ok(Master {
            process: Process::start(command)?,
            dir,
            born: Instant::now(),
            patience,
        })
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.socket()
    }

    /// Whether streams may be opened or waited for. One that has not logged in within its time has
    /// no use any more.
    pub fn is_of_use(&self) -> bool {
        let stuck = self.born.elapsed() > self.patience && !self.socket().exists();
        !stuck && !self.process.has_ended()
    }

    /// Waits until it has logged in.
    ///
    /// [`Kind::Disconnected`] when the stream that waits is closed.
    pub fn wait(&self, gate: &Gate<'_>) -> Result<Start> {
        loop {
            if self.process.has_ended() {
                let ending = self.process.ending(WORDS_TIME);
                let unable = CANNOT.iter().any(|mark| ending.says(mark));
                return Ok(match unable {
                    true => Start::Unable,
                    false => Start::Failed(ending),
                });
            }
            if self.socket().exists() {
                return Ok(Start::Ready);
            }
            if CANNOT
                .iter()
                .any(|mark| self.process.ending_now().says(mark))
            {
                return Ok(Start::Unable);
            }
            if self.born.elapsed() > self.patience {
                self.end();
                continue;
            }
            let look = match self.born.elapsed() < SOON {
                true => LOOK,
                false => LOOK_SELDOM,
            };
            if gate.closes_within(look) {
                return Err(Error::new(Kind::Disconnected, "the stream was closed"));
            }
        }
    }

    /// Ends it, and with it every stream through it.
    pub fn end(&self) {
        self.process.end(Duration::ZERO);
    }

    /// How it ended, if it did, asked when a stream of it has ended.
    pub fn ending(&self) -> Option<Ending> {
        let ended = self.process.wait_for_end(TOGETHER);
        ended.then(|| self.process.ending(WORDS_TIME))
    }
}

impl Drop for Master {
    fn drop(&mut self) {
        // Every stream has ended: there is nothing to wait for.
        self.end();
    }
}
