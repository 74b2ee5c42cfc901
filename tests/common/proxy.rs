//! A long link on the loopback interface: bytes go through at once or late, at any rate or a
//! bounded one; and the link can freeze, thaw, break and refuse.
//!
//! ```text
//! client <--TCP--> [ pump: ring of bytes, a deadline for each run of them ] <--TCP--> server
//! ```
//!
//! One thread a direction reads what has come, notes when it may go on, and writes what is due. So
//! a delay takes no throughput: what is on its way is bounded by [`IN_FLIGHT_MAX`] only. The
//! handshake of TCP itself costs no time here.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt;

/// Bytes on their way, a connection and direction: 64 MiB are 1 GB/s at 64 ms, and 32 windows of an
/// SSH channel.
pub const IN_FLIGHT_MAX: usize = 64 << 20;

/// Bytes of one read, and the smallest ring. As long as a processor's second cache holds it,
/// passing on costs no memory bandwidth.
const READ_MAX: usize = 256 << 10;

/// What waits for its turn at a bounded rate, as in a router: then the sender is stopped.
const ROUTER_QUEUE: Duration = Duration::from_millis(50);

/// What the link is like.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shape {
    /// Half of it in each direction.
    pub round_trip: Duration,
    /// Bytes a second and direction, over all connections; `None`: as many as the machine carries.
    pub rate: Option<f64>,
}

impl Shape {
    pub fn round_trip_ms(round_trip: u64) -> Self {
        Shape {
            round_trip: Duration::from_millis(round_trip),
            rate: None,
        }
    }

    /// Bounded to so many Mbit/s.
    pub fn mbit(self, mbit: f64) -> Self {
        Shape {
            rate: Some(mbit * 1e6 / 8.0),
            ..self
        }
    }
}

/// A link to a server. Dropped, all its connections are reset.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    target: SocketAddr,
    listener: TcpListener,
    wake: OwnedFd,
    state: Mutex<State>,
    /// Of the client's side, of the server's side.
    counts: [AtomicU64; 2],
    /// When the bounded link is free again, for each direction.
    free: [Mutex<Instant>; 2],
}

struct State {
    shape: Shape,
    ending: bool,
    refusing: bool,
    /// New connections begin frozen.
    frozen: bool,
    connections: Vec<Connection>,
}

struct Connection {
    control: Arc<Control>,
    pumps: Vec<JoinHandle<()>>,
}

/// How the pumps of a connection are told.
struct Control {
    frozen: AtomicBool,
    over: AtomicBool,
    wakes: [OwnedFd; 2],
}

impl Proxy {
    pub fn start(target: SocketAddr, shape: Shape) -> Self {
        let listener = listen();
        listener.set_nonblocking(true).expect("a listener");
        let port = listener.local_addr().expect("an address").port();
        let shared = Arc::new(Shared {
            target,
            listener,
            wake: bell(),
            state: Mutex::new(State {
                shape,
                ending: false,
                refusing: false,
                frozen: false,
                connections: Vec::new(),
            }),
            counts: [AtomicU64::new(0), AtomicU64::new(0)],
            free: [Mutex::new(Instant::now()), Mutex::new(Instant::now())],
        });
        let accepting = shared.clone();
        let accepting = std::thread::Builder::new()
            .name("proxy".into())
            .spawn(move || accepting.accept())
            .expect("a thread");
        Proxy {
            port,
            shared,
            accepting: Some(accepting),
        }
    }

    /// To the loopback interface.
    pub fn to_port(port: u16, shape: Shape) -> Self {
        Proxy::start(SocketAddr::from(([127, 0, 0, 1], port)), shape)
    }

    /// Where clients connect.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Changes the link for what enters it from now on.
    pub fn reshape(&self, shape: Shape) {
        self.shared.lock().shape = shape;
    }

    /// Bytes taken from clients.
    pub fn sent_by_clients(&self) -> u64 {
        self.shared.counts[0].load(Ordering::Relaxed)
    }

    /// Bytes taken from the server.
    pub fn sent_by_server(&self) -> u64 {
        self.shared.counts[1].load(Ordering::Relaxed)
    }

    /// Connections that are up, frozen ones too.
    pub fn connections(&self) -> usize {
        let mut state = self.shared.lock();
        state.reap();
        state.connections.len()
    }

    /// Nothing passes any more and nobody is told: packets vanish. New connections are accepted, and
    /// nothing passes on them either.
    pub fn freeze(&self) {
        self.shared.lock().frozen = true;
        self.freeze_connected();
    }

    /// The same for the connections that are up now; new ones work.
    pub fn freeze_connected(&self) {
        self.set_frozen(true);
    }

    /// What was held goes on, late: also what a client sent that is dead by now.
    pub fn thaw(&self) {
        self.shared.lock().frozen = false;
        self.set_frozen(false);
    }

    fn set_frozen(&self, frozen: bool) {
        for connection in &self.shared.lock().connections {
            connection.control.frozen.store(frozen, Ordering::SeqCst);
            connection.control.ring();
        }
    }

    /// Resets all connections; what was under way is lost. They are gone when this returns.
    pub fn cut(&self) {
        let connections = std::mem::take(&mut self.shared.lock().connections);
        for connection in &connections {
            connection.control.over.store(true, Ordering::SeqCst);
            connection.control.ring();
        }
        for pump in connections.into_iter().flat_map(|c| c.pumps) {
            let _ = pump.join(); // a panic there was told there
        }
    }

    /// Whether new connections are refused, as by a machine where nobody listens.
    pub fn refuse(&self, refuse: bool) {
        let mut state = self.shared.lock();
        if state.refusing == refuse {
            return;
        }
        // Keeps the port, which nobody else can take meanwhile.
        match refuse {
            true => rustix::net::shutdown(&self.shared.listener, rustix::net::Shutdown::Read),
            false => rustix::net::listen(&self.shared.listener, 128),
        }
        .expect("a listener");
        state.refusing = refuse;
        ring(&self.shared.wake);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        ring(&self.shared.wake);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        self.cut();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>) {
        loop {
            let (ending, refusing) = {
                let state = self.lock();
                (state.ending, state.refusing)
            };
            if ending {
                return;
            }
            let mut awaited = vec![PollFd::new(&self.wake, PollFlags::IN)];
            if !refusing {
                awaited.push(PollFd::new(&self.listener, PollFlags::IN));
            }
            let _ = poll(&mut awaited, None);
            drain(&self.wake);
            while let Ok((client, _)) = self.listener.accept() {
                // Where the server refuses, the client is reset.
                match TcpStream::connect(self.target) {
                    Ok(server) => self.pass_on(client, server).expect("two sockets"),
                    Err(_) => drop(sockopt::set_socket_linger(&client, Some(Duration::ZERO))),
                }
            }
        }
    }

    fn pass_on(self: &Arc<Self>, client: TcpStream, server: TcpStream) -> io::Result<()> {
        let mut state = self.lock();
        state.reap();
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            if state.shape.rate.is_some() {
                // Else the kernel holds more of a sender's bytes than a router would.
                sockopt::set_socket_recv_buffer_size(stream, READ_MAX)?;
            }
        }
        let control = Arc::new(Control {
            frozen: AtomicBool::new(state.frozen),
            over: AtomicBool::new(false),
            wakes: [bell(), bell()],
        });
        let (client, server) = (Arc::new(client), Arc::new(server));
        let ways = [(client.clone(), server.clone()), (server, client)];
        let mut pumps = Vec::new();
        for (direction, (from, to)) in ways.into_iter().enumerate() {
            let pump = Pump {
                shared: self.clone(),
                control: control.clone(),
                direction,
                from,
                to,
                ring: Ring::default(),
                due: VecDeque::new(),
                ended: false,
            };
            let thread = std::thread::Builder::new().name(format!("proxy-{direction}"));
            pumps.push(thread.spawn(move || pump.run())?);
        }
        state.connections.push(Connection { control, pumps });
        Ok(())
    }
}

impl State {
    /// Forgets the connections that have ended.
    fn reap(&mut self) {
        self.connections
            .retain(|c| !c.pumps.iter().all(JoinHandle::is_finished));
    }
}

impl Control {
    fn ring(&self) {
        self.wakes.iter().for_each(ring);
    }
}

/// On a port by its number: one that the kernel chose would be lost while nobody listens.
fn listen() -> TcpListener {
    for _ in 0..20 {
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = free.local_addr().expect("an address");
        drop(free);
        // Somebody else may have taken it meanwhile.
        if let Ok(listener) = TcpListener::bind(address) {
            return listener;
        }
    }
    panic!("no free port");
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

fn ring(bell: &OwnedFd) {
    let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
}

fn drain(bell: &OwnedFd) {
    let _ = rustix::io::read(bell, &mut [0; 8]);
}

/// One direction of one connection.
struct Pump {
    shared: Arc<Shared>,
    control: Arc<Control>,
    direction: usize,
    from: Arc<TcpStream>,
    to: Arc<TcpStream>,
    ring: Ring,
    /// When so many more bytes may go on.
    due: VecDeque<(Instant, usize)>,
    /// Nothing more comes.
    ended: bool,
}

impl Pump {
    fn run(mut self) {
        match self.pass() {
            // The rest goes the other way still.
            Ok(true) => drop(self.to.shutdown(Shutdown::Write)),
            Ok(false) | Err(_) => self.reset(),
        }
    }

    /// Ends both directions; as the streams do not linger, the peers see a reset.
    fn reset(&self) {
        for stream in [&self.from, &self.to] {
            let _ = sockopt::set_socket_linger(&**stream, Some(Duration::ZERO));
        }
        self.control.over.store(true, Ordering::SeqCst);
        self.control.ring();
    }

    /// Until the sender has ended and all is passed on; `false` when the link was cut.
    fn pass(&mut self) -> io::Result<bool> {
        loop {
            if self.control.over.load(Ordering::SeqCst) {
                return Ok(false);
            }
            if self.control.frozen.load(Ordering::SeqCst) {
                self.wait(false, false, None)?;
                continue;
            }
            let admitted = self.admitted();
            let took = admitted.is_ok_and(|most| most > 0) && self.take(admitted.unwrap_or(0))?;
            let gave = self.give()?;
            if self.ended && self.due.is_empty() {
                return Ok(true);
            }
            if took || gave == Gave::Some {
                continue;
            }
            let mut until = self.due.front().map(|(when, _)| *when);
            if gave == Gave::Full {
                until = None; // it is due: only room is missing
            }
            if let Err(free) = admitted {
                until = Some(until.map_or(free, |until| until.min(free)));
            }
            let reads = !self.ended && admitted.is_ok_and(|most| most > 0);
            self.wait(reads, gave == Gave::Full, until)?;
        }
    }

    /// How many bytes may enter the link now, or when it has a place again.
    fn admitted(&self) -> Result<usize, Instant> {
        if self.ended {
            return Ok(0);
        }
        let most = READ_MAX.min(IN_FLIGHT_MAX - self.ring.len);
        let Some(rate) = self.shared.lock().shape.rate else {
            return Ok(most);
        };
        let free = self.free_at();
        let now = Instant::now();
        if free > now + ROUTER_QUEUE {
            return Err(free - ROUTER_QUEUE);
        }
        // A few milliseconds of the link at a time, so that connections share it.
        Ok(most.min((rate / 250.0) as usize).max(1500))
    }

    fn free_at(&self) -> Instant {
        let free = &self.shared.free[self.direction];
        *free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When bytes that enter now leave the link.
    fn leaves_at(&self, len: usize) -> Instant {
        let shape = self.shared.lock().shape;
        let mut at = Instant::now();
        if let Some(rate) = shape.rate {
            let free = &self.shared.free[self.direction];
            let mut free = free.lock().unwrap_or_else(PoisonError::into_inner);
            *free = at.max(*free) + Duration::from_secs_f64(len as f64 / rate);
            at = *free;
        }
        at + shape.round_trip / 2
    }

    /// Reads what has come; `false` when nothing has.
    fn take(&mut self, most: usize) -> io::Result<bool> {
        match self.ring.fill(&self.from, most) {
            Ok(0) => self.ended = true,
            Ok(len) => {
                self.shared.counts[self.direction].fetch_add(len as u64, Ordering::Relaxed);
                self.due.push_back((self.leaves_at(len), len));
            }
            Err(error) => return again(error).map(|()| false),
        }
        Ok(true)
    }

    /// Writes what is due.
    fn give(&mut self) -> io::Result<Gave> {
        let now = Instant::now();
        let due = self.due.iter().take_while(|(when, _)| *when <= now);
        let len = due.map(|(_, len)| len).sum();
        if len == 0 {
            return Ok(Gave::Nothing);
        }
        let mut written = match self.ring.empty(&self.to, len) {
            Ok(written) => written,
            Err(error) => return again(error).map(|()| Gave::Full),
        };
        while let Some((_, len)) = self.due.front_mut()
            && written > 0
        {
            let part = written.min(*len);
            *len -= part;
            written -= part;
            if *len == 0 {
                self.due.pop_front();
            }
        }
        Ok(Gave::Some)
    }

    fn wait(&self, reads: bool, writes: bool, until: Option<Instant>) -> io::Result<()> {
        let bell = &self.control.wakes[self.direction];
        let mut awaited = vec![PollFd::new(bell, PollFlags::IN)];
        if reads {
            awaited.push(PollFd::new(&*self.from, PollFlags::IN));
        }
        if writes {
            awaited.push(PollFd::new(&*self.to, PollFlags::OUT));
        }
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec::try_from(left).expect("a short time")
        });
        match poll(&mut awaited, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if !awaited[0].revents().is_empty() {
            drain(bell);
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Gave {
    Some,
    /// Nothing was due.
    Nothing,
    /// The receiver takes nothing now.
    Full,
}

fn again(error: io::Error) -> io::Result<()> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}

/// Bytes in the order they came. Grows as they need it, up to [`IN_FLIGHT_MAX`].
#[derive(Default)]
struct Ring {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Ring {
    /// Reads once, at most this many bytes.
    fn fill(&mut self, mut from: &TcpStream, most: usize) -> io::Result<usize> {
        if self.bytes.len() - self.len < most {
            self.grow();
        }
        let room = (self.bytes.len() - self.len).min(most);
        let end = (self.start + self.len) % self.bytes.len().max(1);
        let (before, after) = self.bytes.split_at_mut(end);
        let first = room.min(after.len());
        let mut parts = [
            IoSliceMut::new(&mut after[..first]),
            IoSliceMut::new(&mut before[..room - first]),
        ];
        let got = from.read_vectored(&mut parts)?;
        self.len += got;
        Ok(got)
    }

    /// Writes once, at most the first `most` bytes.
    fn empty(&mut self, mut to: &TcpStream, most: usize) -> io::Result<usize> {
        let (before, after) = self.bytes.split_at(self.start);
        let first = most.min(after.len());
        let parts = [
            IoSlice::new(&after[..first]),
            IoSlice::new(&before[..most - first]),
        ];
        let gone = to.write_vectored(&parts)?;
        self.len -= gone;
        // From the start again while it can, where the processor's caches know the memory.
        self.start = match self.len {
            0 => 0,
            _ => (self.start + gone) % self.bytes.len(),
        };
        Ok(gone)
    }

    fn grow(&mut self) {
        let size = (2 * self.bytes.len()).clamp(READ_MAX, IN_FLIGHT_MAX);
        self.bytes.rotate_left(self.start);
        self.start = 0;
        self.bytes.resize(size.max(self.bytes.len()), 0);
    }
}
