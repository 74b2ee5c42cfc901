//! What a restore did, as it is told at the end.

use std::path::PathBuf;

use super::Args;
use crate::cli::Ending;
use crate::error::{Error, Kind};
use crate::restore::{Listed, Outcome};
use crate::ui::{say, tell};
use crate::units::Bytes;

/// What all copies together did.
#[derive(Default)]
pub(super) struct Sum {
    pub total: Outcome,
    /// Whether anything may have been written.
    pub has_begun: bool,
    existing: Vec<String>,
    existing_count: u64,
    pub errors: u64,
    /// Files that `--verify` found to differ.
    pub different: u64,
    /// In a dry run.
    pub unreadable: u64,
    /// Patterns and depths that nothing has; each was told.
    pub missed: u64,
}

impl Sum {
    pub fn add(&mut self, outcome: Outcome) {
        let total = &mut self.total;
        total.files += outcome.files;
        total.directories += outcome.directories;
        total.bytes = total.bytes.saturating_add(outcome.bytes);
        total.unchanged += outcome.unchanged;
        total.shortfall.owners += outcome.shortfall.owners;
        total.shortfall.attributes += outcome.shortfall.attributes;
        total.shortfall.hard_links += outcome.shortfall.hard_links;
        self.errors += outcome.errors.count();
        let existing: &Listed<PathBuf> = &outcome.skipped_existing;
        self.existing_count += existing.count();
        let listed = existing.listed().iter();
        self.existing
            .extend(listed.map(|path| path.display().to_string()));
    }

    /// The error with which copying has ended early, and how the rest is had.
    pub fn with_rest(&self, args: &Args, was_there: bool, error: Error) -> Error {
        let first = match error.kind() {
            Kind::NoSpace => "make room; ",
            Kind::Interrupted => "",
            Kind::Disconnected | Kind::TimedOut => "check the network; ",
            _ => return error,
        };
        if !self.has_begun {
            return error;
        }
        // What was to become DEST would now go into it.
        let inside = match was_there || !args.destination.is_dir() {
            true => "",
            false => " and /. after its path",
        };
        // First: the link advises to run the command again as it was, which would make a second copy.
        error.hint_first(format!(
            "{first}what is in place is whole, and the same command with \
             --overwrite=if-changed{inside} takes the rest"
        ))
    }

    pub fn summary(&self, args: &Args) -> Ending {
        let total = &self.total;
        if !args.output.quiet {
            say!(
                "{} {} and {}, {}",
                if args.dry_run {
                    "would restore"
                } else {
                    "restored"
                },
                count(total.files, "file", "files"),
                count(total.directories, "directory", "directories"),
                Bytes(total.bytes)
            );
            if total.unchanged > 0 {
                let were = count(total.unchanged, "file was", "files were");
                say!("  note: {were} there already, unchanged");
            }
            notes(total);
        }
        if self.existing_count > 0 {
            let were = count(
                self.existing_count,
                "file that exists was left as it is (--overwrite replaces it):",
                "files that exist were left as they are (--overwrite replaces them):",
            );
            tell!("warning: {were}");
            list(self.existing.iter(), self.existing_count);
        }
        // Each was reported when it happened.
        for (number, one, many) in [
            (
                self.errors,
                "file could not be restored as it was",
                "files could not be restored as they were",
            ),
            (
                self.different,
                "file is not what was restored",
                "files are not what was restored",
            ),
            (
                self.unreadable,
                "file cannot be read",
                "files cannot be read",
            ),
        ] {
            if number > 0 {
                tell!("warning: {}", count(number, one, many));
            }
        }
        if args.verify && self.different == 0 && !args.output.quiet {
            say!("  note: the content of everything was read back and compared");
        }
        let found = self.existing_count + self.errors + self.different;
        match found + self.unreadable + self.missed {
            0 => Ending::Clean,
            _ => Ending::Warnings,
        }
    }
}

/// What was passed over as `cp -a` passes over it.
fn notes(outcome: &Outcome) {
    let lost = outcome.shortfall;
    for (number, one, many) in [
        (
            lost.owners,
            "file belongs to you, because only root can give files away",
            "files belong to you, because only root can give files away",
        ),
        (
            lost.attributes,
            "extended attribute or ACL could not be set here",
            "extended attributes or ACLs could not be set here",
        ),
        (
            lost.hard_links,
            "hard link became a file of its own, because it could not be made",
            "hard links became files of their own, because they could not be made",
        ),
    ] {
        if number > 0 {
            say!("  note: {}", count(number, one, many));
        }
    }
}

/// A number and what there is so many of.
fn count(number: u64, one: &str, many: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        _ => format!("{number} {many}"),
    }
}

/// A name may hold anything; what is printed stays on its line.
fn list<'a>(lines: impl Iterator<Item = &'a String>, number: u64) {
    const SHOWN: usize = 20;
    for line in lines.take(SHOWN) {
        tell!("  {}", line.escape_debug());
    }
    if number > SHOWN as u64 {
        tell!("  and {} more", number - SHOWN as u64);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn an_early_end_tells_how_to_have_the_rest_and_not_to_run_it_again() {
        let made = tempfile::tempdir().expect("a directory");
        let args = |destination: &str| {
            let line = ["restore", "nas:a.img", "latest:/x", destination];
            Line::try_parse_from(line).expect("parses").args
        };
        let (there, file) = (made.path().display().to_string(), "/never/made");
        let begun = Sum {
            has_begun: true,
            ..Sum::default()
        };
        let hint = |sum: &Sum, kind, destination: &str, was_there| {
            let cause = Error::new(kind, "restore the link").hint("run it again");
            let error = Error::new(kind, "read a file").because(cause);
            let error = sum.with_rest(&args(destination), was_there, error);
            error.deepest_hint().unwrap_or_default().to_string()
        };
        const REST: &str = "what is in place is whole, and the same command with \
                            --overwrite=if-changed";
        for (kind, first) in [
            (Kind::NoSpace, "make room; "),
            (Kind::Interrupted, ""),
            (Kind::Disconnected, "check the network; "),
            (Kind::TimedOut, "check the network; "),
        ] {
            let into = format!("{first}{REST} and /. after its path takes the rest");
            let plain = format!("{first}{REST} takes the rest");
            assert_eq!(hint(&begun, kind, &there, false), into);
            assert_eq!(hint(&begun, kind, &there, true), plain);
            assert_eq!(hint(&begun, kind, file, false), plain);
            assert_eq!(hint(&Sum::default(), kind, &there, false), "run it again");
        }
        assert_eq!(hint(&begun, Kind::Corrupt, &there, false), "run it again");
    }
}
