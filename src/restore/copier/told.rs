//! What is said of a run: what was passed over, what went wrong and whether that ends it.

use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Instant;

use super::Copier;
use crate::error::{Attempt, Error, Kind, Result};
use crate::progress::{Event, Monitor, Progress};
use crate::restore::Options;
use crate::restore::descent::show;
use crate::restore::outcome::{Failure, Outcome};
use crate::restore::source::{Attribute, HERE};

impl Copier<'_> {
    pub(super) fn skip(&mut self, name: &[u8]) {
        let mut path = self.landing.clone();
        path.extend(
            self.levels
                .iter()
                .map(|level| OsStr::from_bytes(&level.name)),
        );
        path.push(OsStr::from_bytes(name));
        self.outcome.skipped_existing.add(path);
    }

    /// Records what concerns one file, and returns what ends the run.
    pub(super) fn settle(
        &mut self,
        name: Option<&[u8]>,
        result: Result<(), Trouble>,
    ) -> Result<()> {
        match result {
            Ok(()) => Ok(()),
            Err(Trouble::File(error)) => {
                self.record(name, error);
                Ok(())
            }
            Err(Trouble::Run(error)) => {
                let path = self.path(name);
                let to = self.landing.display();
                Err(error).attempt(|| format!("restore {} to {to}", show(&path)))
            }
        }
    }

    /// The attributes of a file. Where they cannot be read, that is recorded, and the rest of the
    /// file does without.
    pub(super) fn attributes(&mut self, lookup: &[u8]) -> Result<Vec<Attribute>> {
        match self.source.attributes(lookup).map_err(Trouble::from) {
            Ok(attributes) => Ok(attributes),
            Err(Trouble::File(error)) => {
                self.record_all(lookup, vec![error]);
                Ok(Vec::new())
            }
            Err(Trouble::Run(error)) => Err(error),
        }
    }

    pub(super) fn record_all(&mut self, name: &[u8], errors: Vec<Error>) {
        for error in errors {
            self.record((name != HERE).then_some(name), error);
        }
    }

    /// `name` is in the directory that is being copied; without one it is that directory itself.
    fn record(&mut self, name: Option<&[u8]>, error: Error) {
        let path = self.path(name);
        let text = format!("{}: {}", show(&path), error.chain().join(": "));
        let path = PathBuf::from(std::ffi::OsString::from_vec(path));
        if self.outcome.errors.add(Failure { path, error }) {
            self.monitor.report(Event::Warning(text));
        }
    }

    /// The path in the source.
    fn path(&self, name: Option<&[u8]>) -> Vec<u8> {
        let below = self.levels.iter().skip(1).map(|level| &*level.name);
        // What is settled before there is a level is what was asked for.
        let name = name.filter(|_| !self.levels.is_empty());
        let mut path = self.origin.clone();
        for name in below.chain(name) {
            if !path.is_empty() && !path.ends_with(b"/") {
                path.push(b'/');
            }
            path.extend_from_slice(name);
        }
        path
    }

    pub(super) fn progress(&mut self) {
        self.reported = Instant::now();
        tell_progress(self.monitor, self.options, &self.outcome);
    }
}

/// Why something was not restored, by what follows from it.
pub(super) enum Trouble {
    /// One file, or one directory with all that is in it, is missing.
    File(Error),
    /// Nothing that comes after it would fare better.
    Run(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        match error.kind() {
            Kind::NoSpace
            | Kind::ReadOnly
            | Kind::Interrupted
            | Kind::Disconnected
            | Kind::TimedOut => Trouble::Run(error),
            Kind::Usage
            | Kind::NoImage
            | Kind::NotFound
            | Kind::Exists
            | Kind::InUse
            | Kind::WrongKey
            | Kind::Corrupt
            | Kind::Unsupported
            | Kind::MissingTool
            | Kind::Denied
            | Kind::Io => Trouble::File(error),
        }
    }
}

pub(super) fn tell_progress(monitor: &dyn Monitor, options: Options<'_>, outcome: &Outcome) {
    monitor.report(Event::Progress(Progress {
        files: Some(outcome.files + outcome.unchanged),
        files_total: options.totals.map(|(files, _)| files),
        bytes: Some(outcome.bytes),
        bytes_total: options.totals.map(|(_, bytes)| bytes),
        ..Progress::default()
    }));
}
