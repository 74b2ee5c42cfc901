//! Images that are none, or no longer, or not ours.

use super::*;

#[test]
fn a_wrong_passphrase_is_refused() {
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("1G").ok();
    for words in LOOKING {
        if words[0] == "info" {
            continue;
        }
        let program = place.program(words[0]).args(&words[1..]);
        program
            .env("E2EBAK_PASSPHRASE", "wrong")
            .run()
            .code(12)
            .says("passphrase");
    }
    if root_or_skip() {
        let source = sandbox.dir("source");
        place
            .backup(&source)
            .env("E2EBAK_PASSPHRASE", "wrong")
            .run()
            .code(12);
        let mount = place.program("mount").arg(sandbox.dir("mnt"));
        mount.env("E2EBAK_PASSPHRASE", "wrong").run().code(12);
    }
    place.assert_closed();
}

#[test]
fn a_missing_image_is_named() {
    let sandbox = Sandbox::new();
    every_verb_says(&Place::local(&sandbox), &[10], "a.img");
    every_verb_says(&Place::piped(&sandbox), &[10], "a.img");
    if root_or_skip() {
        let sshd = Sshd::start(&sandbox);
        every_verb_says(&Place::over(&sandbox, &sshd), &[10], "a.img");
    }
}

#[test]
fn what_is_no_image_is_corrupt() {
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let noise = |size| large_file(&place.stored, size, 42);
    for size in [0, 1, 4095, 4096, 16 * MIB, 20 * MIB] {
        noise(size);
        every_verb_says(&place, &[13], "a.img");
    }
    // A hole of some size, as a broken copy leaves it.
    let hole = File::create(&place.stored).expect("a file");
    hole.set_len(1 << 30).expect("grown");
    every_verb_says(&place, &[13], "LUKS");
}

#[test]
fn a_luks1_image_is_refused_by_name() {
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    File::create(&place.stored)
        .and_then(|file| file.set_len(64 * MIB))
        .expect("a file");
    let key = sandbox.file("key", PASSPHRASE);
    let mut format = tool("cryptsetup");
    format.args([
        "luksFormat",
        "--type",
        "luks1",
        "--batch-mode",
        "--pbkdf-force-iterations",
    ]);
    run(format
        .arg("1000")
        .arg("--key-file")
        .arg(key)
        .arg(&place.stored));
    every_verb_says(&place, &[1, 13], "LUKS1");
}

#[test]
fn a_truncated_image_is_corrupt() {
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("1G").ok();
    let image = File::options()
        .write(true)
        .open(&place.stored)
        .expect("the image");
    for size in [16 * MIB, 16 * MIB - 1, MIB, 32 << 10, 4096, 100] {
        image.set_len(size).expect("truncated");
        every_verb_says(&place, &[13], "a.img");
    }
}

/// The filesystem knows its own size; an image cut in its middle does not mount.
#[test]
fn an_image_that_lost_its_second_half_is_refused() {
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("1G").ok();
    let image = File::options()
        .write(true)
        .open(&place.stored)
        .expect("the image");
    image.set_len(512 * MIB).expect("truncated");
    if root_or_skip() {
        let source = sandbox.dir("source");
        let ran = place.backup(&source).run().code_of(&[1, 13]);
        assert!(ran.stderr.starts_with("error: "), "{ran}");
        place.assert_closed();
    }
}

/// One header is enough, and that one is bad is said; both bad is the end.
#[test]
fn damaged_headers() {
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("1G").ok();
    let image = File::options()
        .read(true)
        .write(true)
        .open(&place.stored)
        .expect("the image");
    let mut headers = vec![0; 32 << 10];
    image.read_exact_at(&mut headers, 0).expect("read");
    let damage = |at: u64| image.write_all_at(b"damaged!", at).expect("written");
    let mend = || image.write_all_at(&headers, 0).expect("written");

    // Primary binary header, primary JSON; secondary binary header, secondary JSON.
    for at in [0x18, 0x1100, 0x4018, 0x5100] {
        damage(at);
        place.program("snapshots").ok().says("header");
        mend();
    }
    damage(0x1100);
    damage(0x5100);
    every_verb_says(&place, &[13], "header");
    mend();
    let ran = place.program("snapshots").ok();
    assert!(!ran.stderr.contains("header"), "{ran}");
}

/// Both copies of the JSON area, changed, with the checksums put right: what a server that knows
/// the format can send.
fn rewrite_json(image: &Path, change: impl Fn(&str) -> String) {
    let file = File::options()
        .read(true)
        .write(true)
        .open(image)
        .expect("the image");
    for at in [0, 0x4000] {
        let mut area = vec![0; 0x4000];
        file.read_exact_at(&mut area, at).expect("read");
        let text = area[0x1000..]
            .split(|byte| *byte == 0)
            .next()
            .expect("JSON")
            .to_vec();
        let text = change(&String::from_utf8(text).expect("UTF-8"));
        area[0x1000..].fill(0);
        area[0x1000..0x1000 + text.len()].copy_from_slice(text.as_bytes());
        // On-disk format 1.1.x, section 2.1: the checksum is over the header and its JSON area, with
        // the checksum field, 64 bytes at 0x1c0, taken as zeros.
        area[0x1c0..0x200].fill(0);
        let sum = Sha256::digest(&area);
        area[0x1c0..0x1e0].copy_from_slice(&sum);
        file.write_all_at(&area, at).expect("written");
    }
}

#[test]
fn hostile_metadata_is_refused_by_name() {
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("1G").ok();
    let mut pristine = vec![0; 0x8000];
    let image = File::open(&place.stored).expect("the image");
    image.read_exact_at(&mut pristine, 0).expect("the headers");
    let put_back = || {
        let image = File::options()
            .write(true)
            .open(&place.stored)
            .expect("the image");
        image.write_all_at(&pristine, 0).expect("written");
    };
    // The rewriting itself changes nothing.
    rewrite_json(&place.stored, str::to_string);
    let clean = place.program("snapshots").ok();
    assert!(!clean.stderr.contains("header"), "{clean}");

    rewrite_json(&place.stored, |_| "{".into());
    every_verb_says(&place, &[13], "JSON");
    rewrite_json(&place.stored, |_| "[1, 2, 3]".into());
    every_verb_says(&place, &[13], "JSON");
    rewrite_json(&place.stored, |_| "[".repeat(12_000));
    every_verb_says(&place, &[13], "JSON");
    put_back();

    // 32 MiB become 100 GiB: the time it takes tells whether the memory was really asked for.
    rewrite_json(&place.stored, |json| {
        let changed = json.replace("\"memory\":32768", "\"memory\":104857600");
        assert_ne!(changed, json);
        changed
    });
    let began = Instant::now();
    let ran = place
        .program("snapshots")
        .run()
        .code_of(&[1, 13])
        .says("memory");
    assert!(began.elapsed() < Duration::from_secs(5), "{ran}");
    put_back();

    // Data that begin inside the header.
    rewrite_json(&place.stored, |json| {
        let changed = json.replace("\"offset\":\"16777216\"", "\"offset\":\"4096\"");
        assert_ne!(changed, json);
        changed
    });
    every_verb_says(&place, &[13], "segment");
    put_back();
    place.program("snapshots").ok();
}

/// As cryptsetup does with a device that ends within a sector.
#[test]
fn an_image_whose_length_is_odd_is_cut_off() {
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("1G").ok();
    let image = File::options()
        .write(true)
        .open(&place.stored)
        .expect("the image");
    image.set_len((1 << 30) + 1000).expect("grown");
    every_verb_says(&place, &[13], "sector");
    image.set_len(1 << 30).expect("cut");
    place.program("snapshots").ok();
}
