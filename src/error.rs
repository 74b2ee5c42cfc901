//! One error type from floor 2 up: what was attempted, on what, why it failed, what to do.
//!
//! Decisions look at [`Kind`] only. Three total matches turn it into an errno, an exit code and
//! an answer to "may this be tried again".

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as anything decides on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// The command line or a setting makes no sense.
    Usage,
    /// There is no image at the location.
    NoImage,
    /// Some other file, snapshot or host does not exist.
    NotFound,
    /// Something is already there that must not be overwritten.
    Exists,
    /// Somebody else holds the image, the mountpoint or the device.
    InUse,
    /// No keyslot opens with the key given.
    WrongKey,
    /// Bytes that cannot be what they should be.
    Corrupt,
    /// The link is gone, or never came up.
    Disconnected,
    /// An answer did not come within its bound.
    TimedOut,
    /// A signal asked to stop.
    Interrupted,
    /// The server or a local disk has no room left.
    NoSpace,
    /// Write to something that was opened for reading.
    ReadOnly,
    /// Not allowed.
    Denied,
    /// Well formed, but beyond what this program or the other side can do.
    Unsupported,
    /// A program that is needed is not installed.
    MissingTool,
    /// Anything else that the operating system or a child process reported.
    Io,
}

impl Kind {
    /// The errno with which a kernel caller (FUSE) hears of it.
    pub fn errno(self) -> i32 {
        use rustix::io::Errno;
        match self {
            Kind::Usage => Errno::INVAL,
            Kind::NoImage | Kind::NotFound => Errno::NOENT,
            Kind::Exists => Errno::EXIST,
            Kind::InUse => Errno::BUSY,
            Kind::WrongKey | Kind::Denied => Errno::ACCESS,
            Kind::NoSpace => Errno::NOSPC,
            Kind::ReadOnly => Errno::ROFS,
            Kind::Unsupported => Errno::OPNOTSUPP,
            Kind::Corrupt
            | Kind::Disconnected
            | Kind::TimedOut
            | Kind::Interrupted
            | Kind::MissingTool
            | Kind::Io => Errno::IO,
        }
        .raw_os_error()
    }

    /// The exit code of the program, as listed in the manual.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Usage => 2,
            Kind::NoImage => 10,
            Kind::InUse => 11,
            Kind::WrongKey => 12,
            Kind::Corrupt => 13,
            Kind::Disconnected | Kind::TimedOut => 14,
            Kind::Interrupted => 130,
            Kind::NotFound
            | Kind::Exists
            | Kind::NoSpace
            | Kind::ReadOnly
            | Kind::Denied
            | Kind::Unsupported
            | Kind::MissingTool
            | Kind::Io => 1,
        }
    }

    /// Whether the same request may succeed over a fresh link.
    pub fn may_be_retried(self) -> bool {
        match self {
            Kind::Disconnected | Kind::TimedOut => true,
            Kind::Usage
            | Kind::NoImage
            | Kind::NotFound
            | Kind::Exists
            | Kind::InUse
            | Kind::WrongKey
            | Kind::Corrupt
            | Kind::Interrupted
            | Kind::NoSpace
            | Kind::ReadOnly
            | Kind::Denied
            | Kind::Unsupported
            | Kind::MissingTool
            | Kind::Io => false,
        }
    }
}

/// What was attempted, and why it failed. `Display` prints the attempt alone; [`Error::report`]
/// prints the chain.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    attempt: String,
    hint: Option<String>,
    /// The hint outranks those of the causes.
    hint_is_first: bool,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub fn new(kind: Kind, attempt: impl Into<String>) -> Self {
        Error {
            kind,
            attempt: attempt.into(),
            hint: None,
            hint_is_first: false,
            source: None,
        }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What to do about it, one sentence or command.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What to do about it, where what the causes advise would be wrong: it is shown instead of
    /// their hints.
    pub fn hint_first(mut self, hint: impl Into<String>) -> Self {
        self.hint_is_first = true;
        self.hint(hint)
    }

    /// The same failure under another kind: the place that knows better says so.
    pub fn of_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The attempts from the outermost to the cause.
    pub fn chain(&self) -> Vec<String> {
        let mut chain = vec![self.attempt.clone()];
        let mut next = std::error::Error::source(self);
        while let Some(error) = next {
            chain.push(error.to_string());
            next = error.source();
        }
        chain
    }

    /// The hint nearest to the cause: it knows most, unless one above it was given by
    /// [`Error::hint_first`].
    pub fn deepest_hint(&self) -> Option<&str> {
        if self.hint_is_first {
            return self.hint.as_deref();
        }
        let inner = self
            .source
            .as_deref()
            .and_then(|s| s.downcast_ref::<Error>());
        inner.and_then(Error::deepest_hint).or(self.hint.as_deref())
    }

    /// The whole failure as it is shown to a person: the chain, then the hint.
    pub fn report(&self) -> String {
        let mut text = String::from("error: ");
        text.push_str(&self.chain().join("\n  because: "));
        if let Some(hint) = self.deepest_hint() {
            text.push_str("\nhint: ");
            text.push_str(hint);
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.attempt)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as E;
        let kind = match error.kind() {
            E::NotFound => Kind::NotFound,
            E::AlreadyExists => Kind::Exists,
            E::PermissionDenied => Kind::Denied,
            E::StorageFull | E::QuotaExceeded | E::FileTooLarge => Kind::NoSpace,
            E::ResourceBusy => Kind::InUse,
            E::ReadOnlyFilesystem => Kind::ReadOnly,
            E::TimedOut => Kind::TimedOut,
            E::Unsupported => Kind::Unsupported,
            _ => Kind::Io,
        };
        // The text of an io::Error that wraps one of ours would repeat it.
        Error::new(kind, error.to_string())
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        io::Error::from(errno).into()
    }
}

impl From<&Error> for io::Error {
    fn from(error: &Error) -> Self {
        io::Error::from_raw_os_error(error.kind.errno())
    }
}

/// Adds to a failure what was being attempted.
pub trait Attempt<T> {
    /// `attempt` says it without "cannot": `read 4096 bytes at offset 0 of /srv/a.img`.
    fn attempt<S: Into<String>>(self, attempt: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> Attempt<T> for Result<T, E> {
    fn attempt<S: Into<String>>(self, attempt: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| {
            let cause = cause.into();
            Error::new(cause.kind, attempt()).because(cause)
        })
    }
}

/// An error in the form that crosses from one of our processes to another.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Told {
    kind: Kind,
    chain: Vec<String>,
    hint: Option<String>,
}

impl From<&Error> for Told {
    fn from(error: &Error) -> Self {
        Told {
            kind: error.kind,
            chain: error.chain(),
            hint: error.deepest_hint().map(String::from),
        }
    }
}

impl From<Told> for Error {
    fn from(told: Told) -> Self {
        let mut links = told.chain.into_iter().rev();
        let mut error = Error::new(told.kind, links.next().unwrap_or_default());
        error.hint = told.hint;
        links.fold(error, |cause, attempt| {
            Error::new(told.kind, attempt).because(cause)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure() -> Error {
        let inner: Result<()> = Err(Error::new(Kind::WrongKey, "no keyslot opens").hint("look"));
        inner
            .attempt(|| "unlock the image")
            .attempt(|| "cannot mount")
            .unwrap_err()
    }

    #[test]
    fn the_report_is_a_chain_with_the_hint_last() {
        assert_eq!(
            failure().report(),
            "error: cannot mount\n  because: unlock the image\n  because: no keyslot opens\nhint: look"
        );
        assert_eq!(failure().kind(), Kind::WrongKey);
    }

    #[test]
    fn a_hint_that_comes_first_is_shown_wherever_it_stands() {
        let failure = failure().hint_first("do this");
        let wire = Told::from(&failure);
        for error in [failure, wire.into()] {
            assert!(error.report().ends_with("\nhint: do this"));
            let above: Result<()> = Err(error).attempt(|| "cannot restore");
            let above = above.unwrap_err().hint("outermost");
            assert!(above.report().ends_with("\nhint: do this"));
        }
    }

    #[test]
    fn crossing_a_process_border_changes_nothing_that_is_shown() {
        let wire = serde_json::to_string(&Told::from(&failure())).expect("encodes");
        let back: Error = serde_json::from_str::<Told>(&wire).expect("decodes").into();
        assert_eq!(back.report(), failure().report());
        assert_eq!(back.kind(), Kind::WrongKey);
    }
}
