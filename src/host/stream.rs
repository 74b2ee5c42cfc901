//! Following a program's output line by line while it runs.

use std::io::Read;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::tool::Tool;
use crate::error::{Attempt, Result};
use crate::secret::Secret;

/// How often a silent program is looked after.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A program that was asked to end has this long before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer lines are cut: no name and no message comes near it.
const LINE_MAX: usize = 64 << 10;
/// As long as a key file may be.
const SECRET_MAX: u64 = 8 << 20;

enum Line {
    Out(String),
    Err(String),
}

impl Tool {
    /// Runs it to its end. Hands over each line of standard output and standard error as it comes
    /// (a carriage return ends a line too), and calls `look` when nothing comes for a while.
    /// `stop` ends it with SIGTERM, then SIGKILL.
    ///
    /// # Errors
    /// [`Kind::MissingTool`](crate::error::Kind::MissingTool), or what the system said when it
    /// would not start; not how it ended.
    pub fn stream(
        &self,
        out: &dyn Fn(&str),
        err: &dyn Fn(&str),
        look: &dyn Fn(),
        stop: &AtomicBool,
    ) -> Result<ExitStatus> {
        let mut command = self.command()?;
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .attempt(|| format!("start {}", self.name()))?;
        let (sender, lines) = channel();
        let err_sender = sender.clone();
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        thread::scope(|scope| {
            scope.spawn(move || split(stdout, |line| sender.send(Line::Out(line)).is_ok()));
            scope.spawn(move || split(stderr, |line| err_sender.send(Line::Err(line)).is_ok()));
            let mut asked_to_end = None;
            loop {
                match lines.recv_timeout(LOOK_EVERY) {
                    Ok(Line::Out(line)) => out(&line),
                    Ok(Line::Err(line)) => err(&line),
                    Err(RecvTimeoutError::Timeout) => look(),
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                if stop.load(Ordering::Relaxed) {
                    asked_to_end = end(&mut child, asked_to_end);
                }
            }
        });
        child.wait().attempt(|| format!("wait for {}", self.name()))
    }

    /// Runs it with the terminal, if there is one, and takes its output for a secret.
    ///
    /// # Errors
    /// As [`Tool::run`]; standard error is the user's to see and is not repeated.
    pub fn secret_output(&self) -> Result<Secret> {
        let mut command = self.command()?;
        command
            .stdin(Stdio::inherit())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = command
            .spawn()
            .attempt(|| format!("start {}", self.name()))?;
        let read = child
            .stdout
            .take()
            .map_or(Ok(Secret::zeroed(0)), |out| Secret::read(out, SECRET_MAX));
        let status = child
            .wait()
            .attempt(|| format!("wait for {}", self.name()))?;
        match status.success() {
            true => read.attempt(|| format!("read what {} printed", self.name())),
            false => Err(self.ended(status)),
        }
    }
}

/// Asks once, then insists.
fn end(child: &mut Child, asked: Option<Instant>) -> Option<Instant> {
    match asked {
        None => {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            // It may have ended by itself meanwhile.
            let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
            Some(Instant::now())
        }
        Some(since) if since.elapsed() > END_TIMEOUT => {
            let _ = child.kill();
            Some(since)
        }
        waiting => waiting,
    }
}

/// Cuts a stream into lines; `take` says whether anybody still wants them.
fn split(stream: Option<impl Read>, mut take: impl FnMut(String) -> bool) {
    let Some(mut stream) = stream else { return };
    let mut chunk = vec![0; 16 << 10];
    let mut line = Vec::new();
    loop {
        let got = match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        for &byte in &chunk[..got] {
            if byte != b'\n' && byte != b'\r' {
                if line.len() < LINE_MAX {
                    line.push(byte);
                }
            } else if !line.is_empty() {
                if !take(String::from_utf8_lossy(&line).into_owned()) {
                    return;
                }
                line.clear();
            }
        }
    }
    if !line.is_empty() {
        take(String::from_utf8_lossy(&line).into_owned());
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn shell(script: &str) -> Tool {
        Tool::new("sh").args(["-c", script])
    }

    #[test]
    fn lines_come_from_both_streams() {
        let (out, err) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let status = shell("printf 'a\\rb\\n\\nc'; echo d >&2; exit 24")
            .stream(
                &|line| out.borrow_mut().push(line.to_string()),
                &|line| err.borrow_mut().push(line.to_string()),
                &|| {},
                &AtomicBool::new(false),
            )
            .expect("runs");
        assert_eq!(status.code(), Some(24));
        assert_eq!(*out.borrow(), ["a", "b", "c"]);
        assert_eq!(*err.borrow(), ["d"]);
    }

    #[test]
    fn a_request_to_stop_ends_it() {
        let looks = RefCell::new(0);
        let stop = AtomicBool::new(false);
        let look = || {
            *looks.borrow_mut() += 1;
            stop.store(true, Ordering::Relaxed);
        };
        let status = shell("exec sleep 60")
            .stream(&|_| {}, &|_| {}, &look, &stop)
            .expect("runs");
        assert_eq!(status.code(), None);
        assert!(*looks.borrow() >= 1);
    }

    #[test]
    fn a_secret_is_taken_whole_or_not_at_all() {
        let secret = shell("printf 'a b\\n'").secret_output().expect("a secret");
        assert_eq!(secret.bytes(), b"a b\n");
        assert!(shell("echo x; exit 1").secret_output().is_err());
    }
}
