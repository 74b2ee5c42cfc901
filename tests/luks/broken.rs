//! Headers with exactly one thing wrong and the checksum right, each with its verdict: ours, and
//! cryptsetup's, so that every place where we are stricter or laxer is on record.

use e2ebak::error::Kind;
use e2ebak::luks::HeaderCopy;
use serde_json::{Value, json};

use super::cryptsetup::{Image, present};
use super::sample::{self, COPY};

/// How one copy of the header is broken.
enum Break {
    /// The field at the JSON pointer gets the value; a missing last member is added.
    Set(&'static str, Value),
    Remove(&'static str),
    /// The JSON text is replaced by what the function makes of it.
    Text(fn(String) -> Vec<u8>),
    /// Bytes of the binary header.
    Binary(usize, &'static [u8]),
}
use Break::{Binary, Remove, Set, Text};

/// What we say of it.
enum Ours {
    /// With both copies so: refused with these words. With the primary so: the secondary is used.
    Corrupt(&'static str),
    /// Refused with these words, even if only the primary is so.
    Refused(Kind, &'static str),
    /// The header is read, but its keyslot is refused with these words.
    Slot(&'static str),
    /// The header is read and the keyslot opens.
    Opens,
}
use Ours::{Corrupt, Opens, Refused, Slot};

/// What cryptsetup 2.6 says, both copies being so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Theirs {
    /// `open --test-passphrase` succeeds. It does so, too, where it cannot compute the digest.
    Reads,
    /// `luksDump` fails.
    Refuses,
    /// It dumps, but does not open.
    Shut,
}
use Theirs::{Reads, Refuses, Shut};

type Case = (&'static str, Break, Ours, Theirs);

fn apply(change: &Break, image: &mut [u8], at: usize) {
    let mut metadata = sample::json(image, at);
    match change {
        Set(pointer, value) => {
            let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
            metadata.pointer_mut(parent).expect("is there")[key] = value.clone();
        }
        Remove(pointer) => {
            let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
            let parent = metadata.pointer_mut(parent).expect("is there");
            let removed = parent.as_object_mut().expect("an object").remove(key);
            removed.expect("was there");
        }
        Text(make) => {
            let text = make(metadata.to_string());
            return sample::put_json(image, at, &text);
        }
        Binary(offset, bytes) => {
            image[at + offset..at + offset + bytes.len()].copy_from_slice(bytes);
            return sample::reseal(image, at);
        }
    }
    sample::put_json(image, at, metadata.to_string().as_bytes());
}

/// A second keyslot whose area is at `offset`.
fn second_keyslot(offset: &str) -> Value {
    let mut keyslot = sample::json(&sample::image(), 0)["keyslots"]["0"].clone();
    keyslot["area"]["offset"] = json!(offset);
    keyslot
}

fn segment() -> Value {
    sample::json(&sample::image(), 0)["segments"]["0"].clone()
}

fn nested(depth: usize) -> Value {
    (0..depth).fold(json!(1), |inner, _| json!([inner]))
}

#[rustfmt::skip]
fn binary_cases() -> Vec<Case> {
    vec![
        ("version 3", Binary(6, &[0, 3]), Corrupt("LUKS version 3"), Refuses),
        ("size 0", Binary(8, &[0; 8]), Corrupt("its size of 0 bytes is none that LUKS2 knows"), Refuses),
        ("size 12 KiB", Binary(8, &[0, 0, 0, 0, 0, 0, 0x30, 0]), Corrupt("its size of 12288 bytes is none"), Refuses),
        ("size 20 KiB", Binary(8, &[0, 0, 0, 0, 0, 0, 0x50, 0]), Corrupt("its size of 20480 bytes is none"), Refuses),
        ("size 8 MiB", Binary(8, &[0, 0, 0, 0, 0, 0x80, 0, 0]), Corrupt("its size of 8388608 bytes is none"), Refuses),
        ("size 2^63", Binary(8, &[0x80, 0, 0, 0, 0, 0, 0, 0]), Corrupt("its size of 9223372036854775808 bytes is none"), Refuses),
        ("size 32 KiB, truly 16", Binary(8, &[0, 0, 0, 0, 0, 0, 0x80, 0]), Corrupt("its sha256 checksum does not match"), Refuses),
        ("offset of its own", Binary(256, &[0, 0, 0, 0, 0, 1, 0, 0]), Corrupt("it lies at offset 0 but says 65536"), Refuses),
        ("checksum algorithm", Binary(72, b"sha3\0\0\0"), Corrupt("its checksum algorithm `sha3` is unknown"), Refuses),
        ("checksum algorithm with escapes", Binary(72, b"\x1b[2J\0\0\0"), Corrupt("its checksum algorithm `\\u{1b}[2J` is unknown"), Refuses),
        ("checksum algorithm empty", Binary(72, &[0; 32]), Corrupt("its checksum algorithm `` is unknown"), Refuses),
        ("label without end", Binary(24, &[b'x'; 48]), Opens, Reads),
        ("label not UTF-8", Binary(24, &[0xff, 0x1b, b'[', b'2', b'J', 0]), Opens, Reads),
        ("uuid empty", Binary(168, &[0; 40]), Opens, Reads),
        ("padding not zero", Binary(300, &[1, 2, 3]), Opens, Reads),
    ]
}

#[rustfmt::skip]
fn text_cases() -> Vec<Case> {
    vec![
        ("empty", Text(|_| Vec::new()), Corrupt("its JSON is not exactly one object"), Refuses),
        ("blank in front", Text(|t| format!(" {t}").into()), Corrupt("its JSON is not exactly one object"), Refuses),
        ("blank behind", Text(|t| format!("{t} ").into()), Corrupt("its JSON is not exactly one object"), Reads),
        ("newline behind a zero", Text(|t| format!("{t}\0\n").into()), Corrupt("its JSON is followed by bytes that are not zero"), Refuses),
        ("last brace missing", Text(|t| t[..t.len() - 1].into()), Corrupt("its JSON cannot be read: EOF"), Refuses),
        ("a brace too many", Text(|t| format!("{t}}}").into()), Corrupt("its JSON cannot be read: trailing characters"), Refuses),
        ("array", Text(|t| format!("[{t}]").into()), Corrupt("its JSON is not exactly one object"), Refuses),
        ("no zero behind", Text(|t| format!("{}{}}}", &t[..t.len() - 1], " ".repeat(COPY - 4096 - t.len())).into()), Corrupt("its JSON is not ended by a zero byte"), Refuses),
        ("doubled key", Text(|t| t.replacen('{', "{\"tokens\":{},", 1).into()), Corrupt("`tokens` is there twice"), Reads),
        ("not UTF-8", Text(|t| t.replacen('{', "{\"x\":\"\u{1}\",", 1).into_bytes().into_iter().map(|b| if b == 1 { 0xff } else { b }).collect()), Corrupt("its JSON cannot be read"), Reads),
        ("nested 40 deep", Set("/x", nested(40)), Corrupt("nested deeper than 32"), Refuses),
        ("nested 200 deep", Set("/x", nested(120)), Corrupt("nested deeper than 32"), Refuses),
        ("an unknown section", Set("/x", json!({"y": [1.5, null, true, -7]})), Opens, Reads),
    ]
}

#[rustfmt::skip]
fn config_cases() -> Vec<Case> {
    vec![
        ("config missing", Remove("/config"), Corrupt("metadata: `config` is missing"), Refuses),
        ("json_size missing", Remove("/config/json_size"), Corrupt("metadata: `config`: `json_size` is missing"), Refuses),
        ("json_size as number", Set("/config/json_size", json!(12288)), Corrupt("`json_size` is not a string"), Refuses),
        ("json_size of another size", Set("/config/json_size", json!("28672")), Corrupt("`json_size` 28672 does not fit the header's 16384 bytes"), Refuses),
        ("json_size 2^64-1", Set("/config/json_size", json!("18446744073709551615")), Corrupt("`json_size` 18446744073709551615 does not fit"), Refuses),
        ("keyslots_size odd", Set("/config/keyslots_size", json!("16744449")), Corrupt("`keyslots_size` 16744449 is no multiple of 4096"), Refuses),
        ("keyslots_size over the data", Set("/config/keyslots_size", json!("16748544")), Corrupt("segment 0 begins at 16777216, before the keyslots end at 16781312"), Refuses),
        ("keyslots_size over the end", Set("/config/keyslots_size", json!("67108864")), Refused(Kind::Corrupt, "the image is cut off: its keyslots end at 67141632"), Refuses),
        ("keyslots_size over 128 MiB", Set("/config/keyslots_size", json!("268435456")), Corrupt("`keyslots_size` 268435456 is no multiple of 4096 up to 134217728"), Refuses),
        ("keyslots_size 2^64-4096", Set("/config/keyslots_size", json!("18446744073709547520")), Corrupt("is no multiple of 4096 up to"), Refuses),
        ("keyslots_size negative", Set("/config/keyslots_size", json!("-4096")), Corrupt("`keyslots_size` is not a decimal string below 2^64"), Refuses),
        ("keyslots_size too small for its keyslot", Set("/config/keyslots_size", json!("4096")), Corrupt("keyslot 0: its area of 258048 bytes at offset 32768 is not within 32768 to 36864"), Refuses),
        ("flags not an array", Set("/config/flags", json!("allow-discards")), Corrupt("`flags` is not an array of strings"), Refuses),
        ("flag not a string", Set("/config/flags", json!([1])), Corrupt("`flags` is not an array of strings"), Refuses),
        ("flags", Set("/config/flags", json!(["allow-discards", "who-knows"])), Opens, Reads),
        ("requirement unknown", Set("/config/requirements", json!({"mandatory": ["teleport"]})), Refused(Kind::Unsupported, "the image has the unknown requirement `teleport`"), Reads),
        ("requirement online-reencrypt", Set("/config/requirements", json!({"mandatory": ["online-reencrypt"]})), Refused(Kind::Unsupported, "is being re-encrypted (requirement `online-reencrypt`)"), Refuses),
        ("requirement online-reencrypt-v2", Set("/config/requirements", json!({"mandatory": ["online-reencrypt-v2"]})), Refused(Kind::Unsupported, "is being re-encrypted (requirement `online-reencrypt-v2`)"), Refuses),
        ("requirement not a string", Set("/config/requirements", json!({"mandatory": [7]})), Corrupt("`mandatory` is not an array of strings"), Refuses),
        ("requirements not an object", Set("/config/requirements", json!([])), Corrupt("`requirements` is not an object"), Refuses),
        ("requirements optional only", Set("/config/requirements", json!({"nice": ["x"]})), Opens, Reads),
    ]
}

#[rustfmt::skip]
fn keyslot_cases() -> Vec<Case> {
    vec![
        ("keyslots missing", Remove("/keyslots"), Corrupt("metadata: `keyslots` is missing"), Refuses),
        ("keyslot named x", Set("/keyslots/x", second_keyslot("290816")), Corrupt("`keyslots`: `x` is no number below 32"), Refuses),
        ("keyslot 32", Set("/keyslots/32", second_keyslot("290816")), Corrupt("`keyslots`: `32` is no number below 32"), Refuses),
        ("keyslot 01", Set("/keyslots/01", second_keyslot("290816")), Corrupt("`keyslots`: `01` is no number below 32"), Refuses),
        ("keyslot empty", Set("/keyslots/1", json!({})), Corrupt("keyslot 1: `type` is missing"), Refuses),
        ("keyslot not an object", Set("/keyslots/1", json!(1)), Corrupt("keyslot 1 is not an object"), Refuses),
        ("area overlaps another", Set("/keyslots/1", second_keyslot("286720")), Corrupt("keyslot 1: its area overlaps that of keyslot 0"), Refuses),
        ("area is that of another", Set("/keyslots/1", second_keyslot("32768")), Corrupt("keyslot 1: its area overlaps that of keyslot 0"), Refuses),
        ("area in the header", Set("/keyslots/0/area/offset", json!("16384")), Corrupt("keyslot 0: its area of 258048 bytes at offset 16384 is not within"), Refuses),
        ("area at 0", Set("/keyslots/0/area/offset", json!("0")), Corrupt("keyslot 0: its area of 258048 bytes at offset 0 is not within"), Refuses),
        ("area reaches into the data", Set("/keyslots/0/area/offset", json!("16773120")), Corrupt("keyslot 0: its area of 258048 bytes at offset 16773120 is not within"), Refuses),
        ("area offset 2^64-1", Set("/keyslots/0/area/offset", json!("18446744073709551104")), Corrupt("keyslot 0: its area of 258048 bytes at offset 18446744073709551104 is not within"), Refuses),
        ("area offset 2^64", Set("/keyslots/0/area/offset", json!("18446744073709551616")), Corrupt("`offset` is not a decimal string below 2^64"), Refuses),
        ("area offset as number", Set("/keyslots/0/area/offset", json!(32768)), Corrupt("`offset` is not a string"), Refuses),
        ("area offset in hex", Set("/keyslots/0/area/offset", json!("0x8000")), Corrupt("`offset` is not a decimal string"), Refuses),
        ("area size 0", Set("/keyslots/0/area/size", json!("0")), Corrupt("keyslot 0: its area of 0 bytes is too small"), Refuses),
        ("area size wraps", Set("/keyslots/0/area/size", json!("18446744073709518848")), Corrupt("is not within 32768 to 16777216"), Refuses),
        ("area too small", Set("/keyslots/0/area/size", json!("253952")), Corrupt("keyslot 0: its area of 253952 bytes is too small for 4000 stripes of 64 bytes"), Reads),
        ("area unaligned", Set("/keyslots/0/area/offset", json!("32769")), Corrupt("keyslot 0: its area at offset 32769 is not aligned to 512 bytes"), Reads),
        ("area missing", Remove("/keyslots/0/area"), Corrupt("keyslot 0: `area` is missing"), Refuses),
        ("area of another type", Set("/keyslots/0/area/type", json!("tape")), Slot("its area is of the unknown type `tape`"), Refuses),
        ("area cipher", Set("/keyslots/0/area/encryption", json!("aes-cbc-essiv:sha256")), Slot("its area is encrypted with `aes-cbc-essiv:sha256`"), Shut),
        ("area key size", Set("/keyslots/0/area/key_size", json!(4294967295_u32)), Slot("its area key has 4294967295 bytes, not 32 or 64"), Shut),
        ("key_size missing", Remove("/keyslots/0/key_size"), Corrupt("keyslot 0: `key_size` is missing"), Refuses),
        ("key_size 0", Set("/keyslots/0/key_size", json!(0)), Corrupt("keyslot 0: its key has no bytes"), Shut),
        ("key_size 2^32", Set("/keyslots/0/key_size", json!(4294967296_u64)), Corrupt("`key_size` is not a whole number below 2^32"), Refuses),
        ("key_size as string", Set("/keyslots/0/key_size", json!("64")), Corrupt("`key_size` is not a whole number"), Refuses),
        ("key_size 2^31", Set("/keyslots/0/key_size", json!(2147483648_u32)), Corrupt("too small for 4000 stripes of 2147483648 bytes"), Shut),
        ("keyslot type", Set("/keyslots/0/type", json!("luks9")), Slot("it is of the unknown type `luks9`"), Shut),
        ("priority 3", Set("/keyslots/0/priority", json!(3)), Corrupt("keyslot 0: priority 3 is not 0, 1 or 2"), Shut),
        ("priority ignore", Set("/keyslots/0/priority", json!(0)), Slot("no keyslot of this image can be opened"), Shut),
        ("stripes 4001", Set("/keyslots/0/af/stripes", json!(4001)), Slot("its key is split into 4001 stripes"), Reads),
        ("stripes 0", Set("/keyslots/0/af/stripes", json!(0)), Slot("its key is split into 0 stripes"), Reads),
        ("af hash", Set("/keyslots/0/af/hash", json!("md17")), Slot("its key is split with the unknown `md17`"), Shut),
        ("af type", Set("/keyslots/0/af/type", json!("luks3")), Slot("its key is split by the unknown `luks3`"), Refuses),
        ("af missing", Remove("/keyslots/0/af"), Corrupt("keyslot 0: `af` is missing"), Refuses),
    ]
}

#[rustfmt::skip]
fn kdf_cases() -> Vec<Case> {
    let pbkdf2 = |hash: &str, iterations: u64| json!({
        "type": "pbkdf2", "hash": hash, "iterations": iterations,
        "salt": "W1GPf5G5q3IZqn8W9S5RR9ynZlnW14kCY3f7I98w5l8=",
    });
    vec![
        ("kdf missing", Remove("/keyslots/0/kdf"), Corrupt("keyslot 0: `kdf` is missing"), Refuses),
        ("kdf scrypt", Set("/keyslots/0/kdf/type", json!("scrypt")), Slot("its key derivation `scrypt` is unknown"), Shut),
        ("100 GiB", Set("/keyslots/0/kdf/memory", json!(104857600)), Slot("it asks for 100.0 GiB of memory, more than 4.0 GiB"), Shut),
        ("memory 2^32", Set("/keyslots/0/kdf/memory", json!(4294967296_u64)), Corrupt("`memory` is not a whole number below 2^32"), Shut),
        ("memory 0", Set("/keyslots/0/kdf/memory", json!(0)), Slot("it asks for 0 KiB of memory, too little"), Shut),
        ("memory as string", Set("/keyslots/0/kdf/memory", json!("32")), Corrupt("`memory` is not a whole number"), Refuses),
        ("4 billion passes", Set("/keyslots/0/kdf/time", json!(4294967295_u32)), Slot("it asks for 4294967295 passes over 32.0 KiB"), Shut),
        ("no pass", Set("/keyslots/0/kdf/time", json!(0)), Slot("it asks for no pass at all"), Shut),
        ("1000 lanes", Set("/keyslots/0/kdf/cpus", json!(1000)), Slot("it asks for 1000 lanes, not 1 to 16"), Shut),
        ("no lane", Set("/keyslots/0/kdf/cpus", json!(0)), Slot("it asks for 0 lanes, not 1 to 16"), Shut),
        ("salt short", Set("/keyslots/0/kdf/salt", json!("QUJD")), Slot("its salt has 3 bytes, not 32"), Shut),
        ("salt not Base64", Set("/keyslots/0/kdf/salt", json!("!")), Corrupt("`salt` is not Base64"), Shut),
        ("salt missing", Remove("/keyslots/0/kdf/salt"), Corrupt("`salt` is missing"), Refuses),
        ("pbkdf2 with a strange hash", Set("/keyslots/0/kdf", pbkdf2("md17", 1000)), Slot("its pbkdf2 uses the unknown hash `md17`"), Shut),
        ("pbkdf2 4 billion times", Set("/keyslots/0/kdf", pbkdf2("sha256", 4294967295)), Slot("it asks for 4294967295 iterations, more than 500000000"), Shut),
        ("pbkdf2 not at all", Set("/keyslots/0/kdf", pbkdf2("sha256", 0)), Slot("it asks for no iteration at all"), Shut),
    ]
}

#[rustfmt::skip]
fn segment_cases() -> Vec<Case> {
    vec![
        ("segments missing", Remove("/segments"), Corrupt("metadata: `segments` is missing"), Refuses),
        ("no segment", Remove("/segments/0"), Corrupt("metadata: there is no segment"), Refuses),
        ("two segments", Set("/segments/1", segment()), Refused(Kind::Unsupported, "the image has 2 segments, not one"), Refuses),
        ("segment named x", Set("/segments/x", segment()), Corrupt("`segments`: `x` is no number below 32"), Refuses),
        ("segment type missing", Remove("/segments/0/type"), Corrupt("segment 0: `type` is missing"), Refuses),
        ("segment type linear", Set("/segments/0/type", json!("linear")), Refused(Kind::Unsupported, "segment 0 is of the unknown type `linear`"), Reads),
        ("segment offset as number", Set("/segments/0/offset", json!(16777216)), Corrupt("segment 0: `offset` is not a string"), Refuses),
        ("segment offset odd", Set("/segments/0/offset", json!("16777217")), Corrupt("segment 0: offset 16777217 is not a multiple of 512"), Refuses),
        ("segment offset in the keyslots", Set("/segments/0/offset", json!("16773120")), Corrupt("segment 0 begins at 16773120, before the keyslots end at 16777216"), Refuses),
        ("segment offset 0", Set("/segments/0/offset", json!("0")), Refused(Kind::Unsupported, "segment 0 begins at offset 0: its header is a detached one"), Reads),
        ("segment beyond the end", Set("/segments/0/offset", json!("17825792")), Refused(Kind::Corrupt, "the image is cut off: its volume begins at 17825792, the image ends at 17825792"), Reads),
        ("segment offset negative", Set("/segments/0/offset", json!("-512")), Corrupt("segment 0: `offset` is not a decimal string"), Refuses),
        ("segment size missing", Remove("/segments/0/size"), Corrupt("segment 0: `size` is missing"), Refuses),
        ("segment size 0", Set("/segments/0/size", json!("0")), Corrupt("segment 0: size is not a multiple of 512 above zero"), Refuses),
        ("segment size odd", Set("/segments/0/size", json!("1049088")), Corrupt("segment 0: 1049088 bytes are no whole number of sectors of 4096"), Refuses),
        ("segment size Dynamic", Set("/segments/0/size", json!("Dynamic")), Corrupt("segment 0: `size` is not a decimal string"), Refuses),
        ("segment size beyond the end", Set("/segments/0/size", json!("1052672")), Refused(Kind::Corrupt, "the image is cut off: its volume of 1052672 bytes begins at"), Reads),
        ("segment size 2^64-4096", Set("/segments/0/size", json!("18446744073709547520")), Refused(Kind::Corrupt, "the image is cut off"), Reads),
        ("segment size fixed", Set("/segments/0/size", json!("524288")), Opens, Reads),
        ("sector size 0", Set("/segments/0/sector_size", json!(0)), Corrupt("segment 0: sector size 0 is not 512 to 4096"), Refuses),
        ("sector size 513", Set("/segments/0/sector_size", json!(513)), Corrupt("segment 0: sector size 513"), Refuses),
        ("sector size 1536", Set("/segments/0/sector_size", json!(1536)), Corrupt("segment 0: sector size 1536"), Reads),
        ("sector size 8192", Set("/segments/0/sector_size", json!(8192)), Corrupt("segment 0: sector size 8192"), Reads),
        ("sector size -512", Set("/segments/0/sector_size", json!(-512)), Corrupt("`sector_size` is not a whole number"), Refuses),
        ("iv_tweak missing", Remove("/segments/0/iv_tweak"), Corrupt("segment 0: `iv_tweak` is missing"), Refuses),
        ("iv_tweak as number", Set("/segments/0/iv_tweak", json!(0)), Corrupt("segment 0: `iv_tweak` is not a string"), Refuses),
        ("encryption missing", Remove("/segments/0/encryption"), Corrupt("segment 0: `encryption` is missing"), Refuses),
        ("encryption another", Set("/segments/0/encryption", json!("serpent-xts-plain64")), Refused(Kind::Unsupported, "segment 0 is encrypted with `serpent-xts-plain64`, not aes-xts-plain64"), Reads),
        ("encryption with 32-bit tweaks", Set("/segments/0/encryption", json!("aes-xts-plain")), Refused(Kind::Unsupported, "segment 0 is encrypted with `aes-xts-plain`,"), Reads),
        ("integrity", Set("/segments/0/integrity", json!({"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"})), Refused(Kind::Unsupported, "segment 0 has integrity `hmac(sha256)`"), Reads),
        ("segment flag", Set("/segments/0/flags", json!(["in-reencryption"])), Refused(Kind::Unsupported, "segment 0 has the flag `in-reencryption`"), Reads),
        ("segment flags not strings", Set("/segments/0/flags", json!([0])), Corrupt("segment 0: `flags` is not an array of strings"), Refuses),
    ]
}

#[rustfmt::skip]
fn digest_and_token_cases() -> Vec<Case> {
    vec![
        ("digests missing", Remove("/digests"), Corrupt("metadata: `digests` is missing"), Refuses),
        ("no digest", Remove("/digests/0"), Corrupt("segment 0 has no digest"), Refuses),
        ("digest of no segment", Set("/digests/0/segments", json!([])), Corrupt("segment 0 has no digest"), Refuses),
        ("digest of a missing segment", Set("/digests/0/segments", json!(["0", "1"])), Corrupt("digest 0: `segments` names `1`, which is missing"), Refuses),
        ("digest of a missing keyslot", Set("/digests/0/keyslots", json!(["0", "5"])), Corrupt("digest 0: `keyslots` names `5`, which is missing"), Refuses),
        ("digest of no keyslot", Set("/digests/0/keyslots", json!([])), Slot("no keyslot of this image can be opened"), Refuses),
        ("digest keyslots not strings", Set("/digests/0/keyslots", json!([0])), Corrupt("digest 0: `keyslots` is not an array of strings"), Refuses),
        ("digest type", Set("/digests/0/type", json!("crc32")), Slot("digest 0 cannot be checked: its type `crc32` is unknown"), Shut),
        ("digest hash", Set("/digests/0/hash", json!("md17")), Slot("digest 0 cannot be checked: its hash `md17` is unknown"), Reads),
        ("digest 4 billion times", Set("/digests/0/iterations", json!(4294967295_u32)), Slot("digest 0 cannot be checked: it asks for 4294967295 iterations"), Shut),
        ("digest too short", Set("/digests/0/digest", json!("QUJD")), Corrupt("digest 0: digest of 3 bytes, not 20 to 64"), Reads),
        ("digest not Base64", Set("/digests/0/digest", json!("QUJD=")), Corrupt("digest 0: `digest` is not Base64"), Shut),
        ("digest of another key", Set("/digests/0/digest", json!("QpyZvLagzE7idq1W7vUSAv71LQFqc4weEyuCShUTRRY=")), Slot("no keyslot opens with this passphrase (1 tried)"), Shut),
        ("tokens missing", Remove("/tokens"), Corrupt("metadata: `tokens` is missing"), Refuses),
        ("tokens not an object", Set("/tokens", json!([])), Corrupt("metadata: `tokens` is not an object"), Refuses),
        ("token without type", Set("/tokens/0", json!({"keyslots": []})), Corrupt("token 0: `type` is missing"), Refuses),
        ("token of a missing keyslot", Set("/tokens/0", json!({"type": "x", "keyslots": ["3"]})), Corrupt("token 0: `keyslots` names `3`, which is missing"), Refuses),
        ("token named x", Set("/tokens/x", json!({"type": "x", "keyslots": []})), Corrupt("`tokens`: `x` is no number below 32"), Refuses),
        ("token of nobody's", Set("/tokens/31", json!({"type": "x", "keyslots": ["0"], "y": 1})), Opens, Reads),
    ]
}

fn all_cases() -> Vec<Case> {
    let groups = [
        binary_cases(),
        text_cases(),
        config_cases(),
        keyslot_cases(),
        kdf_cases(),
        segment_cases(),
        digest_and_token_cases(),
    ];
    groups.into_iter().flatten().collect()
}

fn broken(change: &Break, copies: &[usize]) -> Vec<u8> {
    let mut image = sample::image();
    for &at in copies {
        apply(change, &mut image, at);
    }
    image
}

/// The verdict with both copies broken in the same way.
fn judge_both(ours: &Ours, image: &[u8]) -> Result<(), String> {
    let (kind, words) = match ours {
        Opens => return sample::unlock(image).map(drop).map_err(|e| e.report()),
        Corrupt(words) => (None, words),
        Refused(kind, words) => (Some(*kind), words),
        Slot(words) => {
            if let Err(error) = sample::load(image) {
                return Err(format!("was to be read: {error}"));
            }
            (None, words)
        }
    };
    match sample::unlock(image) {
        Ok(_) => Err("opened".into()),
        Err(error) if kind.is_some_and(|kind| kind != error.kind()) => Err(error.report()),
        Err(error) if error.to_string().contains(words) => Ok(()),
        Err(error) => Err(format!("{words:?} is not in: {error}")),
    }
}

/// The verdict with only the primary copy broken.
fn judge_primary(ours: &Ours, image: &[u8]) -> Result<(), String> {
    match ours {
        Corrupt(_) => {
            let loaded = sample::load(image).map_err(|e| e.report())?;
            if loaded.copy != HeaderCopy::Secondary || loaded.warnings.len() != 1 {
                return Err(format!("{:?} {:?}", loaded.copy, loaded.warnings));
            }
            Ok(())
        }
        Refused(..) | Slot(_) | Opens => judge_both(ours, image),
    }
}

fn judge_all(judge: fn(&Ours, &[u8]) -> Result<(), String>, copies: &[usize]) {
    let mut wrong = Vec::new();
    for (name, change, ours, _) in all_cases() {
        if let Err(found) = judge(&ours, &broken(&change, copies)) {
            wrong.push(format!("{name}: {found}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn each_broken_header_has_its_verdict() {
    judge_all(judge_both, &[0, COPY]);
}

#[test]
fn each_broken_primary_is_passed_over_for_the_secondary() {
    judge_all(judge_primary, &[0]);
}

#[test]
fn what_is_wrong_with_the_copy_in_use_is_in_the_warning() {
    let change = Set("/keyslots/0/area/offset", json!("0"));
    let loaded = sample::load(&broken(&change, &[0])).expect("loads");
    assert!(loaded.warnings[0].contains("keyslot 0: its area of 258048 bytes at offset 0"));
}

/// Costs that cryptsetup would really spend, such as a key of 4 GiB; it is not asked about those.
const TOO_DEAR_TO_ASK: [&str; 6] = [
    "area key size",
    "key_size 2^31",
    "100 GiB",
    "4 billion passes",
    "pbkdf2 4 billion times",
    "digest 4 billion times",
];

fn ask_cryptsetup(image: &[u8]) -> Theirs {
    // It repairs what it can, so every question gets a file of its own.
    if Image::of_bytes(image).opens_with(sample::PASSPHRASE) {
        return Reads;
    }
    let dumped = Image::of_bytes(image).try_run(&["luksDump"], &[]);
    match dumped.status.success() {
        true => Shut,
        false => Refuses,
    }
}

#[test]
fn cryptsetup_judges_the_same_headers_as_recorded() {
    if !present() {
        return;
    }
    let mut wrong = Vec::new();
    for (name, change, ours, theirs) in all_cases() {
        if TOO_DEAR_TO_ASK.contains(&name) {
            continue;
        }
        let found = ask_cryptsetup(&broken(&change, &[0, COPY]));
        if found != theirs {
            wrong.push(format!("{name}: recorded {theirs:?}, found {found:?}"));
        }
        if matches!(ours, Opens) && found != Reads {
            wrong.push(format!("{name}: we open what cryptsetup does not"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
