use serde_json::{Value, json};

use crate::cli::Ending;
use crate::cli::args::ImageArgs;
use crate::cli::key::KeyArgs;
use crate::cli::unmounted::unlock;
use crate::error::{Attempt, Result};
use crate::image::{self, Sealed};
use crate::luks::Header;
use crate::remote::lease::Lease;
use crate::remote::{Access, Store};
use crate::restore::Ext4View;
use crate::session;
use crate::ui::Table;
use crate::ui::{say, tell};
use crate::units::Bytes;

/// Show what an image is: header, keyslots, sizes, filesystem, and who is writing it
///
/// Needs no key. With one that comes without asking (a key file, a passphrase file or command) it
/// also looks at the filesystem inside.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// Print an object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    key: KeyArgs,
}

/// The filesystem inside, as far as its superblock tells.
struct Inside {
    keyslot: usize,
    volume_bytes: u64,
    label: String,
    uuid: String,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    let look = || -> Result<_> {
        let store = image::connect(&location, &args.image.link()?)?;
        let sealed = image::inspect(&*store, Access::ReadOnly)?;
        let holder = Lease::peek(&*store)?;
        let facts = facts(&sealed, &*store, holder.map(|h| h.describe()))?;
        Ok((facts, inside(&args, sealed)?))
    };
    let (mut facts, inside) = look().attempt(|| format!("cannot look at {location}"))?;
    if let Some(inside) = &inside {
        facts["filesystem"] = json!({
            "type": "ext4", "label": inside.label, "uuid": inside.uuid,
            "volume_bytes": inside.volume_bytes, "opened_by_keyslot": inside.keyslot,
        });
    }
    match args.json {
        true => say!("{facts:#}"),
        false => print(&location.to_string(), &facts),
    }
    for warning in facts["warnings"].as_array().into_iter().flatten() {
        tell!("warning: {}", text(warning));
    }
    let odd = facts["warnings"].as_array().is_some_and(|w| !w.is_empty());
    Ok(if odd { Ending::Warnings } else { Ending::Clean })
}

fn inside(args: &Args, sealed: Sealed) -> Result<Option<Inside>> {
    let signals = session::end_at_signals()?;
    let mut keys = args.key.keys(&args.image.location, signals)?;
    if !keys.are_given() {
        return Ok(None);
    }
    let opened = unlock(sealed, &mut keys)?;
    let view = Ext4View::load(opened.volume.device())?;
    Ok(Some(Inside {
        keyslot: opened.keyslot,
        volume_bytes: opened.volume.device().size(),
        label: view.label(),
        uuid: view.uuid(),
    }))
}

fn facts(sealed: &Sealed, store: &dyn Store, holder: Option<String>) -> Result<Value> {
    let header: &Header = sealed.header();
    let segment = header.segment();
    let keyslots: Vec<Value> = header
        .keyslots()
        .iter()
        .map(|slot| {
            let (kdf, cipher) = match slot.lock() {
                Ok(lock) => (lock.kdf().to_string(), lock.encryption().to_string()),
                Err(why) => (format!("not usable: {why}"), String::new()),
            };
            json!({"id": slot.id(), "key_bits": slot.key_size() * 8, "kdf": kdf, "area_encryption": cipher})
        })
        .collect();
    let tokens: Vec<Value> = header
        .tokens()
        .iter()
        .map(|t| json!({"id": t.id(), "type": t.kind()}))
        .collect();
    let space = store.space()?;
    Ok(json!({
        "version": 1,
        "image_bytes": sealed.size(),
        "stored_bytes": store.stored()?,
        "server_free_bytes": space.map(|s| s.free),
        "server_total_bytes": space.map(|s| s.total),
        "luks": {
            "version": 2, "uuid": header.uuid(), "label": header.label(), "subsystem": header.subsystem(),
            "sequence_id": header.sequence_id(), "header_bytes": header.header_size(),
            "cipher": segment.encryption(), "sector_bytes": segment.sector_size().bytes(),
            "data_offset": segment.offset(), "data_bytes": segment.size(),
            "keyslots": keyslots, "tokens": tokens,
        },
        "lease": holder,
        "filesystem": null,
        "warnings": sealed.warnings(),
    }))
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "unknown".into(),
        other => other.to_string(),
    }
}

fn bytes(value: &Value) -> String {
    value
        .as_u64()
        .map_or("unknown".into(), |b| format!("{} ({b} bytes)", Bytes(b)))
}

fn print(location: &str, facts: &Value) {
    let luks = &facts["luks"];
    say!("image       {location}");
    say!("size        {}", bytes(&facts["image_bytes"]));
    say!("stored      {}", bytes(&facts["stored_bytes"]));
    say!("server free {}", bytes(&facts["server_free_bytes"]));
    say!(
        "LUKS        version 2, uuid {}, label {}",
        text(&luks["uuid"]),
        text(&luks["label"]).escape_debug()
    );
    say!(
        "cipher      {}, {}-byte sectors",
        text(&luks["cipher"]),
        luks["sector_bytes"]
    );
    say!(
        "data        {} from offset {}",
        bytes(&luks["data_bytes"]),
        luks["data_offset"]
    );
    match facts["lease"].as_str() {
        Some(holder) => say!("lease       {holder}"),
        None => say!("lease       free"),
    }
    match &facts["filesystem"] {
        Value::Null => {
            say!("filesystem  locked (give a key, for example --key-file, to look inside)")
        }
        inside => say!(
            "filesystem  ext4, uuid {}, label {}, opened by keyslot {}",
            text(&inside["uuid"]),
            text(&inside["label"]).escape_debug(),
            inside["opened_by_keyslot"]
        ),
    }
    let mut table = Table::new(&["keyslot", ">key bits", "key derivation", "area"]);
    for slot in luks["keyslots"].as_array().into_iter().flatten() {
        table.row(vec![
            text(&slot["id"]),
            text(&slot["key_bits"]),
            text(&slot["kdf"]),
            text(&slot["area_encryption"]),
        ]);
    }
    say!("{}", table.render().trim_end());
}
