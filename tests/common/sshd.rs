//! A real OpenSSH server on a free port of the loopback interface, with keys of its own.

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::sandbox::{kill, with_descendants};
use super::{Sandbox, run, tool};

/// The server; it stores images in the sandbox's `store`.
pub struct Sshd {
    dir: PathBuf,
    store: PathBuf,
    child: Option<Child>,
    port: u16,
    extra: Vec<String>,
}

impl Sshd {
    pub fn start(sandbox: &Sandbox) -> Self {
        Sshd::with(sandbox, &[])
    }

    /// With more lines in its configuration.
    pub fn with(sandbox: &Sandbox, extra: &[&str]) -> Self {
        let dir = sandbox.dir("sshd");
        let mut sshd = Sshd {
            store: sandbox.dir("store"),
            child: None,
            port: 0,
            extra: extra.iter().map(|line| (*line).to_string()).collect(),
            dir,
        };
        sshd.make_key("host_key");
        sshd.make_key("user_key");
        fs::copy(sshd.file("user_key.pub"), sshd.file("authorized_keys")).expect("a key");
        // Where sshd as root locks its unprivileged half in.
        let _ = fs::create_dir_all("/run/sshd");
        sshd.listen();
        sshd.write_known_hosts();
        sshd
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn make_key(&self, name: &str) {
        let mut command = tool("ssh-keygen");
        command.args(["-q", "-t", "ed25519", "-N", "", "-f"]);
        run(command.arg(self.file(name)));
    }

    fn listen(&mut self) {
        // Between finding a free port and sshd's bind somebody may take it: try a few.
        for _ in 0..5 {
            if self.port == 0 {
                let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
                self.port = free.local_addr().expect("an address").port();
            }
            self.write_config();
            if self.try_listen() {
                return;
            }
            self.port = 0;
        }
        let log = fs::read_to_string(self.file("log")).unwrap_or_default();
        panic!("sshd does not start:\n{log}");
    }

    fn try_listen(&mut self) -> bool {
        let log = fs::File::create(self.file("log")).expect("a log");
        // Dies with the test, also when the test is killed.
        let mut command = tool("setpriv");
        command.args(["--pdeathsig", "KILL", "/usr/sbin/sshd", "-D", "-e", "-f"]);
        command.arg(self.file("sshd_config"));
        let child = command.stdout(Stdio::null()).stderr(log).spawn();
        self.child = Some(child.expect("setpriv"));
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if greets(self.port) {
                return true;
            }
            let child = self.child.as_mut().expect("just started");
            if child.try_wait().expect("a child").is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.stop();
        false
    }

    fn write_config(&self) {
        let dir = self.dir.display();
        let port = self.port;
        // A login shell reads files of its home, and those of whoever runs the tests may be slow.
        let mut config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {dir}/host_key\nPidFile none\n\
             AuthorizedKeysFile {dir}/authorized_keys\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nPermitRootLogin prohibit-password\n\
             MaxStartups 100\nSubsystem sftp /usr/lib/openssh/sftp-server\n"
        );
        // bash as a login shell reads ~/.bashrc for an sshd, unless it is not the first shell. What is
        // in there is not for tests to wait for, or to kill half way. The first SetEnv counts alone.
        let (environment, extra): (Vec<&String>, Vec<_>) = self
            .extra
            .iter()
            .partition(|line| line.starts_with("SetEnv"));
        config.push_str(&format!("SetEnv HOME={dir} SHLVL=1"));
        for line in environment {
            config.push_str(line.trim_start_matches("SetEnv"));
        }
        for line in extra {
            config.push('\n');
            config.push_str(line);
        }
        config.push('\n');
        fs::write(self.file("sshd_config"), config).expect("a configuration");
    }

    fn write_known_hosts(&self) {
        let public = fs::read_to_string(self.file("host_key.pub")).expect("the host key");
        let line = format!("[127.0.0.1]:{} {public}", self.port);
        fs::write(self.file("known_hosts"), line).expect("known hosts");
    }

    /// Ends the server and all its sessions, as pulling the plug would.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            for pid in with_descendants(child.id()) {
                kill(pid, Signal::KILL);
            }
            let _ = child.wait();
        }
    }

    /// Ends all sessions; the server goes on listening.
    pub fn cut_sessions(&self) {
        self.signal_sessions(Signal::KILL);
    }

    /// The same with any signal. Returns to whom.
    pub fn signal_sessions(&self, signal: Signal) -> Vec<u32> {
        let Some(pid) = self.child.as_ref().map(Child::id) else {
            return Vec::new();
        };
        let mut family = with_descendants(pid);
        family.retain(|session| *session != pid);
        family.iter().for_each(|session| kill(*session, signal));
        family
    }

    /// Listens again on the same port.
    pub fn restart(&mut self) {
        self.stop();
        self.listen();
    }

    /// Becomes a machine that nobody has met: another host key on the same port.
    pub fn change_host_key(&mut self) {
        self.stop();
        fs::remove_file(self.file("host_key")).expect("the host key");
        self.make_key("host_key");
        self.listen();
    }

    pub fn location(&self, name: &str) -> String {
        let path = self.store.join(name);
        let user = run(tool("id").arg("-un"));
        let user = user.trim();
        format!("sftp://{user}@127.0.0.1:{}{}", self.port, path.display())
    }

    /// The image as the server sees it.
    pub fn stored(&self, name: &str) -> PathBuf {
        self.store.join(name)
    }

    /// Arguments with which the program logs in here, and nowhere else.
    pub fn options(&self) -> Vec<String> {
        let mut args = Vec::new();
        for option in self.ssh_config().lines() {
            args.push("--ssh-option".into());
            args.push(option.trim().replacen(' ', "=", 1));
        }
        args
    }

    /// The same as lines of an ssh configuration file.
    pub fn ssh_config(&self) -> String {
        let dir = self.dir.display();
        format!(
            "IdentityFile {dir}/user_key\nIdentitiesOnly yes\nUserKnownHostsFile {dir}/known_hosts\n\
             GlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes"
        )
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn store(&self) -> &Path {
        &self.store
    }

    /// Sessions that are logged in now.
    pub fn sessions(&self) -> usize {
        let pid = self.child.as_ref().map_or(0, Child::id);
        with_descendants(pid).len() - 1
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether an SSH server answers there.
fn greets(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else {
        return false;
    };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
    let mut greeting = [0; 4];
    stream.read_exact(&mut greeting).is_ok() && greeting == *b"SSH-"
}
