//! Damage as it happens: lost copies, cut files, flipped bits.

use e2ebak::error::Kind;
use e2ebak::luks::HeaderCopy;
use e2ebak::secret::Secret;
use proptest::prelude::*;

use super::sample::{self, COPY, image, load, reader, unlock};

fn zero(image: &mut [u8], at: usize) {
    image[at..at + COPY].fill(0);
}

#[test]
fn one_lost_copy_is_survived_with_a_warning() {
    for (at, copy, said) in [
        (
            0,
            HeaderCopy::Secondary,
            "the primary LUKS2 header is damaged",
        ),
        (
            COPY,
            HeaderCopy::Primary,
            "the secondary LUKS2 header is damaged",
        ),
    ] {
        let mut image = image();
        zero(&mut image, at);
        let loaded = load(&image).expect("one copy is enough");
        assert_eq!(loaded.copy, copy);
        assert!(
            loaded.warnings[0].starts_with(said),
            "{:?}",
            loaded.warnings
        );
        assert_eq!(unlock(&image).expect("opens").0, 0);
    }
}

#[test]
fn two_lost_copies_are_no_image() {
    let mut image = image();
    zero(&mut image, 0);
    zero(&mut image, COPY);
    let error = load(&image).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(
        error.to_string().starts_with("not a LUKS2 image"),
        "{error}"
    );
}

#[test]
fn a_flipped_bit_is_survived_in_one_copy_and_named_in_both() {
    for bit in [
        0,
        17,
        8 * 40,
        8 * 448,
        8 * 479,
        8 * 4096,
        8 * 5000 + 3,
        8 * (COPY - 1),
    ] {
        let mut bad = image();
        bad[bit / 8] ^= 1 << (bit % 8);
        let loaded = load(&bad).expect("the secondary is good");
        assert_eq!(loaded.copy, HeaderCopy::Secondary, "bit {bit}");

        bad[COPY + bit / 8] ^= 1 << (bit % 8);
        assert!(load(&bad).is_err(), "bit {bit}");
    }
    let mut bad = image();
    bad[5000] ^= 1;
    bad[COPY + 300] ^= 1;
    let error = load(&bad).unwrap_err();
    assert_eq!(
        error.to_string(),
        "both LUKS2 headers are damaged; primary: its sha256 checksum does not match; \
         secondary: its sha256 checksum does not match"
    );
}

#[test]
fn a_cut_file_is_refused_wherever_it_ends() {
    let whole = image();
    for (len, said) in [
        (0, "not a LUKS2 image"),
        (511, "not a LUKS2 image"),
        (4096, "both LUKS2 headers are damaged"),
        (COPY - 1, "both LUKS2 headers are damaged"),
        (COPY, "the image is cut off: its keyslots end at 16777216"),
        (2 * COPY, "the image is cut off"),
        (1 << 20, "the image is cut off"),
        (16 << 20, "the image is cut off"),
        ((16 << 20) + 512, "the image is cut off"),
    ] {
        let error = load(&whole[..len]).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{len}");
        assert!(error.to_string().starts_with(said), "{len}: {error}");
    }
}

#[test]
fn a_damaged_keyslot_area_is_a_wrong_key() {
    let mut image = image();
    image[0x8000 + 128_000] ^= 1;
    assert_eq!(unlock(&image).unwrap_err().kind(), Kind::WrongKey);
}

#[test]
fn an_older_version_1_header_in_front_is_named() {
    let mut image = image();
    image[7] = 1;
    let error = load(&image).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert_eq!(error.to_string(), "this is a LUKS1 image, not LUKS2");

    // Of a later version nothing is known, but the secondary copy is good.
    image[7] = 3;
    assert_eq!(load(&image).expect("loads").copy, HeaderCopy::Secondary);
    image[COPY + 7] = 3;
    assert!(load(&image).is_err());
}

/// Loads and, if that works, unlocks; nothing may panic, and reads stay within the image.
fn survives(image: &[u8]) {
    let mut reads = 0;
    let mut read = reader(image);
    let mut counted = |offset: u64, out: &mut [u8]| {
        reads += 1;
        assert!(offset + out.len() as u64 <= image.len() as u64);
        read(offset, out)
    };
    let loaded = e2ebak::luks::load(&mut counted, image.len() as u64);
    assert!(reads <= 2 + 2 * 9, "{reads} reads");
    if let Ok(loaded) = loaded {
        let passphrase = Secret::new(b"no".to_vec());
        // Costs that a flip may have made dear are not spent here; their bounds have tests.
        let cheap = loaded.header.json() == &sample::json(&sample::image(), 0);
        if cheap {
            let result = loaded.header.unlock(&passphrase, &mut reader(image));
            assert!(result.is_err());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_never_panic(
        flips in prop::collection::vec((0_usize..2 * COPY + 4096, 1_u8..), 1..8),
    ) {
        let mut image = image();
        for (at, with) in flips {
            image[at] ^= with;
        }
        survives(&image);
    }

    /// With the checksum made right again the flips reach the JSON reader and all that follows.
    #[test]
    fn flipped_bytes_under_a_right_checksum_never_panic(
        flips in prop::collection::vec((0_usize..1400, 0_u8..128), 1..4),
        both in any::<bool>(),
    ) {
        let mut image = image();
        for at in [0, COPY].into_iter().take(1 + usize::from(both)) {
            for (offset, byte) in &flips {
                image[at + 4096 + offset] = *byte;
            }
            sample::reseal(&mut image, at);
        }
        survives(&image);
    }

    #[test]
    fn noise_is_refused(
        mut start in prop::collection::vec(any::<u8>(), 0..3 * COPY),
        magic in any::<bool>(),
    ) {
        if magic && start.len() > 8 {
            start[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
        }
        prop_assert!(load(&start).is_err());
    }
}
