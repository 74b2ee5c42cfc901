//! Between the program and the real SFTP server: passes everything on, and records what becomes
//! of the image. `crash relay LOG DONE SERVER ARGUMENTS...`
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
use e2ebak::sftp::{Code, Extended, Reply, Request, Status};

use super::log::{Kind, Log};

/// What a request asked for that matters when it is answered.
enum Asked {
    Open,
    Write,
    Sync,
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
    /// Handles of the image.
    handles: Vec<Vec<u8>>,
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
            Request::Open { path, .. } if path.ends_with(b".img") => {
                state.asked.insert(id, Asked::Open);
            }
            Request::Write {
                handle,
                offset,
                data,
            } if state.handles.iter().any(|known| known == handle) => {
                state.asked.insert(id, Asked::Write);
                self.record(Kind::Write, id, offset, data);
            }
            Request::Extended(Extended::Fsync { handle })
                if state.handles.iter().any(|known| known == handle) =>
            {
                state.syncs += 1;
                if !state.syncs.is_multiple_of(self.done) {
                    let mut answer = Vec::new();
                    let reply = Reply::Status(Status::new(Code::Ok, ""));
                    reply.encode(id, &mut answer).expect("short");
                    self.answer(&answer);
                    return false;
                }
                state.asked.insert(id, Asked::Sync);
                self.record(Kind::Sync, id, 0, &[]);
            }
            // The server gives the number to the next file.
            Request::Close { handle } => state.handles.retain(|known| known != handle),
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
            (Some(Asked::Open), Reply::Handle(handle)) => state.handles.push(handle),
            (Some(Asked::Write), _) if ok => self.record(Kind::Written, id, 0, &[]),
            (Some(Asked::Sync), _) if ok => self.record(Kind::Synced, id, 0, &[]),
            _ => {}
        }
    }

    fn record(&self, kind: Kind, id: u32, offset: u64, data: &[u8]) {
        let tag = u64::from(std::process::id()) << 32 | u64::from(id);
        self.log.append(kind, tag, offset, data).expect("recorded");
    }

    fn answer(&self, packet: &[u8]) {
        let mut out = self.out.lock().expect("no panic");
        // The program may have gone; the end of its requests tells.
        let _ = out.write_all(packet).and_then(|()| out.flush());
    }
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
