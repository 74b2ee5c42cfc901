//! The smallest sound image, the same in every run, and ways to spoil it.

use std::ops::Range;
use std::sync::OnceLock;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use e2ebak::error::{Error, Kind, Result};
use e2ebak::luks::kdf::{Costs, Kdf};
use e2ebak::luks::{Format, Header};
use e2ebak::secret::Secret;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::input::Input;

pub const PASSPHRASE: &[u8] = b"correct horse";
/// Bytes of one copy of the header, and where the secondary one is.
pub const COPY: usize = 16 << 10;
const BINARY: usize = 4096;
/// Longest JSON text of a copy.
pub const JSON_MAX: usize = COPY - BINARY - 1;
/// Where the one keyslot's area begins, and where the volume does.
pub const AREA: usize = 2 * COPY;
const VOLUME: usize = AREA + (252 << 10);
pub const SIZE: usize = VOLUME + (96 << 10);
const CHECKSUM: Range<usize> = 448..512;
/// Few enough for thousands of runs a second.
const DIGEST_ITERATIONS: u32 = 10;

pub const COSTS: Costs = Costs {
    memory_kib: 32,
    time: 4,
    lanes: 1,
};

struct Sample {
    image: Vec<u8>,
    volume_key: Vec<u8>,
}

fn sample() -> &'static Sample {
    static SAMPLE: OnceLock<Sample> = OnceLock::new();
    SAMPLE.get_or_init(|| {
        let uuid = "6f3c1dd6-0f04-4c1e-8a43-6d5a3c1b2e90";
        let mut format = Format::new(SIZE as u64, uuid, COSTS);
        format.segment_offset = VOLUME as u64;
        let passphrase = Secret::new(PASSPHRASE.to_vec());
        let made = format.make(&passphrase, &mut noise()).expect("makes");
        let volume_key = made.volume_key.bytes().to_vec();
        let mut image = vec![0; SIZE];
        for write in &made.writes {
            image[write.offset as usize..][..write.bytes.len()].copy_from_slice(&write.bytes);
        }
        let mut metadata = made.header.json().clone();
        metadata["digests"]["0"] = digest(&volume_key, DIGEST_ITERATIONS);
        for at in [0, COPY] {
            put_json(&mut image, at, metadata.to_string().as_bytes());
        }
        Sample { image, volume_key }
    })
}

/// A fresh copy of the whole image.
pub fn image() -> Vec<u8> {
    sample().image.clone()
}

pub fn volume_key() -> &'static [u8] {
    &sample().volume_key
}

/// A digest of the volume key.
fn digest(key: &[u8], iterations: u32) -> Value {
    let mut sum = [0; 32];
    pbkdf2::pbkdf2_hmac::<Sha256>(key, &[7; 32], iterations, &mut sum);
    json!({"type": "pbkdf2", "keyslots": ["0"], "segments": ["0"], "hash": "sha256",
        "iterations": iterations, "salt": BASE64_STANDARD.encode([7; 32]),
        "digest": BASE64_STANDARD.encode(sum)})
}

/// Bytes that look random and are the same in every run.
fn noise() -> impl FnMut(&mut [u8]) -> Result<()> {
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

/// Reads from bytes. The code under test has promised not to reach beyond them.
pub fn reader(image: &[u8]) -> impl FnMut(u64, &mut [u8]) -> Result<()> {
    move |offset, out| {
        let at = usize::try_from(offset).expect("within the image");
        out.copy_from_slice(&image[at..at + out.len()]);
        Ok(())
    }
}

/// Gives the copy at `at` the right checksum, if it may have one over SHA-256.
pub fn reseal(image: &mut [u8], at: usize) {
    image[at..][CHECKSUM].fill(0);
    let sum = Sha256::digest(&image[at..at + COPY]);
    image[at..][CHECKSUM][..32].copy_from_slice(&sum);
}

/// Replaces the JSON text of the copy at `at`.
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

/// Overwrites places of the image within `bounds` as the input says. Its first byte: how many
/// places, and in the upper bits which copies get a right checksum afterwards.
pub fn spoil(image: &mut [u8], bounds: Range<usize>, input: &mut Input) {
    let control = input.u8();
    for _ in 0..control & 0x3f {
        let at = bounds.start + input.u32() as usize % bounds.len();
        let bytes = input.string();
        let end = (at + bytes.len()).min(bounds.end);
        image[at..end].copy_from_slice(&bytes[..end - at]);
    }
    if control & 0x40 != 0 {
        reseal(image, 0);
    }
    if control & 0x80 != 0 {
        reseal(image, COPY);
    }
}

/// What trying the keyslots of a header would cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Price {
    /// Under a millisecond or so.
    Cheap,
    /// Must be refused.
    Refused,
    /// Would be paid, but not thousands of times a second.
    Dear,
}

/// The bounds that `luks/kdf.rs` promises, said once more.
fn price(kdf: &Kdf) -> Price {
    match kdf {
        Kdf::Pbkdf2 { iterations, .. } => price_of_iterations((*iterations).into()),
        Kdf::Argon2 { costs, .. } => {
            let (memory, time) = (u64::from(costs.memory_kib), u64::from(costs.time));
            let absurd = memory > 4 << 20
                || memory * time > 1 << 30
                || time == 0
                || !(1..=16).contains(&costs.lanes)
                || memory < 8 * u64::from(costs.lanes);
            match absurd {
                true => Price::Refused,
                false if memory * time <= 1024 => Price::Cheap,
                false => Price::Dear,
            }
        }
    }
}

fn price_of_iterations(iterations: u64) -> Price {
    match iterations {
        1..=1000 => Price::Cheap,
        0 | 500_000_001.. => Price::Refused,
        _ => Price::Dear,
    }
}

/// The price of the digest, and of each keyslot that can be tried.
pub fn prices(header: &Header) -> Vec<Price> {
    let iterations = &header.json()["digests"][header.digest().id().to_string()]["iterations"];
    let digest = iterations.as_u64().map(price_of_iterations);
    let locks = header.keyslots().iter().filter_map(|slot| slot.lock().ok());
    let slots = locks.map(|lock| price(lock.kdf()));
    digest.into_iter().chain(slots).collect()
}

/// A read that fails, for a header that must not be read any further.
pub fn no_read(offset: u64, _: &mut [u8]) -> Result<()> {
    Err(Error::new(Kind::Io, format!("offset {offset} was read")))
}
