//! A server in this process that can do what no real one does on demand: end sessions at a given
//! request, forget what was not synced, apply old writes late, fall silent, refuse to be dialled.
//!
//! Each stream is one SFTP session; all of them serve the same files. A file's content is
//! *volatile* until an fsync copies it to what is *synced*; a crash takes that back.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use e2ebak::error::{Error, Kind, Result};
use e2ebak::link::{Dial, Handle, Occasion, Stream};
use e2ebak::sftp::{Attributes, Code, Extended, Limits, OpenFlags, Reply, Request, Status};

/// What is done about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Serve,
    /// Answered by FAILURE.
    Fail,
    /// The session ends before the request is done, after that, or after it was answered.
    EndBefore,
    EndAfter,
    EndAnswered,
    /// The server restarts: all sessions end, and what was not synced is forgotten.
    CrashBefore,
    CrashAfter,
    CrashAnswered,
    /// What is not synced is forgotten and this session ends, but the others only fall silent.
    CrashQuietly,
    /// The session ends; this write and those behind it may be done later.
    Hold,
    /// The session stays, says nothing any more, and keeps its writes for later.
    Swallow,
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Over all sessions, from 1.
    pub number: u64,
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Read,
    Write,
    Sync,
    Resize,
    Open,
    Remove,
    Other,
}

pub type Script = Box<dyn FnMut(Seen) -> Act + Send>;

#[derive(Clone, Default)]
struct File {
    volatile: Vec<u8>,
    synced: Vec<u8>,
}

/// The image has another name, or another file has its name. Lost in a crash, unless that file was
/// synced since.
struct Renamed {
    from: Vec<u8>,
    to: Vec<u8>,
    inode: u64,
    replaced: Option<u64>,
}

/// A write of a session that has ended.
struct Late {
    since: Instant,
    inode: u64,
    offset: u64,
    data: Vec<u8>,
}

struct Session {
    stream: UnixStream,
    silent: bool,
    closed: Closed,
}

/// When the client closed a session, which the server hears later.
type Closed = Arc<OnceLock<Instant>>;

/// Two writes to one place under way at once.
struct Double {
    text: String,
    seen: Instant,
    /// Of the two sessions; either may be the one that was given up, since what it carried is read
    /// when its thread comes to it.
    closed: [Closed; 2],
}

/// A client sends again what a session carried that it has given up, and closes that a little later.
const GIVING_UP: Duration = Duration::from_secs(1);

pub struct World {
    names: BTreeMap<Vec<u8>, u64>,
    files: HashMap<u64, File>,
    renamed: Vec<Renamed>,
    sessions: BTreeMap<u64, Session>,
    late: Vec<Late>,
    /// Older ones come to nothing.
    pub late_max: Duration,
    /// Writes received and not answered: session, file, range.
    under_way: Vec<(u64, u64, Range<u64>)>,
    doubles: Vec<Double>,
    pub script: Script,
    pub requests: u64,
    pub writes: u64,
    pub dials: u64,
    /// From this one on, who dials waits until it is a later one.
    pub dials_held_from: u64,
    /// Writes under way at once on one session, at most.
    pub most_under_way: usize,
    counter: u64,
    refused_until: Instant,
    /// How long nobody can dial after a crash.
    pub restart_takes: Duration,
    pub sessions_max: usize,
    /// How long every answer takes.
    pub round_trip: Duration,
    /// Reads give no more than this.
    pub read_max: usize,
    pub extensions: Vec<(&'static str, &'static str)>,
}

#[derive(Clone)]
pub struct Model(Arc<Mutex<World>>);

pub const IMAGE: &str = "dir/a.img";

/// What begins a LUKS2 image with this UUID.
pub fn head(uuid: &str) -> Vec<u8> {
    let mut head = vec![0; 4096];
    head[..6].copy_from_slice(b"LUKS\xba\xbe");
    head[7] = 2;
    head[168..168 + uuid.len()].copy_from_slice(uuid.as_bytes());
    head
}

pub const UUID: &str = "11111111-2222-4333-8444-555555555555";

impl Model {
    /// With an image of `size` bytes.
    pub fn new(size: usize) -> Self {
        let model = Model(Arc::new(Mutex::new(World {
            names: BTreeMap::new(),
            files: HashMap::new(),
            renamed: Vec::new(),
            sessions: BTreeMap::new(),
            late: Vec::new(),
            late_max: Duration::from_millis(100),
            under_way: Vec::new(),
            doubles: Vec::new(),
            script: Box::new(|_| Act::Serve),
            requests: 0,
            writes: 0,
            dials: 0,
            dials_held_from: u64::MAX,
            most_under_way: 0,
            counter: 0,
            refused_until: Instant::now(),
            restart_takes: Duration::ZERO,
            sessions_max: 100,
            round_trip: Duration::ZERO,
            read_max: usize::MAX,
            extensions: vec![
                ("fsync@openssh.com", "1"),
                ("limits@openssh.com", "1"),
                ("posix-rename@openssh.com", "1"),
                ("hardlink@openssh.com", "1"),
            ],
        })));
        let mut image = head(UUID);
        image.resize(size, 0);
        model.put(IMAGE, &image);
        model
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        // A test that fails with the lock held has said why.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn script(&self, script: impl FnMut(Seen) -> Act + Send + 'static) {
        self.world().script = Box::new(script);
    }

    /// A new file under this name.
    pub fn put(&self, name: &str, content: &[u8]) {
        self.world().create(name.as_bytes(), content);
    }

    pub fn remove(&self, name: &str) {
        self.world().names.remove(name.as_bytes());
    }

    pub fn has(&self, name: &str) -> bool {
        self.world().names.contains_key(name.as_bytes())
    }

    pub fn synced(&self, name: &str) -> Vec<u8> {
        let world = self.world();
        world.files[&world.names[name.as_bytes()]].synced.clone()
    }

    pub fn volatile(&self, name: &str) -> Vec<u8> {
        let world = self.world();
        world.files[&world.names[name.as_bytes()]].volatile.clone()
    }

    /// Cuts or lengthens a file, and syncs it.
    pub fn resize(&self, name: &str, size: usize) {
        let mut world = self.world();
        let inode = world.names[name.as_bytes()];
        let file = world.files.get_mut(&inode).expect("a file");
        file.volatile.resize(size, 0);
        file.synced = file.volatile.clone();
    }

    /// Does the writes of ended sessions, the last first.
    pub fn apply_late(&self) -> usize {
        let mut world = self.world();
        let late: Vec<_> = world.late.drain(..).rev().collect();
        let mut done = 0;
        for late in late {
            if late.since.elapsed() < world.late_max {
                done += 1;
                world.write(late.inode, late.offset, &late.data);
                let file = world.files.get_mut(&late.inode).expect("a file");
                file.synced = file.volatile.clone();
            }
        }
        done
    }

    pub fn refuse_dials(&self, time: Duration) {
        self.world().refused_until = Instant::now() + time;
    }

    pub fn end_all(&self) {
        self.world().end_all();
    }

    pub fn crash(&self) {
        self.world().crash();
    }

    /// What a client must not do: two writes to one place under way at once, on sessions that it
    /// goes on using.
    pub fn violations(&self) -> Vec<String> {
        let world = self.world();
        let used = |double: &&Double| {
            let goes_on = |closed: &Closed| {
                let closed = closed.get();
                closed.is_none_or(|at| at.saturating_duration_since(double.seen) > GIVING_UP)
            };
            double.closed.iter().all(goes_on)
        };
        world
            .doubles
            .iter()
            .filter(used)
            .map(|d| d.text.clone())
            .collect()
    }

    pub fn sessions(&self) -> usize {
        self.world().sessions.len()
    }

    /// Takes requests as they come and has them served a round trip later.
    fn receive(&self, session: u64, mut stream: UnixStream, closed: Closed) {
        let (to, queue) = mpsc::channel::<(Vec<u8>, Instant)>();
        let model = self.clone();
        let answers = stream.try_clone().expect("cloned");
        let server = thread::spawn(move || model.serve(session, answers, &closed, &queue));
        let mut length = [0; 4];
        while stream.read_exact(&mut length).is_ok() {
            let mut packet = vec![0; u32::from_be_bytes(length) as usize];
            if stream.read_exact(&mut packet).is_err() {
                break;
            }
            let rtt = {
                let mut world = self.world();
                if let Ok((
                    _,
                    Request::Write {
                        handle,
                        offset,
                        data,
                    },
                )) = Request::decode(&packet)
                {
                    let range = offset..offset + data.len() as u64;
                    world.takes_off(session, inode_of(handle), range);
                }
                world.round_trip
            };
            let _ = to.send((packet, Instant::now() + rtt));
        }
        drop(to);
        let _ = server.join();
        let mut world = self.world();
        world.sessions.remove(&session);
        world.under_way.retain(|(s, ..)| *s != session);
    }

    fn serve(
        &self,
        session: u64,
        mut stream: UnixStream,
        closed: &Closed,
        queue: &mpsc::Receiver<(Vec<u8>, Instant)>,
    ) {
        // Since when its writes are those of a session that has ended.
        let mut late = None;
        for (packet, when) in queue {
            thread::sleep(when.saturating_duration_since(Instant::now()));
            let (id, request) = Request::decode(&packet).expect("a request");
            let mut world = self.world();
            late = late.or(closed.get().copied());
            if late.is_some() || world.is_silent(session) {
                world.keep_late(&request, late);
                continue;
            }
            if !world.sessions.contains_key(&session) {
                continue;
            }
            let act = match request {
                Request::Init { .. } => Act::Serve,
                _ => world.ask(&request),
            };
            match act {
                Act::EndBefore => world.end(session),
                Act::CrashBefore => world.crash(),
                Act::CrashQuietly => world.crash_quietly(session),
                Act::Hold => {
                    late = Some(Instant::now());
                    world.keep_late(&request, late);
                    world.end(session);
                }
                Act::Swallow => {
                    world.keep_late(&request, None);
                    world.sessions.get_mut(&session).expect("up").silent = true;
                }
                _ => {
                    let reply = match act {
                        Act::Fail => status(Code::Failure),
                        _ => world.answer(&request),
                    };
                    world.lands(session, &request);
                    let mut wire = Vec::new();
                    reply.encode(id, &mut wire).expect("short");
                    if !matches!(act, Act::EndAfter | Act::CrashAfter) {
                        drop(world);
                        let _ = stream.write_all(&wire); // the client may have gone
                        world = self.world();
                    }
                    match act {
                        Act::EndAfter | Act::EndAnswered => world.end(session),
                        Act::CrashAfter | Act::CrashAnswered => world.crash(),
                        _ => {}
                    }
                }
            }
        }
    }
}

fn status(code: Code) -> Reply {
    Reply::Status(Status::new(code, "so be it"))
}

fn inode_of(handle: &[u8]) -> u64 {
    let text = std::str::from_utf8(handle).expect("our handle");
    text.parse().expect("our handle")
}

impl World {
    fn create(&mut self, name: &[u8], content: &[u8]) -> u64 {
        self.counter += 1;
        let file = File {
            volatile: content.to_vec(),
            synced: content.to_vec(),
        };
        self.files.insert(self.counter, file);
        self.names.insert(name.to_vec(), self.counter);
        self.counter
    }

    /// What a kernel does that drops pages it could not store.
    pub fn set_volatile(&mut self, name: &str, content: &[u8]) {
        let inode = self.names[name.as_bytes()];
        self.files.get_mut(&inode).expect("a file").volatile = content.to_vec();
    }

    fn end(&mut self, session: u64) {
        if let Some(session) = self.sessions.remove(&session) {
            let _ = session.stream.shutdown(Shutdown::Both);
        }
        self.under_way.retain(|(s, ..)| *s != session);
    }

    fn end_all(&mut self) {
        let all: Vec<u64> = self.sessions.keys().copied().collect();
        all.into_iter().for_each(|session| self.end(session));
    }

    fn forget_unsynced(&mut self) {
        for file in self.files.values_mut() {
            file.volatile = file.synced.clone();
        }
        for lost in std::mem::take(&mut self.renamed).into_iter().rev() {
            self.names.remove(&lost.to);
            self.names.insert(lost.from, lost.inode);
            if let Some(replaced) = lost.replaced {
                self.names.insert(lost.to, replaced);
            }
        }
        self.late.clear();
        self.refused_until = Instant::now() + self.restart_takes;
    }

    fn crash(&mut self) {
        self.end_all();
        self.forget_unsynced();
    }

    fn crash_quietly(&mut self, session: u64) {
        self.end(session);
        self.sessions.values_mut().for_each(|s| s.silent = true);
        // What they hold went with the server.
        self.forget_unsynced();
    }

    fn is_silent(&self, session: u64) -> bool {
        self.sessions.get(&session).is_some_and(|s| s.silent)
    }

    fn ask(&mut self, request: &Request<'_>) -> Act {
        self.requests += 1;
        let what = match request {
            Request::Read { .. } => What::Read,
            Request::Write { .. } => What::Write,
            Request::Extended(Extended::Fsync { .. }) => What::Sync,
            Request::Fsetstat { .. } => What::Resize,
            Request::Open { .. } => What::Open,
            Request::Remove { .. } => What::Remove,
            _ => What::Other,
        };
        self.writes += u64::from(what == What::Write);
        let number = self.requests;
        (self.script)(Seen { number, what })
    }

    /// A write is under way: nowhere else may another one to the same place be.
    fn takes_off(&mut self, session: u64, inode: u64, range: Range<u64>) {
        // What is read of a session that has ended was on its way then: it is late, and no more.
        let is_up = |s: &Session| s.closed.get().is_none();
        if !self.sessions.get(&session).is_some_and(is_up) {
            return;
        }
        let overlaps = |(other, file, known): &&(u64, u64, Range<u64>)| {
            *file == inode
                && *other != session
                && known.start < range.end
                && range.start < known.end
                && self
                    .sessions
                    .get(other)
                    .is_some_and(|s| s.closed.get().is_none())
        };
        let ours = self.sessions.get(&session);
        if let Some((other, _, known)) = self.under_way.iter().find(overlaps)
            && let Some(ours) = ours
        {
            let text = format!(
                "{range:?} on session {session} while {known:?} is under way on session {other}"
            );
            self.doubles.push(Double {
                text,
                seen: Instant::now(),
                closed: [self.sessions[other].closed.clone(), ours.closed.clone()],
            });
        }
        self.under_way.push((session, inode, range));
        let of_session = self.under_way.iter().filter(|(s, ..)| *s == session);
        self.most_under_way = self.most_under_way.max(of_session.count());
    }

    fn lands(&mut self, session: u64, request: &Request<'_>) {
        let Request::Write {
            handle,
            offset,
            data,
        } = request
        else {
            return;
        };
        let entry = (
            session,
            inode_of(handle),
            *offset..offset + data.len() as u64,
        );
        if let Some(at) = self.under_way.iter().position(|known| *known == entry) {
            self.under_way.remove(at);
        }
    }

    fn keep_late(&mut self, request: &Request<'_>, since: Option<Instant>) {
        if let Request::Write {
            handle,
            offset,
            data,
        } = request
        {
            self.late.push(Late {
                since: since.unwrap_or_else(Instant::now),
                inode: inode_of(handle),
                offset: *offset,
                data: data.to_vec(),
            });
        }
    }

    fn write(&mut self, inode: u64, offset: u64, data: &[u8]) {
        let file = self.files.get_mut(&inode).expect("a file");
        let (start, end) = (offset as usize, offset as usize + data.len());
        if file.volatile.len() < end {
            file.volatile.resize(end, 0);
        }
        file.volatile[start..end].copy_from_slice(data);
    }

    fn attributes(&self, inode: u64) -> Reply {
        let size = self.files[&inode].volatile.len() as u64;
        Reply::Attributes(Attributes::with_size(size))
    }

    fn answer(&mut self, request: &Request<'_>) -> Reply {
        let ok = || status(Code::Ok);
        match *request {
            Request::Init { .. } => Reply::Version {
                version: 3,
                extensions: self
                    .extensions
                    .iter()
                    .map(|(n, d)| ((*n).into(), (*d).into()))
                    .collect(),
            },
            Request::Open { path, flags, .. } => {
                let known = self.names.get(path).copied();
                let inode = match known {
                    Some(_) if flags.contains(OpenFlags::EXCLUSIVE) => {
                        return status(Code::Failure);
                    }
                    Some(inode) => inode,
                    None if flags.contains(OpenFlags::CREATE) => self.create(path, &[]),
                    None => return status(Code::NoSuchFile),
                };
                Reply::Handle(inode.to_string().into_bytes())
            }
            Request::Close { .. } => ok(),
            Request::Read {
                handle,
                offset,
                len,
            } => {
                let content = &self.files[&inode_of(handle)].volatile;
                let start = offset as usize;
                if start >= content.len() {
                    return status(Code::Eof);
                }
                let end = content.len().min(start + (len as usize).min(self.read_max));
                Reply::Data(content[start..end].to_vec().into())
            }
            Request::Write {
                handle,
                offset,
                data,
            } => {
                self.write(inode_of(handle), offset, data);
                ok()
            }
            Request::Fstat { handle } => self.attributes(inode_of(handle)),
            Request::Stat { path } | Request::Lstat { path } => match self.names.get(path) {
                Some(inode) => self.attributes(*inode),
                None => status(Code::NoSuchFile),
            },
            Request::Fsetstat {
                handle,
                ref attributes,
            } => {
                let file = self.files.get_mut(&inode_of(handle)).expect("a file");
                let size = attributes.size.expect("a size") as usize;
                file.volatile.resize(size, 0);
                ok()
            }
            Request::Remove { path } => match self.names.remove(path) {
                Some(_) => ok(),
                None => status(Code::NoSuchFile),
            },
            Request::Extended(Extended::Fsync { handle }) => {
                let inode = inode_of(handle);
                let file = self.files.get_mut(&inode).expect("a file");
                file.synced = file.volatile.clone();
                self.renamed.retain(|renamed| renamed.inode != inode);
                ok()
            }
            Request::Extended(Extended::Limits) => Reply::Extended(
                Limits {
                    read: 8192,
                    write: 8192,
                    ..Limits::default()
                }
                .encode(),
            ),
            Request::Extended(Extended::PosixRename { from, to }) => {
                match self.names.remove(from) {
                    Some(inode) => {
                        let replaced = self.names.insert(to.to_vec(), inode);
                        if [from, to].contains(&IMAGE.as_bytes()) {
                            self.renamed.push(Renamed {
                                from: from.to_vec(),
                                to: to.to_vec(),
                                inode,
                                replaced,
                            });
                        }
                        ok()
                    }
                    None => status(Code::NoSuchFile),
                }
            }
            Request::Extended(Extended::Hardlink { from, to }) => match self.names.get(from) {
                Some(_) if self.names.contains_key(to) => status(Code::Failure),
                Some(inode) => {
                    let inode = *inode;
                    self.names.insert(to.to_vec(), inode);
                    ok()
                }
                None => status(Code::NoSuchFile),
            },
            _ => status(Code::OpUnsupported),
        }
    }
}

struct Ends([UnixStream; 2], Closed);

impl Handle for Ends {
    fn close(&self) {
        let _ = self.1.set(Instant::now()); // the first time counts
        for end in &self.0 {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
    fn diagnosis(&self) -> Option<Error> {
        None
    }
}

impl Dial for Model {
    fn dial(&self, _: Occasion) -> Result<Stream> {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let mut world = self.world();
        world.dials += 1;
        let number = world.dials;
        while number >= world.dials_held_from {
            drop(world);
            thread::sleep(Duration::from_millis(1));
            world = self.world();
        }
        let full = world.sessions.len() >= world.sessions_max;
        if full || Instant::now() < world.refused_until {
            return Err(Error::new(Kind::Disconnected, "connection refused"));
        }
        world.counter += 1;
        let session = world.counter;
        let closed = Closed::default();
        let told = closed.clone();
        let known = Session {
            stream: theirs.try_clone().expect("cloned"),
            silent: false,
            closed: closed.clone(),
        };
        world.sessions.insert(session, known);
        drop(world);
        let model = self.clone();
        thread::spawn(move || model.receive(session, theirs, told));
        let clone = || ours.try_clone().expect("cloned");
        Ok(Stream {
            reader: Box::new(clone()),
            writer: Box::new(clone()),
            handle: Arc::new(Ends([clone(), clone()], closed)),
        })
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(2)
    }
}
