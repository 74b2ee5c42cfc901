use std::ffi::OsString;
use std::io::{BufWriter, IsTerminal, Write};
use std::sync::Arc;

use crate::browse;
use crate::cli::Ending;
use crate::cli::args::ImageArgs;
use crate::cli::key::KeyArgs;
use crate::cli::look::{Look, What, joined, tell_trouble, tell_troubles};
use crate::error::{Attempt, Error, Kind, Result};
use crate::restore::{Ahead, Plan};
use crate::ui::ContentOutput;

/// Write a path of a snapshot to standard output as a tar archive
///
/// For example `e2ebak dump --tar nas:b.img latest:/home/ann > ann.tar`, or `| tar -x`. Hard links,
/// owners, times and extended attributes are kept (`tar --xattrs --xattrs-include='*'` takes all of
/// them); holes become zeros. Nothing is mounted and nothing is written on the server; an ordinary
/// user can do it.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// What to write
    #[arg(value_name = "SNAPSHOT:PATH")]
    what: OsString,

    /// As a tar archive; the only format there is
    #[arg(long, required = true)]
    tar: bool,

    #[command(flatten)]
    key: KeyArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let what = What::parse(&args.what)?;
    let doing = || {
        let what = args.what.display();
        format!(
            "cannot write {what} of {} as an archive",
            args.image.location
        )
    };
    if std::io::stdout().is_terminal() {
        let why = "an archive is nothing for a terminal";
        return Err(Error::new(Kind::Usage, why).hint("add `> FILE.tar` or `| tar -t`"));
    }
    let look = Look::open(&args.image, &args.key).attempt(doing)?;
    let snapshot = look.snapshot(&what.snapshot).attempt(doing)?;
    let tree = look.tree(&what, None).attempt(doing)?;
    let plan = Arc::new(Plan::of_archive(&tree));
    let ahead = Ahead::start(&look.filesystem, plan, Arc::default());
    let prefix = what
        .path
        .split(|byte| *byte == b'/')
        .rfind(|name| !name.is_empty());
    let prefix = prefix.filter(|name| *name != b"." && *name != b"..");
    let mut out = BufWriter::with_capacity(1 << 20, ContentOutput::new());
    let mut ending = tell_troubles(&what.path, &tree.troubles);
    let mut trouble = |path: &[u8], error: Error| {
        tell_trouble(&joined(b"", path), &error);
        ending = Ending::Warnings;
    };
    let prefix = prefix.unwrap_or_default();
    let written = browse::write_tar(
        &look.filesystem,
        &tree,
        prefix,
        &mut out,
        &ahead,
        &mut trouble,
    );
    let written = written.and_then(|()| Ok(out.flush()?));
    look.unless_deleted(&[snapshot], written).attempt(doing)?;
    Ok(ending)
}
