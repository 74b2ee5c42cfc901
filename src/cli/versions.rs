use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use serde_json::{Value, json};

use crate::browse;
use crate::cli::Ending;
use crate::cli::args::ImageArgs;
use crate::cli::entry::{kind_name, local_time, merge, metadata_fields};
use crate::cli::key::KeyArgs;
use crate::cli::look::{Look, mode_octal, printable};
use crate::error::{Attempt, Error, Kind, Result};
use crate::restore::{FileKind, Metadata, metadata};
use crate::snapshot::Id;
use crate::ui::{Table, say, tell};

/// Show the versions of a path in all snapshots
///
/// One row a version: the snapshots from the first to the last that hold it in a row, and what it
/// was. Two are the same version if type, content (judged by size and time, as rsync does), mode and
/// owner are. Nothing is mounted and nothing is written; an ordinary user can do it.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// The path, from the top of the snapshots
    #[arg(value_name = "PATH")]
    path: OsString,

    /// Print an array of objects
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    key: KeyArgs,
}

struct Version {
    first: Id,
    last: Id,
    snapshots: u64,
    /// Nothing: the path is not there.
    metadata: Option<Metadata>,
}

pub fn run(args: Args) -> Result<Ending> {
    let path = args.path.clone().into_vec();
    let doing = || {
        let path = printable(&path);
        format!(
            "cannot tell the versions of {path} in {}",
            args.image.location
        )
    };
    let look = Look::open(&args.image, &args.key).attempt(doing)?;
    let mut versions: Vec<Version> = Vec::new();
    let mut ending = Ending::Clean;
    let mut nowhere = None;
    for found in &look.catalogue.complete {
        let here = || -> Result<Metadata> {
            let root = look.directory(found.id)?;
            let inode = look.filesystem.resolve_itself(root, &path)?;
            metadata(&look.filesystem.inode(inode)?)
        };
        let now = match here() {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == Kind::NotFound => {
                nowhere = Some(error);
                None
            }
            Err(error) => {
                tell!("warning: {}: {}", found.id, error.chain().join(": "));
                ending = Ending::Warnings;
                continue;
            }
        };
        let is_same = match versions.last().map(|version| version.metadata) {
            Some(Some(before)) => match now {
                Some(now) => browse::is_same(&look.filesystem, &before, &now).attempt(doing)?,
                None => false,
            },
            Some(None) => now.is_none(),
            None => false,
        };
        match versions.last_mut().filter(|_| is_same) {
            Some(version) => {
                version.last = found.id;
                version.snapshots += 1;
            }
            None => versions.push(Version {
                first: found.id,
                last: found.id,
                snapshots: 1,
                metadata: now,
            }),
        }
    }
    if versions.iter().all(|version| version.metadata.is_none()) {
        let why = Error::new(Kind::NotFound, "no snapshot has it");
        let why = match nowhere {
            Some(error) => why.because(error),
            None => why,
        };
        return Err(why).attempt(doing);
    }
    match args.json {
        true => say!("{:#}", Value::from_iter(versions.iter().map(object))),
        false => print(&versions),
    }
    Ok(ending)
}

fn object(version: &Version) -> Value {
    let mut object = json!({
        "first": version.first.to_string(), "last": version.last.to_string(),
        "snapshots": version.snapshots, "present": version.metadata.is_some(),
    });
    if let Some(metadata) = &version.metadata {
        merge(&mut object, metadata_fields(metadata));
    }
    object
}

fn print(versions: &[Version]) {
    let headings = [
        "first",
        "last",
        ">snapshots",
        "type",
        ">size",
        "modified",
        "mode",
    ];
    let mut table = Table::new(&headings);
    for version in versions {
        let mut row = vec![
            version.first.to_string(),
            version.last.to_string(),
            version.snapshots.to_string(),
        ];
        match &version.metadata {
            None => row.push("absent".into()),
            Some(metadata) => row.extend([
                kind_name(metadata.kind).into(),
                match metadata.kind {
                    FileKind::Regular => metadata.size.to_string(),
                    _ => String::new(),
                },
                local_time(metadata.modified),
                mode_octal(metadata),
            ]),
        }
        table.row(row);
    }
    say!("{}", table.render().trim_end());
}
