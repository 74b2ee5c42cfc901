//! The command's end of a session.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::level_filters::LevelFilter;

use super::VERB;
use super::signals::ENOUGH_SIGNALS;
use super::wire::{Order, Place, Plan, Report, Status, receive, send, send_key};
use crate::error::{Attempt, Error, Kind, Result, Told};
use crate::host::spawn::{self, Fate};
use crate::progress::{Event, Monitor};
use crate::secret::Secret;

/// How often a wait looks at whether it should stop.
const POLL: Duration = Duration::from_millis(100);

/// After an order to end, a session that never was mounted, or that is abandoned, has this long
/// before it is killed: enough to release the lease over a slow link.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// One is enough where the link stays down for so long after it: an orderly end would wait for the
/// link, up to its deadline. Not for a mount for everybody: what others have written there may be
/// nowhere else.
const LINK_PATIENCE: Duration = Duration::from_secs(5);

/// Where keys come from, and whether asking again makes sense.
pub trait KeySource {
    /// The next key to try; `rejected` says why the one before did not serve.
    fn next_key(&mut self, rejected: Option<&Error>) -> Result<Secret>;
}

/// A session that is mounted and serves. Dropping it without [`Session::close`] makes the session
/// process tear down by itself.
pub struct Session {
    to: UnixStream,
    child: Child,
    reports: Receiver<Report>,
    status: Arc<Mutex<Status>>,
    full: Arc<Mutex<Full>>,
    mounted_at: PathBuf,
    signals: Arc<AtomicUsize>,
    monitor: Arc<dyn Monitor>,
    detached: bool,
    /// Signals have ended the session.
    given_up: Arc<AtomicBool>,
    /// Nobody waits for the session any more.
    over: Arc<AtomicBool>,
}

impl Session {
    /// Starts the session process and waits until the filesystem is mounted.
    ///
    /// `signals` counts the signals that asked to stop: the first ends the session in order, a
    /// second one abandons it, and the first does where the link is down and stays so.
    pub fn start(
        plan: &Plan,
        keys: &mut dyn KeySource,
        signals: Arc<AtomicUsize>,
        monitor: Arc<dyn Monitor>,
    ) -> Result<Session> {
        let (ours, theirs) = UnixStream::pair().attempt(|| "create a socket pair")?;
        // Not the path: in a private mount namespace, as under a systemd unit with `PrivateTmp=`, it
        // may lead nowhere, and an upgrade may have replaced the file.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("e2ebak");
        // The keys come over the socket; no child needs to see where they come from.
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"E2EBAK_PASSPHRASE") {
                command.env_remove(name);
            }
        }
        // Dozens of threads that each move a megabyte now and then need no arena each.
        command.env("MALLOC_ARENA_MAX", "2");
        command.env("E2EBAK_LOG", format!("e2ebak={}", LevelFilter::current()));
        command
            .arg(VERB)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null());
        // Ctrl-C and a service manager's SIGTERM reach the whole group; only the command decides.
        spawn::prepare(
            &mut command,
            Fate {
                deaf_to_signals: true,
                ..Fate::default()
            },
        );
        if let Place::Private(private) = &plan.place
            && let Some(door) = private.way_back()
        {
            spawn::start_behind(&mut command, door);
        }
        let child = command.spawn().attempt(|| "start the session process")?;
        // The command keeps its copy of the far end no longer than this.
        drop(command);
        let status = Arc::new(Mutex::new(Status::default()));
        let (sender, reports) = channel();
        let from = ours.try_clone().attempt(|| "share the socket")?;
        let full = Arc::new(Mutex::new(Full::default()));
        let listener = Listener {
            status: status.clone(),
            full: full.clone(),
            sender,
            monitor: monitor.clone(),
        };
        thread::Builder::new()
            .name("session-reports".into())
            .spawn(move || listener.run(from))
            .attempt(|| "start a thread")?;
        let mut session = Session {
            to: ours,
            child,
            reports,
            status,
            full,
            mounted_at: PathBuf::new(),
            signals,
            monitor,
            detached: false,
            given_up: Arc::default(),
            over: Arc::default(),
        };
        send(&mut session.to, plan)?;
        session.mounted_at = session.until_ready(keys)?;
        session.heed_signals(matches!(plan.place, Place::Private(_)))?;
        Ok(session)
    }

    /// Signals end the session also while the command waits in the kernel for the filesystem,
    /// where no signal reaches it: the end of the session wakes it.
    fn heed_signals(&self, one_without_link: bool) -> Result<()> {
        let (signals, over) = (self.signals.clone(), self.over.clone());
        let (given_up, monitor) = (self.given_up.clone(), self.monitor.clone());
        let status = self.status_later();
        let mut to = self.to.try_clone().attempt(|| "share the socket")?;
        let heed = move || {
            let mut waiting_since = None;
            while !over.load(Ordering::Relaxed) {
                let asked = signals.load(Ordering::Relaxed);
                let waits = one_without_link && asked > 0 && status().link_down.is_some();
                waiting_since = waits.then(|| waiting_since.unwrap_or_else(Instant::now));
                let in_vain = waiting_since.is_some_and(|since| since.elapsed() >= LINK_PATIENCE);
                if in_vain || asked >= ENOUGH_SIGNALS {
                    given_up.store(true, Ordering::Relaxed);
                    if in_vain {
                        let text = "stopped while the link is down: what was not yet synced is \
                                    given up, and the next run goes on from there";
                        monitor.report(Event::Warning(text.into()));
                    }
                    let _ = send(&mut to, &Order::Abandon); // it may have ended by itself
                    return;
                }
                thread::sleep(POLL);
            }
        };
        let thread = thread::Builder::new().name("session-signals".into());
        thread.spawn(heed).map(drop).attempt(|| "start a thread")
    }

    fn until_ready(&mut self, keys: &mut dyn KeySource) -> Result<PathBuf> {
        let mut rejected = None;
        loop {
            match self.next_report(1)? {
                Report::Ready(at) => return Ok(at),
                Report::WrongKey(told) => rejected = Some(Error::from(told)),
                Report::Failed(told) => return Err(told.into()),
                Report::NeedKey => match keys.next_key(rejected.as_ref()) {
                    Ok(key) => send_key(&mut self.to, &key)?,
                    Err(error) => {
                        send(&mut self.to, &Order::NoKey)?;
                        return Err(rejected.unwrap_or(error));
                    }
                },
                _ => {}
            }
        }
    }

    /// Where the image's filesystem is mounted.
    pub fn mounted_at(&self) -> &Path {
        &self.mounted_at
    }

    /// The latest figures.
    pub fn status(&self) -> Status {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same, for another thread.
    pub fn status_later(&self) -> impl Fn() -> Status + Send + Sync + use<> {
        let status = self.status.clone();
        move || *status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets `stop` when the server has no room left but what an orderly end needs; also if that was
    /// so before.
    pub fn stop_when_full(&self, stop: Arc<AtomicBool>) {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        stop.fetch_or(full.told.is_some(), Ordering::Relaxed);
        full.stop = Some(stop);
    }

    /// What the server said of its room, if that is short.
    pub fn full(&self) -> Option<Error> {
        let full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        full.told.clone().map(Error::from)
    }

    /// Leaves the session running by itself.
    pub fn detach(mut self) -> Result<()> {
        self.detached = true;
        send(&mut self.to, &Order::Detach)
    }

    /// Waits for the session to end by itself: somebody unmounts, or a signal comes.
    pub fn wait(mut self) -> Result<Status> {
        match self.next_report(1) {
            Ok(Report::Done(status)) => Ok(status),
            Ok(Report::Failed(told)) => Err(told.into()),
            Ok(_) => Err(Error::new(Kind::Io, "the session process broke off")),
            Err(error) if error.kind() == Kind::Interrupted => {
                self.close()?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// Unmounts, and returns when every byte is synced on the server and the lease is released.
    pub fn close(mut self) -> Result<Status> {
        self.monitor.report(Event::Phase("unmount"));
        if let Err(error) = send(&mut self.to, &Order::Close) {
            // Signals have ended it, or it has ended by itself.
            return Err(match self.is_given_up() {
                true => Error::new(Kind::Interrupted, "interrupted by a signal"),
                false => error,
            });
        }
        let patience = self.signals.load(Ordering::Relaxed).max(1) + 1;
        match self.next_report(patience) {
            Ok(Report::Done(status)) => Ok(status),
            Ok(Report::Failed(told)) => Err(told.into()),
            Ok(_) => Err(Error::new(Kind::Io, "the session process broke off")),
            Err(error) => {
                self.abandon();
                Err(error)
            }
        }
    }

    fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
            || self.signals.load(Ordering::Relaxed) >= ENOUGH_SIGNALS
    }

    /// Ends the session at once.
    fn abandon(&mut self) {
        let _ = send(&mut self.to, &Order::Abandon);
        self.reap();
    }

    /// Waits for the end of the session process, and makes it end when it does not.
    fn reap(&mut self) {
        let deadline = Instant::now() + END_TIMEOUT;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(POLL);
        }
        tracing::warn!(
            pid = self.child.id(),
            "the session process did not end; killing it"
        );
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The next report that decides something, unless `patience` signals have come before it.
    fn next_report(&mut self, patience: usize) -> Result<Report> {
        loop {
            match self.reports.recv_timeout(POLL) {
                Ok(report) => return Ok(report),
                Err(RecvTimeoutError::Disconnected) if self.is_given_up() => {
                    return Err(Error::new(Kind::Interrupted, "interrupted by a signal"));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = self
                        .child
                        .wait()
                        .attempt(|| "wait for the session process")?;
                    return Err(Error::new(
                        Kind::Io,
                        format!("the session process ended early ({ended})"),
                    ));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if self.signals.load(Ordering::Relaxed) >= patience {
                return Err(Error::new(Kind::Interrupted, "interrupted by a signal"));
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if !self.detached {
            // The end of the socket is the order to tear down.
            let _ = self.to.shutdown(std::net::Shutdown::Write);
            self.reap();
        }
    }
}

/// What is known of room on the server, and who is to stop when there is none.
#[derive(Default)]
struct Full {
    told: Option<Told>,
    stop: Option<Arc<AtomicBool>>,
}

/// Receives all reports; keeps figures, passes on what is for the user, queues the rest.
struct Listener {
    status: Arc<Mutex<Status>>,
    full: Arc<Mutex<Full>>,
    sender: Sender<Report>,
    monitor: Arc<dyn Monitor>,
}

impl Listener {
    fn run(self, mut from: UnixStream) {
        // Whoever prints may be stopped (Ctrl-S); reading must go on, or the session gives us up.
        let (events, to_print) = channel();
        let monitor = self.monitor.clone();
        let print = move || to_print.iter().for_each(|event| monitor.report(event));
        if thread::Builder::new()
            .name("session-notes".into())
            .spawn(print)
            .is_err()
        {
            return;
        }
        let report_event = |event| drop(events.send(event));
        while let Ok(Some(report)) = receive::<Report>(&mut from) {
            match report {
                Report::Status(status) => {
                    *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
                    let progress = status.progress();
                    report_event(Event::Progress(progress));
                }
                Report::Full(told) => {
                    let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
                    match &full.stop {
                        Some(stop) => stop.store(true, Ordering::Relaxed),
                        None => report_event(Event::Warning(
                            Error::from(told.clone()).chain().join(": "),
                        )),
                    }
                    full.told = Some(told);
                }
                Report::Note(text) => report_event(Event::Note(text)),
                Report::Warning(text) => report_event(Event::Warning(text)),
                Report::Phase(_) => {}
                other => {
                    if self.sender.send(other).is_err() {
                        return;
                    }
                }
            }
        }
    }
}
