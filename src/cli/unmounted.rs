//! An image opened for reading without mounting it, for the verbs that only look.

use crate::error::Result;
use crate::image::{self, LinkSettings, Opened};
use crate::location::Location;
use crate::remote::Access;
use crate::remote::lease::Lease;
use crate::restore::Filesystem;
use crate::session::KeySource;
use crate::ui::tell;

/// Dials, unlocks and reads the filesystem. Takes no lease; says when somebody is writing.
pub fn open(
    location: &Location,
    link: &LinkSettings,
    keys: &mut dyn KeySource,
) -> Result<Filesystem> {
    let store = image::connect(location, link)?;
    let sealed = image::inspect(&*store, Access::ReadOnly)?;
    for warning in sealed.warnings() {
        tell!("warning: {warning}");
    }
    if let Some(holder) = Lease::peek(&*store)? {
        tell!(
            "warning: {} is writing this image; what is shown may be about to change",
            holder.describe()
        );
    }
    let view = Filesystem::open(unlock(sealed, keys)?.volume.device());
    view.map_err(|e| {
        e.hint("after a crash the next `e2ebak backup` or `mount` puts the filesystem in order")
    })
}

/// Asks for keys until one opens the image or the source gives up.
pub fn unlock(sealed: image::Sealed, keys: &mut dyn KeySource) -> Result<Opened> {
    let mut rejected = None;
    loop {
        let key = keys.next_key(rejected.as_ref())?;
        match sealed.unlock(&key) {
            Ok(unlocked) => return sealed.open(unlocked),
            Err(error) if error.kind() == crate::error::Kind::WrongKey => rejected = Some(error),
            Err(error) => return Err(error),
        }
    }
}
