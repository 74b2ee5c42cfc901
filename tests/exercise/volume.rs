//! The stack of a volume over a device, without a header.

use std::sync::Arc;

use e2ebak::device::Device;
use e2ebak::layer::cache::Settings;
use e2ebak::layer::crypt::Segment;
use e2ebak::layer::{Cache, Crypt};
use e2ebak::xts::{Key, SectorSize, Tweak};

/// Where the volume begins in the device.
pub const OFFSET: u64 = 1 << 16;

/// `sector` in bytes.
pub fn decrypted(device: Arc<dyn Device>, sector: u64) -> Crypt {
    let segment = Segment {
        offset: OFFSET,
        size: None,
        sector_size: SectorSize::new(sector).expect("a size"),
        first_tweak: Tweak(0),
    };
    let key: Vec<u8> = (0..64).collect();
    Crypt::new(device, Key::new(&key).expect("a key"), segment).expect("fits")
}

/// With a cache of so many bytes.
pub fn cached(device: Arc<dyn Device>, sector: u64, size_bytes: u64) -> Cache {
    let settings = Settings {
        size_bytes,
        ..Settings::default()
    };
    Cache::new(Arc::new(decrypted(device, sector)), settings).expect("a cache")
}
