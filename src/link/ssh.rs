//! The system's `ssh`: it honours the user's configuration, agent, jump hosts, hardware keys and
//! known hosts.
//!
//! All streams of a dial share one connection where that works (`link::master`): one login, and
//! nobody is asked again. Where it does not, each stream is a connection of its own. In between
//! stands ssh itself: one whose master refuses another channel, or has just ended, connects
//! directly, and may then ask nobody.
//!
//! ssh takes the first value that it finds for an option, so the order on its command line is:
//! what the user gave, then ours, and its configuration files come last.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tracing::{debug, info};

use super::child::{Ending, Gate, Group};
use super::command;
use super::master::{Master, Start};
use super::ssh_words::{explain, explain_shared};
use super::terminal::can_ask;
use super::{
    ALIVE_COUNT, ALIVE_INTERVAL_SECONDS, CONNECT_TIMEOUT_SECONDS, Dial, Occasion, PATIENCE,
    PATIENCE_WITH_QUESTIONS, Stream,
};
use crate::error::{Attempt, Kind, Result};
use crate::host::spawn::hide_settings;
use crate::location::Server;

/// The cheapest cipher where the processor has AES: 2.2 s per GiB instead of 3.7 s.
const CHEAPEST: &str = "aes128-gcm@openssh.com";

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
#[derive(Clone)]
pub struct SshDial {
    shared: Arc<Shared>,
}

struct Shared {
    server: Server,
    options: SshOptions,
    asks: bool,
    configuration: OnceLock<Configuration>,
    master: Mutex<Slot>,
}

/// What ssh makes of all configuration.
#[derive(Clone, Debug, Default)]
struct Configuration {
    /// The ciphers to ask for.
    ciphers: Option<String>,
    /// The user's files name a socket for masters.
    control_path: bool,
}

#[derive(Default)]
struct Slot {
    master: Option<Arc<Master>>,
    /// A master was tried and this ssh cannot be one.
    unable: bool,
}

impl SshDial {
    pub fn new(server: Server, options: SshOptions) -> Self {
        let asks = !options.batch && can_ask();
        SshDial {
            shared: Arc::new(Shared {
                server,
                options,
                asks,
                configuration: OnceLock::new(),
                master: Mutex::default(),
            }),
        }
    }

    /// The command line of a stream with a connection of its own.
    pub fn argv(&self, occasion: Occasion) -> Vec<OsString> {
        self.shared.own_argv(occasion)
    }

    /// Runs a command on the server, by the login shell there. It never asks anybody; where only
    /// SFTP is allowed, something else than the command may answer, or nothing.
    pub fn exec(&self, command: &str) -> Result<Stream> {
        let mut argv = self.shared.common_argv(false);
        argv.extend(["-o", "ControlMaster=no", "--"].map(OsString::from));
        argv.push(self.shared.server.host.clone().into());
        argv.push(command.into());
        let explain = |ending: &Ending| ending.error(Kind::Unsupported, "ssh");
        command::start(&argv, Box::new(explain))
    }
}

impl Shared {
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

    /// What masters and streams have in common.
    fn common_argv(&self, asks: bool) -> Vec<OsString> {
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
        if let Some(ciphers) = &self.configuration().ciphers {
            set(format!("Ciphers={ciphers}"));
        }
        argv
    }

    /// A stream: through the master at `socket`, or by a connection of its own.
    fn stream_argv(&self, asks: bool, socket: Option<&Path>) -> Vec<OsString> {
        let mut argv = self.common_argv(asks);
        // Never the master of others: they would end with it.
        argv.extend(["-o", "ControlMaster=no"].map(OsString::from));
        if let Some(socket) = socket {
            argv.extend(["-S".into(), socket.into()]);
        }
        argv.extend(["-s", "--"].map(OsString::from));
        argv.push(self.server.host.clone().into());
        argv.push("sftp".into());
        argv
    }

    fn own_argv(&self, occasion: Occasion) -> Vec<OsString> {
        self.stream_argv(self.asks_at(occasion), None)
    }

    fn master_argv(&self, asks: bool, socket: &Path) -> Vec<OsString> {
        let mut argv = self.common_argv(asks);
        let settings = ["-o", "ControlMaster=yes", "-o", "ControlPersist=no", "-S"];
        argv.extend(settings.map(OsString::from));
        argv.extend([socket.into(), "-N".into(), "--".into()]);
        argv.push(self.server.host.clone().into());
        argv
    }

    fn asks_at(&self, occasion: Occasion) -> bool {
        self.asks && occasion == Occasion::First
    }

    fn patience(&self, asks: bool) -> Duration {
        match asks {
            true => PATIENCE_WITH_QUESTIONS,
            false => PATIENCE,
        }
    }

    /// The connection that a stream shall go through, made if need be; `None` when it needs one of
    /// its own.
    fn master(&self, occasion: Occasion) -> Result<Option<Arc<Master>>> {
        let mut slot = self.master.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.unable || self.has_an_opinion() {
            return Ok(None);
        }
        if let Some(master) = &slot.master {
            if master.is_of_use() {
                return Ok(Some(master.clone()));
            }
            info!("the ssh connection has ended, connecting again");
            slot.master = None;
        }
        if self.configuration().control_path && self.has_a_master() {
            return Ok(None); // ssh goes through that one by itself
        }
        let asks = self.asks_at(occasion);
        match Master::start(self.patience(asks), |socket| self.master_argv(asks, socket)) {
            Ok(master) => slot.master = Some(Arc::new(master)),
            Err(error) if error.kind() == Kind::MissingTool => return Err(error),
            Err(error) => {
                info!("no shared ssh connection: {}", error.chain().join(": "));
                slot.unable = true;
            }
        }
        Ok(slot.master.clone())
    }

    fn cannot_share(&self) {
        info!("this ssh does not share connections; each stream makes its own");
        let mut slot = self.master.lock().unwrap_or_else(PoisonError::into_inner);
        slot.unable = true;
        slot.master = None;
    }

    /// Whether the user said on our command line how ssh shall share connections.
    fn has_an_opinion(&self) -> bool {
        let options = self.options.options.iter();
        let mut names = options.map(|option| option.trim_start().to_ascii_lowercase());
        names.any(|name| name.starts_with("control"))
    }

    /// Whether a master of the user's own configuration is up.
    fn has_a_master(&self) -> bool {
        let mut command = self.quiet_ssh(&self.given());
        let status = command.args(["-O", "check", "--", &self.server.host]);
        let up = status.stdout(Stdio::null()).status();
        up.is_ok_and(|status| status.success())
    }

    fn quiet_ssh(&self, options: &[OsString]) -> Command {
        let mut command = Command::new(self.program());
        command.args(options);
        hide_settings(&mut command);
        command.stdin(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn configuration(&self) -> &Configuration {
        self.configuration.get_or_init(|| {
            let told = self.settings_with(&self.given());
            let setting = |name| value(&told, name).filter(|value| *value != "none");
            Configuration {
                ciphers: self.ciphers(setting("ciphers")),
                control_path: setting("controlpath").is_some(),
            }
        })
    }

    /// The ciphers with the cheapest first; `None` leaves them alone. They are only reordered where
    /// nobody else has an opinion: what ssh would use with all configuration (`ssh -G`) is what
    /// it would use with none.
    fn ciphers(&self, configured: Option<&str>) -> Option<String> {
        if !has_aes() {
            return None;
        }
        let built_in = self.settings_with(&["-F".into(), "none".into()]);
        let built_in = value(&built_in, "ciphers")?;
        if configured? != built_in {
            return None;
        }
        let others = built_in.split(',').filter(|name| *name != CHEAPEST);
        let ordered: Vec<&str> = std::iter::once(CHEAPEST).chain(others).collect();
        // As many as before, else this ssh does not have it.
        (ordered.len() == built_in.split(',').count()).then(|| ordered.join(","))
    }

    /// What ssh says of its settings; nothing when it cannot be asked.
    fn settings_with(&self, options: &[OsString]) -> String {
        let mut command = self.quiet_ssh(options);
        let output = command.args(["-G", "--", &self.server.host]).output();
        let settings = output.map(|output| String::from_utf8(output.stdout).unwrap_or_default());
        debug!(?options, "asked ssh for its configuration");
        settings.unwrap_or_default()
    }
}

/// The value of a setting that `ssh -G` tells.
fn value<'a>(settings: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = settings.lines();
    lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
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
        let stream = match self.shared.master(occasion) {
            Ok(None) => self.own_stream(occasion),
            Ok(Some(master)) => self.shared_stream(occasion, master),
            Err(error) => Err(error),
        };
        let stream = stream.map_err(|error| match error.kind() {
            Kind::MissingTool => error.hint("install the package openssh-client"),
            _ => error,
        });
        stream.attempt(|| format!("connect to {}", self.shared.server))
    }

    fn patience(&self) -> Duration {
        self.shared.patience(self.shared.asks)
    }
}

impl SshDial {
    fn own_stream(&self, occasion: Occasion) -> Result<Stream> {
        let server = self.shared.server.clone();
        let explain = move |ending: &Ending| explain(&server, ending);
        command::start(&self.shared.own_argv(occasion), Box::new(explain))
    }

    /// A stream that starts when its master has logged in.
    fn shared_stream(&self, occasion: Occasion, master: Arc<Master>) -> Result<Stream> {
        let why = {
            let (server, master) = (self.shared.server.clone(), master.clone());
            // When its master has ended, that is why.
            move |ending: &Ending| match master.ending() {
                Some(why) => explain(&server, &why),
                None => explain_shared(&server, ending),
            }
        };
        let shared = self.shared.clone();
        let argv = move |gate: &Gate<'_>| match master.wait(gate)? {
            // Through a master, ssh ends at signals that it was told to ignore (mux.c).
            Start::Ready => Ok((
                shared.stream_argv(false, Some(&master.socket())),
                Group::Own,
            )),
            Start::Failed(ending) => Err(explain(&shared.server, &ending)),
            Start::Unable => {
                master.end();
                shared.cannot_share();
                Ok((shared.own_argv(occasion), Group::Ours))
            }
        };
        command::start_when(argv, Box::new(why))
    }
}
