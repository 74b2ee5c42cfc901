//! Sizes and durations as people write them, and as they are shown.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// A number of bytes. Read as `truncate(1)` reads it: `5T` and `5TiB` are binary, `5TB` decimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let digits = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let wrong = || format!("`{text}` is not a size; write it like 500G, 5T or 5TB");
        let factor = match unit.trim() {
            "" | "B" => 1,
            "k" | "K" | "KiB" => KIB,
            "M" | "MiB" => MIB,
            "G" | "GiB" => GIB,
            "T" | "TiB" => TIB,
            "P" | "PiB" => TIB << 10,
            "kB" | "KB" => 1000,
            "MB" => 1000_u64.pow(2),
            "GB" => 1000_u64.pow(3),
            "TB" => 1000_u64.pow(4),
            "PB" => 1000_u64.pow(5),
            _ => return Err(wrong()),
        };
        let too_large = || format!("`{text}` is more than can be addressed");
        match number.split_once('.') {
            None => {
                let whole = u64::from_str(number).map_err(|_| wrong())?;
                whole.checked_mul(factor).map(Bytes).ok_or_else(too_large)
            }
            Some((whole, fraction)) => {
                if fraction.is_empty() || fraction.len() > 9 || fraction.contains('.') {
                    return Err(wrong());
                }
                let whole = u64::from_str(whole).map_err(|_| wrong())?;
                let part = u128::from(u64::from_str(fraction).map_err(|_| wrong())?);
                let scale = 10_u128.pow(fraction.len() as u32);
                let bytes =
                    u128::from(whole) * u128::from(factor) + part * u128::from(factor) / scale;
                u64::try_from(bytes).map(Bytes).map_err(|_| too_large())
            }
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1023.95 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let text = match unit {
            0 => format!("{} B", self.0),
            _ => format!("{value:.1} {}", UNITS[unit]),
        };
        f.pad(&text)
    }
}

/// Reads `90`, `90s`, `30m`, `2h`, `7d`, `4w`; a bare number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration; write it like 30s, 30m, 2h or 7d");
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return Err(wrong()),
    };
    let number = u64::from_str(number).map_err(|_| wrong())?;
    number
        .checked_mul(seconds)
        .map(Duration::from_secs)
        .ok_or_else(wrong)
}

/// A duration for a person: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`.
pub fn show_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_truncate_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("5T", 5 * TIB),
            ("5TiB", 5 * TIB),
            ("5TB", 5_000_000_000_000),
            ("1.5G", GIB + GIB / 2),
            (" 64 M ", 64 * MIB),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for text in [
            "",
            "T",
            "-5G",
            "5X",
            "5 5",
            "1.2.3G",
            ".5G",
            "99999999P",
            "5g b",
            "1e9",
            "0x10",
        ] {
            let error = text.parse::<Bytes>().unwrap_err();
            assert!(error.contains(text.trim()), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_shown_with_one_decimal() {
        assert_eq!(Bytes(1023).to_string(), "1023 B");
        assert_eq!(Bytes(5 * TIB).to_string(), "5.0 TiB");
        assert_eq!(Bytes(MIB - 1).to_string(), "1.0 MiB");
        assert_eq!(format!("{:>9}", Bytes(2048)), "  2.0 KiB");
    }

    #[test]
    fn durations_read_and_show() {
        assert_eq!(parse_duration("30m"), Ok(Duration::from_secs(1800)));
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert!(parse_duration("soon").is_err() && parse_duration("").is_err());
        assert_eq!(show_duration(Duration::from_secs(7500)), "2 h 05 min");
        assert_eq!(show_duration(Duration::from_secs(200)), "3 min 20 s");
    }
}
