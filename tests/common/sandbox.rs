//! A temporary directory that everything of one test lives in, and that takes everything with it:
//! processes, mounts and loop devices are found by its path.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{private_shell, tool};

pub struct Sandbox {
    dir: TempDir,
    /// FUSE connections of processes that were killed. One that outlives its server stops every
    /// user of loop devices on this machine, and so is aborted at the end.
    connections: RefCell<BTreeSet<u32>>,
}

impl Sandbox {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("e2ebak-test-")
            .tempdir()
            .expect("a temporary directory");
        let connections = RefCell::default();
        let sandbox = Sandbox { dir, connections };
        for name in ["home", "run", "tmp"] {
            fs::create_dir(sandbox.path(name)).expect("a directory");
        }
        sandbox
    }

    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// A directory inside, made if it is not there.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("a directory");
        path
    }

    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("a file");
        path
    }

    /// Opens it to an ordinary user, and puts a copy of the program into it: where the build
    /// directory lies, that user may not look.
    pub fn open_to(&self, uid: u32) {
        let readable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.root(), readable.clone()).expect("a mode");
        for name in ["home", "run", "tmp", "store"] {
            std::os::unix::fs::chown(self.dir(name), Some(uid), Some(uid)).expect("an owner");
            for entry in fs::read_dir(self.path(name)).expect("readable").flatten() {
                std::os::unix::fs::chown(entry.path(), Some(uid), Some(uid)).expect("an owner");
            }
        }
        let program = self.path("e2ebak");
        fs::copy(super::Program::binary(), &program).expect("the program");
        fs::set_permissions(&program, readable).expect("a mode");
    }

    /// Processes whose command line, environment or working directory names this sandbox.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let needle = self.root().as_os_str().as_bytes();
        let names = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let pid = entry.file_name().to_string_lossy().parse::<u32>();
            let Ok(pid) = pid else { continue };
            if pid == std::process::id() || is_dead(pid) {
                continue;
            }
            let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
            let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
            let line = read("cmdline");
            if names(&line) || names(&read("environ")) || names(cwd.as_os_str().as_bytes()) {
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                found.push((pid, line));
            }
        }
        found
    }

    /// SIGKILL to every one of them at once, and a while for them to end.
    pub fn kill_processes(&self) {
        self.kill_processes_by(|_| 0);
    }

    /// The same with those first whose process number and command line give the least key. Nobody
    /// waits for anybody in between.
    pub fn kill_processes_by<K: Ord>(&self, key: impl FnMut(&(u32, String)) -> K) {
        let mut processes = self.processes();
        for (pid, _) in &processes {
            self.connections.borrow_mut().extend(fuse_connections(*pid));
        }
        processes.sort_by_cached_key(key);
        for (pid, _) in &processes {
            kill(*pid, Signal::KILL);
        }
        let end = Instant::now() + Duration::from_secs(5);
        while processes.iter().any(|(pid, _)| !is_dead(*pid)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Mountpoints below this sandbox in the test's own namespace, innermost first.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let info = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        let points = info.lines().filter_map(|line| line.split(' ').nth(4));
        let mut found: Vec<PathBuf> = points
            .map(|point| PathBuf::from(point.replace("\\040", " ")))
            .filter(|point| point.starts_with(self.root()))
            .collect();
        found.reverse();
        found
    }

    /// Loop devices whose backing file lies in this sandbox.
    pub fn loops(&self) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").expect("/sys/block").flatten() {
            let backing = entry.path().join("loop/backing_file");
            let backing = fs::read_to_string(backing).unwrap_or_default();
            if Path::new(backing.trim_end()).starts_with(self.root()) {
                found.push(format!("/dev/{}", entry.file_name().to_string_lossy()));
            }
        }
        found
    }

    /// Fails unless the program has left nothing running, mounted or attached. What is on its way
    /// out gets a few seconds: the kernel frees loop devices a little after the unmount.
    pub fn assert_nothing_left(&self) {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(
                Instant::now() < end,
                "left behind by the program:\n{}",
                left.join("\n")
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        for (pid, line) in self.processes() {
            if !is_server(&line) {
                left.push(format!("process {pid}: {line}"));
            }
        }
        let servers_own = self.path("store");
        let mounts = self.mounts().into_iter().filter(|m| *m != servers_own);
        left.extend(mounts.map(|mount| format!("mount {}", mount.display())));
        left.extend(self.loops().into_iter().map(|l| format!("loop device {l}")));
        for entry in fs::read_dir(self.path("run/e2ebak")).into_iter().flatten() {
            left.push(format!("{:?}", entry.expect("an entry").path()));
        }
        let connections = self.connections.borrow();
        let stuck = stuck_connections(&connections, false);
        left.extend(stuck.iter().map(|c| format!("FUSE connection {c}")));
        let states = self.sessions_state().into_iter();
        left.extend(states.map(|file| format!("{file:?}")));
        left.extend(orphaned_loops());
        left
    }

    /// State of root's sessions that tells of a mount in this sandbox.
    fn sessions_state(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let sessions = fs::read_dir("/run/e2ebak").into_iter().flatten().flatten();
        for file in sessions.map(|entry| entry.path().join("state.json")) {
            let state = fs::read_to_string(&file).unwrap_or_default();
            if state.contains(&*self.root().to_string_lossy()) {
                found.push(file);
            }
        }
        found
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Processes first: a mount whose server is dead can always be unmounted.
        self.kill_processes();
        if !self.connections.borrow().is_empty() {
            // Most end with their servers, a little later.
            std::thread::sleep(Duration::from_millis(200));
            stuck_connections(&self.connections.borrow(), true);
        }
        for mount in self.mounts() {
            let _ = tool("umount").arg("-l").arg(mount).output();
        }
        for session in self
            .sessions_state()
            .iter()
            .filter_map(|file| file.parent())
        {
            let _ = tool("umount").arg("-l").arg(session.join("fuse")).output();
            let _ = fs::remove_dir_all(session);
        }
        for device in self.loops() {
            let _ = tool("losetup").arg("-d").arg(device).output();
        }
    }
}

/// Whether this command line is of a test's own sshd, or one of its sessions (`sshd: ...`). An ssh of
/// the program has the server's directory in its arguments, too.
pub fn is_server(line: &str) -> bool {
    let program = line.split([' ', ':']).next().unwrap_or_default();
    program.ends_with("sshd")
}

pub fn kill(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// The FUSE connections that a process serves.
fn fuse_connections(pid: u32) -> Vec<u32> {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter();
    let mut found = Vec::new();
    for info in infos.flatten().flatten() {
        let text = fs::read_to_string(info.path()).unwrap_or_default();
        let number = text
            .lines()
            .find_map(|l| l.strip_prefix("fuse_connection:"));
        found.extend(number.and_then(|n| n.trim().parse::<u32>().ok()));
    }
    found
}

/// Those of the connections that still exist and that nobody serves; aborted, if so told. One that
/// somebody serves is of another test: the kernel gives the numbers out again, so a connection
/// counts only when it is there without a server twice in a row.
fn stuck_connections(connections: &BTreeSet<u32>, abort: bool) -> Vec<String> {
    let there = existing_connections(&unserved(connections), false);
    if there.is_empty() {
        return Vec::new();
    }
    let there = existing_connections(&unserved(&there), abort);
    there.iter().map(u32::to_string).collect()
}

fn unserved(connections: &BTreeSet<u32>) -> BTreeSet<u32> {
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let served: BTreeSet<u32> = pids.flat_map(fuse_connections).collect();
    connections.difference(&served).copied().collect()
}

fn existing_connections(connections: &BTreeSet<u32>, abort: bool) -> BTreeSet<u32> {
    if connections.is_empty() {
        return BTreeSet::new();
    }
    let script = "mount -t fusectl none /sys/fs/fuse/connections; cd /sys/fs/fuse/connections
        for c; do test ! -e $c || { echo $c; $abort; }; done";
    let then = if abort { "echo 1 > $c/abort" } else { "true" };
    let script = script.replace("$abort", then);
    let mut command = private_shell(&script);
    command.arg("sh");
    command.args(connections.iter().map(u32::to_string));
    let told = command.output().map(|output| output.stdout);
    let told = String::from_utf8_lossy(&told.unwrap_or_default()).into_owned();
    told.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Loop devices of sessions beyond those that running sessions can have. Sessions in private mount
/// namespaces all have their volume at the same path, so they can be counted and not told apart.
fn orphaned_loops() -> Option<String> {
    let loops = fs::read_dir("/sys/block").expect("/sys/block").flatten();
    let backing = loops.map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")));
    let loops = backing
        .flatten()
        .filter(|path| path.starts_with("/run/e2ebak/"))
        .count();
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let lines = processes.map(|entry| fs::read(entry.path().join("cmdline")).unwrap_or_default());
    let verb = |line: &Vec<u8>| line.split(|b| *b == 0).nth(1) == Some(b"session-process");
    let sessions = lines.filter(verb).count();
    (loops > sessions).then(|| format!("{loops} loop devices of {sessions} running sessions"))
}

/// Whether the process is gone, or a zombie that nobody has reaped yet. One whose other threads
/// still end is neither.
fn is_dead(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat
        .rsplit(") ")
        .next()
        .unwrap_or_default()
        .split(' ')
        .collect();
    // Fields 3 and 20 of proc(5).
    let ended = fields.first().is_none_or(|s| matches!(*s, "" | "Z" | "X"));
    let threads = fields.get(17).and_then(|threads| threads.parse().ok());
    ended && threads.unwrap_or(0) <= 1
}

/// The process and all that descend from it, children first.
pub fn with_descendants(pid: u32) -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(child) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit(") ").next().and_then(|r| r.split(' ').nth(1));
        if let Some(parent) = parent.and_then(|p| p.parse::<u32>().ok()) {
            parents.push((child, parent));
        }
    }
    let mut family = vec![pid];
    let mut next = 0;
    while next < family.len() {
        let parent = family[next];
        family.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(c, _)| c));
        next += 1;
    }
    family.reverse();
    family
}
