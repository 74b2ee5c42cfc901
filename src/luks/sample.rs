//! A small image for unit tests, made once, and ways to change its header precisely.

use std::sync::OnceLock;

use serde_json::Value;

use crate::secret::Secret;

use super::binary::{BINARY_SIZE, Binary, HeaderCopy};
use super::format::{Format, Formatted};
use super::json;
use super::kdf::Costs;

pub const PASSPHRASE: &[u8] = b"correct horse";
const IMAGE_SIZE: usize = 17 << 20;

/// The format behind [`image`].
pub fn format() -> Format {
    let costs = Costs {
        memory_kib: 32,
        time: 4,
        lanes: 1,
    };
    let uuid = "6f3c1dd6-0f04-4c1e-8a43-6d5a3c1b2e90";
    let mut format = Format::new(IMAGE_SIZE as u64, uuid, costs);
    format.label = "sample".into();
    format
}

/// Bytes that look random and are the same in every run.
pub fn noise() -> impl FnMut(&mut [u8]) -> crate::error::Result<()> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    move |out| {
        for byte in out {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = (state >> 24) as u8;
        }
        Ok(())
    }
}

pub fn make(format: &Format) -> Formatted {
    let passphrase = Secret::new(PASSPHRASE.to_vec());
    format.make(&passphrase, &mut noise()).expect("makes")
}

/// The whole image.
pub fn image() -> Vec<u8> {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    let made = IMAGE.get_or_init(|| {
        let mut image = vec![0; IMAGE_SIZE];
        for write in make(&format()).writes {
            let at = write.offset as usize;
            image[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
        }
        image
    });
    made.clone()
}

fn offset(copy: HeaderCopy) -> usize {
    match copy {
        HeaderCopy::Primary => 0,
        HeaderCopy::Secondary => 0x4000,
    }
}

fn rewrite(image: &mut [u8], copy: HeaderCopy, change: impl FnOnce(&mut Binary, &mut Value)) {
    let at = offset(copy);
    let mut binary = Binary::parse(&image[at..], copy, at as u64).expect("sound");
    let mut metadata = json::parse(&image[at + BINARY_SIZE..at + 0x4000]).expect("sound");
    change(&mut binary, &mut metadata);
    let bytes = binary.encode(copy, metadata.to_string().as_bytes());
    image[at..at + 0x4000].copy_from_slice(&bytes.expect("fits"));
}

/// Gives one copy another sequence id and the right checksum.
pub fn renumber(image: &mut [u8], copy: HeaderCopy, sequence_id: u64) {
    rewrite(image, copy, |binary, _| binary.sequence_id = sequence_id);
}

/// Changes the metadata of one copy and gives it the right checksum.
pub fn edit(image: &mut [u8], copy: HeaderCopy, change: impl FnOnce(&mut Value)) {
    rewrite(image, copy, |_, metadata| change(metadata));
}
