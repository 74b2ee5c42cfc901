use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use clap::ValueEnum;
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use crate::browse::{Criteria, Pattern, Size};
use crate::cli::Ending;
use crate::cli::args::ImageArgs;
use crate::cli::entry::Form;
use crate::cli::key::KeyArgs;
use crate::cli::look::{Look, What, joined, tell_troubles};
use crate::error::{Attempt, Result};
use crate::restore::FileKind;
use crate::ui::say;
use crate::units::{Bytes, parse_duration};

/// Find files in a snapshot
///
/// Prints the path of each file for which all that is given holds. Nothing is mounted and nothing
/// is written; an ordinary user can do it.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// Where to look
    #[arg(value_name = "SNAPSHOT[:PATH]")]
    what: OsString,

    /// Named like this, with *, ? and [a-z]; with a slash in it, the whole path is; may be repeated
    #[arg(long, value_name = "PATTERN")]
    name: Vec<OsString>,

    /// Changed since: 2026-11-20, "2026-11-20 14:30", or 7d (days ago)
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    newer: Option<i64>,

    /// Last changed before that time
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    older: Option<i64>,

    /// Files of at least (+10M), at most (-10M) or exactly this size; may be repeated
    #[arg(long, value_name = "SIZE", value_parser = parse_size, allow_hyphen_values = true)]
    size: Vec<Size>,

    /// Of this type; may be repeated
    #[arg(long = "type", value_name = "TYPE", value_enum)]
    kind: Vec<KindArg>,

    /// Show type, mode, links, owner, group, size and time
    #[arg(short, long)]
    long: bool,

    /// Print an object a line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    key: KeyArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KindArg {
    #[value(name = "f")]
    File,
    #[value(name = "d")]
    Directory,
    #[value(name = "l")]
    Link,
    #[value(name = "c")]
    CharDevice,
    #[value(name = "b")]
    BlockDevice,
    #[value(name = "p")]
    Fifo,
    #[value(name = "s")]
    Socket,
}

pub fn run(args: Args) -> Result<Ending> {
    let doing = || format!("cannot search in {}", args.image.location);
    let what = What::parse(&args.what)?;
    let criteria = Criteria {
        names: args
            .name
            .iter()
            .map(|name| Pattern::new(name.as_bytes()))
            .collect(),
        newer: args.newer,
        older: args.older,
        sizes: args.size.clone(),
        kinds: args.kind.iter().map(|kind| file_kind(*kind)).collect(),
    };
    let look = Look::open(&args.image, &args.key).attempt(doing)?;
    let tree = look.tree(&what, None).attempt(doing)?;
    let form = Form::choose(args.long, args.json);
    for node in tree.walk() {
        let Some(metadata) = tree.metadata(node) else {
            continue; // among the troubles
        };
        let path = joined(&what.path, &tree.path(node));
        if criteria.matches(&path[1..], &metadata) {
            let inode = tree.inode(node);
            say!(
                "{}",
                form.line(&look.filesystem, &path, inode, Some(&metadata))
            );
        }
    }
    Ok(tell_troubles(&what.path, &tree.troubles))
}

fn file_kind(kind: KindArg) -> FileKind {
    match kind {
        KindArg::File => FileKind::Regular,
        KindArg::Directory => FileKind::Directory,
        KindArg::Link => FileKind::Symlink,
        KindArg::CharDevice => FileKind::CharDevice,
        KindArg::BlockDevice => FileKind::BlockDevice,
        KindArg::Fifo => FileKind::Fifo,
        KindArg::Socket => FileKind::Socket,
    }
}

fn parse_size(text: &str) -> Result<Size, String> {
    let bytes = |text: &str| text.parse::<Bytes>().map(|bytes| bytes.0);
    match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(least), _) => bytes(least).map(Size::AtLeast),
        (_, Some(most)) => bytes(most).map(Size::AtMost),
        _ => bytes(text).map(Size::Exactly),
    }
}

/// A time in seconds since 1970: a date or a time of this machine's clock, one with its zone, or so
/// long ago.
fn parse_when(text: &str) -> Result<i64, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time.as_second());
    }
    if let Ok(time) = text.parse::<DateTime>() {
        let zoned = time.to_zoned(TimeZone::system());
        return zoned
            .map(|zoned| zoned.timestamp().as_second())
            .map_err(|error| error.to_string());
    }
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    let wrong = || format!("`{text}` is no time; write it like 2026-11-20, or 7d for a week ago");
    let ago: Duration = match is_number {
        true => return Err(wrong()),
        false => parse_duration(text).map_err(|_| wrong())?,
    };
    let seconds = i64::try_from(ago.as_secs()).unwrap_or(i64::MAX);
    Ok(Timestamp::now().as_second().saturating_sub(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_read() {
        assert_eq!(parse_when("2026-11-20T00:00:00Z"), Ok(1_795_132_800));
        assert!(parse_when("2026-11-20").is_ok() && parse_when("2026-11-20 14:30").is_ok());
        let week = Timestamp::now().as_second() - 7 * 86_400;
        assert!((parse_when("7d").expect("a time") - week).abs() < 100);
        assert!(parse_when("12").is_err() && parse_when("yesterday").is_err());
        assert_eq!(parse_size("+1K"), Ok(Size::AtLeast(1024)));
        assert_eq!(parse_size("-1K"), Ok(Size::AtMost(1024)));
        assert_eq!(parse_size("5"), Ok(Size::Exactly(5)));
        assert!(parse_size("+").is_err());
    }
}
