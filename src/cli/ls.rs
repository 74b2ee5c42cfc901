use std::ffi::OsString;

use crate::cli::args::ImageArgs;
use crate::cli::entry::Form;
use crate::cli::key::KeyArgs;
use crate::cli::look::{Look, What, joined, printable, tell_troubles};
use crate::cli::{Ending, snapshots};
use crate::error::{Attempt, Result};
use crate::ui::say;

/// List files in a snapshot, or the snapshots
///
/// Without SNAPSHOT it lists the snapshots. A directory is listed by the names in it; with -R
/// everything below it, one path a line. Nothing is mounted and nothing is written; an ordinary user
/// can do it. SNAPSHOT is an id, the beginning of one, or `latest`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// What to list; without :PATH the top of the snapshot
    #[arg(value_name = "SNAPSHOT[:PATH]")]
    what: Option<OsString>,

    /// Show type, mode, links, owner, group, size and time
    #[arg(short, long)]
    long: bool,

    /// Everything below, by its path
    #[arg(short = 'R', long)]
    recursive: bool,

    /// Print an object a line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    key: KeyArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let doing = || format!("cannot list files in {}", args.image.location);
    let what = args.what.as_deref().map(What::parse).transpose()?;
    let look = Look::open(&args.image, &args.key).attempt(doing)?;
    let Some(what) = what else {
        return Ok(snapshots::show(&look.catalogue, args.json));
    };
    let form = Form::choose(args.long, args.json);
    let depth = if args.recursive { None } else { Some(1) };
    let tree = look.tree(&what, depth).attempt(doing)?;
    let is_list = !args.recursive && !args.json && tree.is_directory(tree.root());
    for node in tree.walk() {
        if node == tree.root() && tree.is_directory(node) && !args.recursive {
            continue;
        }
        let path = match is_list {
            true => tree.name(node).to_vec(),
            false => joined(&what.path, &tree.path(node)),
        };
        let (inode, metadata) = (tree.inode(node), tree.metadata(node));
        match form {
            Form::Short => say!("{}", printable(&path)),
            form => say!(
                "{}",
                form.line(&look.filesystem, &path, inode, metadata.as_ref())
            ),
        }
    }
    Ok(tell_troubles(&what.path, &tree.troubles))
}
