//! AES-256-XTS beside OpenSSL's EVP, libgcrypt, `xts-mode` and memcpy, 4096-byte sectors, in place.
//!
//! `cargo bench --bench xts` needs libssl-dev and libgcrypt20-dev; `-- 4k` runs one size only.

mod measure;

use std::thread::scope;
use std::time::Instant;

use aes::Aes256;
use aes::cipher::KeyInit;
use e2ebak::xts::{Key, SectorSize, Tweak};
use measure::{ROUNDS, Race, Work};
use xts_mode::{Xts128, get_tweak_default};

const SECTOR: usize = 4096;
const STEP: u64 = 8;
const CHUNK: usize = 1 << 20;

/// The C libraries, declared here so that only this file links them.
mod c {
    use std::ffi::{c_int, c_void};

    #[link(name = "crypto")]
    unsafe extern "C" {
        fn EVP_CIPHER_CTX_new() -> *mut c_void;
        fn EVP_aes_256_xts() -> *const c_void;
        fn EVP_CipherInit_ex(
            context: *mut c_void,
            cipher: *const c_void,
            engine: *const c_void,
            key: *const u8,
            iv: *const u8,
            encrypt: c_int,
        ) -> c_int;
        fn EVP_CipherUpdate(
            context: *mut c_void,
            out: *mut u8,
            out_len: *mut c_int,
            from: *const u8,
            len: c_int,
        ) -> c_int;
    }

    #[link(name = "gcrypt")]
    unsafe extern "C" {
        fn gcry_check_version(wanted: *const u8) -> *const u8;
        fn gcry_control(command: c_int, ...) -> u32;
        fn gcry_cipher_open(
            handle: *mut *mut c_void,
            cipher: c_int,
            mode: c_int,
            flags: u32,
        ) -> u32;
        fn gcry_cipher_setkey(handle: *mut c_void, key: *const u8, len: usize) -> u32;
        fn gcry_cipher_setiv(handle: *mut c_void, iv: *const u8, len: usize) -> u32;
        fn gcry_cipher_encrypt(
            handle: *mut c_void,
            out: *mut u8,
            size: usize,
            from: *const u8,
            len: usize,
        ) -> u32;
        fn gcry_cipher_decrypt(
            handle: *mut c_void,
            out: *mut u8,
            size: usize,
            from: *const u8,
            len: usize,
        ) -> u32;
    }

    pub struct OpenSsl(*mut c_void);

    impl OpenSsl {
        pub fn new(key: &[u8; 64], encrypt: bool) -> Self {
            // SAFETY: the key has the length that the cipher takes; a null IV comes later.
            unsafe {
                let context = EVP_CIPHER_CTX_new();
                let null = std::ptr::null();
                let cipher = EVP_aes_256_xts();
                let set = EVP_CipherInit_ex(
                    context,
                    cipher,
                    null,
                    key.as_ptr(),
                    null.cast(),
                    encrypt.into(),
                );
                assert_eq!(set, 1);
                OpenSsl(context)
            }
        }

        pub fn sector(&mut self, tweak: u64, data: &mut [u8]) {
            let iv = u128::from(tweak).to_le_bytes();
            let null = std::ptr::null();
            let mut written = 0;
            // SAFETY: the context lives as long as the process; XTS writes as much as it reads.
            unsafe {
                let begun = EVP_CipherInit_ex(self.0, null, null, null.cast(), iv.as_ptr(), -1);
                let bytes = data.as_mut_ptr();
                let done =
                    EVP_CipherUpdate(self.0, bytes, &mut written, bytes, data.len() as c_int);
                assert!(begun == 1 && done == 1 && written as usize == data.len());
            }
        }
    }

    pub struct Gcrypt(*mut c_void);

    impl Gcrypt {
        pub fn new(key: &[u8; 64]) -> Self {
            const INITIALIZATION_FINISHED: c_int = 38;
            const AES256: c_int = 9;
            const XTS: c_int = 13;
            let mut handle = std::ptr::null_mut();
            // SAFETY: the calls and constants of gcrypt.h 1.10; the key is 64 bytes long.
            unsafe {
                gcry_check_version(std::ptr::null());
                gcry_control(INITIALIZATION_FINISHED, 0 as c_int);
                assert_eq!(gcry_cipher_open(&mut handle, AES256, XTS, 0), 0);
                assert_eq!(gcry_cipher_setkey(handle, key.as_ptr(), key.len()), 0);
            }
            Gcrypt(handle)
        }

        pub fn sector(&mut self, encrypt: bool, tweak: u64, data: &mut [u8]) {
            let iv = u128::from(tweak).to_le_bytes();
            let call = match encrypt {
                true => gcry_cipher_encrypt,
                false => gcry_cipher_decrypt,
            };
            // SAFETY: the handle lives as long as the process; without input it works in place.
            unsafe {
                assert_eq!(gcry_cipher_setiv(self.0, iv.as_ptr(), iv.len()), 0);
                assert_eq!(
                    call(self.0, data.as_mut_ptr(), data.len(), std::ptr::null(), 0),
                    0
                );
            }
        }
    }
}

fn ours(key: &Key, encrypt: bool, first: Tweak, data: &mut [u8]) {
    let done = match encrypt {
        true => key.encrypt(SectorSize::MAX, first, data),
        false => key.decrypt(SectorSize::MAX, first, data),
    };
    done.expect("whole sectors");
}

/// Name and work; the last of the implementations is the one that `Key::new` takes.
fn contenders(encrypt: bool) -> Vec<(String, Work<'static>)> {
    let raw: [u8; 64] = std::array::from_fn(|i| (i * 73 + 5) as u8);
    let mut all: Vec<(String, Work<'static>)> = Vec::new();

    for (name, key) in Key::implementations(&raw).expect("64 bytes") {
        all.push((
            name.to_string(),
            Box::new(move |data| {
                // Too short to be split over several processors.
                for (chunk, i) in data.chunks_mut(CHUNK).zip(0..) {
                    ours(&key, encrypt, Tweak::at(Tweak(0), i * CHUNK as u64), chunk);
                }
            }),
        ));
    }

    let mut openssl = c::OpenSsl::new(&raw, encrypt);
    all.push((
        "openssl".to_string(),
        Box::new(move |data| {
            for (sector, i) in data.chunks_mut(SECTOR).zip(0..) {
                openssl.sector(i * STEP, sector);
            }
        }),
    ));

    let mut gcrypt = c::Gcrypt::new(&raw);
    all.push((
        "libgcrypt".to_string(),
        Box::new(move |data| {
            for (sector, i) in data.chunks_mut(SECTOR).zip(0..) {
                gcrypt.sector(encrypt, i * STEP, sector);
            }
        }),
    ));

    let cipher = |half| Aes256::new_from_slice(half).expect("32 bytes");
    let xts = Xts128::new(cipher(&raw[..32]), cipher(&raw[32..]));
    all.push((
        "xts-mode".to_string(),
        Box::new(move |data| {
            for (sector, i) in data.chunks_mut(SECTOR).zip(0..) {
                let tweak = get_tweak_default(i * u128::from(STEP));
                match encrypt {
                    true => xts.encrypt_sector(sector, tweak),
                    false => xts.decrypt_sector(sector, tweak),
                }
            }
        }),
    ));

    all.push(measure::memcpy());
    all
}

/// All must give the same bytes, or the race is worth nothing.
fn agree(contenders: &mut [(String, Work)]) {
    let plain: Vec<u8> = (0..5 * SECTOR).map(|i| (i * 31) as u8).collect();
    let mut outputs = contenders
        .iter_mut()
        .filter(|(name, _)| name != "memcpy")
        .map(|(_, work)| {
            let mut data = plain.clone();
            work(&mut data);
            data
        });
    let first = outputs.next().expect("an implementation");
    assert!(outputs.all(|output| output == first));
}

/// Races all contenders over a working set of `len` bytes; returns the line that sums it up.
fn race(direction: &str, label: &str, len: usize) -> String {
    let mut contenders = contenders(direction == "encrypt");
    agree(&mut contenders);
    let race = Race::run(&mut contenders, &mut vec![1; len]);
    println!("\n{direction} {label}");
    race.print("openssl");
    let implementations = Key::implementations(&[0; 64]).expect("64 bytes");
    let (ours, _) = implementations.last().expect("portable at least");
    format!(
        "xts {label} {direction}: {:.2} x openssl, {:.2} x libgcrypt, {:.2} x memcpy",
        race.ratio(ours, "openssl"),
        race.ratio(ours, "libgcrypt"),
        race.ratio(ours, "memcpy")
    )
}

/// How much more two threads do than one, by the clock on the wall. A long run is one call, which
/// is split; short ones are two callers with a working set each.
fn two_threads(direction: &str, len: usize) -> f64 {
    let encrypt = direction == "encrypt";
    let key = Key::new(&[7; 64]).expect("64 bytes");
    // A thread that starts costs as much as half a MiB.
    let calls = (64 << 20) / len;
    let run = |data: &mut [u8], chunk: usize| {
        for _ in 0..calls {
            for chunk in data.chunks_mut(chunk) {
                ours(&key, encrypt, Tweak(0), chunk);
            }
        }
    };
    let (mut left, mut right) = (vec![1; len], vec![1; len]);
    let split = calls == 1;
    let mut time = |threads: usize| {
        let begin = Instant::now();
        match (split, threads) {
            (_, 1) => run(&mut left, CHUNK),
            (true, _) => run(&mut left, len),
            (false, _) => scope(|scope| {
                scope.spawn(|| run(&mut right, CHUNK));
                run(&mut left, CHUNK);
            }),
        }
        begin.elapsed().as_secs_f64()
    };
    time(2);
    // The other processor may be taken away for a while, so the best of many rounds counts.
    let (mut one, mut two) = (f64::MAX, f64::MAX);
    for _ in 0..3 * ROUNDS {
        one = one.min(time(1));
        two = two.min(time(2));
    }
    match split {
        true => one / two,
        false => 2.0 * one / two,
    }
}

fn main() {
    let sizes = [("64M", 64 << 20), ("256k", 256 << 10), ("4k", 4 << 10)];
    // Cargo adds arguments of its own, so only sizes are taken as such.
    let arguments: Vec<String> = std::env::args().collect();
    let named = |label: &str| arguments.iter().any(|argument| argument == label);
    let all = !sizes.iter().any(|(label, _)| named(label));
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut lines = Vec::new();
    for (label, len) in sizes.into_iter().filter(|(label, _)| all || named(label)) {
        let ends = ["encrypt", "decrypt"].map(|direction| {
            let line = race(direction, label, len);
            let gain = two_threads(direction, len);
            println!("  two threads {gain:.2} x one, on {processors} processors");
            line
        });
        lines.extend(ends);
    }
    // The sector is what most requests are made of: it has the last word.
    println!("\n{}", lines.join("\n"));
}
