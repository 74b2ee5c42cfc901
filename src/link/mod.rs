//! The byte stream that carries SFTP, and how it is dialled.

use std::io::{Read, Write};
use std::sync::Arc;

use crate::error::Result;

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
    /// of its standard error, its exit status.
    fn diagnosis(&self) -> Option<String>;
}

/// Makes streams to one server.
pub trait Dial: Send + Sync {
    fn dial(&self) -> Result<Stream>;
}
