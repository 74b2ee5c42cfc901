//! Questions on the terminal whose answers are not shown.
//!
//! Read byte by byte with a poll, so that a signal ends the question and the echo always comes
//! back.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::error::{Attempt, Error, Kind, Result};
use crate::secret::Secret;

/// As long as cryptsetup takes interactively.
const ANSWER_MAX: usize = 512;

/// How often the wait looks for a signal.
const POLL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Whether there is somebody to ask: a controlling terminal, and one of our own ends on it.
pub fn has_terminal() -> bool {
    let on_one = std::io::stdin().is_terminal() || std::io::stderr().is_terminal();
    on_one && terminal().is_ok()
}

fn terminal() -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/tty")
}

/// Asks on the terminal, without echo. `signals` counts signals; one that comes ends the question
/// with [`Kind::Interrupted`].
pub fn ask_hidden(question: &str, signals: &AtomicUsize) -> Result<Secret> {
    let mut terminal = terminal().attempt(|| "open the terminal to ask for a passphrase")?;
    terminal
        .write_all(question.as_bytes())
        .attempt(|| "write to the terminal")?;
    let quiet = Quiet::begin(&terminal)?;
    let answer = read_line(&terminal, signals);
    drop(quiet);
    let _ = terminal.write_all(b"\n");
    answer
}

fn read_line(mut terminal: &File, signals: &AtomicUsize) -> Result<Secret> {
    let before = signals.load(Ordering::Relaxed);
    let mut answer = Secret::zeroed(ANSWER_MAX);
    let mut len = 0;
    loop {
        let mut ready = [PollFd::new(terminal, PollFlags::IN)];
        // A signal makes poll fail with EINTR; the count below decides.
        let count = poll(&mut ready, Some(&POLL)).unwrap_or(0);
        if signals.load(Ordering::Relaxed) > before {
            return Err(Error::new(Kind::Interrupted, "interrupted by a signal"));
        }
        if count == 0 {
            continue;
        }
        let mut byte = [0];
        let got = terminal
            .read(&mut byte)
            .attempt(|| "read from the terminal")?;
        if got == 0 || byte[0] == b'\n' {
            return Ok(Secret::new(answer.bytes()[..len].to_vec()));
        }
        if len == ANSWER_MAX {
            let why = format!("a passphrase typed at the terminal has at most {ANSWER_MAX} bytes");
            return Err(Error::new(Kind::Usage, why));
        }
        answer.bytes_mut()[len] = byte[0];
        len += 1;
    }
}

/// The terminal with its echo off, until dropped.
struct Quiet<'a> {
    terminal: &'a File,
    before: Termios,
}

impl<'a> Quiet<'a> {
    fn begin(terminal: &'a File) -> Result<Self> {
        let before = tcgetattr(terminal).attempt(|| "read the terminal's settings")?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        tcsetattr(terminal, OptionalActions::Flush, &quiet)
            .attempt(|| "turn off the terminal's echo")?;
        Ok(Quiet { terminal, before })
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal, OptionalActions::Flush, &self.before);
    }
}
