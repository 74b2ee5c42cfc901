//! A relay between the program and OpenSSH's own SFTP server that counts requests, and can end all
//! sessions at any of them, or play a server that restarts and has forgotten what was not synced.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use e2ebak::sftp::{Code, Extended, Reply, Request};

use crate::common::{Place, Sandbox, find_tool};

/// What is done about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Pass,
    /// All sessions end before the request has come through, or a little after that.
    CutBefore,
    CutAfter,
    /// The server restarts: all sessions end, and what was written since the last fsync of the
    /// image is as it was before.
    Forget,
}

/// Decides by the request's number, from 1 since the script was set.
pub type Script = Box<dyn FnMut(u64) -> Act + Send>;

/// A write to the image that no fsync has covered.
struct Unsynced {
    /// Session and request.
    by: (u64, u32),
    answered: bool,
    offset: u64,
    before: Vec<u8>,
}

struct Session {
    server: Child,
    client: UnixStream,
    /// Of the image, open in this session.
    handles: HashSet<Vec<u8>>,
    /// Requests that have opened it, and fsyncs with what they cover.
    opens: HashSet<u32>,
    syncs: HashMap<u32, Vec<(u64, u32)>>,
}

struct State {
    script: Script,
    requests: u64,
    /// How often sessions were ended, and how many writes were taken back.
    breaks: u64,
    forgotten: u64,
    sessions: HashMap<u64, Session>,
    next: u64,
    unsynced: Vec<Unsynced>,
    ending: bool,
}

struct Shared {
    image: PathBuf,
    state: Mutex<State>,
}

/// Listens until dropped.
pub struct Relay {
    shared: Arc<Shared>,
    socket: PathBuf,
    accepting: Option<JoinHandle<()>>,
}

impl Relay {
    /// For the image of a place, which is reached through it from then on.
    pub fn before(place: &mut Place, sandbox: &Sandbox) -> Self {
        let socket = sandbox.path("relay.socket");
        let listener = UnixListener::bind(&socket).expect("binds");
        let shared = Arc::new(Shared {
            image: place.stored.clone(),
            state: Mutex::new(State {
                script: Box::new(|_| Act::Pass),
                requests: 0,
                breaks: 0,
                forgotten: 0,
                sessions: HashMap::new(),
                next: 0,
                unsynced: Vec::new(),
                ending: false,
            }),
        });
        let accepting = shared.clone();
        let accepting = thread::spawn(move || accepting.accept(&listener));
        let command = format!("socat - UNIX-CONNECT:{}", socket.display());
        place.options = vec!["--ssh-command".into(), command];
        Relay {
            shared,
            socket,
            accepting: Some(accepting),
        }
    }

    /// Counts from 1 again, and acts so from now on.
    pub fn script(&self, script: impl FnMut(u64) -> Act + Send + 'static) {
        let mut state = self.shared.lock();
        state.requests = 0;
        state.breaks = 0;
        state.forgotten = 0;
        state.script = Box::new(script);
    }

    pub fn requests(&self) -> u64 {
        self.shared.lock().requests
    }

    pub fn breaks(&self) -> u64 {
        self.shared.lock().breaks
    }

    pub fn forgotten(&self) -> u64 {
        self.shared.lock().forgotten
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        let _ = UnixStream::connect(&self.socket); // wakes the one that accepts
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        self.shared.lock().end_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>, listener: &UnixListener) {
        for client in listener.incoming().flatten() {
            let mut state = self.lock();
            if state.ending {
                return;
            }
            let server = find_tool("sftp-server").expect("sftp-server");
            let mut server = Command::new(server)
                .arg("-e")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .expect("it starts");
            let (to, from) = (server.stdin.take(), server.stdout.take());
            let number = state.next;
            state.next += 1;
            let up = client.try_clone().expect("a socket");
            let down = client.try_clone().expect("a socket");
            state.sessions.insert(
                number,
                Session {
                    server,
                    client,
                    handles: HashSet::new(),
                    opens: HashSet::new(),
                    syncs: HashMap::new(),
                },
            );
            drop(state);
            let shared = self.clone();
            let mut to = to.expect("a pipe");
            thread::spawn(move || {
                let _ = shared.carry_up(number, up, &mut to); // ended, by whom does not matter
                drop(to);
            });
            let shared = self.clone();
            let mut from = from.expect("a pipe");
            thread::spawn(move || {
                let _ = shared.carry_down(number, &mut from, down);
                let ended = shared.lock().sessions.remove(&number);
                if let Some(ended) = ended {
                    ended.end();
                }
            });
        }
    }

    fn carry_up(&self, number: u64, mut from: UnixStream, to: &mut impl Write) -> io::Result<()> {
        loop {
            let packet = read_packet(&mut from)?;
            let act = {
                let mut state = self.lock();
                let state = &mut *state;
                let (id, request) = Request::decode(&packet[4..]).expect("a request");
                let act = match request {
                    Request::Init { .. } => Act::Pass,
                    _ => {
                        state.requests += 1;
                        (state.script)(state.requests)
                    }
                };
                match act {
                    Act::CutBefore => state.cut(),
                    Act::Forget => state.forget(&self.image),
                    _ => state.note(number, id, &request, &self.image),
                }
                act
            };
            // Not with the lock held: the server may first have to get rid of an answer.
            to.write_all(&packet)?;
            if act == Act::CutAfter {
                thread::sleep(Duration::from_millis(5));
                self.lock().cut();
            }
        }
    }

    fn carry_down(&self, number: u64, from: &mut impl Read, mut to: UnixStream) -> io::Result<()> {
        loop {
            let packet = read_packet(from)?;
            if let Ok((id, reply)) = Reply::decode(packet[4..].to_vec()) {
                self.lock().note_reply(number, id, &reply);
            }
            to.write_all(&packet)?;
        }
    }
}

/// With its length before it.
fn read_packet(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let len = u32::from_be_bytes(length) as usize;
    let mut packet = length.to_vec();
    packet.resize(4 + len, 0);
    from.read_exact(&mut packet[4..])?;
    Ok(packet)
}

impl Session {
    fn end(mut self) {
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl State {
    fn end_all(&mut self) {
        self.sessions.drain().for_each(|(_, session)| session.end());
    }

    fn cut(&mut self) {
        self.breaks += 1;
        self.end_all();
    }

    /// The servers are gone when the writes are taken back, the last first.
    fn forget(&mut self, image: &Path) {
        self.cut();
        if self.unsynced.is_empty() {
            return;
        }
        let file = fs::OpenOptions::new().write(true).open(image);
        let file = file.expect("the image");
        for write in self.unsynced.drain(..).rev() {
            file.write_all_at(&write.before, write.offset)
                .expect("written");
            self.forgotten += 1;
        }
    }

    fn note(&mut self, number: u64, id: u32, request: &Request, image: &Path) {
        let Some(session) = self.sessions.get_mut(&number) else {
            return;
        };
        match request {
            Request::Open { path, .. } if *path == image.as_os_str().as_encoded_bytes() => {
                session.opens.insert(id);
            }
            Request::Write {
                handle,
                offset,
                data,
            } if session.handles.contains(*handle) => {
                let mut before = vec![0; data.len()];
                let file = File::open(image).expect("the image");
                file.read_exact_at(&mut before, *offset).expect("read");
                self.unsynced.push(Unsynced {
                    by: (number, id),
                    answered: false,
                    offset: *offset,
                    before,
                });
            }
            Request::Extended(Extended::Fsync { handle }) if session.handles.contains(*handle) => {
                let answered = self.unsynced.iter().filter(|write| write.answered);
                let covers = answered.map(|write| write.by).collect();
                session.syncs.insert(id, covers);
            }
            _ => {}
        }
    }

    fn note_reply(&mut self, number: u64, id: u32, reply: &Reply) {
        let Some(session) = self.sessions.get_mut(&number) else {
            return;
        };
        match reply {
            Reply::Handle(handle) if session.opens.remove(&id) => {
                session.handles.insert(handle.clone());
            }
            Reply::Status(status) => {
                let synced = session.syncs.remove(&id);
                if let Some(synced) = synced.filter(|_| status.code == Code::Ok) {
                    self.unsynced.retain(|write| !synced.contains(&write.by));
                }
                let answered = |write: &&mut Unsynced| write.by == (number, id);
                if let Some(write) = self.unsynced.iter_mut().find(answered) {
                    write.answered = true;
                }
            }
            _ => {}
        }
    }
}
