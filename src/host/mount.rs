//! Mounting the ext4 in a volume file, and unmounting it.
//!
//! As root: `mount -o loop`, then the loop device is tuned while it is in use. That order leaks
//! nothing at any point: mount(8) sets up the loop device with `autoclear`, so the kernel frees
//! it with its last user, be that the filesystem or a mount(8) that was killed half way. (The
//! other order, `losetup --direct-io=on`, mount, `losetup -d`, leaves the device behind if we die
//! between two of the three. Direct I/O can be switched on below a mounted filesystem.)
//!
//! Without root: fuse2fs, as a child that dies with us. It does not write through the journal, so
//! e2fsck looks first whether the last session ended well.
//!
//! Every system call that could wait for the volume is made by a child process, never by this
//! one, which may be the one that serves it.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::loop_device::Tuned;
use super::tool::Tool;
use super::view::View;
use super::{holders, mount_table};
use crate::error::{Attempt, Error, Kind, Result};

/// Who reads the filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The kernel, over a loop device; needs root.
    Kernel,
    /// fuse2fs; needs FUSE.
    Fuse2fs,
}

/// Without the two about initialisation the kernel would zero inode tables and read bitmaps in
/// the background, 160 MiB in the first 12 s of a new 5 TiB image. A backup holds set-user-ID
/// programs and device nodes of the machine it is of; here they are data.
///
/// With `nodelalloc,dioread_lock` and ext4's usual ordering of data no crash leaves a file that has
/// its size and time but not its bytes. The next run would take such a file of an interrupted one
/// for whole, and publish it (docs/decisions/taking-up-interrupted-runs.md).
const KERNEL_OPTIONS: &str = "loop,noatime,nosuid,nodev,errors=remount-ro,nodelalloc,dioread_lock,\
     noinit_itable,no_prefetch_block_bitmaps";

/// Permissions are checked by the kernel. fuse2fs 1.47.0 has its own check, which refuses the
/// owner in a user namespace; `fakeroot` turns that off.
const FUSE2FS_OPTIONS: &str = "default_permissions,fakeroot";

/// fuse2fs reads all group descriptors before it mounts: 40 MiB for 5 TiB.
const FUSE2FS_START_LIMIT: Duration = Duration::from_secs(600);

/// After unmounting, fuse2fs writes what it still holds.
const FUSE2FS_END_LIMIT: Duration = Duration::from_secs(600);

const POLL: Duration = Duration::from_millis(20);

/// A mounted volume. Dropping it unmounts, if need be out of sight only, and logs what fails.
#[derive(Debug)]
pub struct Mounted {
    at: PathBuf,
    view: View,
    minor: u32,
    below: Below,
    mounted: bool,
}

#[derive(Debug)]
enum Below {
    Loop(Tuned),
    Fuse2fs(Child),
}

/// Proves that a filesystem can be mounted on `at`, and gives back its path without links.
///
/// # Errors
/// [`Kind::NotFound`], [`Kind::Usage`] (not a directory), [`Kind::InUse`] (something is mounted
/// there already), [`Kind::Exists`] (not empty).
pub fn check_mountpoint(at: &Path) -> Result<PathBuf> {
    let shown = at.display();
    let refuse = |kind, why: &str| Err(Error::new(kind, format!("{shown} {why}")));
    let path = match resolve(at) {
        Ok(path) => path,
        Err(error) if error.kind() == Kind::NotFound => {
            let hint = format!("`mkdir {shown}` makes it");
            return Err(error.hint(hint)).attempt(|| format!("{shown} is no mountpoint"));
        }
        Err(error) => return Err(error).attempt(|| format!("{shown} is no mountpoint")),
    };
    // Before anything looks at the directory: a dead FUSE mount there would answer with an error.
    if mount_table::topmost(&path)?.is_some() {
        return refuse(Kind::InUse, "is a mountpoint already");
    }
    let about = fs::metadata(&path).attempt(|| format!("look at {shown}"))?;
    if !about.is_dir() {
        return refuse(Kind::Usage, "is not a directory");
    }
    let mut entries = fs::read_dir(&path).attempt(|| format!("look into {shown}"))?;
    match entries.next() {
        None => Ok(path),
        Some(_) => refuse(Kind::Exists, "is not empty"),
    }
}

/// As canonicalize(3), but without a look at the last name if that is a mountpoint.
fn resolve(at: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(at)?;
    if let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) {
        let path = parent.canonicalize()?.join(name);
        if mount_table::topmost(&path)?.is_some() {
            return Ok(path);
        }
    }
    Ok(absolute.canonicalize()?)
}

/// Mounts the ext4 in `file` on `at`. The file is written to even with `read_only`, which is about
/// who uses the mount: replaying the journal and counting mounts are left to the filesystem.
///
/// Spawns with the calling thread as parent: with [`Driver::Fuse2fs`] the mount ends with it.
///
/// # Errors
/// Those of [`check_mountpoint`]; [`Kind::MissingTool`]; [`Kind::Corrupt`] when e2fsck finds what
/// it may not repair unasked; [`Kind::Io`] with what the mounting program said.
pub fn mount_volume(file: &Path, at: &Path, driver: Driver, read_only: bool) -> Result<Mounted> {
    let at = check_mountpoint(at)?;
    let mounted = match driver {
        Driver::Kernel => mount_by_loop(file, &at, View::Own, read_only),
        Driver::Fuse2fs => mount_by_fuse2fs(file, &at, read_only),
    };
    said(mounted, &at, driver, read_only)
}

/// The same, by the kernel and in another mount namespace: `file` and `at` are paths inside, and
/// `at` is a directory of ours that needs no check.
///
/// # Errors
/// Those of [`mount_volume`].
pub fn mount_volume_inside(file: &Path, at: &Path, view: View, read_only: bool) -> Result<Mounted> {
    let mounted = mount_by_loop(file, at, view, read_only);
    said(mounted, at, Driver::Kernel, read_only)
}

fn said(mounted: Result<Mounted>, at: &Path, driver: Driver, read_only: bool) -> Result<Mounted> {
    let mounted = mounted.attempt(|| format!("mount the volume on {}", at.display()))?;
    info!(at = %at.display(), ?driver, read_only, "mounted");
    Ok(mounted)
}

fn mount_by_loop(file: &Path, at: &Path, view: View, read_only: bool) -> Result<Mounted> {
    let tool = Tool::new("mount").args(["-t", "ext4", "-o", KERNEL_OPTIONS]);
    // Writable even when it is to be read only: else the loop device would be read-only too, and a
    // journal that was not written back could not be replayed.
    tool.arg(file).arg(at).deaf().inside(view).run()?;
    if read_only {
        let remount = Tool::new("mount").args(["-o", "remount,ro"]).arg(at);
        if let Err(error) = remount.deaf().inside(view).run() {
            let _ = unmount(at, view).inspect_err(|e| warn!("{}", e.report()));
            return Err(error);
        }
    }
    let entry = view.topmost(at)?.ok_or_else(|| not_there(at))?;
    Ok(Mounted {
        at: at.to_path_buf(),
        view,
        minor: entry.minor,
        below: Below::Loop(Tuned::new(&entry.source)),
        mounted: true,
    })
}

fn mount_by_fuse2fs(file: &Path, at: &Path, read_only: bool) -> Result<Mounted> {
    check(file)?;
    let access = if read_only { "ro" } else { "rw" };
    let tool = Tool::new("fuse2fs")
        .args(["-f", "-o", &format!("{access},{FUSE2FS_OPTIONS}")])
        .arg(file)
        .arg(at)
        .deaf();
    // Not a pipe: nobody would read it later, and fuse2fs would stop when it is full.
    let said = rustix::fs::memfd_create("fuse2fs", rustix::fs::MemfdFlags::CLOEXEC)
        .attempt(|| "make a file in memory")?;
    let mut said = File::from(said);
    let mut child = tool
        .command()?
        .stdout(share(&said)?)
        .stderr(share(&said)?)
        .spawn()
        .attempt(|| "start fuse2fs")?;
    match wait_for_mount(&mut child, at) {
        Ok(minor) => Ok(Mounted {
            at: at.to_path_buf(),
            view: View::Own,
            minor,
            below: Below::Fuse2fs(child),
            mounted: true,
        }),
        Err(error) => {
            let _ = child.kill(); // an error only when it has ended already
            let _ = child.wait();
            let mut words = String::new();
            let _ = said.rewind().and_then(|()| said.read_to_string(&mut words));
            Err(match words.trim() {
                "" => error,
                words => error.because(words),
            })
        }
    }
}

fn share(file: &File) -> Result<File> {
    file.try_clone().attempt(|| "share a file in memory")
}

/// Repairs what is safe to repair (`e2fsck(8)`: 0 is clean, 1 is repaired).
fn check(file: &Path) -> Result<()> {
    let tool = Tool::new("e2fsck").arg("-p").arg(file).accept(&[0, 1]);
    let output = tool.run_to_any_end()?;
    match output.code() {
        Some(0) => Ok(()),
        Some(1) => {
            warn!("e2fsck repaired the filesystem: {}", output.text());
            Ok(())
        }
        _ => Err(tool.failed(&output).of_kind(Kind::Corrupt).hint(
            "open the image with `cryptsetup open` and run `e2fsck -f` on the mapped device",
        )),
    }
}

fn wait_for_mount(child: &mut Child, at: &Path) -> Result<u32> {
    let start = Instant::now();
    loop {
        if let Some(entry) = mount_table::topmost(at)? {
            return Ok(entry.minor);
        }
        if let Some(status) = child.try_wait().attempt(|| "wait for fuse2fs")? {
            return Err(Error::new(Kind::Io, format!("fuse2fs ended with {status}")));
        }
        if start.elapsed() > FUSE2FS_START_LIMIT {
            let limit = FUSE2FS_START_LIMIT.as_secs();
            let late = format!("fuse2fs did not mount within {limit} s");
            return Err(Error::new(Kind::TimedOut, late));
        }
        std::thread::sleep(POLL);
    }
}

fn not_there(at: &Path) -> Error {
    Error::new(
        Kind::NotFound,
        format!("nothing is mounted on {}", at.display()),
    )
}

/// Runs umount(8) on `at`.
///
/// # Errors
/// [`Kind::InUse`], naming who keeps it busy.
pub fn unmount(at: &Path, view: View) -> Result<()> {
    let tool = Tool::new("umount").arg("--").arg(at).deaf().inside(view);
    let output = tool.run_to_any_end()?;
    if output.status.success() {
        return Ok(());
    }
    let error = tool.failed(&output);
    let error = match output.stderr.contains("busy") {
        false => error,
        true => match holders::sentence(at) {
            Some(held) => Error::new(Kind::InUse, held),
            None => error.of_kind(Kind::InUse),
        },
    };
    Err(error).attempt(|| format!("unmount {}", at.display()))
}

/// Has everything written that was written to the filesystem at `at`, as `sync -f` does.
pub fn sync(at: &Path, view: View) -> Result<()> {
    let tool = Tool::new("sync").args(["-f", "--"]).arg(at).deaf();
    let done = tool.inside(view).run().map(drop);
    done.attempt(|| format!("sync {}", at.display()))
}

/// Takes `at` out of sight now; it ends when its last user lets go of it. For teardown when the
/// device below is dead.
pub fn unmount_lazily(at: &Path, view: View) -> Result<()> {
    let tool = Tool::new("umount").args(["-l", "--"]).arg(at).deaf();
    let done = tool.inside(view).run().map(drop);
    done.attempt(|| format!("detach {}", at.display()))
}

/// The same, after the kernel was told to give up on what serves the filesystem at `at`: whoever
/// waits for it gets an error.
pub fn unmount_by_force(at: &Path, view: View) -> Result<()> {
    let tool = Tool::new("umount").args(["-f", "-l", "-i", "-c", "--"]);
    let done = tool.arg(at).deaf().inside(view).run().map(drop);
    done.attempt(|| format!("detach {} by force", at.display()))
}

impl Mounted {
    pub fn at(&self) -> &Path {
        &self.at
    }

    /// Whether it is still there: anybody may have unmounted it.
    pub fn is_mounted(&self) -> bool {
        let entry = self.view.topmost(&self.at);
        self.mounted && entry.is_ok_and(|entry| entry.is_some_and(|e| e.minor == self.minor))
    }

    /// Unmounts, unless somebody has done it, and waits until everything was handed to the
    /// volume. Waits as long as the volume does: to cut that short, abort the volume.
    ///
    /// # Errors
    /// [`Kind::InUse`], naming who keeps it busy; nothing has changed then, and it can be tried
    /// again. [`Kind::Io`] when the last writes failed.
    pub fn unmount(&mut self) -> Result<()> {
        if self.is_mounted() {
            unmount(&self.at, self.view)?;
        }
        self.release()
    }

    /// Out of sight now, without waiting for anybody who uses it.
    pub fn unmount_lazily(&mut self) -> Result<()> {
        if self.is_mounted() {
            unmount_lazily(&self.at, self.view)?;
        }
        self.release()
    }

    /// What is below lets go of the volume file.
    fn release(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.mounted, false) {
            return Ok(());
        }
        info!(at = %self.at.display(), "unmounted");
        match &mut self.below {
            Below::Loop(device) => {
                device.reset();
                Ok(())
            }
            Below::Fuse2fs(child) => end(child),
        }
    }
}

/// Waits for fuse2fs to have written everything; its exit status says whether it could.
fn end(child: &mut Child) -> Result<()> {
    let start = Instant::now();
    loop {
        match child.try_wait().attempt(|| "wait for fuse2fs")? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => {
                return Err(Error::new(Kind::Io, format!("fuse2fs ended with {status}")));
            }
            None if start.elapsed() > FUSE2FS_END_LIMIT => break,
            None => std::thread::sleep(POLL),
        }
    }
    let _ = child.kill(); // an error only when it has ended meanwhile
    let _ = child.wait();
    let limit = FUSE2FS_END_LIMIT.as_secs();
    let late = format!("fuse2fs did not end within {limit} s of unmounting");
    Err(Error::new(Kind::TimedOut, late))
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        let done = self.unmount().or_else(|error| {
            warn!(error = error.report(), "unmounting out of sight only");
            self.unmount_lazily()
        });
        if let Err(error) = done {
            warn!(error = error.report(), "a mount is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mountpoint_must_be_an_empty_directory_that_exists() {
        let base = tempfile::tempdir().expect("a directory");
        let refused = |at: &Path| check_mountpoint(at).map_err(|error| error.kind());
        let path = base.path().join("at");
        let error = check_mountpoint(&path).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(
            error.report().contains("hint: `mkdir "),
            "{}",
            error.report()
        );

        fs::create_dir(&path).expect("created");
        let link = base.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("linked");
        let canonical = path.canonicalize().expect("exists");
        assert_eq!(refused(&link), Ok(canonical));

        fs::write(path.join("file"), "").expect("written");
        assert_eq!(refused(&path), Err(Kind::Exists));
        assert_eq!(refused(&path.join("file")), Err(Kind::Usage));
        assert_eq!(refused(Path::new("/proc")), Err(Kind::InUse));
        assert_eq!(refused(Path::new("/")), Err(Kind::InUse));
    }
}
