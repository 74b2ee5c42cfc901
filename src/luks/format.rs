//! A new header: the bytes of both copies and of one keyslot, in cryptsetup's default layout.
//!
//! The keyslot's area comes first, then the secondary header, then the primary one. If we die in
//! between, what is there is either no LUKS2 image yet, or a whole one.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::error::{Attempt, Error, Kind, Result};
use crate::secret::Secret;
use crate::xts::{SectorSize, Tweak};

use super::binary::{BINARY_SIZE, Binary, HeaderCopy, LABEL_SIZE, SALT_SIZE as HEADER_SALT_SIZE};
use super::digest::Sum;
use super::hash::Hash;
use super::header::Header;
use super::kdf::{Costs, Kdf, Variant};
use super::keyslot::{AREA_SECTOR, Lock, SALT_SIZE, STRIPES, XTS_KEY_SIZES, new_area_size};
use super::load::load;
use super::segment::ENCRYPTION;
use super::split;
use super::unlock::{area_key, cipher, open_area};

/// Bytes of one copy of a new header.
const HEADER_SIZE: u64 = 16 << 10;
/// Iterations over the volume key for its digest. The key is random, so nobody can guess it; this
/// is what cryptsetup reaches in an eighth of a second.
const DIGEST_ITERATIONS: u32 = 100_000;

/// What a new image is to be like.
#[derive(Clone, Debug)]
pub struct Format {
    /// Bytes of the whole image.
    pub device_size: u64,
    /// In its text form, 36 characters.
    pub uuid: String,
    /// At most 47 bytes; empty for none.
    pub label: String,
    /// At most 47 bytes; empty for none.
    pub subsystem: String,
    pub sector_size: SectorSize,
    /// Where the volume begins, in bytes; keyslot areas fill what is before it.
    pub segment_offset: u64,
    /// Bytes of the volume key: 64 for AES-256-XTS, 32 for AES-128-XTS.
    pub key_size: u32,
    pub costs: Costs,
}

/// Bytes for a place of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    pub offset: u64,
    pub bytes: Vec<u8>,
}

/// A header that has been made and read back, but not yet written.
#[derive(Debug)]
pub struct Formatted {
    /// To be written in this order, each on stable storage before the next. The image must have
    /// its full size and read as zeros elsewhere.
    pub writes: Vec<Write>,
    pub header: Header,
    pub volume_key: Secret,
}

impl Format {
    /// An image with the usual choices: 4096-byte sectors, the volume at 16 MiB, a 512-bit key.
    pub fn new(device_size: u64, uuid: impl Into<String>, costs: Costs) -> Format {
        Format {
            device_size,
            uuid: uuid.into(),
            label: String::new(),
            subsystem: String::new(),
            sector_size: SectorSize::MAX,
            segment_offset: 16 << 20,
            key_size: 64,
            costs,
        }
    }

    /// Makes the header with one keyslot for the passphrase. `random` fills a buffer with random
    /// bytes; volume key, salts and stripes come from it.
    pub fn make(
        &self,
        passphrase: &Secret,
        random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<Formatted> {
        self.check()?;
        let mut volume_key = Secret::zeroed(self.key_size as usize);
        random(volume_key.bytes_mut())?;
        let lock = self.lock(salt(random)?);
        let digest = Sum::new(
            Hash::Sha256,
            DIGEST_ITERATIONS,
            salt(random)?,
            volume_key.bytes(),
        );
        let area_key = area_key(&lock, passphrase)
            .map_err(|why| Error::new(Kind::Usage, format!("keyslot: {why}")))?;
        let area = seal(&volume_key, area_key.bytes(), &lock, random)?;

        let json = self.json(&lock, &digest).to_string();
        let mut writes = vec![Write {
            offset: 2 * HEADER_SIZE,
            bytes: area,
        }];
        for (copy, offset) in [
            (HeaderCopy::Secondary, HEADER_SIZE),
            (HeaderCopy::Primary, 0),
        ] {
            let bytes = self.copy(copy, &json, random)?;
            writes.push(Write { offset, bytes });
        }
        let header = read_back(&writes, self.device_size, area_key.bytes(), &volume_key)
            .attempt(|| "read back the header that was made")?;
        Ok(Formatted {
            writes,
            header,
            volume_key,
        })
    }

    fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::new(Kind::Usage, what));
        let (offset, sector) = (self.segment_offset, self.sector_size.bytes() as u64);
        if let Err(why) = self.costs.check_for_making() {
            return refuse(format!("key derivation: {why}"));
        }
        if !XTS_KEY_SIZES.contains(&self.key_size) {
            return refuse(format!("a key has 32 or 64 bytes, not {}", self.key_size));
        }
        let needed = 2 * HEADER_SIZE + new_area_size(self.key_size);
        if !offset.is_multiple_of(4096) || offset < needed {
            return refuse(format!(
                "the volume cannot begin at {offset}, which is no multiple of 4096 from {needed}"
            ));
        }
        let room = self.device_size.saturating_sub(offset);
        if room == 0 || !room.is_multiple_of(sector) {
            return refuse(format!(
                "an image of {} bytes leaves {room} bytes for its volume, no whole sectors of {sector}",
                self.device_size
            ));
        }
        for (what, text) in [("label", &self.label), ("subsystem", &self.subsystem)] {
            if text.len() >= LABEL_SIZE || text.chars().any(char::is_control) {
                return refuse(format!(
                    "a {what} has at most {} bytes and no control characters",
                    LABEL_SIZE - 1
                ));
            }
        }
        match uuid_is_well_formed(&self.uuid) {
            true => Ok(()),
            false => refuse(format!("{:?} is no UUID", self.uuid)),
        }
    }

    fn lock(&self, salt: Vec<u8>) -> Lock {
        Lock {
            encryption: ENCRYPTION.to_string(),
            area_key_size: self.key_size,
            split_hash: Hash::Sha256,
            kdf: Kdf::Argon2 {
                variant: Variant::Id,
                costs: self.costs,
                salt,
            },
        }
    }

    fn copy(
        &self,
        copy: HeaderCopy,
        json: &str,
        random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let mut salt = [0; HEADER_SALT_SIZE];
        random(&mut salt)?;
        let mut binary = Binary::new(HEADER_SIZE, 1, &self.uuid, salt);
        binary.label = self.label.clone().into_bytes();
        binary.subsystem = self.subsystem.clone().into_bytes();
        binary
            .encode(copy, json.as_bytes())
            .ok_or_else(|| Error::new(Kind::Usage, "the header does not fit its 16 KiB"))
    }

    fn json(&self, lock: &Lock, digest: &Sum) -> Value {
        json!({
            "keyslots": { "0": {
                "type": "luks2",
                "key_size": self.key_size,
                "af": { "type": "luks1", "stripes": STRIPES, "hash": lock.split_hash.name() },
                "area": {
                    "type": "raw",
                    "offset": (2 * HEADER_SIZE).to_string(),
                    "size": new_area_size(self.key_size).to_string(),
                    "encryption": lock.encryption,
                    "key_size": lock.area_key_size,
                },
                "kdf": kdf_json(&lock.kdf),
            } },
            "tokens": {},
            "segments": { "0": {
                "type": "crypt",
                "offset": self.segment_offset.to_string(),
                "size": "dynamic",
                "iv_tweak": "0",
                "encryption": ENCRYPTION,
                "sector_size": self.sector_size.bytes(),
            } },
            "digests": { "0": {
                "type": "pbkdf2",
                "keyslots": ["0"],
                "segments": ["0"],
                "hash": digest.hash.name(),
                "iterations": digest.iterations,
                "salt": BASE64_STANDARD.encode(&digest.salt),
                "digest": BASE64_STANDARD.encode(&digest.digest),
            } },
            "config": {
                "json_size": (HEADER_SIZE - BINARY_SIZE as u64).to_string(),
                "keyslots_size": self.keyslots_size().to_string(),
            },
        })
    }

    fn keyslots_size(&self) -> u64 {
        (self.segment_offset - 2 * HEADER_SIZE).min(super::header::KEYSLOTS_SIZE_MAX)
    }
}

fn kdf_json(kdf: &Kdf) -> Value {
    match kdf {
        Kdf::Pbkdf2 {
            hash,
            iterations,
            salt,
        } => json!({
            "type": kdf.name(),
            "hash": hash.name(),
            "iterations": iterations,
            "salt": BASE64_STANDARD.encode(salt),
        }),
        Kdf::Argon2 { costs, salt, .. } => json!({
            "type": kdf.name(),
            "time": costs.time,
            "memory": costs.memory_kib,
            "cpus": costs.lanes,
            "salt": BASE64_STANDARD.encode(salt),
        }),
    }
}

fn salt(random: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<Vec<u8>> {
    let mut salt = vec![0; SALT_SIZE];
    random(&mut salt)?;
    Ok(salt)
}

/// The bytes of a keyslot's area: the key split and encrypted.
fn seal(
    key: &Secret,
    area_key: &[u8],
    lock: &Lock,
    random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
) -> Result<Vec<u8>> {
    let split = split::split(key.bytes(), lock.split_hash, STRIPES as usize, random)?;
    let mut area = Zeroizing::new(vec![0; split.len().next_multiple_of(AREA_SECTOR.bytes())]);
    area[..split.len()].copy_from_slice(split.bytes());
    cipher(area_key)?
        .encrypt(AREA_SECTOR, Tweak(0), &mut area)
        .map_err(|error| Error::new(Kind::Usage, error.to_string()))?;
    Ok(std::mem::take(&mut *area))
}

/// What was made is opened as any image would be, but for the costly derivation of the key.
fn read_back(
    writes: &[Write],
    device_size: u64,
    area_key: &[u8],
    volume_key: &Secret,
) -> Result<Header> {
    let mut read = |offset: u64, out: &mut [u8]| {
        read_from(writes, offset, out);
        Ok(())
    };
    let loaded = load(&mut read, device_size)?;
    let wrong = |what: &str| Err(Error::new(Kind::Corrupt, what));
    if let Some(warning) = loaded.warnings.first() {
        return wrong(warning);
    }
    let keyslot = &loaded.header.keyslots()[0];
    let lock = keyslot
        .lock()
        .map_err(|why| Error::new(Kind::Corrupt, why))?;
    let mut stored = Secret::zeroed(keyslot.split_size() as usize);
    read(keyslot.area().offset(), stored.bytes_mut())?;
    let key = open_area(stored, area_key, lock, keyslot.key_size())?;
    let sum = loaded.header.digest().sum();
    let sum = sum.map_err(|why| Error::new(Kind::Corrupt, why))?;
    if !key.same_as(volume_key.bytes()) || !sum.matches(key.bytes()) {
        return wrong("the keyslot does not give back its key");
    }
    Ok(loaded.header)
}

/// Reads what the writes leave behind on zeros.
fn read_from(writes: &[Write], offset: u64, out: &mut [u8]) {
    out.fill(0);
    let end = offset.saturating_add(out.len() as u64);
    for write in writes {
        let from = write.offset.max(offset);
        let to = (write.offset + write.bytes.len() as u64).min(end);
        if from < to {
            let source = &write.bytes[(from - write.offset) as usize..(to - write.offset) as usize];
            out[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
        }
    }
}

/// Five groups of lower- or upper-case hex digits: 8-4-4-4-12.
fn uuid_is_well_formed(uuid: &str) -> bool {
    let groups: Vec<&str> = uuid.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    let hex = groups.concat().bytes().all(|byte| byte.is_ascii_hexdigit());
    lengths == [8, 4, 4, 4, 12] && hex
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    #[test]
    fn the_same_random_bytes_make_the_same_image() {
        let (one, two) = (
            sample::make(&sample::format()),
            sample::make(&sample::format()),
        );
        assert_eq!(one.writes, two.writes);
        assert!(one.volume_key.same_as(two.volume_key.bytes()));
    }

    #[test]
    fn no_random_bytes_no_image() {
        let passphrase = Secret::new(b"x".to_vec());
        for failing in 0..6 {
            let mut calls = 0;
            let mut noise = sample::noise();
            let mut random = |out: &mut [u8]| match calls {
                n if n == failing => Err(Error::new(Kind::Io, "no entropy")),
                _ => {
                    calls += 1;
                    noise(out)
                }
            };
            let result = sample::format().make(&passphrase, &mut random);
            assert_eq!(
                result.unwrap_err().to_string(),
                "no entropy",
                "call {failing}"
            );
        }
    }

    #[test]
    fn the_volume_key_is_nowhere_in_the_clear_and_the_copies_differ_in_salt() {
        let made = sample::make(&sample::format());
        let key = &made.volume_key.bytes()[..16];
        for write in &made.writes {
            assert!(!write.bytes.windows(16).any(|window| window == key));
        }
        let salt = 104..168;
        assert_ne!(
            made.writes[1].bytes[salt.clone()],
            made.writes[2].bytes[salt]
        );
    }

    #[test]
    fn what_was_written_is_what_is_read() {
        let write = |offset, bytes: &[u8]| Write {
            offset,
            bytes: bytes.to_vec(),
        };
        let writes = [write(4, b"abcd"), write(10, b"xy")];
        let mut out = [9; 9];
        read_from(&writes, 2, &mut out);
        assert_eq!(&out, b"\0\0abcd\0\0x");
        read_from(&writes, 100, &mut out);
        assert_eq!(out, [0; 9]);
    }

    #[test]
    fn a_uuid_has_five_groups_of_hex() {
        assert!(uuid_is_well_formed("6f3c1dd6-0f04-4c1e-8a43-6d5a3c1b2e90"));
        for bad in [
            "",
            "6f3c1dd60f044c1e8a436d5a3c1b2e90",
            "6f3c1dd6-0f04-4c1e-8a43-6d5a3c1b2e9g",
            "6f3c1dd6-0f04-4c1e-8a43-6d5a3c1b2e90-",
            "6f3c1dd-60f04-4c1e-8a43-6d5a3c1b2e90",
        ] {
            assert!(!uuid_is_well_formed(bad), "{bad}");
        }
    }
}
