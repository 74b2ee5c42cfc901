//! What cryptsetup makes, we read as it does, or refuse by name.

use e2ebak::error::Kind;
use e2ebak::luks::{HeaderCopy, Priority};

use super::cryptsetup::{CHEAP_ARGON2, CHEAP_PBKDF2, Image, present};

const SIZE: u64 = 20 << 20;
const PASSPHRASE: &[u8] = b"an open secret";

/// Formats with the arguments and compares everything that both can tell.
fn agrees(args: &[&str]) -> Option<Image> {
    if !present() {
        return None;
    }
    let image = Image::blank(SIZE);
    image.format(PASSPHRASE, &[&["--type", "luks2"], args].concat());
    let loaded = image.load().expect("loads");
    assert_eq!(loaded.copy, HeaderCopy::Primary);
    assert_eq!(loaded.warnings, Vec::<String>::new());
    assert_eq!(*loaded.header.json(), image.metadata());
    assert_eq!(loaded.header.uuid(), image.dumped("UUID"));
    let epoch = image.dumped("Epoch").parse();
    assert_eq!(Ok(loaded.header.sequence_id()), epoch);

    let (keyslot, key) = image.unlock(PASSPHRASE).expect("opens");
    assert_eq!(keyslot, 0);
    assert_eq!(key.bytes(), image.volume_key(PASSPHRASE));
    let wrong = image.unlock(b"another").unwrap_err();
    assert_eq!(wrong.kind(), Kind::WrongKey);
    assert_eq!(
        wrong.to_string(),
        "no keyslot opens with this passphrase (1 tried)"
    );
    Some(image)
}

macro_rules! agrees {
    ($($name:ident: $costs:ident $args:expr;)*) => {
        $(#[test]
        fn $name() {
            agrees(&[&$costs[..], &$args].concat());
        })*
    };
}

agrees! {
    argon2id: CHEAP_ARGON2 ["--pbkdf", "argon2id"];
    argon2i: CHEAP_ARGON2 ["--pbkdf", "argon2i"];
    one_lane: CHEAP_ARGON2 ["--pbkdf-parallel", "1"];
    pbkdf2: CHEAP_PBKDF2 ["--hash", "sha256"];
    pbkdf2_with_sha1: CHEAP_PBKDF2 ["--hash", "sha1"];
    sha512_everywhere: CHEAP_PBKDF2 ["--hash", "sha512"];
    sha512_with_argon2: CHEAP_ARGON2 ["--hash", "sha512"];
    sectors_of_512: CHEAP_ARGON2 ["--sector-size", "512"];
    sectors_of_4096: CHEAP_ARGON2 ["--sector-size", "4096"];
    short_key: CHEAP_ARGON2 ["--key-size", "256"];
    large_metadata: CHEAP_ARGON2 ["--luks2-metadata-size", "64k"];
    odd_keyslots_size: CHEAP_ARGON2 ["--luks2-keyslots-size", "1m"];
    later_data: CHEAP_ARGON2 ["--offset", "36864"];
}

#[test]
fn the_largest_metadata_need_no_third_read() {
    let Some(image) = agrees(
        &[
            &CHEAP_ARGON2[..],
            &["--luks2-metadata-size", "4m", "--luks2-keyslots-size", "1m"],
        ]
        .concat(),
    ) else {
        return;
    };
    let mut reads = 0;
    let mut read = image.reader();
    let mut counted = |offset: u64, out: &mut [u8]| {
        reads += 1;
        read(offset, out)
    };
    e2ebak::luks::load(&mut counted, SIZE).expect("loads");
    assert_eq!(reads, 2);
}

#[test]
fn label_and_subsystem_are_read() {
    let args = ["--label", "photos 2026", "--subsystem", "e2ebak"];
    if let Some(image) = agrees(&[&CHEAP_ARGON2[..], &args].concat()) {
        let header = image.load().expect("loads").header;
        assert_eq!(header.label(), "photos 2026");
        assert_eq!(header.subsystem(), "e2ebak");
        assert_eq!(header.label(), image.dumped("Label"));
    }
}

#[test]
fn every_keyslot_opens_with_its_own_key() {
    let Some(image) = agrees(&CHEAP_ARGON2) else {
        return;
    };
    // A key file is taken byte by byte, newline and all.
    let keys: [&[u8]; 2] = [b"second\n", &[0, 1, 2, 0xff, b'\n', 0]];
    image.add_key(PASSPHRASE, keys[0], &CHEAP_PBKDF2);
    image.add_key(
        PASSPHRASE,
        keys[1],
        &[&CHEAP_ARGON2[..], &["--key-slot", "7"]].concat(),
    );
    let volume_key = image.volume_key(PASSPHRASE);
    for (passphrase, slot) in [(PASSPHRASE, 0), (keys[0], 1), (keys[1], 7)] {
        let (found, key) = image.unlock(passphrase).expect("opens");
        assert_eq!((found, key.bytes()), (slot, &volume_key[..]));
    }
    let wrong = image.unlock(b"second").unwrap_err();
    assert!(wrong.to_string().contains("(3 tried)"), "{wrong}");

    image.run(&["luksKillSlot"], &["0"]);
    assert_eq!(image.unlock(PASSPHRASE).unwrap_err().kind(), Kind::WrongKey);
}

#[test]
fn priorities_decide_what_is_tried_and_when() {
    let Some(image) = agrees(&CHEAP_ARGON2) else {
        return;
    };
    // The same passphrase twice: which one opens tells the order.
    image.add_key(PASSPHRASE, PASSPHRASE, &CHEAP_ARGON2);
    assert_eq!(image.unlock(PASSPHRASE).expect("opens").0, 0);
    image.run(&["config", "--priority", "prefer", "--key-slot", "1"], &[]);
    assert_eq!(image.unlock(PASSPHRASE).expect("opens").0, 1);
    image.run(&["config", "--priority", "ignore", "--key-slot", "1"], &[]);
    assert_eq!(image.unlock(PASSPHRASE).expect("opens").0, 0);
    let header = image.load().expect("loads").header;
    assert_eq!(header.keyslots()[1].priority(), Priority::Ignore);
}

#[test]
fn a_keyslot_of_another_key_is_not_tried() {
    let Some(image) = agrees(&CHEAP_ARGON2) else {
        return;
    };
    let unbound = ["--unbound", "--key-size", "512"];
    image.add_key(
        PASSPHRASE,
        b"unbound",
        &[&CHEAP_ARGON2[..], &unbound].concat(),
    );
    let header = image.load().expect("loads").header;
    assert_eq!(header.keyslots().len(), 2);
    let wrong = image.unlock(b"unbound").unwrap_err();
    assert!(wrong.to_string().contains("(1 tried)"), "{wrong}");
}

#[test]
fn tokens_are_kept_as_they_are() {
    let Some(image) = agrees(&CHEAP_ARGON2) else {
        return;
    };
    let token = r#"{"type":"e2ebak-test","keyslots":["0"],"note":{"n":1}}"#;
    let file = image.key_file(token.as_bytes());
    image.run(&["token", "import", "--json-file", &file], &[]);
    let header = image.load().expect("loads").header;
    let [found] = header.tokens() else {
        panic!("one token, not {}", header.tokens().len());
    };
    assert_eq!((found.id(), found.kind()), (0, "e2ebak-test"));
    assert_eq!(found.keyslots(), [0]);
    assert_eq!(found.json()["note"]["n"], 1);
}

#[test]
fn luks1_is_refused_by_name() {
    if !present() {
        return;
    }
    let image = Image::blank(SIZE);
    let cheap = ["--type", "luks1", "--pbkdf-force-iterations", "1000"];
    image.format(PASSPHRASE, &cheap);
    let error = image.load().unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert_eq!(error.to_string(), "this is a LUKS1 image, not LUKS2");
}

#[test]
fn an_image_made_luks2_from_luks1_opens() {
    if !present() {
        return;
    }
    let image = Image::blank(SIZE);
    let cheap = ["--type", "luks1", "--pbkdf-force-iterations", "1000"];
    image.format(PASSPHRASE, &cheap);
    image.run(&["convert", "--type", "luks2"], &[]);
    let (_, key) = image.unlock(PASSPHRASE).expect("opens");
    assert_eq!(key.bytes(), image.volume_key(PASSPHRASE));
}

#[test]
fn a_keyslot_in_another_cipher_is_refused_and_the_others_are_tried() {
    if !present() {
        return;
    }
    let image = Image::blank(SIZE);
    let cbc = [
        "--keyslot-cipher",
        "aes-cbc-essiv:sha256",
        "--keyslot-key-size",
        "256",
    ];
    image.format(PASSPHRASE, &[&CHEAP_ARGON2[..], &cbc].concat());
    let error = image.unlock(PASSPHRASE).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    let why = "keyslot 0: its area is encrypted with `aes-cbc-essiv:sha256`";
    assert!(error.to_string().contains(why), "{error}");

    let xts = [
        "--keyslot-cipher",
        "aes-xts-plain64",
        "--keyslot-key-size",
        "512",
    ];
    image.add_key(PASSPHRASE, b"second", &[&CHEAP_ARGON2[..], &xts].concat());
    assert_eq!(image.unlock(b"second").expect("opens").0, 1);
    let error = image.unlock(b"third").unwrap_err();
    assert_eq!(error.kind(), Kind::WrongKey);
    assert!(
        error.to_string().contains("(1 tried; not tried: keyslot 0"),
        "{error}"
    );
}

#[test]
fn a_volume_in_another_cipher_is_refused_by_name() {
    if !present() {
        return;
    }
    let image = Image::blank(SIZE);
    let cbc = ["--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"];
    image.format(PASSPHRASE, &[&CHEAP_ARGON2[..], &cbc].concat());
    let error = image.load().unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    let why = "segment 0 is encrypted with `aes-cbc-essiv:sha256`, not aes-xts-plain64";
    assert_eq!(error.to_string(), why);
}

#[test]
fn an_image_being_reencrypted_is_refused_by_name() {
    let Some(image) = agrees(&CHEAP_ARGON2) else {
        return;
    };
    let key = image.key_file(PASSPHRASE);
    let begin = ["reencrypt", "--init-only", "--key-file", &key];
    image.run(&[&begin[..], &CHEAP_ARGON2].concat(), &[]);
    let error = image.load().unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(
        error
            .to_string()
            .contains("is being re-encrypted (requirement `online-reencrypt"),
        "{error}"
    );
}

#[test]
fn a_header_without_its_data_is_refused() {
    let Some(image) = agrees(&CHEAP_ARGON2) else {
        return;
    };
    let backup = image.directory().join("backup");
    let backup = backup.to_str().expect("a plain path");
    image.run(&["luksHeaderBackup", "--header-backup-file", backup], &[]);
    let header_alone = Image::of_bytes(&std::fs::read(backup).expect("there"));
    let error = header_alone.load().unwrap_err();
    assert!(
        error.to_string().starts_with("the image is cut off"),
        "{error}"
    );
}
