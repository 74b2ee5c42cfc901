//! Moves bytes between the channels of one SSH session and a socket pair each.
//!
//! libssh2 is not for several threads, so one thread owns the session; everybody else sees streams.
//! A channel: Opening -> Starting (the subsystem) -> Open -> Closing -> over. libssh2 opens one
//! channel at a time, and a call that would block must be made again with the same buffer before
//! anything else is sent; so a buffer stays in place until all of it has been taken.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use ssh2::{BlockDirections, Channel, ErrorCode, ExtendedData, Session};
use tracing::debug;

use super::built_in::Request;
use super::{ALIVE_COUNT, ALIVE_INTERVAL_SECONDS};
use crate::error::{Error, Kind, Result};
use crate::units::{KIB, MIB};

/// What the server may send before we have read it: OpenSSH's own 2 MiB would bound a stream to
/// 2 MiB per round trip.
const WINDOW: u32 = 16 * MIB as u32;

/// The largest SSH packet that all take (RFC 4253 section 6.1).
const PACKET: u32 = 32 * KIB as u32;

/// Bytes of each direction of a channel that are moved before it is the next channel's turn.
const BUFFER: usize = 128 * KIB as usize;

const SUBSYSTEM: &str = "sftp";

/// libssh2: would block; the server refuses a channel; it refuses a request on one.
const EAGAIN: i32 = -37;
const CHANNEL_FAILURE: i32 = -21;
const REQUEST_DENIED: i32 = -22;

/// Errors of one channel have these codes (`LIBSSH2_ERROR_CHANNEL_*`).
const OF_A_CHANNEL: std::ops::RangeInclusive<i32> = -27..=-21;

/// And these are of a login that was not accepted, or of a key that cannot be used.
const OF_A_LOGIN: [i32; 11] = [-15, -16, -17, -18, -19, -33, -34, -42, -46, -48, -51];

fn code(error: &ssh2::Error) -> i32 {
    match error.code() {
        ErrorCode::Session(code) | ErrorCode::SFTP(code) => code,
    }
}

/// Whether the session is over with this error.
pub fn is_fatal(error: &ssh2::Error) -> bool {
    let code = code(error);
    code != EAGAIN && !OF_A_CHANNEL.contains(&code) && !OF_A_LOGIN.contains(&code)
}

/// Serves `first` and what is asked for by `others`, whose socket tells of new requests, until
/// nobody wants the session any more, or it breaks. `spill` gets the requests whose channel the
/// server refuses (`MaxSessions`).
pub fn run(
    session: &Session,
    tcp: &TcpStream,
    first: Request,
    others: Option<(&Receiver<Request>, &UnixStream)>,
    spill: &dyn Fn(Request),
) -> Result<()> {
    let mut pump = Pump {
        session,
        tcp,
        others,
        spill,
        lanes: vec![Lane::new(first)],
        opened: 0,
        heard: Instant::now(),
    };
    let ended = pump.run();
    if let Err(error) = &ended {
        // What we could not send must not reach the server later.
        let _ = rustix::net::sockopt::set_socket_linger(tcp, Some(Duration::ZERO));
        for lane in &pump.lanes {
            lane.request.over(Some(error));
        }
    }
    // Then libssh2 has nothing to wait for when it frees its channels.
    let _ = tcp.shutdown(Shutdown::Both);
    ended
}

struct Pump<'a> {
    session: &'a Session,
    tcp: &'a TcpStream,
    /// `None` when nobody can ask for a channel any more.
    others: Option<(&'a Receiver<Request>, &'a UnixStream)>,
    spill: &'a dyn Fn(Request),
    lanes: Vec<Lane>,
    /// Channels that the server has opened so far.
    opened: u64,
    /// When the server was last heard.
    heard: Instant,
}

/// One channel and its socket.
struct Lane {
    request: Request,
    phase: Phase,
    /// On its way to the server, from `sent` on.
    up: Vec<u8>,
    sent: usize,
    up_ended: bool,
    /// On its way to us, from `given` on.
    down: Vec<u8>,
    given: usize,
    room: Vec<u8>,
    /// Our side of the socket is gone.
    left: bool,
}

enum Phase {
    Opening,
    Starting(Channel),
    Open(Channel),
    Closing(Channel),
    Refused,
    Over,
}

impl Pump<'_> {
    fn run(&mut self) -> Result<()> {
        loop {
            self.take();
            if self.lanes.is_empty() && self.others.is_none() {
                return Ok(());
            }
            let mut moved = false;
            let mut opening = false;
            for lane in &mut self.lanes {
                if matches!(lane.phase, Phase::Opening) && std::mem::replace(&mut opening, true) {
                    continue; // one at a time
                }
                let was_opening = matches!(lane.phase, Phase::Opening);
                moved |= lane.turn(self.session)?;
                self.opened += u64::from(was_opening && matches!(lane.phase, Phase::Starting(_)));
            }
            self.settle();
            match moved {
                true => self.heard = Instant::now(),
                false => self.wait()?,
            }
        }
    }

    fn take(&mut self) {
        while let Some((requests, _)) = self.others {
            match requests.try_recv() {
                Ok(request) => self.lanes.push(Lane::new(request)),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => self.others = None,
            }
        }
    }

    /// Takes out the lanes that are over.
    fn settle(&mut self) {
        for lane in std::mem::take(&mut self.lanes) {
            match lane.phase {
                Phase::Over => lane.request.over(None),
                Phase::Refused if self.opened > 0 => {
                    debug!("the server opens no more channels on this connection");
                    (self.spill)(lane.request);
                }
                Phase::Refused => {
                    let refused = Error::new(Kind::Unsupported, "the server opens no channel");
                    lane.request.over(Some(&refused));
                }
                _ => self.lanes.push(lane),
            }
        }
    }

    /// Waits for anything to do; notices a server that has vanished.
    fn wait(&mut self) -> Result<()> {
        let directions = self.session.block_directions();
        let sends = matches!(
            directions,
            BlockDirections::Outbound | BlockDirections::Both
        );
        // While nobody takes what has come, nothing more is taken from the network.
        let listens = self.lanes.is_empty() || self.lanes.iter().any(Lane::listens);
        let interval = Duration::from_secs(ALIVE_INTERVAL_SECONDS.into());
        if !listens {
            self.heard = Instant::now();
        }
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, listens);
        flags.set(PollFlags::OUT, sends);
        let mut fds = vec![PollFd::new(self.tcp, flags)];
        if let Some((_, wake)) = self.others {
            fds.push(PollFd::new(wake, PollFlags::IN));
        }
        let first_lane = fds.len();
        let mut polled = Vec::new();
        for (n, lane) in self.lanes.iter().enumerate() {
            if let Some(flags) = lane.waits_for() {
                polled.push(n);
                fds.push(PollFd::new(&lane.request.socket, flags));
            }
        }
        let timeout = Timespec {
            tv_sec: interval.as_secs() as i64,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let heard = fds[0].revents().contains(PollFlags::IN);
        let gone = PollFlags::HUP | PollFlags::ERR;
        let left: Vec<usize> = polled
            .into_iter()
            .zip(&fds[first_lane..])
            .filter(|(_, fd)| fd.revents().intersects(gone))
            .map(|(n, _)| n)
            .collect();
        drop(fds);
        for n in left {
            self.lanes[n].left = true;
        }
        if let Some((_, mut wake)) = self.others {
            let _ = wake.read(&mut [0; 64]); // only the waking mattered
        }
        if heard {
            self.heard = Instant::now();
        }
        self.keep_alive(interval, sends)
    }

    fn keep_alive(&mut self, interval: Duration, sends: bool) -> Result<()> {
        let silent = self.heard.elapsed();
        if silent >= interval * (ALIVE_COUNT + 1) {
            return Err(
                Error::new(Kind::Disconnected, "the server stopped answering")
                    .hint("check the network"),
            );
        }
        // One that is half sent would block everything behind it, and is of no use then anyway.
        if silent >= interval && !sends {
            match self.session.keepalive_send() {
                Err(error) if is_fatal(&error) => return Err(lost(&error)),
                _ => {}
            }
        }
        Ok(())
    }
}

fn lost(error: &ssh2::Error) -> Error {
    Error::new(Kind::Disconnected, "the connection to the server was lost")
        .hint("check the network")
        .because(error.message().to_string())
}

/// What came of a call that may have to be made again.
enum Done<T> {
    Now(T),
    Later,
    Failed(i32),
}

fn done<T>(result: std::result::Result<T, ssh2::Error>) -> Result<Done<T>> {
    match result {
        Ok(value) => Ok(Done::Now(value)),
        Err(error) if code(&error) == EAGAIN => Ok(Done::Later),
        Err(error) if is_fatal(&error) => Err(lost(&error)),
        Err(error) => Ok(Done::Failed(code(&error))),
    }
}

/// The same for reads and writes; the crate has made plain I/O errors of them.
fn moved(session: &Session, result: io::Result<usize>) -> Result<Done<usize>> {
    match result {
        Ok(len) => Ok(Done::Now(len)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Done::Later),
        Err(error) => match ssh2::Error::last_session_error(session) {
            Some(last) => done(Err(last)),
            None => Err(Error::from(error).of_kind(Kind::Disconnected)),
        },
    }
}

impl Lane {
    fn new(request: Request) -> Self {
        request.begin();
        Lane {
            request,
            phase: Phase::Opening,
            up: Vec::new(),
            sent: 0,
            up_ended: false,
            down: Vec::new(),
            given: 0,
            room: vec![0; BUFFER],
            left: false,
        }
    }

    /// Whether what comes from the network may be for it.
    fn listens(&self) -> bool {
        match self.phase {
            Phase::Open(_) => self.down.len() == self.given || self.sent < self.up.len(),
            _ => true,
        }
    }

    /// What its socket is polled for; a socket whose other end is gone always has something to
    /// tell, and is not asked.
    fn waits_for(&self) -> Option<PollFlags> {
        if self.left {
            return None;
        }
        let mut flags = PollFlags::empty();
        if matches!(self.phase, Phase::Open(_)) {
            flags.set(PollFlags::IN, self.sent == self.up.len() && !self.up_ended);
            flags.set(PollFlags::OUT, self.given < self.down.len());
        }
        Some(flags)
    }

    /// Does what can be done without waiting; whether that was anything.
    fn turn(&mut self, session: &Session) -> Result<bool> {
        let phase = std::mem::replace(&mut self.phase, Phase::Over);
        let (next, moved) = match phase {
            Phase::Opening => match done(session.channel_open("session", WINDOW, PACKET, None))? {
                Done::Now(channel) => (Phase::Starting(channel), true),
                Done::Later => (Phase::Opening, false),
                Done::Failed(code) => {
                    debug!(code, refused = code == CHANNEL_FAILURE, "no channel");
                    (Phase::Refused, true)
                }
            },
            Phase::Starting(mut channel) => match done(channel.subsystem(SUBSYSTEM))? {
                Done::Now(()) => {
                    let _ = channel.handle_extended_data(ExtendedData::Ignore);
                    (Phase::Open(channel), true)
                }
                Done::Later => (Phase::Starting(channel), false),
                Done::Failed(code) => {
                    debug!(code, denied = code == REQUEST_DENIED, "no subsystem");
                    let none = Error::new(Kind::Unsupported, "the server offers no SFTP")
                        .hint("it needs a line `Subsystem sftp internal-sftp` in its sshd_config");
                    self.request.note(&none);
                    (Phase::Closing(channel), true)
                }
            },
            Phase::Open(channel) => self.carry(session, channel)?,
            Phase::Closing(mut channel) => match done(channel.close())? {
                Done::Later => (Phase::Closing(channel), false),
                Done::Now(()) | Done::Failed(_) => (Phase::Over, true),
            },
            over => (over, false),
        };
        self.phase = next;
        Ok(moved)
    }

    /// A turn of an open channel.
    fn carry(&mut self, session: &Session, mut channel: Channel) -> Result<(Phase, bool)> {
        let mut any = false;
        if self.sent == self.up.len() && !self.up_ended {
            self.up.resize(BUFFER, 0);
            let got = self.request.socket.read(&mut self.up);
            self.up.truncate(*got.as_ref().unwrap_or(&0));
            self.sent = 0;
            self.up_ended = match got {
                Ok(len) => len == 0,
                Err(error) => {
                    !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
                }
            };
            any |= self.up_ended || !self.up.is_empty();
        }
        while self.sent < self.up.len() {
            match moved(session, channel.write(&self.up[self.sent..]))? {
                Done::Now(0) | Done::Later => break,
                Done::Now(len) => {
                    self.sent += len;
                    any = true;
                }
                Done::Failed(_) => return Ok((self.ended(channel), true)),
            }
        }
        if self.up_ended && self.sent == self.up.len() {
            return Ok((Phase::Closing(channel), true));
        }
        if self.given == self.down.len() {
            match moved(session, channel.read(&mut self.room))? {
                Done::Now(0) if channel.eof() => return Ok((self.ended(channel), true)),
                Done::Now(len) => {
                    self.down.clear();
                    self.down.extend_from_slice(&self.room[..len]);
                    self.given = 0;
                    any |= len > 0;
                }
                Done::Later => {}
                Done::Failed(_) => return Ok((self.ended(channel), true)),
            }
        }
        while self.given < self.down.len() {
            match self.request.socket.write(&self.down[self.given..]) {
                Ok(len) => {
                    self.given += len;
                    any = true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nobody reads any more; what is still to be sent is sent.
                Err(_) => self.given = self.down.len(),
            }
        }
        Ok((Phase::Open(channel), any))
    }

    /// The server has ended the channel: what it said last has been handed on by now.
    fn ended(&self, channel: Channel) -> Phase {
        let signal = channel.exit_signal().ok().and_then(|end| end.exit_signal);
        let how = match (signal, channel.exit_status()) {
            (Some(signal), _) => format!("its SFTP server was killed by signal {signal}"),
            (None, Ok(code)) => format!("its SFTP server ended with exit code {code}"),
            (None, Err(_)) => "its SFTP server ended".to_string(),
        };
        let ended = Error::new(Kind::Disconnected, "the server ended the stream").because(how);
        self.request.note(&ended);
        // Its reader need not wait until the channel is closed.
        let _ = self.request.socket.shutdown(Shutdown::Both);
        Phase::Closing(channel)
    }
}
