//! The data path of a volume, judged by others: cryptsetup encrypts what we read and decrypts what
//! we write, and `xts-mode` decrypts single sectors.
//!
//! `cryptsetup reencrypt` converts a plain file into LUKS2 and back in user space, with the same
//! sectors and tweaks as dm-crypt, so that no device-mapper is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use aes::Aes256;
use aes::cipher::KeyInit;
use e2ebak::device::Device;
use e2ebak::layer::crypt::{Crypt, Segment};
use e2ebak::layer::memory::Memory;
use e2ebak::xts::{Key, SectorSize, Tweak};
use proptest::prelude::*;
use tempfile::TempDir;
use xts_mode::{Xts128, get_tweak_default};

const MIB: usize = 1 << 20;
/// The smallest and the largest; one pass costs seconds.
const SECTOR_SIZES: [u64; 2] = [512, 4096];

/// A directory with a key file, and cryptsetup at work in it.
struct Workshop(TempDir);

impl Workshop {
    /// `None`, with a word on standard error, where cryptsetup is missing and this is not CI.
    fn open() -> Option<Workshop> {
        if Command::new("cryptsetup")
            .arg("--version")
            .output()
            .is_err()
        {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "cryptsetup is needed"
            );
            eprintln!("skipped: cryptsetup is not installed");
            return None;
        }
        let dir = TempDir::new().expect("a temporary directory");
        fs::write(dir.path().join("key"), "not a secret").expect("writable");
        Some(Workshop(dir))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn cryptsetup(&self, arguments: &[&str]) {
        let output = Command::new("cryptsetup")
            .current_dir(self.0.path())
            .args(["--batch-mode", "--key-file", "key"])
            .args(arguments)
            .output()
            .expect("cryptsetup runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "cryptsetup {arguments:?}: {said}");
    }

    fn volume_key(&self, image: &str) -> Key {
        let dump = ["luksDump", "--dump-volume-key", "--volume-key-file", "vk"];
        self.cryptsetup(&[&dump[..], &[image]].concat());
        let key = fs::read(self.path("vk")).expect("dumped");
        fs::remove_file(self.path("vk")).expect("removable");
        Key::new(&key).expect("a key length of XTS")
    }
}

/// Fast and weak: what guards the key is not tested here.
const WEAK: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

fn loaded(path: &Path) -> Arc<Memory> {
    let bytes = fs::read(path).expect("readable");
    let memory = Memory::new(bytes.len() as u64);
    memory.write_all_at(&bytes, 0).expect("in range");
    Arc::new(memory)
}

fn stored(memory: &Memory, path: &Path) {
    let mut bytes = vec![0; memory.size() as usize];
    memory.read_exact_at(&mut bytes, 0).expect("in range");
    fs::write(path, bytes).expect("writable");
}

/// cryptsetup's default place for the data: 16 MiB, to the end of the image.
fn segment(sector_size: u64) -> Segment {
    Segment {
        offset: 16 << 20,
        size: None,
        sector_size: SectorSize::new(sector_size).expect("a known size"),
        first_tweak: Tweak(0),
    }
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(step).take(len).collect()
}

#[test]
fn what_cryptsetup_encrypts_is_read_here() {
    let Some(workshop) = Workshop::open() else {
        return;
    };
    for sector_size in SECTOR_SIZES {
        let mut plain = noise(2 * MIB, sector_size);
        plain[MIB..MIB + 8192].fill(0);
        // It moves the data up to make room for the header, and wants twice the room meanwhile.
        let mut image = plain.clone();
        image.resize(plain.len() + 32 * MIB, 0);
        fs::write(workshop.path("image"), image).expect("writable");
        let size = sector_size.to_string();
        let encrypt = ["reencrypt", "--encrypt", "--type", "luks2"];
        let place = ["--reduce-device-size", "32M", "--sector-size", &size];
        let offline = ["--force-offline-reencrypt", "image"];
        workshop.cryptsetup(&[&encrypt[..], &place, &WEAK, &offline].concat());

        let key = workshop.volume_key("image");
        let memory = loaded(&workshop.path("image"));
        let volume = Crypt::new(memory, key, segment(sector_size)).expect("fits");
        let mut read = vec![0; plain.len()];
        volume.read_exact_at(&mut read, 0).expect("in range");
        assert!(read == plain, "sectors of {sector_size} bytes, in one run");
        let one = &mut read[..sector_size as usize];
        let at = 5 * sector_size;
        volume.read_exact_at(one, at).expect("in range");
        assert!(*one == plain[at as usize..][..one.len()], "one sector");
    }
}

#[test]
fn what_is_written_here_cryptsetup_decrypts() {
    let Some(workshop) = Workshop::open() else {
        return;
    };
    for sector_size in SECTOR_SIZES {
        let file = fs::File::create(workshop.path("image")).expect("writable");
        file.set_len(18 << 20).expect("sparse");
        let size = sector_size.to_string();
        let format = ["luksFormat", "--type", "luks2", "--sector-size", &size];
        workshop.cryptsetup(&[&format[..], &WEAK, &["image", "key"]].concat());

        let key = workshop.volume_key("image");
        let memory = loaded(&workshop.path("image"));
        let volume = Crypt::new(memory.clone(), key, segment(sector_size)).expect("fits");
        assert_eq!(volume.size(), 2 << 20);
        let mut plain = noise(2 * MIB, sector_size);
        plain[4096..16384].fill(0);
        let (head, tail) = plain.split_at(MIB + 4096);
        volume.write_all_at(tail, head.len() as u64).expect("fits");
        volume.write_all_at(head, 0).expect("fits");
        stored(&memory, &workshop.path("image"));

        let decrypt = ["reencrypt", "--decrypt", "--header", "header"];
        workshop.cryptsetup(&[&decrypt[..], &["--force-offline-reencrypt", "image"]].concat());
        let decrypted = fs::read(workshop.path("image")).expect("readable");
        assert!(
            decrypted[..plain.len()] == plain,
            "sectors of {sector_size} bytes"
        );
        fs::remove_file(workshop.path("header")).expect("exported");
    }
}

proptest! {
    #[test]
    fn xts_mode_decrypts_every_stored_sector(
        log in 9..=12_u32,
        offset in 0..8_u64,
        first_tweak in prop_oneof![0..9_u64, any::<u64>()],
        at in 0..30_u64,
        count in 1..20_u64,
        seed in any::<u64>(),
    ) {
        let sector = 1 << log;
        let memory = Arc::new(Memory::new(1 << 19));
        let raw: Vec<u8> = noise(64, seed ^ 0xaa);
        let segment = Segment {
            offset: offset * sector,
            size: None,
            sector_size: SectorSize::new(sector).expect("a known size"),
            first_tweak: Tweak(first_tweak),
        };
        let key = Key::new(&raw).expect("64 bytes");
        let volume = Crypt::new(memory.clone(), key, segment).expect("fits");
        let plain = noise((count * sector) as usize, seed);
        volume.write_all_at(&plain, at * sector).expect("in range");

        let cipher = |key| Aes256::new_from_slice(key).expect("32 bytes");
        let xts = Xts128::new(cipher(&raw[..32]), cipher(&raw[32..]));
        for (i, expected) in plain.chunks(sector as usize).enumerate() {
            let number = at + i as u64;
            let mut bytes = vec![0; sector as usize];
            memory.read_exact_at(&mut bytes, (offset + number) * sector).expect("in range");
            let tweak = first_tweak.wrapping_add(number * sector / 512);
            xts.decrypt_sector(&mut bytes, get_tweak_default(tweak.into()));
            prop_assert!(bytes == expected, "sector {}", number);
        }
        prop_assert!(memory.allocated() <= (count * sector).next_multiple_of(4096) + 4096);
    }
}
