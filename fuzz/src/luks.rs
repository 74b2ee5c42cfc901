//! The LUKS2 header: binary header, JSON metadata, keyslots.

use e2ebak::error::Kind;
use e2ebak::luks::{self, Header};
use e2ebak::secret::Secret;
use serde_json::{Value, json as value};

use super::input::Input;
use super::sample::{self, AREA, COPY, Price, SIZE};

/// Spoils both copies of the header, mostly their first bytes.
pub fn binary(data: &[u8]) {
    let mut input = Input(data);
    let mut image = sample::image();
    // The first byte says how much of the image there is at all.
    let len = match input.u8() {
        0 => SIZE,
        cut => SIZE * usize::from(cut) / 256,
    };
    let bounds = match input.u8() % 3 {
        0 => 0..512,
        1 => COPY..COPY + 512,
        _ => 0..2 * COPY,
    };
    sample::spoil(&mut image, bounds, &mut input);
    sample::spoil(&mut image, 0..2 * COPY, &mut input);
    image.truncate(len);
    if let Ok(loaded) = luks::load(&mut sample::reader(&image), image.len() as u64) {
        check(&loaded.header, image.len() as u64);
    }
}

/// Takes the input for the JSON text of both copies, on an image of 1 TiB.
pub fn json(text: &[u8]) {
    if text.len() > sample::JSON_MAX {
        return;
    }
    let size = 1 << 40;
    let Some(header) = load_json(text, size) else {
        return;
    };
    check(&header, size);
    assert_eq!(header.json()["config"]["json_size"], "12288");
    // What it holds is written down and read again without a change.
    let text = header.json().to_string();
    if text.len() <= sample::JSON_MAX {
        let again = load_json(text.as_bytes(), size).expect("was good before");
        assert_eq!(again.keyslots(), header.keyslots());
        assert_eq!(again.segment(), header.segment());
        assert_eq!(again.digest(), header.digest());
        assert_eq!(again.tokens().len(), header.tokens().len());
    }
}

fn load_json(text: &[u8], size: u64) -> Option<Header> {
    let mut image = sample::image();
    for at in [0, COPY] {
        sample::put_json(&mut image, at, text);
    }
    // The image is a terabyte long and zeros from here on.
    let mut read = |offset: u64, out: &mut [u8]| {
        out.fill(0);
        let at = usize::try_from(offset).expect("within the image");
        let there = image.get(at..).unwrap_or_default();
        let len = there.len().min(out.len());
        out[..len].copy_from_slice(&there[..len]);
        Ok(())
    };
    let loaded = luks::load(&mut read, size).ok()?;
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    Some(loaded.header)
}

/// What holds of every header that is let in.
fn check(header: &Header, size: u64) {
    let end = 2 * header.header_size() + header.keyslots_size();
    let segment = header.segment();
    let sector = segment.sector_size().bytes() as u64;
    assert!(segment.offset() >= end && segment.offset() + segment.size() <= size);
    assert!(segment.offset().is_multiple_of(512) && segment.size().is_multiple_of(sector));

    let mut areas = Vec::new();
    for slot in header.keyslots() {
        let (from, to) = (
            slot.area().offset(),
            slot.area().offset() + slot.area().size(),
        );
        assert!(from >= 2 * header.header_size() && from < to && to <= end);
        areas.push(from..to);
        if let Ok(lock) = slot.lock() {
            assert!(matches!(lock.area_key_size(), 32 | 64));
            assert!(slot.area().size() >= u64::from(slot.key_size()) * 4000);
        }
    }
    areas.sort_by_key(|area| area.start);
    assert!(areas.windows(2).all(|pair| pair[0].end <= pair[1].start));
    let known = |id: &usize| header.keyslots().iter().any(|slot| slot.id() == *id);
    assert!(header.digest().keyslots().iter().all(known));
    for text in [header.uuid(), header.label(), header.subsystem()] {
        assert!(!text.contains(char::is_control), "{text:?}");
    }
}

/// A keyslot that the server has written: costs, kinds and the area's bytes.
pub fn keyslot(data: &[u8]) {
    let mut input = Input(data);
    let mut image = sample::image();
    let changed = change_keyslot(&mut image, &mut input);
    let before = image[AREA..].to_vec();
    sample::spoil(&mut image, AREA..SIZE, &mut input);
    let changed = changed || image[AREA..] != before;

    let loaded = luks::load(&mut sample::reader(&image), image.len() as u64);
    let Ok(header) = loaded.map(|loaded| loaded.header) else {
        return;
    };
    let prices = sample::prices(&header);
    let passphrase = Secret::new(sample::PASSPHRASE.to_vec());
    if prices.contains(&Price::Refused) {
        // Neither time nor memory is spent, nor is the area read.
        let error = header
            .unlock(&passphrase, &mut sample::no_read)
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{}", error.report());
        return;
    }
    if prices.contains(&Price::Dear) {
        return;
    }
    match header.unlock(&passphrase, &mut sample::reader(&image)) {
        Ok((_, key)) => assert_eq!(key.bytes(), sample::volume_key()),
        Err(error) => {
            assert!(changed, "the sound keyslot does not open");
            assert!(matches!(error.kind(), Kind::WrongKey | Kind::Unsupported));
        }
    }
}

/// Whether anything is different now.
fn change_keyslot(image: &mut [u8], input: &mut Input) -> bool {
    let what = input.u8();
    let mut metadata = sample::json(image, 0);
    let slot = &mut metadata["keyslots"]["0"];
    let salt = slot["kdf"]["salt"].clone();
    let number = |input: &mut Input| Value::from(input.u32());
    match what % 4 {
        0 => {}
        1 => {
            let kind = ["argon2id", "argon2i"][usize::from(input.u8() % 2)];
            slot["kdf"] = value!({"type": kind, "salt": salt, "memory": number(input),
                "time": number(input), "cpus": number(input)});
        }
        2 => {
            let hash = ["sha256", "sha512", "sha1", "whirlpool"][usize::from(input.u8() % 4)];
            slot["kdf"] = value!({"type": "pbkdf2", "salt": salt, "hash": hash,
                "iterations": number(input)});
        }
        _ => {
            let places = [
                "/key_size",
                "/af/stripes",
                "/area/key_size",
                "/af/hash",
                "/area/encryption",
            ];
            let place = places[usize::from(input.u8()) % places.len()];
            let new = match place.ends_with("size") || place.ends_with("stripes") {
                true => number(input),
                false => String::from_utf8_lossy(input.string()).into(),
            };
            *slot.pointer_mut(place).expect("is there") = new;
        }
    }
    if what & 0x80 != 0 {
        metadata["digests"]["0"]["iterations"] = number(input);
    }
    for at in [0, COPY] {
        sample::put_json(image, at, metadata.to_string().as_bytes());
    }
    what != 0
}
