//! The metadata of an image, validated: whoever holds a [`Header`] need not check it again.

use std::ops::Range;

use serde_json::Value;

use super::binary::{BINARY_SIZE, Binary};
use super::digest::Digest;
use super::fault::{Fault, corrupt, shown, unsupported};
use super::json::Object;
use super::keyslot::{Keyslot, check_areas};
use super::segment::Segment;

/// Members of `keyslots`, `tokens` and `segments`, as in cryptsetup.
const MEMBERS_MAX: usize = 32;
/// Members of `digests`, as in cryptsetup.
const DIGESTS_MAX: usize = 8;
/// Largest region for keyslot areas in bytes, as in cryptsetup.
pub(super) const KEYSLOTS_SIZE_MAX: u64 = 128 << 20;

/// Something of another program's, or of ours, kept in the header (specification section 3.5).
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    id: usize,
    kind: String,
    keyslots: Vec<usize>,
    json: Value,
}

impl Token {
    pub fn id(&self) -> usize {
        self.id
    }

    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Keyslots that it belongs to.
    pub fn keyslots(&self) -> &[usize] {
        &self.keyslots
    }

    /// The whole token as it stands in the header.
    pub fn json(&self) -> &Value {
        &self.json
    }
}

/// The metadata of one image. Every number in it has been bounded, every reference resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    header_size: u64,
    sequence_id: u64,
    uuid: String,
    label: String,
    subsystem: String,
    keyslots_size: u64,
    flags: Vec<String>,
    keyslots: Vec<Keyslot>,
    tokens: Vec<Token>,
    segment: Segment,
    digest: Digest,
    json: Value,
}

impl Header {
    /// Bytes of one copy of the header, binary header and JSON area.
    pub fn header_size(&self) -> u64 {
        self.header_size
    }

    /// Grows by one with every change.
    pub fn sequence_id(&self) -> u64 {
        self.sequence_id
    }

    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Empty if there is none.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Empty if there is none.
    pub fn subsystem(&self) -> &str {
        &self.subsystem
    }

    /// Bytes for keyslot areas, which follow the two copies.
    pub fn keyslots_size(&self) -> u64 {
        self.keyslots_size
    }

    /// Flags for activation, as they stand in the header.
    pub fn flags(&self) -> &[String] {
        &self.flags
    }

    /// In the order of their numbers.
    pub fn keyslots(&self) -> &[Keyslot] {
        &self.keyslots
    }

    /// In the order of their numbers.
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// The one data segment.
    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    /// The digest of the segment's key.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The whole metadata as it stands in the header, with what this program does not know.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// Judges the metadata of one copy whose checksum is right.
    pub(super) fn parse(binary: &Binary, json: Value, device_size: u64) -> Result<Header, Fault> {
        let top = Object::new("metadata", &json)?;
        let (region, flags) = parse_config(&top, binary.header_size, device_size)?;
        let keyslots = parse_keyslots(&top)?;
        check_areas(&keyslots, &region)?;
        let keyslot_ids: Vec<usize> = keyslots.iter().map(Keyslot::id).collect();
        let tokens = parse_tokens(&top, &keyslot_ids)?;

        // Before the segments: while one is re-encrypted there are several.
        check_requirements(&top)?;
        let segment = parse_segment(&top, region.end, device_size)?;
        let digest = parse_digests(&top, &keyslot_ids, &segment)?;
        Ok(Header {
            header_size: binary.header_size,
            sequence_id: binary.sequence_id,
            uuid: readable(&binary.uuid),
            label: readable(&binary.label),
            subsystem: readable(&binary.subsystem),
            keyslots_size: region.end - region.start,
            flags,
            keyslots,
            tokens,
            segment,
            digest,
            json,
        })
    }
}

/// The region for keyslot areas, and the flags.
fn parse_config(
    top: &Object,
    header_size: u64,
    device_size: u64,
) -> Result<(Range<u64>, Vec<String>), Fault> {
    let config = top.object("config")?;
    let json_size = config.decimal("json_size")?;
    let keyslots_size = config.decimal("keyslots_size")?;
    if json_size.checked_add(BINARY_SIZE as u64) != Some(header_size) {
        return Err(config.fault(format!(
            "`json_size` {json_size} does not fit the header's {header_size} bytes"
        )));
    }
    if !keyslots_size.is_multiple_of(4096) || keyslots_size > KEYSLOTS_SIZE_MAX {
        return Err(config.fault(format!(
            "`keyslots_size` {keyslots_size} is no multiple of 4096 up to {KEYSLOTS_SIZE_MAX}"
        )));
    }
    let start = 2 * header_size;
    let region = start..start + keyslots_size;
    if region.end > device_size {
        return Err(Fault::CutOff(format!(
            "its keyslots end at {}, the image at {device_size}",
            region.end
        )));
    }
    let flags = config.optional_strings("flags")?;
    Ok((region, flags.into_iter().map(String::from).collect()))
}

/// A requirement that is not known means that the image may not be read as if it were not there
/// (specification section 3.6).
fn check_requirements(top: &Object) -> Result<(), Fault> {
    let config = top.object("config")?;
    if config.optional("requirements").is_none() {
        return Ok(());
    }
    let requirements = config.object("requirements")?;
    let mandatory = requirements.optional_strings("mandatory")?;
    match mandatory.first() {
        None => Ok(()),
        Some(name) if name.contains("reencrypt") => Err(unsupported(format!(
            "the image is being re-encrypted (requirement {}); let cryptsetup finish that",
            shown(name)
        ))),
        Some(name) => Err(unsupported(format!(
            "the image has the unknown requirement {}",
            shown(name)
        ))),
    }
}

fn parse_keyslots(top: &Object) -> Result<Vec<Keyslot>, Fault> {
    let members = top.object("keyslots")?.numbered("keyslot", MEMBERS_MAX)?;
    let keyslots = members.iter().map(|(id, json)| Keyslot::parse(*id, json));
    keyslots.collect()
}

fn parse_tokens(top: &Object, keyslots: &[usize]) -> Result<Vec<Token>, Fault> {
    let members = top.object("tokens")?.numbered("token", MEMBERS_MAX)?;
    let tokens = members.iter().map(|(id, json)| {
        Ok(Token {
            id: *id,
            kind: json.string("type")?.to_string(),
            keyslots: json.references("keyslots", keyslots)?,
            json: json.value(),
        })
    });
    tokens.collect()
}

/// The one segment there may be. It begins behind the keyslot areas.
fn parse_segment(top: &Object, header_end: u64, device_size: u64) -> Result<Segment, Fault> {
    let members = top.object("segments")?.numbered("segment", MEMBERS_MAX)?;
    let (first, others) = members
        .split_first()
        .ok_or_else(|| corrupt("metadata: there is no segment"))?;
    for (id, json) in others {
        // One that cannot be served is refused below with all the others.
        drop(Segment::parse(*id, json, device_size)?);
    }
    let segment = Segment::parse(first.0, &first.1, device_size)?;
    if !others.is_empty() {
        return Err(unsupported(format!(
            "the image has {} segments, not one",
            members.len()
        )));
    }
    let segment = segment.map_err(unsupported)?;
    if segment.offset() < header_end {
        return Err(corrupt(format!(
            "segment {} begins at {}, before the keyslots end at {header_end}",
            segment.id(),
            segment.offset()
        )));
    }
    Ok(segment)
}

fn parse_digests(top: &Object, keyslots: &[usize], segment: &Segment) -> Result<Digest, Fault> {
    let members = top.object("digests")?.numbered("digest", DIGESTS_MAX)?;
    let mut found = None;
    for (id, json) in &members {
        let digest = Digest::parse(*id, json, keyslots, &[segment.id()])?;
        if digest.segments().is_empty() {
            continue;
        }
        if let Some(other) = found.replace(digest) {
            return Err(corrupt(format!(
                "segment {} has two digests, {} and {id}",
                segment.id(),
                other.id()
            )));
        }
    }
    found.ok_or_else(|| corrupt(format!("segment {} has no digest", segment.id())))
}

/// Text of a binary header fit to be shown: the server wrote it.
fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let show = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(show).collect()
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;
    use serde_json::json;

    fn parse(change: impl FnOnce(&mut Value), device_size: u64) -> Result<Header, Fault> {
        let made = sample::make(&sample::format());
        let binary = Binary::new(0x4000, 7, "uuid", [0; 64]);
        let mut json = made.header.json().clone();
        change(&mut json);
        Header::parse(&binary, json, device_size)
    }

    #[test]
    fn what_stands_in_the_json_is_what_the_accessors_tell() {
        let token = json!({"type": "x", "keyslots": ["0"], "more": [1]});
        let header = parse(
            |json| {
                json["config"]["flags"] = json!(["allow-discards"]);
                json["tokens"]["4"] = token.clone();
            },
            17 << 20,
        )
        .expect("good");
        assert_eq!((header.header_size(), header.sequence_id()), (0x4000, 7));
        assert_eq!(header.keyslots_size(), (16 << 20) - 0x8000);
        assert_eq!(header.flags(), ["allow-discards"]);
        assert_eq!(header.keyslots().len(), 1);
        assert_eq!(header.digest().keyslots(), [0]);
        assert_eq!(header.segment().size(), 1 << 20);
        assert_eq!(
            (header.tokens()[0].id(), header.tokens()[0].json()),
            (4, &token)
        );
    }

    #[test]
    fn a_short_image_is_told_apart_from_a_bad_header() {
        assert!(matches!(parse(|_| (), 1 << 20), Err(Fault::CutOff(_))));
        let bad = parse(|json| json["config"]["json_size"] = json!("1"), 1 << 20);
        assert!(matches!(bad, Err(Fault::Corrupt(_))));
    }

    #[test]
    fn a_finished_requirement_list_is_no_requirement() {
        let none = json!({"mandatory": []});
        assert!(parse(|json| json["config"]["requirements"] = none, 17 << 20).is_ok());
    }

    #[test]
    fn texts_are_fit_to_be_shown() {
        assert_eq!(readable(b"a\x1b[2J\xff"), "a\u{fffd}[2J\u{fffd}");
        assert_eq!(readable("für".as_bytes()), "für");
    }
}
