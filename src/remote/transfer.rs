//! Reads and writes of any length over an engine: cut into chunks, all in flight at once.

use std::collections::VecDeque;
use std::sync::{Arc, mpsc};

use super::engine::{Chunk, Engine};
use super::verdict::{done, refusal};
use crate::buffer::Buffer;
use crate::error::{Error, Kind, Result};
use crate::sftp::{Code, Reply, Request};

/// Part of the caller's buffer, by its place in it.
#[derive(Clone, Copy)]
struct Piece {
    start: usize,
    len: usize,
}

fn pieces(len: usize, chunk: usize) -> impl Iterator<Item = Piece> {
    (0..len).step_by(chunk).map(move |start| Piece {
        start,
        len: chunk.min(len - start),
    })
}

/// The place in the file of a place in the buffer.
fn place(offset: u64, start: usize) -> Result<u64> {
    offset
        .checked_add(start as u64)
        .ok_or_else(|| Error::new(Kind::Usage, format!("offset {offset} is too large")))
}

/// Fills `buf` from the open file. A server may send less than was asked for; the rest is asked
/// for again.
///
/// The end of the file within the range is an error and never zeros: callers ask only for what
/// the file's size says is there, so that the file was cut off behind our back.
pub fn read_exact_at(engine: &Engine, handle: &[u8], buf: &mut [u8], offset: u64) -> Result<()> {
    let (to, completions) = mpsc::channel();
    let mut todo: VecDeque<Piece> = pieces(buf.len(), engine.read_chunk()).collect();
    // A tag is an index in here.
    let mut asked: Vec<Piece> = Vec::with_capacity(todo.len());
    let mut in_flight = 0;
    // Replies lie in the channel until they are copied, so a long read copies as it goes.
    let most = (engine.bounds().bytes_in_flight / engine.read_chunk()).max(1);
    loop {
        while in_flight < most
            && let Some(piece) = todo.pop_front()
        {
            let request = Request::Read {
                handle,
                offset: place(offset, piece.start)?,
                len: u32::try_from(piece.len).unwrap_or(u32::MAX),
            };
            engine.submit(&request, asked.len(), &to)?;
            asked.push(piece);
            in_flight += 1;
        }
        if in_flight == 0 {
            return Ok(());
        }
        let (tag, reply) = engine.wait(&completions)?;
        in_flight -= 1;
        let Some(piece) = asked.get(tag).copied() else {
            return Err(Error::new(Kind::Io, "a reply to nothing that was asked"));
        };
        let got = take_data(&reply, buf, piece, offset)?;
        if got < piece.len {
            todo.push_front(Piece {
                start: piece.start + got,
                len: piece.len - got,
            });
        }
    }
}

/// Copies a reply to its place. Gives the bytes copied, at least one.
fn take_data(reply: &Reply, buf: &mut [u8], piece: Piece, offset: u64) -> Result<usize> {
    let at = place(offset, piece.start)?;
    match reply {
        Reply::Data(data) if !data.bytes().is_empty() => {
            let bytes = data.bytes();
            // The conversation has checked that no more came than was asked for.
            let target = buf.get_mut(piece.start..piece.start + bytes.len());
            let too_long = || Error::new(Kind::Disconnected, "more data than was asked for");
            target.ok_or_else(too_long)?.copy_from_slice(bytes);
            Ok(bytes.len())
        }
        // No data would be asked for again for ever.
        Reply::Data(_) => Err(ends_early(at)),
        Reply::Status(status) if status.code == Code::Eof => Err(ends_early(at)),
        other => Err(refusal(other)),
    }
}

fn ends_early(at: u64) -> Error {
    Error::new(
        Kind::Corrupt,
        format!("the file on the server ends before offset {at}, within its known size"),
    )
}

/// Writes `data` to the open file, as [`write_chunk`] does.
pub fn write_all_at(engine: &Engine, handle: &[u8], data: &[u8], offset: u64) -> Result<()> {
    let data = Chunk {
        range: 0..data.len(),
        bytes: Arc::new(Buffer::from(data)),
    };
    write_chunk(engine, handle, &data, offset)
}

/// Writes a chunk of any length. Returns when every part of it is answered, also on failure:
/// nothing of it is under way any more then, unless the session is over.
pub fn write_chunk(engine: &Engine, handle: &[u8], data: &Chunk, offset: u64) -> Result<()> {
    let (to, completions) = mpsc::channel();
    let mut in_flight = 0;
    let mut failure = None;
    for piece in pieces(data.range.len(), engine.write_chunk()) {
        let part = data.part(piece.start, piece.start + piece.len);
        let submitted =
            place(offset, piece.start).and_then(|at| engine.submit_write(handle, at, part, 0, &to));
        if let Err(error) = submitted {
            failure = Some(error);
            break;
        }
        in_flight += 1;
    }
    for _ in 0..in_flight {
        let answered = engine.wait(&completions);
        if let Err(error) = answered.and_then(|(_, reply)| done(&reply)) {
            failure.get_or_insert(error);
        }
    }
    failure.map_or(Ok(()), Err)
}
