//! Key derivation beside the C reference implementation, and what else an unlock costs.
//!
//! `cargo bench --bench kdf` needs libargon2-dev and about 2 GiB of memory. By the clock on the wall,
//! since lanes are filled side by side; the best of several rounds in turn counts.

use std::time::{Duration, Instant};

use e2ebak::luks::kdf::{Costs, MEMORY_MAX_KIB};
use e2ebak::luks::{Format, load};
use e2ebak::secret::Secret;
use sha2::Sha256;

const ROUNDS: usize = 5;

/// The C library, declared here so that only this file links it.
mod c {
    use std::ffi::{c_int, c_void};

    use e2ebak::luks::kdf::Costs;

    #[link(name = "argon2")]
    unsafe extern "C" {
        fn argon2id_hash_raw(
            passes: u32,
            memory_kib: u32,
            lanes: u32,
            password: *const c_void,
            password_len: usize,
            salt: *const c_void,
            salt_len: usize,
            out: *mut c_void,
            out_len: usize,
        ) -> c_int;
    }

    /// As [`Costs::spend`].
    pub fn spend(costs: Costs) -> [u8; 64] {
        let (password, salt, mut out) = (b"probe", [0_u8; 32], [0; 64]);
        // SAFETY: the signature of argon2.h 20171227; every pointer goes with its length.
        let code = unsafe {
            argon2id_hash_raw(
                costs.time,
                costs.memory_kib,
                costs.lanes,
                password.as_ptr().cast(),
                password.len(),
                salt.as_ptr().cast(),
                salt.len(),
                out.as_mut_ptr().cast(),
                out.len(),
            )
        };
        assert_eq!(code, 0);
        out
    }
}

fn time(work: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    work();
    begin.elapsed()
}

/// Best of several rounds, ours and theirs in turn.
fn beside_c(costs: Costs) -> (Duration, Duration) {
    let (mut ours, mut theirs) = (Duration::MAX, Duration::MAX);
    for _ in 0..ROUNDS {
        ours = ours.min(time(|| costs.spend().expect("there is memory")));
        theirs = theirs.min(time(|| {
            std::hint::black_box(c::spend(costs));
        }));
    }
    (ours, theirs)
}

/// What an unlock costs but for Argon2id: area, anti-forensic merge, digest.
fn rest_of_an_unlock() -> Duration {
    let cheap = Costs {
        memory_kib: 32,
        time: 4,
        lanes: 1,
    };
    let passphrase = Secret::new(b"x".to_vec());
    let format = Format::new(32 << 20, "6f3c1dd6-0f04-4c1e-8a43-6d5a3c1b2e90", cheap);
    let mut noise = |out: &mut [u8]| {
        getrandom::fill(out).expect("random bytes");
        Ok(())
    };
    let made = format.make(&passphrase, &mut noise).expect("makes");
    let mut image = vec![0; 32 << 20];
    for write in made.writes {
        image[write.offset as usize..][..write.bytes.len()].copy_from_slice(&write.bytes);
    }
    let mut read = |offset: u64, out: &mut [u8]| {
        out.copy_from_slice(&image[offset as usize..][..out.len()]);
        Ok(())
    };
    let header = load(&mut read, 32 << 20).expect("sound").header;
    let mut unlock = || time(|| drop(header.unlock(&passphrase, &mut read).expect("opens")));
    (0..5 * ROUNDS).map(|_| unlock()).min().expect("a round")
}

/// The digest of the volume key alone.
fn pbkdf2() -> Duration {
    let run = || pbkdf2::pbkdf2_hmac::<Sha256>(&[7; 64], &[1; 32], 100_000, &mut [0; 32]);
    (0..5 * ROUNDS).map(|_| time(run)).min().expect("a round")
}

fn main() {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let mut lines = Vec::new();
    for (label, memory_kib) in [("64M", 64 << 10), ("1G", MEMORY_MAX_KIB)] {
        for lanes in [1, 2, 4] {
            let costs = Costs {
                memory_kib,
                time: 4,
                lanes,
            };
            let (ours, theirs) = beside_c(costs);
            println!(
                "{costs}: {:.0} ms, C library {:.0} ms",
                ms(ours),
                ms(theirs)
            );
            let ratio = theirs.as_secs_f64() / ours.as_secs_f64();
            lines.push(format!(
                "argon2id {label} {lanes} lanes: {ratio:.2} x C library"
            ));
        }
    }

    let lanes = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(4) as u32;
    let probe = Costs::probe(lanes);
    let measured = time(|| probe.spend().expect("there is memory"));
    let costs = probe.calibrated(measured, Duration::from_secs(2), MEMORY_MAX_KIB);
    let spent = time(|| costs.spend().expect("there is memory"));
    println!(
        "calibrated for 2 s: {costs}; takes {:.2} s",
        spent.as_secs_f64()
    );

    let (rest, digest) = (rest_of_an_unlock(), pbkdf2());
    println!(
        "the rest of an unlock: {:.1} ms, of which PBKDF2 {:.1} ms",
        ms(rest),
        ms(digest)
    );
    lines.push(format!(
        "unlock: argon2id {:.2} s, all else {:.1} % of it",
        spent.as_secs_f64(),
        100.0 * rest.as_secs_f64() / spent.as_secs_f64()
    ));
    println!("\n{}", lines.join("\n"));
}
