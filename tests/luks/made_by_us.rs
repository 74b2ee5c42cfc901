//! What we make, cryptsetup takes.

use e2ebak::error::Kind;
use e2ebak::luks::Format;
use e2ebak::xts::SectorSize;

use super::cryptsetup::{CHEAP_ARGON2, Image, present};
use super::sample;

/// Lays the format out in a file and lets cryptsetup judge it.
fn is_taken(format: &Format) {
    if !present() {
        return;
    }
    let made = sample::make(format);
    let image = Image::blank(format.device_size);
    for write in &made.writes {
        image.write(write.offset, &write.bytes);
    }
    let before = std::fs::read(&image.path).expect("there");
    image.run(&["isLuks", "--type", "luks2"], &[]);
    assert_eq!(image.metadata(), *made.header.json());
    assert_eq!(image.dumped("UUID"), format.uuid);
    assert!(image.opens_with(sample::PASSPHRASE));
    assert!(!image.opens_with(b"wrong"));
    assert_eq!(
        image.volume_key(sample::PASSPHRASE),
        made.volume_key.bytes()
    );
    // cryptsetup repairs what it thinks is damaged; it found nothing.
    assert!(before == std::fs::read(&image.path).expect("there"));

    let (slot, key) = image.unlock(sample::PASSPHRASE).expect("opens");
    assert_eq!((slot, key.bytes()), (0, made.volume_key.bytes()));

    image.add_key(sample::PASSPHRASE, b"added", &CHEAP_ARGON2);
    let (slot, key) = image.unlock(b"added").expect("opens");
    assert_eq!((slot, key.bytes()), (1, made.volume_key.bytes()));
    image.run(&["luksKillSlot"], &["0"]);
    assert_eq!(image.unlock(b"added").expect("opens").0, 1);
}

#[test]
fn the_usual_image() {
    is_taken(&sample::format());
}

#[test]
fn sectors_of_512_bytes_and_an_odd_size() {
    let mut format = sample::format();
    format.sector_size = SectorSize::MIN;
    format.device_size = (16 << 20) + 512 * 77;
    is_taken(&format);
}

#[test]
fn a_short_key() {
    let mut format = sample::format();
    format.key_size = 32;
    is_taken(&format);
}

#[test]
fn several_lanes_and_more_memory() {
    let mut format = sample::format();
    format.costs.lanes = 4;
    format.costs.memory_kib = 1 << 16;
    format.costs.time = 5;
    is_taken(&format);
}

#[test]
fn a_label_a_subsystem_and_a_later_volume() {
    let mut format = sample::format();
    format.label = "x".repeat(47);
    format.subsystem = "fürs Büro".into();
    format.segment_offset = 32 << 20;
    format.device_size = 5 << 40;
    if !present() {
        return;
    }
    let made = sample::make(&format);
    assert_eq!(made.header.label(), format.label);
    let image = Image::blank(format.device_size);
    for write in &made.writes {
        image.write(write.offset, &write.bytes);
    }
    assert_eq!(image.dumped("Label"), format.label);
    assert_eq!(image.dumped("Subsystem"), format.subsystem);
    assert!(image.opens_with(sample::PASSPHRASE));
}

#[test]
fn the_writes_are_few_and_the_primary_header_is_the_last() {
    let made = sample::make(&sample::format());
    let places: Vec<(u64, usize)> = made
        .writes
        .iter()
        .map(|write| (write.offset, write.bytes.len()))
        .collect();
    assert_eq!(places, [(0x8000, 256_000), (0x4000, 0x4000), (0, 0x4000)]);
}

#[test]
fn a_write_that_never_came_leaves_no_image_or_a_whole_one() {
    let made = sample::make(&sample::format());
    for count in 0..=made.writes.len() {
        let mut image = vec![0; sample::SIZE];
        for write in &made.writes[..count] {
            let at = write.offset as usize;
            image[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
        }
        match count {
            0 | 1 => assert_eq!(sample::load(&image).unwrap_err().kind(), Kind::Corrupt),
            _ => assert_eq!(sample::unlock(&image).expect("opens").0, 0),
        }
    }
}

#[test]
fn nonsense_is_not_made() {
    type Change = fn(&mut Format);
    let cases: [(&str, Change); 11] = [
        ("passes", |f| f.costs.time = 3),
        ("lanes", |f| f.costs.lanes = 5),
        ("KiB", |f| f.costs.memory_kib = 2 << 20),
        ("32 or 64 bytes", |f| f.key_size = 48),
        ("cannot begin", |f| f.segment_offset = 0x8000),
        ("cannot begin", |f| f.segment_offset = (16 << 20) + 512),
        ("no whole sectors", |f| f.device_size = 16 << 20),
        ("no whole sectors", |f| f.device_size += 512),
        ("label", |f| f.label = "x".repeat(48)),
        ("subsystem", |f| f.subsystem = "a\0b".into()),
        ("no UUID", |f| f.uuid = "6f3c1dd6".into()),
    ];
    for (why, change) in cases {
        let mut format = sample::format();
        change(&mut format);
        let passphrase = e2ebak::secret::Secret::new(b"x".to_vec());
        let error = format
            .make(&passphrase, &mut |_| {
                panic!("nothing may be drawn for {why}")
            })
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains(why), "{why}: {error}");
    }
}
