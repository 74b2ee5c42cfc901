use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::findings::{FILESYSTEM_ADVICE, HEADER_ADVICE, Part, RECORD_ADVICE, Report};
use crate::cli::key::{KeyArgs, Keys};
use crate::cli::marks::Marks;
use crate::cli::unmounted::unlock;
use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};
use crate::ext4;
use crate::host::{Means, Private};
use crate::image::{self, Reading, Sealed, Subset};
use crate::location::Location;
use crate::progress::{Event, Monitor};
use crate::remote::lease::Lease;
use crate::remote::{Access, Store};
use crate::restore::Filesystem;
use crate::session;
use crate::snapshot;
use crate::ui::say;
use crate::ui::{Style, Terminal};
use crate::units::parse_duration;

/// How often somebody else's lease is looked at again.
const LEASE_POLL: Duration = Duration::from_millis(500);

/// Check an image: header, filesystem, snapshots, and with --read-data that the data are there
///
/// Nothing is written, and no lease is taken: a check never keeps a backup from running. While
/// somebody writes, nothing can be said of the filesystem, so it ends with exit code 11, or waits for
/// so long as --wait says.
///
/// Both copies of the LUKS2 header must be whole and agree; the filesystem's own program (e2fsck -fn,
/// xfs_repair -n, btrfs check --readonly) must find nothing; every completion record must have its
/// tree, and every tree its record and all its sources. A journal that a run left behind is replayed
/// in memory first. Exit code 13 when anything is wrong, with what to do.
///
/// --read-data reads what files hold from the server: it finds what the server cannot read and
/// what it has lost (a hole where a file has content). A byte that was changed it cannot find: LUKS2
/// has no checksums.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// Read what files hold, too
    #[arg(long)]
    read_data: bool,

    /// Read a part of it: 5% or 10G by chance, or 1/30, 2/30, ... which together are all of it
    #[arg(long, value_name = "PART", requires = "read_data")]
    subset: Option<Subset>,

    /// Begin no more reading after this time; where it begins is left to chance
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "read_data")]
    max_duration: Option<Duration>,

    /// How long to wait while somebody writes the image, for example 30m
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "0")]
    wait: Duration,

    /// Print one object a line: status lines, and the result last
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What all parts of a check are given.
struct Checker<'a> {
    args: &'a Args,
    location: &'a Location,
    terminal: &'a Terminal,
    private: Option<&'a Private>,
    stop: &'a AtomicBool,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let doing = || format!("cannot check {location}");
    let terminal = Terminal::new(Style::choose(args.output.quiet, args.json));
    // Before any thread: a user namespace takes only a process that has one.
    let private = match Means::of_this_process() {
        Means::Root | Means::UserNamespace => Some(session::enter_private().attempt(doing)?),
        Means::None { .. } => None,
    };
    let (signals, stop) = session::count_signals()?;
    session::end_at_second_signal(&signals)?;
    let keys = args.key.keys(&args.image.location, signals)?;
    let checker = Checker {
        args: &args,
        location: &location,
        terminal: &terminal,
        private: private.as_ref(),
        stop: &stop,
    };
    let clock = Instant::now();
    let report = checker.check(keys);
    terminal.finish();
    let report = report.attempt(doing)?;
    match args.json {
        true => say!("{}", report.as_json(clock.elapsed())),
        false => report.print(args.output.quiet),
    }
    match (report.findings.len(), report.left_out.is_empty()) {
        (0, true) => Ok(Ending::Clean),
        (0, false) => Ok(Ending::Warnings),
        (1, _) => {
            Err(Error::new(Kind::Corrupt, "one thing is wrong")).attempt(|| failed(&location))
        }
        (count, _) => Err(Error::new(
            Kind::Corrupt,
            format!("{count} things are wrong"),
        ))
        .attempt(|| failed(&location)),
    }
}

fn failed(location: &Location) -> String {
    format!("{location} is damaged")
}

impl Checker<'_> {
    fn go_on(&self) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::new(Kind::Interrupted, "interrupted by a signal")),
            false => Ok(()),
        }
    }

    fn check(&self, mut keys: Keys) -> Result<Report> {
        let store = image::connect(self.location, &self.args.image.link()?)?;
        image::require(&*store)?;
        let deadline = Instant::now() + self.args.wait;
        while let Some(who) = writer(&*store)? {
            if Instant::now() >= deadline {
                let why = format!("nothing can be said of it while it is written by {who}");
                let hint = "wait with `--wait 30m`, or unmount it";
                return Err(Error::new(Kind::InUse, why).hint(hint));
            }
            std::thread::sleep(LEASE_POLL);
            self.go_on()?;
        }
        // A header that cannot be read is told of below.
        let header = image::inspect(&*store, Access::ReadOnly).ok();
        let volume = header.map_or(0, |sealed| sealed.header().segment().offset());
        let marks = || Marks::take(&*store, &*store.open(Access::ReadOnly)?, &[0, volume]);
        let before = marks()?;
        let mut report = Report::default();
        let checked = self.all(&store, &mut keys, &mut report);
        let is_sound = match &checked {
            Ok(()) => report.findings.is_empty(),
            Err(error) => error.kind() != Kind::Corrupt,
        };
        let meanwhile = match is_sound {
            true => None,
            // One that has begun, or one that has begun and ended.
            false => match writer(&*store)? {
                None if marks()? != before => Some("somebody has written to it".into()),
                who => who.map(|who| format!("{who} has begun to write")),
            },
        };
        if let Some(meanwhile) = meanwhile {
            let why = format!("{meanwhile} meanwhile, so what was found proves nothing");
            return Err(Error::new(Kind::InUse, why).hint("run it again, with `--wait 30m`"));
        }
        checked.map(|()| report)
    }

    fn all(&self, store: &Arc<dyn Store>, keys: &mut Keys, report: &mut Report) -> Result<()> {
        match self.header(&**store, report)? {
            Some(sealed) => self.inside(store, sealed, keys, report),
            None => Ok(()),
        }
    }

    /// Looks at both copies of the header; `None` when there is no whole one.
    fn header(&self, store: &dyn Store, report: &mut Report) -> Result<Option<Sealed>> {
        self.terminal.report(Event::Phase("check the LUKS2 header"));
        let sealed = match image::inspect(store, Access::ReadOnly) {
            Ok(sealed) => sealed,
            Err(error) if error.kind() == Kind::Corrupt => {
                let advice = "`cryptsetup luksHeaderRestore` writes back a header that was kept \
                              elsewhere; without one nothing opens the image any more";
                report.wrong(Part::Header, error.chain().join(": "), advice);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        for warning in sealed.warnings() {
            report.wrong(Part::Header, warning.as_str(), HEADER_ADVICE);
        }
        if sealed.warnings().is_empty() {
            let header = sealed.header();
            let (slots, id) = (header.keyslots().len(), header.sequence_id());
            let plural = if slots == 1 { "" } else { "s" };
            let what = format!("both copies agree, {slots} keyslot{plural}, sequence id {id}");
            report.fine(Part::Header, what);
        }
        Ok(Some(sealed))
    }

    fn inside(
        &self,
        store: &Arc<dyn Store>,
        sealed: Sealed,
        keys: &mut Keys,
        report: &mut Report,
    ) -> Result<()> {
        let opened = unlock(sealed, keys)?;
        let segment = opened.header.segment();
        let (begins, sector) = (segment.offset(), segment.sector_size().bytes());
        let volume = self.filesystem(opened.volume.device(), report)?;
        self.go_on()?;
        self.snapshots(volume.clone(), report)?;
        self.go_on()?;
        if self.args.read_data {
            let image = store.open(Access::ReadOnly)?;
            self.data(&*volume, &*image, begins, sector, report)?;
        }
        drop(volume);
        opened.volume.close()
    }

    /// Gives the volume as it is after its journal was replayed.
    fn filesystem(&self, volume: Arc<dyn Device>, report: &mut Report) -> Result<Arc<dyn Device>> {
        let Some(private) = self.private else {
            let why = "the filesystem was not checked: that needs root, or the use of /dev/fuse";
            report.left_out.push(why.into());
            return Ok(volume);
        };
        let directory = private.directory().join("check");
        std::fs::create_dir_all(&directory).attempt(|| "make a mountpoint")?;
        match self.fsck(volume.clone(), &directory, report) {
            Err(error) if matches!(error.kind(), Kind::MissingTool | Kind::Unsupported) => {
                let why = error.chain().join(": ");
                report
                    .left_out
                    .push(format!("the filesystem was not checked: {why}"));
                Ok(volume)
            }
            other => other,
        }
    }

    fn fsck(
        &self,
        volume: Arc<dyn Device>,
        directory: &Path,
        report: &mut Report,
    ) -> Result<Arc<dyn Device>> {
        let checked = session::fsck(volume, directory, self.stop, self.terminal)?;
        let (filesystem, program) = (checked.filesystem, checked.program);
        if checked.replayed {
            let note =
                "the last run did not close the filesystem; its journal was replayed in memory";
            self.terminal.report(Event::Note(note.into()));
        }
        if checked.found.is_empty() {
            report.fine(
                Part::Filesystem,
                format!("{filesystem}, {program} finds nothing"),
            );
        } else {
            let found = checked.found.join("\n    ");
            let what = format!("{program} finds errors in the {filesystem}:\n    {found}");
            report.wrong(Part::Filesystem, what, FILESYSTEM_ADVICE);
        }
        Ok(checked.volume)
    }

    fn snapshots(&self, volume: Arc<dyn Device>, report: &mut Report) -> Result<()> {
        let checked = Filesystem::open(volume)
            .and_then(|mut view| snapshot::check(&mut view, self.stop, self.terminal));
        let checked = match checked {
            Ok(checked) => checked,
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) => {
                let what = format!("they cannot be read: {}", error.chain().join(": "));
                report.wrong(Part::Snapshots, what, FILESYSTEM_ADVICE);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for fault in &checked.faults {
            report.wrong(
                Part::Snapshots,
                format!("{}: {}", fault.id, fault.why),
                RECORD_ADVICE,
            );
        }
        let (complete, unfinished) = (checked.complete, checked.inflight);
        let what = format!(
            "{complete} complete, {unfinished} unfinished, {} files and directories",
            checked.files
        );
        report.fine(Part::Snapshots, what);
        report.snapshots = Some(checked);
        Ok(())
    }

    fn data(
        &self,
        volume: &dyn Device,
        image: &dyn Device,
        begins: u64,
        sector: usize,
        report: &mut Report,
    ) -> Result<()> {
        self.terminal.report(Event::Phase("find what files hold"));
        let mut read = |at: u64, into: &mut [u8]| {
            self.go_on()?;
            volume.read_exact_at(into, at)
        };
        let pieces = match ext4::pieces(&mut read, volume.size())? {
            Ok(pieces) => pieces,
            Err(ext4::Fault::Damaged(what)) => {
                let what = format!("it cannot be told where it is: {what}");
                report.wrong(Part::Data, what, FILESYSTEM_ADVICE);
                return Ok(());
            }
            Err(fault) => {
                report
                    .left_out
                    .push(format!("the data were not read: {fault}"));
                return Ok(());
            }
        };
        self.terminal.report(Event::Phase("read"));
        let read = image::read_data(&Reading {
            image,
            begins,
            sector,
            pieces: &pieces,
            subset: self.args.subset.unwrap_or(Subset::All),
            until: self.args.max_duration.map(|most| Instant::now() + most),
            monitor: self.terminal,
            check: &|| self.go_on(),
        })?;
        report.take_data(read);
        Ok(())
    }
}

/// Who writes the image, in words.
fn writer(store: &dyn Store) -> Result<Option<String>> {
    let holder = Lease::peek(store)?;
    Ok(holder
        .filter(|holder| !holder.is_dead())
        .map(|holder| holder.describe()))
}
