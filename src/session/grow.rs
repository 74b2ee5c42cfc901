//! Making the filesystem as large as its volume.
//!
//! Unmounted: resize2fs works on a copy in memory of what it changes, like mkfs, since it keeps no
//! journal. Only when it is done are the changes written: first all but the superblock and the group
//! descriptors, then those, then the superblock, each synced before the next. Until the last write the
//! filesystem is the old one. Mounted: the kernel does it, with its journal.

use std::path::Path;
use std::sync::Arc;

use super::mounts::PublicMount;
use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};
use crate::export::{Export, Options};
use crate::host::{Tool, mount_table};
use crate::layer::Overlay;
use crate::progress::{Event, Monitor};
use crate::units::{GIB, KIB, MIB};

/// What resize2fs changes is kept in memory: 110 MiB for 1 TiB that becomes 8 TiB.
const CHANGED_MAX: u64 = 2 * GIB;

/// The superblock.
const SUPERBLOCK: u64 = 4 * KIB;

/// Behind it the descriptors: 64 TiB have 32 MiB of them, and room to grow is kept.
const DESCRIPTORS_END: u64 = 64 * MIB;

/// Grows the ext4 in `volume`, which nobody has mounted, to fill it. `directory` is empty, in a
/// mount namespace of our own. `unfinished`: an earlier growth was interrupted, so that all of the
/// filesystem is checked first.
///
/// # Errors
/// [`Kind::MissingTool`]; [`Kind::Corrupt`] when the filesystem has to be repaired first. Nothing
/// was changed then.
pub fn fill_unmounted(
    volume: Arc<dyn Device>,
    directory: &Path,
    unfinished: bool,
    monitor: &dyn Monitor,
) -> Result<()> {
    let overlay = Arc::new(Overlay::with_limit(volume.clone(), CHANGED_MAX));
    let export = Export::mount(overlay.clone(), directory, Options::default())
        .map_err(|e| e.hint("growing needs root, or the use of /dev/fuse"))?;
    let resized = resize(&export.file(), unfinished, monitor);
    let unmounted = export.unmount();
    resized?;
    unmounted?;
    monitor.report(Event::Phase("write what has changed"));
    let phases = [
        DESCRIPTORS_END..u64::MAX,
        SUPERBLOCK..DESCRIPTORS_END,
        0..SUPERBLOCK,
    ];
    for phase in phases {
        overlay.for_each_changed(&mut |offset, block| match phase.contains(&offset) {
            true => volume.write_all_at(block, offset),
            false => Ok(()),
        })?;
        volume.flush()?;
    }
    Ok(())
}

fn resize(file: &Path, unfinished: bool, monitor: &dyn Monitor) -> Result<()> {
    monitor.report(Event::Phase("check the filesystem"));
    // Without -f only the journal is replayed, and a filesystem with errors is refused.
    let how = if unfinished { "-fp" } else { "-p" };
    let check = Tool::new("e2fsck").arg(how).arg(file).deaf();
    let output = check.run_to_any_end()?;
    if !matches!(output.code(), Some(0 | 1)) {
        let failed = check.failed(&output).of_kind(Kind::Corrupt);
        if !unfinished {
            return Err(failed).attempt(|| "check the filesystem before it grows");
        }
        let thorough = Tool::new("e2fsck")
            .arg("-fy")
            .arg(file)
            .deaf()
            .accept(&[0, 1]);
        thorough.run().map_err(|e| e.of_kind(Kind::Corrupt))?;
        let note = "the filesystem was repaired after an interrupted growth";
        monitor.report(Event::Note(note.into()));
    }
    monitor.report(Event::Phase("grow the filesystem"));
    let tool = Tool::new("resize2fs").arg("-f").arg(file).deaf();
    tool.run().map(drop)
}

/// Grows a mounted image to `size` bytes of its volume: the volume through its FUSE file, the loop
/// device, and the filesystem by the kernel.
///
/// # Errors
/// [`Kind::Denied`] where the kernel does not let us; the image and the volume have grown then.
pub fn fill_mounted(mounted: &PublicMount, size: u64, monitor: &dyn Monitor) -> Result<()> {
    if mounted.read_only {
        let why = format!(
            "it is mounted read-only at {}",
            mounted.mountpoint.display()
        );
        return Err(Error::new(Kind::ReadOnly, why).hint("unmount it first"));
    }
    let entry = mount_table::topmost(&mounted.mountpoint)?;
    let device = entry
        .filter(|entry| entry.kind == "ext4")
        .map(|entry| entry.source);
    let Some(device) = device else {
        let why = "only what the kernel has mounted can grow while it is mounted";
        return Err(Error::new(Kind::Unsupported, why).hint("unmount it first"));
    };
    monitor.report(Event::Phase("grow the volume"));
    // By other processes: who serves the file is ours, and might not answer.
    let truncate = Tool::new("truncate").arg("-s").arg(size.to_string());
    truncate
        .arg(&mounted.volume)
        .run()
        .attempt(|| "grow the volume")?;
    let capacity = Tool::new("losetup").arg("-c").arg(&device);
    capacity.run().attempt(|| "tell the loop device its size")?;
    monitor.report(Event::Phase("grow the filesystem"));
    // With `noinit_itable` the kernel would zero all new inode tables at once: 16 GiB a TiB.
    let remount = |option: &str| {
        let tool = Tool::new("mount").args(["-o", &format!("remount,{option}")]);
        if let Err(error) = tool.arg(&mounted.mountpoint).deaf().run() {
            tracing::warn!("{}", error.report());
        }
    };
    remount("init_itable=1000");
    let resize = Tool::new("resize2fs").arg(&device).deaf();
    let output = resize.run_to_any_end();
    remount("noinit_itable");
    let output = output?;
    if output.status.success() {
        return Ok(());
    }
    let denied = output.stderr.contains("Permission denied");
    let error = resize.failed(&output);
    Err(match denied {
        true => error.of_kind(Kind::Denied).hint(
            "the kernel grows a mounted ext4 only for one who has CAP_SYS_RESOURCE; \
             unmount it and run `e2ebak grow` again to finish",
        ),
        false => error.hint("unmount it and run `e2ebak grow` again to finish"),
    })
}
