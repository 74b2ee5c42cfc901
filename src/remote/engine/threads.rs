//! The threads of an engine: reader, writer and watchdog.

use std::io::{self, BufReader, Read, Write};
use std::sync::atomic::Ordering;
use std::sync::{PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use tracing::{debug, trace};

use super::super::packets::{Broken, Sender, read_packet};
use super::{Shared, State};
use crate::error::{Error, Kind};
use crate::sftp::frame::{self, NotALength};
use crate::sftp::{Event, Extensions, Violation};
use crate::units::KIB;

/// Read ahead for small replies; larger ones are read in place.
const READ_AHEAD: usize = 64 * KIB as usize;

/// How long the rest of a text that came instead of SFTP is waited for.
const TEXT_TIME: Duration = Duration::from_millis(200);

impl Shared {
    /// The reader's life.
    pub(super) fn read(&self, stream: Box<dyn Read + Send>, ready: &mpsc::Sender<Extensions>) {
        let heard = Heard {
            stream,
            shared: self,
        };
        let mut stream = BufReader::with_capacity(READ_AHEAD, heard);
        let mut first = true;
        let cause = loop {
            let mut waited_for = false;
            let event = match read_packet(&mut stream, first) {
                Ok(Some(packet)) => {
                    let mut state = self.lock();
                    waited_for = state.waiting_for_room > 0;
                    state.receive(packet)
                }
                Ok(None) => break self.stream_ended(None),
                Err(Broken::Io(error)) => break self.stream_ended(Some(error)),
                Err(Broken::Text(begin)) => break self.text_before_sftp(begin, &mut stream),
                Err(Broken::Protocol(violation)) => Err(violation),
            };
            first = false;
            match event {
                Ok(None) => break Error::new(Kind::Disconnected, "the session is over"),
                Ok(Some(Event::Ready(extensions))) => {
                    let _ = ready.send(extensions); // whoever started us may have given up
                }
                Ok(Some(Event::Reply { ticket, reply })) => {
                    if waited_for {
                        self.room.notify_all();
                    }
                    trace!(tag = ticket.tag, reply = reply.noun(), "reply");
                    let _ = ticket.to.send((ticket.tag, Ok(reply))); // nobody may want it
                }
                Err(violation) => break protocol_error(&violation),
            }
        };
        self.die(&cause);
        self.handle.close();
    }

    /// Shows what comes with the first bytes of a text: a shell prints it in pieces.
    fn text_before_sftp(&self, mut text: Vec<u8>, stream: &mut impl Read) -> Error {
        thread::sleep(TEXT_TIME);
        self.handle.close();
        let more = stream.take(frame::TEXT_MAX as u64).read_to_end(&mut text);
        debug!(?more, "text before SFTP");
        protocol_error(&Violation::from_length(NotALength::Text, &text))
    }

    fn stream_ended(&self, error: Option<io::Error>) -> Error {
        let ended = |kind| Error::new(kind, "the connection to the server has ended");
        // We ended it ourselves: the child's last words say nothing then.
        if self.lock().dead.is_some() {
            return ended(Kind::Disconnected);
        }
        match (self.handle.diagnosis(), error) {
            (Some(why), _) => ended(why.kind()).because(why),
            (None, Some(error)) => ended(Kind::Disconnected).because(error),
            (None, None) => ended(Kind::Disconnected),
        }
    }

    /// The writer's life.
    pub(super) fn write(&self, stream: Box<dyn Write + Send>) {
        let mut sender = Sender::new(stream);
        let count = |bytes| {
            self.sent.fetch_add(bytes, Ordering::Relaxed);
        };
        loop {
            let idle = |state: &mut State| state.queue.is_empty() && state.dead.is_none();
            let waited = self.work.wait_while(self.lock(), idle);
            let mut state = waited.unwrap_or_else(PoisonError::into_inner);
            if state.dead.is_some() {
                return;
            }
            let packets = std::mem::take(&mut state.queue);
            drop(state);
            if let Err(error) = sender.send(packets, count) {
                debug!(%error, "cannot write to the stream");
                self.handle.close();
                return;
            }
        }
    }

    /// The watchdog's life.
    pub(super) fn watch(&self) {
        let mut state = self.lock();
        while state.dead.is_none() {
            if state.waiting_since.is_none() {
                let waited = self.watch.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let bound = match state.busy {
                0 => self.bounds.silence,
                _ => self.bounds.silence_of_disk,
            };
            let silent = self.silent_for(&state);
            if silent < bound {
                // A busy disk may end before, and then the shorter bound holds.
                let nap = (bound - silent).min(self.bounds.silence);
                let waited = self.watch.wait_timeout(state, nap);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            state.fell_silent = true;
            drop(state);
            let seconds = bound.as_secs_f32();
            let silence = Error::new(
                Kind::Disconnected,
                format!("the server has not said a word for {seconds} s"),
            );
            self.die(&silence);
            self.handle.close();
            return;
        }
    }
}

fn protocol_error(violation: &Violation) -> Error {
    let kind = match violation {
        Violation::Text(_) | Violation::Version(_) | Violation::NotVersion(_) => Kind::Unsupported,
        _ => Kind::Disconnected,
    };
    Error::new(kind, violation.to_string())
}

/// Counts what comes, and notes when.
struct Heard<'a> {
    stream: Box<dyn Read + Send>,
    shared: &'a Shared,
}

impl Read for Heard<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.stream.read(buf)?;
        if len == 0 {
            return Ok(0); // the end is no word of the server's
        }
        let now = self.shared.born.elapsed().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        self.shared.heard.store(now, Ordering::Relaxed);
        self.shared
            .received
            .fetch_add(len as u64, Ordering::Relaxed);
        Ok(len)
    }
}
