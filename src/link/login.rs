//! Logging in over the built-in SSH: agent, key files, password. What worked is remembered for
//! the next connection, which may ask nobody.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ssh2::{KeyboardInteractivePrompt, Prompt, Session};
use tracing::{debug, info};

use super::child::printable;
use super::terminal;
use crate::error::{Attempt, Error, Kind, Result};
use crate::secret::Secret;

/// The names of ssh's own default keys; hardware keys (`id_*_sk`) need the ssh program.
const DEFAULT_KEYS: [&str; 3] = ["id_ed25519", "id_ecdsa", "id_rsa"];

/// How often a passphrase or password is asked for, as ssh does.
const TRIES: usize = 3;

/// A key file is a few KiB long.
const KEY_MAX: u64 = 1 << 20;

/// How one user logs in.
pub struct Login {
    user: String,
    /// The user named it on the command line: tried first, and no default is.
    identity_file: Option<PathBuf>,
    home: Option<PathBuf>,
    learned: Mutex<Learned>,
}

/// What a person has answered.
#[derive(Default)]
struct Learned {
    passphrases: Vec<(PathBuf, Secret)>,
    password: Option<Secret>,
}

/// Whom a login may ask.
pub struct Asking<'a> {
    pub allowed: bool,
    /// Nobody waits for the answer any more.
    pub unwanted: &'a dyn Fn() -> bool,
}

impl Login {
    pub fn new(user: String, identity_file: Option<PathBuf>, home: Option<PathBuf>) -> Self {
        Login {
            user,
            identity_file,
            home,
            learned: Mutex::default(),
        }
    }

    /// Logs in. [`Kind::Denied`] when the server takes nothing that we have.
    pub fn run(&self, session: &Session, asking: &Asking<'_>) -> Result<()> {
        let methods = match session.auth_methods(&self.user) {
            Ok(methods) => methods.to_string(),
            Err(_) if session.authenticated() => return Ok(()), // it wants no proof at all
            Err(error) => return Err(lost(error)).attempt(|| "ask how to log in"),
        };
        let offers = |method: &str| methods.split(',').any(|offered| offered == method);
        debug!(methods, user = self.user, "log in");
        let mut tried = Vec::new();
        if offers("publickey") {
            if let Some(file) = &self.identity_file {
                tried.push(format!("the key {}", file.display()));
                self.by_key_file(session, file, asking)?;
            }
            if !session.authenticated() {
                tried.extend(self.by_agent(session));
            }
            let defaults = match (&self.identity_file, &self.home) {
                (None, Some(home)) => DEFAULT_KEYS.map(|n| home.join(".ssh").join(n)).to_vec(),
                _ => Vec::new(),
            };
            for file in defaults.iter().filter(|file| file.exists()) {
                if !session.authenticated() {
                    tried.push(format!("the key {}", file.display()));
                    self.by_key_file(session, file, asking)?;
                }
            }
        }
        for method in ["password", "keyboard-interactive"] {
            if offers(method) && !session.authenticated() && self.may_know_password(asking) {
                tried.push("a password".into());
                self.by_password(session, method, asking)?;
            }
        }
        if session.authenticated() {
            return Ok(());
        }
        let tried = match tried.is_empty() {
            true => "nothing was there to be tried".to_string(),
            false => format!("tried: {}", tried.join(", ")),
        };
        Err(Error::new(Kind::Denied, "the server did not accept our login")
            .hint("a key with a passphrase needs ssh-agent or a terminal; ~/.ssh/config, jump hosts and hardware keys need the ssh program: leave out `--ssh built-in`")
            .because(format!("it offers {methods} to {}; {tried}", self.user)))
    }

    /// Tries each key of the agent, and says what was tried.
    fn by_agent(&self, session: &Session) -> Option<String> {
        std::env::var_os("SSH_AUTH_SOCK")?;
        let identities = (|| {
            let mut agent = session.agent()?;
            agent.connect()?;
            agent.list_identities()?;
            let identities = agent.identities()?;
            Ok::<_, ssh2::Error>((agent, identities))
        })();
        let (agent, identities) = match identities {
            Ok(found) => found,
            Err(error) => {
                info!(%error, "no use of the ssh agent");
                return None;
            }
        };
        for identity in &identities {
            match agent.userauth(&self.user, identity) {
                Ok(()) => break,
                Err(error) => debug!(%error, comment = identity.comment(), "a key of the agent"),
            }
        }
        Some(format!("{} keys of the agent", identities.len()))
    }

    /// Tries a key file. A key that the server does not take, or whose passphrase nobody can be
    /// asked for, is no error: something else may do.
    fn by_key_file(&self, session: &Session, file: &Path, asking: &Asking<'_>) -> Result<()> {
        let shown = file.display();
        let key = fs::File::open(file)
            .map_err(Error::from)
            .and_then(|open| Secret::read(open.take(KEY_MAX + 1), KEY_MAX))
            .attempt(|| format!("read the key {shown}"))?;
        let text = std::str::from_utf8(key.bytes())
            .map_err(|_| Error::new(Kind::Usage, format!("{shown} is not a private key")))?;
        let attempt = |passphrase: Option<&str>| {
            session.userauth_pubkey_memory(&self.user, None, text, passphrase)
        };
        if !is_encrypted(text) {
            return note(session, attempt(None), &format!("{shown}"));
        }
        let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = learned.passphrases.iter().find(|(of, _)| of == file) {
            return note(session, attempt(Some(text_of(known)?)), &format!("{shown}"));
        }
        for _ in 0..TRIES {
            if !asking.allowed {
                return Ok(());
            }
            let question = format!("Passphrase of {shown}: ");
            let passphrase = terminal::ask(&question, false, asking.unwanted)?;
            if passphrase.is_empty() {
                return Ok(());
            }
            note(
                session,
                attempt(Some(text_of(&passphrase)?)),
                &format!("{shown}"),
            )?;
            if session.authenticated() {
                learned.passphrases.push((file.into(), passphrase));
                return Ok(());
            }
        }
        Ok(())
    }

    fn may_know_password(&self, asking: &Asking<'_>) -> bool {
        let learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        asking.allowed || learned.password.is_some()
    }

    fn by_password(&self, session: &Session, method: &str, asking: &Asking<'_>) -> Result<()> {
        let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        if method == "keyboard-interactive" {
            let mut answers = Answers {
                asking,
                known: learned.password.take(),
            };
            let done = session.userauth_keyboard_interactive(&self.user, &mut answers);
            note(session, done, method)?;
            learned.password = answers.known.filter(|_| session.authenticated());
            return Ok(());
        }
        if let Some(known) = &learned.password {
            let done = session.userauth_password(&self.user, text_of(known)?);
            return note(session, done, method);
        }
        for _ in 0..TRIES {
            let question = format!("Password of {}: ", self.user);
            let password = terminal::ask(&question, false, asking.unwanted)?;
            note(
                session,
                session.userauth_password(&self.user, text_of(&password)?),
                method,
            )?;
            if session.authenticated() {
                learned.password = Some(password);
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Questions of the server. The answer to a single hidden one is taken for the password.
struct Answers<'a> {
    asking: &'a Asking<'a>,
    known: Option<Secret>,
}

impl KeyboardInteractivePrompt for Answers<'_> {
    fn prompt(&mut self, _: &str, instructions: &str, prompts: &[Prompt<'_>]) -> Vec<String> {
        // The crate takes plain strings; it drops them at once.
        let answer = |secret: &Secret| String::from_utf8_lossy(secret.bytes()).into_owned();
        let hidden = prompts.len() == 1 && !prompts[0].echo;
        if let Some(known) = &self.known
            && hidden
        {
            return vec![answer(known)];
        }
        let instructions = printable(instructions.as_bytes());
        let mut answers = Vec::new();
        for prompt in prompts {
            let question = format!("{instructions} {} ", printable(prompt.text.as_bytes()));
            let secret = match self.asking.allowed {
                true => {
                    terminal::ask(question.trim_start(), prompt.echo, self.asking.unwanted).ok()
                }
                false => None,
            };
            let secret = secret.unwrap_or_else(|| Secret::new(Vec::new()));
            answers.push(answer(&secret));
            if hidden {
                self.known = Some(secret);
            }
        }
        answers
    }
}

fn text_of(secret: &Secret) -> Result<&str> {
    std::str::from_utf8(secret.bytes())
        .map_err(|_| Error::new(Kind::Usage, "a passphrase for the login must be UTF-8"))
}

/// A refusal is noted; the end of the connection is an error.
fn note(session: &Session, done: Result<(), ssh2::Error>, what: &str) -> Result<()> {
    let Err(error) = done else { return Ok(()) };
    debug!(%error, what, "not accepted");
    match super::pump::is_fatal(&error) && !session.authenticated() {
        true => Err(lost(error)).attempt(|| format!("log in by {what}")),
        false => Ok(()),
    }
}

fn lost(error: ssh2::Error) -> Error {
    Error::new(Kind::Disconnected, error.message().to_string())
}

/// Whether a private key has a passphrase: PEM says so in words, OpenSSH's own format in the name
/// of the cipher behind its magic (`PROTOCOL.key` of OpenSSH).
fn is_encrypted(text: &str) -> bool {
    const MAGIC: &[u8] = b"openssh-key-v1\0\0\0\0\x04none";
    if text.contains("ENCRYPTED") {
        return true;
    }
    let Some((_, body)) = text.split_once("-----BEGIN OPENSSH PRIVATE KEY-----") else {
        return false;
    };
    let body = body.split("-----").next().unwrap_or_default();
    let start: String = body
        .split_ascii_whitespace()
        .collect::<String>()
        .chars()
        .take(64)
        .collect();
    STANDARD
        .decode(start)
        .is_ok_and(|bytes| !bytes.starts_with(MAGIC))
}
