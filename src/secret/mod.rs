//! Bytes that are wiped when dropped, kept out of core dumps and swap, and cannot be printed.

mod pages;

use std::fmt;
use std::io::Read;

use zeroize::Zeroize;

pub(crate) use pages::{Guarded, Pages, Use};

use crate::error::{Error, Kind, Result};

/// A passphrase or key. It has no `Clone`, no useful `Debug` and no `Display`.
pub struct Secret {
    pages: Pages,
    /// Bytes of it that count.
    len: usize,
}

impl Secret {
    /// Takes the bytes over and wipes where they were.
    pub fn new(mut bytes: Vec<u8>) -> Self {
        let mut secret = Secret::zeroed(bytes.len());
        secret.bytes_mut().copy_from_slice(&bytes);
        bytes.zeroize();
        secret
    }

    /// Zeros to be filled in place.
    pub fn zeroed(len: usize) -> Self {
        let pages = Pages::zeroed(len, Use::Key).unwrap_or_else(|_| pages::no_memory());
        Secret { pages, len }
    }

    /// Reads to the end, `max` bytes at most; more is [`Kind::Usage`].
    pub fn read(from: impl Read, max: u64) -> Result<Self> {
        let mut from = from.take(max + 1);
        let mut secret = Secret::zeroed(4096);
        let mut len = 0;
        loop {
            if len == secret.len() {
                // A vector that grows by itself would leave copies behind.
                let mut larger = Secret::zeroed(2 * len);
                larger.bytes_mut()[..len].copy_from_slice(secret.bytes());
                secret = larger;
            }
            match from.read(&mut secret.bytes_mut()[len..])? {
                0 => break,
                got => len += got,
            }
        }
        if len as u64 > max {
            return Err(Error::new(
                Kind::Usage,
                format!("it is longer than {max} bytes"),
            ));
        }
        secret.len = len;
        Ok(secret)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.pages.bytes()[..self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.pages.bytes_mut()[..self.len]
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes one newline off the end, as editors and `echo` put it there.
    pub fn strip_newline(&mut self) {
        if self.bytes().last() == Some(&b'\n') {
            self.len -= 1;
        }
    }

    /// Compares in a time that depends on the lengths only.
    pub fn same_as(&self, other: &[u8]) -> bool {
        same_bytes(self.bytes(), other)
    }
}

/// Compares in a time that depends on the lengths only.
pub fn same_bytes(a: &[u8], b: &[u8]) -> bool {
    let differing = a.iter().zip(b).fold(0, |bits, (x, y)| bits | (x ^ y));
    a.len() == b.len() && std::hint::black_box(differing) == 0
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Secret::new(text.into_bytes())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Wipes a buffer that held a secret on its way in.
pub fn wipe(buf: &mut [u8]) {
    buf.zeroize();
}

/// Runs `work` and wipes what it and what it called left on the stack, as far as that is deep:
/// round keys and hash states pass through there on their way.
pub(crate) fn with_clean_stack<T>(work: impl FnOnce() -> T) -> T {
    const DEPTH: usize = 16 << 10;
    /// A frame of its own, which lies where the one of `zeroize_stack` will.
    #[inline(never)]
    fn apart<T>(work: impl FnOnce() -> T) -> T {
        work()
    }
    let result = apart(work);
    zeroize::zeroize_stack::<DEPTH>();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_tells_nothing() {
        assert_eq!(
            format!("{:?}", Secret::new(b"hunter2".to_vec())),
            "Secret(..)"
        );
    }

    #[test]
    fn reading_is_whole_and_bounded() {
        let long = vec![7; 10_000];
        assert_eq!(Secret::read(&long[..], 10_000).expect("read").bytes(), long);
        assert_eq!(Secret::read(&b""[..], 5).expect("read").bytes(), b"");
        assert_eq!(
            Secret::read(std::io::repeat(7), 9_999).unwrap_err().kind(),
            Kind::Usage
        );
    }

    #[test]
    fn exactly_one_newline_is_stripped() {
        let mut secret = Secret::new(b"a\n\n".to_vec());
        secret.strip_newline();
        assert_eq!(secret.bytes(), b"a\n");
    }

    #[test]
    fn comparison_minds_length_and_content() {
        assert!(same_bytes(b"ab", b"ab"));
        assert!(!same_bytes(b"ab", b"ac") && !same_bytes(b"ab", b"abc") && !same_bytes(b"", b"a"));
    }
}
