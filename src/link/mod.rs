//! The byte stream that carries SFTP, and how it is dialled.

pub mod built_in; // SSH without an ssh program, by libssh2
mod child; //       a child process: started, listened to, ended, reaped
pub mod command; // any child process whose stdin and stdout speak SFTP
mod known_hosts; // the host keys that the built-in SSH accepts
pub mod limit; //   bytes per second
mod login; //       agent, key files and password of the built-in SSH
mod master; //      one connection of ssh that carries many streams
mod pump; //        between the channels of the built-in SSH and their streams
mod socket_dir; //  where its socket is
pub mod ssh; //     the system's ssh
mod ssh_words; //   what it says when it fails
mod terminal; //    who is asked for a login

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};

/// A connected stream. Both halves may be used at once, from two threads.
pub struct Stream {
    pub reader: Box<dyn Read + Send>,
    pub writer: Box<dyn Write + Send>,
    pub handle: Arc<dyn Handle>,
}

/// What can be done to a stream from any thread.
pub trait Handle: Send + Sync {
    /// Ends the stream: a blocked reader sees its end, a child process is reaped. May be called
    /// more than once.
    fn close(&self);

    /// Why the stream ended, as far as the other end or a child process has said: the last lines
    /// of its standard error, its exit status. Asked when the reader has seen the end; may wait
    /// for the child's last words, but not longer than a second.
    fn diagnosis(&self) -> Option<Error>;
}

/// Which of a run's streams is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// The first: the user may be there to answer a question.
    First,
    /// Another one, or the same after a break: nobody is asked.
    Again,
}

/// How many streams to one server are of use at most: more are slower.
pub const STREAMS_MAX: usize = 8;

/// Makes streams to one server.
pub trait Dial: Send + Sync {
    /// Starts a stream. It returns before the other side has said anything, and may be called from
    /// any thread, also one that ends soon.
    fn dial(&self, occasion: Occasion) -> Result<Stream>;

    /// How many streams may be up at the same time.
    fn streams_max(&self) -> usize {
        STREAMS_MAX
    }

    /// How long the first packet may take, questions to the user included.
    fn patience(&self) -> Duration {
        PATIENCE
    }
}

/// For a stream that asks no questions. ssh gives up connecting after
/// [`CONNECT_TIMEOUT_SECONDS`]; logging in and starting the server come on top.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The same when somebody may be asked for a passphrase, a touch of a key, or whether a host is
/// known.
pub const PATIENCE_WITH_QUESTIONS: Duration = Duration::from_secs(600);

/// How long connecting to the server may take, without logging in.
pub const CONNECT_TIMEOUT_SECONDS: u32 = 30;

/// A server that has vanished is noticed after this time without a byte, thrice over (it is asked
/// twice, and the last answer has as long to come): 30 s.
const ALIVE_INTERVAL_SECONDS: u32 = 10;
const ALIVE_COUNT: u32 = 2;
