//! AES-XTS over runs of sectors, as dm-crypt's `aes-xts-plain64` and LUKS2 use it.
//!
//! IEEE 1619-2007 calls a sector a data unit. Section 5.3.1 encrypts one block:
//! `C = AES(key 1, P xor T) xor T` with `T = AES(key 2, i) * a^j`, where `i` is the number of the
//! data unit as 16 little-endian bytes, `j` the block within it, and `a` the element `x` of
//! GF(2^128) with the polynomial of section 5.2. Sectors are whole blocks here, so that ciphertext
//! stealing (section 5.3.2) never occurs.
//!
//! **The number of a sector counts units of 512 bytes, whatever the sector size.** The second
//! 4096-byte sector has number 8, not 1. dm-crypt counts so unless its table says
//! `iv_large_sectors` (Linux, admin-guide/device-mapper/dm-crypt). cryptsetup never says it for
//! LUKS2, only for BitLocker and on `--type plain --iv-large-sectors` (cryptsetup 2.6,
//! `lib/bitlk/bitlk.c` and `set_activation_flags` in `src/`), and the LUKS2 segment object has no
//! field for it. `tests/crypt.rs` confirms it with data that cryptsetup encrypted. [`Tweak`] and
//! [`SectorSize`] keep the two ways of counting apart.

mod parallel;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;

use aes::cipher::InOutBuf;
use aes::{Aes128, Aes256};

use crate::secret::{Guarded, with_clean_stack};
use parallel::{Run, processors, split};

/// How many bytes are encrypted under one tweak: 512, 1024, 2048 or 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SectorSize(usize);

impl SectorSize {
    /// What LUKS2 keyslots use.
    pub const MIN: SectorSize = SectorSize(512);
    pub const MAX: SectorSize = SectorSize(4096);

    /// `None` unless LUKS2 and dm-crypt know the size.
    pub fn new(bytes: u64) -> Option<Self> {
        let bytes = usize::try_from(bytes).ok()?;
        let known = bytes.is_power_of_two() && (512..=4096).contains(&bytes);
        known.then_some(SectorSize(bytes))
    }

    pub fn bytes(self) -> usize {
        self.0
    }

    /// How far the tweak moves from one sector to the next.
    fn step(self) -> u64 {
        (self.0 / Tweak::UNIT) as u64
    }
}

/// The number of a sector in units of 512 bytes: dm-crypt's `plain64` initialization vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tweak(pub u64);

impl Tweak {
    const UNIT: usize = 512;

    /// The tweak of the sector that begins at byte `offset` of a segment whose first sector has
    /// tweak `first` (`iv_tweak` in LUKS2). Wraps at 2^64 as dm-crypt's does.
    pub fn at(first: Tweak, offset: u64) -> Tweak {
        Tweak(first.0.wrapping_add(offset / Self::UNIT as u64))
    }

    /// The data unit's number `i`, as IEEE 1619-2007 section 5.1 writes it.
    fn to_block(self) -> [u8; 16] {
        u128::from(self.0).to_le_bytes()
    }
}

/// The data are not a whole number of sectors, or source and target differ in length. Nothing has
/// been changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotWholeSectors;

impl fmt::Display for NotWholeSectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the data are not a whole number of sectors")
    }
}

impl std::error::Error for NotWholeSectors {}

/// An XTS-AES-128 or XTS-AES-256 key, expanded. It is wiped when dropped, and has no `Clone` and
/// no `Debug`.
///
/// All methods take runs of whole sectors; the tweak given is that of the first one.
pub struct Key(Cipher);

/// In pages of their own, locked and kept out of core dumps; and so moving a [`Key`] leaves no copy
/// of the round keys behind.
enum Cipher {
    Aes128(Guarded<portable::Pair<Aes128>>),
    Aes256(Guarded<portable::Pair<Aes256>>),
    #[cfg(target_arch = "x86_64")]
    Aes128X86(Guarded<x86::Pair<11>>),
    #[cfg(target_arch = "x86_64")]
    Aes256X86(Guarded<x86::Pair<15>>),
}

impl Key {
    /// Takes key 1 and key 2 one after the other (IEEE 1619-2007 section 5.1): 32 bytes for
    /// XTS-AES-128, 64 for XTS-AES-256; `None` for any other length.
    pub fn new(key: &[u8]) -> Option<Key> {
        #[cfg(target_arch = "x86_64")]
        if let Some(engine) = x86::Engine::available().last() {
            return Key::for_engine(engine, key);
        }
        Key::portable(key)
    }

    fn portable(key: &[u8]) -> Option<Key> {
        let cipher = with_clean_stack(|| {
            Some(match key.len() {
                32 => Cipher::Aes128(Guarded::new(portable::Pair::new(key)?)),
                64 => Cipher::Aes256(Guarded::new(portable::Pair::new(key)?)),
                _ => return None,
            })
        });
        cipher.map(Key)
    }

    #[cfg(target_arch = "x86_64")]
    fn for_engine(engine: x86::Engine, key: &[u8]) -> Option<Key> {
        let cipher = with_clean_stack(|| {
            Some(match key.len() {
                32 => Cipher::Aes128X86(x86::Pair::new(engine, key)?),
                64 => Cipher::Aes256X86(x86::Pair::new(engine, key)?),
                _ => return None,
            })
        });
        cipher.map(Key)
    }

    /// The same key for every implementation that this processor can run; the last is the one that
    /// [`Key::new`] takes. For tests and benchmarks.
    #[doc(hidden)]
    pub fn implementations(key: &[u8]) -> Option<Vec<(&'static str, Key)>> {
        #[allow(unused_mut)]
        let mut all = vec![("portable", Key::portable(key)?)];
        #[cfg(target_arch = "x86_64")]
        for engine in x86::Engine::available() {
            all.push((engine.name(), Key::for_engine(engine, key)?));
        }
        Some(all)
    }

    /// Encrypts in place.
    pub fn encrypt(
        &self,
        sector_size: SectorSize,
        first: Tweak,
        data: &mut [u8],
    ) -> Result<(), NotWholeSectors> {
        check(sector_size, data.len())?;
        let work = |tweak, run: Run| self.encrypt_run(sector_size, tweak, run.into());
        split(&work, first, Run::InPlace(data), processors());
        Ok(())
    }

    /// Encrypts `from` into `to`, which must be as long.
    pub fn encrypt_into(
        &self,
        sector_size: SectorSize,
        first: Tweak,
        from: &[u8],
        to: &mut [u8],
    ) -> Result<(), NotWholeSectors> {
        check(sector_size, from.len())?;
        if from.len() != to.len() {
            return Err(NotWholeSectors);
        }
        let work = |tweak, run: Run| self.encrypt_run(sector_size, tweak, run.into());
        split(&work, first, Run::Across(from, to), processors());
        Ok(())
    }

    /// Decrypts in place.
    pub fn decrypt(
        &self,
        sector_size: SectorSize,
        first: Tweak,
        data: &mut [u8],
    ) -> Result<(), NotWholeSectors> {
        check(sector_size, data.len())?;
        let work = |tweak, run: Run| self.decrypt_run(sector_size, tweak, run.into());
        split(&work, first, Run::InPlace(data), processors());
        Ok(())
    }

    fn encrypt_run(&self, sector_size: SectorSize, first: Tweak, data: InOutBuf<'_, '_, u8>) {
        match &self.0 {
            Cipher::Aes128(pair) => pair.encrypt(sector_size, first, data),
            Cipher::Aes256(pair) => pair.encrypt(sector_size, first, data),
            #[cfg(target_arch = "x86_64")]
            Cipher::Aes128X86(pair) => pair.encrypt(sector_size, first, data),
            #[cfg(target_arch = "x86_64")]
            Cipher::Aes256X86(pair) => pair.encrypt(sector_size, first, data),
        }
    }

    fn decrypt_run(&self, sector_size: SectorSize, first: Tweak, data: InOutBuf<'_, '_, u8>) {
        match &self.0 {
            Cipher::Aes128(pair) => pair.decrypt(sector_size, first, data),
            Cipher::Aes256(pair) => pair.decrypt(sector_size, first, data),
            #[cfg(target_arch = "x86_64")]
            Cipher::Aes128X86(pair) => pair.decrypt(sector_size, first, data),
            #[cfg(target_arch = "x86_64")]
            Cipher::Aes256X86(pair) => pair.decrypt(sector_size, first, data),
        }
    }
}

fn check(sector_size: SectorSize, len: usize) -> Result<(), NotWholeSectors> {
    let whole = len.is_multiple_of(sector_size.bytes());
    whole.then_some(()).ok_or(NotWholeSectors)
}

/// Multiplies by `a` = x modulo x^128 + x^7 + x^2 + x + 1 (IEEE 1619-2007 section 5.2), in a time
/// that does not depend on the value.
fn times_a(mask: u128) -> u128 {
    let carry = mask >> 127;
    (mask << 1) ^ (carry * 0x87)
}

#[cfg(test)]
mod tests;
