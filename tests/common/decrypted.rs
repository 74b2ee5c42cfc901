//! The volume of an image without our own code: the key by cryptsetup, the sectors by the crate
//! `xts-mode`, the judgement by e2fsck.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use aes::Aes256;
use aes::cipher::{Array, KeyInit};
use xts_mode::{Xts128, get_tweak_default};

use super::{PASSPHRASE, Sandbox, output, run, tool};

pub const SECTOR: usize = 4096;
/// What cryptsetup's `luksDump` calls the offset of the data segment.
const DATA: u64 = 16 << 20;

/// The volume key, by cryptsetup.
fn volume_key(sandbox: &Sandbox, image: &Path) -> Vec<u8> {
    let passphrase = sandbox.file("passphrase", PASSPHRASE);
    let key = sandbox.path("volume key");
    let mut dump = tool("cryptsetup");
    dump.args([
        "luksDump",
        "--dump-volume-key",
        "--batch-mode",
        "--key-file",
    ]);
    dump.arg(passphrase)
        .arg("--volume-key-file")
        .arg(&key)
        .arg(image);
    run(&mut dump);
    let bytes = fs::read(&key).expect("the volume key");
    fs::remove_file(&key).expect("removed");
    bytes
}

/// How many sectors were holes, of how many.
pub struct Decrypted {
    pub path: PathBuf,
    pub holes: u64,
    pub sectors: u64,
}

/// Decrypts an image by the crate `xts-mode` into a file of the sandbox.
pub fn decrypt(sandbox: &Sandbox, image: &Path) -> Decrypted {
    let dump = run(tool("cryptsetup").arg("luksDump").arg(image));
    for fact in [
        "offset: 16777216 [bytes]",
        "cipher: aes-xts-plain64",
        "sector: 4096 [bytes]",
    ] {
        assert!(dump.contains(fact), "no `{fact}` in\n{dump}");
    }
    let key = volume_key(sandbox, image);
    let (first, second) = key.split_at(32);
    let cipher = |half: &[u8]| Aes256::new(&Array::try_from(half).expect("256 bits"));
    let xts = Xts128::new(cipher(first), cipher(second));

    let from = File::open(image).expect("the image");
    let path = sandbox.path("plain");
    let to = File::create(&path).expect("a file");
    let size = from.metadata().expect("metadata").len() - DATA;
    let mut chunk = vec![0; 1 << 20];
    let mut decrypted = Decrypted {
        path,
        holes: 0,
        sectors: 0,
    };
    let mut at = 0;
    while at < size {
        let len = chunk.len().min((size - at) as usize);
        let part = &mut chunk[..len];
        from.read_exact_at(part, DATA + at).expect("read");
        for (i, sector) in part.chunks_exact_mut(SECTOR).enumerate() {
            decrypted.holes += u64::from(sector.iter().all(|byte| *byte == 0));
            decrypted.sectors += 1;
            // dm-crypt counts in units of 512 bytes whatever the sector size (kernel
            // documentation, admin-guide/device-mapper/dm-crypt, `iv_large_sectors`).
            let number = (at + (i * SECTOR) as u64) / 512;
            xts.decrypt_sector(sector, get_tweak_default(number.into()));
        }
        to.write_all_at(part, at).expect("written");
        at += len as u64;
    }
    decrypted
}

/// Fails unless e2fsck finds nothing to ask about.
pub fn is_clean(plain: &Path) {
    let checked = output(tool("e2fsck").arg("-fn").arg(plain));
    let told = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(
        checked.status.success(),
        "e2fsck -fn: {}\n{told}",
        checked.status
    );
    // "-n" answers no to every question; a clean filesystem asks none.
    assert!(!told.contains("? no"), "{told}");
}
