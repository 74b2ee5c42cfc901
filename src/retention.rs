//! Which snapshots stay and which go. Pure: times, pins and a time zone in, a verdict for each out.
//!
//! The rules are those of borg and restic. Each `--keep-*` rule goes by itself from the newest
//! snapshot to the oldest and keeps the newest of every period, until it has kept its number;
//! a period without a snapshot does not count. A snapshot stays if any rule keeps it, if it is
//! pinned, or if it is the newest of all: the last one is never deleted.
//!
//! Periods are those of the local calendar, since "one a day" means the days of the person who
//! reads it; weeks begin on Monday. "Within" is counted back from the newest snapshot and not
//! from now, so that a machine that was off for a month keeps what it had.

use std::fmt;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

/// A span of the calendar of which the newest snapshot is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Period {
    Hour,
    Day,
    /// Monday to Sunday (ISO 8601).
    Week,
    Month,
    Year,
}

impl Period {
    pub const ALL: [Period; 5] = [
        Period::Hour,
        Period::Day,
        Period::Week,
        Period::Month,
        Period::Year,
    ];

    /// What tells this period from the others: equal for two times in the same one.
    fn of(self, time: &Zoned) -> (i16, i16, i8) {
        let date = time.date();
        let week = date.iso_week_date();
        match self {
            Period::Hour => (time.year(), time.day_of_year(), time.hour()),
            Period::Day => (time.year(), time.day_of_year(), 0),
            Period::Week => (week.year(), 0, week.week()),
            Period::Month => (time.year(), 0, time.month()),
            Period::Year => (time.year(), 0, 0),
        }
    }
}

/// What is to be kept. The default keeps nothing but pinned snapshots and the newest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// So many of the newest.
    pub last: u32,
    /// So many of each of [`Period::ALL`], in that order.
    pub periods: [u32; 5],
    /// All that are at most so much older than the newest.
    pub within: Option<Duration>,
}

impl Policy {
    /// Whether no rule is set. `within` of zero is a rule: it keeps the newest.
    pub fn is_empty(&self) -> bool {
        self.last == 0 && self.periods == [0; 5] && self.within.is_none()
    }
}

/// A complete snapshot, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub time: Timestamp,
    pub pinned: bool,
    /// Named one by one by whoever asks, `--keep-id`.
    pub named: bool,
}

/// Why a snapshot stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    Pinned,
    Named,
    /// The newest of all: never deleted.
    Newest,
    /// The n-th newest, counted from 1.
    Last(u32),
    /// The newest of its period, the n-th that has any.
    Period(Period, u32),
    Within(Duration),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, number) = match self {
            Reason::Pinned => return f.write_str("pinned"),
            Reason::Named => return f.write_str("named by --keep-id"),
            Reason::Newest => return f.write_str("the newest"),
            Reason::Within(span) => {
                return write!(f, "within {}", crate::units::show_duration(*span));
            }
            Reason::Last(number) => ("last", number),
            Reason::Period(Period::Hour, number) => ("hourly", number),
            Reason::Period(Period::Day, number) => ("daily", number),
            Reason::Period(Period::Week, number) => ("weekly", number),
            Reason::Period(Period::Month, number) => ("monthly", number),
            Reason::Period(Period::Year, number) => ("yearly", number),
        };
        write!(f, "{name} {number}")
    }
}

/// Why each candidate stays, in the order given; one with no reason goes.
pub fn judge(candidates: &[Candidate], policy: &Policy, zone: &TimeZone) -> Vec<Vec<Reason>> {
    let mut verdicts: Vec<Vec<Reason>> = vec![Vec::new(); candidates.len()];
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    // Of two of the same second the later in the list is the newer.
    order.sort_by_key(|at| std::cmp::Reverse((candidates[*at].time, *at)));
    let Some(newest) = order.first().map(|at| candidates[*at].time) else {
        return verdicts;
    };

    for (at, candidate) in candidates.iter().enumerate() {
        if candidate.pinned {
            verdicts[at].push(Reason::Pinned);
        }
        if candidate.named {
            verdicts[at].push(Reason::Named);
        }
    }
    for (number, at) in (1..=policy.last).zip(&order) {
        verdicts[*at].push(Reason::Last(number));
    }
    for (period, most) in Period::ALL.into_iter().zip(policy.periods) {
        let (mut kept, mut last) = (0, None);
        for at in &order {
            let this = period.of(&candidates[*at].time.to_zoned(zone.clone()));
            if kept < most && last != Some(this) {
                kept += 1;
                verdicts[*at].push(Reason::Period(period, kept));
                last = Some(this);
            }
        }
    }
    if let Some(span) = policy.within {
        for at in &order {
            let age = newest.duration_since(candidates[*at].time);
            if age.unsigned_abs() <= span {
                verdicts[*at].push(Reason::Within(span));
            }
        }
    }
    if verdicts[order[0]].is_empty() {
        verdicts[order[0]].push(Reason::Newest);
    }
    verdicts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn zone(name: &str) -> TimeZone {
        TimeZone::posix(name).expect("a zone")
    }

    /// Which of the times stay, one letter each: `+` or `-`.
    fn kept(times: &[&str], policy: &Policy, zone: &TimeZone) -> String {
        let candidates: Vec<Candidate> = times.iter().map(|text| candidate(text)).collect();
        let verdicts = judge(&candidates, policy, zone);
        let letter = |reasons: &Vec<Reason>| if reasons.is_empty() { '-' } else { '+' };
        verdicts.iter().map(letter).collect()
    }

    fn candidate(text: &str) -> Candidate {
        Candidate {
            time: text.parse().expect("a time"),
            pinned: false,
            named: false,
        }
    }

    fn policy(last: u32, periods: [u32; 5]) -> Policy {
        Policy {
            last,
            periods,
            within: None,
        }
    }

    /// A year that ends on a Thursday, and what each rule makes of it.
    const TIMES: [&str; 12] = [
        "2024-12-31T10:00:00Z",
        "2025-06-30T10:00:00Z",
        "2025-12-28T10:00:00Z", // Sunday
        "2025-12-29T10:00:00Z", // Monday of the first ISO week of 2026
        "2025-12-31T09:00:00Z",
        "2025-12-31T22:10:00Z",
        "2025-12-31T22:50:00Z",
        "2026-01-01T00:10:00Z",
        "2026-01-01T10:00:00Z",
        "2026-01-03T10:00:00Z", // Saturday
        "2026-01-03T10:59:59Z",
        "2026-01-03T11:00:00Z",
    ];

    #[test]
    fn the_table_of_dates() {
        for (last, periods, expected) in [
            (1, [0; 5], "-----------+"),
            (3, [0; 5], "---------+++"),
            (100, [0; 5], "++++++++++++"),
            (0, [1, 0, 0, 0, 0], "-----------+"),
            (0, [4, 0, 0, 0, 0], "-------++-++"),
            (0, [5, 0, 0, 0, 0], "------+++-++"),
            (0, [0, 1, 0, 0, 0], "-----------+"),
            // The 2nd had none and does not count.
            (0, [0, 3, 0, 0, 0], "------+-+--+"),
            (0, [0, 4, 0, 0, 0], "---+--+-+--+"),
            (0, [0, 0, 2, 0, 0], "--+--------+"),
            (0, [0, 0, 3, 0, 0], "-++--------+"),
            (0, [0, 0, 0, 2, 0], "------+----+"),
            (0, [0, 0, 0, 4, 0], "++----+----+"),
            (0, [0, 0, 0, 0, 2], "------+----+"),
            (0, [0, 0, 0, 0, 9], "+-----+----+"),
            (2, [0, 2, 0, 0, 2], "------+-+-++"),
        ] {
            let found = kept(&TIMES, &policy(last, periods), &TimeZone::UTC);
            assert_eq!(found, expected, "last {last}, {periods:?}");
        }
    }

    #[test]
    fn days_are_those_of_the_local_calendar() {
        let daily = policy(0, [0, 9, 0, 0, 0]);
        let times = ["2026-07-01T21:30:00Z", "2026-07-01T22:30:00Z"];
        assert_eq!(kept(&times, &daily, &TimeZone::UTC), "-+");
        assert_eq!(
            kept(&times, &daily, &zone("CET-1CEST,M3.5.0,M10.5.0")),
            "++"
        );
        // Newest in the west, though they are two days in UTC.
        let times = ["2026-07-01T23:30:00Z", "2026-07-02T01:30:00Z"];
        assert_eq!(kept(&times, &daily, &zone("EST5")), "-+");
    }

    #[test]
    fn the_hour_that_summer_time_repeats_is_one_hour() {
        let berlin = zone("CET-1CEST,M3.5.0,M10.5.0/3");
        let times = ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"];
        assert_eq!(kept(&times, &policy(0, [9, 0, 0, 0, 0]), &berlin), "-+");
    }

    #[test]
    fn within_counts_back_from_the_newest() {
        let within = |hours: u64| Policy {
            within: Some(Duration::from_secs(hours * 3600)),
            ..Policy::default()
        };
        assert_eq!(kept(&TIMES, &within(0), &TimeZone::UTC), "-----------+");
        assert_eq!(kept(&TIMES, &within(1), &TimeZone::UTC), "---------+++");
        assert_eq!(kept(&TIMES, &within(49), &TimeZone::UTC), "--------++++");
    }

    #[test]
    fn the_newest_the_pinned_and_the_named_stay_whatever_the_policy() {
        assert_eq!(kept(&TIMES[..3], &Policy::default(), &TimeZone::UTC), "--+");
        assert!(Policy::default().is_empty() && !policy(1, [0; 5]).is_empty());
        let mut candidates: Vec<_> = TIMES[..4].iter().map(|text| candidate(text)).collect();
        candidates[0].pinned = true;
        candidates[1].named = true;
        let verdicts = judge(&candidates, &policy(1, [0; 5]), &TimeZone::UTC);
        let expected = [
            vec![Reason::Pinned],
            vec![Reason::Named],
            vec![],
            vec![Reason::Last(1)],
        ];
        assert_eq!(verdicts, expected);
        assert!(judge(&[], &Policy::default(), &TimeZone::UTC).is_empty());
    }

    #[test]
    fn reasons_read_as_words() {
        let candidates = [candidate(TIMES[0])];
        let all = Policy {
            within: Some(Duration::from_secs(7200)),
            ..policy(1, [1; 5])
        };
        let verdicts = judge(&candidates, &all, &TimeZone::UTC);
        let words: Vec<String> = verdicts[0].iter().map(Reason::to_string).collect();
        assert_eq!(
            words.join(", "),
            "last 1, hourly 1, daily 1, weekly 1, monthly 1, yearly 1, within 2 h 00 min"
        );
    }

    fn any_candidates() -> impl Strategy<Value = Vec<Candidate>> {
        // Four years, crowded at the end so that periods have several.
        let time = prop_oneof![0..126_000_000_i64, 125_000_000..126_000_000_i64];
        let one =
            (time, any::<bool>(), any::<bool>(), 0..4).prop_map(|(second, a, b, rare)| Candidate {
                time: Timestamp::from_second(1_700_000_000 + second).expect("a time"),
                pinned: a && rare == 0,
                named: b && rare == 0,
            });
        proptest::collection::vec(one, 1..60)
    }

    fn any_policy() -> impl Strategy<Value = Policy> {
        (
            0..6_u32,
            any::<[u8; 5]>(),
            proptest::option::of(0..9_000_000_u64),
        )
            .prop_map(|(last, periods, within)| Policy {
                last,
                periods: periods.map(|p| u32::from(p % 7)),
                within: within.map(Duration::from_secs),
            })
    }

    proptest! {
        #[test]
        fn a_looser_policy_never_deletes_more(
            candidates in any_candidates(), strict in any_policy(), more in any_policy(),
        ) {
            let zone = zone("CET-1CEST,M3.5.0,M10.5.0");
            let mut loose = strict.clone();
            loose.last += more.last;
            for (count, more) in loose.periods.iter_mut().zip(more.periods) {
                *count += more;
            }
            loose.within = strict.within.max(more.within);
            let few = judge(&candidates, &strict, &zone);
            let many = judge(&candidates, &loose, &zone);
            for (few, many) in few.iter().zip(&many) {
                prop_assert!(few.is_empty() || !many.is_empty());
            }
        }

        #[test]
        fn the_newest_stays_and_no_rule_keeps_more_than_its_number(
            candidates in any_candidates(), policy in any_policy(),
        ) {
            let verdicts = judge(&candidates, &policy, &TimeZone::UTC);
            let newest = candidates.iter().map(|c| c.time).max();
            let stays = |(c, reasons): (&Candidate, &Vec<Reason>)| Some(c.time) == newest && !reasons.is_empty();
            prop_assert!(candidates.iter().zip(&verdicts).any(stays));
            for (period, most) in Period::ALL.into_iter().zip(policy.periods) {
                let of = |r: &&Reason| matches!(r, Reason::Period(p, _) if *p == period);
                let count = verdicts.iter().flatten().filter(of).count();
                prop_assert!(count <= most as usize);
            }
        }
    }
}
