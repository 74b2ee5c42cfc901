//! The 1st, the 2nd, the 3rd operation below the volume fails, and all after it, until a run meets no
//! fault. Whatever fails, a flush that has returned is kept, and none returns that was not done.

use std::sync::Arc;

use e2ebak::device::Device;
use e2ebak::error::{Kind, Result};
use e2ebak::layer::cache::Settings;
use e2ebak::layer::crypt::Segment;
use e2ebak::layer::memory::{Memory, Operation};
use e2ebak::layer::{Cache, Crypt};
use e2ebak::xts::{Key, SectorSize, Tweak};

const VOLUME: usize = 1 << 20;
const OFFSET: u64 = 1 << 16;
/// More than a run can need.
const OPERATIONS_MAX: u64 = 10_000;

fn stack(memory: &Arc<Memory>) -> Result<Cache> {
    let segment = Segment {
        offset: OFFSET,
        size: None,
        sector_size: SectorSize::new(4096).expect("a size"),
        first_tweak: Tweak(0),
    };
    let key: Vec<u8> = (0..64).collect();
    let key = Key::new(&key).expect("a key");
    let crypt = Crypt::new(memory.clone(), key, segment)?;
    // Small, so that it has to make room.
    let settings = Settings {
        size_bytes: 256 << 10,
        ..Settings::default()
    };
    Cache::new(Arc::new(crypt), settings)
}

/// Writes, reads and flushes; `flushed` becomes what the volume held at each flush that returned.
fn run(memory: &Arc<Memory>, flushed: &mut Option<Vec<u8>>) -> Result<()> {
    let volume = stack(memory)?;
    let mut model = vec![0; VOLUME];
    volume.read_exact_at(&mut model, 0)?;
    for step in 0..40_usize {
        // Odd places and lengths, some of them across many sectors.
        let at = step * 104_729 % (VOLUME - 70_000);
        let len = 1 + step * 7919 % if step % 3 == 0 { 70_000 } else { 5000 };
        model[at..at + len].fill(step as u8 + 1);
        volume.write_all_at(&model[at..at + len], at as u64)?;
        let mut seen = vec![0; len];
        volume.read_exact_at(&mut seen, at as u64)?;
        assert!(seen == model[at..at + len], "step {step}");
        if step % 8 == 7 {
            volume.flush()?;
            *flushed = Some(model.clone());
        }
    }
    volume.close()?;
    *flushed = Some(model);
    Ok(())
}

fn sweep(operation: Option<Operation>) {
    for spared in 0..OPERATIONS_MAX {
        let memory = Arc::new(Memory::new(OFFSET + VOLUME as u64));
        memory.fail(operation, spared, Kind::Io);
        let mut flushed = None;
        let outcome = run(&memory, &mut flushed);
        memory.heal();
        if let Some(expected) = &flushed {
            let again = stack(&memory).expect("healed");
            let mut seen = vec![0; VOLUME];
            again.read_exact_at(&mut seen, 0).expect("healed");
            // What was written after the flush may be there, too: those bytes are larger.
            let kept = seen.iter().zip(expected).all(|(seen, kept)| seen >= kept);
            let kept = kept && (outcome.is_err() || seen == *expected);
            assert!(kept, "{operation:?} {spared}: a flush was not kept");
        }
        match outcome {
            Ok(()) => {
                assert!(spared > 5, "{operation:?}: no fault was met");
                return;
            }
            Err(error) => assert_eq!(error.kind(), Kind::Io, "{error:?}"),
        }
    }
    panic!("{operation:?}: every run meets a fault");
}

#[test]
fn whichever_operation_fails_what_was_flushed_is_kept() {
    for operation in [
        None,
        Some(Operation::Read),
        Some(Operation::Write),
        Some(Operation::Flush),
    ] {
        sweep(operation);
    }
}
