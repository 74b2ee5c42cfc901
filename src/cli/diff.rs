use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use serde_json::json;

use crate::browse::{self, Change};
use crate::cli::Ending;
use crate::cli::args::ImageArgs;
use crate::cli::entry::{kind_name, local_time, merge, metadata_fields, path_fields};
use crate::cli::key::KeyArgs;
use crate::cli::look::{Look, What, joined, mode_octal, printable, tell_troubles};
use crate::error::{Attempt, Error, Kind, Result};
use crate::restore::{FileKind, Metadata, Tree};
use crate::ui::say;
use crate::units::Bytes;

/// Show what changed between two snapshots
///
/// One line a path: `+` added, `-` removed, `M` other content (judged by size and time, as rsync
/// does), `T` another type, `A` only mode or owner. Nothing is mounted and nothing is written; an
/// ordinary user can do it.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// The older snapshot
    #[arg(value_name = "SNAPSHOT1")]
    old: String,

    /// The newer snapshot
    #[arg(value_name = "SNAPSHOT2")]
    new: String,

    /// Only what is below this path
    #[arg(value_name = "PATH")]
    path: Option<OsString>,

    /// Print an object a line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    key: KeyArgs,
}

#[derive(Default)]
struct Counts {
    added: u64,
    removed: u64,
    changed: u64,
}

pub fn run(args: Args) -> Result<Ending> {
    let doing = || format!("cannot compare snapshots in {}", args.image.location);
    let path = args.path.clone().unwrap_or_else(|| "/".into()).into_vec();
    let look = Look::open(&args.image, &args.key).attempt(doing)?;
    let tree = |snapshot: &str| -> Result<Option<Tree>> {
        let what = What {
            snapshot: snapshot.into(),
            path: path.clone(),
        };
        look.snapshot(snapshot)?;
        match look.tree(&what, None) {
            Ok(tree) => Ok(Some(tree)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    };
    let old = tree(&args.old).attempt(doing)?;
    let new = tree(&args.new).attempt(doing)?;
    let mut counts = Counts::default();
    let mut tell = |below: &[u8], change: Change| {
        match change {
            Change::Added(_) => counts.added += 1,
            Change::Removed(_) => counts.removed += 1,
            _ => counts.changed += 1,
        }
        let path = joined(&path, below);
        match args.json {
            true => say!("{}", object(&path, change)),
            false => say!("{}", line(&path, change)),
        }
        Ok(())
    };
    match (&old, &new) {
        (Some(old), Some(new)) => {
            browse::diff(&look.filesystem, old, new, &mut tell).attempt(doing)?;
        }
        (None, None) => {
            let why = format!("neither snapshot has {}", printable(&path));
            return Err(Error::new(Kind::NotFound, why)).attempt(doing);
        }
        (Some(tree), None) => each(tree, Change::Removed, &mut tell)?,
        (None, Some(tree)) => each(tree, Change::Added, &mut tell)?,
    }
    if !args.json {
        let Counts {
            added,
            removed,
            changed,
        } = counts;
        say!("{added} added, {removed} removed, {changed} changed");
    }
    let mut ending = Ending::Clean;
    for tree in [old, new].iter().flatten() {
        if tell_troubles(&path, &tree.troubles) == Ending::Warnings {
            ending = Ending::Warnings;
        }
    }
    Ok(ending)
}

/// All of a tree that the other snapshot does not have.
fn each(
    tree: &Tree,
    change: impl Fn(Metadata) -> Change,
    tell: &mut dyn FnMut(&[u8], Change) -> Result<()>,
) -> Result<()> {
    for node in tree.walk() {
        if let Some(metadata) = tree.metadata(node) {
            tell(&tree.path(node), change(metadata))?;
        }
    }
    Ok(())
}

fn line(path: &[u8], change: Change) -> String {
    let path = printable(path);
    match change {
        Change::Added(new) => format!("+ {path}{}", slash(&new)),
        Change::Removed(old) => format!("- {path}{}", slash(&old)),
        Change::Replaced(old, new) => {
            format!(
                "T {path}  ({} -> {})",
                kind_name(old.kind),
                kind_name(new.kind)
            )
        }
        Change::Content(old, new) => format!("M {path}  ({})", differences(&old, &new)),
        Change::Attributes(old, new) => format!("A {path}  ({})", differences(&old, &new)),
    }
}

fn slash(metadata: &Metadata) -> &'static str {
    match metadata.kind {
        FileKind::Directory => "/",
        _ => "",
    }
}

fn differences(old: &Metadata, new: &Metadata) -> String {
    let mut parts = Vec::new();
    if old.size != new.size && old.kind == FileKind::Regular {
        parts.push(format!("{} -> {}", Bytes(old.size), Bytes(new.size)));
    } else if old.modified != new.modified && old.kind == FileKind::Regular {
        let (old, new) = (local_time(old.modified), local_time(new.modified));
        parts.push(format!("{old} -> {new}"));
    }
    if old.kind == FileKind::Symlink {
        parts.push("leads elsewhere".into());
    }
    if old.device != new.device {
        parts.push("another device".into());
    }
    if old.mode != new.mode {
        parts.push(format!("mode {} -> {}", mode_octal(old), mode_octal(new)));
    }
    if (old.uid, old.gid) != (new.uid, new.gid) {
        parts.push(format!(
            "owner {}:{} -> {}:{}",
            old.uid, old.gid, new.uid, new.gid
        ));
    }
    parts.join(", ")
}

fn object(path: &[u8], change: Change) -> serde_json::Value {
    let (name, old, new) = match change {
        Change::Added(new) => ("added", None, Some(new)),
        Change::Removed(old) => ("removed", Some(old), None),
        Change::Replaced(old, new) => ("type", Some(old), Some(new)),
        Change::Content(old, new) => ("content", Some(old), Some(new)),
        Change::Attributes(old, new) => ("attributes", Some(old), Some(new)),
    };
    let mut object = path_fields(path);
    let fields = json!({
        "change": name,
        "old": old.as_ref().map(metadata_fields), "new": new.as_ref().map(metadata_fields),
    });
    merge(&mut object, fields);
    object
}
