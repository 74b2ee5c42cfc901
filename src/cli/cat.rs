use std::ffi::OsString;
use std::io::Write;

use crate::cli::Ending;
use crate::cli::args::ImageArgs;
use crate::cli::key::KeyArgs;
use crate::cli::look::{Look, What, printable};
use crate::error::{Attempt, Error, Kind, Result};
use crate::restore::{Content, FileKind, Piece, metadata};
use crate::snapshot::Id;
use crate::ui::ContentOutput;

/// Read and written at once.
const PIECE_BYTES: usize = 256 << 10;

/// Print the content of files in a snapshot
///
/// Symbolic links are followed inside the snapshot. Nothing is mounted and nothing is written; an
/// ordinary user can do it.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// The files
    #[arg(value_name = "SNAPSHOT:PATH", required = true)]
    what: Vec<OsString>,

    #[command(flatten)]
    key: KeyArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = &args.image.location;
    let whats: Result<Vec<What>> = args.what.iter().map(|what| What::parse(what)).collect();
    let whats = whats?;
    let look = Look::open(&args.image, &args.key)
        .attempt(|| format!("cannot read files in {location}"))?;
    let mut read = Vec::new();
    let printed = whats.iter().try_for_each(|what| {
        print(&look, what, &mut read).attempt(|| {
            let path = printable(&what.path);
            format!("cannot read {}:{path} in {location}", what.snapshot)
        })
    });
    look.unless_deleted(&read, printed).map(|()| Ending::Clean)
}

/// Adds the snapshot to those that were read.
fn print(look: &Look, what: &What, read: &mut Vec<(Id, u32)>) -> Result<()> {
    let (id, root) = look.snapshot(&what.snapshot)?;
    if !read.contains(&(id, root)) {
        read.push((id, root));
    }
    let inode = look.filesystem.resolve(root, &what.path)?;
    let inode = look.filesystem.inode(inode)?;
    if metadata(&inode)?.kind != FileKind::Regular {
        return Err(Error::new(Kind::Usage, "it is not a regular file"));
    }
    let mut content = look.filesystem.content(&inode)?;
    let mut out = ContentOutput::new();
    let mut buf = vec![0; PIECE_BYTES];
    let attempt = || "write it out";
    loop {
        match content.next(&mut buf)? {
            Piece::Data(bytes) => out.write_all(&buf[..bytes]).attempt(attempt)?,
            Piece::Hole(bytes) => {
                buf.fill(0);
                let mut left = bytes;
                while left > 0 {
                    let now = left.min(buf.len() as u64);
                    out.write_all(&buf[..now as usize]).attempt(attempt)?;
                    left -= now;
                }
            }
            Piece::End => return out.flush().attempt(attempt),
        }
    }
}
