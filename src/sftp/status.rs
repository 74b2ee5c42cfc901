//! The server's verdicts (draft section 7).

/// A status code. Version 3 knows nine; a server's own number is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Ok,
    Eof,
    NoSuchFile,
    PermissionDenied,
    /// Everything that has no code of its own: no space left, exists already, is a directory.
    Failure,
    BadMessage,
    NoConnection,
    ConnectionLost,
    OpUnsupported,
    Other(u32),
}

impl Code {
    pub fn from_number(number: u32) -> Self {
        match number {
            0 => Code::Ok,
            1 => Code::Eof,
            2 => Code::NoSuchFile,
            3 => Code::PermissionDenied,
            4 => Code::Failure,
            5 => Code::BadMessage,
            6 => Code::NoConnection,
            7 => Code::ConnectionLost,
            8 => Code::OpUnsupported,
            other => Code::Other(other),
        }
    }

    pub fn number(self) -> u32 {
        match self {
            Code::Ok => 0,
            Code::Eof => 1,
            Code::NoSuchFile => 2,
            Code::PermissionDenied => 3,
            Code::Failure => 4,
            Code::BadMessage => 5,
            Code::NoConnection => 6,
            Code::ConnectionLost => 7,
            Code::OpUnsupported => 8,
            Code::Other(number) => number,
        }
    }
}

/// A verdict with the server's own words, which may be empty and are not to be trusted with a
/// terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub code: Code,
    pub message: Vec<u8>,
}

impl Status {
    pub fn new(code: Code, message: &str) -> Self {
        Status {
            code,
            message: message.into(),
        }
    }
}
