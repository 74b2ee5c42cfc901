//! Between the program and the real SFTP server: passes everything on, and records what becomes
//! of the image, and of the lean copy that a trim puts in its place.
//! `crash relay LOG DONE SERVER ARGUMENTS...`
//!
//! One flush of DONE is passed on; the others it answers itself and tells the server nothing: a
//! server that lies, or a client that forgets to ask, which the rig must find out. With 1 it is
//! honest, with 0 no flush is done.
//!
//! Each stream of a job is a relay of its own. What a relay passes on it records before, and what
//! the server says of it before it passes that on: so in the log of all of them, two writes of which
//! the program sent one after it knew of the other are in the order in which the server saw them.
//! A flush covers all of the image, through whichever stream it was asked for.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use e2ebak::sftp::frame;
use e2ebak::sftp::{Code, Extended, OpenFlags, Reply, Request, Status};

use super::log::{Kind, Log, Record, Which};

/// What a request asked for that matters when it is answered.
enum Asked {
    Open(Which),
    Write,
    Sync(Which),
}

struct Relay {
    log: Log,
    /// One flush of so many is done.
    done: u32,
    state: Mutex<State>,
    out: Mutex<io::Stdout>,
}

#[derive(Default)]
struct State {
    asked: HashMap<u32, Asked>,
    handles: Vec<(Vec<u8>, Which)>,
    syncs: u32,
}

pub fn run(arguments: &[String]) -> i32 {
    let [log, done, server, rest @ ..] = arguments else {
        panic!("relay LOG DONE SERVER ARGUMENTS...");
    };
    let relay = Arc::new(Relay {
        log: Log::open(Path::new(log)).expect("the log"),
        done: done.parse().expect("a number"),
        state: Mutex::default(),
        out: Mutex::new(io::stdout()),
    });
    let mut child = Command::new(server)
        .args(rest)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the server");
    let to_server = child.stdin.take().expect("piped");
    let from_server = child.stdout.take().expect("piped");
    let down = {
        let relay = relay.clone();
        thread::spawn(move || relay.down(from_server))
    };
    relay.up(to_server);
    let _ = down.join();
    child.wait().ok().and_then(|s| s.code()).unwrap_or(1)
}

impl State {
    fn file(&self, handle: &[u8]) -> Option<Which> {
        let mut handles = self.handles.iter();
        let found = handles.find(|(known, _)| known == handle);
        found.map(|(_, which)| *which)
    }
}

impl Relay {
    /// From the program to the server, until it has no more to say.
    fn up(&self, mut server: impl Write) {
        let mut stdin = io::stdin().lock();
        while let Some(packet) = next(&mut stdin) {
            if self.look_at_request(&packet[4..]) && server.write_all(&packet).is_err() {
                return;
            }
            if server.flush().is_err() {
                return;
            }
        }
    }

    /// Whether the server shall see it.
    fn look_at_request(&self, packet: &[u8]) -> bool {
        let (id, request) = Request::decode(packet).expect("a request");
        let mut state = self.state.lock().expect("no panic");
        match request {
            Request::Open { path, flags, .. } => {
                if let Some(which) = named(path) {
                    state.asked.insert(id, Asked::Open(which));
                    if which == Which::Lean && flags.contains(OpenFlags::CREATE) {
                        self.record(Kind::Created, which, id, 0, &[]);
                    }
                }
            }
            Request::Write {
                handle,
                offset,
                data,
            } => {
                if let Some(which) = state.file(handle) {
                    state.asked.insert(id, Asked::Write);
                    self.record(Kind::Write, which, id, offset, data);
                }
            }
            Request::Extended(Extended::CopyData {
                from,
                from_offset,
                len,
                to,
                to_offset,
            }) => {
                let files = (state.file(from), state.file(to));
                assert_eq!(files, (Some(Which::Image), Some(Which::Lean)));
                assert_eq!(from_offset, to_offset);
                state.asked.insert(id, Asked::Write);
                self.record(Kind::Copied, Which::Lean, id, to_offset, &len.to_le_bytes());
            }
            Request::Extended(Extended::PosixRename { from, to })
                if (named(from), named(to)) == (Some(Which::Lean), Some(Which::Image)) =>
            {
                self.record(Kind::Renamed, Which::Lean, id, 0, &[]);
            }
            Request::Extended(Extended::Fsync { handle }) => {
                let Some(which) = state.file(handle) else {
                    return true;
                };
                state.syncs += 1;
                if !state.syncs.is_multiple_of(self.done) {
                    let mut answer = Vec::new();
                    let reply = Reply::Status(Status::new(Code::Ok, ""));
                    reply.encode(id, &mut answer).expect("short");
                    self.answer(&answer);
                    return false;
                }
                state.asked.insert(id, Asked::Sync(which));
                self.record(Kind::Sync, which, id, 0, &[]);
            }
            // The server gives the number to the next file.
            Request::Close { handle } => state.handles.retain(|(known, _)| known != handle),
            _ => {}
        }
        true
    }

    /// From the server to the program.
    fn down(&self, mut server: impl Read) {
        while let Some(packet) = next(&mut server) {
            self.look_at_reply(&packet[4..]);
            self.answer(&packet);
        }
    }

    fn look_at_reply(&self, packet: &[u8]) {
        let Ok((id, reply)) = Reply::decode(packet.to_vec()) else {
            return;
        };
        let mut state = self.state.lock().expect("no panic");
        let ok = matches!(&reply, Reply::Status(status) if status.code == Code::Ok);
        match (state.asked.remove(&id), reply) {
            (Some(Asked::Open(which)), Reply::Handle(handle)) => {
                state.handles.push((handle, which));
            }
            (Some(Asked::Write), _) if ok => self.record(Kind::Written, Which::Image, id, 0, &[]),
            (Some(Asked::Sync(which)), _) if ok => self.record(Kind::Synced, which, id, 0, &[]),
            _ => {}
        }
    }

    fn record(&self, kind: Kind, which: Which, id: u32, offset: u64, data: &[u8]) {
        let record = Record {
            kind,
            which,
            tag: u64::from(std::process::id()) << 32 | u64::from(id),
            offset,
            data: data.to_vec(),
        };
        self.log.append(&record).expect("recorded");
    }

    fn answer(&self, packet: &[u8]) {
        let mut out = self.out.lock().expect("no panic");
        // The program may have gone; the end of its requests tells.
        let _ = out.write_all(packet).and_then(|()| out.flush());
    }
}

fn named(path: &[u8]) -> Option<Which> {
    match path {
        _ if path.ends_with(b".img") => Some(Which::Image),
        _ if path.ends_with(b".img.trim") => Some(Which::Lean),
        _ => None,
    }
}

/// Instead of `fallocate` on the server: tells of a hole, then has it made.
/// `crash punch LOG -p -o OFFSET -l LENGTH IMAGE`
pub fn punch(arguments: &[String]) -> i32 {
    let [log, how @ ..] = arguments else {
        panic!("punch LOG ARGUMENTS...");
    };
    let ["-p", "-o", offset, "-l", len, image] =
        *how.iter().map(String::as_str).collect::<Vec<_>>()
    else {
        panic!("{how:?}");
    };
    assert_eq!(named(image.as_bytes()), Some(Which::Image));
    let len: u64 = len.parse().expect("a number");
    let mut record = Record::new(Kind::Punched, len.to_le_bytes().to_vec());
    record.offset = offset.parse().expect("a number");
    let log = Log::open(Path::new(log)).expect("the log");
    log.append(&record).expect("recorded");
    let punched = Command::new("/usr/bin/fallocate").args(how).status();
    punched.ok().and_then(|s| s.code()).unwrap_or(1)
}

/// The next packet with its length; nothing at the end of the stream.
fn next(from: &mut impl Read) -> Option<Vec<u8>> {
    let mut packet = vec![0; 4];
    from.read_exact(&mut packet).ok()?;
    let head = [packet[0], packet[1], packet[2], packet[3]];
    let len = frame::length(head, false).expect("a packet");
    packet.resize(4 + len, 0);
    from.read_exact(&mut packet[4..]).ok()?;
    Some(packet)
}
