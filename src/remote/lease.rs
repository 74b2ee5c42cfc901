//! The lease: a small file beside the image that says who may write to it.
//!
//! Taking it is creating the file exclusively. Its holder renews it while it works and removes it
//! at the end. A holder that is dead for certain (same boot, same process namespace, and no such
//! process) is succeeded without asking; any other lease is left alone until a person says
//! otherwise (`clear` with force).
//!
//! **Why two successors of one dead holder cannot both win.** SFTP can create exclusively, but it
//! cannot replace a file only if it still is what it was. So whoever wants to succeed holder N,
//! whose nonce is used once in the world, creates the file `.lease.after-N` exclusively; one
//! succeeds. If the winner M dies before it is done, it is succeeded in turn by `.lease.after-M`,
//! and so on: a chain, of which only the last link may be alive. A link is removed by its maker
//! while that lives, or by anybody once `.lease` has changed. Having made the last link, a
//! successor reads `.lease` and all links again. If they are what they were, no link can have been
//! removed and made anew meanwhile (the makers before us are dead, and `.lease` has not changed),
//! so there is no other last link, and it alone replaces `.lease`. If they are not, it takes its
//! link back and starts over. `.lease` never returns to N, so a link after N that is made later
//! wins nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use super::Store;
use crate::error::{Attempt, Error, Kind, Result};
use crate::units::show_duration;

/// The side file.
pub const SUFFIX: &str = ".lease";

/// The version of the file's format.
const VERSION: u32 = 1;

/// How often taking starts over because the lease changed hands under it. Each time somebody else
/// got on, so more are not expected even among dozens of contenders.
const TRIES: usize = 32;

/// How many successors may die in the middle of taking over before a person has to look.
const CHAIN_MAX: usize = 16;

/// Who holds a lease, as the file says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub version: u32,
    pub host: String,
    /// `/proc/sys/kernel/random/boot_id`: one boot of one kernel.
    pub boot_id: String,
    pub pid: i32,
    /// `/proc/self/ns/pid`: process numbers mean something only within it.
    pub pid_namespace: String,
    /// When the process started, in clock ticks since boot (`proc(5)`, stat, field 22): tells it
    /// from a later one with the same number.
    pub start_ticks: u64,
    pub user: String,
    /// Name and version.
    pub program: String,
    /// When it was taken and last renewed, by the holder's clock (RFC 3339).
    pub since: String,
    pub renewed: String,
    /// 32 hexadecimal digits, never used twice.
    pub nonce: String,
}

impl Holder {
    /// This process, with a new nonce.
    fn me() -> Result<Self> {
        let now = now();
        let user = std::env::var("USER")
            .unwrap_or_else(|_| format!("uid {}", rustix::process::geteuid().as_raw()));
        Ok(Holder {
            version: VERSION,
            host: host_name(),
            boot_id: read_proc("sys/kernel/random/boot_id")?.trim().into(),
            pid: rustix::process::getpid().as_raw_pid(),
            pid_namespace: pid_namespace()?,
            start_ticks: Process::read("self")?.start_ticks,
            user,
            program: format!("e2ebak {}", env!("CARGO_PKG_VERSION")),
            since: now.clone(),
            renewed: now,
            nonce: uuid::Uuid::new_v4().simple().to_string(),
        })
    }

    fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|e| Error::new(Kind::Io, "the lease cannot be encoded").because(e))
    }

    /// The file is the server's word: what is shown of it is made harmless.
    fn decode(content: &[u8]) -> Result<Self> {
        let unreadable = || {
            Error::new(Kind::Corrupt, "the lease is unreadable").hint(
                "if nothing else uses the image, remove it with `e2ebak unlock LOCATION --force`",
            )
        };
        let mut holder: Holder =
            serde_json::from_slice(content).map_err(|e| unreadable().because(e))?;
        let hexadecimal = |c: char| c.is_ascii_hexdigit();
        if holder.nonce.len() != 32 || !holder.nonce.chars().all(hexadecimal) {
            return Err(unreadable());
        }
        for text in [
            &mut holder.host,
            &mut holder.user,
            &mut holder.program,
            &mut holder.since,
            &mut holder.renewed,
        ] {
            text.retain(|c| !c.is_control());
            *text = text.chars().take(100).collect();
        }
        Ok(holder)
    }

    /// Whether it is known to be dead. In doubt it is not.
    pub fn is_dead(&self) -> bool {
        let Ok(me) = Holder::me() else { return false };
        // A /proc of another namespace would show others under the same numbers.
        if !Process::read("self").is_ok_and(|process| process.pid == me.pid) {
            return false;
        }
        let comparable = self.version == VERSION
            && self.boot_id == me.boot_id
            && self.pid_namespace == me.pid_namespace;
        // The number is the server's word, and `from_raw` takes none below zero.
        let Some(pid) = Some(self.pid)
            .filter(|pid| *pid > 0)
            .and_then(Pid::from_raw)
        else {
            return false;
        };
        if !comparable {
            return false;
        }
        if test_kill_process(pid) == Err(rustix::io::Errno::SRCH) {
            return true;
        }
        match Process::read(&self.pid.to_string()) {
            Ok(process) => process.start_ticks != self.start_ticks || process.has_ended,
            Err(_) => false,
        }
    }

    /// How long ago it was renewed, by our clock against the holder's; for people only.
    fn age(&self) -> Option<String> {
        let renewed: Timestamp = self.renewed.parse().ok()?;
        let age = Timestamp::now().duration_since(renewed);
        Some(show_duration(age.try_into().ok()?))
    }

    /// The holder in a sentence.
    pub fn describe(&self) -> String {
        let age = self.age().map_or_else(
            || format!("renewed at {}", self.renewed),
            |age| format!("renewed {age} ago"),
        );
        format!(
            "{} on {} (process {}, user {}) since {}, {age}",
            self.program, self.host, self.pid, self.user, self.since
        )
    }

    fn in_use(&self, name: &str) -> Error {
        let error = Error::new(Kind::InUse, format!("it is held by {}", self.describe()));
        let Ok(me) = Holder::me() else { return error };
        let here = self.boot_id == me.boot_id && self.pid_namespace == me.pid_namespace;
        let unlock = format!("run `e2ebak unlock {name} --force`");
        match (here, self.host == me.host) {
            (true, _) => error.hint(format!("wait for process {} or end it", self.pid)),
            (false, true) => error.hint(format!(
                "this host has restarted since, or it is a container: if that process is gone, {unlock}"
            )),
            (false, false) => error.hint(format!("if {} is not at work, {unlock}", self.host)),
        }
    }

    fn successor_suffix(&self) -> String {
        format!("{SUFFIX}.after-{}", self.nonce)
    }
}

/// A lease that is held. Dropping it releases it, as far as that is possible.
pub struct Lease {
    store: Arc<dyn Store>,
    name: String,
    holder: Holder,
    note: Option<String>,
    over: AtomicBool,
}

impl Lease {
    /// Takes the lease. `name` is what messages call the image: its location.
    ///
    /// [`Kind::InUse`] with the holder, when there is one that is not known to be dead. Must be
    /// called by the process that will do the work, after it has forked.
    pub fn take(store: Arc<dyn Store>, name: &str) -> Result<Self> {
        Lease::take_from(store, name, Holder::is_dead)
            .attempt(|| format!("take the lease of {name}"))
    }

    fn take_from(
        store: Arc<dyn Store>,
        name: &str,
        may_be_succeeded: impl Fn(&Holder) -> bool,
    ) -> Result<Self> {
        let me = Holder::me()?;
        for _ in 0..TRIES {
            let note = match store.create_side(SUFFIX, &me.encode()?) {
                Ok(()) => None,
                Err(error) if error.kind() == Kind::Exists => {
                    let Some(chain) = lock_chain(&*store, &me, name, &may_be_succeeded)? else {
                        continue;
                    };
                    Some(succeed(&*store, &me, &chain)?)
                }
                Err(error) => return Err(error),
            };
            debug!(nonce = me.nonce, "the lease is taken");
            store.use_lease(Some(&me.nonce));
            return Ok(Lease {
                store,
                name: name.into(),
                holder: me,
                note,
                over: AtomicBool::new(false),
            });
        }
        Err(Error::new(
            Kind::InUse,
            format!("it changed hands {TRIES} times while we tried"),
        ))
    }

    /// What was put aside to take it, for the user to read.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    pub fn holder(&self) -> &Holder {
        &self.holder
    }

    /// Writes the time into the lease. [`Kind::InUse`] when it is not ours any more: then nothing
    /// may be written to the image.
    ///
    /// Between its reading and its writing a lease that a person takes away by force could be
    /// overwritten; whoever took it then finds that out by its own renewal.
    pub fn renew(&self) -> Result<()> {
        self.renew_file()
            .attempt(|| format!("renew the lease of {}", self.name))
    }

    fn renew_file(&self) -> Result<()> {
        self.check()?;
        let renewed = Holder {
            renewed: now(),
            ..self.holder.clone()
        };
        self.store.replace_side(SUFFIX, &renewed.encode()?)
    }

    /// Whether it is still ours, by one look. [`Kind::InUse`] when it is not.
    pub fn check(&self) -> Result<()> {
        is_held(self.store.read_side(SUFFIX)?, &self.holder.nonce)
    }

    /// Removes the lease if it is still ours, and not before nothing that a broken connection had sent
    /// can land any more: the next holder's writes would be older than those.
    pub fn release(self) -> Result<()> {
        self.release_once()
    }

    fn release_once(&self) -> Result<()> {
        if self.over.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let attempt = || format!("release the lease of {}", self.name);
        // Whoever else holds it by now must not be written over.
        self.check().attempt(attempt)?;
        let told = AtomicBool::new(false);
        let settled = self.store.settle(&|left| {
            if !told.swap(true, Ordering::AcqRel) {
                let left = show_duration(left);
                warn!(
                    "waiting {left}: what a broken connection had sent may still reach the server"
                );
            }
        });
        if let Err(error) = settled {
            let error = error.chain().join(": ");
            debug!(error, "released with writes outstanding");
        }
        self.store.use_lease(None);
        self.check().attempt(attempt)?;
        self.store.remove_side(SUFFIX).attempt(attempt)?;
        debug!(nonce = self.holder.nonce, "the lease is released");
        Ok(())
    }

    /// Who holds the lease; `None` when nobody does.
    pub fn peek(store: &dyn Store) -> Result<Option<Holder>> {
        let content = store.read_side(SUFFIX)?;
        content.map(|content| Holder::decode(&content)).transpose()
    }

    /// Removes a lease whose holder is dead, or with `force` whoever holds it. Gives the holder,
    /// `None` when there was none (or an unreadable one, with force).
    pub fn clear(store: Arc<dyn Store>, name: &str, force: bool) -> Result<Option<Holder>> {
        let attempt = || format!("clear the lease of {name}");
        let holder = match Lease::peek(&*store) {
            Ok(None) => return Ok(None),
            Ok(Some(holder)) => holder,
            Err(error) if error.kind() == Kind::Corrupt && force => {
                store.remove_side(SUFFIX).attempt(attempt)?;
                return Ok(None);
            }
            Err(error) => return Err(error).attempt(attempt),
        };
        // By taking it, so that nobody else's new lease can be hit.
        Lease::take_from(store, name, |holder| force || holder.is_dead())
            .and_then(Lease::release)
            .attempt(attempt)?;
        Ok(Some(holder))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Err(error) = self.release_once() {
            warn!(error = %error.chain().join(": "), "the lease was not released");
        }
    }
}

/// Whether the content of a lease file is that of the holder with this nonce. [`Kind::InUse`] when
/// it is not.
pub(super) fn is_held(content: Option<Vec<u8>>, nonce: &str) -> Result<()> {
    let lost = |text: String| Err(Error::new(Kind::InUse, text));
    match content
        .map(|content| Holder::decode(&content))
        .transpose()?
    {
        Some(holder) if holder.nonce == nonce => Ok(()),
        Some(holder) => lost(format!("the lease was taken over by {}", holder.describe())),
        None => lost("the lease was removed by somebody".into()),
    }
}

/// From `.lease` to the last of its dead successors.
type Chain = Vec<Holder>;

/// Makes us the only one who may replace `.lease`. `None`: it changed meanwhile, start over.
fn lock_chain(
    store: &dyn Store,
    me: &Holder,
    name: &str,
    may_be_succeeded: &impl Fn(&Holder) -> bool,
) -> Result<Option<Chain>> {
    let Some(root) = read_holder(store, SUFFIX)? else {
        return Ok(None);
    };
    let mut chain = vec![root];
    while let Some(last) = chain.last() {
        if !may_be_succeeded(last) {
            return Err(last.in_use(name));
        }
        if chain.len() > CHAIN_MAX {
            return Err(Error::new(
                Kind::InUse,
                format!("{CHAIN_MAX} processes died while they took over the lease"),
            ));
        }
        let suffix = last.successor_suffix();
        match store.create_side(&suffix, &me.encode()?) {
            Ok(()) => break,
            Err(error) if error.kind() == Kind::Exists => match read_holder(store, &suffix)? {
                Some(holder) => chain.push(holder),
                None => return Ok(None),
            },
            Err(error) => return Err(error),
        }
    }
    let unchanged = is_unchanged(store, &chain);
    if !matches!(unchanged, Ok(true)) {
        take_back(store, &chain);
    }
    Ok(unchanged?.then_some(chain))
}

/// The holder in a side file; one that cannot be read is nobody's to succeed. It may be about to
/// be written, on a server without hard links.
fn read_holder(store: &dyn Store, suffix: &str) -> Result<Option<Holder>> {
    let content = store.read_side(suffix)?;
    let holder = content.map(|content| Holder::decode(&content)).transpose();
    holder.map_err(|error| match error.kind() {
        Kind::Corrupt => error.of_kind(Kind::InUse),
        _ => error,
    })
}

fn is_unchanged(store: &dyn Store, chain: &Chain) -> Result<bool> {
    let mut suffix = SUFFIX.to_string();
    for holder in chain {
        match read_holder(store, &suffix) {
            Ok(Some(now)) if now.nonce == holder.nonce => suffix = holder.successor_suffix(),
            Err(error) if error.kind() != Kind::InUse => return Err(error),
            _ => return Ok(false),
        }
    }
    Ok(true)
}

/// Removes the link that we made.
fn take_back(store: &dyn Store, chain: &Chain) {
    let Some(last) = chain.last() else { return };
    if let Err(error) = store.remove_side(&last.successor_suffix()) {
        // It names us: others are kept out until we end.
        warn!(%error, "a lease that was not taken could not be taken back");
    }
}

/// Replaces `.lease` by ours, and tidies up. Gives a note for the user.
fn succeed(store: &dyn Store, me: &Holder, chain: &Chain) -> Result<String> {
    if let Err(error) = me
        .encode()
        .and_then(|content| store.replace_side(SUFFIX, &content))
    {
        take_back(store, chain);
        return Err(error);
    }
    for holder in chain {
        if let Err(error) = store.remove_side(&holder.successor_suffix()) {
            debug!(%error, "a link of the lease is left behind, it does no harm");
        }
    }
    let was = chain.first().map(Holder::describe).unwrap_or_default();
    let note = format!("the lease was put aside: its holder is gone, {was}");
    warn!("{note}");
    Ok(note)
}

fn now() -> String {
    let now = Timestamp::now();
    // Whole seconds are enough for people.
    Timestamp::from_second(now.as_second())
        .unwrap_or(now)
        .to_string()
}

fn host_name() -> String {
    let uname = rustix::system::uname();
    uname.nodename().to_string_lossy().into_owned()
}

fn read_proc(path: &str) -> Result<String> {
    let path = format!("/proc/{path}");
    std::fs::read_to_string(&path).attempt(|| format!("read {path}"))
}

fn pid_namespace() -> Result<String> {
    let link = "/proc/self/ns/pid";
    let target = std::fs::read_link(link).attempt(|| format!("read {link}"))?;
    Ok(target.to_string_lossy().into_owned())
}

/// A line of `/proc/*/stat`.
struct Process {
    pid: i32,
    start_ticks: u64,
    /// Nothing of it runs; its parent has not asked for its exit status yet.
    has_ended: bool,
}

impl Process {
    fn read(which: &str) -> Result<Self> {
        let stat = read_proc(&format!("{which}/stat"))?;
        Process::parse(&stat)
            .ok_or_else(|| Error::new(Kind::Unsupported, format!("/proc/{which}/stat is odd")))
    }

    /// The name in the second field may contain spaces and parentheses (`proc(5)`).
    fn parse(stat: &str) -> Option<Self> {
        let (pid, rest) = stat.split_once(' ')?;
        let fields: Vec<&str> = rest
            .get(rest.rfind(')')? + 1..)?
            .split_whitespace()
            .collect();
        // The first of these is field 3.
        let field = |number: usize| fields.get(number - 3).copied();
        let threads: u64 = field(20)?.parse().ok()?;
        Some(Process {
            pid: pid.parse().ok()?,
            start_ticks: field(22)?.parse().ok()?,
            has_ended: matches!(field(3)?, "Z" | "X") && threads <= 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_be_called_anything() {
        let stat = "7 (a) S 1 (b) Z 1 7 7 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 123456 0 0";
        let process = Process::parse(stat).expect("parses");
        assert_eq!((process.pid, process.start_ticks), (7, 123_456));
        assert!(process.has_ended);
        assert!(Process::parse("7 (x").is_none());
        assert!(Process::parse("7 (x) R 1").is_none());
    }

    #[test]
    fn this_process_is_not_dead() {
        let me = Holder::me().expect("known");
        assert!(!me.is_dead());
        let other_start = Holder {
            start_ticks: me.start_ticks + 1,
            ..me.clone()
        };
        assert!(other_start.is_dead());
        for (boot_id, pid_namespace) in [("x", &*me.pid_namespace), (&*me.boot_id, "x")] {
            let foreign = Holder {
                boot_id: boot_id.into(),
                pid_namespace: pid_namespace.into(),
                ..other_start.clone()
            };
            assert!(!foreign.is_dead());
        }
        // Found by fuzzing: a lease that names no process at all.
        for pid in [0, -1, i32::MIN] {
            let nobody = Holder { pid, ..me.clone() };
            assert!(!nobody.is_dead(), "{pid}");
        }
    }

    #[test]
    fn what_the_server_says_of_a_holder_is_made_harmless() {
        let mut holder = Holder::me().expect("known");
        holder.host = "\x1b[2Jnas\n".into();
        let back = Holder::decode(&holder.encode().expect("encodes")).expect("decodes");
        assert_eq!(back.host, "[2Jnas");
        holder.nonce = "../../etc/passwd".into();
        assert!(Holder::decode(&holder.encode().expect("encodes")).is_err());
        assert!(Holder::decode(b"").is_err());
    }
}
