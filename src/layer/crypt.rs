//! The volume inside an image: plaintext above, one LUKS2 `crypt` segment below.
//!
//! dm-crypt sees the same bytes, with one exception: a ciphertext sector that is all zeros is a
//! hole, was never written, and reads as zeros, where dm-crypt shows noise. A plaintext sector of
//! zeros that is written is encrypted and stored like any other. A stored sector is taken for a
//! hole with a probability of 2^-4096 or less.
//!
//! The layer keeps no state, so requests run side by side. It serves whole sectors only; what
//! needs parts of them sits above a cache.

use std::ops::Range;
use std::sync::Arc;

use crate::buffer::{Buffer, Buffers};
use crate::device::{Caps, Device, check_range};
use crate::error::{Attempt, Error, Kind, Result};
use crate::xts::{Key, NotWholeSectors, SectorSize, Tweak};

/// Ciphertext that one write holds. Longer writes go down in pieces of this many
/// bytes, a multiple of every sector size and long enough for several processors.
const PIECE: usize = 4 << 20;

/// A LUKS2 segment of type `crypt`: where the ciphertext lies and how its sectors are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Bytes before the first sector.
    pub offset: u64,
    /// Bytes; `None` for a dynamic segment, which reaches to the end of the image.
    pub size: Option<u64>,
    pub sector_size: SectorSize,
    /// `iv_tweak` in LUKS2: the number of the first sector.
    pub first_tweak: Tweak,
}

/// The decrypted view of a segment.
pub struct Crypt {
    inner: Arc<dyn Device>,
    key: Arc<Key>,
    segment: Segment,
    alignment: u32,
    buffers: Buffers,
}

impl Crypt {
    /// Refuses with [`Kind::Corrupt`] a segment that does not lie on the device, or not on its
    /// alignment.
    pub fn new(inner: Arc<dyn Device>, key: Key, segment: Segment) -> Result<Crypt> {
        Crypt::sharing(inner, Arc::new(key), segment)
    }

    /// The same segment with the same key, on a device that was opened anew.
    pub fn over(&self, inner: Arc<dyn Device>) -> Result<Crypt> {
        Crypt::sharing(inner, self.key.clone(), self.segment)
    }

    fn sharing(inner: Arc<dyn Device>, key: Arc<Key>, segment: Segment) -> Result<Crypt> {
        let sector = segment.sector_size.bytes() as u32;
        let caps = inner.caps();
        let alignment = sector.max(caps.alignment);
        let end = segment.offset.checked_add(segment.size.unwrap_or(0));
        let fits = end.is_some_and(|end| end <= inner.size());
        let aligned = segment.offset.is_multiple_of(u64::from(caps.alignment))
            && segment
                .size
                .is_none_or(|size| size.is_multiple_of(u64::from(alignment)));
        if !fits || !aligned {
            return Err(Error::new(
                Kind::Corrupt,
                format!(
                    "the segment at offset {} with size {:?} and sectors of {sector} bytes does \
                     not fit into an image of {} bytes",
                    segment.offset,
                    segment.size,
                    inner.size()
                ),
            ));
        }
        Ok(Crypt {
            inner,
            key,
            segment,
            alignment,
            buffers: Buffers::long_lived(),
        })
    }

    fn tweak(&self, offset: u64) -> Tweak {
        Tweak::at(self.segment.first_tweak, offset)
    }

    /// Decrypts what the image holds from `offset` of the volume on, but for the holes.
    fn decrypt_around_holes(&self, buf: &mut [u8], offset: u64) -> Result<(), NotWholeSectors> {
        let sector = self.segment.sector_size.bytes();
        let mut start = 0;
        while start < buf.len() {
            let stored = buf[start..]
                .chunks(sector)
                .take_while(|ciphertext| !is_zero(ciphertext))
                .count();
            let end = start + stored * sector;
            let tweak = self.tweak(offset + start as u64);
            self.key
                .decrypt(self.segment.sector_size, tweak, &mut buf[start..end])?;
            // The sector at `end`, if there is one, is a hole and stays zeros.
            start = end + sector;
        }
        Ok(())
    }
}

impl Device for Crypt {
    fn caps(&self) -> Caps {
        let inner = self.inner.caps();
        let best = inner.io_best - inner.io_best % self.alignment;
        Caps {
            alignment: self.alignment,
            io_best: best.max(self.alignment),
            ..inner
        }
    }

    fn size(&self) -> u64 {
        let rest = self.inner.size().saturating_sub(self.segment.offset);
        let size = self.segment.size.unwrap_or(rest).min(rest);
        size - size % u64::from(self.alignment)
    }

    /// On failure `buf` holds zeros, never ciphertext.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self.caps(), self.size(), offset, buf.len())?;
        let read = self
            .inner
            .read_exact_at(buf, self.segment.offset + offset)
            .and_then(|()| Ok(self.decrypt_around_holes(buf, offset)?));
        if read.is_err() {
            buf.fill(0);
        }
        read.attempt(|| format!("read {} bytes at offset {offset} of the volume", buf.len()))
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        check_range(self.caps(), self.size(), offset, data.len())?;
        let mut at = offset;
        for piece in data.chunks(PIECE) {
            let mut ciphertext = self.buffers.take(piece.len());
            self.key
                .encrypt_into(
                    self.segment.sector_size,
                    self.tweak(at),
                    piece,
                    &mut ciphertext,
                )
                .map_err(Error::from)
                .and_then(|()| {
                    self.inner
                        .write_buffer_at(ciphertext, self.segment.offset + at)
                })
                .attempt(|| format!("write {} bytes at offset {at} of the volume", piece.len()))?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Encrypts the data where they are.
    fn write_buffer_at(&self, mut data: Buffer, offset: u64) -> Result<()> {
        let len = data.len();
        check_range(self.caps(), self.size(), offset, len)?;
        let tweak = self.tweak(offset);
        self.key
            .encrypt(self.segment.sector_size, tweak, &mut data)
            .map_err(Error::from)
            .and_then(|()| {
                self.inner
                    .write_buffer_at(data, self.segment.offset + offset)
            })
            .attempt(|| format!("write {len} bytes at offset {offset} of the volume"))
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    /// Makes holes below. Part of a sector cannot become a hole, so a range that is not aligned is
    /// refused like any other request.
    fn discard(&self, range: Range<u64>) -> Result<()> {
        let len = range.end.saturating_sub(range.start);
        check_range(self.caps(), self.size(), range.start, len as usize)?;
        let start = self.segment.offset + range.start;
        self.inner.discard(start..start + len)
    }

    /// Resizes the image with the volume. A segment with a size of its own keeps it.
    fn resize(&self, size: u64) -> Result<()> {
        let wrong = |kind| Error::new(kind, format!("resize the volume to {size} bytes"));
        if self.segment.size.is_some() {
            return Err(wrong(Kind::Unsupported).hint("its segment has a fixed size"));
        }
        if !size.is_multiple_of(u64::from(self.alignment)) {
            return Err(wrong(Kind::Usage));
        }
        let image = self.segment.offset.checked_add(size);
        self.inner.resize(image.ok_or_else(|| wrong(Kind::Usage))?)
    }
}

impl From<NotWholeSectors> for Error {
    fn from(error: NotWholeSectors) -> Self {
        Error::new(Kind::Usage, error.to_string())
    }
}

/// Whether a sector is a hole. A stored one is told apart by its first bytes.
fn is_zero(sector: &[u8]) -> bool {
    let (lines, rest) = sector.as_chunks::<128>();
    let all_zero = |bytes: &[u8]| bytes.iter().fold(0, |bits, byte| bits | byte) == 0;
    lines.iter().all(|line| all_zero(line)) && all_zero(rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Discard;
    use crate::layer::conformance::{self, Step};
    use crate::layer::fault::{Faulty, Operation};
    use crate::layer::memory::Memory;

    fn key() -> Key {
        Key::new(&std::array::from_fn::<u8, 64, _>(|i| i as u8)).expect("64 bytes")
    }

    fn segment(offset: u64, size: Option<u64>, sector: u64) -> Segment {
        Segment {
            offset,
            size,
            sector_size: SectorSize::new(sector).expect("a known size"),
            first_tweak: Tweak(3),
        }
    }

    fn volume<D: Device + 'static>(below: &Arc<D>, segment: Segment) -> Crypt {
        Crypt::new(below.clone(), key(), segment).expect("fits")
    }

    /// What a volume and the memory below it may look like.
    #[derive(Debug, Clone, Copy)]
    struct Shape {
        sector: u64,
        inner_alignment: u32,
        dynamic: bool,
        discard: Discard,
    }

    fn shapes() -> impl Strategy<Value = Shape> {
        let discard = prop_oneof![Just(Discard::Zeros), Just(Discard::Refused)];
        (9..=12_u32, 0..=13_u32, any::<bool>(), discard).prop_map(
            |(sector, inner, dynamic, discard)| Shape {
                sector: 1 << sector,
                inner_alignment: 1 << inner,
                dynamic,
                discard,
            },
        )
    }

    proptest! {
        #[test]
        fn a_volume_is_a_device(shape in shapes(), steps in conformance::steps()) {
            let caps = Caps {
                alignment: shape.inner_alignment,
                discard: shape.discard,
                ..Memory::new(0).caps()
            };
            let memory = Arc::new(Memory::with_caps(20 << 13, caps));
            let size = (!shape.dynamic).then_some(11 << 13);
            let volume = volume(&memory, segment(3 << 13, size, shape.sector));
            conformance::check(&volume, &steps)?;
            prop_assert!(volume.size().is_multiple_of(u64::from(volume.caps().alignment)));
        }
    }

    #[test]
    fn holes_read_as_zeros_and_written_zeros_are_stored() {
        let memory = Arc::new(Memory::new(1 << 20));
        let volume = volume(&memory, segment(8192, None, 4096));
        let mut buf = vec![7; 3 * 4096];
        volume.read_exact_at(&mut buf, 4096).expect("in range");
        assert!(is_zero(&buf) && memory.allocated() == 0);

        volume.write_all_at(&[0; 4096], 8192).expect("in range");
        assert_eq!(memory.allocated(), 4096);
        let mut stored = [0; 4096];
        memory.read_exact_at(&mut stored, 16384).expect("in range");
        assert!(!is_zero(&stored));
        // A hole, the stored zeros, a hole: one read decrypts only the middle.
        volume.read_exact_at(&mut buf, 4096).expect("in range");
        assert!(is_zero(&buf));

        volume.discard(8192..12288).expect("supported");
        assert_eq!(memory.allocated(), 0);
    }

    #[test]
    fn a_failed_read_shows_neither_ciphertext_nor_success() {
        /// Fills the buffer, then fails: what a broken link does.
        struct Half(Memory);
        impl Device for Half {
            fn caps(&self) -> Caps {
                self.0.caps()
            }
            fn size(&self) -> u64 {
                self.0.size()
            }
            fn read_exact_at(&self, buf: &mut [u8], _: u64) -> Result<()> {
                buf.fill(0xcc);
                Err(Error::new(Kind::Disconnected, "the link broke"))
            }
            fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
                self.0.write_all_at(data, offset)
            }
            fn flush(&self) -> Result<()> {
                self.0.flush()
            }
            fn discard(&self, range: Range<u64>) -> Result<()> {
                self.0.discard(range)
            }
            fn resize(&self, size: u64) -> Result<()> {
                self.0.resize(size)
            }
        }
        let half = Arc::new(Half(Memory::new(1 << 16)));
        let volume = Crypt::new(half, key(), segment(0, None, 512)).expect("fits");
        let mut buf = [1; 1024];
        let error = volume.read_exact_at(&mut buf, 512).unwrap_err();
        assert_eq!(error.kind(), Kind::Disconnected);
        assert!(is_zero(&buf));
        let report = error.report();
        assert!(
            report.contains("1024 bytes at offset 512 of the volume"),
            "{report}"
        );
    }

    #[test]
    fn errors_from_below_keep_their_kind_in_every_call() {
        let faulty = Arc::new(Faulty::new(Arc::new(Memory::new(1 << 16))));
        let volume = volume(&faulty, segment(4096, None, 4096));
        faulty.faults().fail(None, 0, Kind::TimedOut);
        let outcomes = [
            volume.read_exact_at(&mut [0; 4096], 0),
            volume.write_all_at(&[0; 4096], 0),
            volume.flush(),
            volume.discard(0..4096),
            volume.resize(8192),
        ];
        for outcome in outcomes {
            assert_eq!(outcome.unwrap_err().kind(), Kind::TimedOut);
        }
        assert_eq!(volume.size(), (1 << 16) - 4096);
    }

    #[test]
    fn a_long_write_goes_down_in_bounded_pieces() {
        let memory = Arc::new(Memory::new(16 << 20));
        let faulty = Arc::new(Faulty::new(memory.clone()));
        let volume = volume(&faulty, segment(0, None, 4096));
        let data: Vec<u8> = (0..(5 << 21)).map(|i: u32| (i >> 7) as u8).collect();
        volume.write_all_at(&data, 4096).expect("in range");
        assert_eq!(memory.counts().writes, 3);
        let mut back = vec![0; data.len()];
        volume.read_exact_at(&mut back, 4096).expect("in range");
        assert!(back == data);

        let faults = faulty.faults();
        faults.fail(Some(Operation::Write), 1, Kind::NoSpace);
        let error = volume.write_all_at(&data, 0).unwrap_err();
        assert!(error.to_string().contains("offset 4194304"), "{error}");
    }

    #[test]
    fn a_segment_that_does_not_fit_is_refused() {
        let caps = Caps {
            alignment: 512,
            ..Memory::new(0).caps()
        };
        let memory = Arc::new(Memory::with_caps(1 << 20, caps));
        for (offset, size) in [
            ((1 << 20) + 512, None),
            (u64::MAX - 511, Some(4096)),
            (4096, Some(1 << 20)),
            (100, None),
            (4096, Some(5000)),
        ] {
            let refused = Crypt::new(memory.clone(), key(), segment(offset, size, 4096));
            assert_eq!(refused.err().map(|error| error.kind()), Some(Kind::Corrupt));
        }
        // A dynamic segment loses an incomplete last sector, and may be empty.
        let odd = volume(&memory, segment((1 << 20) - 6144, None, 4096));
        assert_eq!(odd.size(), 4096);
        assert_eq!(volume(&memory, segment(1 << 20, None, 4096)).size(), 0);
    }

    #[test]
    fn a_volume_that_shrinks_and_grows_again_is_zeros_there() {
        let memory = Arc::new(Memory::new(1 << 20));
        let volume = volume(&memory, segment(4096, None, 4096));
        let steps = [
            Step::Write {
                at: 0,
                units: usize::MAX,
                seed: 9,
            },
            Step::Resize { units: 5 },
            Step::Resize { units: 60 },
        ];
        conformance::check(&volume, &steps).expect("a device");
        assert_eq!(memory.size(), 61 * 4096);
        let error = volume.resize(u64::MAX - 4095).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
    }
}
