use crate::cli::{Ending, pin};
use crate::error::Result;

/// Let the policy decide about a pinned snapshot again
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: pin::Which,
}

pub fn run(args: Args) -> Result<Ending> {
    pin::set(args.which, false)
}
