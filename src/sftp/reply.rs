//! Packets from the server (draft sections 4 and 7).
//!
//! Bytes behind the last field are passed over, and a status may lack its words: servers older
//! than version 3 send none.

use super::attributes::Attributes;
use super::status::{Code, Status};
use super::wire::{Fields, Malformed, put_len, put_packet, put_string, put_u32};

const VERSION: u8 = 2;
const STATUS: u8 = 101;
const HANDLE: u8 = 102;
const DATA: u8 = 103;
const NAME: u8 = 104;
const ATTRS: u8 = 105;
const EXTENDED_REPLY: u8 = 201;

/// A reply. It owns its bytes, since it goes from the thread that reads to the one that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The first packet; it has a version where the others have an id.
    Version {
        version: u32,
        /// Name and data.
        extensions: Vec<(Vec<u8>, Vec<u8>)>,
    },
    Status(Status),
    Handle(Vec<u8>),
    Data(Data),
    Names(Vec<Name>),
    Attributes(Attributes),
    Extended(Vec<u8>),
}

/// One entry of a directory, or one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    pub name: Vec<u8>,
    /// A line as `ls -l` prints it.
    pub long_name: Vec<u8>,
    pub attributes: Attributes,
}

/// Bytes of a file, still in the packet that they came in.
#[derive(Clone, Debug)]
pub struct Data {
    packet: Vec<u8>,
    start: usize,
    end: usize,
}

impl Data {
    pub fn bytes(&self) -> &[u8] {
        &self.packet[self.start..self.end]
    }
}

impl PartialEq for Data {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Data {}

impl From<Vec<u8>> for Data {
    fn from(packet: Vec<u8>) -> Self {
        let end = packet.len();
        Data {
            packet,
            start: 0,
            end,
        }
    }
}

impl Reply {
    /// Reads a packet, which begins with its type: the length has been taken off. Gives the id,
    /// which is 0 for [`Reply::Version`].
    pub fn decode(packet: Vec<u8>) -> Result<(u32, Self), Malformed> {
        let mut fields = Fields::new(&packet);
        let kind = fields.u8()?;
        let id_or_version = fields.u32()?;
        let reply = match kind {
            VERSION => {
                let mut extensions = Vec::new();
                while !fields.is_empty() {
                    extensions.push((fields.string()?.to_vec(), fields.string()?.to_vec()));
                }
                let version = id_or_version;
                return Ok((
                    0,
                    Reply::Version {
                        version,
                        extensions,
                    },
                ));
            }
            STATUS => Reply::Status(Status {
                code: Code::from_number(fields.u32()?),
                message: fields.string().unwrap_or_default().to_vec(),
            }),
            HANDLE => Reply::Handle(fields.string()?.to_vec()),
            DATA => {
                let len = fields.string()?.len();
                // Type, id and length stand before the bytes.
                let start = 1 + 4 + 4;
                Reply::Data(Data {
                    packet,
                    start,
                    end: start + len,
                })
            }
            NAME => Reply::Names(decode_names(&mut fields)?),
            ATTRS => Reply::Attributes(Attributes::decode(&mut fields)?),
            EXTENDED_REPLY => Reply::Extended(fields.rest().to_vec()),
            other => return Err(Malformed::Type(other)),
        };
        Ok((id_or_version, reply))
    }

    /// Appends the whole packet with its length. [`Malformed::TooLong`] leaves `out` as it was.
    pub fn encode(&self, id: u32, out: &mut Vec<u8>) -> Result<(), Malformed> {
        put_packet(out, 0, |out| {
            out.push(self.kind());
            match self {
                Reply::Version { version, .. } => put_u32(out, *version),
                _ => put_u32(out, id),
            }
            self.encode_body(out)
        })
    }

    fn encode_body(&self, out: &mut Vec<u8>) -> Result<(), Malformed> {
        match self {
            Reply::Version { extensions, .. } => {
                for (name, data) in extensions {
                    put_string(out, name)?;
                    put_string(out, data)?;
                }
                Ok(())
            }
            Reply::Status(status) => {
                put_u32(out, status.code.number());
                put_string(out, &status.message)?;
                put_string(out, b"en")
            }
            Reply::Handle(handle) => put_string(out, handle),
            Reply::Data(data) => put_string(out, data.bytes()),
            Reply::Names(names) => {
                put_len(out, names.len())?;
                for name in names {
                    put_string(out, &name.name)?;
                    put_string(out, &name.long_name)?;
                    name.attributes.encode(out)?;
                }
                Ok(())
            }
            Reply::Attributes(attributes) => attributes.encode(out),
            Reply::Extended(data) => {
                out.extend_from_slice(data);
                Ok(())
            }
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Reply::Version { .. } => VERSION,
            Reply::Status(_) => STATUS,
            Reply::Handle(_) => HANDLE,
            Reply::Data(_) => DATA,
            Reply::Names(_) => NAME,
            Reply::Attributes(_) => ATTRS,
            Reply::Extended(_) => EXTENDED_REPLY,
        }
    }

    /// What kind of packet it is, for messages.
    pub fn noun(&self) -> &'static str {
        match self {
            Reply::Version { .. } => "VERSION",
            Reply::Status(_) => "STATUS",
            Reply::Handle(_) => "HANDLE",
            Reply::Data(_) => "DATA",
            Reply::Names(_) => "NAME",
            Reply::Attributes(_) => "ATTRS",
            Reply::Extended(_) => "EXTENDED_REPLY",
        }
    }
}

fn decode_names(fields: &mut Fields<'_>) -> Result<Vec<Name>, Malformed> {
    let mut names = Vec::new();
    // No capacity from the count: it is the sender's word alone.
    for _ in 0..fields.u32()? {
        names.push(Name {
            name: fields.string()?.to_vec(),
            long_name: fields.string()?.to_vec(),
            attributes: Attributes::decode(fields)?,
        });
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..40)
    }

    fn reply() -> impl Strategy<Value = Reply> {
        let named = (bytes(), bytes(), any::<Option<u64>>()).prop_map(|(name, long_name, size)| {
            let attributes = Attributes {
                size,
                ..Attributes::default()
            };
            Name {
                name,
                long_name,
                attributes,
            }
        });
        let status = (any::<u32>(), bytes()).prop_map(|(code, message)| Status {
            code: Code::from_number(code),
            message,
        });
        prop_oneof![
            status.prop_map(Reply::Status),
            bytes().prop_map(Reply::Handle),
            bytes().prop_map(|data| Reply::Data(data.into())),
            prop::collection::vec(named, 0..4).prop_map(Reply::Names),
            any::<u64>().prop_map(|size| Reply::Attributes(Attributes::with_size(size))),
            bytes().prop_map(Reply::Extended),
        ]
    }

    proptest! {
        #[test]
        fn every_reply_comes_back(reply in reply(), id in any::<u32>()) {
            let mut wire = Vec::new();
            reply.encode(id, &mut wire).expect("short");
            prop_assert_eq!(Reply::decode(wire[4..].to_vec()), Ok((id, reply)));
        }

        #[test]
        fn a_version_comes_back(extensions in prop::collection::vec((bytes(), bytes()), 0..4)) {
            let reply = Reply::Version { version: 3, extensions };
            let mut wire = Vec::new();
            reply.encode(9, &mut wire).expect("short");
            prop_assert_eq!(Reply::decode(wire[4..].to_vec()), Ok((0, reply)));
        }

        #[test]
        fn no_bytes_upset_it(packet in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Reply::decode(packet);
        }

        #[test]
        fn no_packet_of_a_known_type_upsets_it(
            kind in prop::sample::select(vec![2_u8, 101, 102, 103, 104, 105, 201]),
            mut packet in prop::collection::vec(prop_oneof![0..4_u8, any::<u8>()], 0..60),
        ) {
            packet.insert(0, kind);
            if let Ok((_, Reply::Data(data))) = Reply::decode(packet.clone()) {
                prop_assert!(data.bytes().len() < packet.len());
            }
        }
    }

    #[test]
    fn a_status_without_words_is_one() {
        let packet = vec![101, 0, 0, 0, 5, 0, 0, 0, 2];
        let status = Status::new(Code::NoSuchFile, "");
        assert_eq!(Reply::decode(packet), Ok((5, Reply::Status(status))));
    }

    #[test]
    fn a_count_without_entries_costs_nothing() {
        let packet = vec![104, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(Reply::decode(packet), Err(Malformed::Truncated));
    }
}
