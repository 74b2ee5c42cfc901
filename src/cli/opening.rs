//! How an image was when reading began, and the means to see how it is now.

use std::sync::Arc;
use std::time::Duration;

use crate::cli::marks::Marks;
use crate::error::{Attempt, Error, Kind, Result};
use crate::image::Volume;
use crate::remote::{Access, Store};
use crate::restore::{Filesystem, ROOT};
use crate::snapshot::{DIRECTORY, Id};

/// How often a filesystem that somebody is writing is read, until it makes sense.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(500);

/// A reader takes no lease, so a snapshot can be deleted under it, and what it then reads is whatever
/// was written over it. A snapshot never changes while it is there, and its blocks are not free
/// before its deletion is on the disk: so what was read is right if it is still there afterwards.
pub struct Opening {
    pub store: Arc<dyn Store>,
    pub volume: Volume,
    /// Where the volume begins in the image, in bytes.
    pub begins: u64,
    /// Taken before anything of the filesystem was read.
    pub marks: Marks,
}

impl Opening {
    /// Looks, past all that was read before, whether each of these snapshots is still the directory
    /// with this inode. [`Kind::InUse`] when one is not, or when that cannot be told.
    ///
    /// It costs a few small reads where nobody has written to the image since.
    pub fn still_has(&self, snapshots: &[(Id, u32)]) -> Result<()> {
        if snapshots.is_empty() {
            return Ok(());
        }
        let attempt = || "look whether what was read is still there";
        match self.first_gone(snapshots).attempt(attempt)? {
            None => Ok(()),
            Some(id) => {
                let why = format!(
                    "snapshot {id} was deleted while it was read: what was read of it may be wrong"
                );
                let hint = "read it again from another snapshot; `e2ebak snapshots` lists them";
                Err(Error::new(Kind::InUse, why).hint(hint))
            }
        }
    }

    fn first_gone(&self, snapshots: &[(Id, u32)]) -> Result<Option<Id>> {
        // By its name: another file may have taken its place.
        let image = self.store.open(Access::ReadOnly)?;
        let now = Marks::take(&*self.store, &*image, &[self.begins])?;
        if now == self.marks && !now.has_lease() {
            return Ok(None);
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let volume = self.volume.anew(image.clone())?;
            match gone(&volume, snapshots) {
                // Half of what a writer has changed may be there.
                Err(error) if error.kind() == Kind::Corrupt && now.has_lease() => {
                    if tries == TRIES {
                        let why = "somebody is writing the image, so that cannot be told";
                        return Err(Error::new(Kind::InUse, why).because(error));
                    }
                    std::thread::sleep(PAUSE);
                }
                other => return other,
            }
        }
    }
}

fn gone(volume: &Volume, snapshots: &[(Id, u32)]) -> Result<Option<Id>> {
    let filesystem = Filesystem::open(volume.device())?;
    for (id, directory) in snapshots {
        let path = format!("{DIRECTORY}/{id}");
        match filesystem.resolve(ROOT, path.as_bytes()) {
            Ok(found) if found == *directory => {}
            Ok(_) => return Ok(Some(*id)),
            Err(error) if error.kind() == Kind::NotFound => return Ok(Some(*id)),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
