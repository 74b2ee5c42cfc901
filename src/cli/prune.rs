use std::sync::Arc;
use std::time::Duration;

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::keep::{KeepArgs, goes};
use crate::cli::key::KeyArgs;
use crate::cli::snapshots::local_time;
use crate::cli::trim::{self, TrimArgs};
use crate::cli::{mounted, unmounted};
use crate::error::{Attempt, Error, Kind, Result};
use crate::retention::Reason;
use crate::session;
use crate::snapshot::{self, Catalogue, Deleted, Group, MountedFiles};
use crate::ui::{Style, Table, Terminal};
use crate::ui::{say, tell};
use crate::units::parse_duration;

/// Delete the snapshots that no --keep rule keeps
///
/// Each rule goes from the newest snapshot to the oldest and keeps the newest of every period; a
/// period without one does not count. A snapshot that any rule keeps stays, a pinned one
/// (`e2ebak pin`) always, and the newest too. Interrupted and damaged ones count for nothing and
/// are left alone. Days, weeks and so on are those of the local time zone (TZ).
///
/// The space is free inside the image at once, and on the server after `e2ebak trim`. Interrupted,
/// the snapshots are deleted already, and the next prune frees the rest of their space.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    #[command(flatten)]
    keep: KeepArgs,

    /// Print what would be done and why, and do nothing
    #[arg(short = 'n', long)]
    dry_run: bool,

    /// Then give the space back to the server, as `e2ebak trim`
    #[arg(long)]
    trim: bool,

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

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let doing = || format!("cannot prune {location}");
    if args.keep.is_empty() {
        let error = Error::new(Kind::Usage, "no --keep-... option keeps anything");
        return Err(error.hint("for example --keep-daily 7 --keep-weekly 4")).attempt(doing);
    }
    if args.dry_run {
        return dry_run(&args).attempt(doing);
    }
    let terminal = Arc::new(Terminal::new(Style::choose(args.output.quiet, false)));
    let work = |inside: &mounted::Inside| {
        let catalogue = Catalogue::load(&mut MountedFiles(inside.root.into()))?;
        let groups = args.keep.judge(&catalogue)?;
        if !args.output.quiet {
            inside.terminal.suspend(|| print(&groups));
        }
        let deleted = snapshot::delete(inside.root, &goes(&groups), inside.stop, inside.terminal)?;
        Ok((catalogue, deleted))
    };
    let pruned = mounted::with(&args.image, &args.key, false, args.wait, &terminal, work);
    let (catalogue, deleted) = pruned.attempt(doing)?;
    if !args.output.quiet {
        summary(&catalogue, deleted);
    }
    if args.trim {
        let wait = args.wait;
        trim::perform(&args.image, &args.key, &args.how, wait, args.output.quiet)?;
    }
    Ok(damaged(&catalogue))
}

fn dry_run(args: &Args) -> Result<Ending> {
    let location = args.image.location()?;
    let signals = session::end_at_signals()?;
    let mut keys = args.key.keys(&args.image.location, signals)?;
    let unmounted = unmounted::open(&location, &args.image.link()?, &mut keys)?;
    let mut files = unmounted.filesystem;
    let catalogue = Catalogue::load(&mut files)?;
    let groups = args.keep.judge(&catalogue)?;
    print(&groups);
    let count = goes(&groups).len();
    let stay = catalogue.complete.len() - count;
    say!("would delete {}; {stay} would stay", snapshots(count));
    Ok(damaged(&catalogue))
}

fn print(groups: &[Group]) {
    for group in groups {
        if let (Some(name), true) = (&group.name, groups.len() > 1) {
            say!("{}", name.escape_debug());
        }
        let mut table = Table::new(&["", "id", "when", "why"]);
        for snapshot in &group.snapshots {
            let (fate, why) = match snapshot.reasons[..] {
                [] => ("delete", "no rule keeps it".into()),
                ref reasons => ("keep", words(reasons)),
            };
            let (id, when) = (snapshot.id.to_string(), local_time(snapshot.id));
            table.row(vec![fate.into(), id, when, why]);
        }
        say!("{}", table.render().trim_end());
    }
}

fn words(reasons: &[Reason]) -> String {
    let words: Vec<String> = reasons.iter().map(Reason::to_string).collect();
    words.join(", ")
}

fn snapshots(count: usize) -> String {
    match count {
        1 => "1 snapshot".into(),
        count => format!("{count} snapshots"),
    }
}

fn summary(catalogue: &Catalogue, deleted: Deleted) {
    if deleted.taken_up > 0 {
        let begun = snapshots(deleted.taken_up);
        say!("finished deleting {begun} of an interrupted run");
    }
    let stay = catalogue.complete.len() - deleted.snapshots;
    let (count, files) = (snapshots(deleted.snapshots), deleted.files);
    match deleted.snapshots {
        0 => say!("nothing to delete; {} stay", snapshots(stay)),
        _ => say!("deleted {count} ({files} files); {stay} stay"),
    }
}

fn damaged(catalogue: &Catalogue) -> Ending {
    for (id, why) in &catalogue.damaged {
        tell!("warning: {id} does not count as a snapshot and is left as it is: {why}");
    }
    match catalogue.damaged.is_empty() {
        true => Ending::Clean,
        false => Ending::Warnings,
    }
}
