//! From a passphrase to the volume key (specification section 5).

use std::ops::Range;

use tracing::debug;

use crate::error::{Attempt, Error, Kind, Result};
use crate::secret::Secret;
use crate::xts::{self, Tweak};

use super::header::Header;
use super::kdf;
use super::keyslot::{AREA_SECTOR, Keyslot, Lock, Priority};
use super::load::Read;
use super::split;

impl Header {
    /// Tries every keyslot of the volume key, preferred ones first, and returns the number of the
    /// one that opened and the key. `read` fills a buffer from an offset of the image.
    ///
    /// # Errors
    /// [`Kind::WrongKey`] if none opens, [`Kind::Unsupported`] if none could be tried.
    pub fn unlock(
        &self,
        passphrase: &Secret,
        read: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<(usize, Secret)> {
        let sum = self
            .digest()
            .sum()
            .map_err(|why| Error::new(Kind::Unsupported, why))?;
        let mut tried = 0;
        let mut skipped = Vec::new();
        for keyslot in self.keyslots_to_try() {
            let area_key = keyslot
                .lock()
                .map_err(String::from)
                .and_then(|lock| area_key(lock, passphrase).map(|key| (lock, key)));
            let (lock, area_key) = match area_key {
                Ok(found) => found,
                Err(why) => {
                    debug!(keyslot = keyslot.id(), why, "keyslot skipped");
                    skipped.push(format!("keyslot {}: {why}", keyslot.id()));
                    continue;
                }
            };
            let stored = read_area(keyslot, read)?;
            let key = open_area(stored, area_key.bytes(), lock, keyslot.key_size())?;
            tried += 1;
            if sum.matches(key.bytes()) {
                debug!(keyslot = keyslot.id(), "keyslot opened");
                return Ok((keyslot.id(), key));
            }
        }
        Err(refusal(tried, &skipped))
    }

    /// What [`Header::unlock`] reads first, once it has derived a key: bytes of the image.
    pub fn first_area(&self) -> Option<Range<u64>> {
        let first = *self.keyslots_to_try().first()?;
        let start = first.area().offset();
        Some(start..start.checked_add(first.split_size())?)
    }

    /// Those of the volume key, in the order in which they are tried.
    fn keyslots_to_try(&self) -> Vec<&Keyslot> {
        let bound = self.digest().keyslots();
        let mut keyslots: Vec<&Keyslot> = self
            .keyslots()
            .iter()
            .filter(|slot| bound.contains(&slot.id()) && slot.priority() != Priority::Ignore)
            .collect();
        keyslots.sort_by_key(|slot| (std::cmp::Reverse(slot.priority()), slot.id()));
        keyslots
    }
}

fn refusal(tried: usize, skipped: &[String]) -> Error {
    let not_tried = match skipped.is_empty() {
        true => String::new(),
        false => format!("; not tried: {}", skipped.join("; ")),
    };
    match tried {
        0 => Error::new(
            Kind::Unsupported,
            format!("no keyslot of this image can be opened by this program{not_tried}"),
        ),
        _ => Error::new(
            Kind::WrongKey,
            format!("no keyslot opens with this passphrase ({tried} tried{not_tried})"),
        ),
    }
}

/// The key of a keyslot's area.
pub(super) fn area_key(lock: &Lock, passphrase: &Secret) -> std::result::Result<Secret, String> {
    kdf::derived(&lock.kdf, passphrase.bytes(), lock.area_key_size as usize)
}

fn read_area(keyslot: &Keyslot, read: &mut Read) -> Result<Secret> {
    let (offset, size) = (keyslot.area().offset(), keyslot.split_size());
    // The area has been checked to lie within the image and to hold this much.
    let mut stored = Secret::zeroed(size as usize);
    read(offset, stored.bytes_mut()).attempt(|| {
        format!(
            "read {size} bytes of keyslot {} at offset {offset}",
            keyslot.id()
        )
    })?;
    Ok(stored)
}

/// Decrypts the stored bytes in place and merges the key from them.
pub(super) fn open_area(
    mut stored: Secret,
    area_key: &[u8],
    lock: &Lock,
    key_size: u32,
) -> Result<Secret> {
    cipher(area_key)?
        .decrypt(AREA_SECTOR, Tweak(0), stored.bytes_mut())
        .map_err(|error| Error::new(Kind::Corrupt, error.to_string()))?;
    let key_size = key_size as usize;
    let split = &stored.bytes()[..key_size * super::keyslot::STRIPES as usize];
    Ok(split::merge(split, key_size, lock.split_hash))
}

pub(super) fn cipher(area_key: &[u8]) -> Result<xts::Key> {
    xts::Key::new(area_key).ok_or_else(|| {
        Error::new(
            Kind::Unsupported,
            format!("AES-XTS takes no key of {} bytes", area_key.len()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::binary::HeaderCopy;
    use super::super::load;
    use super::super::sample;
    use super::*;
    use serde_json::json;

    /// The sample with a second keyslot, which is bound but holds noise.
    fn two_keyslots(change: impl Fn(&mut serde_json::Value)) -> Vec<u8> {
        let mut image = sample::image();
        for copy in [HeaderCopy::Primary, HeaderCopy::Secondary] {
            sample::edit(&mut image, copy, |metadata| {
                let mut second = metadata["keyslots"]["0"].clone();
                second["area"]["offset"] = json!("290816");
                metadata["keyslots"]["1"] = second;
                metadata["digests"]["0"]["keyslots"] = json!(["1", "0"]);
                change(metadata);
            });
        }
        image
    }

    /// The result, and the areas that were read, in their order.
    fn run(image: &[u8], passphrase: &[u8]) -> (Result<(usize, Secret)>, Vec<u64>) {
        let mut areas = Vec::new();
        let mut read = |offset: u64, out: &mut [u8]| {
            areas.push(offset);
            out.copy_from_slice(&image[offset as usize..][..out.len()]);
            Ok(())
        };
        let header = load(&mut read, image.len() as u64).expect("sound").header;
        let result = header.unlock(&Secret::new(passphrase.to_vec()), &mut read);
        (result, areas[1..].to_vec())
    }

    #[test]
    fn preferred_keyslots_come_first_and_ignored_ones_never() {
        let (result, areas) = run(&two_keyslots(|_| ()), sample::PASSPHRASE);
        assert_eq!((result.expect("opens").0, areas), (0, vec![32_768]));

        let prefer = |json: &mut serde_json::Value| json["keyslots"]["1"]["priority"] = json!(2);
        let (result, areas) = run(&two_keyslots(prefer), sample::PASSPHRASE);
        assert_eq!(
            (result.expect("opens").0, areas),
            (0, vec![290_816, 32_768])
        );

        let ignore = |json: &mut serde_json::Value| json["keyslots"]["0"]["priority"] = json!(0);
        let (result, areas) = run(&two_keyslots(ignore), sample::PASSPHRASE);
        assert_eq!(result.unwrap_err().kind(), Kind::WrongKey);
        assert_eq!(areas, [290_816]);
    }

    #[test]
    fn a_keyslot_too_dear_is_skipped_unread_and_the_next_one_opens() {
        let dear = |json: &mut serde_json::Value| {
            json["keyslots"]["1"]["kdf"]["memory"] = json!(100 << 20);
            json["keyslots"]["1"]["priority"] = json!(2);
        };
        let image = two_keyslots(dear);
        let (result, areas) = run(&image, sample::PASSPHRASE);
        assert_eq!((result.expect("opens").0, areas), (0, vec![32_768]));
        let error = run(&image, b"wrong").0.unwrap_err();
        assert_eq!(
            error.to_string(),
            "no keyslot opens with this passphrase (1 tried; not tried: keyslot 1: \
             it asks for 100.0 GiB of memory, more than 4.0 GiB)"
        );
    }

    #[test]
    fn a_failed_read_is_passed_on_with_its_keyslot() {
        let image = sample::image();
        let mut read = |offset: u64, out: &mut [u8]| match offset {
            0 => {
                out.copy_from_slice(&image[..out.len()]);
                Ok(())
            }
            _ => Err(Error::new(Kind::Disconnected, "gone")),
        };
        let header = load(&mut read, image.len() as u64).expect("sound").header;
        let error = header
            .unlock(&Secret::new(b"x".to_vec()), &mut read)
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Disconnected);
        assert_eq!(
            error.to_string(),
            "read 256000 bytes of keyslot 0 at offset 32768"
        );
    }
}
