//! Packets to the server (draft sections 4, 6 and 8).

use super::attributes::{Attributes, OpenFlags};
use super::extension::Extended;
use super::wire::{Fields, Malformed, put_len, put_packet, put_string, put_u32, put_u64};

const INIT: u8 = 1;
const OPEN: u8 = 3;
const CLOSE: u8 = 4;
const READ: u8 = 5;
const WRITE: u8 = 6;
const LSTAT: u8 = 7;
const FSTAT: u8 = 8;
const SETSTAT: u8 = 9;
const FSETSTAT: u8 = 10;
const OPENDIR: u8 = 11;
const READDIR: u8 = 12;
const REMOVE: u8 = 13;
const MKDIR: u8 = 14;
const RMDIR: u8 = 15;
const REALPATH: u8 = 16;
const STAT: u8 = 17;
const RENAME: u8 = 18;
const READLINK: u8 = 19;
const SYMLINK: u8 = 20;
const EXTENDED: u8 = 200;

/// A request. Paths and handles are bytes, as the protocol has them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[rustfmt::skip]
pub enum Request<'a> {
    /// The first packet; it has a version where the others have an id.
    Init { version: u32 },
    Open { path: &'a [u8], flags: OpenFlags, attributes: Attributes },
    Close { handle: &'a [u8] },
    Read { handle: &'a [u8], offset: u64, len: u32 },
    Write { handle: &'a [u8], offset: u64, data: &'a [u8] },
    Lstat { path: &'a [u8] },
    Fstat { handle: &'a [u8] },
    Setstat { path: &'a [u8], attributes: Attributes },
    Fsetstat { handle: &'a [u8], attributes: Attributes },
    Opendir { path: &'a [u8] },
    Readdir { handle: &'a [u8] },
    Remove { path: &'a [u8] },
    Mkdir { path: &'a [u8], attributes: Attributes },
    Rmdir { path: &'a [u8] },
    Realpath { path: &'a [u8] },
    Stat { path: &'a [u8] },
    /// Fails when `to` exists.
    Rename { from: &'a [u8], to: &'a [u8] },
    Readlink { path: &'a [u8] },
    /// In OpenSSH's order, which is the reverse of the draft's (`PROTOCOL` section 4.1).
    Symlink { target: &'a [u8], link: &'a [u8] },
    Extended(Extended<'a>),
}

impl<'a> Request<'a> {
    /// Reads a packet, which begins with its type: the length has been taken off. Gives the id,
    /// which is 0 for [`Request::Init`].
    pub fn decode(packet: &'a [u8]) -> Result<(u32, Self), Malformed> {
        let mut fields = Fields::new(packet);
        let kind = fields.u8()?;
        if kind == INIT {
            // A client may list extensions, of which none is known here.
            let version = fields.u32()?;
            return Ok((0, Request::Init { version }));
        }
        let id = fields.u32()?;
        let request = Self::decode_body(kind, &mut fields)?;
        fields.end()?;
        Ok((id, request))
    }

    fn decode_body(kind: u8, fields: &mut Fields<'a>) -> Result<Self, Malformed> {
        // A field of a struct literal is read where it stands, so the order below is the wire's.
        Ok(match kind {
            OPEN => Request::Open {
                path: fields.string()?,
                flags: OpenFlags(fields.u32()?),
                attributes: Attributes::decode(fields)?,
            },
            CLOSE => Request::Close {
                handle: fields.string()?,
            },
            READ => Request::Read {
                handle: fields.string()?,
                offset: fields.u64()?,
                len: fields.u32()?,
            },
            WRITE => Request::Write {
                handle: fields.string()?,
                offset: fields.u64()?,
                data: fields.string()?,
            },
            LSTAT => Request::Lstat {
                path: fields.string()?,
            },
            FSTAT => Request::Fstat {
                handle: fields.string()?,
            },
            SETSTAT => Request::Setstat {
                path: fields.string()?,
                attributes: Attributes::decode(fields)?,
            },
            FSETSTAT => Request::Fsetstat {
                handle: fields.string()?,
                attributes: Attributes::decode(fields)?,
            },
            OPENDIR => Request::Opendir {
                path: fields.string()?,
            },
            READDIR => Request::Readdir {
                handle: fields.string()?,
            },
            REMOVE => Request::Remove {
                path: fields.string()?,
            },
            MKDIR => Request::Mkdir {
                path: fields.string()?,
                attributes: Attributes::decode(fields)?,
            },
            RMDIR => Request::Rmdir {
                path: fields.string()?,
            },
            REALPATH => Request::Realpath {
                path: fields.string()?,
            },
            STAT => Request::Stat {
                path: fields.string()?,
            },
            RENAME => Request::Rename {
                from: fields.string()?,
                to: fields.string()?,
            },
            READLINK => Request::Readlink {
                path: fields.string()?,
            },
            SYMLINK => Request::Symlink {
                target: fields.string()?,
                link: fields.string()?,
            },
            EXTENDED => Request::Extended(Extended::decode(fields)?),
            other => return Err(Malformed::Type(other)),
        })
    }

    /// Appends the whole packet with its length. [`Malformed::TooLong`] leaves `out` as it was.
    pub fn encode(&self, id: u32, out: &mut Vec<u8>) -> Result<(), Malformed> {
        self.encode_head(id, out)?;
        if let Request::Write { data, .. } = self {
            out.extend_from_slice(data);
        }
        Ok(())
    }

    /// Appends the packet without the data of a write, which the caller sends behind it.
    pub fn encode_head(&self, id: u32, out: &mut Vec<u8>) -> Result<(), Malformed> {
        let behind = match self {
            Request::Write { data, .. } => data.len(),
            _ => 0,
        };
        put_packet(out, behind, |out| {
            out.push(self.kind());
            match self {
                Request::Init { version } => put_u32(out, *version),
                _ => put_u32(out, id),
            }
            self.encode_body(out)
        })
    }

    fn encode_body(&self, out: &mut Vec<u8>) -> Result<(), Malformed> {
        match self {
            Request::Init { .. } => Ok(()),
            Request::Open {
                path,
                flags,
                attributes,
            } => {
                put_string(out, path)?;
                put_u32(out, flags.0);
                attributes.encode(out)
            }
            Request::Read {
                handle,
                offset,
                len,
            } => {
                put_string(out, handle)?;
                put_u64(out, *offset);
                put_u32(out, *len);
                Ok(())
            }
            Request::Write {
                handle,
                offset,
                data,
            } => {
                put_string(out, handle)?;
                put_u64(out, *offset);
                put_len(out, data.len())
            }
            Request::Close { handle } | Request::Fstat { handle } | Request::Readdir { handle } => {
                put_string(out, handle)
            }
            Request::Fsetstat { handle, attributes } => {
                put_string(out, handle)?;
                attributes.encode(out)
            }
            Request::Setstat { path, attributes } | Request::Mkdir { path, attributes } => {
                put_string(out, path)?;
                attributes.encode(out)
            }
            Request::Lstat { path }
            | Request::Opendir { path }
            | Request::Remove { path }
            | Request::Rmdir { path }
            | Request::Realpath { path }
            | Request::Stat { path }
            | Request::Readlink { path } => put_string(out, path),
            Request::Rename { from, to } => {
                put_string(out, from)?;
                put_string(out, to)
            }
            Request::Symlink { target, link } => {
                put_string(out, target)?;
                put_string(out, link)
            }
            Request::Extended(extended) => extended.encode(out),
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Request::Init { .. } => INIT,
            Request::Open { .. } => OPEN,
            Request::Close { .. } => CLOSE,
            Request::Read { .. } => READ,
            Request::Write { .. } => WRITE,
            Request::Lstat { .. } => LSTAT,
            Request::Fstat { .. } => FSTAT,
            Request::Setstat { .. } => SETSTAT,
            Request::Fsetstat { .. } => FSETSTAT,
            Request::Opendir { .. } => OPENDIR,
            Request::Readdir { .. } => READDIR,
            Request::Remove { .. } => REMOVE,
            Request::Mkdir { .. } => MKDIR,
            Request::Rmdir { .. } => RMDIR,
            Request::Realpath { .. } => REALPATH,
            Request::Stat { .. } => STAT,
            Request::Rename { .. } => RENAME,
            Request::Readlink { .. } => READLINK,
            Request::Symlink { .. } => SYMLINK,
            Request::Extended(_) => EXTENDED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..40)
    }

    fn attributes() -> impl Strategy<Value = Attributes> {
        let pairs = prop::collection::vec((bytes(), bytes()), 0..3);
        (any::<[Option<u64>; 2]>(), any::<[u32; 3]>(), pairs).prop_map(
            |([size, mix], [a, b, c], extended)| Attributes {
                size,
                owner: mix.map(|_| (a, b)),
                permissions: size.map(|_| c),
                times: mix.map(|m| (m as u32, c)),
                extended,
            },
        )
    }

    /// One request of every kind.
    fn every_kind<'a>(
        a: &'a [u8],
        b: &'a [u8],
        attributes: &Attributes,
        [x, y]: [u64; 2],
        n: u32,
    ) -> Vec<Request<'a>> {
        let attributes = || attributes.clone();
        #[rustfmt::skip]
        let requests = vec![
            Request::Open { path: a, flags: OpenFlags(n), attributes: attributes() },
            Request::Close { handle: a },
            Request::Read { handle: a, offset: x, len: n },
            Request::Write { handle: a, offset: x, data: b },
            Request::Lstat { path: a },
            Request::Fstat { handle: a },
            Request::Setstat { path: a, attributes: attributes() },
            Request::Fsetstat { handle: a, attributes: attributes() },
            Request::Opendir { path: a },
            Request::Readdir { handle: a },
            Request::Remove { path: a },
            Request::Mkdir { path: a, attributes: attributes() },
            Request::Rmdir { path: a },
            Request::Realpath { path: a },
            Request::Stat { path: a },
            Request::Rename { from: a, to: b },
            Request::Readlink { path: a },
            Request::Symlink { target: a, link: b },
            Request::Extended(Extended::PosixRename { from: a, to: b }),
            Request::Extended(Extended::StatVfs { path: a }),
            Request::Extended(Extended::Hardlink { from: a, to: b }),
            Request::Extended(Extended::Fsync { handle: a }),
            Request::Extended(Extended::Limits),
            Request::Extended(Extended::ExpandPath { path: a }),
            Request::Extended(Extended::CopyData {
                from: a, from_offset: x, len: y, to: b, to_offset: x ^ y,
            }),
            Request::Extended(Extended::Other { name: b"none@example.org", data: b }),
        ];
        requests
    }

    proptest! {
        #[test]
        fn every_request_comes_back_and_no_shorter_one_passes_for_it(
            a in bytes(), b in bytes(), attributes in attributes(),
            numbers in any::<[u64; 2]>(), n in any::<u32>(), id in any::<u32>(),
        ) {
            for request in every_kind(&a, &b, &attributes, numbers, n) {
                let mut wire = Vec::new();
                request.encode(id, &mut wire).expect("short");
                let len = u32::from_be_bytes(wire[..4].try_into().expect("four"));
                prop_assert_eq!(len as usize, wire.len() - 4);
                prop_assert_eq!(Request::decode(&wire[4..]), Ok((id, request.clone())));
                // A request with bytes of its own at the end may be cut; it is another one then.
                for cut in 5..wire.len() {
                    prop_assert_ne!(Request::decode(&wire[4..cut]), Ok((id, request.clone())));
                }
            }
        }

        #[test]
        fn no_bytes_upset_it(packet in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok((id, request)) = Request::decode(&packet) {
                let mut wire = Vec::new();
                request.encode(id, &mut wire).expect("no longer than it was");
                prop_assert_eq!(Request::decode(&wire[4..]), Ok((id, request)));
            }
        }
    }

    #[test]
    fn a_read_looks_as_the_draft_draws_it() {
        let mut wire = Vec::new();
        let read = Request::Read {
            handle: b"h",
            offset: 0x0102_0304_0506_0708,
            len: 0x1_0000,
        };
        read.encode(7, &mut wire).expect("short");
        let expected = [
            0, 0, 0, 22, 5, 0, 0, 0, 7, 0, 0, 0, 1, b'h', 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 0, 0,
        ];
        assert_eq!(wire, expected);
    }

    #[test]
    fn a_head_counts_the_data_behind_it() {
        let write = Request::Write {
            handle: b"h",
            offset: 0,
            data: b"data",
        };
        let (mut head, mut whole) = (Vec::new(), Vec::new());
        write.encode_head(1, &mut head).expect("short");
        write.encode(1, &mut whole).expect("short");
        assert_eq!(head, whole[..whole.len() - 4]);
    }

    #[test]
    fn what_is_too_long_leaves_no_trace() {
        let path = vec![b'a'; super::super::frame::PACKET_MAX];
        let mut out = b"before".to_vec();
        let error = Request::Stat { path: &path }.encode(1, &mut out);
        assert_eq!(error, Err(Malformed::TooLong));
        assert_eq!(out, b"before");
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut wire = Vec::new();
        Request::Stat { path: b"a" }
            .encode(1, &mut wire)
            .expect("short");
        wire.push(0);
        assert_eq!(Request::decode(&wire[4..]), Err(Malformed::Trailing(1)));
    }
}
