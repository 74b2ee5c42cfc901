//! The anti-forensic split: a key becomes so many stripes that a disk would have to keep every one
//! of them for the key to be recovered.
//!
//! `d[0] = H(s[1])`, `d[k] = H(d[k-1] ^ s[k])`, and the last stripe is `d[n-1] ^ key`, where H
//! hashes the block in pieces of the digest's length, each with its big-endian number in front
//! (LUKS On-Disk Format Specification 1.2.3, section 2.4; LUKS2 calls it `af` of type `luks1`).

use crate::error::Result;
use crate::secret::Secret;

use super::hash::Hash;

/// Spreads the key over `stripes` stripes of its own length. `random` fills all but the last.
pub(super) fn split(
    key: &[u8],
    hash: Hash,
    stripes: usize,
    random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
) -> Result<Secret> {
    let mut split = Secret::zeroed(key.len() * stripes);
    let (noise, last) = split.bytes_mut().split_at_mut(key.len() * (stripes - 1));
    random(noise)?;
    let sum = running_sum(noise, key.len(), hash);
    for ((out, sum), key) in last.iter_mut().zip(sum.bytes()).zip(key) {
        *out = sum ^ key;
    }
    Ok(split)
}

/// Brings the key of `key_size` bytes together again from all its stripes.
pub(super) fn merge(split: &[u8], key_size: usize, hash: Hash) -> Secret {
    let (noise, last) = split.split_at(split.len() - key_size);
    let mut key = running_sum(noise, key_size, hash);
    for (byte, last) in key.bytes_mut().iter_mut().zip(last) {
        *byte ^= last;
    }
    key
}

fn running_sum(stripes: &[u8], key_size: usize, hash: Hash) -> Secret {
    let mut sum = Secret::zeroed(key_size);
    for stripe in stripes.chunks_exact(key_size) {
        for (sum, byte) in sum.bytes_mut().iter_mut().zip(stripe) {
            *sum ^= byte;
        }
        diffuse(sum.bytes_mut(), hash);
    }
    sum
}

fn diffuse(block: &mut [u8], hash: Hash) {
    for (number, piece) in block.chunks_mut(hash.size()).enumerate() {
        let digest = hash.of(&[&(number as u32).to_be_bytes(), piece]);
        piece.copy_from_slice(&digest[..piece.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting() -> impl FnMut(&mut [u8]) -> Result<()> {
        let mut next = 7_u8;
        move |out| {
            for byte in out {
                *byte = next;
                next = next.wrapping_mul(13).wrapping_add(5);
            }
            Ok(())
        }
    }

    #[test]
    fn what_was_split_merges_again() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            for key_size in [1, 16, 20, 32, 33, 64, 65] {
                let key: Vec<u8> = (0..key_size as u8).collect();
                let split = split(&key, hash, 40, &mut counting()).expect("random is there");
                assert_eq!(split.len(), key_size * 40);
                assert_eq!(merge(split.bytes(), key_size, hash).bytes(), key);
            }
        }
    }

    #[test]
    fn every_stripe_is_needed() {
        let key = [0xa5; 32];
        let mut split = split(&key, Hash::Sha256, 10, &mut counting()).expect("random is there");
        for stripe in 0..10 {
            split.bytes_mut()[stripe * 32] ^= 1;
            let merged = merge(split.bytes(), 32, Hash::Sha256);
            assert!(!merged.same_as(&key), "stripe {stripe}");
            split.bytes_mut()[stripe * 32] ^= 1;
        }
    }

    /// One stripe of noise: the key is the last stripe xor H(0 || noise), by hand.
    #[test]
    fn two_stripes_by_hand() {
        let noise = [1_u8; 32];
        let hashed = Hash::Sha256.of(&[&[0, 0, 0, 0], &noise]);
        let split: Vec<u8> = noise.iter().copied().chain([0; 32]).collect();
        assert_eq!(merge(&split, 32, Hash::Sha256).bytes(), &hashed[..]);
    }
}
