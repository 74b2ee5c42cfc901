//! An image of our own making, the same in every run, and ways to break it precisely.

use std::sync::OnceLock;

use e2ebak::error::Result;
use e2ebak::luks::kdf::Costs;
use e2ebak::luks::{self, Format, Formatted, Loaded};
use e2ebak::secret::Secret;
use serde_json::Value;
use sha2::{Digest, Sha256};

pub const PASSPHRASE: &[u8] = b"correct horse";
pub const SIZE: usize = 17 << 20;
/// Bytes of one copy of the header, and where the secondary one is.
pub const COPY: usize = 0x4000;
const BINARY: usize = 4096;
const CHECKSUM: std::ops::Range<usize> = 448..512;

/// The cheapest costs that may be made.
pub fn costs() -> Costs {
    Costs {
        memory_kib: 32,
        time: 4,
        lanes: 1,
    }
}

pub fn format() -> Format {
    Format::new(SIZE as u64, "6f3c1dd6-0f04-4c1e-8a43-6d5a3c1b2e90", costs())
}

/// Bytes that look random and are the same in every run.
pub fn noise() -> impl FnMut(&mut [u8]) -> Result<()> {
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

pub fn laid_out(formatted: &Formatted, size: usize) -> Vec<u8> {
    let mut image = vec![0; size];
    for write in &formatted.writes {
        let at = write.offset as usize;
        image[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
    }
    image
}

/// A fresh copy of the whole image.
pub fn image() -> Vec<u8> {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE
        .get_or_init(|| laid_out(&make(&format()), SIZE))
        .clone()
}

pub fn reader(image: &[u8]) -> impl FnMut(u64, &mut [u8]) -> Result<()> {
    move |offset, out| {
        let at = usize::try_from(offset).expect("within the image");
        out.copy_from_slice(&image[at..at + out.len()]);
        Ok(())
    }
}

pub fn load(image: &[u8]) -> Result<Loaded> {
    luks::load(&mut reader(image), image.len() as u64)
}

pub fn unlock(image: &[u8]) -> Result<(usize, Secret)> {
    let passphrase = Secret::new(PASSPHRASE.to_vec());
    load(image)?.header.unlock(&passphrase, &mut reader(image))
}

/// Gives the copy at `at` the right checksum.
pub fn reseal(image: &mut [u8], at: usize) {
    image[at..][CHECKSUM].fill(0);
    let sum = Sha256::digest(&image[at..at + COPY]);
    image[at..][CHECKSUM][..32].copy_from_slice(&sum);
}

/// Replaces the JSON text of the copy at `at`, up to the end of the area.
pub fn put_json(image: &mut [u8], at: usize, text: &[u8]) {
    let area = &mut image[at + BINARY..at + COPY];
    area.fill(0);
    area[..text.len()].copy_from_slice(text);
    reseal(image, at);
}

pub fn json(image: &[u8], at: usize) -> Value {
    let area = &image[at + BINARY..at + COPY];
    let end = area.iter().position(|&byte| byte == 0).expect("ended");
    serde_json::from_slice(&area[..end]).expect("JSON")
}
