use std::time::Duration;

use serde_json::{Value, json};

use crate::cli::Ending;
use crate::cli::args::ImageArgs;
use crate::cli::key::KeyArgs;
use crate::cli::unmounted;
use crate::error::{Attempt, Result};
use crate::session;
use crate::snapshot::{Catalogue, Found};
use crate::ui::Table;
use crate::ui::{say, tell};
use crate::units::{Bytes, show_duration};

/// List the snapshots in an image, oldest first
///
/// Nothing is mounted and nothing is written; an ordinary user can do it.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// Print an array of objects
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    key: KeyArgs,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let signals = session::end_at_signals()?;
    let list = || {
        let mut keys = args.key.keys(&location.to_string(), signals)?;
        let unmounted = unmounted::open(&location, &args.image.link()?, &mut keys)?;
        let mut files = unmounted.filesystem;
        Catalogue::load(&mut files)
    };
    let catalogue = list().attempt(|| format!("cannot list the snapshots in {location}"))?;
    Ok(show(&catalogue, args.json))
}

/// Prints them, and tells of those that do not count.
pub fn show(catalogue: &Catalogue, as_json: bool) -> Ending {
    if as_json {
        let all: Vec<Value> = catalogue
            .complete
            .iter()
            .map(|found| {
                let mut record = json!(found.record);
                record["pinned"] = found.pinned.into();
                record
            })
            .collect();
        say!("{:#}", Value::from(all));
    } else {
        print(catalogue);
    }
    for (id, why) in &catalogue.damaged {
        tell!("warning: {id} does not count as a snapshot: {why}");
    }
    match catalogue.damaged.is_empty() {
        true => Ending::Clean,
        false => Ending::Warnings,
    }
}

fn print(catalogue: &Catalogue) {
    let mut table = Table::new(&[
        "id",
        "when",
        "sources",
        ">files",
        ">size",
        ">new",
        ">duration",
        "",
    ]);
    for Found { id, record, pinned } in &catalogue.complete {
        table.row(vec![
            id.to_string(),
            local_time(*id),
            record.sources.join(" ").escape_debug().to_string(),
            record.files.to_string(),
            Bytes(record.bytes).to_string(),
            Bytes(record.new_bytes).to_string(),
            show_duration(Duration::try_from_secs_f64(record.duration_seconds).unwrap_or_default()),
            match (record.error_count, pinned) {
                (0, false) => String::new(),
                (0, true) => "pinned".into(),
                (count, false) => format!("{count} errors"),
                (count, true) => format!("pinned, {count} errors"),
            },
        ]);
    }
    say!("{}", table.render().trim_end());
    for id in &catalogue.inflight {
        say!("{id}  unfinished: running now, or interrupted; the next backup takes it up");
    }
    for id in &catalogue.deleting {
        say!("{id}  deleted, but not all of its space is free yet; the next prune goes on");
    }
    match catalogue.complete.len() {
        0 => say!("no complete snapshot"),
        1 => say!("1 snapshot"),
        count => say!("{count} snapshots"),
    }
}

/// When a snapshot began, by the clock on this machine's wall.
pub fn local_time(id: crate::snapshot::Id) -> String {
    id.time()
        .to_zoned(jiff::tz::TimeZone::system())
        .strftime("%a %Y-%m-%d %H:%M")
        .to_string()
}
