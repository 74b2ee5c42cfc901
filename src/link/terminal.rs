//! The controlling terminal, for questions of a login.
//!
//! Read byte by byte with a poll, so that a stream that is closed ends the question and the echo
//! always comes back.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::error::{Attempt, Error, Kind, Result};
use crate::secret::Secret;

const TERMINAL: &str = "/dev/tty";

/// Longer than any password that sshd takes.
const ANSWER_MAX: usize = 1024;

const POLL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Whether somebody can be asked: there is a controlling terminal, wherever our input and output
/// go, and we are in its foreground. In the background we would be stopped there until somebody
/// noticed.
pub fn can_ask() -> bool {
    let ours = rustix::process::getpgrp();
    File::open(TERMINAL).is_ok_and(|tty| rustix::termios::tcgetpgrp(&tty) == Ok(ours))
}

/// Asks, with the answer hidden unless `echo`. [`Kind::Interrupted`] when `unwanted` becomes true.
pub fn ask(question: &str, echo: bool, unwanted: &dyn Fn() -> bool) -> Result<Secret> {
    let options = OpenOptions::new().read(true).write(true).open(TERMINAL);
    let mut terminal = options.attempt(|| "open the terminal to ask for a login")?;
    terminal
        .write_all(question.as_bytes())
        .attempt(|| "write to the terminal")?;
    let quiet = match echo {
        true => None,
        false => Some(Quiet::begin(&terminal)?),
    };
    let answer = read_line(&terminal, unwanted);
    if quiet.is_some() {
        drop(quiet);
        let _ = terminal.write_all(b"\n");
    }
    answer
}

fn read_line(mut terminal: &File, unwanted: &dyn Fn() -> bool) -> Result<Secret> {
    let mut answer = Secret::zeroed(ANSWER_MAX);
    let mut len = 0;
    loop {
        let mut ready = [PollFd::new(terminal, PollFlags::IN)];
        // A signal makes poll fail with EINTR, which is as good as no answer yet.
        let count = poll(&mut ready, Some(&POLL)).unwrap_or(0);
        if unwanted() {
            return Err(Error::new(Kind::Interrupted, "the question was taken back"));
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
            let why = format!("an answer has at most {ANSWER_MAX} bytes");
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
