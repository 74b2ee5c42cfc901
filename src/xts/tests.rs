//! The vectors of IEEE 1619-2007 annex B, and agreement with the `xts-mode` crate.

use aes::cipher::consts::U16;
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use proptest::prelude::*;
use xts_mode::{Xts128, get_tweak_default};

use super::*;

const E: &str = "2718281828459045235360287471352662497757247093699959574966967627";
const PI: &str = "3141592653589793238462643383279502884197169399375105820974944592";

fn bytes(hex: &str) -> Vec<u8> {
    let pairs = (0..hex.len()).step_by(2);
    pairs
        .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hexadecimal"))
        .collect()
}

fn key(one: &str, two: &str) -> Key {
    Key::new(&bytes(&[one, two].concat())).expect("a key length of XTS")
}

/// Checks one data unit in both directions.
fn check_vector(key: &Key, unit: u64, plaintext: &[u8], ciphertext: &[u8]) {
    let size = SectorSize(plaintext.len());
    let mut data = plaintext.to_vec();
    key.encrypt(size, Tweak(unit), &mut data).expect("whole");
    assert_eq!(data, ciphertext, "encrypt unit {unit:x}");
    key.decrypt(size, Tweak(unit), &mut data).expect("whole");
    assert_eq!(data, plaintext, "decrypt unit {unit:x}");
}

#[test]
fn short_vectors_of_the_standard() {
    // IEEE 1619-2007 annex B, vectors 1 to 3: data units of 32 bytes.
    for (one, two, unit, plain, cipher) in [
        (
            [0x00; 16],
            [0x00; 16],
            0,
            [0x00; 32],
            "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e",
        ),
        (
            [0x11; 16],
            [0x22; 16],
            0x33_3333_3333,
            [0x44; 32],
            "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0",
        ),
        (
            std::array::from_fn(|i| 0xff - i as u8),
            [0x22; 16],
            0x33_3333_3333,
            [0x44; 32],
            "af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89",
        ),
    ] {
        // Shorter than a sector can be, so only the portable path knows them.
        let key = Key::portable(&[one, two].concat()).expect("32 bytes");
        check_vector(&key, unit, &plain, &bytes(cipher));
    }
}

#[test]
fn vectors_of_the_standard_with_whole_sectors() {
    let plain: Vec<u8> = (0..512).map(|i| i as u8).collect();
    let text = include_str!("ieee1619.txt");
    let mut seen = 0;
    for vector in text.split("vector ").skip(1) {
        let (title, cipher) = vector.split_once('\n').expect("a title line");
        let (number, unit) = title.split_once(" unit ").expect("number and unit");
        let unit = u64::from_str_radix(unit, 16).expect("hexadecimal");
        let half = if number == "4" { 32 } else { 64 };
        let cipher = bytes(&cipher.replace('\n', ""));
        let key = bytes(&[&E[..half], &PI[..half]].concat());
        for (_, key) in Key::implementations(&key).expect("a key length of XTS") {
            check_vector(&key, unit, &plain, &cipher);
        }
        seen += 1;
    }
    assert_eq!(seen, 6);
}

#[test]
fn keys_have_two_lengths_and_sectors_four_sizes() {
    for len in 0..=130 {
        assert_eq!(Key::new(&vec![7; len]).is_some(), len == 32 || len == 64);
    }
    let known: Vec<u64> = (0..=16384)
        .filter(|&n| SectorSize::new(n).is_some())
        .collect();
    assert_eq!(known, [512, 1024, 2048, 4096]);
    assert_eq!(SectorSize::new(1 << 63), None);
}

#[test]
fn the_tweak_counts_512_bytes_whatever_the_sector_size() {
    let key = key(E, PI);
    let mut run = vec![0; 3 * 4096];
    key.encrypt(SectorSize::MAX, Tweak(5), &mut run)
        .expect("whole");
    let mut third = vec![0; 4096];
    key.encrypt(SectorSize::MAX, Tweak(5 + 16), &mut third)
        .expect("whole");
    assert_eq!(run[2 * 4096..], third);
    assert_eq!(Tweak::at(Tweak(5), 2 * 4096), Tweak(5 + 16));
    assert_eq!(Tweak::at(Tweak(u64::MAX), 1024), Tweak(1));
}

#[test]
fn part_of_a_sector_is_refused_and_left_alone() {
    let key = key(E, PI);
    let mut data = vec![1; 5000];
    for len in [1, 16, 511, 4095, 5000] {
        let part = &mut data[..len];
        assert!(key.encrypt(SectorSize::MAX, Tweak(0), part).is_err());
        assert!(key.decrypt(SectorSize::MAX, Tweak(0), part).is_err());
    }
    let long = [0; 8192];
    let refused = key.encrypt_into(SectorSize::MAX, Tweak(0), &long, &mut data[..4096]);
    assert!(refused.is_err());
    assert!(data.iter().all(|&byte| byte == 1));
    assert!(key.encrypt(SectorSize::MAX, Tweak(0), &mut []).is_ok());
}

/// Encrypts sector by sector with `xts-mode`, numbering the sectors by hand.
fn reference<C>(key: &[u8], size: usize, first: u64, data: &[u8]) -> Vec<u8>
where
    C: KeyInit + BlockCipherEncrypt<BlockSize = U16> + BlockCipherDecrypt<BlockSize = U16>,
{
    let (one, two) = key.split_at(key.len() / 2);
    let cipher = |key| C::new_from_slice(key).expect("a key length of AES");
    let xts = Xts128::new(cipher(one), cipher(two));
    let mut out = data.to_vec();
    for (i, sector) in out.chunks_mut(size).enumerate() {
        let number = first.wrapping_add((i * size / 512) as u64);
        xts.encrypt_sector(sector, get_tweak_default(number.into()));
    }
    out
}

#[test]
fn a_long_run_is_split_without_a_seam() {
    let raw: Vec<u8> = (0..64).collect();
    let key = Key::new(&raw).expect("64 bytes");
    // Whatever this machine has: as if there were 1, 2, 3 and 8 processors.
    let plain: Vec<u8> = (0..(9 << 20) + 512_u32).map(|i| (i >> 5) as u8).collect();
    for size in [SectorSize::MIN, SectorSize(1024)] {
        let plain = &plain[..plain.len() - plain.len() % size.bytes()];
        let mut expected = plain.to_vec();
        key.encrypt_run(size, Tweak(7), InOutBuf::from(&mut expected[..]));
        for threads in [1, 2, 3, 8] {
            let parts = std::sync::atomic::AtomicUsize::new(0);
            let mut data = vec![0; plain.len()];
            let work = |tweak, run: Run| {
                parts.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                key.encrypt_run(size, tweak, run.into());
            };
            split(&work, Tweak(7), Run::Across(plain, &mut data), threads);
            assert!(data == expected, "{threads} threads");
            assert_eq!(parts.into_inner(), threads.min(4));
        }
        let mut data = plain.to_vec();
        key.encrypt(size, Tweak(7), &mut data).expect("whole");
        assert!(data == expected, "in place");
        key.decrypt(size, Tweak(7), &mut data).expect("whole");
        assert!(data == plain, "decrypt");
    }
}

proptest! {
    #[test]
    fn every_implementation_agrees_with_xts_mode(
        key in prop_oneof![prop::collection::vec(any::<u8>(), 32), prop::collection::vec(any::<u8>(), 64)],
        log in 9..=12_u32,
        first in prop_oneof![any::<u64>(), (0..40_u64).prop_map(|n| u64::MAX - n), 0..40_u64],
        count in 0..20_usize,
        // Vectors are loaded from and stored to any address.
        skew in 0..64_usize,
        seed in any::<u64>(),
    ) {
        let size = 1 << log;
        let mut state = seed;
        let data: Vec<u8> = (0..count * size).map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        }).collect();
        let expected = match key.len() {
            32 => reference::<Aes128>(&key, size, first, &data),
            _ => reference::<Aes256>(&key, size, first, &data),
        };
        let (size, first) = (SectorSize(size), Tweak(first));
        for (name, key) in Key::implementations(&key).expect("32 or 64 bytes") {
            let mut copy = vec![0xee; skew + data.len() + 1];
            let (before, rest) = copy.split_at_mut(skew);
            let (to, after) = rest.split_at_mut(data.len());
            prop_assert!(key.encrypt_into(size, first, &data, to).is_ok());
            prop_assert!(to == expected, "{} encrypt_into", name);
            prop_assert!(key.decrypt(size, first, to).is_ok());
            prop_assert!(to == data, "{} decrypt", name);
            prop_assert!(key.encrypt(size, first, to).is_ok());
            prop_assert!(to == expected, "{} encrypt", name);
            prop_assert!(before.iter().chain(&*after).all(|&byte| byte == 0xee));
        }
    }
}
