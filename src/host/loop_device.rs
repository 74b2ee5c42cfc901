//! Settings of the loop device between a volume file and its filesystem.
//!
//! Measured on a device that writes 40 MB/s: `dd` into ext4, SIGINT after 10 s, then `sync`.
//!
//! | dirty pages | `dd` ended after | written | then `sync` |
//! |---|---|---|---|
//! | as the kernel has it | 61 s | 2,073 MB | 1.3 s |
//! | 128 MiB | 10 s | 444 MB | 2.4 s |
//! | 64 MiB | 10 s | 392 MB | 1.0 s |
//! | 32 MiB | 10 s | 388 MB | 0.5 s |
//!
//! With 50 ms for every request instead, 32 / 64 / 128 MiB write 52 / 78-95 / 102 MB/s, and reads
//! with a read-ahead of 128 KiB / 4 MiB / 8 MiB get 37 / 77-103 / 137 MB/s. Write-back throttling
//! (`wbt_lat_usec`) made no difference.
//!
//! All of this is best effort: a kernel or container without such a setting works without it.

use std::fs;
use std::path::{Path, PathBuf};

use tracing::debug;

use super::tool::Tool;

/// Dirty pages of the filesystem that may wait for the link: what a Ctrl-C has to wait for.
const DIRTY_MAX_BYTES: u64 = 64 << 20; // 5 s at 100 Mbit/s

/// What sequential reads ask for ahead.
const READ_AHEAD_KIB: u64 = 8 << 10; // 150 MB/s at 50 ms

/// A loop device with settings of ours.
#[derive(Debug)]
pub struct Tuned {
    device: PathBuf,
    read_ahead_kib: Option<u64>,
}

impl Tuned {
    /// Direct I/O: asynchronous, so many requests are in flight at once, and no page cache twice.
    /// Bounded dirty pages. Large read-ahead.
    pub fn new(device: &Path) -> Tuned {
        let direct = Tool::new("losetup").arg("--direct-io=on").arg(device);
        if let Err(error) = direct.deaf().run() {
            debug!(error = error.report(), "the loop device stays buffered");
        }
        let before = get(device, "queue/read_ahead_kb");
        set(device, "bdi/max_bytes", DIRTY_MAX_BYTES);
        // Else the bound holds only when the whole machine is short of clean memory.
        set(device, "bdi/strict_limit", 1);
        set(device, "queue/read_ahead_kb", READ_AHEAD_KIB);
        Tuned {
            device: device.to_path_buf(),
            // Ours already: a killed session has left it.
            read_ahead_kib: before.filter(|kib| *kib != READ_AHEAD_KIB),
        }
    }

    /// Puts the settings back: they stay with the device's number, for whoever gets it next. The
    /// bounds go to the kernel's defaults, which also heals what a killed session has left.
    pub fn reset(&self) {
        set(&self.device, "bdi/strict_limit", 0);
        set(&self.device, "bdi/max_ratio", 100);
        let read_ahead_kib = self.read_ahead_kib.unwrap_or(128);
        set(&self.device, "queue/read_ahead_kb", read_ahead_kib);
    }
}

fn get(device: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(attribute(device, name)?).ok()?;
    text.trim().parse().ok()
}

fn set(device: &Path, name: &str, value: u64) {
    let Some(path) = attribute(device, name) else {
        return;
    };
    if let Err(error) = fs::write(&path, value.to_string()) {
        debug!(path = %path.display(), value, %error, "not set");
    }
}

/// `/sys/block/loop3/<name>` for `/dev/loop3`, and nothing for any other device.
fn attribute(device: &Path, name: &str) -> Option<PathBuf> {
    let number = device.to_str()?.strip_prefix("/dev/loop")?;
    number.parse::<u32>().ok()?;
    Some(format!("/sys/block/loop{number}/{name}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loop_devices_are_touched() {
        let path = attribute(Path::new("/dev/loop3"), "bdi/max_bytes");
        assert_eq!(path, Some("/sys/block/loop3/bdi/max_bytes".into()));
        for other in [
            "/dev/sda",
            "/dev/loop",
            "/dev/loop3/../sda",
            "loop3",
            "/dev/loop-control",
        ] {
            assert_eq!(attribute(Path::new(other), "x"), None, "{other}");
        }
    }
}
