//! The 1st, the 2nd, the 3rd operation on the device below fails, once or from then on, until a run
//! meets no fault; then the power goes. Every path of the engine that works on a device is run so: the
//! stack of a volume, an image that is made, its header, trim and copy.

#[path = "faults/images.rs"]
mod images;
#[path = "faults/shelf.rs"]
mod shelf;
#[path = "faults/versions.rs"]
mod versions;

#[path = "crash/random.rs"]
#[allow(dead_code)]
mod random;

use std::sync::Arc;

use e2ebak::device::Device;
use e2ebak::error::{Kind, Result};
use e2ebak::layer::cache::Settings;
use e2ebak::layer::crypt::Segment;
use e2ebak::layer::fault::{Faults, Faulty, Operation};
use e2ebak::layer::memory::Memory;
use e2ebak::layer::{Cache, Crypt};
use e2ebak::xts::{Key, SectorSize, Tweak};

use random::Random;
use versions::Versions;

const KIB: usize = 1 << 10;
const SECTOR: usize = 4 * KIB;
const VOLUME: usize = 512 * KIB;
const OFFSET: u64 = 1 << 16;
/// More than a run can need.
pub const OPERATIONS_MAX: u64 = 10_000;

/// What the power may tear: whole sectors, or half ones too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tear {
    Sectors,
    /// Then a hole that was written to in part reads as noise: all of the volume is written before,
    /// and nothing is discarded.
    Within,
}

impl Tear {
    fn unit(self) -> usize {
        match self {
            Tear::Sectors => SECTOR,
            Tear::Within => 512,
        }
    }
}

/// A volume over a device that breaks, and what it must hold.
struct Rig {
    device: Arc<Faulty>,
    faults: Arc<Faults>,
    model: Versions,
    tear: Tear,
    /// Discards and resizes fail as a whole, and nothing else fails.
    as_a_whole: bool,
}

impl Rig {
    fn new(tear: Tear) -> Rig {
        let faults = Arc::<Faults>::default();
        let memory = Arc::new(Memory::new(OFFSET + VOLUME as u64));
        let mut rig = Rig {
            device: Arc::new(Faulty::volatile(memory, faults.clone())),
            faults,
            model: Versions::new(VOLUME, tear.unit()),
            tear,
            as_a_whole: false,
        };
        if tear == Tear::Within {
            let volume = rig.open().expect("no fault yet");
            rig.model.write(0, &[0xEE; VOLUME]);
            volume
                .write_all_at(&[0xEE; VOLUME], 0)
                .expect("no fault yet");
            volume.close().expect("no fault yet");
            rig.model.flushed();
        }
        rig
    }

    fn open(&self) -> Result<Cache> {
        let segment = Segment {
            offset: OFFSET,
            size: None,
            sector_size: SectorSize::new(SECTOR as u64).expect("a size"),
            first_tweak: Tweak(0),
        };
        let key: Vec<u8> = (0..64).collect();
        let key = Key::new(&key).expect("a key");
        let crypt = Crypt::new(self.device.clone(), key, segment)?;
        // Small, so that it has to make room.
        let settings = Settings {
            size_bytes: 128 << 10,
            ..Settings::default()
        };
        Cache::new(Arc::new(crypt), settings)
    }

    /// Reads, writes, discards, resizes and flushes at random.
    fn run(&mut self, mut random: Random, steps: usize) -> Result<()> {
        let volume = self.open()?;
        for step in 0..steps {
            let size = self.model.now.len();
            let at = random.below(size);
            // Odd places and lengths, some of them across many sectors.
            let most = if random.below(4) == 0 { 70_000 } else { 6000 };
            let len = 1 + random.below(most.min(size - at));
            match random.below(16) {
                0..3 => {
                    volume.flush()?;
                    self.model.flushed();
                }
                3..6 => {
                    let mut seen = vec![0; len];
                    volume.read_exact_at(&mut seen, at as u64)?;
                    assert!(seen == self.model.now[at..at + len], "step {step}");
                }
                6 if self.tear == Tear::Sectors => {
                    let before = self.model.now.clone();
                    self.model.write(at, &vec![0; len]);
                    let discarded = volume.discard(at as u64..(at + len) as u64);
                    discarded.inspect_err(|_| self.nothing_has_changed(&volume, &before))?;
                }
                7 if self.tear == Tear::Sectors => {
                    let size = VOLUME - random.below(8) * SECTOR;
                    let before = self.model.now.clone();
                    self.model.resize(size);
                    let resized = volume.resize(size as u64);
                    resized.inspect_err(|_| self.nothing_has_changed(&volume, &before))?;
                    self.model.resized();
                }
                _ => {
                    let data = vec![random.next() as u8; len];
                    self.model.write(at, &data);
                    volume.write_all_at(&data, at as u64)?;
                }
            }
        }
        volume.close()?;
        self.model.flushed();
        Ok(())
    }

    fn nothing_has_changed(&self, volume: &Cache, before: &[u8]) {
        if self.as_a_whole {
            assert_eq!(volume.size(), before.len() as u64);
            let mut seen = vec![0; before.len()];
            volume.read_exact_at(&mut seen, 0).expect("only that fails");
            assert!(seen == before);
        }
    }

    /// Cuts the power and looks what is left.
    fn look_after_a_cut(&self, seed: u64) -> Result<(), String> {
        let unit = self.tear.unit() as u64;
        self.device.cut(unit, seed).expect("memory");
        self.faults.heal();
        let volume = self.open().expect("healed");
        let mut seen = vec![0; volume.size() as usize];
        volume.read_exact_at(&mut seen, 0).expect("healed");
        self.model.admits(&seen)
    }
}

fn sweep(operation: Option<Operation>, once: bool) {
    for spared in 0..OPERATIONS_MAX {
        let tear = [Tear::Sectors, Tear::Within][spared as usize % 2];
        let mut rig = Rig::new(tear);
        match once {
            true => rig.faults.fail_once(operation, spared, Kind::Io),
            false => rig.faults.fail(operation, spared, Kind::Io),
        }
        let outcome = rig.run(Random(7), 60);
        let left = rig.look_after_a_cut(spared);
        assert_eq!(left, Ok(()), "{operation:?}, {spared} spared, {outcome:?}");
        match outcome {
            // Both kinds of tearing have to get there.
            Ok(()) if rig.faults.met() == 0 && tear == Tear::Within => {
                assert!(spared > 5, "{operation:?}: no fault was met");
                return;
            }
            // What was only read ahead may fail and nobody hears of it.
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), Kind::Io, "{error:?}"),
        }
    }
    panic!("{operation:?}: every run meets a fault");
}

#[test]
fn whichever_operation_fails_what_was_flushed_is_kept() {
    sweep(None, false);
}

#[test]
fn and_if_only_one_fails() {
    for operation in [Operation::Read, Operation::Write, Operation::Flush] {
        sweep(Some(operation), true);
    }
}

#[test]
fn discards_and_resizes_that_fail_change_nothing_else() {
    for operation in [Operation::Discard, Operation::Resize] {
        let mut met = 0;
        for seed in 0..20 {
            let mut rig = Rig::new(Tear::Sectors);
            rig.as_a_whole = true;
            rig.faults.fail(Some(operation), seed % 3, Kind::NoSpace);
            let outcome = rig.run(Random(seed), 120);
            met += usize::from(rig.faults.met() > 0);
            let told = outcome.err().map(|error| error.kind());
            assert_eq!(told, (rig.faults.met() > 0).then_some(Kind::NoSpace));
            assert_eq!(rig.look_after_a_cut(seed), Ok(()), "{operation:?} {seed}");
        }
        assert!(met > 5, "{operation:?}: {met} faults met");
    }
}

/// Cuts at random moments of runs, each another one. `E2EBAK_CUTS` sets how many.
#[test]
fn after_a_power_cut_every_block_is_what_was_flushed_or_newer() {
    let cuts = std::env::var("E2EBAK_CUTS").map_or(150, |n| n.parse().expect("a number"));
    let mut struck = 0;
    for seed in 0..cuts {
        let tear = [Tear::Sectors, Tear::Within][seed as usize % 2];
        let mut rig = Rig::new(tear);
        let mut random = Random(seed);
        let spared = random.below(400) as u64;
        rig.faults.fail(None, spared, Kind::Disconnected);
        struck += usize::from(rig.run(random, 200).is_err());
        assert_eq!(rig.look_after_a_cut(seed), Ok(()), "seed {seed}");
    }
    assert!(
        struck > cuts as usize / 2,
        "{struck} of {cuts} runs were cut"
    );
}

/// The rig's own test: a flush that does nothing is found out.
#[test]
fn a_swallowed_flush_is_found_out() {
    let found = (0..50).any(|seed| {
        let mut rig = Rig::new(Tear::Sectors);
        let volume = rig.open().expect("no fault");
        for step in 0..40 {
            let data = vec![step + 1; SECTOR];
            rig.model.write(usize::from(step) * SECTOR, &data);
            volume
                .write_all_at(&data, u64::from(step) * SECTOR as u64)
                .expect("no fault");
        }
        // It should have been `volume.flush()`.
        rig.model.flushed();
        rig.faults.fail(None, 0, Kind::Disconnected);
        drop(volume);
        rig.look_after_a_cut(seed).is_err()
    });
    assert!(found);
}
