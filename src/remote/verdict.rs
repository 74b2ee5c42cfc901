//! What a reply means for us: the values that were asked for, or an [`Error`].

use crate::error::{Error, Kind, Result};
use crate::sftp::frame::printable;
use crate::sftp::{Attributes, Code, Reply, Status};

/// The longest handle, in bytes (draft-ietf-secsh-filexfer-02, section 6.3).
const HANDLE_MAX: usize = 256;

/// The error that a status stands for.
pub fn status_error(status: &Status) -> Error {
    let (kind, meaning) = match status.code {
        Code::NoSuchFile => (Kind::NotFound, "no such file or directory"),
        Code::PermissionDenied => (Kind::Denied, "permission denied"),
        Code::OpUnsupported => (Kind::Unsupported, "the server cannot do this"),
        Code::NoConnection | Code::ConnectionLost => {
            (Kind::Disconnected, "the server lost its connection")
        }
        Code::Eof => (Kind::Io, "end of file"),
        Code::BadMessage => (Kind::Io, "the server takes the request for malformed"),
        Code::Failure => (Kind::Io, "the server says no more than `failure`"),
        Code::Ok => (Kind::Io, "the server says `ok` where a result was due"),
        Code::Other(_) => (Kind::Io, "the server gives an unknown status"),
    };
    let said = printable(&status.message);
    let number = status.code.number();
    // OpenSSH's own words repeat the code's name.
    let repeats = said.is_empty() || said.eq_ignore_ascii_case(meaning) || said == "Failure";
    match repeats {
        true => Error::new(kind, format!("{meaning} (SFTP status {number})")),
        false => Error::new(kind, format!("{meaning} (SFTP status {number}: {said})")),
    }
}

/// The error in a reply that is not the result that was asked for. The conversation lets no other
/// reply through than the result and a status.
pub fn refusal(reply: &Reply) -> Error {
    match reply {
        Reply::Status(status) => status_error(status),
        other => Error::new(
            Kind::Disconnected,
            format!("the server answered with a {} packet", other.noun()),
        ),
    }
}

/// For requests that are answered by a status.
pub fn done(reply: &Reply) -> Result<()> {
    match reply {
        Reply::Status(status) if status.code == Code::Ok => Ok(()),
        other => Err(refusal(other)),
    }
}

/// A handle is in every request, so its length is one of the bounds of memory.
pub fn handle(reply: Reply) -> Result<Vec<u8>> {
    match reply {
        Reply::Handle(handle) if handle.len() > HANDLE_MAX => Err(Error::new(
            Kind::Unsupported,
            format!(
                "the server gave a handle of {} bytes, and SFTP allows {HANDLE_MAX}",
                handle.len()
            ),
        )),
        Reply::Handle(handle) => Ok(handle),
        other => Err(refusal(&other)),
    }
}

pub fn attributes(reply: Reply) -> Result<Attributes> {
    match reply {
        Reply::Attributes(attributes) => Ok(attributes),
        other => Err(refusal(&other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_has_a_bound() {
        assert_eq!(handle(Reply::Handle(vec![7; 256])).ok(), Some(vec![7; 256]));
        assert!(handle(Reply::Handle(vec![7; 257])).is_err());
    }
}
