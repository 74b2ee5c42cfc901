//! Making an ext4 that is right even if every block never written reads as noise, as it does in a
//! LUKS image full of holes.
//!
//! mkfs.ext4 may trust that what it does not write is zero, and punch holes or ask for zeroing
//! instead of writing. So it works on a sparse file in memory with the zeroing calls turned off
//! (`UNIX_IO_NOZEROOUT`): whatever it relies on becomes data there, and exactly the data go out.
//! No root and no FUSE is needed.
//!
//! Data for 32 MiB / 1 GiB / 100 GiB / 1 TiB / 5 TiB / 16 TiB / 64 TiB: 0.1 / 0.6 / 5 / 14 / 61 /
//! 203 / 873 MiB, in memory and over the link (e2fsprogs 1.47.0). Inode tables and the journal are
//! left as they are (`lazy_*`; 80 GiB for 5 TiB), and the bitmaps of 4096 groups lie side by side
//! (`-G`), which makes few large requests of them. What is left are copies of the group
//! descriptors. `sparse_super2` would leave out all but two copies (13 MiB for 5 TiB), but the
//! kernel does not grow such a filesystem while it is mounted, and resize2fs 1.47.0 damages it:
//! where the copy in the last group was, it frees a block too many, which belongs to a file.
//! `resize_inode` keeps room for the descriptors of up to 8 TiB more, so that growing moves no
//! tables.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::io::Errno;
use tracing::debug;

use super::tool::Tool;
use crate::error::{Attempt, Error, Kind, Result};
use crate::units::{Bytes, GIB, MIB, TIB};

/// Below this, mkfs.ext4 makes no journal of a useful size.
pub const SIZE_MIN: u64 = 32 * MIB;

/// ext4 itself ends at 1 EiB, but these metadata are all that may be kept in memory.
pub const SIZE_MAX: u64 = 64 * TIB;

/// Blocks are as large as sectors of the encryption, so none is ever half noise.
const BLOCK_SIZE: u64 = 4096;

/// Named one by one: the defaults differ between systems, and some are too new for others.
/// `metadata_csum` finds noise where metadata should be.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,\
    flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// From here on the default journal would be larger than [`JOURNAL_MIB`].
const LARGE: u64 = 64 * GIB;

/// A commit fits many times; each MiB of it may have to be read back after a crash.
const JOURNAL_MIB: u64 = 256;

/// The longest label, in bytes (ext4 superblock, `s_volume_name`).
const LABEL_MAX: usize = 16;

/// The longest run handed out at once.
const RUN_MAX: usize = 1 << 20;

/// Makes an ext4 of `size` bytes and hands out all that must be written, in ascending runs of up
/// to 1 MiB. Gives back the number of bytes handed out.
///
/// Its root directory belongs to the caller. `uuid` in the usual form; one is drawn when it is
/// `None`.
///
/// # Errors
/// [`Kind::Usage`] for a size or label that cannot be, [`Kind::MissingTool`] without mkfs.ext4,
/// and whatever `write` fails with.
pub fn make_ext4(
    size: u64,
    label: &str,
    uuid: Option<&str>,
    write: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<u64> {
    check(size, label)?;
    let memory = rustix::fs::memfd_create("ext4", MemfdFlags::CLOEXEC)
        .attempt(|| "make a file in memory")?;
    rustix::fs::ftruncate(&memory, size)
        .attempt(|| format!("make a file of {size} bytes in memory"))?;
    run_mkfs(&memory, size, label, uuid)?;
    let written = copy_data(memory, write)?;
    debug!(size, written, "ext4 made");
    Ok(written)
}

fn check(size: u64, label: &str) -> Result<()> {
    let refuse = |why| Err(Error::new(Kind::Usage, why));
    if size < SIZE_MIN {
        let (size, min) = (Bytes(size), Bytes(SIZE_MIN));
        return refuse(format!(
            "{size} is too small for ext4 with a journal; the least is {min}"
        ));
    }
    if size > SIZE_MAX {
        let (size, max) = (Bytes(size), Bytes(SIZE_MAX));
        return refuse(format!(
            "{size} is more than the {max} of ext4 that can be made here"
        ));
    }
    if !size.is_multiple_of(BLOCK_SIZE) {
        return refuse(format!("{size} bytes are no multiple of {BLOCK_SIZE}"));
    }
    if label.len() > LABEL_MAX || label.contains('\0') {
        return refuse(format!(
            "the label `{label}` is longer than {LABEL_MAX} bytes"
        ));
    }
    Ok(())
}

fn run_mkfs(memory: &OwnedFd, size: u64, label: &str, uuid: Option<&str>) -> Result<()> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let extended = format!(
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner={}:{}",
        user.as_raw(),
        group.as_raw()
    );
    let mut tool = Tool::new("mkfs.ext4")
        .env("UNIX_IO_NOZEROOUT", "1")
        .args([
            "-q", "-F", "-m", "0", "-b", "4096", "-I", "256", "-G", "4096",
        ])
        .args(["-O", FEATURES, "-E", &extended, "-L", label]);
    if size >= LARGE {
        tool = tool.args(["-J", &format!("size={JOURNAL_MIB}")]);
    }
    if let Some(uuid) = uuid {
        tool = tool.args(["-U", uuid]);
    }
    let input = memory.try_clone().attempt(|| "share a file in memory")?;
    tool.args(["--", "/proc/self/fd/0"]).run_on(input)?;
    Ok(())
}

/// Hands out the data extents of a sparse file.
fn copy_data(memory: OwnedFd, write: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<u64> {
    let file = File::from(memory);
    let mut buffer = vec![0; RUN_MAX];
    let (mut offset, mut written) = (0, 0);
    loop {
        let start = match rustix::fs::seek(&file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(written), // no data from here to the end
            Err(errno) => return Err(errno).attempt(|| "find the data that mkfs.ext4 wrote"),
        };
        let end = rustix::fs::seek(&file, SeekFrom::Hole(start))
            .attempt(|| "find the data that mkfs.ext4 wrote")?;
        offset = start;
        while offset < end {
            let run = &mut buffer[..(end - offset).min(RUN_MAX as u64) as usize];
            file.read_exact_at(run, offset)
                .attempt(|| "read what mkfs.ext4 wrote")?;
            write(offset, run)?;
            offset += run.len() as u64;
            written += run.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(size: u64, label: &str) -> Result<u64> {
        let mut end = 0;
        make_ext4(size, label, None, &mut |offset, run| {
            assert!(
                offset >= end && run.len() <= RUN_MAX,
                "{offset} after {end}"
            );
            end = offset + run.len() as u64;
            assert!(end <= size);
            Ok(())
        })
    }

    #[test]
    fn five_tebibytes_are_some_megabytes() {
        let written = make(5 * TIB, "backup").expect("made");
        assert!((32 * MIB..64 * MIB).contains(&written), "{written}");
    }

    #[test]
    fn what_cannot_be_made_is_refused_with_its_number() {
        for (size, label, said) in [
            (SIZE_MIN - 4096, "", "32.0 MiB"),
            (0, "", "0 B"),
            (SIZE_MAX + 4096, "", "64.0 TiB"),
            (u64::MAX, "", "64.0 TiB"),
            (GIB + 512, "", "1073742336"),
            (GIB, "seventeen bytes!!", "16 bytes"),
        ] {
            let error = make(size, label).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage);
            assert!(error.report().contains(said), "{}", error.report());
        }
        assert!(make(SIZE_MIN, "sixteen bytes...").is_ok());
    }

    #[test]
    fn the_image_refusing_a_write_ends_it() {
        let full = || Error::new(Kind::NoSpace, "full");
        let error = make_ext4(GIB, "", None, &mut |_, _| Err(full())).unwrap_err();
        assert_eq!(error.kind(), Kind::NoSpace);
    }

    #[test]
    fn a_dash_is_no_option_and_a_wrong_uuid_is_told() {
        assert!(make(GIB, "-V").is_ok());
        let error = make_ext4(GIB, "", Some("no"), &mut |_, _| Ok(())).unwrap_err();
        assert!(error.report().contains("UUID"), "{}", error.report());
    }
}
