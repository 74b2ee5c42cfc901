//! What the command and its session process say to each other over a socket pair.
//!
//! Frames: a 32-bit little-endian length and that many bytes of JSON. A key travels as raw bytes
//! in a frame of its own, so that it never passes through a text buffer.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Attempt, Error, Kind, Result, Told};
use crate::host::Private;
use crate::image::LinkSettings;
use crate::progress::{LinkState, Progress};
use crate::secret::Secret;

/// No message of ours comes near it; a key file may be as large as cryptsetup takes, 8 MiB.
const FRAME_MAX: u32 = 8 << 20;

/// What a session is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    pub location: String,
    pub link: LinkSettings,
    pub read_only: bool,
    /// How long to wait for somebody else's lease.
    pub wait: Duration,
    pub place: Place,
}

/// Where the filesystem appears.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Place {
    /// In the command's private mount namespace.
    Private(Private),
    /// At a mountpoint that everybody sees.
    Public(PathBuf),
}

/// From the command to the session.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// A key follows in a frame of its own.
    Key,
    /// There will be no key.
    NoKey,
    /// Go on without me.
    Detach,
    /// Unmount, drain, sync, release the lease.
    Close,
    /// The same, though files are open.
    Force,
    /// End at once; what is not synced is left to the journal.
    Abandon,
}

/// From the session to the command.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    NeedKey,
    /// That key opens nothing.
    WrongKey(Told),
    Note(String),
    Warning(String),
    Phase(String),
    /// Mounted here.
    Ready(PathBuf),
    Status(Status),
    /// The server has no room left but what an orderly end needs.
    Full(Told),
    Done(Status),
    Failed(Told),
}

/// Figures of a running session, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Accepted and not yet written to the server.
    pub owed: u64,
    pub sent: u64,
    pub received: u64,
    /// It is being dialled again.
    pub link_down: Option<LinkDown>,
}

impl Status {
    /// As far as it is worth showing while a job runs.
    pub fn progress(&self) -> Progress {
        let link = match self.link_down {
            None => LinkState::Up,
            Some(down) => LinkState::Down {
                seconds: down.seconds,
                attempts: down.attempts,
            },
        };
        Progress {
            owed: Some(self.owed),
            sent: Some(self.sent),
            link: Some(link),
            ..Progress::default()
        }
    }
}

/// A link that is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkDown {
    pub seconds: u64,
    /// Dials that have failed since.
    pub attempts: u32,
}

/// Sends one message.
pub fn send(to: &mut impl Write, message: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec(message)
        .map_err(io::Error::from)
        .attempt(|| "encode a message")?;
    send_bytes(to, &json)
}

fn send_bytes(to: &mut impl Write, bytes: &[u8]) -> Result<()> {
    let length = u32::try_from(bytes.len()).ok().filter(|l| *l <= FRAME_MAX);
    let length = length.ok_or_else(|| {
        Error::new(
            Kind::Usage,
            format!(
                "{} bytes are too long for a message of {FRAME_MAX}",
                bytes.len()
            ),
        )
    })?;
    // One write, so that frames of two threads do not mix.
    let mut frame = Secret::zeroed(4 + bytes.len());
    frame.bytes_mut()[..4].copy_from_slice(&length.to_le_bytes());
    frame.bytes_mut()[4..].copy_from_slice(bytes);
    to.write_all(frame.bytes())
        .and_then(|()| to.flush())
        .attempt(|| "talk to the other process")
}

/// Receives one message; `None` when the other end has closed.
pub fn receive<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<T>> {
    let Some(frame) = receive_bytes(from)? else {
        return Ok(None);
    };
    let message = serde_json::from_slice(frame.bytes());
    message
        .map(Some)
        .map_err(io::Error::from)
        .attempt(|| "decode a message of the other process")
}

pub fn send_key(to: &mut impl Write, key: &Secret) -> Result<()> {
    send(to, &Order::Key)?;
    send_bytes(to, key.bytes())
}

/// Receives the frame that follows [`Order::Key`].
pub fn receive_key(from: &mut impl Read) -> Result<Secret> {
    receive_bytes(from)?
        .ok_or_else(|| Error::new(Kind::Interrupted, "the command ended before it gave a key"))
}

fn receive_bytes(from: &mut impl Read) -> Result<Option<Secret>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other.attempt(|| "listen to the other process")?,
    }
    let length = u32::from_le_bytes(length);
    if length > FRAME_MAX {
        return Err(Error::new(
            Kind::Corrupt,
            format!("the other process announced {length} bytes"),
        ));
    }
    let mut frame = Secret::zeroed(length as usize);
    from.read_exact(frame.bytes_mut())
        .attempt(|| "listen to the other process")?;
    Ok(Some(frame))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_keys_cross_unchanged() {
        let mut wire = Vec::new();
        send(&mut wire, &Order::Close).expect("sent");
        send_key(&mut wire, &Secret::new(vec![0, 255, 10])).expect("sent");
        let mut from = &wire[..];
        assert!(matches!(receive(&mut from), Ok(Some(Order::Close))));
        assert!(matches!(receive(&mut from), Ok(Some(Order::Key))));
        assert_eq!(receive_key(&mut from).expect("a key").bytes(), [0, 255, 10]);
        assert!(matches!(receive::<Order>(&mut from), Ok(None)));
    }

    #[test]
    fn a_frame_that_cannot_be_is_an_error() {
        assert!(receive::<Order>(&mut &[255, 255, 255, 255, 1][..]).is_err());
        assert!(receive::<Order>(&mut &[9, 0, 0, 0, b'{'][..]).is_err());
        assert!(receive::<Order>(&mut &[2, 0, 0, 0, b'{', b'x'][..]).is_err());
    }
}
