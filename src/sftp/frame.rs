//! Where a packet ends, and what is no packet at all.
//!
//! Every packet is preceded by its length in 32 bits (draft section 3). A login shell whose
//! start-up files print something puts text where the first length belongs; since no packet is
//! longer than [`PACKET_MAX`], the first byte of a length is zero and text gives itself away.

use std::fmt;

/// The longest packet taken or sent, in bytes without its length. OpenSSH's server takes and
/// sends at most 256 KiB; others are known to send more.
pub const PACKET_MAX: usize = 1 << 20;

/// How much of a text printed by the server is shown.
pub const TEXT_MAX: usize = 200;

/// Four bytes that are not the length of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotALength {
    /// The stream begins with text.
    Text,
    /// No packet has this many bytes.
    Bytes(u32),
}

impl fmt::Display for NotALength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotALength::Text => f.write_str("text instead of a packet"),
            NotALength::Bytes(len) => {
                write!(f, "a packet of {len} bytes; {PACKET_MAX} is the most")
            }
        }
    }
}

/// The length of the packet that follows these four bytes. `first`: nothing came before them.
pub fn length(bytes: [u8; 4], first: bool) -> Result<usize, NotALength> {
    let len = u32::from_be_bytes(bytes);
    let looks_like_text = |byte: u8| byte.is_ascii_graphic() || matches!(byte, 9..=13 | 27 | 32);
    if first && looks_like_text(bytes[0]) {
        return Err(NotALength::Text);
    }
    // A packet has at least a type.
    match len as usize {
        len @ 1..=PACKET_MAX => Ok(len),
        _ => Err(NotALength::Bytes(len)),
    }
}

/// Bytes from the server as a person may see them: no control characters, no more than
/// [`TEXT_MAX`] characters.
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let shown = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut words = shown.take(TEXT_MAX).collect::<String>();
    words.truncate(words.trim_end().len());
    words.trim_start().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_told_from_a_length() {
        assert_eq!(length(*b"Welc", true), Err(NotALength::Text));
        assert_eq!(length(*b"\nHi\n", true), Err(NotALength::Text));
        assert_eq!(length(*b"\x1b[0m", true), Err(NotALength::Text));
        assert_eq!(
            length(*b"Welc", false),
            Err(NotALength::Bytes(0x5765_6c63)),
            "later it is a broken stream"
        );
    }

    #[test]
    fn lengths_are_bounded_on_both_sides() {
        assert_eq!(length([0, 0, 0, 1], true), Ok(1));
        assert_eq!(length([0, 0x10, 0, 0], false), Ok(PACKET_MAX));
        assert_eq!(length([0; 4], true), Err(NotALength::Bytes(0)));
        assert_eq!(
            length([0, 0x10, 0, 1], false),
            Err(NotALength::Bytes(0x10_0001))
        );
        assert_eq!(length([0xff; 4], true), Err(NotALength::Bytes(u32::MAX)));
    }

    #[test]
    fn what_the_server_says_cannot_steer_a_terminal() {
        assert_eq!(printable(b"\x1b[2Jhello\r\n\n"), "[2Jhello");
        assert_eq!(printable(&[b'a'; 999]).len(), TEXT_MAX);
    }
}
