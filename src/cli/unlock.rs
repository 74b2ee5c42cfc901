use crate::cli::Ending;
use crate::cli::args::ImageArgs;
use crate::error::{Attempt, Result};
use crate::image;
use crate::remote::lease::Lease;
use crate::ui::say;

/// Remove the lease that a machine left behind which is gone
///
/// Without --force only a lease is removed whose holder ran on this machine and is dead, as every
/// run does by itself. With --force make sure that nobody writes the image any more.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// Remove the lease whoever holds it
    #[arg(long)]
    force: bool,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let unlock = || {
        let store = image::connect(&location, &args.image.link()?)?;
        Lease::clear(store, &location.to_string(), args.force)
    };
    match unlock().attempt(|| format!("cannot unlock {location}"))? {
        Some(holder) => say!("removed the lease of {}", holder.describe()),
        None => say!("nobody holds {location}"),
    }
    Ok(Ending::Clean)
}
