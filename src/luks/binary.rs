//! The binary header: the first 4 KiB of each copy (specification section 2.1).
//!
//! It tells the size of the copy, which of two copies is newer, and the checksum over the copy.

use crate::secret::same_bytes;

use super::fault::{Fault, corrupt, shown};
use super::hash::Hash;

/// Size of the binary header in bytes; the JSON area follows it.
pub(super) const BINARY_SIZE: usize = 4096;

/// Sizes in bytes that a copy (binary header and JSON area) may have, which are also the offsets
/// at which the secondary copy may be found (specification section 2.2).
pub(super) const HEADER_SIZES: [u64; 9] = [
    0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000,
];

pub(super) const LABEL_SIZE: usize = 48;
pub(super) const SALT_SIZE: usize = 64;
const UUID_SIZE: usize = 40;

const VERSION_AT: usize = 6;
const HEADER_SIZE_AT: usize = 8;
const SEQUENCE_AT: usize = 16;
const LABEL_AT: usize = 24;
const CHECKSUM_NAME_AT: usize = 72;
const CHECKSUM_NAME_SIZE: usize = 32;
const SALT_AT: usize = 104;
const UUID_AT: usize = 168;
const SUBSYSTEM_AT: usize = 208;
const OFFSET_AT: usize = 256;
const CHECKSUM_AT: usize = 448;
const CHECKSUM_SIZE: usize = 64;

/// One of the two copies of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderCopy {
    Primary,
    Secondary,
}

impl HeaderCopy {
    fn magic(self) -> &'static [u8; 6] {
        match self {
            HeaderCopy::Primary => b"LUKS\xba\xbe",
            HeaderCopy::Secondary => b"SKUL\xba\xbe",
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            HeaderCopy::Primary => "primary",
            HeaderCopy::Secondary => "secondary",
        }
    }
}

/// So many bytes from the start of an image hold the UUID.
pub const HEAD_BYTES: usize = 512;

/// The UUID of the primary header that begins with `head`, unchecked: it tells images apart.
/// `None` when no header begins there.
pub fn uuid_of(head: &[u8]) -> Option<String> {
    if head.len() < HEAD_BYTES || !head.starts_with(HeaderCopy::Primary.magic()) {
        return None;
    }
    Some(shown(&String::from_utf8_lossy(&text(
        head, UUID_AT, UUID_SIZE,
    ))))
}

/// The fields of a binary header, but for magic, version, offset and checksum, which say where it
/// lies and that it is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Binary {
    /// Bytes of the whole copy.
    pub header_size: u64,
    pub sequence_id: u64,
    pub label: Vec<u8>,
    pub uuid: Vec<u8>,
    pub subsystem: Vec<u8>,
    pub salt: [u8; SALT_SIZE],
    checksum: Hash,
}

impl Binary {
    pub(super) fn new(header_size: u64, sequence_id: u64, uuid: &str, salt: [u8; 64]) -> Self {
        Binary {
            header_size,
            sequence_id,
            label: Vec::new(),
            uuid: uuid.as_bytes().to_vec(),
            subsystem: Vec::new(),
            salt,
            checksum: Hash::Sha256,
        }
    }

    /// Judges the 4 KiB read at `offset`. The checksum is judged by [`Binary::verify`].
    pub(super) fn parse(bytes: &[u8], copy: HeaderCopy, offset: u64) -> Result<Binary, Fault> {
        if bytes.len() < BINARY_SIZE || !bytes.starts_with(copy.magic()) {
            return Err(Fault::NoMagic);
        }
        let version = u16::from_be_bytes([bytes[VERSION_AT], bytes[VERSION_AT + 1]]);
        if version != 2 {
            return Err(Fault::Version(version));
        }
        let header_size = number(bytes, HEADER_SIZE_AT);
        if !HEADER_SIZES.contains(&header_size) {
            return Err(corrupt(format!(
                "its size of {header_size} bytes is none that LUKS2 knows"
            )));
        }
        let own_offset = number(bytes, OFFSET_AT);
        if own_offset != offset {
            return Err(corrupt(format!(
                "it lies at offset {offset} but says {own_offset}"
            )));
        }
        if copy == HeaderCopy::Secondary && header_size != offset {
            return Err(corrupt(format!(
                "it lies at offset {offset} but its size is {header_size} bytes"
            )));
        }
        let name = text(bytes, CHECKSUM_NAME_AT, CHECKSUM_NAME_SIZE);
        let name = String::from_utf8_lossy(&name);
        let checksum = Hash::from_name(&name).ok_or_else(|| {
            corrupt(format!(
                "its checksum algorithm {} is unknown",
                shown(&name)
            ))
        })?;
        let mut salt = [0; SALT_SIZE];
        salt.copy_from_slice(&bytes[SALT_AT..SALT_AT + SALT_SIZE]);
        Ok(Binary {
            header_size,
            sequence_id: number(bytes, SEQUENCE_AT),
            label: text(bytes, LABEL_AT, LABEL_SIZE),
            uuid: text(bytes, UUID_AT, UUID_SIZE),
            subsystem: text(bytes, SUBSYSTEM_AT, LABEL_SIZE),
            salt,
            checksum,
        })
    }

    /// Compares the checksum over the whole copy, binary header and JSON area.
    pub(super) fn verify(&self, whole: &[u8]) -> Result<(), Fault> {
        let stored = &whole[CHECKSUM_AT..CHECKSUM_AT + self.checksum.size()];
        match same_bytes(stored, &self.sum(whole)) {
            true => Ok(()),
            false => Err(corrupt(format!(
                "its {} checksum does not match",
                self.checksum.name()
            ))),
        }
    }

    /// The copy as it is stored: binary header with checksum, then the JSON padded with zeros.
    /// `None` if the JSON does not fit with at least one zero byte after it.
    pub(super) fn encode(&self, copy: HeaderCopy, json: &[u8]) -> Option<Vec<u8>> {
        let size = usize::try_from(self.header_size).ok()?;
        if json.len() >= size.checked_sub(BINARY_SIZE)? {
            return None;
        }
        let offset = match copy {
            HeaderCopy::Primary => 0,
            HeaderCopy::Secondary => self.header_size,
        };
        let mut whole = vec![0; size];
        let mut put = |at: usize, bytes: &[u8]| whole[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, copy.magic());
        put(VERSION_AT, &2_u16.to_be_bytes());
        put(HEADER_SIZE_AT, &self.header_size.to_be_bytes());
        put(SEQUENCE_AT, &self.sequence_id.to_be_bytes());
        put(LABEL_AT, terminated(&self.label, LABEL_SIZE)?);
        put(CHECKSUM_NAME_AT, self.checksum.name().as_bytes());
        put(SALT_AT, &self.salt);
        put(UUID_AT, terminated(&self.uuid, UUID_SIZE)?);
        put(SUBSYSTEM_AT, terminated(&self.subsystem, LABEL_SIZE)?);
        put(OFFSET_AT, &offset.to_be_bytes());
        put(BINARY_SIZE, json);
        let sum = self.sum(&whole);
        whole[CHECKSUM_AT..CHECKSUM_AT + sum.len()].copy_from_slice(&sum);
        Some(whole)
    }

    /// The checksum is taken with its own field zeroed.
    fn sum(&self, whole: &[u8]) -> Vec<u8> {
        let before = &whole[..CHECKSUM_AT];
        let after = &whole[CHECKSUM_AT + CHECKSUM_SIZE..];
        self.checksum
            .of(&[before, &[0; CHECKSUM_SIZE], after])
            .to_vec()
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(field)
}

/// A text field up to its NUL; as cryptsetup does, the last byte always counts as NUL.
fn text(bytes: &[u8], at: usize, size: usize) -> Vec<u8> {
    let field = &bytes[at..at + size - 1];
    let len = field.iter().position(|&byte| byte == 0);
    field[..len.unwrap_or(field.len())].to_vec()
}

fn terminated(text: &[u8], size: usize) -> Option<&[u8]> {
    (text.len() < size && !text.contains(&0)).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Binary {
        let mut binary = Binary::new(0x4000, 5, "17cc91c9-8273-43fe-b28c-2bc15e4506e7", [9; 64]);
        binary.label = b"photos".to_vec();
        binary.subsystem = b"e2ebak".to_vec();
        binary
    }

    #[test]
    fn both_copies_are_read_as_they_were_written() {
        for (copy, offset) in [(HeaderCopy::Primary, 0), (HeaderCopy::Secondary, 0x4000)] {
            let whole = sample().encode(copy, b"{}").expect("fits");
            assert_eq!(whole.len(), 0x4000);
            let back = Binary::parse(&whole[..BINARY_SIZE], copy, offset).expect("parses");
            assert_eq!(back, sample());
            assert_eq!(back.verify(&whole), Ok(()));
        }
    }

    #[test]
    fn a_copy_is_only_good_in_its_own_place() {
        let whole = sample().encode(HeaderCopy::Secondary, b"{}").expect("fits");
        assert!(Binary::parse(&whole, HeaderCopy::Secondary, 0x8000).is_err());
        assert_eq!(
            Binary::parse(&whole, HeaderCopy::Primary, 0x4000),
            Err(Fault::NoMagic)
        );
    }

    #[test]
    fn every_bit_that_the_checksum_covers_matters() {
        let whole = sample().encode(HeaderCopy::Primary, b"{}").expect("fits");
        for at in [16, 30, 110, 300, 450, 600, 4095, 4096, 0x3fff] {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            let verdict = Binary::parse(&bad, HeaderCopy::Primary, 0).and_then(|b| b.verify(&bad));
            assert!(verdict.is_err(), "byte {at}");
        }
    }

    #[test]
    fn what_does_not_fit_is_not_encoded() {
        let json = vec![b' '; 0x3000];
        assert_eq!(sample().encode(HeaderCopy::Primary, &json), None);
        assert!(sample().encode(HeaderCopy::Primary, &json[1..]).is_some());
        let mut long = sample();
        long.label = vec![b'x'; 48];
        assert_eq!(long.encode(HeaderCopy::Primary, b"{}"), None);
    }
}
