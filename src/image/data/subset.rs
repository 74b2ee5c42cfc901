//! Which part of the data is read.

use std::str::FromStr;

use crate::units::Bytes;

/// Which part of the data is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Subset {
    All,
    /// Chosen by chance, in millionths.
    Share(u32),
    /// Chosen by chance, about so many bytes.
    Bytes(u64),
    /// The same each time: all parts together are everything.
    Part {
        number: u64,
        of: u64,
    },
}

impl FromStr for Subset {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a part; write it like 5%, 10G or 1/30");
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.parse().map_err(|_| wrong())?;
            return match percent > 0.0 && percent <= 100.0 {
                true => Ok(Subset::Share((percent * 10_000.0).ceil() as u32)),
                false => Err(wrong()),
            };
        }
        if let Some((number, of)) = text.split_once('/') {
            let (number, of) = (number.parse(), of.parse());
            return match (number, of) {
                (Ok(number), Ok(of)) if (1..=of).contains(&number) => {
                    Ok(Subset::Part { number, of })
                }
                _ => Err(wrong()),
            };
        }
        match text.parse() {
            Ok(Bytes(0)) | Err(_) => Err(wrong()),
            Ok(Bytes(bytes)) => Ok(Subset::Bytes(bytes)),
        }
    }
}

impl Subset {
    /// Whether the window with this number belongs to it. `seed` is chance.
    pub(super) fn has(self, window: u64, seed: u64, total: u64) -> bool {
        let share = match self {
            Subset::All => return true,
            Subset::Part { number, of } => return window % of == number - 1,
            Subset::Share(millionths) => u64::from(millionths),
            Subset::Bytes(bytes) => {
                let share = u128::from(bytes) * 1_000_000 / u128::from(total.max(1));
                u64::try_from(share).unwrap_or(u64::MAX)
            }
        };
        mixed(window ^ seed) % 1_000_000 < share
    }
}

/// Spreads neighbours over all numbers (the finalizer of SplitMix64).
fn mixed(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ value >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ value >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::MIB;

    #[test]
    fn parts_together_are_everything_and_chance_takes_its_share() {
        for of in [1, 2, 7] {
            for window in 0..100 {
                let parts = (1..=of).filter(|number| {
                    Subset::Part {
                        number: *number,
                        of,
                    }
                    .has(window, 5, 0)
                });
                assert_eq!(parts.count(), 1);
            }
        }
        let tenth = "10%".parse::<Subset>().expect("a part");
        let count = (0..10_000).filter(|w| tenth.has(*w, 99, 0)).count();
        assert!((800..1200).contains(&count), "{count}");
        let bytes = Subset::Bytes(MIB).has(3, 4, MIB);
        assert!(bytes, "more than there is is all");
    }

    #[test]
    fn what_is_no_part_is_refused() {
        for wrong in [
            "", "0%", "101%", "x%", "0/3", "4/3", "1/0", "/", "0", "-5%", "soon", "1/x",
        ] {
            assert!(wrong.parse::<Subset>().is_err(), "{wrong}");
        }
        assert_eq!("5%".parse(), Ok(Subset::Share(50_000)));
        assert_eq!("10G".parse(), Ok(Subset::Bytes(10 << 30)));
        assert_eq!("1/30".parse(), Ok(Subset::Part { number: 1, of: 30 }));
    }
}
