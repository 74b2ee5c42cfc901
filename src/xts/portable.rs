//! XTS in safe Rust over the batch interface of the `aes` crate, which picks the processor's AES
//! instructions by itself. This is the path of every processor that has no path of its own.
//!
//! A chunk of sectors is masked with its tweaks, encrypted or decrypted as one batch of
//! independent blocks, and masked again. The chunk and its masks stay in the first-level cache.

use aes::cipher::consts::U16;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, InOutBuf, KeyInit};

use super::{SectorSize, Tweak, times_a};

type Block = Array<u8, U16>;

/// Bytes handled at a time: as much as the largest sector, few enough to stay cached.
const CHUNK: usize = 4096;
const _: () = assert!(CHUNK.is_multiple_of(SectorSize::MAX.0));

/// Key 1 for the data and key 2 for the tweaks. The `aes` crate wipes both on drop.
pub(super) struct Pair<C> {
    data: C,
    tweak: C,
}

impl<C: KeyInit> Pair<C> {
    /// `None` unless both halves of `key` have the length that the cipher takes.
    pub fn new(key: &[u8]) -> Option<Self> {
        let (data, tweak) = key.split_at(key.len() / 2);
        Some(Pair {
            data: C::new_from_slice(data).ok()?,
            tweak: C::new_from_slice(tweak).ok()?,
        })
    }
}

impl<C: BlockCipherEncrypt<BlockSize = U16> + BlockCipherDecrypt<BlockSize = U16>> Pair<C> {
    /// Encrypts whole sectors.
    pub fn encrypt(&self, sector_size: SectorSize, first: Tweak, data: InOutBuf<'_, '_, u8>) {
        self.masked(sector_size, first, data, |blocks| {
            self.data.encrypt_blocks(blocks)
        });
    }

    /// Decrypts whole sectors.
    pub fn decrypt(&self, sector_size: SectorSize, first: Tweak, data: InOutBuf<'_, '_, u8>) {
        self.masked(sector_size, first, data, |blocks| {
            self.data.decrypt_blocks(blocks)
        });
    }

    fn masked(
        &self,
        sector_size: SectorSize,
        mut tweak: Tweak,
        mut data: InOutBuf<'_, '_, u8>,
        cipher: impl Fn(&mut [Block]),
    ) {
        let mut masks = [0; CHUNK];
        while !data.is_empty() {
            let len = data.len().min(CHUNK);
            let (chunk, rest) = data.split_at(len);
            data = rest;
            let masks = &mut masks[..len];
            for sector in masks.chunks_exact_mut(sector_size.bytes()) {
                self.sector_masks(tweak, sector);
                tweak = Tweak(tweak.0.wrapping_add(sector_size.step()));
            }
            let chunk = chunk.into_out_with_copied_in();
            xor(chunk, masks);
            cipher(Array::slice_as_chunks_mut(chunk).0);
            xor(chunk, masks);
        }
    }

    /// Fills a sector with the tweak values `AES(key 2, i) * a^j` of its blocks.
    fn sector_masks(&self, tweak: Tweak, masks: &mut [u8]) {
        let mut first = Array(tweak.to_block());
        self.tweak.encrypt_block(&mut first);
        let mut mask = u128::from_le_bytes(first.0);
        for block in masks.as_chunks_mut().0 {
            *block = mask.to_le_bytes();
            mask = times_a(mask);
        }
    }
}

fn xor(data: &mut [u8], masks: &[u8]) {
    for (byte, mask) in data.iter_mut().zip(masks) {
        *byte ^= mask;
    }
}
