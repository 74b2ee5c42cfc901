//! What a trim might do wrong, as changes to what was recorded of a right one.

use super::history::BLOCK;
use super::jobs::{Recording, TRIMMING};
use super::log::{Kind, Record, Which};

/// Each with a sentence that tells it.
pub fn of_trims(recording: &Recording) -> Vec<(&'static str, Recording)> {
    let records = recording.records();
    let copied = records.iter().filter(|r| r.kind == Kind::Copied);
    let largest = copied
        .filter(|copy| copy.offset > 0)
        .max_by_key(|copy| copy.range().end - copy.offset)
        .expect("a trim by copy-data");
    let left_out = |record: &Record| (record != largest).then(|| record.clone());

    let unflushed = |record: &Record| (!is_flush(record, Which::Lean)).then(|| record.clone());

    let too_long = |record: &Record| {
        let mut record = record.clone();
        if record.kind == Kind::Punched {
            let range = record.range();
            let len = range.end - range.start + BLOCK as u64;
            record.data = len.to_le_bytes().to_vec();
        }
        Some(record)
    };

    let is = |record: &Record, text: &str| {
        record.kind == Kind::Seen && record.data.starts_with(text.as_bytes())
    };
    let mut deleting = false;
    let too_early = |record: &Record| {
        deleting = (deleting || is(record, "deleting")) && !is(record, TRIMMING);
        (!deleting || !is_flush(record, Which::Image)).then(|| record.clone())
    };

    vec![
        (
            "something in use was not copied",
            recording.changed(left_out),
        ),
        (
            "the copy was not flushed before it took the name",
            recording.changed(unflushed),
        ),
        (
            "every hole was a block too long",
            recording.changed(too_long),
        ),
        (
            "holes were made before the deletion was flushed",
            recording.changed(too_early),
        ),
    ]
}

fn is_flush(record: &Record, of: Which) -> bool {
    record.which == of && [Kind::Sync, Kind::Synced].contains(&record.kind)
}
