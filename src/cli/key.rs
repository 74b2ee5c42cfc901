//! Where the key comes from: the first source that is given, else the terminal.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use clap::Args;

use crate::error::{Attempt, Error, Kind, Result};
use crate::host::Tool;
use crate::secret::Secret;
use crate::session::KeySource;
use crate::ui;
use crate::ui::tell;

/// As much as cryptsetup reads from a key file by default.
const KEY_MAX: u64 = 8 << 20;
/// As often as cryptsetup asks.
const TRIES_MAX: u32 = 3;

#[derive(Args, Clone)]
pub struct KeyArgs {
    /// Read the key from this file, every byte of it, as `cryptsetup --key-file` (`-`: standard input)
    #[arg(long, value_name = "FILE", help_heading = "Key")]
    key_file: Option<PathBuf>,

    /// Read the passphrase from this file; one newline at its end is dropped
    /// [env: E2EBAK_PASSPHRASE_FILE]
    #[arg(long, value_name = "FILE", help_heading = "Key")]
    passphrase_file: Option<PathBuf>,

    /// Read the passphrase from this file descriptor [env: E2EBAK_PASSPHRASE_FD]
    #[arg(long, value_name = "N", help_heading = "Key")]
    passphrase_fd: Option<u32>,

    /// Run this (no shell) and read the passphrase from its output [env: E2EBAK_PASSPHRASE_COMMAND]
    #[arg(long, value_name = "COMMAND", help_heading = "Key")]
    passphrase_command: Option<String>,
}

enum Source {
    KeyFile(PathBuf),
    File(PathBuf),
    Descriptor(u32),
    Command(String),
    Environment(OsString),
    Terminal,
    Nobody,
}

/// A chosen source, asked when a key is needed.
pub struct Keys {
    source: Source,
    asked: u32,
    image: String,
    signals: Arc<AtomicUsize>,
}

impl KeyArgs {
    /// Chooses the source. `image` is named in the question.
    pub fn keys(&self, image: &str, signals: Arc<AtomicUsize>) -> Result<Keys> {
        Ok(Keys {
            source: self.source()?,
            asked: 0,
            image: image.into(),
            signals,
        })
    }

    fn source(&self) -> Result<Source> {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        if let Some(file) = &self.key_file {
            return Ok(Source::KeyFile(file.clone()));
        }
        if let Some(file) = &self.passphrase_file {
            return Ok(Source::File(file.clone()));
        }
        if let Some(fd) = self.passphrase_fd {
            return Ok(Source::Descriptor(fd));
        }
        if let Some(command) = &self.passphrase_command {
            return Ok(Source::Command(command.clone()));
        }
        if let Some(file) = variable("E2EBAK_PASSPHRASE_FILE") {
            return Ok(Source::File(file.into()));
        }
        if let Some(fd) = variable("E2EBAK_PASSPHRASE_FD") {
            let number = fd.to_str().and_then(|text| text.parse().ok());
            let wrong = || {
                Error::new(
                    Kind::Usage,
                    format!("E2EBAK_PASSPHRASE_FD={} is no number", fd.display()),
                )
            };
            return Ok(Source::Descriptor(number.ok_or_else(wrong)?));
        }
        if let Some(command) = variable("E2EBAK_PASSPHRASE_COMMAND") {
            return Ok(Source::Command(command.to_string_lossy().into_owned()));
        }
        if let Some(passphrase) = variable("E2EBAK_PASSPHRASE") {
            return Ok(Source::Environment(passphrase));
        }
        Ok(if ui::has_terminal() {
            Source::Terminal
        } else {
            Source::Nobody
        })
    }
}

impl Keys {
    /// Whether a key comes without asking anybody.
    pub fn are_given(&self) -> bool {
        !matches!(self.source, Source::Terminal | Source::Nobody)
    }

    /// A key for a new image: typed twice where it is typed.
    pub fn new_key(&mut self) -> Result<Secret> {
        let key = self.next_key(None)?;
        if let Source::Terminal = self.source {
            let again = ui::ask_hidden("The same passphrase again: ", &self.signals)?;
            if !key.same_as(again.bytes()) {
                return Err(Error::new(
                    Kind::Usage,
                    "the two passphrases differ; nothing was created",
                ));
            }
        }
        if key.is_empty() {
            return Err(Error::new(
                Kind::Usage,
                "the passphrase is empty; nothing was created",
            ));
        }
        Ok(key)
    }
}

impl KeySource for Keys {
    fn next_key(&mut self, rejected: Option<&Error>) -> Result<Secret> {
        self.asked += 1;
        let typed = matches!(self.source, Source::Terminal);
        if let Some(error) = rejected {
            if !typed || self.asked > TRIES_MAX {
                return Err(Error::new(Kind::WrongKey, error.to_string()));
            }
            tell!("{error}");
        }
        match &self.source {
            Source::KeyFile(file) if file.as_os_str() == "-" => {
                read(std::io::stdin().lock()).attempt(|| "read the key from standard input")
            }
            Source::KeyFile(file) => {
                File::open(file).map_err(Error::from).and_then(read).attempt(|| format!("read the key file {}", file.display()))
            }
            Source::File(file) => File::open(file)
                .map_err(Error::from)
                .and_then(read)
                .map(stripped)
                .attempt(|| format!("read the passphrase file {}", file.display())),
            // Opening it anew needs no ownership of the number.
            Source::Descriptor(fd) => File::open(format!("/proc/self/fd/{fd}"))
                .map_err(Error::from)
                .and_then(read)
                .map(stripped)
                .attempt(|| format!("read the passphrase from file descriptor {fd}")),
            Source::Command(command) => from_command(command),
            Source::Environment(passphrase) => Ok(stripped(Secret::new(passphrase.clone().into_vec()))),
            Source::Terminal => ui::ask_hidden(&format!("Passphrase for {}: ", self.image), &self.signals),
            Source::Nobody => Err(Error::new(Kind::Usage, "no passphrase was given and there is no terminal to ask on")
                .hint("give --key-file, --passphrase-file, --passphrase-command or E2EBAK_PASSPHRASE_FILE")),
        }
    }
}

fn read(from: impl Read) -> Result<Secret> {
    Secret::read(from, KEY_MAX)
}

fn stripped(mut key: Secret) -> Secret {
    key.strip_newline();
    key
}

fn from_command(command: &str) -> Result<Secret> {
    let words = shell_words::split(command).unwrap_or_default();
    let Some((program, arguments)) = words.split_first() else {
        let why = format!("`{command}` is not a command: it is empty, or a quote is not closed");
        return Err(Error::new(Kind::Usage, why));
    };
    let output = Tool::new(program).args(arguments).secret_output();
    let key = output
        .attempt(|| format!("get the passphrase from `{program}`"))
        .map(stripped)?;
    match key.is_empty() {
        true => Err(Error::new(
            Kind::Usage,
            format!("the passphrase command `{program}` printed nothing"),
        )),
        false => Ok(key),
    }
}
