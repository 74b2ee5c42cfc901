//! What keeps a store from filling up: prune, usage, grow and trim, on real servers and judged by
//! e2fsck, cryptsetup and the server's own `stat`.

#[path = "../common/mod.rs"]
mod common;

mod check;
mod copy;
mod grow;
mod prune;
mod trim;
mod usage;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use aes::Aes256;
use aes::cipher::{Array, KeyInit};
use xts_mode::{Xts128, get_tweak_default};

use common::{Place, Program, Running};

/// A public mount of the image, gone when it is dropped.
struct Mount<'a> {
    place: &'a Place<'a>,
    at: PathBuf,
}

impl<'a> Mount<'a> {
    fn of(place: &'a Place<'a>) -> Self {
        let at = place.sandbox.dir("mnt");
        place.program("mount").arg(&at).ok();
        Mount { place, at }
    }

    fn close(self) {
        Program::new(self.place.sandbox, "umount")
            .arg(&self.at)
            .ok();
    }
}

/// Makes snapshots with these ids out of the newest one: other names of the same files, and
/// `extra` bytes in a file of its own in each.
fn forge(place: &Place, ids: &[&str], extra: u64) {
    let mount = Mount::of(place);
    let snapshots = mount.at.join("snapshots");
    let model = fs::read_link(mount.at.join("latest")).expect("a link");
    let model = model
        .file_name()
        .expect("a name")
        .to_str()
        .expect("an id")
        .to_string();
    let record = fs::read_to_string(snapshots.join(format!("{model}.json"))).expect("a record");
    for id in ids {
        let mut copy = common::tool("cp");
        common::run(
            copy.arg("-al")
                .arg(snapshots.join(&model))
                .arg(snapshots.join(id)),
        );
        if extra > 0 {
            let seed = id.bytes().map(u64::from).sum();
            common::large_file(&snapshots.join(id).join("extra"), extra, seed);
        }
        let forged = record.replace(&model, id);
        fs::write(snapshots.join(format!("{id}.json")), forged).expect("a record");
    }
    mount.close();
}

/// The names in the image's directory of snapshots.
fn names(place: &Place) -> Vec<String> {
    let mount = Mount::of(place);
    let entries = fs::read_dir(mount.at.join("snapshots"))
        .expect("readable")
        .flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    mount.close();
    names
}

/// Waits until a run has done something that can be seen.
fn wait_until(running: &mut Running, done: impl Fn() -> bool) {
    while !running.is_over() && !done() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// The plain volume, by means that share nothing with the program. A hole becomes garbage, as it does
/// under dm-crypt; of an image above `NOISE_MAX` holes stay holes.
fn decrypted(place: &Place) -> PathBuf {
    const NOISE_MAX: u64 = 1 << 30;
    const DATA: u64 = 16 << 20;
    let sandbox = place.sandbox;
    let passphrase = sandbox.file("passphrase", common::PASSPHRASE);
    let key = sandbox.path("volume key");
    let _ = fs::remove_file(&key);
    let mut dump = common::tool("cryptsetup");
    dump.args([
        "luksDump",
        "--batch-mode",
        "--dump-volume-key",
        "--volume-key-file",
    ]);
    dump.arg(&key).arg("--key-file").arg(passphrase);
    common::run(dump.arg(&place.stored));
    let key = fs::read(&key).expect("the volume key");
    let (first, second) = key.split_at(32);
    let cipher = |half: &[u8]| Aes256::new(&Array::try_from(half).expect("256 bits"));
    let xts = Xts128::new(cipher(first), cipher(second));

    let path = sandbox.path("plain");
    let (from, to) = (File::open(&place.stored), File::create(&path));
    let (from, to) = (from.expect("the image"), to.expect("a file"));
    let size = from.metadata().expect("metadata").len();
    to.set_len(size - DATA).expect("sparse");
    let mut chunk = vec![0; 1 << 20];
    let noise = vec![0xA5; 1 << 20];
    let (mut at, mut written) = (DATA, DATA);
    loop {
        let data = rustix::fs::seek(&from, rustix::fs::SeekFrom::Data(at));
        let data = data.map_or(size, |data| data / 4096 * 4096);
        while size <= NOISE_MAX && written < data {
            let len = (data - written).min(1 << 20);
            to.write_all_at(&noise[..len as usize], written - DATA)
                .expect("written");
            written += len;
        }
        if data >= size {
            break;
        }
        let end = rustix::fs::seek(&from, rustix::fs::SeekFrom::Hole(data)).expect("an end");
        let len = (1 << 20).min(end.next_multiple_of(4096).min(size) - data) as usize;
        from.read_exact_at(&mut chunk[..len], data).expect("read");
        for (i, sector) in chunk[..len].chunks_exact_mut(4096).enumerate() {
            let number = (data - DATA + (i * 4096) as u64) / 512;
            match sector.iter().all(|byte| *byte == 0) {
                true => sector.fill(0xA5),
                false => xts.decrypt_sector(sector, get_tweak_default(number.into())),
            }
        }
        to.write_all_at(&chunk[..len], data - DATA)
            .expect("written");
        at = data + len as u64;
        written = at;
    }
    path
}

/// e2fsck finds nothing wrong in the volume, whatever the holes read as.
fn assert_filesystem_clean(place: &Place) {
    let plain = decrypted(place);
    let checked = common::output(common::tool("e2fsck").arg("-fn").arg(&plain));
    let told = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.success() && !told.contains("? no"), "{told}");
    fs::remove_file(plain).expect("removed");
}
