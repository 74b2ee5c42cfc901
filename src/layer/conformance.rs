//! What every [`Device`] must do, checked against a vector of bytes: random steps, on the device
//! and on the model, must show the same bytes and refuse the same requests.

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use crate::buffer::Buffer;
use crate::device::{Device, Discard};
use crate::error::{Kind, Result};

/// The largest device that steps resize to, in units of its alignment.
const UNITS_MAX: usize = 64;

/// One request. Places and lengths are in units of the device's alignment and are folded into its
/// size, so that the same steps suit every device.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Read {
        at: usize,
        units: usize,
    },
    Write {
        at: usize,
        units: usize,
        seed: u8,
    },
    Zero {
        at: usize,
        units: usize,
    },
    Discard {
        at: usize,
        units: usize,
    },
    Resize {
        units: usize,
    },
    Flush,
    /// Requests that must be refused and change nothing.
    Refuse {
        beyond: u64,
    },
}

pub(crate) fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Mostly short runs; sometimes as much as there is.
    let units = || prop_oneof![4 => 0..6_usize, 1 => Just(usize::MAX)];
    let at = || any::<usize>();
    let step = prop_oneof![
        4 => (at(), units()).prop_map(|(at, units)| Step::Read { at, units }),
        6 => (at(), units(), any::<u8>()).prop_map(|(at, units, seed)| Step::Write { at, units, seed }),
        1 => (at(), units()).prop_map(|(at, units)| Step::Zero { at, units }),
        2 => (at(), units()).prop_map(|(at, units)| Step::Discard { at, units }),
        1 => (0..UNITS_MAX).prop_map(|units| Step::Resize { units }),
        1 => Just(Step::Flush),
        1 => any::<u64>().prop_map(|beyond| Step::Refuse { beyond }),
    ];
    prop::collection::vec(step, 0..40)
}

/// Runs the steps on a device of any content; the model begins with what the device shows.
pub(crate) fn check(device: &dyn Device, steps: &[Step]) -> Result<(), TestCaseError> {
    let unit = device.caps().alignment as usize;
    let mut model = vec![0; device.size() as usize];
    device.read_exact_at(&mut model, 0).map_err(failed)?;

    for step in steps {
        let fold = |at: usize, units: usize| {
            let total = model.len() / unit;
            let at = at % (total + 1);
            at * unit..(at + units.min(total - at)) * unit
        };
        match *step {
            Step::Read { at, units } => {
                let range = fold(at, units);
                let mut buf = vec![0x55; range.len()];
                match device.read_at_once(&mut buf, range.start as u64) {
                    true => prop_assert!(buf == model[range.clone()], "at once: {:?}", step),
                    false => prop_assert!(buf.iter().all(|byte| *byte == 0x55)),
                }
                let read = device.read_exact_at(&mut buf, range.start as u64);
                read.map_err(failed)?;
                prop_assert!(buf == model[range], "{:?}", step);
            }
            Step::Write { at, units, seed } => {
                let range = fold(at, units);
                for (i, byte) in model[range.clone()].iter_mut().enumerate() {
                    *byte = seed.wrapping_mul(i as u8 | 1).wrapping_add((i >> 8) as u8);
                }
                let data = &model[range.clone()];
                let offset = range.start as u64;
                let write = match seed % 3 {
                    0 => {
                        let taken = device.write_at_once(data, offset);
                        device.write_all_at(&data[taken..], offset + taken as u64)
                    }
                    1 => device.write_buffer_at(Buffer::from(data), offset),
                    _ => device.write_all_at(data, offset),
                };
                write.map_err(failed)?;
            }
            Step::Zero { at, units } => {
                let range = fold(at, units);
                model[range.clone()].fill(0);
                let write = device.write_all_at(&model[range.clone()], range.start as u64);
                write.map_err(failed)?;
            }
            Step::Discard { at, units } => {
                let range = fold(at, units);
                let discarded = device.discard(range.start as u64..range.end as u64);
                match device.caps().discard {
                    Discard::Zeros => {
                        discarded.map_err(failed)?;
                        model[range].fill(0);
                    }
                    Discard::Refused => expect(discarded, Kind::Unsupported)?,
                }
            }
            Step::Resize { units } => match device.resize((units * unit) as u64) {
                Ok(()) => model.resize(units * unit, 0),
                Err(error) => prop_assert_eq!(error.kind(), Kind::Unsupported),
            },
            Step::Flush => device.flush().map_err(failed)?,
            Step::Refuse { beyond } => refuse(device, beyond)?,
        }
        prop_assert_eq!(device.size(), model.len() as u64);
    }

    let mut shown = vec![0; model.len()];
    device.read_exact_at(&mut shown, 0).map_err(failed)?;
    prop_assert!(shown == model, "the bytes at the end differ");
    Ok(())
}

/// Reaches past the end, wraps around and breaks the alignment.
fn refuse(device: &dyn Device, beyond: u64) -> Result<(), TestCaseError> {
    let unit = device.caps().alignment as usize;
    let mut buf = vec![0; unit];
    let after_end = device.size().saturating_add(beyond & !(unit as u64 - 1));
    for offset in [after_end, device.size(), u64::MAX - (unit as u64 - 1)] {
        expect(device.read_exact_at(&mut buf, offset), Kind::Usage)?;
        expect(device.write_all_at(&buf, offset), Kind::Usage)?;
        prop_assert!(!device.read_at_once(&mut buf, offset));
        prop_assert_eq!(device.write_at_once(&buf, offset), 0);
    }
    if unit > 1 && device.size() >= unit as u64 {
        let part = &mut buf[..unit / 2];
        expect(device.read_exact_at(part, 0), Kind::Usage)?;
        expect(device.write_all_at(part, 0), Kind::Usage)?;
        expect(device.read_exact_at(&mut [], 1), Kind::Usage)?;
    }
    Ok(())
}

fn expect(outcome: Result<()>, kind: Kind) -> Result<(), TestCaseError> {
    let got = outcome.err().map(|error| error.kind());
    prop_assert_eq!(got, Some(kind));
    Ok(())
}

fn failed(error: crate::error::Error) -> TestCaseError {
    TestCaseError::fail(error.report())
}
