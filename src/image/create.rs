//! A new image: sparse file, filesystem, and the LUKS2 header last, so that an image that was not
//! finished is not taken for one.

use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::stack;
use crate::error::{Attempt, Error, Kind, Result};
use crate::host::{self, mkfs};
use crate::luks::kdf::Costs;
use crate::luks::{Format, Formatted};
use crate::progress::{Event, Monitor};
use crate::remote::lease::Lease;
use crate::remote::{Access, Store};
use crate::secret::Secret;
use crate::units::{Bytes, GIB, KIB, MIB};

/// Sizes are multiples of the sector of the volume.
const SECTOR: u64 = 4 * KIB;
/// Header and keyslots, before the volume.
const HEADER: u64 = 16 * MIB;
/// The header and the smallest ext4 that is worth it.
const SIZE_MIN: u64 = HEADER + mkfs::SIZE_MIN;
const SIZE_MAX: u64 = HEADER + mkfs::SIZE_MAX;
/// How long one guess of the passphrase should take on this machine, as cryptsetup's default.
const UNLOCK_TIME: Duration = Duration::from_secs(2);
/// As cryptsetup: never more than half of the machine's memory, and 1 GiB.
const KDF_MEMORY_MAX: u64 = GIB;

/// What the image is to be like.
#[derive(Clone, Debug)]
pub struct Creation {
    /// Bytes of the whole file.
    pub size: u64,
    pub label: String,
    /// Bytes of memory for Argon2id; calibrated when `None`.
    pub kdf_memory: Option<u64>,
    /// Passes of Argon2id; calibrated when `None`.
    pub kdf_time: Option<u32>,
}

/// What was made.
#[derive(Debug)]
pub struct Created {
    pub uuid: String,
    /// Bytes sent over the link.
    pub sent: u64,
}

impl Creation {
    /// Refuses what could not become an image, before anything is touched.
    pub fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::new(Kind::Usage, why));
        if !self.size.is_multiple_of(SECTOR) {
            let below = self.size / SECTOR * SECTOR;
            return refuse(format!(
                "a size of {} is not a multiple of {SECTOR} bytes; {below} is",
                self.size
            ));
        }
        if !(SIZE_MIN..=SIZE_MAX).contains(&self.size) {
            return refuse(format!(
                "a size of {} is not between {} and {}",
                Bytes(self.size),
                Bytes(SIZE_MIN),
                Bytes(SIZE_MAX)
            ));
        }
        // The filesystem's label, the shorter of the two (ext4 superblock, `s_volume_name`).
        if self.label.len() > 16 {
            return refuse(format!("the label `{}` has more than 16 bytes", self.label));
        }
        Ok(())
    }

    fn costs(&self) -> Result<Costs> {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let lanes = u32::try_from(cores).unwrap_or(1).min(4);
        let probe = Costs::probe(lanes);
        let mut costs = match (self.kdf_memory, self.kdf_time) {
            (Some(_), Some(_)) => probe,
            _ => {
                let clock = Instant::now();
                probe
                    .spend()
                    .map_err(|why| Error::new(Kind::Io, why))
                    .attempt(|| "time the key derivation")?;
                let memory = KDF_MEMORY_MAX.min(host::memory_bytes() / 2);
                let memory_kib = u32::try_from(memory / KIB).unwrap_or(u32::MAX);
                probe.calibrated(clock.elapsed(), UNLOCK_TIME, memory_kib)
            }
        };
        if let Some(memory) = self.kdf_memory {
            costs.memory_kib = u32::try_from(memory / KIB).unwrap_or(u32::MAX);
        }
        if let Some(time) = self.kdf_time {
            costs.time = time;
        }
        Ok(costs)
    }
}

/// Creates an image where nothing is yet. `check` is asked between the steps whether to go on.
///
/// On any error the file is removed again, unless it was there before.
pub fn create(
    store: &Arc<dyn Store>,
    name: &str,
    creation: &Creation,
    key: &mut dyn FnMut() -> Result<Secret>,
    monitor: &dyn Monitor,
    check: &dyn Fn() -> Result<()>,
) -> Result<Created> {
    creation.check()?;
    // Before anybody types a passphrase; `Store::create` is what makes sure.
    match store.open(Access::ReadOnly) {
        Err(error) if error.kind() == Kind::NoImage => {}
        Err(error) => return Err(error),
        Ok(_) => {
            let hint = match super::inspect(&**store, Access::ReadOnly) {
                Err(error) if error.kind() == Kind::Corrupt => {
                    "it has no LUKS2 header: if an interrupted `init` left it, remove it yourself"
                }
                _ => "it was left untouched; choose another name, or remove it yourself",
            };
            return Err(Error::new(Kind::Exists, "there is a file already").hint(hint));
        }
    }
    let key = key()?;
    monitor.report(Event::Phase("derive the key"));
    let format = Format {
        label: creation.label.clone(),
        ..Format::new(
            creation.size,
            uuid::Uuid::new_v4().to_string(),
            creation.costs()?,
        )
    };
    let formatted = format.make(&key, &mut random)?;
    drop(key);
    check()?;

    let image = store.create(creation.size)?;
    let lease = Lease::take(store.clone(), name).inspect_err(|_| drop(store.remove()))?;
    let fill = || -> Result<()> {
        monitor.report(Event::Phase("make the filesystem"));
        let volume = stack(
            image.clone(),
            &formatted.header,
            &formatted.volume_key,
            Access::ReadWrite,
        )?;
        let device = volume.device();
        host::make_ext4(
            device.size(),
            &creation.label,
            None,
            &mut |offset, bytes| {
                check()?;
                device.write_all_at(bytes, offset)
            },
        )?;
        drop(device);
        volume.close().attempt(|| "sync the filesystem")?;
        check()?;
        write_header(&*image, &formatted)
    };
    // A signal reaches mkfs as well, so how that failed is not what matters then.
    if let Err(error) = fill().map_err(|error| check().err().unwrap_or(error)) {
        store
            .remove()
            .inspect_err(|e| tracing::warn!("cannot remove the unfinished image: {}", e.report()))
            .ok();
        lease.release().ok();
        return Err(error);
    }
    lease.release()?;
    Ok(Created {
        uuid: formatted.header.uuid().to_string(),
        sent: store.traffic().sent,
    })
}

/// Each part on stable storage before the next, so that no order of events leaves half a header.
fn write_header(image: &dyn crate::device::Device, formatted: &Formatted) -> Result<()> {
    for write in &formatted.writes {
        image
            .write_all_at(&write.bytes, write.offset)
            .attempt(|| "write the LUKS2 header")?;
        image.flush().attempt(|| "sync the LUKS2 header")?;
    }
    Ok(())
}

fn random(into: &mut [u8]) -> Result<()> {
    getrandom::fill(into)
        .map_err(|e| Error::new(Kind::Io, e.to_string()))
        .attempt(|| "get random bytes")
}
