use std::sync::atomic::{AtomicBool, Ordering};

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::key::KeyArgs;
use crate::error::{Attempt, Error, Kind, Result};
use crate::image::{self, Creation};
use crate::location::Location;
use crate::session;
use crate::ui::say;
use crate::ui::{Style, Terminal};
use crate::units::Bytes;

/// Create an image: a sparse file with LUKS2 and an ext4 filesystem inside
///
/// Nothing that exists is ever overwritten. The file is sparse: a 5T image takes less than 64 MiB
/// on the server until something is backed up into it.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// Size of the image file, for example 500G or 5T
    #[arg(long, value_name = "SIZE")]
    size: Bytes,

    /// Label of the LUKS2 header and of the filesystem
    #[arg(long, default_value = "e2ebak", value_name = "NAME")]
    label: String,

    /// Memory that one guess of the passphrase costs; at most 1G. Unless given, at most 1G and
    /// half of this machine's memory
    #[arg(long, value_name = "SIZE", help_heading = "Key derivation")]
    kdf_memory: Option<Bytes>,

    /// Passes over that memory. Unless given, as many as take about two seconds here
    #[arg(long, value_name = "N", help_heading = "Key derivation")]
    kdf_time: Option<u32>,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let (signals, stop) = session::count_signals()?;
    session::end_at_second_signal(&signals)?;
    let mut keys = args.key.keys(&location.to_string(), signals)?;
    let terminal = Terminal::new(Style::choose(args.output.quiet, false));
    let creation = Creation {
        size: args.size.0,
        label: args.label.clone(),
        kdf_memory: args.kdf_memory.map(|m| m.0),
        kdf_time: args.kdf_time,
    };
    let made = creation.check().and_then(|()| {
        let store = image::connect(&location, &args.image.link()?)?;
        image::create(
            &store,
            &location.to_string(),
            &creation,
            &mut || keys.new_key(),
            &terminal,
            &|| check(&stop),
        )
    });
    terminal.finish();
    let made = made.attempt(|| format!("cannot create {location}"))?;
    if !args.output.quiet {
        let sent = match location {
            Location::Local(_) => String::new(),
            Location::Sftp(..) => format!(", {} sent", Bytes(made.sent)),
        };
        say!(
            "created {location}: {} LUKS2 image {}{sent}",
            Bytes(args.size.0),
            made.uuid
        );
    }
    Ok(Ending::Clean)
}

fn check(stop: &AtomicBool) -> Result<()> {
    match stop.load(Ordering::Relaxed) {
        true => Err(Error::new(Kind::Interrupted, "interrupted by a signal")),
        false => Ok(()),
    }
}
