//! Places for an image to be in, each with real parts, gone when dropped.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use e2ebak::link::built_in::{BuiltInDial, BuiltInOptions};
use e2ebak::link::command::CommandDial;
use e2ebak::link::ssh::{SshDial, SshOptions};
use e2ebak::link::{Dial, Occasion};
use e2ebak::location::{RemotePath, Server};
use e2ebak::remote::Store;
use e2ebak::remote::engine::{Bounds, Engine};
use e2ebak::remote::local::LocalStore;
use e2ebak::remote::sftp_store::SftpStore;
use tempfile::TempDir;

/// The path of a program, or why this test skips; where everything must be tested it fails.
pub fn need(name: &str, places: &[&str]) -> Option<PathBuf> {
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&on_path).map(|dir| dir.join(name));
    let found = dirs
        .chain(places.iter().map(PathBuf::from))
        .find(|path| path.is_file());
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

pub fn skip(why: &str) {
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "this test may not skip here: {why}"
    );
    eprintln!("skipped: {why}");
}

pub fn sftp_server() -> Option<PathBuf> {
    need(
        "sftp-server",
        &[
            "/usr/lib/openssh/sftp-server",
            "/usr/libexec/openssh/sftp-server",
            "/usr/lib/ssh/sftp-server",
            "/usr/libexec/sftp-server",
        ],
    )
}

/// A session that breaks is not replaced: what it fails with is seen.
pub fn unforgiving() -> Bounds {
    Bounds {
        io_deadline: Duration::ZERO,
        ..Bounds::default()
    }
}

/// A directory on some server, with an image at `a.img`.
pub struct Rig {
    pub dir: TempDir,
    pub dial: Option<Arc<dyn Dial>>,
    _sshd: Option<Sshd>,
}

impl Rig {
    pub fn local() -> Option<Self> {
        Some(Rig {
            dir: tempfile::tempdir().expect("a directory"),
            dial: None,
            _sshd: None,
        })
    }

    /// sftp-server as a child of ours, with more options.
    pub fn pipes_with(options: &[&str]) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let dial = server_dial(&sftp_server()?, dir.path(), options);
        Some(Rig {
            dir,
            dial: Some(Arc::new(dial)),
            _sshd: None,
        })
    }

    pub fn pipes() -> Option<Self> {
        Rig::pipes_with(&[])
    }

    /// A server that has none of OpenSSH's extensions but limits.
    pub fn plain() -> Option<Self> {
        Rig::pipes_with(&["-P", "posix-rename,statvfs,hardlink,fsync,copy-data"])
    }

    /// ssh to a sshd on the loopback interface.
    pub fn sshd() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let sshd = Sshd::start()?;
        Some(Rig {
            dial: Some(Arc::new(sshd.dial())),
            dir,
            _sshd: Some(sshd),
        })
    }

    /// The built-in SSH to a sshd on the loopback interface.
    pub fn built_in() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let sshd = Sshd::start()?;
        Some(Rig {
            dial: Some(Arc::new(sshd.built_in_dial())),
            dir,
            _sshd: Some(sshd),
        })
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("a.img")
    }

    pub fn store(&self) -> Arc<dyn Store> {
        self.store_with(Bounds::default())
    }

    pub fn store_with(&self, bounds: Bounds) -> Arc<dyn Store> {
        match &self.dial {
            None => Arc::new(LocalStore::new(self.image())),
            Some(dial) => Arc::new(
                SftpStore::connect(dial.clone(), &self.remote_path(), "nas:a.img", bounds)
                    .unwrap_or_else(|e| panic!("{}", e.report())),
            ),
        }
    }

    pub fn remote_path(&self) -> RemotePath {
        let path = self.image();
        RemotePath::new(path.to_str().expect("text")).expect("a path")
    }
}

pub fn server_dial(server: &Path, dir: &Path, options: &[&str]) -> CommandDial {
    let mut argv = vec![server.as_os_str().to_owned(), "-e".into(), "-d".into()];
    argv.push(dir.into());
    argv.extend(options.iter().map(Into::into));
    CommandDial::new(argv).expect("a command")
}

pub fn engine(dial: &dyn Dial) -> Engine {
    let stream = dial.dial(Occasion::First).expect("starts");
    Engine::start(stream, Bounds::default()).unwrap_or_else(|e| panic!("{}", e.report()))
}

/// A sshd of our own: its own keys, configuration, port and known hosts.
pub struct Sshd {
    pub dir: TempDir,
    pub port: u16,
    child: Child,
}

impl Sshd {
    pub fn start() -> Option<Self> {
        let server = sftp_server()?;
        Sshd::start_with(&format!("Subsystem sftp {}", server.display()))
    }

    /// With one more line of configuration.
    pub fn with(line: &str) -> Option<Self> {
        let server = sftp_server()?;
        Sshd::start_with(&format!("Subsystem sftp {}\n{line}", server.display()))
    }

    /// With these lines of configuration about SFTP.
    pub fn start_with(sftp: &str) -> Option<Self> {
        Sshd::start_as(sftp, None)
    }

    /// That takes passwords, and only those, by this shadow file.
    pub fn start_over(shadow: &str) -> Option<Self> {
        let server = sftp_server()?;
        let sftp = format!("Subsystem sftp {}", server.display());
        Sshd::start_as(&sftp, Some(shadow))
    }

    fn start_as(sftp: &str, shadow: Option<&str>) -> Option<Self> {
        let sshd = need("sshd", &["/usr/sbin/sshd"])?;
        need("ssh", &[])?;
        let keygen = need("ssh-keygen", &[])?;
        if rustix::process::geteuid().is_root() {
            // sshd wants it when root starts it.
            fs::create_dir_all("/run/sshd").expect("made");
        }
        let dir = tempfile::tempdir().expect("a directory");
        for key in ["host", "user"] {
            let made = Command::new(&keygen)
                .args(["-q", "-t", "ed25519", "-N", "", "-C", key, "-f"])
                .arg(dir.path().join(key))
                .status();
            assert!(made.expect("runs").success());
        }
        let at = |name: &str| dir.path().join(name).display().to_string();
        fs::copy(at("user.pub"), at("authorized_keys")).expect("copied");
        fs::set_permissions(at("authorized_keys"), fs::Permissions::from_mode(0o600)).expect("set");
        // Another process may take the port between our looking and sshd's binding.
        for _ in 0..5 {
            let port = free_port();
            let config = format!(
                "ListenAddress 127.0.0.1\nPort {port}\nHostKey {}\nAuthorizedKeysFile {}\n\
                 PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication {}\n\
                 KbdInteractiveAuthentication no\nPermitRootLogin yes\nMaxStartups 100\n\
                 SetEnv HOME={}\n{sftp}\n",
                at("host"),
                at("authorized_keys"),
                if shadow.is_some() { "yes" } else { "no" },
                dir.path().display(), // a shell's start files in the real home may be slow
            );
            fs::write(at("sshd_config"), config).expect("written");
            let host_key = fs::read_to_string(at("host.pub")).expect("read");
            fs::write(at("known_hosts"), format!("[127.0.0.1]:{port} {host_key}"))
                .expect("written");
            let mut command = Command::new(&sshd);
            if let Some(shadow) = shadow {
                fs::write(at("shadow"), shadow).expect("written");
                let script = "mount --bind \"$0\" /etc/shadow && exec \"$@\"";
                command = Command::new("unshare");
                command
                    .args(["-m", "sh", "-c", script, &at("shadow")])
                    .arg(&sshd);
            }
            let mut child = command
                .args(["-D", "-f", &at("sshd_config"), "-E", &at("log")])
                .stdin(Stdio::null())
                .spawn()
                .expect("runs");
            let until = Instant::now() + Duration::from_secs(10);
            while child.try_wait().expect("a child").is_none() && Instant::now() < until {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    return Some(Sshd { dir, port, child });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("{}", fs::read_to_string(at("log")).unwrap_or_default());
    }

    pub fn server(&self) -> Server {
        Server {
            user: None,
            host: "127.0.0.1".into(),
            port: Some(self.port),
        }
    }

    pub fn options(&self) -> SshOptions {
        let config = format!(
            "UserKnownHostsFile {}\nGlobalKnownHostsFile none\nStrictHostKeyChecking yes\n\
             IdentitiesOnly yes\nIdentityAgent none\n",
            self.dir.path().join("known_hosts").display()
        );
        let file = self.dir.path().join("ssh_config");
        fs::write(&file, config).expect("written");
        SshOptions {
            config_file: Some(file),
            identity_file: Some(self.dir.path().join("user")),
            batch: true,
            ..SshOptions::default()
        }
    }

    pub fn dial(&self) -> SshDial {
        SshDial::new(self.server(), self.options())
    }

    pub fn built_in_options(&self) -> BuiltInOptions {
        BuiltInOptions {
            identity_file: Some(self.dir.path().join("user")),
            known_hosts: Some(vec![self.dir.path().join("known_hosts")]),
            batch: true,
        }
    }

    pub fn built_in_dial(&self) -> BuiltInDial {
        BuiltInDial::new(self.server(), self.built_in_options()).expect("a dial")
    }

    /// How often somebody has logged in.
    pub fn logins(&self) -> usize {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        log.matches("Accepted ").count()
    }
}

impl Sshd {
    /// The processes that serve its connections.
    pub fn sessions(&self) -> Vec<i32> {
        let mut found = vec![self.child.id() as i32];
        let mut seen = 0;
        while seen < found.len() {
            let parent = found[seen];
            seen += 1;
            let tasks = format!("/proc/{parent}/task/{parent}/children");
            let children = fs::read_to_string(tasks).unwrap_or_default();
            found.extend(
                children
                    .split_whitespace()
                    .filter_map(|p| p.parse::<i32>().ok()),
            );
        }
        found.split_off(1)
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    listener.local_addr().expect("bound").port()
}

/// Bytes that differ from place to place.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
