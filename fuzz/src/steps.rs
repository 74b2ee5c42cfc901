//! A device beside a plain vector of bytes: the same steps on both must show the same.

use e2ebak::device::{Device, Discard};
use e2ebak::error::Kind;

use super::input::Input;

/// Enough for every state, few enough for hundreds of runs a second.
const STEPS_MAX: usize = 100;

/// Runs the steps that the input says. `model` is what the device holds, before and after.
pub fn run(device: &dyn Device, model: &mut Vec<u8>, size_max: usize, input: &mut Input) {
    let caps = device.caps();
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        let step = input.u8();
        let at = input.u32() as usize % (model.len() + 1);
        let len = usize::from(input.u16()).min(model.len() - at);
        let offset = at as u64;
        match step % 8 {
            0 | 1 => {
                let mut buf = vec![0x55; len];
                device
                    .read_exact_at(&mut buf, offset)
                    .expect("within the device");
                assert!(buf == model[at..at + len], "{len} bytes at {at} differ");
            }
            2..=4 if caps.writable => {
                for (i, byte) in model[at..at + len].iter_mut().enumerate() {
                    *byte = if step % 8 == 4 {
                        0
                    } else {
                        step.wrapping_mul(i as u8 | 1)
                    };
                }
                let written = device.write_all_at(&model[at..at + len], offset);
                written.expect("within the device");
            }
            5 if caps.writable => {
                let discarded = device.discard(offset..offset + len as u64);
                match caps.discard {
                    Discard::Zeros => {
                        discarded.expect("it discards");
                        model[at..at + len].fill(0);
                    }
                    Discard::Refused => {
                        assert_eq!(discarded.unwrap_err().kind(), Kind::Unsupported);
                    }
                }
            }
            6 => device.flush().expect("nothing fails below"),
            7 if caps.writable && size_max > 0 => {
                let size = at.wrapping_mul(len | 1) % size_max;
                if device.resize(size as u64).is_ok() {
                    model.resize(size, 0);
                }
            }
            _ => {
                // Beyond the end, and around the end of all numbers.
                let mut buf = [0; 9];
                for offset in [
                    device.size() - device.size().min(8),
                    device.size(),
                    u64::MAX - 3,
                ] {
                    assert_eq!(
                        device.read_exact_at(&mut buf, offset).unwrap_err().kind(),
                        Kind::Usage
                    );
                    assert!(device.write_all_at(&buf, offset).is_err());
                }
            }
        }
        assert_eq!(device.size(), model.len() as u64);
    }
    assert!(content(device) == *model, "the bytes at the end differ");
}

pub fn content(device: &dyn Device) -> Vec<u8> {
    let mut bytes = vec![0; device.size() as usize];
    device
        .read_exact_at(&mut bytes, 0)
        .expect("within the device");
    bytes
}
