//! Packets onto a stream and off it.

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::ops::Range;
use std::sync::Arc;

use crate::buffer::Buffer;
use crate::sftp::Violation;
use crate::sftp::frame::{self, NotALength};
use crate::units::KIB;

/// Small packets that wait together leave together, up to this many bytes.
const JOINED: usize = 64 * KIB as usize;

/// Data from here on is sent from where it is and not copied to the small packets.
const SENT_IN_PLACE: usize = 16 * KIB as usize;

/// Part of a buffer that callers, queue and writer share.
#[derive(Clone, Debug)]
pub struct Chunk {
    pub bytes: Arc<Buffer>,
    pub range: Range<usize>,
}

impl Chunk {
    pub fn as_slice(&self) -> &[u8] {
        // A range that reaches beyond the buffer is refused at submission.
        self.bytes.get(self.range.clone()).unwrap_or_default()
    }

    /// The part of it from `from` to `to`.
    pub fn part(&self, from: usize, to: usize) -> Chunk {
        Chunk {
            bytes: self.bytes.clone(),
            range: self.range.start + from..self.range.start + to,
        }
    }
}

/// A packet that waits for the writer: its head, and the data behind it.
pub struct Outgoing {
    pub head: Vec<u8>,
    pub data: Option<Chunk>,
}

/// Writes packets, the small ones joined and large data from where they are.
pub struct Sender {
    stream: Box<dyn Write + Send>,
    joined: Vec<u8>,
}

impl Sender {
    pub fn new(stream: Box<dyn Write + Send>) -> Self {
        Sender {
            stream,
            joined: Vec::with_capacity(JOINED),
        }
    }

    /// Writes them all. `count` hears how many bytes are about to be written, before they are: a
    /// reply must not be counted before its request.
    pub fn send(
        &mut self,
        packets: impl IntoIterator<Item = Outgoing>,
        count: impl Fn(u64),
    ) -> io::Result<()> {
        for packet in packets {
            self.joined.extend_from_slice(&packet.head);
            let data = packet.data.as_ref().map_or(&[][..], Chunk::as_slice);
            if data.len() >= SENT_IN_PLACE {
                self.write_with(data, &count)?;
            } else {
                self.joined.extend_from_slice(data);
                if self.joined.len() >= JOINED {
                    self.write_with(&[], &count)?;
                }
            }
        }
        self.write_with(&[], &count)?;
        self.stream.flush()
    }

    /// Writes what is joined and then `data`, by one call where the stream takes them so.
    fn write_with(&mut self, data: &[u8], count: &impl Fn(u64)) -> io::Result<()> {
        count(self.joined.len() as u64 + data.len() as u64);
        let mut parts = [IoSlice::new(&self.joined), IoSlice::new(data)];
        let mut left = &mut parts[..];
        // Passes over empty parts.
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            match self.stream.write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut left, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.joined.clear();
        Ok(())
    }
}

/// Why no packet could be read.
pub enum Broken {
    Io(io::Error),
    /// The stream begins with these bytes of a text.
    Text(Vec<u8>),
    Protocol(Violation),
}

/// Reads one packet without its length; `None` at an end between two packets.
pub fn read_packet(
    stream: &mut BufReader<impl Read>,
    first: bool,
) -> std::result::Result<Option<Vec<u8>>, Broken> {
    let mut length = [0; 4];
    let mut got = 0;
    while got < length.len() {
        match stream.read(&mut length[got..]) {
            Ok(0) if got == 0 => return Ok(None),
            // Text may be shorter than a length.
            Ok(0) if first => break,
            Ok(0) => return Err(Broken::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(len) => got += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Broken::Io(error)),
        }
    }
    let len = frame::length(length, first).map_err(|what| match what {
        NotALength::Text => Broken::Text(length[..got].to_vec()),
        what => Broken::Protocol(Violation::from_length(what, &length)),
    })?;
    let mut packet = vec![0; len];
    stream.read_exact(&mut packet).map_err(Broken::Io)?;
    Ok(Some(packet))
}
