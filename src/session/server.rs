//! The session process: sets up, serves, tears down.
//!
//! Threads beside those of the layers: one reads the command's orders, one tells figures to whoever
//! listens, one renews the lease, one waits for the filesystem to be unmounted by others. All of
//! them turn what happens into [`Happening`]s; the main thread alone acts on them.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, error, warn};

use super::keeping::Keeping;
use super::mounts;
use super::stage::{Stage, Unmounting};
use super::telling::Telling;
use super::wire::{Order, Place, Plan, Report, Status, receive, receive_key, send};
use crate::error::{Attempt, Error, Kind, Result, Told};
use crate::image::{self, Opened, Sealed};
use crate::location::Location;
use crate::remote::lease::Lease;
use crate::remote::{Access, Link, Store};
use crate::secret::Secret;
use crate::units::show_duration;

/// How often somebody else's lease is looked at again while waiting.
const LEASE_POLL: Duration = Duration::from_secs(5);
/// How long a lease is waited for in any case: the session that a plain umount(8) has just ended
/// needs a moment to release it.
const LEASE_PATIENCE: Duration = Duration::from_secs(3);
const LEASE_PATIENCE_POLL: Duration = Duration::from_millis(200);
/// A listener that does not take a report within this is dropped.
const LISTENER_TIMEOUT: Duration = Duration::from_secs(1);

/// What the main thread is woken for.
pub(super) enum Happening {
    Order(Order),
    Key(Secret),
    /// The command has ended, or wants no more.
    CommandGone,
    /// Somebody asks for an end through the control socket.
    Control {
        stream: UnixStream,
        force: bool,
    },
    /// The filesystem above was unmounted.
    Closed,
    /// SIGINT or SIGTERM to a session that runs by itself.
    Signal,
    /// Somebody else has taken the lease.
    LeaseLost(Error),
}

/// Runs the session process, from its hidden verb to its end.
pub fn serve() -> ExitCode {
    let outcome = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(UnixStream::from)
        .attempt(|| "take the command's socket")
        .and_then(Server::start);
    let mut server = match outcome {
        Ok(server) => server,
        Err(error) => {
            eprintln!("{}", error.report());
            return ExitCode::from(error.kind().exit_code());
        }
    };
    let outcome = server.run();
    // Who has asked for an end that was on its way is told how it went, too.
    while let Ok(Happening::Control { stream, .. }) = server.happenings.try_recv() {
        server.listeners.add(stream);
    }
    match outcome {
        Ok(status) => {
            server.listeners.tell(&Report::Done(status));
            ExitCode::SUCCESS
        }
        Err(failure) => {
            debug!("{}", failure.report());
            let heard = server.listeners.tell(&Report::Failed(Told::from(&failure)));
            if let (false, Some((directory, mount))) = (heard, &server.announced) {
                error!("{}", failure.report());
                if let Err(error) = mounts::leave_failure(directory, mount, &failure) {
                    error!("{}", error.report());
                }
            }
            ExitCode::from(failure.kind().exit_code())
        }
    }
}

struct Server {
    happenings: Receiver<Happening>,
    sender: Sender<Happening>,
    listeners: Arc<Listeners>,
    plan: Plan,
    /// Set while an end at once would leave something behind.
    holds: Arc<AtomicBool>,
    /// What others find this session by, if it is a public one.
    announced: Option<(PathBuf, mounts::Mount)>,
}

impl Server {
    fn start(mut command: UnixStream) -> Result<Server> {
        harden();
        let plan: Plan = receive(&mut command)?
            .ok_or_else(|| Error::new(Kind::Usage, "this verb is started by other verbs only"))?;
        let (sender, happenings) = channel();
        let holds = Arc::new(AtomicBool::new(false));
        let listeners = Arc::new(Listeners::default());
        listeners.add(
            command
                .try_clone()
                .attempt(|| "share the command's socket")?,
        );
        let orders = Orders {
            command,
            sender: sender.clone(),
            holds: holds.clone(),
        };
        start_thread("session-orders", move || orders.listen())?;
        Ok(Server {
            happenings,
            sender,
            listeners,
            plan,
            holds,
            announced: None,
        })
    }

    fn run(&mut self) -> Result<Status> {
        let location: Location = self
            .plan
            .location
            .parse()
            .map_err(|why| Error::new(Kind::Usage, why))?;
        let store = image::connect(&location, &self.plan.link)?;
        self.holds.store(true, Ordering::SeqCst);
        let access = if self.plan.read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        };
        image::require(&*store)?;
        // Before the header is read: whoever holds the lease may be about to write it.
        let lease = self.lease(&store, &location, access)?;
        let sealed = image::inspect(&*store, access)?;
        for warning in sealed.warnings() {
            self.listeners.tell(&Report::Warning(warning.clone()));
        }
        let opened = self.unlock(sealed)?;
        let stage = Stage::build(&self.plan, opened)?;
        let telling = Telling::start(&store, &stage, &self.listeners)?;
        let keeping = Keeping::start(&store, &stage, lease.clone(), &self.listeners, &self.sender)?;
        let served = self.serve(&stage, &location);
        let torn_down = match &served {
            Ok(unmounting) => stage.tear_down(*unmounting),
            Err(error) if error.kind() == Kind::InUse => {
                stage.abandon();
                Ok(())
            }
            Err(_) => stage.tear_down(Unmounting::Forced),
        };
        let settled = match (&served, &torn_down) {
            (Ok(_), Ok(())) => self.settle(&*store),
            _ => Ok(()),
        };
        // Whatever was seen of it first: it is the link that failed.
        let torn_down = match store.link() {
            Link::Over(why) if torn_down.is_err() => Err(Error::from(why)),
            _ => torn_down,
        };
        keeping.stop();
        telling.stop();
        let released = lease
            .and_then(Arc::into_inner)
            .map_or(Ok(()), Lease::release);
        served?;
        torn_down?;
        settled?;
        released.attempt(|| "release the lease")?;
        let traffic = store.traffic();
        Ok(Status {
            sent: traffic.sent,
            received: traffic.received,
            ..Status::default()
        })
    }

    /// Keeps the lease until nothing that a broken connection had sent can land any more.
    fn settle(&self, store: &dyn Store) -> Result<()> {
        let told = AtomicBool::new(false);
        store.settle(&|left| {
            if !told.swap(true, Ordering::Relaxed) {
                let text = format!(
                    "waiting {}: what a broken connection had sent may still reach the server",
                    show_duration(left)
                );
                self.listeners.tell(&Report::Note(text));
            }
        })
    }

    /// Takes the lease, waiting for it as long as the plan says.
    fn lease(
        &self,
        store: &Arc<dyn Store>,
        location: &Location,
        access: Access,
    ) -> Result<Option<Arc<Lease>>> {
        if access == Access::ReadOnly {
            if let Some(holder) = Lease::peek(&**store)? {
                let text = format!(
                    "{} is writing this image; what is read may be about to change",
                    holder.describe()
                );
                self.listeners.tell(&Report::Warning(text));
            }
            return Ok(None);
        }
        let start = Instant::now();
        let deadline = start + self.plan.wait.max(LEASE_PATIENCE);
        let mut waiting = false;
        loop {
            match Lease::take(store.clone(), &location.to_string()) {
                Ok(lease) => {
                    if let Some(note) = lease.note() {
                        self.listeners.tell(&Report::Note(note.into()));
                    }
                    return Ok(Some(Arc::new(lease)));
                }
                Err(error) if error.kind() == Kind::InUse && Instant::now() < deadline => {
                    if start.elapsed() < LEASE_PATIENCE {
                        self.pause(LEASE_PATIENCE_POLL)?;
                        continue;
                    }
                    if !waiting {
                        let text = format!("waiting: {}", error.chain().join(": "));
                        self.listeners.tell(&Report::Note(text));
                        waiting = true;
                    }
                    self.pause(LEASE_POLL.min(deadline.saturating_duration_since(Instant::now())))?;
                }
                Err(error) => return Err(mounts::hint_at_mount(error, location)),
            }
        }
    }

    /// Waits, unless the command ends meanwhile.
    fn pause(&self, time: Duration) -> Result<()> {
        match self.happenings.recv_timeout(time) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            _ => Err(interrupted()),
        }
    }

    /// Asks the command for keys until one opens.
    fn unlock(&self, sealed: Sealed) -> Result<Opened> {
        loop {
            self.listeners.tell(&Report::NeedKey);
            let key = match self.happenings.recv() {
                Ok(Happening::Key(key)) => key,
                _ => return Err(interrupted()),
            };
            match sealed.unlock(&key) {
                Ok(unlocked) => return sealed.open(unlocked),
                Err(error) if error.kind() == Kind::WrongKey => {
                    self.listeners.tell(&Report::WrongKey(Told::from(&error)));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Serves until something ends the session; says how the filesystem is to be unmounted.
    fn serve(&mut self, stage: &Stage, location: &Location) -> Result<Unmounting> {
        stage.watch(self.sender.clone())?;
        if let Place::Public(_) = self.plan.place {
            self.announce(stage, location)?;
        }
        self.listeners
            .tell(&Report::Ready(stage.mounted_at().to_path_buf()));
        let mut detached = false;
        loop {
            // OK to unwrap: `self.sender` lives as long as the receiver.
            match self.happenings.recv().unwrap_or(Happening::CommandGone) {
                Happening::Order(Order::Detach) => {
                    self.stand_alone(stage)?;
                    detached = true;
                }
                Happening::CommandGone if detached => {}
                Happening::Order(Order::Close) | Happening::CommandGone => {
                    return Ok(Unmounting::Patient);
                }
                Happening::Closed => return Ok(Unmounting::Done),
                Happening::Signal => return Ok(Unmounting::Forced),
                Happening::Order(Order::Abandon) => return Err(interrupted()),
                Happening::LeaseLost(error) => return Err(error),
                Happening::Control { mut stream, force } => {
                    if let Ok(another) = stream.try_clone() {
                        self.listeners.add(another);
                    }
                    match stage.unmount() {
                        Ok(()) => return Ok(Unmounting::Done),
                        Err(_) if force => return Ok(Unmounting::Forced),
                        // It goes away with this answer, and with it its place among the listeners.
                        Err(error) => drop(send(&mut stream, &Report::Failed(Told::from(&error)))),
                    }
                }
                Happening::Key(_) | Happening::Order(_) => {}
            }
        }
    }

    /// Lets `e2ebak umount` find this session: a control socket, and a state beside it.
    fn announce(&mut self, stage: &Stage, location: &Location) -> Result<()> {
        let state = mounts::Mount {
            mountpoint: stage.mounted_at().to_path_buf(),
            location: location.to_string(),
            pid: std::process::id(),
            read_only: self.plan.read_only,
        };
        let control = mounts::control_path(stage.directory());
        let listener =
            UnixListener::bind(&control).attempt(|| format!("listen at {}", control.display()))?;
        mounts::write_state(stage.directory(), &state)?;
        self.announced = Some((stage.directory().to_path_buf(), state));
        let sender = self.sender.clone();
        start_thread("session-control", move || {
            answer_control(&listener, &sender)
        })
        .map(drop)
    }

    /// Becomes a daemon: no terminal, its own log, its own signals.
    fn stand_alone(&self, stage: &Stage) -> Result<()> {
        start_signals(self.sender.clone())?;
        // It may already lead a session of its own, which is as good.
        let _ = rustix::process::setsid();
        leave_terminal(&stage.directory().join("log"))
    }
}

fn interrupted() -> Error {
    Error::new(Kind::Interrupted, "interrupted by a signal")
}

pub(super) fn start_thread(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> Result<thread::JoinHandle<()>> {
    let started = thread::Builder::new().name(name.into()).spawn(body);
    started.attempt(|| format!("start the thread {name}"))
}

/// Keeps keys out of core dumps, and memory reclaim from waiting for our own writes.
fn harden() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    if let Err(errno) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        warn!(%errno, "core dumps stay possible");
    }
    crate::host::privilege::serve_block_device();
}

fn start_signals(sender: Sender<Happening>) -> Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).attempt(|| "listen for signals")?;
    start_thread("session-signals", move || {
        for _ in signals.forever() {
            if sender.send(Happening::Signal).is_err() {
                return;
            }
        }
    })
    .map(drop)
}

/// Standard input, output and error go away from the terminal, so that it can be closed.
fn leave_terminal(log: &Path) -> Result<()> {
    let open = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log);
    let log = open.attempt(|| format!("open the log {}", log.display()))?;
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null");
    let null = null.attempt(|| "open /dev/null")?;
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .and_then(|()| rustix::stdio::dup2_stderr(&log))
        .attempt(|| "leave the terminal")
}

fn answer_control(listener: &UnixListener, sender: &Sender<Happening>) {
    for stream in listener.incoming().flatten() {
        let mut stream = stream;
        let force = match receive(&mut stream) {
            Ok(Some(Order::Close)) => false,
            Ok(Some(Order::Force)) => true,
            _ => continue,
        };
        if sender.send(Happening::Control { stream, force }).is_err() {
            return;
        }
    }
}

/// Reads what the command says.
struct Orders {
    command: UnixStream,
    sender: Sender<Happening>,
    holds: Arc<AtomicBool>,
}

impl Orders {
    fn listen(mut self) {
        while let Ok(Some(order)) = receive::<Order>(&mut self.command) {
            let happening = match order {
                Order::Key => match receive_key(&mut self.command) {
                    Ok(key) => Happening::Key(key),
                    Err(_) => break,
                },
                // Whatever the main thread waits for now is not worth waiting for.
                Order::Abandon => std::process::exit(i32::from(Kind::Interrupted.exit_code())),
                other => Happening::Order(other),
            };
            if self.sender.send(happening).is_err() {
                return;
            }
        }
        if !self.holds.load(Ordering::SeqCst) {
            std::process::exit(i32::from(Kind::Interrupted.exit_code()));
        }
        let _ = self.sender.send(Happening::CommandGone);
    }
}

/// Everybody who wants to hear reports.
#[derive(Default)]
pub(super) struct Listeners(Mutex<Vec<UnixStream>>);

impl Listeners {
    fn add(&self, stream: UnixStream) {
        let _ = stream.set_write_timeout(Some(LISTENER_TIMEOUT));
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(stream);
    }

    /// Says whether anybody heard it.
    pub fn tell(&self, report: &Report) -> bool {
        let mut listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain_mut(|stream| send(stream, report).is_ok());
        !listeners.is_empty()
    }
}
