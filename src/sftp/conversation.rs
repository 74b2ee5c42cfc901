//! The client's side of the conversation: it numbers requests, remembers what each one may be
//! answered with, and gives every reply back with the ticket of whoever waits for it.
//!
//! Hello (INIT sent) -> Ready (VERSION seen) -> Ready (requests and replies, in any order).
//! A [`Violation`] ends the conversation: the stream cannot be trusted after it, and whoever drives
//! it closes the stream and hands [`Conversation::abandon`]'s tickets their error.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;

use super::extension::{Extended, Extensions};
use super::frame::{NotALength, PACKET_MAX};
use super::reply::Reply;
use super::request::Request;
use super::wire::Malformed;

/// What the server has done that no server may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Text came where SFTP should have begun.
    Text(String),
    /// A packet length beyond all bounds.
    Length(u32),
    Malformed(Malformed),
    /// The server speaks this version, not 3.
    Version(u32),
    /// The first packet was this one and not VERSION.
    NotVersion(&'static str),
    /// A reply to a request that was not made, or is answered already.
    UnknownId(u32),
    /// A reply of this kind does not fit the request.
    Unexpected(&'static str),
    /// More bytes than were asked for.
    DataTooLong {
        asked: u32,
        got: usize,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::Text(text) if text.is_empty() => f.write_str(
                "the server printed empty lines before SFTP, check its shell start-up files",
            ),
            Violation::Text(text) => write!(
                f,
                "the server printed text before SFTP: `{text}`, check its shell start-up files"
            ),
            Violation::Length(len) => write!(
                f,
                "the server announced a packet of {len} bytes, {PACKET_MAX} is the most"
            ),
            Violation::Malformed(what) => {
                write!(f, "the server sent a malformed packet: {what}")
            }
            Violation::Version(version) => {
                write!(f, "the server speaks SFTP version {version}, 3 is needed")
            }
            Violation::NotVersion(noun) => {
                write!(f, "the server began with a {noun} packet, not with VERSION")
            }
            Violation::UnknownId(id) => {
                write!(f, "the server answered request {id}, which was not made")
            }
            Violation::Unexpected(noun) => {
                write!(f, "the server answered with a {noun} packet out of place")
            }
            Violation::DataTooLong { asked, got } => {
                write!(f, "the server sent {got} bytes, {asked} were asked for")
            }
        }
    }
}

impl std::error::Error for Violation {}

impl From<Malformed> for Violation {
    fn from(what: Malformed) -> Self {
        Violation::Malformed(what)
    }
}

impl Violation {
    /// A length that cannot be, with the bytes that came from there on.
    pub fn from_length(length: NotALength, stream: &[u8]) -> Self {
        match length {
            NotALength::Text => Violation::Text(super::frame::printable(stream)),
            NotALength::Bytes(len) => Violation::Length(len),
        }
    }
}

/// What a request may be answered with; a status is always possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Status,
    Handle,
    Data(u32),
    Names,
    Attributes,
    Extended,
    Any,
}

impl Answer {
    fn to(request: &Request<'_>) -> Self {
        match request {
            Request::Open { .. } | Request::Opendir { .. } => Answer::Handle,
            Request::Read { len, .. } => Answer::Data(*len),
            Request::Lstat { .. } | Request::Fstat { .. } | Request::Stat { .. } => {
                Answer::Attributes
            }
            Request::Readdir { .. } | Request::Realpath { .. } | Request::Readlink { .. } => {
                Answer::Names
            }
            Request::Extended(extended) => match extended {
                Extended::StatVfs { .. } | Extended::Limits => Answer::Extended,
                Extended::ExpandPath { .. } => Answer::Names,
                Extended::Other { .. } => Answer::Any,
                Extended::PosixRename { .. }
                | Extended::Hardlink { .. }
                | Extended::Fsync { .. }
                | Extended::CopyData { .. } => Answer::Status,
            },
            Request::Init { .. }
            | Request::Close { .. }
            | Request::Write { .. }
            | Request::Setstat { .. }
            | Request::Fsetstat { .. }
            | Request::Remove { .. }
            | Request::Mkdir { .. }
            | Request::Rmdir { .. }
            | Request::Rename { .. }
            | Request::Symlink { .. } => Answer::Status,
        }
    }

    fn check(self, reply: &Reply) -> Result<(), Violation> {
        match (self, reply) {
            (Answer::Data(asked), Reply::Data(data)) if data.bytes().len() > asked as usize => {
                Err(Violation::DataTooLong {
                    asked,
                    got: data.bytes().len(),
                })
            }
            (_, Reply::Status(_))
            | (Answer::Handle, Reply::Handle(_))
            | (Answer::Data(_), Reply::Data(_))
            | (Answer::Names, Reply::Names(_))
            | (Answer::Attributes, Reply::Attributes(_))
            | (Answer::Extended | Answer::Any, Reply::Extended(_)) => Ok(()),
            _ => Err(Violation::Unexpected(reply.noun())),
        }
    }
}

/// What a packet from the server means.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<T> {
    /// The server has introduced itself; requests may be made.
    Ready(Extensions),
    Reply {
        ticket: T,
        reply: Reply,
    },
}

/// The state of a conversation; `T` is what the driver needs to hand a reply on.
#[derive(Debug)]
pub struct Conversation<T> {
    ready: bool,
    next_id: u32,
    outstanding: HashMap<u32, (Answer, T)>,
}

impl<T> Default for Conversation<T> {
    fn default() -> Self {
        Conversation {
            ready: false,
            next_id: 0,
            outstanding: HashMap::new(),
        }
    }
}

impl<T> Conversation<T> {
    /// The packet that begins a conversation: INIT with version 3.
    pub const HELLO: [u8; 9] = [0, 0, 0, 5, 1, 0, 0, 0, super::VERSION as u8];

    /// Requests made and not yet answered.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Numbers a request, remembers its ticket, and appends its packet to `out` without the data
    /// of a write, which follow it on the stream.
    pub fn request(
        &mut self,
        request: &Request<'_>,
        ticket: T,
        out: &mut Vec<u8>,
    ) -> Result<(), (T, Malformed)> {
        let mut id = self.next_id;
        // After 2^32 requests an old one could still be waiting.
        while self.outstanding.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        match request.encode_head(id, out) {
            Err(what) => Err((ticket, what)),
            Ok(()) => {
                self.next_id = id.wrapping_add(1);
                self.outstanding.insert(id, (Answer::to(request), ticket));
                Ok(())
            }
        }
    }

    /// Takes a packet without its length.
    pub fn receive(&mut self, packet: Vec<u8>) -> Result<Event<T>, Violation> {
        let (id, reply) = Reply::decode(packet)?;
        match reply {
            Reply::Version {
                version,
                extensions,
            } if !self.ready => {
                // A server answers with the lower of both versions.
                if version != super::VERSION {
                    return Err(Violation::Version(version));
                }
                self.ready = true;
                let mut known = Extensions::default();
                for (name, data) in &extensions {
                    known.list(name, data);
                }
                Ok(Event::Ready(known))
            }
            _ if !self.ready => Err(Violation::NotVersion(reply.noun())),
            Reply::Version { .. } => Err(Violation::Unexpected(reply.noun())),
            _ => {
                let Entry::Occupied(entry) = self.outstanding.entry(id) else {
                    return Err(Violation::UnknownId(id));
                };
                // Checked before it is taken out: on a violation its ticket is abandoned with
                // the others.
                entry.get().0.check(&reply)?;
                let (_, ticket) = entry.remove();
                Ok(Event::Reply { ticket, reply })
            }
        }
    }

    /// The tickets of all that will not be answered any more.
    pub fn abandon(&mut self) -> Vec<T> {
        self.outstanding.drain().map(|(_, (_, t))| t).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sftp::{Attributes, Code, Extension, Status};

    fn packet(reply: &Reply, id: u32) -> Vec<u8> {
        let mut wire = Vec::new();
        reply.encode(id, &mut wire).expect("short");
        wire.split_off(4)
    }

    fn version(version: u32) -> Reply {
        let pair = |name: &str, data: &str| (name.into(), data.into());
        Reply::Version {
            version,
            extensions: vec![
                pair("fsync@openssh.com", "1"),
                pair("statvfs@openssh.com", "1"),
                pair("none@example.org", "1"),
            ],
        }
    }

    fn ready() -> Conversation<&'static str> {
        let mut conversation = Conversation::default();
        let event = conversation.receive(packet(&version(3), 0));
        assert!(matches!(event, Ok(Event::Ready(_))));
        conversation
    }

    fn ask(conversation: &mut Conversation<&'static str>, ticket: &'static str, len: u32) -> u32 {
        let mut out = Vec::new();
        let read = Request::Read {
            handle: b"h",
            offset: 0,
            len,
        };
        conversation
            .request(&read, ticket, &mut out)
            .expect("short");
        Request::decode(&out[4..]).expect("ours").0
    }

    #[test]
    fn it_begins_with_version_3() {
        let mut hello = Vec::new();
        let init = Request::Init { version: 3 };
        init.encode(0, &mut hello).expect("short");
        assert_eq!(hello, Conversation::<()>::HELLO);
    }

    #[test]
    fn extensions_count_only_in_the_version_that_is_known() {
        let mut conversation = Conversation::<()>::default();
        let Ok(Event::Ready(extensions)) = conversation.receive(packet(&version(3), 0)) else {
            panic!("not ready");
        };
        assert!(extensions.has(Extension::Fsync));
        assert!(!extensions.has(Extension::StatVfs) && !extensions.has(Extension::Limits));
    }

    #[test]
    fn replies_find_their_requests_in_any_order() {
        let mut conversation = ready();
        let first = ask(&mut conversation, "first", 4);
        let second = ask(&mut conversation, "second", 4);
        for (id, name) in [(second, "second"), (first, "first")] {
            let reply = Reply::Data(name.as_bytes()[..4].to_vec().into());
            let ticket = name;
            let event = conversation.receive(packet(&reply, id));
            assert_eq!(event, Ok(Event::Reply { ticket, reply }));
        }
        assert_eq!(conversation.outstanding(), 0);
    }

    #[test]
    fn what_no_server_may_do_is_a_violation() {
        let data = |len| Reply::Data(vec![0; len].into());
        let handle = Reply::Handle(b"h".to_vec());
        let mut conversation = ready();
        let id = ask(&mut conversation, "read", 4);
        for (reply, id, violation) in [
            (data(5), id, Violation::DataTooLong { asked: 4, got: 5 }),
            (data(4), id + 1, Violation::UnknownId(id + 1)),
            (handle.clone(), id, Violation::Unexpected("HANDLE")),
            (version(3), id, Violation::Unexpected("VERSION")),
        ] {
            assert_eq!(conversation.receive(packet(&reply, id)), Err(violation));
        }
        let malformed = conversation.receive(vec![103, 0, 0]);
        assert_eq!(malformed, Err(Violation::Malformed(Malformed::Truncated)));
        // None of them has lost the one who waits.
        assert_eq!(conversation.abandon(), ["read"]);

        let begun_with = |reply| Conversation::<()>::default().receive(packet(&reply, 0));
        assert_eq!(begun_with(version(2)), Err(Violation::Version(2)));
        assert_eq!(begun_with(handle), Err(Violation::NotVersion("HANDLE")));
    }

    #[test]
    fn a_request_is_answered_once() {
        let mut conversation = ready();
        let id = ask(&mut conversation, "once", 4);
        let reply = packet(&Reply::Status(Status::new(Code::Eof, "")), id);
        assert!(conversation.receive(reply.clone()).is_ok());
        assert_eq!(conversation.receive(reply), Err(Violation::UnknownId(id)));
    }

    #[test]
    fn numbers_go_round_and_pass_over_those_in_use() {
        let mut conversation = ready();
        let old = ask(&mut conversation, "old", 1);
        conversation.next_id = u32::MAX;
        assert_eq!(ask(&mut conversation, "last", 1), u32::MAX);
        assert_eq!(ask(&mut conversation, "next", 1), old + 1);
    }

    #[test]
    fn every_request_takes_its_own_kind_of_reply() {
        let mut conversation = ready();
        let mut out = Vec::new();
        let stat = Request::Stat { path: b"a" };
        conversation
            .request(&stat, "stat", &mut out)
            .expect("short");
        let id = Request::decode(&out[4..]).expect("ours").0;
        let reply = Reply::Attributes(Attributes::with_size(1));
        assert!(conversation.receive(packet(&reply, id)).is_ok());
    }
}
