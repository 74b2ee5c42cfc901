//! A keyslot: an area of the image that holds the volume key, split and encrypted under a
//! passphrase (specification section 3.2).

use std::ops::Range;

use crate::xts::SectorSize;

use super::digest::base64;
use super::fault::{Fault, shown};
use super::hash::Hash;
use super::json::Object;
use super::kdf::{Costs, Kdf, Variant};
use super::segment::ENCRYPTION;

/// cryptsetup splits into 4000 stripes whatever the header says, so nothing else can be opened.
pub(super) const STRIPES: u32 = 4000;
/// Bytes of the salt of every key derivation.
pub(super) const SALT_SIZE: usize = 32;
/// Key lengths of AES-128-XTS and AES-256-XTS, in bytes.
pub(super) const XTS_KEY_SIZES: [u32; 2] = [32, 64];
/// The unit in which keyslot areas are encrypted, in bytes.
pub(super) const AREA_SECTOR: SectorSize = SectorSize::MIN;

/// Whether and how early a keyslot is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Only when it is named.
    Ignore,
    Normal,
    /// Before all others.
    Prefer,
}

/// Where the split key lies in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    offset: u64,
    size: u64,
}

impl Area {
    /// In bytes from the start of the image.
    pub fn offset(self) -> u64 {
        self.offset
    }

    /// In bytes.
    pub fn size(self) -> u64 {
        self.size
    }

    /// `None` if its end cannot be addressed.
    fn range(self) -> Option<Range<u64>> {
        Some(self.offset..self.offset.checked_add(self.size)?)
    }
}

/// How a keyslot protects its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    pub(super) encryption: String,
    pub(super) area_key_size: u32,
    pub(super) split_hash: Hash,
    pub(super) kdf: Kdf,
}

impl Lock {
    /// Cipher of the area in dm-crypt's notation.
    pub fn encryption(&self) -> &str {
        &self.encryption
    }

    /// Key of that cipher, in bytes.
    pub fn area_key_size(&self) -> u32 {
        self.area_key_size
    }

    /// Hash of the anti-forensic split.
    pub fn split_hash(&self) -> Hash {
        self.split_hash
    }

    pub fn kdf(&self) -> &Kdf {
        &self.kdf
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyslot {
    id: usize,
    kind: String,
    key_size: u32,
    priority: Priority,
    area: Area,
    /// Or why this program cannot open it.
    lock: Result<Lock, String>,
}

impl Keyslot {
    pub fn id(&self) -> usize {
        self.id
    }

    /// Its type as it stands in the header; `luks2` can be opened.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Bytes of the key that it holds.
    pub fn key_size(&self) -> u32 {
        self.key_size
    }

    pub fn priority(&self) -> Priority {
        self.priority
    }

    pub fn area(&self) -> Area {
        self.area
    }

    /// How it protects its key, or why this program cannot open it.
    pub fn lock(&self) -> Result<&Lock, &str> {
        self.lock.as_ref().map_err(String::as_str)
    }

    /// Bytes of the split key, in whole sectors.
    pub(super) fn split_size(&self) -> u64 {
        split_size(self.key_size)
    }

    /// Judges one member of `keyslots`: an error if it breaks the specification.
    pub(super) fn parse(id: usize, json: &Object) -> Result<Keyslot, Fault> {
        let kind = json.string("type")?;
        let key_size = json.small("key_size")?;
        let area_json = json.object("area")?;
        let area = Area {
            offset: area_json.decimal("offset")?,
            size: area_json.decimal("size")?,
        };
        let priority = match json.optional("priority") {
            None => Priority::Normal,
            Some(_) => match json.small("priority")? {
                0 => Priority::Ignore,
                1 => Priority::Normal,
                2 => Priority::Prefer,
                other => return Err(json.fault(format!("priority {other} is not 0, 1 or 2"))),
            },
        };
        let lock = match kind {
            "luks2" => {
                check_sizes(json, key_size, area)?;
                parse_lock(json, key_size)?
            }
            _ => Err(format!("it is of the unknown type {}", shown(kind))),
        };
        Ok(Keyslot {
            id,
            kind: kind.to_string(),
            key_size,
            priority,
            area,
            lock,
        })
    }
}

fn split_size(key_size: u32) -> u64 {
    (u64::from(key_size) * u64::from(STRIPES)).next_multiple_of(AREA_SECTOR.bytes() as u64)
}

/// Bytes that a new keyslot's area takes: cryptsetup rounds up to 4 KiB.
pub(super) fn new_area_size(key_size: u32) -> u64 {
    split_size(key_size).next_multiple_of(4096)
}

fn check_sizes(json: &Object, key_size: u32, area: Area) -> Result<(), Fault> {
    if key_size == 0 {
        return Err(json.fault("its key has no bytes"));
    }
    if !area.offset.is_multiple_of(AREA_SECTOR.bytes() as u64) {
        return Err(json.fault(format!(
            "its area at offset {} is not aligned to {} bytes",
            area.offset,
            AREA_SECTOR.bytes()
        )));
    }
    if area.size < split_size(key_size) {
        return Err(json.fault(format!(
            "its area of {} bytes is too small for {STRIPES} stripes of {key_size} bytes",
            area.size
        )));
    }
    Ok(())
}

/// Checks that areas lie within `region` and apart from each other.
pub(super) fn check_areas(keyslots: &[Keyslot], region: &Range<u64>) -> Result<(), Fault> {
    let fault = |id: usize, what: String| Fault::Corrupt(format!("keyslot {id}: its area {what}"));
    let mut ranges = Vec::new();
    for keyslot in keyslots {
        let Area { offset, size } = keyslot.area;
        let inside = |range: &Range<u64>| range.start >= region.start && range.end <= region.end;
        match keyslot.area.range().filter(inside) {
            Some(range) if !range.is_empty() => ranges.push((range, keyslot.id)),
            Some(_) => return Err(fault(keyslot.id, "is empty".into())),
            None => {
                return Err(fault(
                    keyslot.id,
                    format!(
                        "of {size} bytes at offset {offset} is not within {} to {}",
                        region.start, region.end
                    ),
                ));
            }
        }
    }
    ranges.sort_by_key(|(range, _)| range.start);
    for pair in ranges.windows(2) {
        if pair[0].0.end > pair[1].0.start {
            return Err(fault(
                pair[1].1,
                format!("overlaps that of keyslot {}", pair[0].1),
            ));
        }
    }
    Ok(())
}

/// The outer error is a breach of the specification, the inner one something not served here.
fn parse_lock(json: &Object, key_size: u32) -> Result<Result<Lock, String>, Fault> {
    let split = json.object("af")?;
    let area = json.object("area")?;
    let kdf = parse_kdf(&json.object("kdf")?)?;
    let (split_kind, stripes) = (split.string("type")?, split.small("stripes")?);
    let split_hash = split.string("hash")?;
    let (area_kind, encryption) = (area.string("type")?, area.string("encryption")?);
    let area_key_size = area.small("key_size")?;
    let refuse = |what: String| Ok(Err(what));

    if area_kind != "raw" {
        return refuse(format!(
            "its area is of the unknown type {}",
            shown(area_kind)
        ));
    }
    if encryption != ENCRYPTION {
        return refuse(format!(
            "its area is encrypted with {}, not {ENCRYPTION}",
            shown(encryption)
        ));
    }
    for (what, size) in [("area key", area_key_size), ("key", key_size)] {
        if !XTS_KEY_SIZES.contains(&size) {
            return refuse(format!("its {what} has {size} bytes, not 32 or 64"));
        }
    }
    if split_kind != "luks1" {
        return refuse(format!(
            "its key is split by the unknown {}",
            shown(split_kind)
        ));
    }
    if stripes != STRIPES {
        return refuse(format!(
            "its key is split into {stripes} stripes, not {STRIPES}"
        ));
    }
    let Some(split_hash) = Hash::from_name(split_hash) else {
        return refuse(format!(
            "its key is split with the unknown {}",
            shown(split_hash)
        ));
    };
    Ok(kdf.map(|kdf| Lock {
        encryption: encryption.to_string(),
        area_key_size,
        split_hash,
        kdf,
    }))
}

fn parse_kdf(json: &Object) -> Result<Result<Kdf, String>, Fault> {
    let kind = json.string("type")?;
    let salt = base64(json, "salt")?;
    if salt.len() != SALT_SIZE {
        return Ok(Err(format!(
            "its salt has {} bytes, not {SALT_SIZE}",
            salt.len()
        )));
    }
    let variant = match kind {
        "argon2i" => Variant::I,
        "argon2id" => Variant::Id,
        "pbkdf2" => {
            let name = json.string("hash")?;
            let iterations = json.small("iterations")?;
            return Ok(match Hash::from_name(name) {
                Some(hash) => Ok(Kdf::Pbkdf2 {
                    hash,
                    iterations,
                    salt,
                }),
                None => Err(format!("its pbkdf2 uses the unknown hash {}", shown(name))),
            });
        }
        _ => {
            return Ok(Err(format!(
                "its key derivation {} is unknown",
                shown(kind)
            )));
        }
    };
    let costs = Costs {
        memory_kib: json.small("memory")?,
        time: json.small("time")?,
        lanes: json.small("cpus")?,
    };
    Ok(Ok(Kdf::Argon2 {
        variant,
        costs,
        salt,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn good() -> Value {
        json!({"type": "luks2", "key_size": 64,
            "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
            "area": {"type": "raw", "offset": "32768", "size": "258048",
                     "encryption": "aes-xts-plain64", "key_size": 64},
            "kdf": {"type": "argon2id", "time": 4, "memory": 32768, "cpus": 2,
                    "salt": "W1GPf5G5q3IZqn8W9S5RR9ynZlnW14kCY3f7I98w5l8="}})
    }

    fn judge(pointer: &str, value: Value) -> Result<Keyslot, Fault> {
        let mut json = good();
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        json.pointer_mut(parent).expect("is there")[key] = value;
        Keyslot::parse(0, &Object::new("keyslot 0", &json)?)
    }

    fn at(id: usize, offset: u64, size: u64) -> Keyslot {
        let mut keyslot = judge("/key_size", json!(64)).expect("good");
        keyslot.id = id;
        keyslot.area = Area { offset, size };
        keyslot
    }

    #[test]
    fn the_usual_keyslot_is_read() {
        let keyslot = judge("/priority", json!(2)).expect("good");
        assert_eq!(keyslot.priority(), Priority::Prefer);
        assert_eq!(keyslot.split_size(), 256_000);
        assert_eq!(new_area_size(64), 258_048);
        let lock = keyslot.lock().expect("can be opened");
        assert_eq!(lock.kdf().name(), "argon2id");
        assert_eq!(lock.split_hash(), Hash::Sha256);
    }

    #[test]
    fn what_cannot_be_opened_is_kept_and_named() {
        for (pointer, value, why) in [
            (
                "/type",
                json!("reencrypt"),
                "it is of the unknown type `reencrypt`",
            ),
            ("/key_size", json!(48), "its key has 48 bytes"),
            (
                "/af/type",
                json!("x"),
                "its key is split by the unknown `x`",
            ),
            (
                "/af/stripes",
                json!(2000),
                "its key is split into 2000 stripes",
            ),
            (
                "/af/hash",
                json!("whirlpool"),
                "its key is split with the unknown `whirlpool`",
            ),
            (
                "/area/type",
                json!("x"),
                "its area is of the unknown type `x`",
            ),
            (
                "/area/encryption",
                json!("aes-cbc-essiv:sha256"),
                "its area is encrypted with `aes-cbc",
            ),
            ("/area/key_size", json!(0), "its area key has 0 bytes"),
            (
                "/kdf/type",
                json!("scrypt"),
                "its key derivation `scrypt` is unknown",
            ),
            ("/kdf/salt", json!("QUJD"), "its salt has 3 bytes"),
        ] {
            let keyslot = judge(pointer, value).expect("well formed");
            let said = keyslot.lock().unwrap_err();
            assert!(said.starts_with(why), "{said}");
        }
    }

    #[test]
    fn a_broken_keyslot_is_refused() {
        for (pointer, value) in [
            ("/type", json!(2)),
            ("/key_size", json!("64")),
            ("/key_size", json!(0)),
            ("/key_size", json!(4_294_967_295_u32)),
            ("/key_size", json!(65)),
            ("/priority", json!(3)),
            ("/area", json!(null)),
            ("/area/offset", json!(32768)),
            ("/area/offset", json!("33000")),
            ("/area/size", json!("255999")),
            ("/af/stripes", json!(-1)),
            ("/kdf/time", json!("4")),
            ("/kdf/memory", json!(4_294_967_296_u64)),
            (
                "/kdf/salt",
                json!("W1GPf5G5q3IZqn8W9S5RR9ynZlnW14kCY3f7I98w5l8"),
            ),
        ] {
            assert!(judge(pointer, value.clone()).is_err(), "{pointer}: {value}");
        }
    }

    #[test]
    fn areas_keep_apart_and_inside() {
        let region = 32_768..16_777_216;
        let judge = |slots: &[Keyslot]| check_areas(slots, &region).map_err(|f| f.to_string());
        assert_eq!(
            judge(&[at(0, 290_816, 258_048), at(1, 32_768, 258_048)]),
            Ok(())
        );
        assert_eq!(
            judge(&[at(0, 32_768, 258_048), at(1, 290_304, 258_048)]),
            Err("keyslot 1: its area overlaps that of keyslot 0".into())
        );
        for (offset, size) in [
            (16_384, 258_048),
            (16_777_216 - 512, 1024),
            (u64::MAX - 511, 1024),
            (32_768, u64::MAX),
            (32_768, 0),
        ] {
            assert!(judge(&[at(0, offset, size)]).is_err(), "{offset} {size}");
        }
    }
}
