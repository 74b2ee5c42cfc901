mod job; //     one path
mod pretend; // the same without doing it
mod sum; //     what is told at the end

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::ValueEnum;

use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::key::KeyArgs;
use crate::cli::look::{Look, What};
use crate::cli::{Ending, mounted, unmounted};
use crate::error::{Attempt, Error, Kind, Result};
use crate::restore::{self, MountedTree, Options, Overwrite};
use crate::session;
use crate::snapshot::{Catalogue, DIRECTORY, MountedFiles};
use crate::ui::{Style, Terminal, tell};
use job::{Job, Links};
use sum::Sum;

/// Copy paths out of snapshots
///
/// As `cp -a`: into DEST when it is a directory, else as DEST. Nothing that exists is replaced
/// without --overwrite, and nothing outside DEST is written. SNAPSHOT is an id, the beginning of
/// one, or `latest`.
///
/// Nothing is mounted: an ordinary user can do it, wherever the server can be reached. What only
/// root may do, as giving files to others, is left out and counted. A run that was interrupted is
/// taken up again with --overwrite=if-changed, and as SNAPSHOT:PATH/. if it was the one that made
/// DEST.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// What to restore; without :PATH everything in the snapshot
    #[arg(value_name = "SNAPSHOT[:PATH]", required = true)]
    what: Vec<OsString>,

    /// Where to
    #[arg(value_name = "DEST")]
    destination: PathBuf,

    /// What happens to files that exist; without =WHEN it means always
    #[arg(
        long, value_name = "WHEN", value_enum, require_equals = true,
        num_args = 0..=1, default_value = "never", default_missing_value = "always"
    )]
    overwrite: OverwriteArg,

    /// Only say what would be done; nothing is written
    #[arg(short = 'n', long)]
    dry_run: bool,

    /// Only what is named like this, or in a directory that is; with *, ? and [a-z]; with a slash
    /// in it, the path below what is restored is meant; may be repeated
    #[arg(long, value_name = "PATTERN")]
    include: Vec<OsString>,

    /// Not what is named like this, nor what is in it; may be repeated
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<OsString>,

    /// Leave out so many names at the beginning of each path, as tar's --strip-components
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "mount")]
    strip: u32,

    /// Read everything back and compare it with the image
    #[arg(long)]
    verify: bool,

    /// Owners and groups by their numbers; they always are, for the image knows no names
    #[arg(long)]
    numeric_ids: bool,

    /// Let the kernel read the filesystem: mounts the image where nobody sees it, for filesystems
    /// with features that this program does not know
    #[arg(long, conflicts_with_all = ["dry_run", "include", "exclude"])]
    mount: bool,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OverwriteArg {
    /// They stay, and are reported
    Never,
    /// They are replaced
    Always,
    /// They are replaced unless type, size and time say that they are the same already
    IfChanged,
}

impl Args {
    fn overwrite(&self) -> Overwrite {
        match self.overwrite {
            OverwriteArg::Never => Overwrite::Never,
            OverwriteArg::Always => Overwrite::Always,
            OverwriteArg::IfChanged => Overwrite::IfChanged,
        }
    }
}

pub fn run(args: Args) -> Result<Ending> {
    args.image.location()?;
    let whats: Result<Vec<What>> = args.what.iter().map(|what| What::parse(what)).collect();
    let whats = whats?;
    if whats.len() > 1 && !args.destination.is_dir() {
        let why = format!("{} is no directory", args.destination.display());
        return Err(Error::new(Kind::Usage, why).hint("several paths go into a directory"));
    }
    let was_there = args.destination.is_dir();
    if !was_there {
        check_above(&args.destination)?;
    }
    let mut sum = Sum::default();
    let all: Vec<_> = args
        .what
        .iter()
        .map(|what| what.display().to_string())
        .collect();
    let doing = || {
        format!(
            "cannot restore {} from {}",
            all.join(", "),
            args.image.location
        )
    };
    let terminal = Arc::new(Terminal::new(Style::choose(args.output.quiet, false)));
    let done = match args.mount {
        true => through_mount(&args, &whats, &terminal, &mut sum),
        false => without_mount(&args, &whats, &terminal, &mut sum),
    };
    terminal.finish();
    done.map_err(|error| sum.with_rest(&args, was_there, error))
        .attempt(doing)?;
    Ok(sum.summary(&args))
}

/// Before anybody types a passphrase: only DEST itself is made, in a directory that exists.
fn check_above(dest: &Path) -> Result<()> {
    let above = match dest.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        _ => Path::new("."),
    };
    match above.is_dir() {
        true => Ok(()),
        false => {
            let why = format!("there is no directory {}", above.display());
            Err(Error::new(Kind::NotFound, why).hint("make it first; only DEST itself is made"))
        }
    }
}

fn through_mount(
    args: &Args,
    whats: &[What],
    terminal: &Arc<Terminal>,
    sum: &mut Sum,
) -> Result<()> {
    let (image, key, wait) = (&args.image, &args.key, Duration::ZERO);
    mounted::with(image, key, true, wait, terminal, |inside| {
        let catalogue = Catalogue::load(&mut MountedFiles(inside.root.into()))?;
        let mut links = Links::default();
        for what in whats {
            let id = catalogue.find(&what.snapshot)?.id;
            let mut tree = MountedTree::open(&inside.root.join(DIRECTORY).join(id.to_string()))?;
            let options = Options {
                overwrite: args.overwrite(),
                wants: None,
                totals: None,
                stop: inside.stop,
            };
            let (from, dest) = (PathBuf::from(what.path()), &args.destination);
            sum.has_begun = true;
            let links = links.entry(id).or_default();
            let outcome =
                restore::copy_linking(&mut tree, &from, dest, options, links, inside.terminal)?;
            let landing = outcome.landing.clone();
            sum.add(outcome);
            if args.verify {
                let found = restore::verify(&mut tree, &from, &landing, options, inside.terminal)?;
                sum.different += found.count();
            }
        }
        Ok(())
    })
}

fn without_mount(args: &Args, whats: &[What], terminal: &Terminal, sum: &mut Sum) -> Result<()> {
    let (signals, stop) = session::count_signals()?;
    let begun = Arc::new(AtomicBool::new(false));
    session::end_at_signals_until(&signals, &begun, || {
        tell!("stopping; what is in place is whole; a second signal ends at once");
    })?;
    let mut keys = args.key.keys(&args.image.location, signals)?;
    let location = args.image.location()?;
    let look = Look::over(unmounted::open(&location, &args.image.link()?, &mut keys)?)?;
    let mut links = Links::default();
    let mut read = Vec::new();
    let mut restore = |what: &What| {
        let (id, root) = look.snapshot(&what.snapshot)?;
        if !args.dry_run && !read.contains(&(id, root)) {
            read.push((id, root));
        }
        let mut job = Job {
            args,
            look: &look,
            root,
            what,
            links: links.entry(id).or_default(),
            stop: &stop,
            begun: &begun,
            terminal,
            sum: &mut *sum,
        };
        job.run()
    };
    let restored = whats.iter().try_for_each(&mut restore);
    look.unless_deleted(&read, restored)
}
