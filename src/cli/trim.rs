use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::key::{KeyArgs, Keys};
use crate::cli::unmounted::unlock;
use crate::error::{Attempt, Error, Kind, Result};
use crate::image::{self, LinkSettings, TrimJob};
use crate::location::Location;
use crate::progress::{Event, Monitor};
use crate::remote::lease::Lease;
use crate::remote::{Access, Store};
use crate::session;
use crate::ui::say;
use crate::ui::{Style, Terminal};
use crate::units::{Bytes, KIB, parse_duration};

/// How often somebody else's lease is looked at again.
const LEASE_POLL: Duration = Duration::from_millis(500);

/// Give the free space of the filesystem back to the server
///
/// Blocks that no file uses any more become holes in the image. No data cross the link and nothing
/// is mounted. The first way that works is taken, and named: fallocate on a local file; fallocate
/// on the server, run over ssh; a sparse copy that the server makes itself (SFTP's copy-data), which
/// needs room for a second copy of what is in use, and replaces the image when it is whole.
/// Interrupted, nothing is lost; run it again.
///
/// Holes show the server which parts of the image are free. With a larger --granularity they show
/// less, and less is freed.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    #[command(flatten)]
    how: TrimArgs,

    /// How long to wait while somebody else holds the image, for example 30m
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "0")]
    wait: Duration,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(clap::Args, Clone)]
pub struct TrimArgs {
    /// Holes begin and end at multiples of this: a power of two, 4K to 1G
    #[arg(long, value_name = "SIZE", value_parser = granularity, default_value = "64K")]
    granularity: Bytes,
}

fn granularity(text: &str) -> Result<Bytes, String> {
    let bytes: Bytes = text.parse()?;
    match bytes.0.is_power_of_two() && (4 * KIB..=1 << 30).contains(&bytes.0) {
        true => Ok(bytes),
        false => Err("it is a power of two from 4K to 1G".into()),
    }
}

pub fn run(args: Args) -> Result<Ending> {
    perform(
        &args.image,
        &args.key,
        &args.how,
        args.wait,
        args.output.quiet,
    )?;
    Ok(Ending::Clean)
}

/// Trims, and says what came of it.
pub fn perform(
    image: &ImageArgs,
    key: &KeyArgs,
    how: &TrimArgs,
    wait: Duration,
    quiet: bool,
) -> Result<()> {
    let location = image.location()?;
    let terminal = Terminal::new(Style::choose(quiet, false));
    let (signals, stop) = session::count_signals()?;
    session::end_at_second_signal(&signals)?;
    let keys = key.keys(&image.location, signals)?;
    let link = image.link()?;
    let args = Trim {
        location: &location,
        link: &link,
        granularity: how.granularity,
        wait,
        terminal: &terminal,
        stop: &stop,
        quiet,
    };
    let trimmed = trim(&args, keys);
    terminal.finish();
    trimmed.attempt(|| format!("cannot trim {location}"))
}

struct Trim<'a> {
    location: &'a Location,
    link: &'a LinkSettings,
    granularity: Bytes,
    wait: Duration,
    terminal: &'a Terminal,
    stop: &'a AtomicBool,
    quiet: bool,
}

fn trim(args: &Trim<'_>, mut keys: Keys) -> Result<()> {
    let store = image::connect(args.location, args.link)?;
    image::require(&*store)?;
    let check = || match args.stop.load(Ordering::Relaxed) {
        true => Err(Error::new(
            Kind::Interrupted,
            "interrupted; what is freed is freed, and a second run goes on",
        )),
        false => Ok(()),
    };
    let lease = take_lease(&store, args.location, args.wait, &check)?;
    let trimmed = trim_held(args, &store, &lease, &mut keys, &check);
    // A signal reaches ssh as well, so how that failed is not what matters then.
    let trimmed = trimmed.map_err(|error| check().err().unwrap_or(error));
    let released = lease.release();
    trimmed?;
    released
}

/// Takes the lease, waiting for it a moment or as long as `wait`.
pub fn take_lease(
    store: &Arc<dyn Store>,
    location: &Location,
    wait: Duration,
    check: &dyn Fn() -> Result<()>,
) -> Result<Lease> {
    // A session that has just ended needs a moment to release it.
    let deadline = Instant::now() + wait.max(Duration::from_secs(3));
    loop {
        match Lease::take(store.clone(), &location.to_string()) {
            Err(error) if error.kind() == Kind::InUse && Instant::now() < deadline => {
                std::thread::sleep(LEASE_POLL);
                check()?;
            }
            other => return other.map_err(|error| session::hint_at_mount(error, location)),
        }
    }
}

fn trim_held(
    args: &Trim<'_>,
    store: &Arc<dyn Store>,
    lease: &Lease,
    keys: &mut Keys,
    check: &dyn Fn() -> Result<()>,
) -> Result<()> {
    if let Some(note) = lease.note() {
        args.terminal.report(Event::Note(note.into()));
    }
    let sealed = image::inspect(&**store, Access::ReadOnly)?;
    let size = sealed.size();
    let stored = || image::stored_bytes(&**store, args.location, args.link, size);
    let before = stored()?;
    let opened = unlock(sealed, keys)?;
    let trimmed = image::trim(
        opened,
        &TrimJob {
            location: args.location,
            link: args.link,
            store,
            lease,
            granularity: args.granularity.0,
            monitor: args.terminal,
            check,
        },
    )?;
    let after = stored()?;
    args.terminal.finish();
    if args.quiet {
        return Ok(());
    }
    let Some(backend) = trimmed.backend else {
        say!("nothing to trim in {}", args.location);
        return Ok(());
    };
    match (before, after) {
        (Some(before), Some(after)) => say!(
            "freed {} on the server ({} to {} stored)",
            Bytes(before.saturating_sub(after)),
            Bytes(before),
            Bytes(after)
        ),
        _ => say!("done; the server does not tell how much that has freed"),
    }
    say!("  by     {backend}");
    say!(
        "  free   {} in {} runs, {} in use with metadata",
        Bytes(trimmed.free),
        trimmed.runs,
        Bytes(trimmed.used)
    );
    Ok(())
}
