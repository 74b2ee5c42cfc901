//! An image over sessions that may break: whoever reads and writes it sees latency, no errors, up
//! to the deadline.
//!
//! A write is kept until a flush covers it (see `unsynced.rs`), so that it can be sent again. A
//! place is on its way only once at a time, which keeps the order of two writes to it over any
//! number of sessions. A flush syncs on one session: by then all that it covers is answered, and
//! what another session's server process has taken is in the same file. A thread of our own
//! flushes meanwhile, so that little is kept and the server syncs as it goes; and it writes held
//! places once more when their suspicion ends.

mod flush;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::Access;
use super::files::OpenHandle;
use super::lanes::{self, Errand, Lanes, Proof, Session};
use super::packets::Chunk;
use super::unsynced::{Unsynced, lay_over};
use super::{transfer, verdict};
use crate::buffer::Buffer;
use crate::device::{Caps, Device, Discard, Durability, check_range};
use crate::error::{Attempt, Error, Kind, Result};
use crate::location::RemotePath;
use crate::luks;
use crate::sftp::{Extension, OpenFlags, Request};
use crate::units::MIB;

/// Above so many kept bytes a flush is begun.
const FLUSH_ABOVE: u64 = 32 * MIB;

/// Writers wait while so much is kept: what is on its way, and what two flushes let go of.
const KEPT_MAX: u64 = 96 * MIB;

/// The longest write that is kept as one.
const PIECE: usize = 4 * MIB as usize;

/// How often those who wait look up.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How often the one that waits for late writes looks.
const SETTLE_LOOK_MIN: Duration = Duration::from_millis(5);
const SETTLE_LOOK_MAX: Duration = Duration::from_secs(1);

/// What tells the image from any other file.
struct Identity {
    /// Of the LUKS2 header; `None` where there is none yet.
    uuid: Mutex<Option<String>>,
    size: AtomicU64,
    /// While it is being resized it may have either of two sizes, also after a break.
    sizes: Mutex<Vec<u64>>,
}

struct Shared {
    lanes: Arc<Lanes>,
    /// What new sessions are asked for while this is open.
    demand: String,
    path: RemotePath,
    /// The location as the user wrote it, for messages.
    name: String,
    access: Access,
    identity: Arc<Identity>,
    /// By the session's number.
    handles: Mutex<Vec<(u64, Arc<OpenHandle>)>>,
    caps: Caps,
    kept: Mutex<Kept>,
    /// A place became free, or bytes were let go.
    freed: Condvar,
    /// Something for the flushing thread.
    work: Condvar,
    /// Held by the one that flushes.
    flushing: Mutex<()>,
    /// Held by the one that resizes; until when a resizing that broke may still be done.
    resizing: Mutex<Option<Instant>>,
}

#[derive(Default)]
struct Kept {
    log: Unsynced,
    /// When the oldest of it was written.
    since: Option<Instant>,
    closed: bool,
}

/// See the [module](self).
pub struct Redial {
    shared: Arc<Shared>,
    flusher: Option<JoinHandle<()>>,
}

impl Redial {
    /// Takes over a file that was opened on a session of `lanes`.
    pub fn new(
        lanes: Arc<Lanes>,
        session: &Arc<Session>,
        handle: OpenHandle,
        path: &RemotePath,
        name: &str,
        access: Access,
    ) -> Result<Redial> {
        let asked = Instant::now();
        let size = size_of(&handle)?;
        lanes.note_round_trip(asked.elapsed());
        let engine = &session.files.engine;
        let chunk = engine.read_chunk().min(engine.write_chunk());
        let caps = Caps {
            alignment: 1,
            io_best: u32::try_from(chunk).unwrap_or(u32::MAX),
            writable: access == Access::ReadWrite,
            durability: match session.files.has(Extension::Fsync) {
                true => Durability::Stable,
                false => Durability::BestEffort,
            },
            discard: Discard::Refused,
        };
        let identity = Arc::new(Identity {
            uuid: Mutex::new(None),
            size: AtomicU64::new(size),
            sizes: Mutex::new(vec![size]),
        });
        // Several files may be open over the same sessions, and each asks for its own.
        let demand = format!("image {}", lanes.tick());
        lanes.demand(&demand, Some(proof(identity.clone(), path.clone())));
        let shared = Arc::new(Shared {
            lanes,
            demand,
            path: path.clone(),
            name: name.into(),
            access,
            identity,
            handles: Mutex::new(vec![(session.number, Arc::new(handle))]),
            caps,
            kept: Mutex::default(),
            freed: Condvar::new(),
            work: Condvar::new(),
            flushing: Mutex::new(()),
            resizing: Mutex::new(None),
        });
        let flusher = match access {
            Access::ReadOnly => None,
            Access::ReadWrite => {
                let shared = shared.clone();
                let thread = thread::Builder::new().name("link-flush".into());
                Some(thread.spawn(move || shared.flush_by_and_by())?)
            }
        };
        Ok(Redial { shared, flusher })
    }

    /// Waits until no write of a broken connection can reach the file any more, and what was
    /// written since over such places is stored for good. `tell` hears how long that will take.
    pub fn settle(&self, tell: &dyn Fn(Duration)) -> Result<()> {
        self.shared.settle(tell)
    }
}

impl Redial {
    fn write_checked(
        &self,
        len: usize,
        offset: u64,
        write: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.shared.check_writable()?;
        check_range(self.caps(), self.size(), offset, len)
            .and_then(|()| write())
            .map_err(|error| self.shared.look_for_room(error))
            .attempt(|| {
                format!(
                    "write {len} bytes at offset {offset} of {}",
                    self.shared.name
                )
            })
    }
}

impl Drop for Redial {
    fn drop(&mut self) {
        lock(&self.shared.kept).closed = true;
        self.shared.work.notify_all();
        if let Some(flusher) = self.flusher.take() {
            let _ = flusher.join(); // a panic there has been reported there
        }
        self.shared.lanes.demand(&self.shared.demand, None);
        // Each holds its session, and the last to let go of one waits for its end.
        lock(&self.shared.handles).clear();
    }
}

pub fn open_flags(access: Access) -> OpenFlags {
    match access {
        Access::ReadOnly => OpenFlags::READ,
        Access::ReadWrite => OpenFlags::READ | OpenFlags::WRITE,
    }
}

/// The size of a regular file.
fn size_of(handle: &OpenHandle) -> Result<u64> {
    let request = Request::Fstat {
        handle: handle.bytes(),
    };
    let found = verdict::attributes(handle.files.engine.call(&request)?)?;
    if found.is_regular() == Some(false) {
        return Err(Error::new(Kind::Usage, "it is not a regular file"));
    }
    let silent = || Error::new(Kind::Unsupported, "the server does not tell its size");
    found.size.ok_or_else(silent)
}

/// Whether a new session leads to the image that the others led to.
fn proof(identity: Arc<Identity>, path: RemotePath) -> Proof {
    lanes::proof(move |files| {
        let handle = files
            .open(path.as_str(), OpenFlags::READ)
            .attempt(|| "open the image again")?;
        identity.check(&handle)
    })
}

impl Identity {
    /// Whether a file that was opened is the image: as long, and with the same LUKS2 header on it.
    fn check(&self, handle: &OpenHandle) -> Result<()> {
        let other = |why: String| {
            Error::new(Kind::Corrupt, why)
                .hint("somebody has changed or replaced the image while it was in use; look at it before you run anything again")
        };
        // Before and after: somebody may resize it meanwhile.
        let mut known = lock(&self.sizes).clone();
        let size = size_of(handle)?;
        known.extend_from_slice(&lock(&self.sizes));
        if !known.contains(&size) {
            let known = self.size.load(Ordering::Acquire);
            return Err(other(format!(
                "the image is {size} bytes long now, and was {known} bytes before the link broke"
            )));
        }
        let known = lock(&self.uuid).clone();
        let Some(known) = known else { return Ok(()) };
        let mut head = [0; luks::HEAD_BYTES];
        transfer::read_exact_at(&handle.files.engine, handle.bytes(), &mut head, 0)?;
        match luks::uuid_of(&head) {
            Some(uuid) if uuid == known => Ok(()),
            found => Err(other(format!(
                "the image had the UUID {known} before the link broke, and has {} now",
                found.as_deref().unwrap_or("none")
            ))),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics with one of these locks held; if it did, the state is still whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// The image, open on this session.
    fn handle(&self, session: &Arc<Session>) -> Result<Arc<OpenHandle>> {
        let known = |handles: &Vec<(u64, Arc<OpenHandle>)>| {
            let of_session = handles.iter().find(|(number, _)| *number == session.number);
            of_session.map(|(_, handle)| handle.clone())
        };
        if let Some(handle) = known(&lock(&self.handles)) {
            return Ok(handle);
        }
        // Two threads may open it at the same time; the one that comes second is closed again.
        let opened = session
            .files
            .open(self.path.as_str(), open_flags(self.access))?;
        // Once more: since the session was proved, another file may have taken its name.
        if let Err(error) = self.identity.check(&opened) {
            if error.kind() == Kind::Corrupt {
                return Err(self.lanes.disprove(&error));
            }
            return Err(error);
        }
        let opened = Arc::new(opened);
        let mut handles = lock(&self.handles);
        if let Some(handle) = known(&handles) {
            return Ok(handle);
        }
        handles.retain(|(_, handle)| handle.files.engine.dead().is_none());
        handles.push((session.number, opened.clone()));
        Ok(opened)
    }

    fn check_writable(&self) -> Result<()> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(Error::new(
                Kind::ReadOnly,
                format!("{} was opened for reading only", self.name),
            )),
        }
    }

    fn size(&self) -> u64 {
        self.identity.size.load(Ordering::Acquire)
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = offset..offset + buf.len() as u64;
        // Kept before: it may be let go while the server's older data are still on their way here.
        let before = lock(&self.kept).log.pieces(&range);
        self.lanes.run(Errand::Read(buf.len()), |session| {
            let handle = self.handle(session)?;
            transfer::read_exact_at(&session.files.engine, handle.bytes(), buf, offset)
        })?;
        let after = lock(&self.kept).log.pieces(&range);
        // A header that is not synced yet may be forgotten by the server.
        let is_synced = before.is_empty() && after.is_empty();
        if offset == 0 && buf.len() >= luks::HEAD_BYTES && is_synced {
            *lock(&self.identity.uuid) = luks::uuid_of(buf);
        }
        lay_over(buf, offset, &before);
        lay_over(buf, offset, &after);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        let mut at = offset;
        for piece in data.chunks(PIECE) {
            // A buffer for each: a flush lets go of them one by one.
            self.write_buffer(Buffer::from(piece), at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write_buffer(&self, data: Buffer, offset: u64) -> Result<()> {
        let range = 0..data.len();
        let bytes = Arc::new(data);
        self.write_piece(Chunk { bytes, range }, offset)
    }

    fn write_piece(&self, data: Chunk, offset: u64) -> Result<()> {
        let range = offset..offset + data.range.len() as u64;
        let mut kept = lock(&self.kept);
        loop {
            if let Some(why) = self.lanes.over() {
                return Err(why);
            }
            let full = kept.log.bytes() >= KEPT_MAX;
            if !full && !kept.log.is_busy(&range) {
                break;
            }
            if full {
                self.work.notify_all();
            }
            let waited = self.freed.wait_timeout(kept, LOOK_EVERY);
            kept = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        kept.log.begin(offset, data.clone());
        let overdue = kept.log.bytes() >= FLUSH_ABOVE;
        kept.since.get_or_insert_with(Instant::now);
        if overdue {
            self.work.notify_all();
        }
        drop(kept);
        self.send(&range, &data, Unsynced::refused)
    }

    /// Sends a range that was put on its way; `refused` notes that the server does not take it.
    fn send(
        &self,
        range: &Range<u64>,
        data: &Chunk,
        refused: fn(&mut Unsynced, &Range<u64>),
    ) -> Result<()> {
        let sent = self.lanes.run(Errand::Write(data.range.len()), |session| {
            let handle = self.handle(session)?;
            let sent = self.lanes.tick();
            let engine = &session.files.engine;
            let written = transfer::write_chunk(engine, handle.bytes(), data, range.start);
            if written.is_err() && session.is_dead() {
                let until = Instant::now() + engine.late_writes();
                lock(&self.kept).log.suspect(range.clone(), until);
            }
            written.map(|()| sent)
        });
        let mut kept = lock(&self.kept);
        let outcome = match sent {
            Ok(sent) => {
                kept.log.answered(range, sent, self.lanes.tick());
                Ok(())
            }
            Err(error) => {
                refused(&mut kept.log, range);
                Err(error)
            }
        };
        drop(kept);
        self.freed.notify_all();
        outcome
    }

    fn settle(&self, tell: &dyn Fn(Duration)) -> Result<()> {
        let mut failed = None;
        loop {
            let (until, holds) = {
                let mut kept = lock(&self.kept);
                kept.log.end_suspicions(Instant::now());
                (kept.log.suspicious_until(), kept.log.holds())
            };
            // A resizing, too, may land late.
            let resizing = lock(&self.resizing).filter(|late| *late > Instant::now());
            let until = until.max(resizing);
            if until.is_none() && (!holds || failed.is_some()) {
                if let Some(error) = failed {
                    return Err(error);
                }
                // What the flush sends may be lost as well.
                match self.flush() {
                    Ok(()) if lock(&self.kept).log.suspicious_until().is_none() => return Ok(()),
                    Ok(()) => {}
                    Err(error) => failed = Some(error),
                }
                continue;
            }
            if let Some(why) = self.lanes.over() {
                return Err(why);
            }
            // Held without a suspicion is what is on its way at this moment.
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let left = left.unwrap_or_default();
            if !left.is_zero() {
                tell(left);
            }
            thread::sleep(left.clamp(SETTLE_LOOK_MIN, SETTLE_LOOK_MAX));
        }
    }

    fn resize(&self, size: u64) -> Result<()> {
        let mut late = lock(&self.resizing);
        // A late resizing would cut off what is written after this one.
        while let Some(until) = *late {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                *late = None;
            } else if let Some(why) = self.lanes.over() {
                return Err(why);
            }
            thread::sleep(left.min(SETTLE_LOOK_MAX));
        }
        lock(&self.identity.sizes).push(size);
        // Synced at once: a server that restarts may not forget it.
        self.lanes.run(Errand::Control, |session| {
            let handle = self.handle(session)?;
            let resized = handle.set_size(size);
            if resized.is_err() && session.is_dead() {
                *late = Some(Instant::now() + session.files.engine.late_writes());
            }
            resized?;
            handle.sync().inspect_err(|_| {
                // As after any sync that fails: the server may have dropped what it could not store.
                if !session.is_dead() {
                    lock(&self.kept).log.doubt(self.lanes.tick());
                }
            })
        })?;
        self.identity.size.store(size, Ordering::Release);
        *lock(&self.identity.sizes) = vec![size];
        lock(&self.kept).log.truncate(size);
        Ok(())
    }

    fn look_for_room(&self, error: Error) -> Error {
        if error.kind() != Kind::Io {
            return error;
        }
        let told = crate::error::Told::from(&error);
        let looked = self.lanes.run(Errand::Control, |session| {
            let again = Error::from(told.clone());
            Ok(session.files.look_for_room(self.path.as_str(), again))
        });
        looked.unwrap_or(error)
    }
}

impl Device for Redial {
    fn caps(&self) -> Caps {
        self.shared.caps
    }

    fn size(&self) -> u64 {
        self.shared.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len();
        check_range(self.caps(), self.size(), offset, len)
            .and_then(|()| self.shared.read(buf, offset))
            .attempt(|| {
                format!(
                    "read {len} bytes at offset {offset} of {}",
                    self.shared.name
                )
            })
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.write_checked(data.len(), offset, || self.shared.write(data, offset))
    }

    /// Keeps the buffer until a flush covers it.
    fn write_buffer_at(&self, data: Buffer, offset: u64) -> Result<()> {
        if data.is_empty() || data.len() > PIECE {
            return self.write_all_at(&data, offset);
        }
        let len = data.len();
        self.write_checked(len, offset, || self.shared.write_buffer(data, offset))
    }

    fn flush(&self) -> Result<()> {
        if self.shared.access == Access::ReadOnly {
            return Ok(());
        }
        self.shared
            .flush()
            .map_err(|error| self.shared.look_for_room(error))
            .attempt(|| format!("sync {}", self.shared.name))
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        Err(Error::new(
            Kind::Unsupported,
            format!(
                "discard bytes {} to {} of {}: plain SFTP cannot punch holes",
                range.start, range.end, self.shared.name
            ),
        ))
    }

    fn resize(&self, size: u64) -> Result<()> {
        let shared = &self.shared;
        shared.check_writable()?;
        shared
            .resize(size)
            .map_err(|error| shared.look_for_room(error))
            .attempt(|| format!("resize {} to {size} bytes", shared.name))
    }
}
