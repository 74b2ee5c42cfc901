use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::key::{KeyArgs, Keys};
use crate::cli::trim::take_lease;
use crate::cli::unmounted::unlock;
use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};
use crate::ext4;
use crate::host::{Means, Private, mkfs};
use crate::image;
use crate::location::Location;
use crate::luks::Header;
use crate::progress::{Event, Monitor};
use crate::remote::{Access, Store};
use crate::session::{self, PublicMount};
use crate::ui::{Style, Terminal};
use crate::ui::{say, tell};
use crate::units::{Bytes, KIB, parse_duration};

/// Sizes are multiples of the sector of the volume.
const SECTOR: u64 = 4 * KIB;

/// Make an image larger: the sparse file, the volume and the filesystem
///
/// The new size is that of the whole image, or with `+` by how much it grows. Almost nothing is
/// written: the file is sparse. An image that is mounted on this machine by `e2ebak mount` grows while
/// it is in use. Interrupted at any point, running it again finishes it.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// For example 8T or +500G
    #[arg(value_name = "SIZE")]
    size: Wanted,

    /// How long to wait while somebody else holds the image, for example 30m
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "0")]
    wait: Duration,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Size(u64),
    More(u64),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix('+') {
            None => text.parse().map(|Bytes(size)| Wanted::Size(size)),
            Some(more) => more.parse().map(|Bytes(more)| Wanted::More(more)),
        }
    }
}

/// What there is now, in bytes of the image.
#[derive(Clone, Copy, Debug)]
struct Now {
    image: u64,
    /// Where the volume begins.
    begins: u64,
    /// Where the filesystem ends.
    filesystem: u64,
}

/// What it is to be, and what was there.
struct Step {
    now: Now,
    size: u64,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let doing = || format!("cannot grow {location}");
    let terminal = Terminal::new(Style::choose(args.output.quiet, false));
    let mounted = session::public_mount(&location).attempt(doing)?;
    // Before any thread: a user namespace takes only a process that has one.
    let runtime = match (&mounted, Means::of_this_process()) {
        (None, Means::Root | Means::UserNamespace) => {
            Some(session::enter_private().attempt(doing)?)
        }
        _ => None,
    };
    let (signals, stop) = session::count_signals()?;
    session::end_at_second_signal(&signals)?;
    let keys = args.key.keys(&args.image.location, signals)?;
    let check = || match stop.load(std::sync::atomic::Ordering::Relaxed) {
        true => Err(Error::new(
            Kind::Interrupted,
            "interrupted; run it again to finish",
        )),
        false => Ok(()),
    };
    let grown = match mounted {
        Some(mounted) => grow_mounted(&args, &location, &mounted, &terminal),
        None => grow_unmounted(
            &args,
            &location,
            keys,
            runtime.as_ref().map(Private::directory),
            &terminal,
            &check,
        ),
    };
    terminal.finish();
    grown.attempt(doing)
}

fn grow_mounted(
    args: &Args,
    location: &Location,
    mounted: &PublicMount,
    terminal: &Terminal,
) -> Result<Ending> {
    let store = image::connect(location, &args.image.link()?)?;
    let sealed = image::inspect(&*store, Access::ReadOnly)?;
    let room = rustix::fs::statvfs(&mounted.mountpoint);
    room.attempt(|| format!("look at {}", mounted.mountpoint.display()))?;
    let now = Now {
        image: sealed.size(),
        begins: sealed.header().segment().offset(),
        // The kernel knows better than what has reached the server by now.
        filesystem: sealed.size(),
    };
    let size = judge(args.size, now, sealed.header(), &*store)?;
    session::fill_mounted(mounted, size - now.begins, terminal)?;
    summary(args, location, &Step { now, size });
    Ok(Ending::Clean)
}

fn grow_unmounted(
    args: &Args,
    location: &Location,
    mut keys: Keys,
    runtime: Option<&Path>,
    terminal: &Terminal,
    check: &dyn Fn() -> Result<()>,
) -> Result<Ending> {
    let store = image::connect(location, &args.image.link()?)?;
    image::require(&*store)?;
    let lease = take_lease(&store, location, args.wait, check)?;
    if let Some(note) = lease.note() {
        terminal.report(Event::Note(note.into()));
    }
    let mut grow = || -> Result<Option<Step>> {
        let sealed = image::inspect(&*store, Access::ReadWrite)?;
        fixed_size(sealed.header())?;
        let (image, begins) = (sealed.size(), sealed.header().segment().offset());
        let opened = unlock(sealed, &mut keys)?;
        let volume = opened.volume.device();
        let now = Now {
            image,
            begins,
            filesystem: begins + filesystem_size(&*volume)?,
        };
        let size = judge(args.size, now, &opened.header, &*store)?;
        check()?;
        if size > image {
            terminal.report(Event::Phase("grow the image"));
            volume
                .resize(size - begins)
                .map_err(|e| too_large(e, size))?;
            volume.flush()?;
        }
        let step = Step { now, size };
        let done = match runtime {
            Some(runtime) => {
                let directory = runtime.join("grow");
                std::fs::create_dir_all(&directory).attempt(|| "make a mountpoint")?;
                let unfinished = image > now.filesystem;
                check()?;
                session::fill_unmounted(volume.clone(), &directory, unfinished, terminal)?;
                Some(step)
            }
            None => None,
        };
        drop(volume);
        opened.volume.close()?;
        Ok(done)
    };
    let grown = grow();
    let released = lease.release();
    let grown = grown?;
    released?;
    terminal.finish();
    match grown {
        Some(step) => {
            summary(args, location, &step);
            Ok(Ending::Clean)
        }
        None => {
            tell!(
                "warning: the image has grown, the filesystem in it has not: that needs root, or \
                 the use of /dev/fuse; run it again there"
            );
            Ok(Ending::Warnings)
        }
    }
}

/// The size in bytes that the image is to have.
fn judge(wanted: Wanted, now: Now, header: &Header, store: &dyn Store) -> Result<u64> {
    fixed_size(header)?;
    let size = target(wanted, now)?;
    if let Some(space) = store.space()? {
        let more = size.saturating_sub(now.image);
        if more > space.free {
            tell!(
                "warning: the image may grow by {}, and {} are free on the server; it is sparse, so \
                 that matters only when it fills",
                Bytes(more),
                Bytes(space.free)
            );
        }
    }
    Ok(size)
}

fn target(wanted: Wanted, now: Now) -> Result<u64> {
    let refuse = |why: String| Err(Error::new(Kind::Usage, why));
    let max = now.begins.saturating_add(mkfs::SIZE_MAX);
    let size = match wanted {
        Wanted::Size(size) => size,
        // From where the filesystem ends: an interrupted growth has begun to do the same.
        Wanted::More(more) => now.filesystem.saturating_add(more),
    };
    if size > max {
        return refuse(format!(
            "{} is more than the {} that an image can have",
            Bytes(size),
            Bytes(max)
        ));
    }
    if size < now.image {
        let why = format!(
            "it has {} ({} bytes) now, and an image never gets smaller: what lies at its end would be lost",
            Bytes(now.image),
            now.image
        );
        let hint = match size < KIB {
            true => "a number alone is one of bytes; write it like 500G or 5T",
            false => "its unused space takes no room on the server after `e2ebak trim`",
        };
        return Err(Error::new(Kind::Usage, why).hint(hint));
    }
    if !size.is_multiple_of(SECTOR) {
        let below = size / SECTOR * SECTOR;
        return refuse(format!(
            "a size of {size} bytes is no multiple of {SECTOR}; {below} is"
        ));
    }
    Ok(size)
}

fn fixed_size(header: &Header) -> Result<()> {
    let segment = header.segment();
    match segment.is_dynamic() {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Unsupported,
            format!(
                "its LUKS2 data segment has a fixed size of {} bytes",
                segment.size()
            ),
        )
        .hint("only an image whose segment is dynamic grows")),
    }
}

fn filesystem_size(volume: &dyn Device) -> Result<u64> {
    let mut begin = [0; 2048];
    volume.read_exact_at(&mut begin, 0)?;
    let unknown = || Error::new(Kind::Unsupported, "the volume holds no sound ext4");
    ext4::size(&begin).ok_or_else(unknown)
}

/// A server's filesystem has its own largest file, which SFTP cannot be asked for.
fn too_large(error: Error, size: u64) -> Error {
    let kind = error.kind();
    if !matches!(kind, Kind::Io | Kind::NoSpace | Kind::Usage) {
        return error;
    }
    let attempt = format!(
        "the server does not take a file of {} ({size} bytes)",
        Bytes(size)
    );
    let hint = "its filesystem may hold no file as large: ext4 with blocks of 4 KiB ends at 16 TiB";
    Error::new(kind, attempt).because(error).hint(hint)
}

fn summary(args: &Args, location: &Location, step: &Step) {
    if args.output.quiet {
        return;
    }
    match step.size == step.now.image && step.now.filesystem + SECTOR > step.now.image {
        true => say!("{location} has {} already", Bytes(step.size)),
        false => say!(
            "{location} has grown from {} to {}",
            Bytes(step.now.filesystem),
            Bytes(step.size)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn now(image: u64, filesystem: u64) -> Now {
        Now {
            image,
            begins: 16 * MIB,
            filesystem,
        }
    }

    #[test]
    fn sizes_are_whole_or_more() {
        assert_eq!("8T".parse(), Ok(Wanted::Size(8 << 40)));
        assert_eq!("+500G".parse(), Ok(Wanted::More(500 << 30)));
        for wrong in ["", "+", "8X", "-5G", "++1G", "+-1G"] {
            assert!(wrong.parse::<Wanted>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_number() {
        let at = now(100 * MIB, 100 * MIB);
        assert_eq!(target(Wanted::Size(100 * MIB), at).ok(), Some(100 * MIB));
        assert_eq!(target(Wanted::More(MIB), at).ok(), Some(101 * MIB));
        for (wanted, said) in [
            (Wanted::Size(99 * MIB), "104857600"),
            (Wanted::Size(101 * MIB + 512), "4096"),
            (Wanted::Size(65 << 40), "65.0 TiB"),
            (Wanted::More(u64::MAX), "64.0 TiB"),
        ] {
            let error = target(wanted, at).unwrap_err();
            assert!(error.report().contains(said), "{}", error.report());
        }
    }

    #[test]
    fn an_interrupted_growth_by_so_much_does_not_add_twice() {
        let interrupted = now(200 * MIB, 100 * MIB);
        assert_eq!(
            target(Wanted::More(100 * MIB), interrupted).ok(),
            Some(200 * MIB)
        );
    }
}
