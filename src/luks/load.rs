//! Reading the header: two copies, of which the newer good one counts.
//!
//! ```text
//! primary    secondary           verdict
//! good       good                the one with the higher sequence id; the primary if equal
//! good       bad                 primary, with a warning
//! bad        good                secondary, with a warning
//! bad        bad                 refused, with what is wrong with each
//! ```
//! A copy is good if its checksum is right and its metadata keep to the specification. A good copy
//! that needs what this program does not have, or tells of more than the image holds, is refused,
//! not passed over for an older one. The size of the primary tells where the secondary is; without it, all places are tried.

use tracing::debug;

use crate::error::{Error, Kind, Result};
use crate::units::KIB;

use super::binary::{BINARY_SIZE, Binary, HEADER_SIZES, HeaderCopy};
use super::fault::{Fault, corrupt};
use super::header::Header;
use super::json;

/// Read in one go: both copies, in the size that cryptsetup makes by default.
const FIRST_READ: u64 = 32 * KIB;

/// Bytes of the image at an offset, all of them or an error.
pub(super) type Read<'a> = dyn FnMut(u64, &mut [u8]) -> Result<()> + 'a;

/// A header, where it comes from, and what was odd.
#[derive(Debug)]
pub struct Loaded {
    pub header: Header,
    pub copy: HeaderCopy,
    /// Whole sentences without a full stop, for the user.
    pub warnings: Vec<String>,
}

/// A copy that is good, and what follows from its metadata.
struct Good {
    binary: Binary,
    header: std::result::Result<Header, Fault>,
}

type Verdict = std::result::Result<Good, Fault>;

/// Reads the header of an image of `device_size` bytes. `read` fills a buffer from an offset and
/// is never asked beyond that size; its errors come back as they are. A sound image with a header
/// of default size takes one read.
pub fn load(
    read: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    device_size: u64,
) -> Result<Loaded> {
    let mut image = Image {
        read,
        size: device_size,
        head: Vec::new(),
    };
    image.keep_head(FIRST_READ)?;
    let primary = judge(&mut image, 0, HeaderCopy::Primary)?;
    if matches!(primary, Err(Fault::Version(1))) {
        return Err(Fault::Version(1).into());
    }
    let secondary = match &primary {
        Ok(good) => judge(&mut image, good.binary.header_size, HeaderCopy::Secondary)?,
        Err(_) => find_secondary(&mut image)?,
    };
    choose(primary, secondary)
}

fn choose(primary: Verdict, secondary: Verdict) -> Result<Loaded> {
    let mut warnings = Vec::new();
    let (good, copy) = match (primary, secondary) {
        (Ok(primary), Ok(secondary)) => newer(primary, secondary, &mut warnings),
        (Ok(primary), Err(fault)) => {
            warnings.push(format!("the secondary LUKS2 header is damaged: {fault}"));
            (primary, HeaderCopy::Primary)
        }
        (Err(fault), Ok(secondary)) => {
            warnings.push(format!(
                "the primary LUKS2 header is damaged, the secondary one is used: {fault}"
            ));
            (secondary, HeaderCopy::Secondary)
        }
        (Err(primary), Err(secondary)) => return Err(both_bad(primary, secondary)),
    };
    debug!(
        copy = copy.name(),
        sequence_id = good.binary.sequence_id,
        "LUKS2 header chosen"
    );
    Ok(Loaded {
        header: good.header?,
        copy,
        warnings,
    })
}

fn newer(primary: Good, secondary: Good, warnings: &mut Vec<String>) -> (Good, HeaderCopy) {
    let (first, second) = (primary.binary.sequence_id, secondary.binary.sequence_id);
    if second > first {
        warnings.push(format!(
            "the primary LUKS2 header is older than the secondary one, which is used: \
             sequence ids {first} and {second}"
        ));
        return (secondary, HeaderCopy::Secondary);
    }
    if first > second {
        warnings.push(format!(
            "the secondary LUKS2 header is older than the primary one: \
             sequence ids {second} and {first}"
        ));
    } else if primary.header != secondary.header {
        warnings.push(format!(
            "the two LUKS2 headers differ, though both have the sequence id {first}; \
             the primary one is used"
        ));
    }
    (primary, HeaderCopy::Primary)
}

fn both_bad(primary: Fault, secondary: Fault) -> Error {
    match (primary, secondary) {
        (Fault::NoMagic, Fault::NoMagic) => Error::new(
            Kind::Corrupt,
            "not a LUKS2 image: there is no header at its start, nor a secondary one further on",
        ),
        (Fault::Version(version), Fault::NoMagic) => Fault::Version(version).into(),
        (primary, secondary) => {
            let secondary = match secondary {
                Fault::NoMagic => "it is not there".to_string(),
                fault => fault.to_string(),
            };
            Error::new(
                Kind::Corrupt,
                format!(
                    "both LUKS2 headers are damaged; primary: {primary}; secondary: {secondary}"
                ),
            )
        }
    }
}

/// Judges the copy at `offset`. The outer error is that of a read.
fn judge(image: &mut Image, offset: u64, copy: HeaderCopy) -> Result<Verdict> {
    let Some(start) = image.bytes(offset, BINARY_SIZE as u64)? else {
        return Ok(Err(image.cut_off(offset)));
    };
    let binary = match Binary::parse(&start, copy, offset) {
        Ok(binary) => binary,
        Err(fault) => return Ok(Err(fault)),
    };
    if copy == HeaderCopy::Primary {
        // Its size is a known one: the secondary comes along in the same read.
        image.keep_head(2 * binary.header_size)?;
    }
    let Some(whole) = image.bytes(offset, binary.header_size)? else {
        return Ok(Err(image.cut_off(offset)));
    };
    Ok(judge_whole(binary, &whole, image.size))
}

fn judge_whole(binary: Binary, whole: &[u8], device_size: u64) -> Verdict {
    binary.verify(whole)?;
    let metadata = json::parse(&whole[BINARY_SIZE..])?;
    match Header::parse(&binary, metadata, device_size) {
        Err(fault @ Fault::Corrupt(_)) => Err(fault),
        header => Ok(Good { binary, header }),
    }
}

/// Tries all places of a secondary header. The first good one counts; if there is none, the first
/// that at least looked like one.
fn find_secondary(image: &mut Image) -> Result<Verdict> {
    let mut nearest = Fault::NoMagic;
    for offset in HEADER_SIZES {
        if offset + BINARY_SIZE as u64 > image.size {
            break;
        }
        match judge(image, offset, HeaderCopy::Secondary)? {
            Ok(good) => return Ok(Ok(good)),
            Err(fault) if nearest == Fault::NoMagic => nearest = fault,
            Err(_) => {}
        }
    }
    Ok(Err(nearest))
}

/// The image as far as it has been read: its start is kept, because nearly all is there.
struct Image<'a> {
    read: &'a mut Read<'a>,
    size: u64,
    head: Vec<u8>,
}

impl Image<'_> {
    /// Makes the kept start `len` bytes long, or as long as the image is.
    fn keep_head(&mut self, len: u64) -> Result<()> {
        let kept = self.head.len();
        let len = usize::try_from(len.min(self.size)).unwrap_or(usize::MAX);
        if len > kept {
            self.head.resize(len, 0);
            (self.read)(kept as u64, &mut self.head[kept..])?;
        }
        Ok(())
    }

    /// `None` if the image ends before.
    fn bytes(&mut self, offset: u64, len: u64) -> Result<Option<Vec<u8>>> {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.size) else {
            return Ok(None);
        };
        if end <= self.head.len() as u64 {
            return Ok(Some(self.head[offset as usize..end as usize].to_vec()));
        }
        let mut bytes = vec![0; len as usize];
        (self.read)(offset, &mut bytes)?;
        Ok(Some(bytes))
    }

    fn cut_off(&self, offset: u64) -> Fault {
        match (offset, self.size) {
            (0, size) if size < BINARY_SIZE as u64 => Fault::NoMagic,
            (_, size) => corrupt(format!(
                "the copy at offset {offset} reaches beyond the end of the image at {size}"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    /// Loads from bytes, counting the reads.
    fn run(image: &[u8]) -> (Result<Loaded>, usize) {
        let mut reads = 0;
        let loaded = load(
            &mut |offset, out| {
                reads += 1;
                let at = offset as usize;
                out.copy_from_slice(&image[at..at + out.len()]);
                Ok(())
            },
            image.len() as u64,
        );
        (loaded, reads)
    }

    #[test]
    fn a_sound_image_takes_one_read() {
        let (loaded, reads) = run(&sample::image());
        let loaded = loaded.expect("sound");
        assert_eq!((loaded.copy, reads), (HeaderCopy::Primary, 1));
        assert_eq!(loaded.warnings, Vec::<String>::new());
        assert_eq!(loaded.header.label(), "sample");
    }

    #[test]
    fn the_newer_copy_counts() {
        let mut image = sample::image();
        sample::renumber(&mut image, HeaderCopy::Secondary, 9);
        let loaded = run(&image).0.expect("sound");
        assert_eq!(loaded.copy, HeaderCopy::Secondary);
        assert_eq!(loaded.header.sequence_id(), 9);
        assert!(loaded.warnings[0].contains("sequence ids 1 and 9"));

        sample::renumber(&mut image, HeaderCopy::Primary, 10);
        let loaded = run(&image).0.expect("sound");
        assert_eq!(loaded.copy, HeaderCopy::Primary);
        assert!(loaded.warnings[0].contains("sequence ids 9 and 10"));
    }

    #[test]
    fn a_newer_copy_that_cannot_be_served_is_not_passed_over() {
        let mut image = sample::image();
        sample::edit(&mut image, HeaderCopy::Secondary, |metadata| {
            metadata["config"]["requirements"] = serde_json::json!({"mandatory": ["teleport"]});
        });
        sample::renumber(&mut image, HeaderCopy::Secondary, 2);
        let error = run(&image).0.unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("`teleport`"));
    }

    #[test]
    fn a_read_that_fails_is_not_taken_for_damage() {
        let failure = || Error::new(Kind::Disconnected, "gone");
        let error = load(&mut |_, _| Err(failure()), 1 << 30).unwrap_err();
        assert_eq!(error.kind(), Kind::Disconnected);
    }

    #[test]
    fn images_too_small_for_anything_are_refused() {
        for size in [0, 1, 511, 4095, 4096, 16384, 32768] {
            let error = run(&vec![0; size]).0.unwrap_err();
            assert!(error.to_string().starts_with("not a LUKS2 image"), "{size}");
        }
    }
}
