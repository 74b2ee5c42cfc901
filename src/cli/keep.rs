//! The options that say which snapshots to keep.

use std::time::Duration;

use clap::Args;
use jiff::tz::TimeZone;

use crate::error::Result;
use crate::retention::Policy;
use crate::snapshot::{self, Catalogue, Group, Grouping, Id};
use crate::units::parse_duration;

fn parse_count(text: &str) -> Result<u32, String> {
    let wrong = |_| format!("`{text}` is no number of snapshots");
    text.parse().map_err(wrong)
}

#[derive(Args, Clone)]
pub struct KeepArgs {
    /// Keep the N newest snapshots
    #[arg(
        long,
        value_name = "N",
        value_parser = parse_count,
        allow_negative_numbers = true,
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "Keep"
    )]
    keep_last: u32,

    /// Keep the newest snapshot of each of the last N hours that have one
    #[arg(
        long,
        value_name = "N",
        value_parser = parse_count,
        allow_negative_numbers = true,
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "Keep"
    )]
    keep_hourly: u32,

    /// The same for days, by the local calendar
    #[arg(
        long,
        value_name = "N",
        value_parser = parse_count,
        allow_negative_numbers = true,
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "Keep"
    )]
    keep_daily: u32,

    /// The same for weeks, Monday to Sunday
    #[arg(
        long,
        value_name = "N",
        value_parser = parse_count,
        allow_negative_numbers = true,
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "Keep"
    )]
    keep_weekly: u32,

    /// The same for months
    #[arg(
        long,
        value_name = "N",
        value_parser = parse_count,
        allow_negative_numbers = true,
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "Keep"
    )]
    keep_monthly: u32,

    /// The same for years
    #[arg(
        long,
        value_name = "N",
        value_parser = parse_count,
        allow_negative_numbers = true,
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "Keep"
    )]
    keep_yearly: u32,

    /// Keep all that are at most so much older than the newest, for example 7d
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, help_heading = "Keep")]
    keep_within: Option<Duration>,

    /// Keep this snapshot: an id or the beginning of one; may be repeated
    #[arg(long, value_name = "ID", help_heading = "Keep")]
    keep_id: Vec<String>,

    /// Which snapshots count together
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = GroupBy::Sources, help_heading = "Keep")]
    group_by: GroupBy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum GroupBy {
    /// Those of one host and the same sources
    Sources,
    /// All
    None,
}

impl KeepArgs {
    fn policy(&self) -> Policy {
        Policy {
            last: self.keep_last,
            periods: [
                self.keep_hourly,
                self.keep_daily,
                self.keep_weekly,
                self.keep_monthly,
                self.keep_yearly,
            ],
            within: self.keep_within,
        }
    }

    /// Whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.policy().is_empty() && self.keep_id.is_empty()
    }

    /// What becomes of every snapshot.
    pub fn judge(&self, catalogue: &Catalogue) -> Result<Vec<Group>> {
        let named: Result<Vec<Id>> = self
            .keep_id
            .iter()
            .map(|name| Ok(catalogue.find(name)?.id))
            .collect();
        let grouping = match self.group_by {
            GroupBy::Sources => Grouping::Sources,
            GroupBy::None => Grouping::None,
        };
        let zone = TimeZone::system();
        snapshot::judge(catalogue, &self.policy(), &named?, grouping, &zone)
    }
}

/// The ids of those that go, oldest first.
pub fn goes(groups: &[Group]) -> Vec<Id> {
    let snapshots = groups.iter().flat_map(|group| &group.snapshots);
    let mut ids: Vec<Id> = snapshots
        .filter(|snapshot| snapshot.reasons.is_empty())
        .map(|snapshot| snapshot.id)
        .collect();
    ids.sort();
    ids
}
