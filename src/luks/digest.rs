//! A digest tells whether a volume key is the right one (specification section 3.4).

use std::ops::RangeInclusive;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::secret::same_bytes;

use super::fault::{Fault, shown};
use super::hash::Hash;
use super::json::Object;
use super::kdf;

/// Bytes of a digest. That of an image converted from LUKS1 has 20 whatever its hash.
const DIGEST_SIZES: RangeInclusive<usize> = 20..=64;

/// Which keyslots hold the key of which segments, and how that key is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    id: usize,
    keyslots: Vec<usize>,
    segments: Vec<usize>,
    /// The sum, or why this program cannot use it.
    sum: Result<Sum, String>,
}

/// PBKDF2 of the volume key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sum {
    pub hash: Hash,
    pub iterations: u32,
    pub salt: Vec<u8>,
    pub digest: Vec<u8>,
}

impl Sum {
    pub(super) fn new(hash: Hash, iterations: u32, salt: Vec<u8>, key: &[u8]) -> Sum {
        let mut digest = vec![0; hash.size()];
        hash.pbkdf2(key, &salt, iterations, &mut digest);
        Sum {
            hash,
            iterations,
            salt,
            digest,
        }
    }

    pub(super) fn matches(&self, key: &[u8]) -> bool {
        let mut digest = vec![0; self.digest.len()];
        self.hash
            .pbkdf2(key, &self.salt, self.iterations, &mut digest);
        same_bytes(&digest, &self.digest)
    }
}

impl Digest {
    pub fn id(&self) -> usize {
        self.id
    }

    /// Keyslots that hold the key.
    pub fn keyslots(&self) -> &[usize] {
        &self.keyslots
    }

    /// Segments that the key opens.
    pub fn segments(&self) -> &[usize] {
        &self.segments
    }

    pub(super) fn sum(&self) -> Result<&Sum, String> {
        let named = |why: &String| format!("digest {} cannot be checked: {why}", self.id);
        let sum = self.sum.as_ref().map_err(named)?;
        kdf::check_iterations(sum.iterations).map_err(|why| named(&why))?;
        Ok(sum)
    }

    pub(super) fn parse(
        id: usize,
        json: &Object,
        keyslots: &[usize],
        segments: &[usize],
    ) -> Result<Digest, Fault> {
        let kind = json.string("type")?;
        Ok(Digest {
            id,
            keyslots: json.references("keyslots", keyslots)?,
            segments: json.references("segments", segments)?,
            sum: match kind {
                "pbkdf2" => parse_sum(json)?,
                _ => Err(format!("its type {} is unknown", shown(kind))),
            },
        })
    }
}

fn parse_sum(json: &Object) -> Result<Result<Sum, String>, Fault> {
    let name = json.string("hash")?;
    let iterations = json.small("iterations")?;
    let salt = base64(json, "salt")?;
    let digest = base64(json, "digest")?;
    let Some(hash) = Hash::from_name(name) else {
        return Ok(Err(format!("its hash {} is unknown", shown(name))));
    };
    if !DIGEST_SIZES.contains(&digest.len()) {
        return Err(json.fault(format!(
            "digest of {} bytes, not {} to {}",
            digest.len(),
            DIGEST_SIZES.start(),
            DIGEST_SIZES.end()
        )));
    }
    Ok(Ok(Sum {
        hash,
        iterations,
        salt,
        digest,
    }))
}

/// A field of Base64 text.
pub(super) fn base64(json: &Object, key: &str) -> Result<Vec<u8>, Fault> {
    BASE64_STANDARD
        .decode(json.string(key)?)
        .map_err(|_| json.fault(format!("`{key}` is not Base64")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn judge(key: &str, value: Value) -> Result<Digest, Fault> {
        let sum = Sum::new(Hash::Sha256, 1000, vec![7; 32], b"the volume key");
        let mut json = json!({"type": "pbkdf2", "keyslots": ["0"], "segments": ["0"],
            "hash": "sha256", "iterations": 1000,
            "salt": BASE64_STANDARD.encode(&sum.salt), "digest": BASE64_STANDARD.encode(&sum.digest)});
        json[key] = value;
        Digest::parse(0, &Object::new("digest 0", &json)?, &[0, 3], &[0])
    }

    #[test]
    fn only_the_right_key_matches() {
        let digest = judge("hash", json!("sha256")).expect("good");
        let sum = digest.sum().expect("usable");
        assert!(sum.matches(b"the volume key") && !sum.matches(b"the volume kez"));
    }

    #[test]
    fn a_digest_that_cannot_be_used_is_kept_but_named() {
        for (key, value, why) in [
            (
                "type",
                json!("x"),
                "digest 0 cannot be checked: its type `x` is unknown",
            ),
            (
                "hash",
                json!("x"),
                "digest 0 cannot be checked: its hash `x` is unknown",
            ),
            (
                "iterations",
                json!(4_000_000_000_u32),
                "digest 0 cannot be checked: it asks for",
            ),
            (
                "iterations",
                json!(0),
                "digest 0 cannot be checked: it asks for no iteration",
            ),
        ] {
            let digest = judge(key, value).expect("well formed");
            let said = digest.sum().unwrap_err();
            assert!(said.starts_with(why), "{said}");
        }
    }

    #[test]
    fn a_broken_digest_is_refused() {
        for (key, value) in [
            ("keyslots", json!(["1"])),
            ("keyslots", json!("0")),
            ("segments", json!([0])),
            ("digest", json!("QUJD")),
            ("digest", json!("?")),
            ("salt", json!("QUJ")),
            ("iterations", json!(-1)),
        ] {
            assert!(judge(key, value.clone()).is_err(), "{key}: {value}");
        }
    }
}
