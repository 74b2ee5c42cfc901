//! Printing to somebody who may have gone away, which is no reason to stop working.
//!
//! A standard output that takes nothing more, as a file on a full disk, is one to fail for: that is
//! remembered, and told at the end.

use std::fmt;
use std::io::{self, ErrorKind, StdoutLock, Write};
use std::sync::OnceLock;

use signal_hook::consts::SIGPIPE;
use signal_hook::low_level::emulate_default_handler;

use crate::error::{Error, Kind, Result};

/// A line on standard output.
macro_rules! say {
    ($($arg:tt)*) => {
        $crate::ui::say_line(format_args!($($arg)*))
    };
}

/// A line on standard error.
macro_rules! tell {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr().lock(), $($arg)*);
    }};
}

pub(crate) use {say, tell};

/// Why standard output has first failed.
static FAILED: OnceLock<io::Error> = OnceLock::new();

pub(crate) fn say_line(line: fmt::Arguments<'_>) {
    printed(writeln!(io::stdout().lock(), "{line}"));
}

/// Remembers that printing has failed, unless because nobody reads any more.
pub(crate) fn printed(outcome: io::Result<()>) {
    if let Err(error) = outcome
        && error.kind() != ErrorKind::BrokenPipe
    {
        let _ = FAILED.set(error); // the first one counts
    }
}

/// Writes out what is buffered.
///
/// # Errors
/// When any of what was said could not be written, now or before.
pub(crate) fn all_was_printed() -> Result<()> {
    printed(io::stdout().flush());
    match FAILED.get() {
        None => Ok(()),
        Some(error) => {
            let why = error.to_string();
            Err(Error::new(Kind::Io, "cannot write the output").because(why))
        }
    }
}

/// Standard output for content that is all the program was run for. When its reader has gone away
/// the program ends as cat(1) and tar(1) do: silently, by SIGPIPE.
pub(crate) struct ContentOutput(StdoutLock<'static>);

impl ContentOutput {
    pub fn new() -> Self {
        ContentOutput(io::stdout().lock())
    }
}

impl Write for ContentOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(or_end)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(or_end)
    }
}

/// The error, unless the program ends for it.
fn or_end(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::BrokenPipe {
        let _ = emulate_default_handler(SIGPIPE); // should it fail, the error is told
    }
    error
}
