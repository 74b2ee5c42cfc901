use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::marks::Marks;
use crate::cli::trim::take_lease;
use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};
use crate::image::{self, Copied, CopyJob, LinkSettings};
use crate::location::Location;
use crate::progress::{Event, Monitor};
use crate::remote::lease::Lease;
use crate::remote::{Access, Store};
use crate::session;
use crate::ui::say;
use crate::ui::{Style, Terminal};
use crate::units::{Bytes, MIB, parse_duration, show_duration};

/// Copy an image to another location, as it is
///
/// The ciphertext is copied: no key is needed, and TO opens with the same keys as LOCATION. The copy is
/// TO.part until it is whole; then it takes its name. An interrupted run goes on with what has arrived,
/// and a second one sends only what has changed, by hashes of each MiB (TO.sums). Everything that is
/// written is read back and compared.
///
/// Both images are held by leases meanwhile: while somebody writes LOCATION, the copy waits for --wait,
/// and then fails. While an older copy is brought up to date it is TO.part, and no good.
///
/// LOCATION is read where it holds something: of a local file that is known; of one on a server where
/// commands may be run there over ssh (filefrag); else all of it is read, holes too.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// Where the copy shall be, written as LOCATION is
    #[arg(value_name = "TO")]
    to: String,

    /// Replace another image at TO, when the copy is whole
    #[arg(long)]
    force: bool,

    /// How long to wait while somebody else holds one of the images, for example 30m
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "0")]
    wait: Duration,

    /// For TO instead of --ssh-command
    #[arg(long, value_name = "COMMAND", help_heading = "Link")]
    to_ssh_command: Option<String>,

    /// For TO instead of --ssh-option; may be repeated
    #[arg(long, value_name = "OPTION", help_heading = "Link")]
    to_ssh_option: Vec<String>,

    /// For TO instead of --identity-file
    #[arg(long, value_name = "FILE", help_heading = "Link")]
    to_identity_file: Option<std::path::PathBuf>,

    /// Print one object a line: status lines, and the result last
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    output: OutputArgs,
}

/// One of the two, held by a lease of ours.
struct Held<'a> {
    location: &'a Location,
    link: LinkSettings,
    store: Arc<dyn Store>,
    /// `None` where it may only be read.
    lease: Option<Lease>,
}

impl Held<'_> {
    fn release(self) -> Result<()> {
        self.lease.map_or(Ok(()), Lease::release)
    }
}

pub fn run(args: Args) -> Result<Ending> {
    let from = args.image.location()?;
    let to: Location = args
        .to
        .parse()
        .map_err(|why| Error::new(Kind::Usage, why))?;
    let doing = || format!("cannot copy {from} to {to}");
    if is_same(&from, &to) {
        return Err(Error::new(Kind::Usage, "both are the same image")).attempt(doing);
    }
    let terminal = Terminal::new(Style::choose(args.output.quiet, args.json));
    let (signals, stop) = session::count_signals()?;
    session::end_at_second_signal(&signals)?;
    let check = || match stop.load(Ordering::Relaxed) {
        true => Err(Error::new(
            Kind::Interrupted,
            "interrupted; what was sent stays, and a second run goes on",
        )),
        false => Ok(()),
    };
    let clock = Instant::now();
    let copied = copy(&args, &from, &to, &terminal, &check);
    terminal.finish();
    // A signal reaches ssh as well, so how that failed is not what matters then.
    let copied = copied.map_err(|error| check().err().unwrap_or(error));
    let (copied, sent) = copied.attempt(doing)?;
    let took = clock.elapsed();
    if args.json {
        say!(
            "{}",
            json!({
                "message_type": "summary", "version": 1, "image_bytes": copied.size,
                "read_bytes": copied.read, "written_bytes": copied.written,
                "unchanged_bytes": copied.same, "sent_bytes": sent,
                "duration_seconds": took.as_secs_f64(),
            })
        );
    } else if !args.output.quiet {
        say!("copied {from} to {to} in {}", show_duration(took));
        say!(
            "  written    {:>12}   read back and compared",
            shown(copied.written)
        );
        say!("  unchanged  {:>12}", shown(copied.same));
        say!("  image      {:>12}", shown(copied.size));
    }
    Ok(Ending::Clean)
}

fn shown(bytes: u64) -> String {
    Bytes(bytes).to_string()
}

fn is_same(from: &Location, to: &Location) -> bool {
    match (from, to) {
        (Location::Local(from), Location::Local(to)) => {
            let whole = |path| std::fs::canonicalize(path).ok();
            from == to || (whole(from).is_some() && whole(from) == whole(to))
        }
        _ => from == to,
    }
}

fn copy(
    args: &Args,
    from: &Location,
    to: &Location,
    terminal: &Terminal,
    check: &(dyn Fn() -> Result<()> + Sync),
) -> Result<(Copied, u64)> {
    let link = args.image.link()?;
    let source = hold_source(from, link, args.wait, terminal, check)?;
    let copied = copy_to(args, &source, to, terminal, check);
    let released = source.release();
    let copied = copied?;
    released?;
    Ok(copied)
}

fn hold_source<'a>(
    location: &'a Location,
    link: LinkSettings,
    wait: Duration,
    terminal: &Terminal,
    check: &dyn Fn() -> Result<()>,
) -> Result<Held<'a>> {
    let store = image::connect(location, &link)?;
    image::require(&*store)?;
    let lease = match take_lease(&store, location, wait, check) {
        Ok(lease) => Some(lease),
        Err(error) if matches!(error.kind(), Kind::Denied | Kind::ReadOnly) => {
            let note = format!(
                "{location} may only be read, so nobody is kept from writing it meanwhile: {}",
                error.chain().join(": ")
            );
            terminal.report(Event::Note(note));
            None
        }
        Err(error) => return Err(error),
    };
    tell_of(&lease, terminal);
    Ok(Held {
        location,
        link,
        store,
        lease,
    })
}

fn tell_of(lease: &Option<Lease>, terminal: &Terminal) {
    if let Some(note) = lease.as_ref().and_then(Lease::note) {
        terminal.report(Event::Note(note.into()));
    }
}

fn copy_to(
    args: &Args,
    source: &Held<'_>,
    to: &Location,
    terminal: &Terminal,
    check: &(dyn Fn() -> Result<()> + Sync),
) -> Result<(Copied, u64)> {
    let mut link = args.image.link()?;
    if args.to_ssh_command.is_some() {
        link.command = args.to_ssh_command.clone();
    }
    if !args.to_ssh_option.is_empty() {
        link.ssh_options = args.to_ssh_option.clone();
    }
    if let Some(file) = &args.to_identity_file {
        link.identity_file = Some(std::path::absolute(file)?);
    }
    let store = image::connect(to, &link)?;
    let lease = take_lease(&store, to, args.wait, check).map_err(|error| match error.kind() {
        Kind::NotFound => error.hint("the copy is made, and no directory for it: make that first"),
        _ => error,
    })?;
    let held = Held {
        location: to,
        link,
        store,
        lease: Some(lease),
    };
    tell_of(&held.lease, terminal);
    let copied = copy_held(args.force, source, &held, terminal, check);
    let sent = held.store.traffic().sent;
    let released = held.release();
    let copied = copied?;
    released?;
    Ok((copied, sent))
}

fn copy_held(
    force: bool,
    source: &Held<'_>,
    target: &Held<'_>,
    terminal: &Terminal,
    check: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Copied> {
    terminal.report(Event::Phase("look at both"));
    let sealed = image::inspect(&*source.store, Access::ReadOnly)?;
    let uuid = sealed.header().uuid().to_string();
    let volume = sealed.header().segment().offset();
    drop(sealed);
    let is_other = |store: &dyn Store| other_image(store, &uuid);
    let part = target.store.beside(image::PART)?;
    let (whole, half) = (is_other(&*target.store)?, is_other(&*part)?);
    for (other, name) in [(&whole, "TO"), (&half, "the unfinished copy TO.part")] {
        if let (Some(other), false) = (other, force) {
            let error = Error::new(Kind::Exists, format!("{name} is {other}"));
            return Err(error.hint("choose another name, or replace it with --force"));
        }
    }
    if half.is_some() {
        // With --force; it was never whole.
        part.remove()?;
    }
    let from = source.store.open(Access::ReadOnly)?;
    let (store, place, link) = (&*source.store, source.location, &source.link);
    let ranges = image::data_ranges(store, place, link, from.size())?;
    room(&*target.store, &*from, ranges.as_deref(), terminal)?;
    let marks = || Marks::take(&*source.store, &*from, &[0, volume]);
    // A lease of our own is asked instead.
    let before = match source.lease {
        Some(_) => None,
        None => Some(marks()?),
    };
    image::copy(&CopyJob {
        from: &*from,
        ranges: ranges.as_deref(),
        to: &*target.store,
        anew: whole.is_some(),
        monitor: terminal,
        check,
        unmoved: &|| {
            if let Some(lease) = &source.lease {
                lease.check()?;
            } else {
                let now = marks()?;
                if now.has_lease() || before.as_ref() != Some(&now) {
                    let why = "the image was written to while it was copied";
                    let error = Error::new(Kind::InUse, why);
                    return Err(error.hint("run it again when nobody writes"));
                }
            }
            target.lease.as_ref().map_or(Ok(()), Lease::check)
        },
    })
}

/// What is at `store`, in words, if it is not the image with this UUID, nor the begin of one.
fn other_image(store: &dyn Store, uuid: &str) -> Result<Option<String>> {
    let device = match store.open(Access::ReadOnly) {
        Err(error) if error.kind() == Kind::NoImage => return Ok(None),
        other => other?,
    };
    let mut begin = vec![0; device.size().min(MIB) as usize];
    device.read_exact_at(&mut begin, 0)?;
    if begin.iter().all(|byte| *byte == 0) && device.size() >= MIB {
        return Ok(None);
    }
    Ok(match image::inspect(store, Access::ReadOnly) {
        Ok(sealed) if sealed.header().uuid() == uuid => None,
        Ok(sealed) => Some(format!("another image ({})", sealed.header().uuid())),
        Err(_) => Some("no LUKS2 image".into()),
    })
}

/// Warns when what the source holds is more than there is room.
fn room(
    target: &dyn Store,
    from: &dyn Device,
    ranges: Option<&[std::ops::Range<u64>]>,
    terminal: &Terminal,
) -> Result<()> {
    let held = ranges.map(|ranges| ranges.iter().map(|range| range.end - range.start).sum());
    let needed: u64 = held.unwrap_or(0).min(from.size());
    if let Some(space) = target.space()?
        && needed > space.free
    {
        terminal.report(Event::Warning(format!(
            "the image holds {}, and {} are free where the copy goes; that is enough only if most \
             of it is there already",
            Bytes(needed),
            Bytes(space.free)
        )));
    }
    Ok(())
}
