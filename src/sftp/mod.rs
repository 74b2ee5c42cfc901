//! SFTP version 3: packets in both directions, and the client's side of the conversation. Bytes
//! in, bytes out; no I/O and no clock.
//!
//! Sources: draft-ietf-secsh-filexfer-02, and for the extensions and the differences that
//! OpenSSH made law its file `PROTOCOL`, section 4.

pub mod attributes; //   size, owner, mode and times of a file
pub mod conversation; // the client: version, request ids, who waits for what
pub mod extension; //    what OpenSSH added
pub mod frame; //        where a packet ends, and what is no packet at all
pub mod reply; //        packets from the server
pub mod request; //      packets to the server
pub mod status; //       the server's verdicts
mod wire; //             numbers and strings on the wire

pub use attributes::{Attributes, OpenFlags};
pub use conversation::{Conversation, Event, Violation};
pub use extension::{Extended, Extension, Extensions, Limits, StatVfs};
pub use reply::{Data, Name, Reply};
pub use request::Request;
pub use status::{Code, Status};
pub use wire::Malformed;

/// The only version spoken here (draft section 4).
pub const VERSION: u32 = 3;
