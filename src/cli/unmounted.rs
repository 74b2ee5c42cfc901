//! An image opened for reading without mounting it, for the verbs that only look.

use crate::cli::marks::Marks;
use crate::cli::opening::Opening;
use crate::error::Result;
use crate::image::{self, LinkSettings, Opened};
use crate::location::Location;
use crate::remote::Access;
use crate::remote::lease::{Holder, Lease};
use crate::restore::Filesystem;
use crate::session::KeySource;
use crate::ui::tell;

/// A filesystem that was opened for reading.
pub struct Unmounted {
    pub filesystem: Filesystem,
    pub opening: Opening,
}

/// Dials, unlocks and reads the filesystem. Takes no lease; says when somebody is writing.
pub fn open(
    location: &Location,
    link: &LinkSettings,
    keys: &mut dyn KeySource,
) -> Result<Unmounted> {
    let store = image::connect(location, link)?;
    std::thread::scope(|scope| {
        // A round trip that nobody has to wait for.
        let peek = || Lease::peek(&*store);
        let peeking = std::thread::Builder::new().spawn_scoped(scope, peek);
        let sealed = image::inspect(&*store, Access::ReadOnly)?;
        for warning in sealed.warnings() {
            tell!("warning: {warning}");
        }
        let (image, begins) = (sealed.image(), sealed.header().segment().offset());
        let read = move || Marks::read(&*image, &[begins]);
        let reading = std::thread::Builder::new().spawn_scoped(scope, read.clone());
        let unlocked = unlock(sealed, keys)?;
        // Without a thread it is asked for here.
        let lease = peeking.ok().and_then(|thread| thread.join().ok());
        let lease = lease.unwrap_or_else(peek);
        let blocks = reading.ok().and_then(|thread| thread.join().ok());
        let marks = Marks::of(&lease, blocks.unwrap_or_else(read)?);
        tell_writer(lease);
        let filesystem = Filesystem::open(unlocked.volume.device()).map_err(|e| {
            e.hint("after a crash the next `e2ebak backup` or `mount` puts the filesystem in order")
        })?;
        let opening = Opening {
            store: store.clone(),
            volume: unlocked.volume,
            begins,
            marks,
        };
        Ok(Unmounted {
            filesystem,
            opening,
        })
    })
}

/// Reading needs no lease, so that one which cannot be read does not stop it.
fn tell_writer(lease: Result<Option<Holder>>) {
    match lease {
        Ok(None) => {}
        Ok(Some(holder)) => tell!(
            "warning: {} is writing this image; what is shown may be about to change",
            holder.describe()
        ),
        Err(error) => tell!(
            "warning: whether somebody is writing this image is not known: {}",
            error.chain().join(": ")
        ),
    }
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
