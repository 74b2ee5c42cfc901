//! A snapshot's name: the UTC second it began, written so that names sort by time and any
//! filesystem takes them: `2026-11-21T02-14-05Z`.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

const FORMAT: &str = "%Y-%m-%dT%H-%M-%SZ";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(Timestamp);

impl Id {
    /// The id of a snapshot that begins at `time`; fractions of the second are dropped.
    pub fn at(time: Timestamp) -> Self {
        // OK to unwrap: every whole second of a timestamp is a timestamp.
        Id(Timestamp::from_second(time.as_second()).unwrap_or(time))
    }

    /// When the snapshot began.
    pub fn time(self) -> Timestamp {
        self.0
    }

    /// The id one second later.
    pub fn next(self) -> Self {
        Id(Timestamp::from_second(self.0.as_second() + 1).unwrap_or(self.0))
    }
}

impl FromStr for Id {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a snapshot id; ids look like 2026-11-21T02-14-05Z");
        let civil = DateTime::strptime(FORMAT, text).map_err(|_| wrong())?;
        let zoned = civil.to_zoned(TimeZone::UTC).map_err(|_| wrong())?;
        let id = Id(zoned.timestamp());
        // `strptime` is lenient about padding; an id is not.
        if id.to_string() == text {
            Ok(id)
        } else {
            Err(wrong())
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0.strftime(FORMAT).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_parse_and_sort() {
        let a: Id = "2026-11-21T02-14-05Z".parse().expect("an id");
        let b: Id = "2026-11-21T10-00-00Z".parse().expect("an id");
        assert_eq!(a.to_string(), "2026-11-21T02-14-05Z");
        assert!(a < b && a.to_string() < b.to_string());
        assert_eq!(a.next().to_string(), "2026-11-21T02-14-06Z");
    }

    #[test]
    fn other_names_are_no_ids() {
        for text in [
            "",
            "latest",
            "2026-11-21",
            "2026-13-21T02-14-05Z",
            "2026-11-21T2-14-05Z",
            "2026-11-21T02-14-05Z.inflight",
        ] {
            assert!(text.parse::<Id>().is_err(), "{text}");
        }
    }
}
