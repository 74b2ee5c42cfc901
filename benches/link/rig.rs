//! One server, one link, an image, and the files of the peers.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Args;
use crate::common::{Place, Proxy, Sandbox, Shape, Sshd, run, tool};
use crate::ours::{self, Ours};
use crate::peers::{Sftp, Sshfs};
use crate::report::Report;
use crate::stop;
use crate::work::{Engine, MIB, Work};

/// Within the volume, far from where ext4 puts anything.
pub const VOLUME_BASE: u64 = 64 << 30;

/// A place of its own for everything, within the volume from its base and within files from 0.
/// What is read by chance is much more than our cache holds.
pub struct Places {
    pub read: u64,
    pub read_by_chance: u64,
    pub write: u64,
    pub write_by_chance: u64,
    pub end: u64,
}

/// How much is done in one measurement.
#[derive(Clone, Copy)]
pub struct Amounts {
    /// Bytes that are there to be read in order, and places for as many to be written. Channels come up
    /// one after the other, and a backup of some GiB hardly notices that.
    pub there: u64,
    /// Bytes that are there to be read by chance.
    pub scattered: u64,
    pub random_time: Duration,
    quick: bool,
}

impl Amounts {
    fn new(quick: bool) -> Self {
        Amounts {
            there: if quick { 128 * MIB } else { 1024 * MIB },
            scattered: if quick { 64 * MIB } else { 512 * MIB },
            random_time: Duration::from_millis(if quick { 300 } else { 2000 }),
            quick,
        }
    }

    pub fn places(&self) -> Places {
        let (there, scattered) = (self.there, self.scattered);
        Places {
            read: 0,
            read_by_chance: there,
            write: there + scattered,
            write_by_chance: 2 * there + scattered,
            end: 3 * there + scattered,
        }
    }

    /// Of `there`, what one SSH window at a time carries: who has no more is no faster with more.
    pub fn bytes_of_one_window(&self, rtt: u64) -> u64 {
        match rtt {
            0 => self.there / 4,
            1..30 => self.there / 8,
            _ => self.there / 16,
        }
    }

    /// Writes of 4 KiB, half of what the cache may owe at most.
    pub fn random_writes(&self, rtt: u64) -> u64 {
        match (self.quick, rtt) {
            (true, _) => 256,
            (false, 0) => 8192,
            (false, 1..30) => 4096,
            (false, _) => 2048,
        }
    }
}

pub struct Rig {
    pub args: Args,
    pub amounts: Amounts,
    shape: Shape,
    proxy: Proxy,
    sshd: Sshd,
    /// It takes down what is left.
    pub sandbox: Sandbox,
    _lock: File,
}

/// The most that the server's files take, and those of the client, in bytes: three files of 2.6 GiB
/// at most, those of sftp, and a tree.
const STORE_MAX: u64 = 9 << 30;
const CLIENT_MAX: u64 = 3 << 30;
/// What must be left for everybody else while those are in memory.
const MEMORY_LEFT: u64 = 4 << 30;

/// Two at a time would measure each other, and take twice the memory.
fn only_one() -> File {
    let path = std::env::temp_dir().join("e2ebak-bench-link.lock");
    let lock = File::create(&path).expect("a lock");
    if lock.try_lock().is_err() {
        refuse(&format!("another one runs: it holds {}", path.display()));
    }
    lock
}

/// Refuses to fill the memory of a machine that has not got it.
fn check_memory() {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    let needed = STORE_MAX + CLIENT_MAX + MEMORY_LEFT;
    if kib.unwrap_or(0) << 10 < needed {
        let gib = needed >> 30;
        refuse(&format!(
            "{gib} GiB of memory must be free, or else use --disk"
        ));
    }
}

/// Before anything is made.
fn refuse(why: &str) -> ! {
    eprintln!("error: {why}");
    std::process::exit(1);
}

impl Rig {
    pub fn new(args: &Args) -> Self {
        let rig = Rig::empty(args);
        rig.prepare();
        rig
    }

    /// With nothing on the server.
    pub fn empty(args: &Args) -> Self {
        let lock = only_one();
        if !args.disk {
            check_memory();
        }
        let sandbox = Sandbox::new();
        for (dir, size) in [("store", STORE_MAX), ("client", CLIENT_MAX)] {
            let dir = sandbox.dir(dir);
            if !args.disk {
                // So that the link is measured and not a disk.
                let options = format!("size={size},mode=755");
                let mut mount = tool("mount");
                mount.args(["-t", "tmpfs", "-o", &options, "bench-link"]);
                run(mount.arg(dir));
            }
        }
        let sshd = Sshd::start(&sandbox);
        let proxy = Proxy::to_port(sshd.port(), Shape::default());
        let mut shape = Shape::default();
        if let Some(mbit) = args.mbit {
            shape = shape.mbit(mbit);
        }
        let rig = Rig {
            args: args.clone(),
            amounts: Amounts::new(args.quick),
            shape,
            proxy,
            sshd,
            sandbox,
            _lock: lock,
        };
        std::fs::write(rig.peers_config(), rig.config_text()).expect("a file");
        rig
    }

    /// An image with something in it to read, and files for the peers.
    fn prepare(&self) {
        eprintln!("-- an image, and something to read");
        Place::over(&self.sandbox, &self.sshd).init("1T").ok();
        std::fs::rename(self.sshd.stored("a.img"), self.stored("image")).expect("an image");
        let places = self.amounts.places();
        let fill = |file: &File, from: u64| {
            let mut work = Work::sequential(true, from, places.write, 2);
            work.sync = false;
            work.run(file);
        };
        for path in [
            self.stored("raw"),
            self.stored("peer"),
            self.local("source"),
        ] {
            let file = File::create_new(&path).expect("a file");
            fill(&file, 0);
            // What is written in order and by chance.
            file.set_len(places.end).expect("a file");
        }
        let ours = Ours::mount(self, 0);
        fill(&ours.open_volume(), VOLUME_BASE);
        ours.unmount();
        stop::check();
    }

    /// Makes room: what the others wrote and read is not needed any more.
    pub fn drop_peers(&self) {
        for name in ["raw", "peer", "get", "got"] {
            let _ = std::fs::remove_file(self.stored(name));
        }
    }

    fn config_text(&self) -> String {
        let settings = self.ssh_settings();
        let settings = settings.iter().map(|s| s.replacen('=', " ", 1) + "\n");
        settings.collect::<String>() + "Ciphers aes128-gcm@openssh.com\n"
    }

    /// A place beside the image on the server.
    pub fn stored(&self, name: &str) -> PathBuf {
        self.sshd.stored(name)
    }

    pub fn store(&self) -> &Path {
        self.sshd.store()
    }

    /// A place here, where sftp reads and writes.
    pub fn local(&self, name: &str) -> PathBuf {
        self.sandbox.path("client").join(name)
    }

    pub fn peers_config(&self) -> PathBuf {
        self.sandbox.path("ssh_config")
    }

    pub fn is_proxied(&self, rtt: u64) -> bool {
        rtt > 0 || self.shape.rate.is_some()
    }

    /// Bytes that have come through the proxy.
    pub fn sent_by_server(&self) -> u64 {
        self.proxy.sent_by_server()
    }

    /// Where the server is at this distance. Without a delay nothing is in between.
    pub fn port(&self, rtt: u64) -> u16 {
        if !self.is_proxied(rtt) {
            return self.sshd.port();
        }
        self.proxy.reshape(Shape {
            round_trip: Duration::from_millis(rtt),
            ..self.shape
        });
        self.proxy.port()
    }

    /// Where the link is that can be dropped.
    pub fn proxied(&self) -> u16 {
        self.proxy.port()
    }

    /// Resets all connections through the proxy; for so long it takes no new ones. Returns at once
    /// when it takes them again.
    pub fn drop_link(&self, outage: Duration) {
        self.proxy.refuse(true);
        self.proxy.cut();
        let end = Instant::now() + outage;
        while Instant::now() < end {
            stop::check();
            std::thread::sleep(Duration::from_millis(20));
        }
        self.proxy.refuse(false);
    }

    pub fn location(&self, name: &str, rtt: u64) -> String {
        self.location_at(name, self.port(rtt))
    }

    pub fn location_at(&self, name: &str, port: u16) -> String {
        let path = self.stored(name);
        format!("sftp://127.0.0.1:{port}{}", path.display())
    }

    /// Settings of ssh with which one logs in here.
    pub fn ssh_settings(&self) -> Vec<String> {
        let known = format!("HostKeyAlias=[127.0.0.1]:{}", self.sshd.port());
        let lines = self.sshd.ssh_config();
        let lines = lines.lines().map(|line| line.trim().replacen(' ', "=", 1));
        lines.chain([known]).collect()
    }

    /// The same as arguments of the program.
    pub fn options(&self) -> Vec<String> {
        let settings = self.ssh_settings().into_iter();
        settings
            .flat_map(|setting| ["--ssh-option".into(), setting])
            .collect()
    }

    /// Everybody connected, with cold caches.
    pub fn turn(&self, rtt: u64, run: usize) -> Turn<'_> {
        stop::check();
        Turn {
            ours: Ours::mount(self, rtt),
            sshfs: Sshfs::mount(self, rtt),
            sftp: std::cell::RefCell::new(Sftp::start(self, rtt)),
            raw: ours::raw_engine(self, rtt),
            rig: self,
            rtt,
            run,
        }
    }
}

/// One run at one distance.
pub struct Turn<'a> {
    pub ours: Ours,
    pub sshfs: Sshfs,
    pub sftp: std::cell::RefCell<Sftp>,
    pub raw: Engine,
    pub rig: &'a Rig,
    pub rtt: u64,
    pub run: usize,
}

impl Turn<'_> {
    /// Who takes turns, another one first in every run.
    pub fn rotated<T>(&self, mut tools: Vec<T>) -> Vec<T> {
        let first = self.run % tools.len();
        tools.rotate_left(first);
        tools
    }

    pub fn end(self, report: &mut Report) {
        let memory = crate::measure::peak_memory_mib(self.ours.pid);
        report.memory(self.rtt, memory);
        self.ours.unmount();
    }
}
