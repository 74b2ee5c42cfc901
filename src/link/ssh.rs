//! The system's `ssh`: it honours the user's configuration, agent, jump hosts, hardware keys and
//! known hosts.
//!
//! ssh takes the first value that it finds for an option, so the order on its command line is:
//! what the user gave, then ours, and its configuration files come last.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tracing::debug;

use super::command::{self, Ending};
use super::{Dial, Occasion, PATIENCE, Stream};
use crate::error::{Attempt, Error, Kind, Result};
use crate::location::Server;

/// How long connecting to the server may take, without logging in.
pub const CONNECT_TIMEOUT_SECONDS: u32 = 30;

/// A peer that has vanished is noticed after this time without a byte, twice over: 30 s.
const ALIVE_INTERVAL_SECONDS: u32 = 15;
const ALIVE_COUNT: u32 = 2;

/// How long the server's first packet may take when ssh may ask for a passphrase, a touch of a
/// key or whether a host is known.
const PATIENCE_WITH_QUESTIONS: Duration = Duration::from_secs(600);

/// The cheapest cipher where the processor has AES: 2.2 s per GiB instead of 3.7 s.
const CHEAPEST: &str = "aes128-gcm@openssh.com";

/// The exit code with which ssh reports an error of its own, and not of what it ran.
const SSH_FAILED: i32 = 255;

/// What the user set about ssh. The default leaves all to its own configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SshOptions {
    /// `-i`.
    pub identity_file: Option<PathBuf>,
    /// `-F`: another configuration file.
    pub config_file: Option<PathBuf>,
    /// `-o`, each as `Name=value`.
    pub options: Vec<String>,
    /// Another ssh than the first one of the path.
    pub program: Option<PathBuf>,
    /// Never ask on the terminal.
    pub batch: bool,
}

/// Dials one server by its `ssh -s sftp`.
#[derive(Clone, Debug)]
pub struct SshDial {
    server: Server,
    options: SshOptions,
    asks: bool,
}

impl SshDial {
    pub fn new(server: Server, options: SshOptions) -> Self {
        let asks = !options.batch && can_ask();
        SshDial {
            server,
            options,
            asks,
        }
    }

    fn program(&self) -> OsString {
        match &self.options.program {
            Some(program) => program.clone().into(),
            None => "ssh".into(),
        }
    }

    /// What decides how ssh reads its configuration.
    fn given(&self) -> Vec<OsString> {
        let mut words = Vec::new();
        let mut option = |name: &str, value: OsString| {
            words.push(name.into());
            words.push(value);
        };
        if let Some(file) = &self.options.config_file {
            option("-F", file.into());
        }
        if let Some(file) = &self.options.identity_file {
            option("-i", file.into());
        }
        for setting in &self.options.options {
            option("-o", setting.into());
        }
        if let Some(port) = self.server.port {
            option("-p", port.to_string().into());
        }
        if let Some(user) = &self.server.user {
            option("-l", user.into());
        }
        words
    }

    /// The command line.
    pub fn argv(&self, occasion: Occasion) -> Vec<OsString> {
        let mut argv = self.argv_to(occasion);
        argv.extend(["-s", "--"].map(OsString::from));
        argv.push(self.server.host.clone().into());
        argv.push("sftp".into());
        argv
    }

    /// Runs a command on the server, by the login shell there. It never asks anybody; where only
    /// SFTP is allowed, something else than the command may answer, or nothing.
    pub fn exec(&self, command: &str) -> Result<Stream> {
        let mut argv = self.argv_to(Occasion::Again);
        argv.push("--".into());
        argv.push(self.server.host.clone().into());
        argv.push(command.into());
        let explain = |ending: &Ending| ending.error(Kind::Unsupported, "ssh");
        command::start(&argv, Box::new(explain))
    }

    fn argv_to(&self, occasion: Occasion) -> Vec<OsString> {
        let asks = self.asks && occasion == Occasion::First;
        let mut argv = vec![self.program()];
        argv.extend(self.given());
        // No terminal, no X11, no agent forwarding, no escape character.
        argv.extend(["-T", "-x", "-a", "-e", "none"].map(OsString::from));
        let mut set = |setting: String| argv.extend(["-o".into(), setting.into()]);
        if !asks {
            set("BatchMode=yes".into());
        }
        set(format!("ConnectTimeout={CONNECT_TIMEOUT_SECONDS}"));
        set(format!("ServerAliveInterval={ALIVE_INTERVAL_SECONDS}"));
        set(format!("ServerAliveCountMax={ALIVE_COUNT}"));
        set("ClearAllForwardings=yes".into());
        set("PermitLocalCommand=no".into());
        set("RequestTTY=no".into());
        // A RemoteCommand of the configuration would be refused beside a subsystem.
        set("RemoteCommand=none".into());
        if let Some(ciphers) = self.ciphers() {
            set(format!("Ciphers={ciphers}"));
        }
        argv
    }

    /// The ciphers with the cheapest first; `None` leaves them alone. They are only reordered where
    /// nobody else has an opinion: what ssh would use with all configuration (`ssh -G`) is what
    /// it would use with none.
    fn ciphers(&self) -> Option<String> {
        if !has_aes() {
            return None;
        }
        let configured = self.ciphers_with(&self.given())?;
        let built_in = self.ciphers_with(&["-F".into(), "none".into()])?;
        if configured != built_in {
            return None;
        }
        let others = built_in.split(',').filter(|name| *name != CHEAPEST);
        let ordered: Vec<&str> = std::iter::once(CHEAPEST).chain(others).collect();
        // As many as before, else this ssh does not have it.
        (ordered.len() == built_in.split(',').count()).then(|| ordered.join(","))
    }

    fn ciphers_with(&self, options: &[OsString]) -> Option<String> {
        let output = Command::new(self.program())
            .arg("-G")
            .args(options)
            .args(["--", &self.server.host])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let ciphers = text.lines().find_map(|line| line.strip_prefix("ciphers "));
        debug!(?ciphers, "asked ssh for its configuration");
        ciphers.map(String::from)
    }
}

/// ssh asks on the controlling terminal, wherever its input and output go. In the background it
/// would be stopped there until somebody noticed.
fn can_ask() -> bool {
    let ours = rustix::process::getpgrp();
    File::open("/dev/tty").is_ok_and(|tty| rustix::termios::tcgetpgrp(&tty) == Ok(ours))
}

fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

impl Dial for SshDial {
    fn dial(&self, occasion: Occasion) -> Result<Stream> {
        let server = self.server.clone();
        let explain = Box::new(move |ending: &Ending| explain(&server, ending));
        let started =
            command::start(&self.argv(occasion), explain).map_err(|error| match error.kind() {
                Kind::MissingTool => error.hint("install the package openssh-client"),
                _ => error,
            });
        started.attempt(|| format!("connect to {}", self.server))
    }

    fn patience(&self) -> Duration {
        match self.asks {
            true => PATIENCE_WITH_QUESTIONS,
            false => PATIENCE,
        }
    }
}

/// A way for ssh to fail: what it prints then, and what that means.
struct Failure {
    marks: &'static [&'static str],
    kind: Kind,
    text: &'static str,
    hint: &'static str,
}

/// In order: a changed host key also says that verification failed, and so on.
#[rustfmt::skip]
const FAILURES: &[Failure] = &[
    Failure {
        marks: &["REMOTE HOST IDENTIFICATION HAS CHANGED", "REVOKED HOST KEY DETECTED"],
        kind: Kind::Disconnected,
        text: "the server shows another host key than it did before",
        hint: "if the server was set up anew, remove its old key with `ssh-keygen -R HOST`; else somebody may be in between",
    },
    Failure {
        marks: &["Host key verification failed", "No matching host key fingerprint"],
        kind: Kind::Disconnected,
        text: "the host key of the server is not known",
        hint: "run `ssh HOST` once by hand, as the same user, and compare the fingerprint",
    },
    Failure {
        marks: &["Permission denied (", "Too many authentication failures", "No more authentication methods"],
        kind: Kind::Denied,
        text: "the server did not accept our login",
        hint: "try `ssh HOST` by hand, as the same user; a key with a passphrase needs ssh-agent or a terminal",
    },
    Failure {
        marks: &["subsystem request failed"],
        kind: Kind::Unsupported,
        text: "the server offers no SFTP",
        hint: "it needs a line `Subsystem sftp internal-sftp` in its sshd_config",
    },
    Failure {
        marks: &["Bad configuration option", "bad configuration option", "command-line line 0", "Bad owner or permissions"],
        kind: Kind::Usage,
        text: "ssh does not accept its configuration",
        hint: "`ssh -G HOST` shows what it makes of it",
    },
    Failure {
        marks: &["Could not resolve hostname"],
        kind: Kind::Disconnected,
        text: "the name of the server could not be resolved",
        hint: "check the host name and the network",
    },
    Failure {
        marks: &["Connection refused"],
        kind: Kind::Disconnected,
        text: "the server refused the connection",
        hint: "check that sshd runs there, and its port",
    },
    Failure {
        marks: &["No route to host", "Network is unreachable", "Host is down", "Connection timed out", "Operation timed out"],
        kind: Kind::Disconnected,
        text: "the server could not be reached",
        hint: "check the network",
    },
    Failure {
        marks: &["not responding"],
        kind: Kind::Disconnected,
        text: "the server stopped answering",
        hint: "check the network",
    },
];

/// Reads what ssh said when it ended.
fn explain(server: &Server, ending: &Ending) -> Error {
    let said = |mark: &&str| ending.words.iter().any(|line| line.contains(mark));
    let own = ending
        .status
        .is_none_or(|status| status.code() == Some(SSH_FAILED));
    let failure = FAILURES
        .iter()
        .find(|failure| own && failure.marks.iter().any(said));
    match failure {
        None => ending.error(Kind::Disconnected, "ssh"),
        Some(failure) => Error::new(failure.kind, failure.text)
            .hint(failure.hint.replace("HOST", &server.host))
            .because(ending.error(failure.kind, "ssh")),
    }
}
