//! Why a header is refused.

use std::fmt;

use crate::error::{Error, Kind};

/// Longest piece of an image that is repeated in a message, in characters.
const SHOWN_MAX: usize = 48;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is no LUKS magic where a header should begin.
    NoMagic,
    /// A LUKS header of another version than 2.
    Version(u16),
    /// The bytes break the specification.
    Corrupt(String),
    /// The header is sound, but the image ends before what the header tells of.
    CutOff(String),
    /// Well formed, but not something that this program can open.
    Unsupported(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::NoMagic => f.write_str("it does not begin with the LUKS magic"),
            Fault::Version(version) => write!(f, "it is of LUKS version {version}"),
            Fault::CutOff(what) => write!(f, "the image is cut off: {what}"),
            Fault::Corrupt(what) | Fault::Unsupported(what) => f.write_str(what),
        }
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NoMagic => Error::new(Kind::Corrupt, format!("not a LUKS2 image: {fault}")),
            Fault::Version(1) => Error::new(Kind::Unsupported, "this is a LUKS1 image, not LUKS2")
                .hint("`cryptsetup convert --type luks2` makes a LUKS2 image of it"),
            Fault::Version(version) => Error::new(
                Kind::Unsupported,
                format!("LUKS version {version} is not supported"),
            ),
            Fault::CutOff(_) => Error::new(Kind::Corrupt, fault.to_string()),
            Fault::Corrupt(what) => Error::new(Kind::Corrupt, what),
            Fault::Unsupported(what) => Error::new(Kind::Unsupported, what),
        }
    }
}

/// A corrupt place in words.
pub(super) fn corrupt(what: impl Into<String>) -> Fault {
    Fault::Corrupt(what.into())
}

/// An unsupported feature in words.
pub(super) fn unsupported(what: impl Into<String>) -> Fault {
    Fault::Unsupported(what.into())
}

/// Text out of an image, fit for a message: in backticks, escaped, and cut to a sane length. The
/// server wrote it, so it could hold terminal escapes.
pub(super) fn shown(text: &str) -> String {
    let mut cut: String = text.chars().take(SHOWN_MAX).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    format!("`{}`", cut.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_an_image_cannot_steer_a_terminal() {
        assert_eq!(shown("aes\u{1b}[2J"), "`aes\\u{1b}[2J`");
        assert_eq!(shown(&"x".repeat(100)), format!("`{}…`", "x".repeat(48)));
    }

    #[test]
    fn every_fault_has_its_kind() {
        assert_eq!(Error::from(Fault::NoMagic).kind(), Kind::Corrupt);
        assert_eq!(Error::from(Fault::Version(1)).kind(), Kind::Unsupported);
        assert_eq!(Error::from(Fault::Version(3)).kind(), Kind::Unsupported);
        assert_eq!(Error::from(corrupt("x")).kind(), Kind::Corrupt);
        let cut_off = Error::from(Fault::CutOff("x".into()));
        assert_eq!(cut_off.report(), "error: the image is cut off: x");
        assert_eq!(Error::from(unsupported("x")).kind(), Kind::Unsupported);
    }
}
