//! The real `cryptsetup`, on image files in a temporary directory. Without device-mapper it still
//! formats, dumps, adds keys and tests passphrases.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use e2ebak::error::Result;
use e2ebak::luks::{self, Loaded};
use e2ebak::secret::Secret;
use serde_json::Value;
use tempfile::TempDir;

/// Cheap key derivation: a test is not an attacker.
pub const CHEAP_ARGON2: [&str; 4] = ["--pbkdf-force-iterations", "4", "--pbkdf-memory", "32768"];
pub const CHEAP_PBKDF2: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

/// Whether cryptsetup is there. Without it a test skips, but never in continuous integration.
pub fn present() -> bool {
    let found = Command::new("cryptsetup").arg("--version").output().is_ok();
    assert!(
        found || std::env::var("CI").as_deref() != Ok("true"),
        "cryptsetup is not installed"
    );
    if !found {
        eprintln!("skipped: cryptsetup is not installed");
    }
    found
}

/// An image file, its directory, and what cryptsetup does with it.
pub struct Image {
    dir: TempDir,
    pub path: PathBuf,
}

impl Image {
    /// A sparse file of zeros.
    pub fn blank(size: u64) -> Image {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("image");
        let file = File::create(&path).expect("a file in it");
        file.set_len(size).expect("a sparse file");
        Image { dir, path }
    }

    pub fn of_bytes(bytes: &[u8]) -> Image {
        let image = Image::blank(bytes.len() as u64);
        for (number, page) in bytes.chunks(4096).enumerate() {
            if *page != [0; 4096][..page.len()] {
                image.write(number as u64 * 4096, page);
            }
        }
        image
    }

    /// Runs `cryptsetup ARGS IMAGE MORE`.
    pub fn try_run(&self, args: &[&str], more: &[&str]) -> Output {
        Command::new("cryptsetup")
            .args(args)
            .arg(&self.path)
            .args(more)
            .arg("--batch-mode")
            .stdin(Stdio::null())
            .output()
            .expect("cryptsetup starts")
    }

    pub fn run(&self, args: &[&str], more: &[&str]) -> Vec<u8> {
        let output = self.try_run(args, more);
        assert!(
            output.status.success(),
            "cryptsetup {args:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    }

    /// A file beside the image with exactly these bytes.
    pub fn key_file(&self, key: &[u8]) -> String {
        let mut file = tempfile::Builder::new()
            .tempfile_in(self.dir.path())
            .expect("a key file");
        file.write_all(key).expect("written");
        let (_, path) = file.keep().expect("kept until the directory goes");
        path.to_str().expect("a plain path").to_string()
    }

    pub fn format(&self, passphrase: &[u8], args: &[&str]) {
        let key = self.key_file(passphrase);
        let args: Vec<&str> = [&["luksFormat", "--key-file", &key], args].concat();
        self.run(&args, &[]);
    }

    pub fn add_key(&self, passphrase: &[u8], new: &[u8], args: &[&str]) {
        let (key, new) = (self.key_file(passphrase), self.key_file(new));
        let args: Vec<&str> = [&["luksAddKey", "--key-file", &key], args].concat();
        self.run(&args, &[&new]);
    }

    pub fn opens_with(&self, passphrase: &[u8]) -> bool {
        let key = self.key_file(passphrase);
        self.try_run(&["open", "--test-passphrase", "--key-file", &key], &[])
            .status
            .success()
    }

    pub fn metadata(&self) -> Value {
        let text = self.run(&["luksDump", "--dump-json-metadata"], &[]);
        serde_json::from_slice(&text).expect("JSON")
    }

    pub fn volume_key(&self, passphrase: &[u8]) -> Vec<u8> {
        let key = self.key_file(passphrase);
        let out = self.dir.path().join("volume-key");
        let out = out.to_str().expect("a plain path");
        let dump = ["luksDump", "--dump-volume-key", "--key-file", &key];
        self.run(&[&dump[..], &["--volume-key-file", out]].concat(), &[]);
        let found = std::fs::read(out).expect("dumped");
        std::fs::remove_file(out).expect("there");
        found
    }

    /// What comes after `name:` in `luksDump`.
    pub fn dumped(&self, name: &str) -> String {
        let text = String::from_utf8(self.run(&["luksDump"], &[])).expect("text");
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .expect("dumped")
            .1
            .trim()
            .to_string()
    }

    fn file(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(&self.path)
            .expect("opens")
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        self.file().write_all_at(bytes, offset).expect("writes");
    }

    /// Reads from the file as the program would from its device.
    pub fn reader(&self) -> impl FnMut(u64, &mut [u8]) -> Result<()> + use<> {
        let file = self.file();
        move |offset, out| Ok(file.read_exact_at(out, offset)?)
    }

    pub fn load(&self) -> Result<Loaded> {
        let size = self.path.metadata().expect("there").len();
        luks::load(&mut self.reader(), size)
    }

    pub fn unlock(&self, passphrase: &[u8]) -> Result<(usize, Secret)> {
        let passphrase = Secret::new(passphrase.to_vec());
        self.load()?.header.unlock(&passphrase, &mut self.reader())
    }

    pub fn directory(&self) -> &Path {
        self.dir.path()
    }
}
