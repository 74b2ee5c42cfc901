//! Giving free blocks of the filesystem back to the server: they become holes in the image.
//!
//! The filesystem is not mounted. Its own bitmaps say what is free (`ext4.rs`), the lease says that
//! nobody else writes, and the first way that works makes the holes: the device itself (a local
//! file), a shell on the server, a sparse copy by the server. A hole reads as zeros here and as
//! noise under dm-crypt, which is all the same for a free block.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::{LinkSettings, Opened, server_shell};
use crate::device::{Device, Discard};
use crate::error::{Attempt, Error, Kind, Result};
use crate::ext4::{self, Map};
use crate::location::Location;
use crate::progress::{Event, Monitor, Progress};
use crate::remote::lease::Lease;
use crate::remote::{Access, Store, lean_copy};

/// How the holes were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// By the file's own system.
    File,
    Fallocate,
    CopyData,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::File => "fallocate on the local file",
            Backend::Fallocate => "fallocate on the server, over ssh",
            Backend::CopyData => "a sparse copy by the server (copy-data)",
        })
    }
}

#[derive(Clone, Debug)]
pub struct Trimmed {
    /// `None`: there was nothing to trim.
    pub backend: Option<Backend>,
    /// Bytes that are free in the filesystem, in whole granules.
    pub free: u64,
    /// Runs of them.
    pub runs: usize,
    /// Bytes that the filesystem has allocated.
    pub used: u64,
}

/// Bounds and links of a trim.
pub struct Job<'a> {
    pub location: &'a Location,
    pub link: &'a LinkSettings,
    pub store: &'a Arc<dyn Store>,
    pub lease: &'a Lease,
    /// Holes begin and end at multiples of this many bytes of the image; a power of two.
    pub granularity: u64,
    pub monitor: &'a dyn Monitor,
    /// Whether to go on.
    pub check: &'a dyn Fn() -> Result<()>,
}

/// Trims an image that was opened for reading only, and closes it.
///
/// # Errors
/// [`Kind::Unsupported`] when no way is open, saying for each why not. Whatever the error, and
/// whenever it is interrupted, nothing is lost, and it may be run again.
pub fn trim(opened: Opened, job: &Job<'_>) -> Result<Trimmed> {
    job.monitor.report(Event::Phase("read the block bitmaps"));
    let volume = opened.volume.device();
    let begins = opened.header.segment().offset();
    let size = begins + volume.size();
    let map = read_map(&*volume)?;
    drop(volume);
    opened.volume.close()?;
    let ranges = granules(&map, begins, job.granularity);
    let free: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let mut trimmed = Trimmed {
        backend: None,
        free,
        runs: ranges.len(),
        used: map.used,
    };
    if ranges.is_empty() {
        return Ok(trimmed);
    }
    (job.check)()?;
    job.monitor.report(Event::Phase("trim"));
    let total = std::cell::Cell::new(free);
    let tell = |done| {
        job.monitor.report(Event::Progress(Progress {
            bytes: Some(done),
            bytes_total: Some(total.get()),
            ..Progress::default()
        }));
    };
    let mut refusals: Vec<String> = Vec::new();
    for backend in [Backend::File, Backend::Fallocate, Backend::CopyData] {
        let done = match backend {
            Backend::File => discard(&**job.store, &ranges, &tell, job.check),
            Backend::Fallocate => {
                let nonce = &job.lease.holder().nonce;
                server_shell::punch(job.location, job.link, nonce, &ranges, &tell, job.check)
            }
            Backend::CopyData => {
                let live = kept(&map, &ranges, begins, size);
                total.set(live.iter().map(|range| range.end - range.start).sum());
                job.store.copy_lean(&lean_copy::Plan {
                    size,
                    live: &live,
                    tell: &tell,
                    check: job.check,
                    still_ours: &|| job.lease.check(),
                })
            }
        };
        match done {
            Ok(()) => {
                trimmed.backend = Some(backend);
                return Ok(trimmed);
            }
            Err(error) if [Kind::Unsupported, Kind::NoSpace].contains(&error.kind()) => {
                let why = error.chain().pop().unwrap_or_default();
                tracing::info!(%backend, why = error.report(), "not this way");
                refusals.push(format!("{backend}: {why}"));
            }
            Err(error) => return Err(error),
        }
    }
    let error = Error::new(
        Kind::Unsupported,
        "this server offers no way to free space in a file",
    );
    Err(error.because(refusals.join("; ")).hint(
        "it needs one of: commands over ssh and util-linux's fallocate; OpenSSH 9.0 or newer \
         with the SFTP extension copy-data and room for a second copy of what is in use",
    ))
}

fn read_map(volume: &dyn Device) -> Result<Map> {
    let mut read = |at: u64, into: &mut [u8]| volume.read_exact_at(into, at);
    let map = ext4::map(&mut read, volume.size()).attempt(|| "read the block bitmaps")?;
    map.map_err(|fault| {
        let error = Error::new(Kind::Unsupported, fault.to_string());
        match fault {
            ext4::Fault::NotClosed => error.hint(
                "`e2ebak mount` and `e2ebak umount` put it in order, as the next backup does",
            ),
            ext4::Fault::Damaged(_) => error.of_kind(Kind::Corrupt).hint("run `e2ebak check`"),
            ext4::Fault::HasErrors => error.of_kind(Kind::Corrupt).hint("run `e2ebak check`"),
            _ => error,
        }
    })
}

/// The free ranges as places in the image: inward to whole granules, and none in the header.
fn granules(map: &Map, begins: u64, granularity: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for range in &map.free {
        let start = (begins + range.start).next_multiple_of(granularity);
        let end = (begins + range.end) / granularity * granularity;
        if start < end {
            ranges.push(start..end);
        }
    }
    ranges
}

/// What a copy must have: the header and all that is live, and with it what lies between it and the
/// holes, since a smaller hole would tell more than the granularity allows.
fn kept(map: &Map, holes: &[Range<u64>], begins: u64, size: u64) -> Vec<Range<u64>> {
    let mut keep: Vec<Range<u64>> = map
        .live
        .iter()
        .map(|range| begins + range.start..begins + range.end)
        .collect();
    keep.push(0..begins);
    let free: Vec<Range<u64>> = map
        .free
        .iter()
        .map(|range| begins + range.start..begins + range.end)
        .collect();
    keep.extend(ext4::without(&ext4::merged(free), holes));
    let mut keep = ext4::merged(keep);
    if let Some(last) = keep.last_mut() {
        last.end = last.end.min(size);
    }
    keep
}

/// Holes made by the device itself.
fn discard(
    store: &dyn Store,
    ranges: &[Range<u64>],
    tell: &dyn Fn(u64),
    check: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let device = store.open(Access::ReadWrite)?;
    if device.caps().discard != Discard::Zeros {
        return Err(Error::new(Kind::Unsupported, "the image is no local file"));
    }
    let mut done = 0;
    for range in ranges {
        check()?;
        device.discard(range.clone())?;
        done += range.end - range.start;
        tell(done);
    }
    device.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> Map {
        Map {
            size: 1 << 20,
            used: 0,
            free: vec![0x3000..0x20000, 0x28000..0x29000, 0x40000..0x100000],
            live: vec![0..0x3000, 0x20000..0x28000, 0x29000..0x30000],
        }
    }

    #[test]
    fn holes_are_whole_granules_and_never_in_the_header() {
        let begins = 0x1_8000;
        let ranges = granules(&map(), begins, 0x10000);
        // 0x1b000..0x38000 and 0x58000..0x118000, inward; 4 KiB is less than a granule.
        assert_eq!(ranges, [0x20000..0x30000, 0x60000..0x110000]);
        assert_eq!(granules(&map(), begins, 0x1000).len(), 3);
        assert_eq!(granules(&map(), begins, 1 << 30), []);
    }

    #[test]
    fn a_copy_has_everything_but_the_holes_and_what_was_never_written() {
        let begins = 0x1_8000;
        let size = begins + (1 << 20);
        let ranges = granules(&map(), begins, 0x10000);
        let keep = kept(&map(), &ranges, begins, size);
        assert_eq!(
            keep,
            [
                0..0x20000,
                0x30000..0x48000,
                0x58000..0x60000,
                0x110000..size
            ]
        );
    }
}
