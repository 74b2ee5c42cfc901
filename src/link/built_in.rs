//! SSH without an ssh program: `--ssh built-in`, by libssh2.
//!
//! User, host and port come from the location alone. Host keys are checked strictly against the
//! files of known hosts. `~/.ssh/config`, jump hosts and hardware keys need the ssh program.
//!
//! One connection carries all streams, as channels; a thread of its own owns it (`link::pump`).
//! It is made by the first stream and ends with the last one and the dial; one that broke is made
//! anew by the next stream, with the credentials that worked.

use std::io::Write;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use ssh2::{MethodType, Session};
use tracing::{debug, info};

use super::known_hosts::{KnownHosts, Name, key_type};
use super::login::{Asking, Login};
use super::terminal::can_ask;
use super::{
    ALIVE_INTERVAL_SECONDS, CONNECT_TIMEOUT_SECONDS, Dial, Handle, Occasion, PATIENCE,
    PATIENCE_WITH_QUESTIONS, Stream, pump,
};
use crate::error::{Attempt, Error, Kind, Result, Told};
use crate::location::Server;

const SSH_PORT: u16 = 22;

/// How long one message of the handshake or the login may take.
const MESSAGE_TIMEOUT_MS: u32 = 30_000;

/// How long a channel may take to close; then the connection's thread sees to it alone.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// How long a diagnosis waits for what the connection's thread has to say.
const WORDS_TIME: Duration = Duration::from_millis(500);

/// In libssh2 ChaCha20 costs half of what AES-GCM does.
const CIPHERS: &str = "chacha20-poly1305@openssh.com,aes128-gcm@openssh.com,\
                       aes256-gcm@openssh.com,aes128-ctr,aes192-ctr,aes256-ctr";

/// Without the SHA-1 signatures of `ssh-rsa`.
const HOST_KEYS: &str = "ssh-ed25519,ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,\
                         rsa-sha2-512,rsa-sha2-256";

/// What the user set about the built-in SSH.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BuiltInOptions {
    /// Instead of the default keys in `~/.ssh`.
    pub identity_file: Option<PathBuf>,
    /// Instead of `~/.ssh/known_hosts` and `/etc/ssh/ssh_known_hosts`.
    pub known_hosts: Option<Vec<PathBuf>>,
    /// Never ask on the terminal.
    pub batch: bool,
}

/// Dials one server by libssh2.
#[derive(Clone)]
pub struct BuiltInDial {
    shared: Arc<Shared>,
    connection: Arc<Mutex<Option<Arc<Connection>>>>,
}

/// What every connection of a dial is made with.
struct Shared {
    server: Server,
    known_hosts: Vec<PathBuf>,
    login: Login,
    asks: bool,
}

impl BuiltInDial {
    pub fn new(server: Server, options: BuiltInOptions) -> Result<Self> {
        info!(
            "the built-in SSH reads no ssh_config; jump hosts and hardware keys need the ssh program"
        );
        let home = std::env::var_os("HOME").map(PathBuf::from);
        let user = match &server.user {
            Some(user) => user.clone(),
            None => user_name()?,
        };
        let known_hosts = options.known_hosts.unwrap_or_else(|| {
            let own = home.iter().map(|home| home.join(".ssh/known_hosts"));
            own.chain(["/etc/ssh/ssh_known_hosts".into()]).collect()
        });
        Ok(BuiltInDial {
            shared: Arc::new(Shared {
                server,
                known_hosts,
                login: Login::new(user, options.identity_file, home),
                asks: !options.batch && can_ask(),
            }),
            connection: Arc::default(),
        })
    }

    /// The connection that is up or on its way, or a new one.
    fn connection(&self, occasion: Occasion) -> Result<Arc<Connection>> {
        let mut slot = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = slot.as_ref().filter(|c| !c.is_over()) {
            return Ok(connection.clone());
        }
        let connection = Arc::new(Connection::start(self.shared.clone(), occasion)?);
        *slot = Some(connection.clone());
        Ok(connection)
    }
}

/// As ssh: the name of the user that this process runs as.
fn user_name() -> Result<String> {
    let id = rustix::process::getuid().as_raw().to_string();
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let fields = users
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>());
    let mut named = fields.filter(|fields| fields.get(2) == Some(&id.as_str()));
    let name = named
        .next()
        .and_then(|fields| fields.first().map(|name| name.to_string()));
    name.or_else(|| std::env::var("USER").ok()).ok_or_else(|| {
        Error::new(Kind::Usage, format!("user {id} has no name to log in with"))
            .hint("name one in the location: user@host:path")
    })
}

impl Dial for BuiltInDial {
    fn dial(&self, occasion: Occasion) -> Result<Stream> {
        let stream = || {
            let (ours, theirs) = UnixStream::pair()?;
            theirs.set_nonblocking(true)?;
            let connection = self.connection(occasion)?;
            let state = Arc::new(State::default());
            connection.ask(Request {
                socket: theirs,
                state: state.clone(),
            });
            Ok::<_, Error>(Stream {
                reader: Box::new(ours.try_clone()?),
                writer: Box::new(ours.try_clone()?),
                handle: Arc::new(ChannelHandle {
                    socket: ours,
                    state,
                    connection,
                }),
            })
        };
        stream().attempt(|| format!("connect to {}", self.shared.server))
    }

    fn patience(&self) -> Duration {
        match self.shared.asks {
            true => PATIENCE_WITH_QUESTIONS,
            false => PATIENCE,
        }
    }
}

/// A stream's wish for a channel; later, the channel's end of the stream.
pub struct Request {
    pub socket: UnixStream,
    state: Arc<State>,
}

/// How a stream stands.
#[derive(Default)]
struct State {
    inner: Mutex<StateInner>,
    changed: Condvar,
    /// Its user has closed it.
    unwanted: AtomicBool,
}

#[derive(Default)]
struct StateInner {
    /// Its connection is up and works on it.
    begun: bool,
    over: bool,
    why: Option<Told>,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, StateInner> {
        // No code panics with the lock held.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(
        &self,
        time: Duration,
        done: impl Fn(&StateInner) -> bool,
    ) -> MutexGuard<'_, StateInner> {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), time, |state| !done(state));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Request {
    /// Notes why the stream ends; the first reason counts.
    pub fn note(&self, why: &Error) {
        let mut state = self.state.lock();
        if state.why.is_none() {
            state.why = Some(Told::from(why));
        }
    }

    /// Ends the stream.
    pub fn over(&self, why: Option<&Error>) {
        if let Some(why) = why {
            self.note(why);
        }
        self.state.lock().over = true;
        let _ = self.socket.shutdown(Shutdown::Both); // its user may have done so
        self.state.changed.notify_all();
    }

    /// From here on, closing it takes the server's word.
    pub fn begin(&self) {
        self.state.lock().begun = true;
    }

    fn is_unwanted(&self) -> bool {
        self.state.unwanted.load(Ordering::Relaxed)
    }
}

struct ChannelHandle {
    socket: UnixStream,
    state: Arc<State>,
    connection: Arc<Connection>,
}

impl Handle for ChannelHandle {
    fn close(&self) {
        self.state.unwanted.store(true, Ordering::Relaxed);
        let _ = self.socket.shutdown(Shutdown::Both); // it may have been shut down before
        // One whose connection is still on its way has nothing to be ended.
        drop(
            self.state
                .wait(LEAVE_TIME, |state| state.over || !state.begun),
        );
    }

    fn diagnosis(&self) -> Option<Error> {
        let state = self
            .state
            .wait(WORDS_TIME, |state| state.over || state.why.is_some());
        let why = state.why.clone();
        drop(state);
        why.or_else(|| self.connection.end.lock().why.clone())
            .map(Error::from)
    }
}

impl Drop for ChannelHandle {
    fn drop(&mut self) {
        self.close();
    }
}

/// A connection's thread, seen from outside. The thread ends when this is dropped and its last
/// channel is over.
struct Connection {
    requests: Mutex<Sender<Request>>,
    wake: UnixStream,
    end: Arc<State>,
}

impl Connection {
    fn start(shared: Arc<Shared>, occasion: Occasion) -> Result<Self> {
        let (requests, asked) = mpsc::channel();
        let (wake, woken) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        wake.set_nonblocking(true)?;
        let end = Arc::new(State::default());
        let run = {
            let end = end.clone();
            move || {
                // The one whose wish for a stream made this connection.
                let Ok(first) = asked.recv() else { return };
                let ended = serve(&shared, occasion, first, Some((&asked, &woken)));
                let mut state = end.lock();
                state.over = true;
                state.why = ended.as_ref().err().map(Told::from);
                drop(state);
                for late in asked.try_iter() {
                    late.over(ended.as_ref().err());
                }
            }
        };
        thread::Builder::new().name("link-ssh".into()).spawn(run)?;
        Ok(Connection {
            requests: Mutex::new(requests),
            wake,
            end,
        })
    }

    fn is_over(&self) -> bool {
        self.end.lock().over
    }

    /// A connection that has just ended drops the request, and with it the stream's other end.
    fn ask(&self, request: Request) {
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = requests.send(request);
        let _ = (&self.wake).write(&[1]); // full of wakings, it wakes as well
    }
}

/// The life of a connection: logs in, and serves the first stream and those that others ask for.
fn serve(
    shared: &Arc<Shared>,
    occasion: Occasion,
    first: Request,
    others: Option<(&Receiver<Request>, &UnixStream)>,
) -> Result<()> {
    let (session, tcp) = match connect(shared, occasion, &|| first.is_unwanted()) {
        Ok(up) => up,
        Err(error) => {
            first.over(Some(&error));
            return Err(error);
        }
    };
    let spill = |request: Request| own_connection(shared.clone(), request);
    pump::run(&session, &tcp, first, others, &spill)
}

/// A stream whose server opens no more channels on one connection gets one for itself.
fn own_connection(shared: Arc<Shared>, request: Request) {
    info!("the server takes no more streams on one connection; making another");
    let run = move || drop(serve(&shared, Occasion::Again, request, None)); // the stream was told
    if let Err(error) = thread::Builder::new().name("link-ssh".into()).spawn(run) {
        info!(%error, "no thread for it"); // the stream has ended with the request
    }
}

/// Connects, proves that it is the server that it should be, and logs in.
fn connect(
    shared: &Shared,
    occasion: Occasion,
    unwanted: &dyn Fn() -> bool,
) -> Result<(Session, TcpStream)> {
    let failed = |error: ssh2::Error| Error::new(Kind::Disconnected, error.message().to_string());
    let (host, port) = (&shared.server.host, shared.server.port.unwrap_or(SSH_PORT));
    let name = Name::new(host, port);
    let known = KnownHosts::read(&shared.known_hosts)?;
    let tcp = connect_tcp(host, port)?;

    let mut session = Session::new().map_err(failed)?;
    session.set_timeout(MESSAGE_TIMEOUT_MS);
    session.set_tcp_stream(tcp.try_clone()?);
    let host_keys = host_keys(&known.key_types(&name));
    for (method, names) in [
        (MethodType::CryptCs, CIPHERS),
        (MethodType::CryptSc, CIPHERS),
        (MethodType::HostKey, &host_keys),
    ] {
        session.method_pref(method, names).map_err(failed)?;
    }
    session
        .handshake()
        .map_err(failed)
        .attempt(|| "agree on the encryption of SSH")?;
    let (key, _) = session
        .host_key()
        .ok_or_else(|| Error::new(Kind::Disconnected, "the server shows no host key"))?;
    known.check(&name, key)?;
    debug!(kind = key_type(key), "the host key is the known one");

    let asking = Asking {
        allowed: shared.asks && occasion == Occasion::First,
        unwanted,
    };
    shared.login.run(&session, &asking)?;
    session.set_blocking(false);
    session.set_keepalive(true, ALIVE_INTERVAL_SECONDS);
    Ok((session, tcp))
}

fn connect_tcp(host: &str, port: u16) -> Result<TcpStream> {
    let addresses = (host, port).to_socket_addrs().map_err(|error| {
        Error::new(
            Kind::Disconnected,
            "the name of the server could not be resolved",
        )
        .hint("check the host name and the network; names of ~/.ssh/config need the ssh program")
        .because(error)
    })?;
    let timeout = Duration::from_secs(CONNECT_TIMEOUT_SECONDS.into());
    let mut last = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(tcp) => {
                tcp.set_nodelay(true)?;
                return Ok(tcp);
            }
            Err(error) => last = Some((address, error)),
        }
    }
    let Some((address, error)) = last else {
        return Err(Error::new(Kind::Disconnected, "the server has no address"));
    };
    let (text, hint) = match error.kind() {
        std::io::ErrorKind::ConnectionRefused => (
            "the server refused the connection",
            "check that sshd runs there, and its port",
        ),
        _ => ("the server could not be reached", "check the network"),
    };
    Err(Error::new(Kind::Disconnected, text)
        .hint(hint)
        .because(format!("{address}: {error}")))
}

/// The kinds of host key to ask for: those that are known, then the others.
fn host_keys(known: &[String]) -> String {
    let is_known = |name: &&str| match name.starts_with("rsa-") {
        true => known.iter().any(|known| known == "ssh-rsa"),
        false => known.iter().any(|known| known == name),
    };
    let (first, others): (Vec<&str>, Vec<&str>) = HOST_KEYS.split(',').partition(is_known);
    [first, others].concat().join(",")
}
