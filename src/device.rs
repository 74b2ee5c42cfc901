//! The one interface between the layers: a run of bytes that can be read and written at any
//! offset its alignment allows. Method names are those of `std::os::unix::fs::FileExt`.

use std::ops::Range;
use std::sync::Arc;

use crate::buffer::Buffer;
use crate::error::{Error, Kind, Result};

/// What flush means on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// After a flush the data survive a crash of the other side.
    Stable,
    /// The other side offers no fsync: a flush only means that it has received the data.
    BestEffort,
}

/// What reads return from a range that was discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// Discard is refused.
    Refused,
    /// The range becomes a hole and reads as zeros.
    Zeros,
}

/// What a device can do. Fixed for the life of the device, but for `writable`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Offsets and lengths are multiples of this many bytes; a power of two, 1 if anything goes.
    pub alignment: u32,
    /// The largest single request, in bytes, that the device serves without splitting it.
    pub io_best: u32,
    pub writable: bool,
    pub durability: Durability,
    pub discard: Discard,
}

/// A run of bytes that can be read and written at any offset.
///
/// All methods take `&self` and may be called from many threads at once; that is how requests
/// overlap. Two overlapping writes in flight together end in either order, so a caller that minds
/// waits for the first.
pub trait Device: Send + Sync {
    fn caps(&self) -> Caps;

    /// Size in bytes; changes only through [`Device::resize`].
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`. A range beyond the end is an error; a hole reads as zeros.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Accepted when it returns, not yet durable.
    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()>;

    /// As [`Device::write_all_at`], for who has no more use for the data: they need not be copied, and
    /// may be changed where they are.
    fn write_buffer_at(&self, data: Buffer, offset: u64) -> Result<()> {
        self.write_all_at(&data, offset)
    }

    /// Fills `buf` if that needs no waiting; else it does nothing, and [`Device::read_exact_at`] is
    /// for it. Only a device with a memory of its own can.
    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> bool {
        let _ = (buf, offset);
        false
    }

    /// Brings these ranges, and nothing beside them, to where reading them needs no waiting, many at a
    /// time; returns when they are there. What could not be brought is read, and its error told, later.
    /// Only a device with a memory of its own can.
    fn fetch(&self, ranges: &[Range<u64>]) {
        let _ = ranges;
    }

    /// Takes as much from the start of a write as needs no waiting, and gives how many bytes that
    /// were; [`Device::write_all_at`] is for the rest, and has the errors.
    fn write_at_once(&self, data: &[u8], offset: u64) -> usize {
        let _ = (data, offset);
        0
    }

    /// Every write that returned before this call is on stable storage when it returns.
    fn flush(&self) -> Result<()>;

    /// Gives the range back: it reads as [`Caps::discard`] says, or the call fails with
    /// [`Kind::Unsupported`] and nothing has changed.
    fn discard(&self, range: Range<u64>) -> Result<()>;

    /// Grows or shrinks the device; new bytes read as a hole.
    fn resize(&self, size: u64) -> Result<()>;
}

impl<D: Device + ?Sized> Device for Arc<D> {
    fn caps(&self) -> Caps {
        (**self).caps()
    }
    fn size(&self) -> u64 {
        (**self).size()
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        (**self).read_exact_at(buf, offset)
    }
    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        (**self).write_all_at(data, offset)
    }
    fn write_buffer_at(&self, data: Buffer, offset: u64) -> Result<()> {
        (**self).write_buffer_at(data, offset)
    }
    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> bool {
        (**self).read_at_once(buf, offset)
    }
    fn fetch(&self, ranges: &[Range<u64>]) {
        (**self).fetch(ranges)
    }
    fn write_at_once(&self, data: &[u8], offset: u64) -> usize {
        (**self).write_at_once(data, offset)
    }
    fn flush(&self) -> Result<()> {
        (**self).flush()
    }
    fn discard(&self, range: Range<u64>) -> Result<()> {
        (**self).discard(range)
    }
    fn resize(&self, size: u64) -> Result<()> {
        (**self).resize(size)
    }
}

/// Checks a request against a device's size and alignment, before anything is done with it.
pub fn check_range(caps: Caps, size: u64, offset: u64, len: usize) -> Result<()> {
    let alignment = u64::from(caps.alignment);
    let end = offset.checked_add(len as u64);
    if end.is_none_or(|end| end > size) {
        return Err(Error::new(
            Kind::Usage,
            format!("{len} bytes at offset {offset} reach beyond the end at {size}"),
        ));
    }
    if !offset.is_multiple_of(alignment) || !(len as u64).is_multiple_of(alignment) {
        return Err(Error::new(
            Kind::Usage,
            format!("{len} bytes at offset {offset} are not aligned to {alignment} bytes"),
        ));
    }
    Ok(())
}
