//! The cache over a device in memory, beside a plain vector of bytes.

use std::sync::Arc;

use e2ebak::device::{Caps, Device, Discard};
use e2ebak::layer::Cache;
use e2ebak::layer::cache::{SIZE_MIN_BYTES, Settings};
use e2ebak::layer::memory::Memory;

use super::input::Input;
use super::steps;

/// Several times the cache.
const SIZE_MAX: usize = 5 * SIZE_MIN_BYTES as usize;

pub fn cache(data: &[u8]) {
    let mut input = Input(data);
    let control = input.u8();
    let caps = Caps {
        alignment: 1 << (control % 13),
        discard: match control & 0x80 {
            0 => Discard::Zeros,
            _ => Discard::Refused,
        },
        ..Memory::new(0).caps()
    };
    let unit = caps.alignment as usize;
    let size = input.u32() as usize % SIZE_MAX / unit * unit;
    let memory = Arc::new(Memory::with_caps(size as u64, caps));
    let settings = Settings {
        size_bytes: SIZE_MIN_BYTES,
        ..Settings::default()
    };
    let cache = Cache::new(memory.clone(), settings).expect("sound settings");
    let mut model = vec![0; size];
    steps::run(&cache, &mut model, SIZE_MAX, &mut input);
    cache.close().expect("nothing fails below");
    assert!(steps::content(&*memory) == model, "what is below differs");
}
