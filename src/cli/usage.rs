use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cli::Ending;
use crate::cli::args::{ImageArgs, OutputArgs};
use crate::cli::key::KeyArgs;
use crate::cli::mounted;
use crate::error::{Attempt, Result};
use crate::image::{self, Quota};
use crate::remote::{Access, Space};
use crate::session;
use crate::snapshot::{self, Share};
use crate::ui::say;
use crate::ui::{Style, Table, Terminal};
use crate::units::Bytes;

/// Columns of the longest bar.
const BAR: u64 = 40;

/// Show where the space goes: image, filesystem, every snapshot
///
/// "Unique" is what deleting that snapshot alone would free; what several snapshots have is shared.
/// Trees that are unfinished, damaged or being deleted are marked with `*`. How much the image takes
/// on the server, and the quota of its user there, are known where commands may be run over ssh, else
/// they are unknown.
///
/// The image is mounted read-only, where nobody sees it.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// Print an object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// All that is known, in bytes.
struct Facts {
    image: u64,
    stored: Option<u64>,
    server: Option<Space>,
    quota: Option<Quota>,
    filesystem: u64,
    used: u64,
    free: u64,
    shares: Vec<Share>,
}

impl Facts {
    /// What trim would free, at most.
    fn reclaimable(&self) -> Option<u64> {
        self.stored.map(|stored| stored.saturating_sub(self.used))
    }
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let doing = || format!("cannot look at the usage of {location}");
    let quiet = args.output.quiet || args.json;
    let terminal = Arc::new(Terminal::new(Style::choose(quiet, false)));
    let link = args.image.link()?;
    let work = |inside: &mounted::Inside| {
        let room = rustix::fs::statvfs(inside.root).attempt(|| "ask for the room inside")?;
        let shares = snapshot::usage(inside.root, inside.stop, inside.terminal)?;
        let filesystem = room.f_blocks * room.f_frsize;
        let free = room.f_bfree * room.f_frsize;
        Ok((filesystem, free, shares))
    };
    let wait = Duration::ZERO;
    let counted = mounted::with(&args.image, &args.key, true, wait, &terminal, work);
    let (filesystem, free, shares) = counted.attempt(doing)?;
    // Nothing is held any more; a link that is down need not be waited for.
    session::end_at_signals()?;
    let look = || -> Result<_> {
        let store = image::connect(&location, &link)?;
        let size = store.open(Access::ReadOnly)?.size();
        let stored = image::stored_bytes(&*store, &location, &link, size)?;
        let quota = image::quota(&location, &link)?;
        Ok((size, stored, store.space()?, quota))
    };
    let (size, stored, server, quota) = look().attempt(doing)?;
    let facts = Facts {
        image: size,
        stored,
        server,
        quota,
        filesystem,
        used: filesystem - free,
        free,
        shares,
    };
    match args.json {
        true => say!("{:#}", as_json(&facts)),
        false => print(&facts),
    }
    Ok(Ending::Clean)
}

fn as_json(facts: &Facts) -> Value {
    let shares = facts.shares.iter().map(|share| {
        json!({
            "id": share.id.to_string(), "complete": share.complete, "files": share.usage.files,
            "unique_bytes": share.usage.unique, "shared_bytes": share.usage.shared,
        })
    });
    json!({
        "version": 1,
        "image_bytes": facts.image,
        "stored_bytes": facts.stored,
        "reclaimable_bytes": facts.reclaimable(),
        "server_free_bytes": facts.server.map(|s| s.free),
        "server_total_bytes": facts.server.map(|s| s.total),
        "server_quota": facts.quota.map(|quota| json!({
            "used_bytes": quota.used, "limit_bytes": quota.limit,
        })),
        "filesystem_bytes": facts.filesystem,
        "filesystem_used_bytes": facts.used,
        "filesystem_free_bytes": facts.free,
        "snapshots": shares.collect::<Vec<_>>(),
    })
}

fn print(facts: &Facts) {
    let known = |bytes: Option<u64>| bytes.map_or("unknown".into(), |b| Bytes(b).to_string());
    say!("image        {}", Bytes(facts.image));
    say!("stored       {}", known(facts.stored));
    say!(
        "filesystem   {}, {} used, {} free",
        Bytes(facts.filesystem),
        Bytes(facts.used),
        Bytes(facts.free)
    );
    say!(
        "reclaimable  {} by `e2ebak trim`",
        known(facts.reclaimable())
    );
    say!("server free  {}", known(facts.server.map(|s| s.free)));
    let quota = match facts.quota {
        None => "unknown".into(),
        Some(Quota { limit: None, .. }) => "none".into(),
        Some(Quota {
            used,
            limit: Some(limit),
        }) => format!("{} used of {}", Bytes(used), Bytes(limit)),
    };
    say!("quota        {quota}");
    let bars = std::io::stdout().is_terminal();
    let most = facts.shares.iter().map(|s| s.usage.unique + s.usage.shared);
    let most = most.max().unwrap_or(0).max(1);
    let mut table = Table::new(&["id", ">files", ">unique", ">shared", ""]);
    for share in &facts.shares {
        let mark = if share.complete { "" } else { "*" };
        table.row(vec![
            format!("{}{mark}", share.id),
            share.usage.files.to_string(),
            Bytes(share.usage.unique).to_string(),
            Bytes(share.usage.shared).to_string(),
            match bars {
                true => bar(share.usage.unique, share.usage.shared, most),
                false => String::new(),
            },
        ]);
    }
    say!("{}", table.render().trim_end());
}

/// What is unique in full blocks, what is shared in light ones.
fn bar(unique: u64, shared: u64, most: u64) -> String {
    let columns = |bytes: u64| (u128::from(bytes) * u128::from(BAR) / u128::from(most)) as usize;
    let (full, all) = (columns(unique), columns(unique + shared));
    "█".repeat(full) + &"░".repeat(all - full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_share_and_never_longer() {
        assert_eq!(bar(0, 0, 1), "");
        assert_eq!(bar(1, 1, 2).chars().count(), BAR as usize);
        assert_eq!(
            bar(1, 1, 2).chars().filter(|c| *c == '█').count(),
            BAR as usize / 2
        );
        assert_eq!(bar(u64::MAX / 2, 0, u64::MAX).chars().count(), 19);
    }
}
