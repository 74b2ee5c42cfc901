//! From a passphrase to the key of a keyslot area: Argon2 (RFC 9106) and PBKDF2 (RFC 8018).
//!
//! What a header asks for is a number that the server wrote, so everything is bounded before it is
//! spent. The bounds for opening are wider than those for making.

use std::fmt;
use std::time::Duration;

use argon2::{Algorithm, Argon2, Block, Params, Version};

use crate::secret::{Pages, Secret, Use, with_clean_stack};
use crate::units::{Bytes, KIB};

use super::hash::Hash;

/// Memory of an Argon2 that is opened: 4 GiB, as much as cryptsetup makes.
const OPEN_MEMORY_MAX_KIB: u32 = 4 << 20;
/// Lanes of an Argon2 that is opened; cryptsetup makes at most 4.
const OPEN_LANES_MAX: u32 = 16;
/// Memory times passes of an Argon2 that is opened, in KiB: 1 TiB, some ten minutes on two cores.
const OPEN_WORK_MAX_KIB: u64 = 1 << 30;
/// Iterations of a PBKDF2 that is opened; about ten minutes with SHA-256.
pub(super) const OPEN_ITERATIONS_MAX: u32 = 500_000_000;

/// Memory of an Argon2 that is made: 1 GiB, which cryptsetup takes too.
pub const MEMORY_MAX_KIB: u32 = 1 << 20;
/// Memory of an Argon2 that is made, at least: as cryptsetup.
pub const MEMORY_MIN_KIB: u32 = 32;
/// Lanes of an Argon2 that is made: more are refused by cryptsetup.
pub const LANES_MAX: u32 = 4;
/// Passes of an Argon2 that is made, at least: as cryptsetup.
pub const TIME_MIN: u32 = 4;

/// What one Argon2 derivation costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// Memory in KiB, all of it written in every pass.
    pub memory_kib: u32,
    /// Passes over the memory.
    pub time: u32,
    /// Lanes that are filled side by side.
    pub lanes: u32,
}

impl Costs {
    /// A derivation cheap enough to be timed, dear enough to tell: 64 MiB, four passes.
    pub fn probe(lanes: u32) -> Costs {
        Costs {
            memory_kib: 64 << 10,
            time: TIME_MIN,
            lanes: lanes.clamp(1, LANES_MAX),
        }
    }

    /// Costs that take about `target` on a machine where `self` took `measured`: first as much
    /// memory as that and `memory_max_kib` allow, then more passes.
    pub fn calibrated(self, measured: Duration, target: Duration, memory_max_kib: u32) -> Costs {
        let lanes = self.lanes.clamp(1, LANES_MAX);
        let memory_max = memory_max_kib.clamp(MEMORY_MIN_KIB, MEMORY_MAX_KIB);
        let work = u128::from(self.memory_kib) * u128::from(self.time);
        let target_work = work * target.as_nanos() / measured.as_nanos().max(1);

        let wanted = target_work / u128::from(TIME_MIN);
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        // Argon2 uses whole multiples of four blocks a lane.
        let memory_kib = wanted.min(memory_max) / (4 * lanes) * (4 * lanes);
        let memory_kib = memory_kib.max(MEMORY_MIN_KIB);

        let passes_max = OPEN_WORK_MAX_KIB / u64::from(memory_kib);
        let time = (target_work / u128::from(memory_kib)).min(u128::from(passes_max));
        Costs {
            memory_kib,
            time: u32::try_from(time).unwrap_or(u32::MAX).max(TIME_MIN),
            lanes,
        }
    }

    /// Runs one derivation on made-up input, for the caller to time.
    pub fn spend(self) -> Result<(), String> {
        let kdf = Kdf::Argon2 {
            variant: Variant::Id,
            costs: self,
            salt: vec![0; 32],
        };
        kdf.derive(b"probe", &mut [0; 64])
    }

    /// Why a new keyslot may not cost this much or this little.
    pub(super) fn check_for_making(self) -> Result<(), String> {
        let known = (MEMORY_MIN_KIB..=MEMORY_MAX_KIB).contains(&self.memory_kib)
            && (1..=LANES_MAX).contains(&self.lanes)
            && self.time >= TIME_MIN;
        match known {
            true => self.check_for_opening(),
            false => Err(format!(
                "{self} is outside of {MEMORY_MIN_KIB} KiB to {MEMORY_MAX_KIB} KiB, \
                 {TIME_MIN} passes or more, 1 to {LANES_MAX} lanes"
            )),
        }
    }

    fn check_for_opening(self) -> Result<(), String> {
        let Costs {
            memory_kib,
            time,
            lanes,
        } = self;
        if memory_kib > OPEN_MEMORY_MAX_KIB {
            return Err(format!(
                "it asks for {} of memory, more than {}",
                kib(u64::from(memory_kib)),
                kib(u64::from(OPEN_MEMORY_MAX_KIB))
            ));
        }
        if !(1..=OPEN_LANES_MAX).contains(&lanes) {
            return Err(format!(
                "it asks for {lanes} lanes, not 1 to {OPEN_LANES_MAX}"
            ));
        }
        if memory_kib < 8 * lanes {
            return Err(format!(
                "it asks for {memory_kib} KiB of memory, too little for {lanes} lanes"
            ));
        }
        if time == 0 {
            return Err("it asks for no pass at all".into());
        }
        if u64::from(memory_kib) * u64::from(time) > OPEN_WORK_MAX_KIB {
            return Err(format!(
                "it asks for {time} passes over {}, more than {} in all",
                kib(u64::from(memory_kib)),
                kib(OPEN_WORK_MAX_KIB)
            ));
        }
        Ok(())
    }
}

impl fmt::Display for Costs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} KiB, {} passes, {} lanes",
            self.memory_kib, self.time, self.lanes
        )
    }
}

fn kib(number: u64) -> Bytes {
    Bytes(number.saturating_mul(KIB))
}

/// The two Argon2 that LUKS2 knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    I,
    Id,
}

/// A key derivation with its costs and salt, as a keyslot names it (specification section 3.2.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kdf {
    Pbkdf2 {
        hash: Hash,
        iterations: u32,
        salt: Vec<u8>,
    },
    Argon2 {
        variant: Variant,
        costs: Costs,
        salt: Vec<u8>,
    },
}

impl fmt::Display for Kdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kdf::Pbkdf2 {
                hash, iterations, ..
            } => write!(f, "pbkdf2-{}, {iterations} iterations", hash.name()),
            Kdf::Argon2 { costs, .. } => write!(f, "{}, {costs}", self.name()),
        }
    }
}

impl Kdf {
    /// As it stands in a header.
    pub fn name(&self) -> &'static str {
        match self {
            Kdf::Pbkdf2 { .. } => "pbkdf2",
            Kdf::Argon2 {
                variant: Variant::I,
                ..
            } => "argon2i",
            Kdf::Argon2 {
                variant: Variant::Id,
                ..
            } => "argon2id",
        }
    }

    /// Why it is not run, if its costs are out of bounds.
    pub(super) fn check(&self) -> Result<(), String> {
        match *self {
            Kdf::Pbkdf2 { iterations, .. } => check_iterations(iterations),
            Kdf::Argon2 { costs, .. } => costs.check_for_opening(),
        }
    }

    /// Fills `out` with the key of the passphrase. Fails without a byte written if the costs are
    /// out of bounds or the memory cannot be had.
    pub(super) fn derive(&self, passphrase: &[u8], out: &mut [u8]) -> Result<(), String> {
        self.check()?;
        match self {
            Kdf::Pbkdf2 {
                hash,
                iterations,
                salt,
            } => hash.pbkdf2(passphrase, salt, *iterations, out),
            Kdf::Argon2 {
                variant,
                costs,
                salt,
            } => derive_argon2(*variant, *costs, salt, passphrase, out)?,
        }
        Ok(())
    }
}

/// Why PBKDF2 is not run so many times.
pub(super) fn check_iterations(iterations: u32) -> Result<(), String> {
    match iterations {
        0 => Err("it asks for no iteration at all".into()),
        1..=OPEN_ITERATIONS_MAX => Ok(()),
        _ => Err(format!(
            "it asks for {iterations} iterations, more than {OPEN_ITERATIONS_MAX}"
        )),
    }
}

fn derive_argon2(
    variant: Variant,
    costs: Costs,
    salt: &[u8],
    passphrase: &[u8],
    out: &mut [u8],
) -> Result<(), String> {
    let params = Params::new(costs.memory_kib, costs.time, costs.lanes, Some(out.len()))
        .map_err(|error| format!("argon2: {error}"))?;
    let algorithm = match variant {
        Variant::I => Algorithm::Argon2i,
        Variant::Id => Algorithm::Argon2id,
    };
    let mut memory = Memory::of(params.block_count()).ok_or_else(|| {
        format!(
            "there is no memory for its {}",
            kib(costs.memory_kib.into())
        )
    })?;
    Argon2::new(algorithm, Version::V0x13, params)
        .hash_password_into_with_memory(passphrase, salt, out, memory.blocks())
        .map_err(|error| format!("argon2: {error}"))
}

/// Argon2's memory. It is had whole or not at all, kept out of core dumps, and wiped on drop.
///
/// The lanes touch it first, side by side; in huge pages, because its places are visited at random.
struct Memory(Pages);

impl Memory {
    fn of(blocks: usize) -> Option<Memory> {
        let len = blocks.checked_mul(Block::SIZE)?;
        Pages::zeroed(len, Use::Work).ok().map(Memory)
    }

    fn blocks(&mut self) -> &mut [Block] {
        const { assert!(align_of::<Block>() <= Pages::ALIGNMENT && size_of::<Block>() == Block::SIZE) };
        // SAFETY: a block is plain numbers, for which any bytes will do.
        let (before, blocks, after) = unsafe { self.0.bytes_mut().align_to_mut() };
        debug_assert!(before.is_empty() && after.is_empty());
        blocks
    }
}

/// A key on its way from the derivation to the cipher.
pub(super) fn derived(kdf: &Kdf, passphrase: &[u8], len: usize) -> Result<Secret, String> {
    let mut key = Secret::zeroed(len);
    with_clean_stack(|| kdf.derive(passphrase, key.bytes_mut()))?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn argon2(variant: Variant, memory_kib: u32, time: u32, lanes: u32) -> Kdf {
        Kdf::Argon2 {
            variant,
            costs: Costs {
                memory_kib,
                time,
                lanes,
            },
            salt: b"somesalt".to_vec(),
        }
    }

    fn hex(kdf: &Kdf) -> String {
        let mut out = [0; 32];
        kdf.derive(b"password", &mut out).expect("within bounds");
        out.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// test.c of the reference implementation (phc-winner-argon2), version 0x13. RFC 9106's own
    /// vectors need a secret and associated data, which LUKS2 does not use.
    #[test]
    fn argon2_agrees_with_the_reference_implementation() {
        for (kdf, expected) in [
            (
                argon2(Variant::I, 65536, 2, 1),
                "c1628832147d9720c5bd1cfd61367078729f6dfb6f8fea9ff98158e0d7816ed0",
            ),
            (
                argon2(Variant::I, 256, 2, 2),
                "4ff5ce2769a1d7f4c8a491df09d41a9fbe90e5eb02155a13e4c01e20cd4eab61",
            ),
            (
                argon2(Variant::Id, 65536, 2, 1),
                "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7",
            ),
            (
                argon2(Variant::Id, 256, 2, 2),
                "6d093c501fd5999645e0ea3bf620d7b8be7fd2db59c20d9fff9539da2bf57037",
            ),
        ] {
            assert_eq!(hex(&kdf), expected, "{}", kdf.name());
        }
    }

    /// RFC 9106 sections 5.2 and 5.3, which also fix that the crate reads lanes and memory as we do.
    #[test]
    fn argon2_agrees_with_the_rfc() {
        for (algorithm, expected) in [
            (
                Algorithm::Argon2i,
                "c814d9d1dc7f37aa13f0d77f2494bda1c8de6b016dd388d29952a4c4672b6ce8",
            ),
            (
                Algorithm::Argon2id,
                "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659",
            ),
        ] {
            let params = argon2::ParamsBuilder::new()
                .m_cost(32)
                .t_cost(3)
                .p_cost(4)
                .data(argon2::AssociatedData::new(&[4; 12]).expect("short"))
                .build()
                .expect("valid");
            let argon2 = Argon2::new_with_secret(&[3; 8], algorithm, Version::V0x13, params);
            let mut memory = Memory::of(32).expect("32 KiB");
            let mut tag = [0; 32];
            argon2
                .expect("valid")
                .hash_password_into_with_memory(&[1; 32], &[2; 16], &mut tag, memory.blocks())
                .expect("runs");
            let tag: String = tag.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(tag, expected, "{algorithm}");
        }
    }

    #[test]
    fn absurd_costs_are_refused_before_they_are_spent() {
        for (kdf, why) in [
            (argon2(Variant::Id, 100 << 20, 4, 4), "100.0 GiB of memory"),
            (argon2(Variant::Id, u32::MAX, u32::MAX, 4), "of memory"),
            (argon2(Variant::Id, 1 << 20, 4, 17), "17 lanes"),
            (argon2(Variant::Id, 1 << 20, 4, 0), "0 lanes"),
            (argon2(Variant::Id, 31, 4, 4), "too little"),
            (argon2(Variant::Id, 1 << 20, 0, 4), "no pass"),
            (argon2(Variant::Id, 1 << 20, 1025, 4), "1025 passes"),
            (argon2(Variant::I, 32, u32::MAX, 4), "4294967295 passes"),
        ] {
            let mut out = [0; 32];
            let refusal = kdf.derive(b"", &mut out).unwrap_err();
            assert!(refusal.contains(why), "{why}: {refusal}");
        }
        let pbkdf2 = |iterations| Kdf::Pbkdf2 {
            hash: Hash::Sha256,
            iterations,
            salt: vec![0; 32],
        };
        assert!(pbkdf2(u32::MAX).check().is_err() && pbkdf2(0).check().is_err());
        assert!(pbkdf2(OPEN_ITERATIONS_MAX).check().is_ok());
        assert!(argon2(Variant::Id, 4 << 20, 4, 4).check().is_ok());
    }

    #[test]
    fn calibration_spends_on_memory_first_and_stays_in_bounds() {
        let probe = Costs::probe(4);
        // 64 MiB x 4 in 0.125 s: 2 s buy 1 GiB x 4.
        let costs = probe.calibrated(SECOND / 8, 2 * SECOND, MEMORY_MAX_KIB);
        assert_eq!((costs.memory_kib, costs.time, costs.lanes), (1 << 20, 4, 4));
        // Twice as fast: the memory is at its bound, so more passes.
        let costs = probe.calibrated(SECOND / 16, 2 * SECOND, MEMORY_MAX_KIB);
        assert_eq!((costs.memory_kib, costs.time), (1 << 20, 8));
        // Slower: less memory, never fewer passes.
        let costs = probe.calibrated(SECOND, 2 * SECOND, MEMORY_MAX_KIB);
        assert_eq!((costs.memory_kib, costs.time), (128 << 10, 4));
        // A machine with little memory to spare.
        let costs = probe.calibrated(SECOND / 8, 2 * SECOND, 256 << 10);
        assert_eq!((costs.memory_kib, costs.time), (256 << 10, 16));

        for measured in [Duration::ZERO, Duration::MAX, SECOND] {
            for memory_max in [0, 7, 1 << 20, u32::MAX] {
                for lanes in [0, 1, 3, 4, 99] {
                    let costs = Costs::probe(lanes).calibrated(measured, 2 * SECOND, memory_max);
                    assert_eq!(costs.check_for_making(), Ok(()), "{measured:?} {costs}");
                }
            }
        }
    }

    #[test]
    fn what_cryptsetup_would_not_make_is_not_made() {
        let costs = |memory_kib, time, lanes| Costs {
            memory_kib,
            time,
            lanes,
        };
        assert!(costs(32, 4, 1).check_for_making().is_ok());
        for bad in [
            costs(31, 4, 1),
            costs((1 << 20) + 1, 4, 1),
            costs(1 << 20, 3, 1),
            costs(1 << 20, 4, 5),
            costs(1 << 20, 4, 0),
        ] {
            assert!(bad.check_for_making().is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        assert!(Memory::of(usize::MAX / 2048).is_none());
    }
}
