//! XTS with the AES instructions of x86-64 processors: one loop, made for three vector widths.
//!
//! Eight vectors of blocks are in flight, which hides the latency of an AES round. The masks of
//! the next eight are computed between the rounds, where other execution units idle: multiplying
//! by `a^n` shifts a block left by `n` bits and folds what falls out back in with a carry-less
//! multiplication by x^7 + x^2 + x + 1 (IEEE 1619-2007 section 5.2). Eight vectors of `b` blocks
//! are `8 b` steps of `a`, so that both shifts are by whole bytes.
//!
//! No instruction here depends on a secret in its timing.

use std::arch::x86_64::*;

use aes::cipher::consts::{U128, U256, U512};
use aes::cipher::{Array, InOut, InOutBuf};
use zeroize::Zeroize;

use crate::secret::Guarded;

use super::{SectorSize, Tweak, times_a};

/// Vectors in flight: AES rounds take about 4 cycles, and two start in each.
const LANES: usize = 8;

/// A way in which this processor can do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// One block a vector; with AES-NI.
    AesNi,
    /// Two blocks a vector; with VAES and AVX2.
    Vaes256,
    /// Four blocks a vector; with VAES and AVX-512.
    Vaes512,
}

impl Engine {
    pub fn name(self) -> &'static str {
        match self {
            Engine::AesNi => "aes-ni",
            Engine::Vaes256 => "vaes-256",
            Engine::Vaes512 => "vaes-512",
        }
    }

    /// What this processor has, the fastest last.
    pub fn available() -> impl Iterator<Item = Engine> {
        let aes_ni = is_x86_feature_detected!("aes") && is_x86_feature_detected!("pclmulqdq");
        let vaes = is_x86_feature_detected!("vaes") && is_x86_feature_detected!("vpclmulqdq");
        [
            (Engine::AesNi, aes_ni),
            (Engine::Vaes256, vaes && is_x86_feature_detected!("avx2")),
            (
                Engine::Vaes512,
                vaes && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw"),
            ),
        ]
        .into_iter()
        .filter_map(move |(engine, has)| (aes_ni && has).then_some(engine))
    }
}

/// A round key, as often as the widest vector holds it.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct RoundKey([u128; 4]);

impl From<u128> for RoundKey {
    fn from(key: u128) -> Self {
        RoundKey([key; 4])
    }
}

/// x^7 + x^2 + x + 1 in every half.
const POLYNOMIAL: RoundKey = RoundKey([0x87 << 64 | 0x87; 4]);

/// Expanded keys for one engine: 11 round keys for AES-128, 15 for AES-256. The pages
/// that [`Pair::new`] puts it in are wiped.
pub(super) struct Pair<const KEYS: usize> {
    engine: Engine,
    encrypt: [RoundKey; KEYS],
    decrypt: [RoundKey; KEYS],
    tweak: [RoundKey; KEYS],
}

impl<const KEYS: usize> Pair<KEYS> {
    /// `key` holds two keys of AES. `None` if this processor lacks the engine.
    pub fn new(engine: Engine, key: &[u8]) -> Option<Guarded<Self>> {
        if !Engine::available().any(|available| available == engine) {
            return None;
        }
        let none = [RoundKey([0; 4]); KEYS];
        let mut pair = Guarded::new(Pair {
            engine,
            encrypt: none,
            decrypt: none,
            tweak: none,
        });
        let (data, tweak) = key.split_at(key.len() / 2);
        // SAFETY: every engine that is available needs the `aes` feature.
        unsafe {
            expand(data, &mut pair.encrypt);
            expand(tweak, &mut pair.tweak);
            let Pair {
                encrypt, decrypt, ..
            } = &mut *pair;
            invert(encrypt, decrypt);
        }
        Some(pair)
    }

    /// Encrypts whole sectors.
    pub fn encrypt(&self, sector_size: SectorSize, first: Tweak, data: InOutBuf<'_, '_, u8>) {
        self.sectors::<false>(&self.encrypt, sector_size, first, data);
    }

    /// Decrypts whole sectors.
    pub fn decrypt(&self, sector_size: SectorSize, first: Tweak, data: InOutBuf<'_, '_, u8>) {
        self.sectors::<true>(&self.decrypt, sector_size, first, data);
    }

    fn sectors<const DECRYPT: bool>(
        &self,
        keys: &[RoundKey; KEYS],
        sector_size: SectorSize,
        mut tweak: Tweak,
        mut data: InOutBuf<'_, '_, u8>,
    ) {
        let step = sector_size.step();
        while !data.is_empty() {
            let len = data.len().min(LANES * sector_size.bytes());
            let (some, rest) = data.split_at(len);
            let mut tweaks = [0; LANES];
            let tweaks = &mut tweaks[..len / sector_size.bytes()];
            for number in tweaks.iter_mut() {
                *number = tweak.0.into();
                tweak = Tweak(tweak.0.wrapping_add(step));
            }
            // SAFETY: `new` has seen that this processor has the engine.
            unsafe {
                encrypt_tweaks(&self.tweak, tweaks);
                let through = match self.engine {
                    Engine::AesNi => aes_ni::through::<KEYS, DECRYPT>,
                    Engine::Vaes256 => vaes_256::through::<KEYS, DECRYPT>,
                    Engine::Vaes512 => vaes_512::through::<KEYS, DECRYPT>,
                };
                through(keys, sector_size, tweaks, some);
            }
            data = rest;
        }
    }
}

/// The key expansion of FIPS 197 section 5.2.
#[target_feature(enable = "aes")]
fn expand<const KEYS: usize>(key: &[u8], round_keys: &mut [RoundKey; KEYS]) {
    let mut words = [0_u32; 4 * 15];
    let length = key.len() / 4;
    for (word, bytes) in words.iter_mut().zip(key.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    let substitute = |word: u32| {
        let assisted = _mm_aeskeygenassist_si128::<0>(_mm_set1_epi32(word as i32));
        _mm_cvtsi128_si32(assisted) as u32
    };
    let mut constant = 1;
    for i in length..4 * KEYS {
        let mut word = words[i - 1];
        if i % length == 0 {
            word = substitute(word.rotate_right(8)) ^ constant;
            constant = (constant << 1) ^ ((constant >> 7) * 0x11b);
        } else if length == 8 && i % 8 == 4 {
            word = substitute(word);
        }
        words[i] = words[i - length] ^ word;
    }
    for (round_key, words) in round_keys.iter_mut().zip(words.as_chunks::<4>().0) {
        let [a, b, c, d] = words.map(u128::from);
        *round_key = (a | b << 32 | c << 64 | d << 96).into();
    }
    words.zeroize();
}

/// The round keys of the equivalent inverse cipher (FIPS 197 section 5.3.5).
#[target_feature(enable = "aes")]
fn invert<const KEYS: usize>(encrypt: &[RoundKey; KEYS], decrypt: &mut [RoundKey; KEYS]) {
    for (i, key) in encrypt.iter().rev().enumerate() {
        decrypt[i] = *key;
        if (1..KEYS - 1).contains(&i) {
            // SAFETY: both types are 16 plain bytes.
            decrypt[i] = unsafe {
                let mixed = _mm_aesimc_si128(std::mem::transmute::<u128, __m128i>(key.0[0]));
                std::mem::transmute::<__m128i, u128>(mixed).into()
            };
        }
    }
}

/// Turns sector numbers into the tweaks of their first blocks; full batches go side by side.
#[target_feature(enable = "aes")]
fn encrypt_tweaks<const KEYS: usize>(keys: &[RoundKey; KEYS], numbers: &mut [u128]) {
    let (batches, rest) = numbers.as_chunks_mut::<LANES>();
    for batch in batches {
        encrypt_blocks(keys, batch);
    }
    for number in rest.as_chunks_mut::<1>().0 {
        encrypt_blocks(keys, number);
    }
}

#[inline]
#[target_feature(enable = "aes")]
fn encrypt_blocks<const KEYS: usize, const N: usize>(
    keys: &[RoundKey; KEYS],
    blocks: &mut [u128; N],
) {
    // SAFETY: both types are 16 plain bytes.
    let vector = |block: u128| unsafe { std::mem::transmute::<u128, __m128i>(block) };
    let mut lanes = [_mm_setzero_si128(); N];
    for (lane, block) in lanes.iter_mut().zip(&*blocks) {
        *lane = _mm_xor_si128(vector(*block), vector(keys[0].0[0]));
    }
    for key in &keys[1..KEYS - 1] {
        for lane in &mut lanes {
            *lane = _mm_aesenc_si128(*lane, vector(key.0[0]));
        }
    }
    for (lane, block) in lanes.iter().zip(blocks) {
        let last = _mm_aesenclast_si128(*lane, vector(keys[KEYS - 1].0[0]));
        // SAFETY: as above.
        *block = unsafe { std::mem::transmute::<__m128i, u128>(last) };
    }
}

/// Keeps the lanes at the same round. Left alone, the compiler saves registers by finishing lane
/// after lane, and then each round waits for the one before.
macro_rules! in_step {
    ($register:ident, $lanes:ident) => {
        // SAFETY: no instruction; it only claims to change what it names.
        unsafe {
            std::arch::asm!(
                "/* {0} {1} {2} {3} {4} {5} {6} {7} */",
                inout($register) $lanes[0],
                inout($register) $lanes[1],
                inout($register) $lanes[2],
                inout($register) $lanes[3],
                inout($register) $lanes[4],
                inout($register) $lanes[5],
                inout($register) $lanes[6],
                inout($register) $lanes[7],
                options(pure, nomem, nostack, preserves_flags)
            );
        }
    };
}

/// Makes the module of one vector width. `through` takes a sector for each tweak through it.
macro_rules! engine {
    (
        $name:ident, $features:literal, $vector:ty, $register:ident,
        blocks $blocks:literal, group $group:ty,
        $load:ident, $store:ident, $xor:ident, $multiply:ident,
        bytes $bytes_left:ident, $bytes_right:ident, bits $bits_left:ident, $bits_right:ident,
        $encrypt:ident, $encrypt_last:ident, $decrypt:ident, $decrypt_last:ident
    ) => {
        mod $name {
            use super::*;

            type Vector = $vector;
            const BYTES: usize = 16 * $blocks;
            const _: () = assert!(SectorSize::MIN.0.is_multiple_of(LANES * BYTES));

            #[target_feature(enable = $features)]
            pub fn through<const KEYS: usize, const DECRYPT: bool>(
                keys: &[RoundKey; KEYS],
                sector_size: SectorSize,
                tweaks: &[u128],
                mut data: InOutBuf<'_, '_, u8>,
            ) {
                for &tweak in tweaks {
                    let (sector, rest) = data.split_at(sector_size.bytes());
                    data = rest;
                    let mut masks = first_masks(tweak);
                    for eight in sector.into_chunks::<$group>().0 {
                        eight_vectors::<KEYS, DECRYPT>(keys, &mut masks, eight);
                    }
                }
            }

            /// The masks of the first eight vectors of a sector.
            #[inline]
            #[target_feature(enable = $features)]
            fn first_masks(tweak: u128) -> [Vector; LANES] {
                // In halves, since the compiler takes 128-bit integers apart byte by byte.
                let mut blocks = [[0_u64; 2]; $blocks];
                let mut mask = tweak;
                for block in &mut blocks {
                    *block = [mask as u64, (mask >> 64) as u64];
                    mask = times_a(mask);
                }
                // SAFETY: as many blocks as the vector has; alignment does not matter.
                let mut masks = [unsafe { $load(blocks.as_ptr().cast()) }; LANES];
                for i in 1..LANES {
                    // From 1 lane to 2, to 4, to 8: a short chain of dependencies.
                    let known = 1 << i.ilog2();
                    masks[i] = multiply(masks[i - known], known * $blocks);
                }
                masks
            }

            /// Encrypts or decrypts eight vectors, and leaves the masks of the next eight.
            #[inline]
            #[target_feature(enable = $features)]
            fn eight_vectors<const KEYS: usize, const DECRYPT: bool>(
                keys: &[RoundKey; KEYS],
                masks: &mut [Vector; LANES],
                mut data: InOut<'_, '_, Array<u8, $group>>,
            ) {
                let (first, last) = (key(&keys[0]), key(&keys[KEYS - 1]));
                let mut lanes = [first; LANES];
                let from = data.get_in().as_slice().as_chunks().0;
                for i in 0..LANES {
                    lanes[i] = $xor(load(&from[i]), $xor(masks[i], first));
                }

                // A mask is due with the last round key, and is replaced meanwhile.
                let mut ends = [last; LANES];
                for i in 0..LANES {
                    round::<DECRYPT>(&mut lanes, &keys[1 + i]);
                    ends[i] = $xor(masks[i], last);
                    masks[i] = advance(masks[i]);
                }
                for round_key in &keys[1 + LANES..KEYS - 1] {
                    round::<DECRYPT>(&mut lanes, round_key);
                }

                let to = data.get_out().as_mut_slice().as_chunks_mut().0;
                for i in 0..LANES {
                    let done = match DECRYPT {
                        true => $decrypt_last(lanes[i], ends[i]),
                        false => $encrypt_last(lanes[i], ends[i]),
                    };
                    store(&mut to[i], done);
                }
            }

            /// One AES round of all lanes.
            #[inline]
            #[target_feature(enable = $features)]
            fn round<const DECRYPT: bool>(lanes: &mut [Vector; LANES], round_key: &RoundKey) {
                let round_key = key(round_key);
                for lane in lanes.iter_mut() {
                    *lane = match DECRYPT {
                        true => $decrypt(*lane, round_key),
                        false => $encrypt(*lane, round_key),
                    };
                }
                in_step!($register, lanes);
            }

            /// Multiplies by a^bits: what leaves a half enters the other, or is folded in.
            #[inline]
            #[target_feature(enable = $features)]
            fn multiply(mask: Vector, bits: usize) -> Vector {
                let count = |bits: usize| _mm_cvtsi64_si128(bits as i64);
                let carry = $bits_right(mask, count(64 - bits));
                let shifted = $xor($bits_left(mask, count(bits)), $bytes_left::<8>(carry));
                $xor(shifted, $multiply::<1>(carry, key(&POLYNOMIAL)))
            }

            /// Multiplies by a^(8 * blocks): shifts by as many bytes as there are blocks.
            #[inline]
            #[target_feature(enable = $features)]
            fn advance(mask: Vector) -> Vector {
                let carry = $bytes_right::<{ 16 - $blocks }>(mask);
                let shifted = $bytes_left::<$blocks>(mask);
                $xor(shifted, $multiply::<0>(carry, key(&POLYNOMIAL)))
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn load(bytes: &[u8; BYTES]) -> Vector {
                // SAFETY: as many bytes as the vector has; alignment does not matter.
                unsafe { $load(bytes.as_ptr().cast()) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn store(bytes: &mut [u8; BYTES], vector: Vector) {
                // SAFETY: as for `load`.
                unsafe { $store(bytes.as_mut_ptr().cast(), vector) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn key(key: &RoundKey) -> Vector {
                // SAFETY: four blocks are as long as the widest vector.
                unsafe { $load(key.0.as_ptr().cast()) }
            }
        }
    };
}

engine!(
    aes_ni, "aes,pclmulqdq", __m128i, xmm_reg,
    blocks 1, group U128,
    _mm_loadu_si128, _mm_storeu_si128, _mm_xor_si128, _mm_clmulepi64_si128,
    bytes _mm_bslli_si128, _mm_bsrli_si128, bits _mm_sll_epi64, _mm_srl_epi64,
    _mm_aesenc_si128, _mm_aesenclast_si128, _mm_aesdec_si128, _mm_aesdeclast_si128
);
engine!(
    vaes_256, "vaes,vpclmulqdq,avx2", __m256i, ymm_reg,
    blocks 2, group U256,
    _mm256_loadu_si256, _mm256_storeu_si256, _mm256_xor_si256, _mm256_clmulepi64_epi128,
    bytes _mm256_bslli_epi128, _mm256_bsrli_epi128, bits _mm256_sll_epi64, _mm256_srl_epi64,
    _mm256_aesenc_epi128, _mm256_aesenclast_epi128, _mm256_aesdec_epi128, _mm256_aesdeclast_epi128
);
engine!(
    vaes_512, "vaes,vpclmulqdq,avx512f,avx512bw", __m512i, zmm_reg,
    blocks 4, group U512,
    _mm512_loadu_si512, _mm512_storeu_si512, _mm512_xor_si512, _mm512_clmulepi64_epi128,
    bytes _mm512_bslli_epi128, _mm512_bsrli_epi128, bits _mm512_sll_epi64, _mm512_srl_epi64,
    _mm512_aesenc_epi128, _mm512_aesenclast_epi128, _mm512_aesdec_epi128, _mm512_aesdeclast_epi128
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_is_not_there_makes_no_key() {
        for engine in [Engine::AesNi, Engine::Vaes256, Engine::Vaes512] {
            let there = Engine::available().any(|available| available == engine);
            assert_eq!(Pair::<15>::new(engine, &[1; 64]).is_some(), there);
        }
    }
}
