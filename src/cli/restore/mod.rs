use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use clap::ValueEnum;

use crate::browse::{Pattern, Selection};
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::key::KeyArgs;
use crate::cli::look::{Look, What, joined, printable};
use crate::cli::{Ending, mounted, unmounted};
use crate::error::{Attempt, Error, Kind, Result};
use crate::restore::{
    self, Ahead, FileKind, Listed, MountedTree, Node, Options, Outcome, Overwrite, Tree,
    UnmountedTree, Wanted,
};
use crate::session;
use crate::snapshot::{Catalogue, DIRECTORY, MountedFiles};
use crate::ui::{Style, Terminal};
use crate::ui::{say, tell};
use crate::units::Bytes;

/// Copy paths out of snapshots
///
/// As `cp -a`: into DEST when it is a directory, else as DEST. Nothing that exists is replaced
/// without --overwrite, and nothing outside DEST is written. SNAPSHOT is an id, the beginning of
/// one, or `latest`.
///
/// Nothing is mounted: an ordinary user can do it, wherever the server can be reached. What only
/// root may do, as giving files to others, is left out and counted. A run that was interrupted is
/// taken up again with --overwrite=if-changed.
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

    /// Leave out so many names at the beginning of each path, as tar's --strip-components. Hard
    /// links between what is then restored apart become copies
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
    done.attempt(doing)?;
    Ok(sum.summary(&args))
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
            sum.add(restore::copy(
                &mut tree,
                &from,
                dest,
                options,
                inside.terminal,
            )?);
            if args.verify {
                let found = restore::verify(&mut tree, &from, dest, options, inside.terminal)?;
                sum.different += found.count();
            }
        }
        Ok(())
    })
}

fn without_mount(args: &Args, whats: &[What], terminal: &Terminal, sum: &mut Sum) -> Result<()> {
    let (signals, stop) = session::count_signals()?;
    end_at_second(signals.clone())?;
    let mut keys = args.key.keys(&args.image.location, signals)?;
    let location = args.image.location()?;
    let filesystem = unmounted::open(&location, &args.image.link()?, &mut keys)?;
    let look = Look::over(filesystem)?;
    for what in whats {
        let (_, root) = look.snapshot(&what.snapshot)?;
        let mut job = Job {
            args,
            look: &look,
            root,
            what,
            stop: &stop,
            terminal,
            sum,
        };
        job.run()?;
    }
    Ok(())
}

/// The first signal asks to stop; whoever sends a second one does not want to wait for the server.
fn end_at_second(signals: Arc<AtomicUsize>) -> Result<()> {
    let watch = move || {
        while signals.load(Ordering::Relaxed) < 2 {
            std::thread::sleep(Duration::from_millis(100));
        }
        std::process::exit(i32::from(Kind::Interrupted.exit_code()));
    };
    let thread = std::thread::Builder::new().name("signals-end".into());
    thread.spawn(watch).attempt(|| "start a thread").map(drop)
}

/// One path that is restored.
struct Job<'a> {
    args: &'a Args,
    look: &'a Look,
    root: u32,
    what: &'a What,
    stop: &'a AtomicBool,
    terminal: &'a Terminal,
    sum: &'a mut Sum,
}

impl Job<'_> {
    fn run(&mut self) -> Result<()> {
        let patterns = |texts: &[OsString]| -> Vec<Pattern> {
            texts
                .iter()
                .map(|text| Pattern::new(text.as_bytes()))
                .collect()
        };
        let top = self
            .look
            .filesystem
            .resolve_itself(self.root, &self.what.path)?;
        let tree = Tree::load(&self.look.filesystem, top, None)?;
        let (include, exclude) = (patterns(&self.args.include), patterns(&self.args.exclude));
        let selection = Selection::new(&tree, &include, &exclude);
        if self.args.strip == 0 {
            let from = self.what.path.clone();
            return self.part(&tree, &selection, tree.root(), &from);
        }
        // As many names as the path has itself are left out from the first.
        let own = self.what.path.split(|byte| *byte == b'/');
        let own = u32::from(own.filter(|n| !matches!(*n, b"" | b"." | b"..")).count() > 0);
        let mut parts = vec![(tree.root(), own)];
        while let Some((node, depth)) = parts.pop() {
            let path = joined(&self.what.path, &tree.path(node));
            if depth == self.args.strip && tree.is_directory(node) {
                let inside = [&*path, b"/."].concat();
                self.part(&tree, &selection, node, &inside)?;
            } else if depth < self.args.strip {
                let wanted = tree.children(node).filter(|child| selection.wants(*child));
                parts.extend(wanted.rev().map(|child| (child, depth + 1)));
            }
        }
        Ok(())
    }

    /// Restores `node` of the tree, which is `from` in the snapshot.
    fn part(&mut self, tree: &Tree, selection: &Selection, node: Node, from: &[u8]) -> Result<()> {
        let (args, filesystem) = (self.args, &self.look.filesystem);
        if args.dry_run {
            self.pretend(tree, selection, node, from);
            return Ok(());
        }
        let order = in_order(tree, selection, node);
        let bytes = order.iter().map(|file| file.size).sum();
        let wants = |path: &[u8]| {
            let mut at = Some(node);
            for name in path.split(|byte| *byte == b'/') {
                at = at.and_then(|node| tree.child(node, name));
            }
            // What the tree could not hold meets its error in the copier, which tells it.
            at.is_none_or(|node| selection.wants(node))
        };
        let options = Options {
            overwrite: args.overwrite(),
            wants: Some(&wants),
            totals: Some((count(tree, selection, node), bytes)),
            stop: self.stop,
        };
        let from = PathBuf::from(OsString::from_vec(from.to_vec()));
        let source = || {
            let ahead = Ahead::start(filesystem, order.clone());
            UnmountedTree::new(Arc::clone(filesystem), self.root).with_ahead(ahead)
        };
        let dest = &args.destination;
        let outcome = restore::copy(&mut source(), &from, dest, options, self.terminal)?;
        self.sum.add(outcome);
        if args.verify {
            let found = restore::verify(&mut source(), &from, dest, options, self.terminal)?;
            self.sum.different += found.count();
        }
        Ok(())
    }

    /// Says what would happen to each file.
    fn pretend(&mut self, tree: &Tree, selection: &Selection, top: Node, from: &[u8]) {
        let name = from.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let name = (!matches!(name, b"" | b"." | b"..")).then(|| OsStr::from_bytes(name));
        let dest = &self.args.destination;
        let base = match name {
            Some(name) if dest.is_dir() => dest.join(name),
            _ => dest.clone(),
        };
        let skipped = tree.path(top).len();
        let mut stack = vec![top];
        while let Some(node) = stack.pop() {
            if !selection.wants(node) {
                continue;
            }
            stack.extend(tree.children(node).rev());
            let path = tree.path(node);
            let below = path.get(skipped..).unwrap_or_default();
            let below = below.strip_prefix(b"/").unwrap_or(below);
            let to = match below.is_empty() {
                true => base.clone(),
                false => base.join(OsStr::from_bytes(below)),
            };
            self.pretend_one(tree, node, &to);
        }
    }

    fn pretend_one(&mut self, tree: &Tree, node: Node, to: &Path) {
        let shown = printable(to.as_os_str().as_bytes());
        let Some(metadata) = tree.metadata(node) else {
            self.sum.unreadable += 1;
            say!("unreadable {shown}");
            return;
        };
        let existing = to.symlink_metadata().ok();
        if metadata.kind == FileKind::Directory {
            if existing.is_none() {
                say!("new        {shown}/");
            }
            self.sum.total.directories += 1;
            return;
        }
        let is_same = |found: &std::fs::Metadata| {
            use std::os::unix::fs::MetadataExt;
            found.is_file()
                && metadata.kind == FileKind::Regular
                && found.len() == metadata.size
                && found.mtime() == metadata.modified.seconds
                && found.mtime_nsec() == i64::from(metadata.modified.nanoseconds)
        };
        let word = match (&existing, self.args.overwrite()) {
            (None, _) => "new",
            (Some(_), Overwrite::Never) => "keep",
            (Some(found), Overwrite::IfChanged) if is_same(found) => "unchanged",
            (Some(_), _) => "replace",
        };
        if matches!(word, "new" | "replace") {
            self.sum.total.files += 1;
            if metadata.kind == FileKind::Regular {
                self.sum.total.bytes += metadata.size;
            }
        }
        say!("{word:<10} {shown}");
    }
}

/// Files with content in the order in which the copier comes to them: by their inodes, each
/// directory's when its turn comes.
fn in_order(tree: &Tree, selection: &Selection, top: Node) -> Vec<Wanted> {
    let mut files = Vec::new();
    let mut stack = vec![top];
    while let Some(node) = stack.pop() {
        if !selection.wants(node) {
            continue;
        }
        let mut children: Vec<Node> = tree.children(node).collect();
        children.sort_by_key(|child| std::cmp::Reverse(tree.inode(*child)));
        stack.extend(children);
        let regular = tree.metadata(node).filter(|m| m.kind == FileKind::Regular);
        files.extend(regular.filter(|m| m.size > 0).map(|metadata| Wanted {
            inode: tree.inode(node),
            size: metadata.size,
        }));
    }
    files
}

/// How many names that are no directories will be made.
fn count(tree: &Tree, selection: &Selection, top: Node) -> u64 {
    let mut files = 0;
    let mut stack = vec![top];
    while let Some(node) = stack.pop() {
        if selection.wants(node) {
            files += u64::from(!tree.is_directory(node));
            stack.extend(tree.children(node));
        }
    }
    files
}

/// What all copies together did.
#[derive(Default)]
struct Sum {
    total: Outcome,
    existing: Vec<String>,
    existing_count: u64,
    errors: u64,
    /// Files that `--verify` found to differ.
    different: u64,
    /// In a dry run.
    unreadable: u64,
}

impl Sum {
    fn add(&mut self, outcome: Outcome) {
        let total = &mut self.total;
        total.files += outcome.files;
        total.directories += outcome.directories;
        total.bytes += outcome.bytes;
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

    fn summary(&self, args: &Args) -> Ending {
        let total = &self.total;
        if !args.output.quiet {
            say!(
                "{} {} files and {} directories, {}",
                if args.dry_run {
                    "would restore"
                } else {
                    "restored"
                },
                total.files,
                total.directories,
                Bytes(total.bytes)
            );
            if total.unchanged > 0 {
                say!(
                    "  note: {} files were there already, unchanged",
                    total.unchanged
                );
            }
            notes(total);
        }
        if self.existing_count > 0 {
            tell!(
                "warning: {} files that exist were left as they are (--overwrite replaces them):",
                self.existing_count
            );
            list(self.existing.iter(), self.existing_count);
        }
        // Each was reported when it happened.
        for (count, what) in [
            (self.errors, "could not be restored as they were"),
            (self.different, "are not what was restored"),
            (self.unreadable, "cannot be read"),
        ] {
            if count > 0 {
                tell!("warning: {count} files {what}");
            }
        }
        if args.verify && self.different == 0 && !args.output.quiet {
            say!("  note: everything was read back and compared");
        }
        match self.existing_count + self.errors + self.different + self.unreadable {
            0 => Ending::Clean,
            _ => Ending::Warnings,
        }
    }
}

/// What was passed over as `cp -a` passes over it.
fn notes(outcome: &Outcome) {
    let lost = outcome.shortfall;
    for (count, what) in [
        (
            lost.owners,
            "belong to you, because only root can give files away",
        ),
        (
            lost.attributes,
            "extended attributes or ACLs could not be set here",
        ),
        (
            lost.hard_links,
            "hard links became files of their own, because the filesystem has none",
        ),
    ] {
        if count > 0 {
            say!("  note: {count} {what}");
        }
    }
}

/// A name may hold anything; what is printed stays on its line.
fn list<'a>(lines: impl Iterator<Item = &'a String>, count: u64) {
    const SHOWN: usize = 20;
    for line in lines.take(SHOWN) {
        tell!("  {}", line.escape_debug());
    }
    if count > SHOWN as u64 {
        tell!("  and {} more", count - SHOWN as u64);
    }
}
