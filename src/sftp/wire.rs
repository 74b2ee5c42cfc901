//! Numbers and strings on the wire: big-endian, strings with a length of 32 bits before them
//! (draft-ietf-secsh-filexfer-02 section 3, RFC 4251 section 5).

use std::fmt;

/// Bytes that are no packet of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// A field reaches beyond the end of the packet.
    Truncated,
    /// So many bytes follow the last field of a request.
    Trailing(usize),
    /// A packet type that is not known or does not belong in this direction.
    Type(u8),
    /// An extension announced with this version is not the one that is known.
    Extension,
    /// A string or packet that is too long to be sent.
    TooLong,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Malformed::Truncated => f.write_str("a field reaches beyond the end of the packet"),
            Malformed::Trailing(bytes) => write!(f, "{bytes} bytes follow the last field"),
            Malformed::Type(kind) => write!(f, "packet type {kind} is not known here"),
            Malformed::Extension => f.write_str("the extended request is malformed"),
            Malformed::TooLong => f.write_str("a string is too long to be sent"),
        }
    }
}

impl std::error::Error for Malformed {}

/// What is left to be read of a packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Fields(bytes)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(Malformed::Truncated)?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Malformed::Truncated)?;
        self.0 = tail;
        Ok(*head)
    }

    pub fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_be_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    pub fn string(&mut self) -> Result<&'a [u8], Malformed> {
        let len = self.u32()? as usize;
        self.take(len)
    }

    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Nothing may follow.
    pub fn end(self) -> Result<(), Malformed> {
        match self.0.len() {
            0 => Ok(()),
            left => Err(Malformed::Trailing(left)),
        }
    }
}

pub(super) fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

pub(super) fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

pub(super) fn put_len(out: &mut Vec<u8>, len: usize) -> Result<(), Malformed> {
    let len = u32::try_from(len).map_err(|_| Malformed::TooLong)?;
    put_u32(out, len);
    Ok(())
}

pub(super) fn put_string(out: &mut Vec<u8>, value: &[u8]) -> Result<(), Malformed> {
    put_len(out, value.len())?;
    out.extend_from_slice(value);
    Ok(())
}

/// Appends one packet: `body` writes what follows the length, and `behind` bytes, which the caller
/// sends by itself, are counted into the length. `out` is unchanged on failure.
pub(super) fn put_packet(
    out: &mut Vec<u8>,
    behind: usize,
    body: impl FnOnce(&mut Vec<u8>) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    let done = body(out).and_then(|()| {
        let len = out.len() - start - 4 + behind;
        if len > super::frame::PACKET_MAX {
            return Err(Malformed::TooLong);
        }
        out[start..start + 4].copy_from_slice(&(len as u32).to_be_bytes());
        Ok(())
    });
    if done.is_err() {
        out.truncate(start);
    }
    done
}
