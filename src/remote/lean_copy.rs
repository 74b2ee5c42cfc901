//! A copy of the image with only what is needed in it, made by the server itself (`copy-data`).
//!
//! SFTP has no way to punch a hole. But a fresh file has holes wherever nobody writes, and the
//! extension `copy-data` has the server copy ranges from one open file to another. The new file
//! takes the image's name by one rename, when it is whole and synced; until then the image is what
//! it was, and what an interrupted run leaves is removed by the next.

use std::ops::Range;
use std::sync::{Arc, mpsc};

use super::files::{Files, OpenHandle, directory_of};
use super::{transfer, verdict};
use crate::error::{Error, Kind, Result};
use crate::location::RemotePath;
use crate::sftp::{Attributes, Extended, Extension, OpenFlags, Request};
use crate::units::{Bytes, MIB};

/// Added to the image's name while the copy is made. The same each time, so that it is found again.
const SUFFIX: &str = ".trim";

/// One request. The server answers when it is done; at 20 MB/s this takes three seconds.
const STEP: u64 = 64 * MIB;

/// Requests under way: enough to keep a server busy while the answers travel.
const IN_FLIGHT: usize = 16;

/// Room that must be left over on the server.
const MARGIN: u64 = 64 * MIB;

/// As much of the beginning is compared before the copy takes its place: both LUKS headers.
const COMPARED: usize = 64 << 10;

pub struct Plan<'a> {
    /// Bytes of the image.
    pub size: u64,
    /// What is copied, ascending.
    pub live: &'a [Range<u64>],
    /// Told how many bytes are copied.
    pub tell: &'a dyn Fn(u64),
    /// Whether to go on.
    pub check: &'a dyn Fn() -> Result<()>,
    /// Whether nobody else writes the image: asked once, last of all before it is replaced.
    pub still_ours: &'a dyn Fn() -> Result<()>,
}

pub fn by_copy_data(files: &Arc<Files>, path: &RemotePath, plan: &Plan<'_>) -> Result<()> {
    for needed in [
        Extension::CopyData,
        Extension::PosixRename,
        Extension::Fsync,
    ] {
        if !files.has(needed) {
            let lacks = format!("the server lacks the SFTP extension {}", needed.name());
            return Err(Error::new(Kind::Unsupported, lacks));
        }
    }
    let image = path.as_str();
    let copy = path.with_suffix(SUFFIX);
    let path = image.as_bytes();
    let found = verdict::attributes(files.engine.call(&Request::Lstat { path })?)?;
    if found.is_regular() == Some(false) {
        let why = "its path is a symbolic link, which a rename would replace";
        return Err(Error::new(Kind::Unsupported, why).hint("give the path that it points to"));
    }
    if found.size.is_some_and(|size| size != plan.size) {
        return Err(Error::new(
            Kind::InUse,
            "the image has changed its size meanwhile",
        ));
    }
    files.remove_if_there(copy.as_str())?;
    check_room(files, image, plan)?;
    let made = fill(files, image, copy.as_str(), &found, plan);
    made.and_then(|()| {
        (plan.check)()?;
        (plan.still_ours)()?;
        files.demand(&Request::Extended(Extended::PosixRename {
            from: copy.as_str().as_bytes(),
            to: image.as_bytes(),
        }))
    })
}

/// Removes what a copy that failed has left.
pub fn clean_up(files: &Arc<Files>, path: &RemotePath) -> Result<()> {
    files.remove_if_there(path.with_suffix(SUFFIX).as_str())
}

fn check_room(files: &Arc<Files>, image: &str, plan: &Plan<'_>) -> Result<()> {
    let needed: u64 = plan.live.iter().map(|range| range.end - range.start).sum();
    if !files.has(Extension::StatVfs) {
        return Ok(());
    }
    let free = files.statvfs(directory_of(image))?.bytes_available();
    match needed.saturating_add(MARGIN) <= free {
        true => Ok(()),
        false => Err(Error::new(
            Kind::NoSpace,
            format!(
                "copying takes {} for a while, and {} are free on the server",
                Bytes(needed.saturating_add(MARGIN)),
                Bytes(free)
            ),
        )),
    }
}

fn fill(
    files: &Arc<Files>,
    image: &str,
    copy: &str,
    like: &Attributes,
    plan: &Plan<'_>,
) -> Result<()> {
    let from = files.open(image, OpenFlags::READ)?;
    let to = files.create(copy)?;
    if let Some(mode) = like.permissions {
        files.demand(&Request::Fsetstat {
            handle: to.bytes(),
            attributes: Attributes::with_permissions(mode & 0o7777),
        })?;
    }
    to.set_size(plan.size)?;
    copy_ranges(files, &from, &to, plan).map_err(|error| files.look_for_room(copy, error))?;
    to.sync()?;
    let mut begins = [vec![0; COMPARED], vec![0; COMPARED]];
    for (buf, handle) in begins.iter_mut().zip([&from, &to]) {
        transfer::read_exact_at(&files.engine, handle.bytes(), buf, 0)?;
    }
    if begins[0] != begins[1] {
        return Err(Error::new(
            Kind::Io,
            "the server has not copied what it said",
        ));
    }
    to.close()
}

fn copy_ranges(
    files: &Arc<Files>,
    from: &OpenHandle,
    to: &OpenHandle,
    plan: &Plan<'_>,
) -> Result<()> {
    let (sender, completions) = mpsc::channel();
    let mut steps = plan.live.iter().flat_map(|range| {
        let starts = (range.start..range.end).step_by(STEP as usize);
        starts.map(|start| start..(start + STEP).min(range.end))
    });
    let (mut in_flight, mut copied, mut failure) = (0, 0, None);
    loop {
        while in_flight < IN_FLIGHT
            && failure.is_none()
            && let Some(step) = steps.next()
        {
            let len = step.end - step.start;
            let request = Request::Extended(Extended::CopyData {
                from: from.bytes(),
                from_offset: step.start,
                len,
                to: to.bytes(),
                to_offset: step.start,
            });
            let tag = usize::try_from(len).unwrap_or(usize::MAX);
            let submitted =
                (plan.check)().and_then(|()| files.engine.submit(&request, tag, &sender));
            match submitted {
                Ok(()) => in_flight += 1,
                Err(error) => failure = Some(error),
            }
        }
        if in_flight == 0 {
            return failure.map_or(Ok(()), Err);
        }
        // After a failure too: nothing may be under way when the copy is removed.
        let answered = files.engine.wait(&completions);
        in_flight -= 1;
        match answered.and_then(|(tag, reply)| verdict::done(&reply).map(|()| tag)) {
            Ok(len) => {
                copied += len as u64;
                (plan.tell)(copied);
            }
            Err(error) if error.kind().may_be_retried() => return Err(error),
            Err(error) => drop(failure.get_or_insert(error)),
        }
    }
}
