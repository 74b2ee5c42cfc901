//! The data segment: where the volume lies in the image and how it is encrypted (specification
//! section 3.3).

use crate::xts::{SectorSize, Tweak};

use super::fault::{Fault, shown};
use super::json::Object;

/// The one encryption that this program serves for volumes and keyslot areas.
pub(super) const ENCRYPTION: &str = "aes-xts-plain64";

/// A segment of type `crypt`. Its bounds have been checked against the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    id: usize,
    offset: u64,
    size: u64,
    dynamic: bool,
    iv_tweak: Tweak,
    encryption: String,
    sector_size: SectorSize,
}

impl Segment {
    /// Where the volume begins in the image, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the volume, in whole sectors.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it reaches to the end of the image, wherever that is.
    pub fn is_dynamic(&self) -> bool {
        self.dynamic
    }

    /// The tweak of the first sector.
    pub fn iv_tweak(&self) -> Tweak {
        self.iv_tweak
    }

    /// Cipher, mode and tweak in dm-crypt's notation.
    pub fn encryption(&self) -> &str {
        &self.encryption
    }

    pub fn sector_size(&self) -> SectorSize {
        self.sector_size
    }

    pub(super) fn id(&self) -> usize {
        self.id
    }

    /// Judges one member of `segments`. The outer error is a breach of the specification, the
    /// inner one something that this program cannot serve.
    pub(super) fn parse(
        id: usize,
        json: &Object,
        device_size: u64,
    ) -> Result<Result<Segment, String>, Fault> {
        let kind = json.string("type")?;
        let offset = json.decimal("offset")?;
        let flags = json.optional_strings("flags")?;
        if !offset.is_multiple_of(512) {
            return Err(json.fault(format!("offset {offset} is not a multiple of 512")));
        }
        let fixed = match json.string("size")? {
            "dynamic" => None,
            _ => Some(json.decimal("size")?),
        };
        if fixed.is_some_and(|size| size == 0 || size % 512 != 0) {
            return Err(json.fault("size is not a multiple of 512 above zero"));
        }
        if kind != "crypt" {
            return Ok(Err(format!(
                "segment {id} is of the unknown type {}",
                shown(kind)
            )));
        }

        let bytes = json.small("sector_size")?;
        let iv_tweak = Tweak(json.decimal("iv_tweak")?);
        let encryption = json.string("encryption")?;
        let sector_size = SectorSize::new(u64::from(bytes))
            .ok_or_else(|| json.fault(format!("sector size {bytes} is not 512 to 4096")))?;
        if json.optional("integrity").is_some() {
            let kind = json.object("integrity")?.string("type")?;
            return Ok(Err(format!(
                "segment {id} has integrity {}, which this program cannot serve",
                shown(kind)
            )));
        }
        if let Some(flag) = flags.first() {
            return Ok(Err(format!("segment {id} has the flag {}", shown(flag))));
        }
        if encryption != ENCRYPTION {
            return Ok(Err(format!(
                "segment {id} is encrypted with {}, not {ENCRYPTION}",
                shown(encryption)
            )));
        }
        if offset == 0 {
            return Ok(Err(format!(
                "segment {id} begins at offset 0: its header is a detached one"
            )));
        }
        let size = size_within(json, offset, fixed, sector_size, device_size)?;
        Ok(Ok(Segment {
            id,
            offset,
            size,
            dynamic: fixed.is_none(),
            iv_tweak,
            encryption: encryption.to_string(),
            sector_size,
        }))
    }
}

/// Bytes of the volume, if they lie within the image.
fn size_within(
    json: &Object,
    offset: u64,
    fixed: Option<u64>,
    sector_size: SectorSize,
    device_size: u64,
) -> Result<u64, Fault> {
    let sector = sector_size.bytes() as u64;
    let room = device_size.saturating_sub(offset);
    let size = fixed.unwrap_or(room);
    if fixed.is_some() && !size.is_multiple_of(sector) {
        return Err(json.fault(format!(
            "{size} bytes are no whole number of sectors of {sector} bytes"
        )));
    }
    if room == 0 || size > room {
        return Err(Fault::CutOff(format!(
            "its volume{} begins at {offset}, the image ends at {device_size}",
            fixed.map_or(String::new(), |size| format!(" of {size} bytes"))
        )));
    }
    if !size.is_multiple_of(sector) {
        return Err(Fault::CutOff(format!(
            "the {room} bytes of its volume end within a sector of {sector} bytes"
        )));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const DEVICE: u64 = 64 << 20;

    fn good() -> Value {
        json!({"type": "crypt", "offset": "16777216", "size": "dynamic", "iv_tweak": "0",
               "encryption": "aes-xts-plain64", "sector_size": 4096})
    }

    fn judge(key: &str, value: Value, device_size: u64) -> Result<Segment, String> {
        let mut json = good();
        json[key] = value;
        let object = Object::new("segment 0", &json).expect("object");
        Segment::parse(0, &object, device_size)
            .map_err(|fault| format!("corrupt: {fault}"))?
            .map_err(|what| format!("unsupported: {what}"))
    }

    #[test]
    fn a_dynamic_segment_reaches_to_the_end() {
        let segment = judge("size", json!("dynamic"), DEVICE).expect("good");
        assert_eq!((segment.offset(), segment.size()), (16 << 20, 48 << 20));
        assert_eq!(segment.sector_size().bytes(), 4096);
        assert!(segment.is_dynamic());
    }

    #[test]
    fn a_fixed_segment_keeps_its_size() {
        let segment = judge("size", json!("1048576"), DEVICE).expect("good");
        assert_eq!((segment.size(), segment.is_dynamic()), (1 << 20, false));
    }

    #[test]
    fn what_is_wrong_is_told_apart_from_what_is_unknown() {
        for (key, value, verdict) in [
            (
                "type",
                json!("linear"),
                "unsupported: segment 0 is of the unknown type `linear`",
            ),
            (
                "offset",
                json!("0"),
                "unsupported: segment 0 begins at offset 0",
            ),
            (
                "flags",
                json!(["in-reencryption"]),
                "unsupported: segment 0 has the flag",
            ),
            (
                "encryption",
                json!("serpent-xts-plain64"),
                "unsupported: segment 0 is encrypted with",
            ),
            (
                "integrity",
                json!({"type": "hmac(sha256)"}),
                "unsupported: segment 0 has integrity",
            ),
            (
                "integrity",
                json!(1),
                "corrupt: segment 0: `integrity` is not an object",
            ),
            (
                "flags",
                json!("x"),
                "corrupt: segment 0: `flags` is not an array",
            ),
            (
                "offset",
                json!(16777216),
                "corrupt: segment 0: `offset` is not a string",
            ),
            (
                "offset",
                json!("16777217"),
                "corrupt: segment 0: offset 16777217 is not a multiple",
            ),
            ("offset", json!("67108864"), "corrupt: the image is cut off"),
            ("size", json!("0"), "corrupt: segment 0: size"),
            ("size", json!("513"), "corrupt: segment 0: size"),
            (
                "size",
                json!("512"),
                "corrupt: segment 0: 512 bytes are no whole number",
            ),
            (
                "size",
                json!("18446744073709547520"),
                "corrupt: the image is cut off",
            ),
            ("sector_size", json!(0), "corrupt: segment 0: sector size 0"),
            (
                "sector_size",
                json!(8192),
                "corrupt: segment 0: sector size 8192",
            ),
            (
                "sector_size",
                json!("512"),
                "corrupt: segment 0: `sector_size` is not a whole",
            ),
            (
                "iv_tweak",
                json!(0),
                "corrupt: segment 0: `iv_tweak` is not a string",
            ),
        ] {
            let found = judge(key, value, DEVICE).unwrap_err();
            assert!(found.starts_with(verdict), "{verdict}: {found}");
        }
        assert!(judge("size", json!("dynamic"), DEVICE + 512).is_err());
        assert!(judge("size", json!("dynamic"), 1 << 20).is_err());
    }
}
