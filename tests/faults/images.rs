//! An image that is made, opened, trimmed and copied while operations fail and the power goes.

use std::sync::{Arc, OnceLock};

use e2ebak::device::Device;
use e2ebak::error::{Error, Kind, Result};
use e2ebak::ext4;
use e2ebak::image::{self, CopyJob, Creation, LinkSettings, TrimJob};
use e2ebak::layer::fault::{Faults, Faulty};
use e2ebak::layer::memory::Memory;
use e2ebak::location::Location;
use e2ebak::luks::kdf::Costs;
use e2ebak::luks::{self, Format, Formatted};
use e2ebak::progress::Silent;
use e2ebak::remote::lease::Lease;
use e2ebak::remote::{Access, Store};
use e2ebak::secret::Secret;

use super::OPERATIONS_MAX;
use super::shelf::Shelf;

const MIB: u64 = 1 << 20;
/// The least that an image may have.
const SIZE: u64 = 48 * MIB;
/// What a cut may tear.
const UNITS: [u64; 2] = [512, 4096];

fn passphrase() -> Secret {
    Secret::new(b"correct horse".to_vec())
}

fn make(store: &Arc<dyn Store>) -> Result<()> {
    let creation = Creation {
        size: SIZE,
        label: "test".into(),
        kdf_memory: Some(64 << 10),
        kdf_time: Some(4),
    };
    let mut key = || Ok(passphrase());
    let made = image::create(store, "a", &creation, &mut key, &Silent, &|| Ok(()));
    made.map(drop)
}

/// Bytes of the volume.
fn read(volume: &dyn Device, range: std::ops::Range<u64>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    volume.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes)
}

fn map(volume: &dyn Device) -> Result<ext4::Map> {
    let mut read = |at: u64, into: &mut [u8]| volume.read_exact_at(into, at);
    let map = ext4::map(&mut read, volume.size())?;
    map.map_err(|fault| Error::new(Kind::Corrupt, fault.to_string()))
}

fn open(store: &dyn Store) -> Result<image::Opened> {
    let sealed = image::inspect(store, Access::ReadOnly)?;
    let unlocked = sealed.unlock(&passphrase())?;
    sealed.open(unlocked)
}

/// Runs `attempt` with ever more operations spared, until it meets no fault.
fn until_none_is_met(faults: &Faults, mut attempt: impl FnMut(u64) -> Result<()>) {
    for spared in 0..OPERATIONS_MAX {
        let met = faults.met();
        match attempt(spared) {
            Ok(()) if faults.met() == met => {
                assert!(spared > 3, "no fault was met");
                return;
            }
            // What is only read ahead may fail, and nobody hears of it.
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), Kind::Io, "{spared}: {}", error.report()),
        }
    }
    panic!("every run meets a fault");
}

#[test]
fn an_image_is_there_whole_or_is_none() {
    let faults = Arc::<Faults>::default();
    until_none_is_met(&faults, |spared| {
        if spared % 4 == 0 {
            no_half_image_stays(&faults, spared);
        }
        let shelf = Shelf::over(&faults);
        let store = shelf.store("a");
        shelf.faults.fail(None, spared, Kind::Io);
        let made = make(&store);
        shelf.cut(UNITS[spared as usize % 2], spared);
        match open(&*store) {
            Ok(opened) => {
                let volume = opened.volume.device();
                let map = map(&*volume).unwrap_or_else(|e| panic!("{spared}: {}", e.report()));
                assert_eq!(map.size, volume.size(), "{spared}");
            }
            Err(error) => {
                assert!(made.is_err(), "{spared}: {}", error.report());
                let none = [Kind::NoImage, Kind::Corrupt].contains(&error.kind());
                assert!(none, "{spared}: {}", error.report());
            }
        }
        made
    });
}

/// Where only one operation fails, what was begun can be removed.
fn no_half_image_stays(faults: &Arc<Faults>, spared: u64) {
    let shelf = Shelf::over(faults);
    let store = shelf.store("a");
    faults.fail_once(None, spared, Kind::Io);
    let made = make(&store);
    faults.heal();
    if let Err(error) = open(&*store) {
        assert!(made.is_err(), "{spared}: {}", error.report());
        assert_eq!(error.kind(), Kind::NoImage, "{spared}");
    }
}

fn formatted() -> &'static Formatted {
    static FORMATTED: OnceLock<Formatted> = OnceLock::new();
    FORMATTED.get_or_init(|| {
        let costs = Costs {
            memory_kib: 32,
            time: 4,
            lanes: 1,
        };
        let format = Format::new(SIZE, "6f3c1dd6-0f04-4c1e-8a43-6d5a3c1b2e90", costs);
        let mut next = 1_u64;
        let mut random = |into: &mut [u8]| {
            for byte in into {
                next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (next >> 56) as u8;
            }
            Ok(())
        };
        format.make(&passphrase(), &mut random).expect("made")
    })
}

/// Whatever of a header reaches the medium: it does not open, or it opens with the right key.
#[test]
fn a_header_that_is_written_when_the_power_goes_opens_or_does_not() {
    let mut opened = [0; 2];
    for seed in 0..120 {
        let memory = Arc::new(Memory::new(SIZE));
        let faults = Arc::<Faults>::default();
        let device = Faulty::volatile(memory, faults.clone());
        faults.fail(None, seed % 7, Kind::Io);
        // As `image::create` does it.
        let write = || -> Result<()> {
            for write in &formatted().writes {
                device.write_all_at(&write.bytes, write.offset)?;
                device.flush()?;
            }
            Ok(())
        };
        let written = write();
        device.cut(UNITS[seed as usize % 2], seed).expect("memory");
        faults.heal();
        let mut read = |at: u64, into: &mut [u8]| device.read_exact_at(into, at);
        let loaded = luks::load(&mut read, SIZE);
        opened[usize::from(loaded.is_ok())] += 1;
        match loaded {
            Ok(loaded) => {
                let (_, key) = loaded
                    .header
                    .unlock(&passphrase(), &mut read)
                    .unwrap_or_else(|e| panic!("{seed}: {}", e.report()));
                assert_eq!(key.bytes(), formatted().volume_key.bytes());
            }
            Err(error) => {
                assert_eq!(error.kind(), Kind::Corrupt, "{seed}: {}", error.report());
                assert!(written.is_err(), "{seed}: {}", error.report());
            }
        }
    }
    assert!(opened.iter().all(|count| *count > 10), "{opened:?}");
}

/// A read that fails is a read that failed: not a damaged header, no wrong key, no missing image.
#[test]
fn a_header_that_cannot_be_read_is_not_taken_for_a_damaged_one() {
    let shelf = Arc::<Shelf>::default();
    let store = shelf.store("a");
    make(&store).expect("made");
    for once in [true, false] {
        until_none_is_met(&shelf.faults, |spared| {
            match once {
                true => shelf.faults.fail_once(None, spared, Kind::Io),
                false => shelf.faults.fail(None, spared, Kind::Io),
            }
            let opened = open(&*store).and_then(|opened| map(&*opened.volume.device()));
            shelf.faults.heal();
            opened.map(drop)
        });
    }
}

#[test]
fn a_trim_that_is_interrupted_takes_nothing_that_is_in_use() {
    let shelf = Arc::<Shelf>::default();
    let store = shelf.store("a");
    make(&store).expect("made");
    let opened = open(&*store).expect("opens");
    let begins = opened.header.segment().offset();
    let volume = opened.volume.device();
    let map = map(&*volume).expect("closed");
    let live = || -> Vec<Vec<u8>> {
        let opened = open(&*store).expect("opens");
        let volume = opened.volume.device();
        let ranges = map.live.iter();
        ranges
            .map(|range| read(&*volume, range.clone()).expect("no fault"))
            .collect()
    };
    let before = live();
    drop((volume, opened));
    let image = shelf.image("a").expect("made");
    until_none_is_met(&shelf.faults, |spared| {
        for range in &map.free {
            let rubbish = [spared as u8 | 1; 4096];
            let at = begins + range.start;
            image.write_all_at(&rubbish, at).expect("no fault");
        }
        image.flush().expect("no fault");
        let run = || -> Result<()> {
            let lease = Lease::take(store.clone(), "a")?;
            let job = TrimJob {
                location: &Location::Local("/nowhere/a".into()),
                link: &LinkSettings::default(),
                store: &store,
                lease: &lease,
                granularity: 4096,
                monitor: &Silent,
                check: &|| Ok(()),
            };
            image::trim(open(&*store)?, &job)?;
            lease.release()
        };
        shelf.faults.fail(None, spared, Kind::Io);
        let trimmed = run();
        shelf.cut(UNITS[spared as usize % 2], spared);
        assert!(live() == before, "{spared}: something in use has changed");
        if trimmed.is_ok() {
            for range in &map.free {
                let at = begins + range.start;
                let freed = read(&*image, at..at + 4096).expect("no fault");
                assert!(freed.iter().all(|byte| *byte == 0), "{at} was not trimmed");
            }
        }
        trimmed
    });
}

/// A copy that is interrupted and cut: what has the name must be whole, the new one or the one before.
/// Then the next one: it must be a copy. So no note may have said more than was on the medium.
#[test]
fn a_copy_that_is_interrupted_is_made_whole_by_the_next() {
    let faults = Arc::<Faults>::default();
    until_none_is_met(&faults, |spared| {
        // The moments between data and their notes are few.
        let one = |seed| copy_cut_and_copied(&faults, spared, 5 * spared + seed);
        (0..5).map(one).fold(Ok(()), Result::and)
    });
}

fn copy_cut_and_copied(faults: &Arc<Faults>, spared: u64, seed: u64) -> Result<()> {
    const CHUNK: u64 = MIB;
    let size = 2 * CHUNK + 12_288;
    let shelf = Shelf::over(faults);
    let from = shelf.store("from").create(size).expect("made");
    let to = shelf.store("to");
    let fill = |chunk: u64, byte: u8| {
        let at = chunk * CHUNK + 4096;
        from.write_all_at(&[byte; 8192], at).expect("no fault");
    };
    let copy = || {
        let job = CopyJob {
            from: &*from,
            ranges: None,
            to: &*to,
            anew: false,
            monitor: &Silent,
            check: &|| Ok(()),
            unmoved: &|| Ok(()),
        };
        image::copy(&job).map(drop)
    };
    [0, 1, 2].into_iter().for_each(|chunk| fill(chunk, 1));
    copy().expect("no fault");
    let older = read(&*from, 0..size).expect("no fault");
    fill(1, 2);
    from.discard(0..CHUNK).expect("no fault");
    from.flush().expect("no fault");

    faults.fail(None, spared, Kind::Io);
    let copied = copy();
    shelf.cut(UNITS[seed as usize % 2], seed);
    let newer = read(&*from, 0..size).expect("no fault");
    if let Ok(left) = to.open(Access::ReadOnly) {
        let left = read(&*left, 0..size).expect("no fault");
        let whole = left == newer || (left == older && copied.is_err());
        assert!(whole, "{spared}, seed {seed}: it has the name; {copied:?}");
    }
    // Notes of what the source was before are true again, and of no use if the copy has lost that.
    if seed / 2 % 2 == 1 {
        fill(0, 1);
        fill(1, 1);
    }
    copy().unwrap_or_else(|e| panic!("{spared}: {}", e.report()));
    let made = to.open(Access::ReadOnly).expect("made");
    let now = read(&*from, 0..size).expect("no fault");
    let same = read(&*made, 0..size).expect("no fault") == now;
    assert!(same, "{spared}, seed {seed}: {copied:?}");
    copied
}
