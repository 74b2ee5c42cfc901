//! The JSON area of a header copy, read strictly (specification section 3).
//!
//! One object from the first byte, then zeros to the end of the area, at least one. Doubled keys
//! are refused, because two readers could take different ones. Numbers of 64 bits are decimal
//! strings; small ones are JSON numbers below 2^32.

use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::fault::{Fault, corrupt, shown};

/// Objects and arrays inside each other; json-c, which cryptsetup uses, has the same bound.
const DEPTH_MAX: u8 = 32;

/// Reads the one object of a JSON area.
pub(super) fn parse(area: &[u8]) -> Result<Value, Fault> {
    let end = area
        .iter()
        .position(|&byte| byte == 0)
        .ok_or_else(|| corrupt("its JSON is not ended by a zero byte"))?;
    let (text, rest) = area.split_at(end);
    if rest.iter().any(|&byte| byte != 0) {
        return Err(corrupt("its JSON is followed by bytes that are not zero"));
    }
    if !text.starts_with(b"{") || !text.ends_with(b"}") {
        return Err(corrupt("its JSON is not exactly one object"));
    }
    let mut reader = serde_json::Deserializer::from_slice(text);
    Strict { depth: 0 }
        .deserialize(&mut reader)
        .and_then(|value| reader.end().map(|()| value))
        .map_err(|error| corrupt(format!("its JSON cannot be read: {error}")))
}

/// Builds a [`Value`], minding depth and doubled keys.
#[derive(Clone, Copy)]
struct Strict {
    depth: u8,
}

impl Strict {
    fn deeper<E: serde::de::Error>(self) -> Result<Strict, E> {
        match self.depth < DEPTH_MAX {
            true => Ok(Strict {
                depth: self.depth + 1,
            }),
            false => Err(E::custom(format!("nested deeper than {DEPTH_MAX}"))),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut values = Vec::new();
        while let Some(value) = items.next_element_seed(inner)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(inner)?;
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("{} is there twice", shown(&key))));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// An object of the metadata, with its place for messages: `keyslot 3: area`.
#[derive(Clone)]
pub(super) struct Object<'a> {
    place: String,
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    pub(super) fn new(place: impl Into<String>, value: &'a Value) -> Result<Self, Fault> {
        let place = place.into();
        match value.as_object() {
            Some(map) => Ok(Object { place, map }),
            None => Err(corrupt(format!("{place} is not an object"))),
        }
    }

    pub(super) fn fault(&self, what: impl fmt::Display) -> Fault {
        corrupt(format!("{}: {what}", self.place))
    }

    pub(super) fn optional(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    fn field(&self, key: &str) -> Result<&'a Value, Fault> {
        self.optional(key)
            .ok_or_else(|| self.fault(format!("`{key}` is missing")))
    }

    pub(super) fn object(&self, key: &str) -> Result<Object<'a>, Fault> {
        Object::new(format!("{}: `{key}`", self.place), self.field(key)?)
    }

    pub(super) fn string(&self, key: &str) -> Result<&'a str, Fault> {
        self.field(key)?
            .as_str()
            .ok_or_else(|| self.fault(format!("`{key}` is not a string")))
    }

    /// A JSON number below 2^32.
    pub(super) fn small(&self, key: &str) -> Result<u32, Fault> {
        self.field(key)?
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .ok_or_else(|| self.fault(format!("`{key}` is not a whole number below 2^32")))
    }

    /// A 64-bit number, which stands as a decimal string.
    pub(super) fn decimal(&self, key: &str) -> Result<u64, Fault> {
        decimal(self.string(key)?)
            .ok_or_else(|| self.fault(format!("`{key}` is not a decimal string below 2^64")))
    }

    pub(super) fn strings(&self, key: &str) -> Result<Vec<&'a str>, Fault> {
        let wrong = || self.fault(format!("`{key}` is not an array of strings"));
        let items = self.field(key)?.as_array().ok_or_else(wrong)?;
        let strings = items.iter().map(Value::as_str);
        strings.collect::<Option<_>>().ok_or_else(wrong)
    }

    /// As [`Object::strings`], but the field may be absent.
    pub(super) fn optional_strings(&self, key: &str) -> Result<Vec<&'a str>, Fault> {
        match self.optional(key) {
            Some(_) => self.strings(key),
            None => Ok(Vec::new()),
        }
    }

    /// The members of a section whose keys are numbers below `bound`, in the order of the numbers.
    /// `one` is what a member is called.
    pub(super) fn numbered(
        &self,
        one: &str,
        bound: usize,
    ) -> Result<Vec<(usize, Object<'a>)>, Fault> {
        let mut members = Vec::new();
        for (key, value) in self.map {
            let id = id(key, bound)
                .ok_or_else(|| self.fault(format!("{} is no number below {bound}", shown(key))))?;
            members.push((id, Object::new(format!("{one} {id}"), value)?));
        }
        members.sort_by_key(|(id, _)| *id);
        Ok(members)
    }

    /// An array of references to members of another section, each of them in `known`.
    pub(super) fn references(&self, key: &str, known: &[usize]) -> Result<Vec<usize>, Fault> {
        let names = self.strings(key)?;
        let ids = names.into_iter().map(|name| {
            id(name, usize::MAX)
                .filter(|id| known.contains(id))
                .ok_or_else(|| {
                    self.fault(format!("`{key}` names {}, which is missing", shown(name)))
                })
        });
        ids.collect()
    }

    pub(super) fn value(&self) -> Value {
        Value::Object(self.map.clone())
    }
}

/// A number without sign, blanks or leading zeros, so that it has one spelling only.
fn decimal(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let canonical = digits && (text == "0" || !text.starts_with('0'));
    canonical.then(|| text.parse().ok()).flatten()
}

fn id(text: &str, bound: usize) -> Option<usize> {
    let id = usize::try_from(decimal(text)?).ok()?;
    (id < bound).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(text: &str) -> Vec<u8> {
        let mut area = text.as_bytes().to_vec();
        area.resize(text.len() + 8, 0);
        area
    }

    #[test]
    fn one_object_and_zeros_are_read() {
        let value = parse(&area(r#"{"a":[1,-2,true,null,"x",0.5],"b":{}}"#)).expect("reads");
        assert_eq!(value["a"][1], -2);
        assert_eq!(value["a"][4], "x");
    }

    #[test]
    fn anything_else_is_refused() {
        for (bytes, why) in [
            (b"{}".to_vec(), "not ended by a zero byte"),
            (b"{}\0\0x\0".to_vec(), "not zero"),
            (area(""), "exactly one object"),
            (area(" {}"), "exactly one object"),
            (area("{} "), "exactly one object"),
            (area("[]"), "exactly one object"),
            (area("{}{}"), "trailing"),
            (area(r#"{"a":1,"a":2}"#), "`a` is there twice"),
            (area(r#"{"a":"\u0007","b":1,}"#), "trailing comma"),
            (area("{\"a\":\"\x07\"}"), "control character"),
            (b"{\"\xff\":1}\0".to_vec(), "unicode"),
            (
                area(&format!("{{\"a\":{}{}}}", "[".repeat(32), "]".repeat(32))),
                "deeper than 32",
            ),
        ] {
            let fault = parse(&bytes).unwrap_err().to_string();
            assert!(fault.contains(why), "{why}: {fault}");
        }
        let just = format!("{{\"a\":{}{}}}", "[".repeat(31), "]".repeat(31));
        assert!(parse(&area(&just)).is_ok());
    }

    #[test]
    fn a_decimal_has_one_spelling() {
        assert_eq!(decimal("18446744073709551615"), Some(u64::MAX));
        assert_eq!(decimal("0"), Some(0));
        for text in [
            "",
            "-1",
            "+1",
            " 1",
            "1 ",
            "01",
            "0x1",
            "1e3",
            "18446744073709551616",
            "١",
        ] {
            assert_eq!(decimal(text), None, "{text}");
        }
    }

    #[test]
    fn fields_are_refused_with_their_place() {
        let value = serde_json::json!({
            "n": 4294967296_u64, "f": 1.5, "s": "x", "list": ["0", 1], "refs": ["7"], "00": {}
        });
        let object = Object::new("keyslot 3", &value).expect("object");
        let said = |fault: Fault| fault.to_string();
        assert_eq!(
            said(object.string("gone").unwrap_err()),
            "keyslot 3: `gone` is missing"
        );
        assert_eq!(
            said(object.string("n").unwrap_err()),
            "keyslot 3: `n` is not a string"
        );
        assert!(object.small("n").is_err() && object.small("f").is_err());
        assert!(object.decimal("s").is_err() && object.strings("list").is_err());
        assert_eq!(
            said(object.references("refs", &[0, 1]).unwrap_err()),
            "keyslot 3: `refs` names `7`, which is missing"
        );
        assert!(object.numbered("x", 32).is_err());
    }
}
