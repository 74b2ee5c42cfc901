//! How many threads, open files and how much memory a job takes at most.

use super::*;

/// Of a process of the program, with eight streams: those of the cache (256), of the exported file
/// (64 and 2), and a few for each stream and for the rest.
const THREADS_MAX: u64 = 384;
const FILES_MAX: u64 = 128;
/// Of one process.
pub const MEMORY_MAX: u64 = 300 * MIB;
/// The program and every child together, the kernel's cache of what they read and write included.
const GROUP_MAX: u64 = 384 * MIB;

/// A control group with little memory. Gone when dropped.
struct Group(PathBuf);

impl Group {
    /// `None`, after having said so, where there is no memory controller that we may use.
    fn with_memory(bytes: u64) -> Option<Group> {
        let name = format!("e2ebak-test-{}", std::process::id());
        let v1 = Path::new("/sys/fs/cgroup/memory").join(&name);
        let v2 = Path::new("/sys/fs/cgroup").join(&name);
        for (path, limit) in [(v1, "memory.limit_in_bytes"), (v2, "memory.max")] {
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let group = Group(path);
            // A hierarchy, and not just a directory.
            let is_group = group.0.join("cgroup.procs").exists();
            if is_group && fs::write(group.0.join(limit), bytes.to_string()).is_ok() {
                return Some(group);
            }
        }
        eprintln!("no memory controller: only the sizes of processes are looked at");
        None
    }

    /// Runs in the group whatever a program runs through these words.
    fn words(&self) -> Vec<String> {
        let script = format!("echo $$ >{}/cgroup.procs; exec \"$@\"", self.0.display());
        ["/bin/sh", "-ec", &script, "sh"].map(String::from).to_vec()
    }

    /// How often it was at its limit and had to give something back.
    fn times_full(&self) -> u64 {
        let read = |name: &str| fs::read_to_string(self.0.join(name)).ok();
        let v1 = || read("memory.failcnt")?.trim().parse().ok();
        let v2 = || {
            let events = read("memory.events")?;
            let max = events.lines().find_map(|line| line.strip_prefix("max "))?;
            max.trim().parse().ok()
        };
        v1().or_else(v2).expect("a counter")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The last of its processes may still be on its way out.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The most that any process of the program has had.
#[derive(Debug, Default)]
pub struct Most {
    threads: u64,
    files: u64,
    /// Resident, in bytes.
    pub memory: u64,
    /// Processes that carry a stream.
    streams: usize,
}

impl Most {
    pub fn look(&mut self, sandbox: &Sandbox) {
        let processes = sandbox.processes();
        let streams = processes.iter().filter(|(_, l)| l.starts_with("ssh "));
        self.streams = self.streams.max(streams.count());
        for (pid, _) in &processes {
            let _ = self.look_at(*pid); // it may end meanwhile
        }
    }

    fn look_at(&mut self, pid: u32) -> Option<()> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let exe = fs::read_link(proc.join("exe")).ok()?;
        if !["e2ebak", "ssh"].contains(&exe.file_name()?.to_str()?) {
            return None;
        }
        let status = fs::read_to_string(proc.join("status")).ok()?;
        let number = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        self.threads = self.threads.max(number("Threads:")?);
        self.memory = self.memory.max(number("VmHWM:")? << 10);
        let files = fs::read_dir(proc.join("fd")).ok()?.count() as u64;
        self.files = self.files.max(files);
        Some(())
    }
}

/// An image of 5 TiB, eight streams, and less memory than what is copied: it ends, and no process
/// grows with what it does.
#[test]
fn a_job_has_bounds_and_ends_when_memory_is_short() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let mut place = Place::over(&sandbox, &sshd);
    place.options.extend(["--channels".into(), "8".into()]);
    let source = sandbox.dir("source");
    for i in 0..2 {
        large_file(&source.join(format!("large {i}")), 96 * MIB, i + 1);
    }
    plain_tree(&source.join("small"), 300);
    place.init("5T").ok();
    let group = Group::with_memory(GROUP_MAX);
    let mut most = Most::default();
    let mut backup = place.backup(&source);
    if let Some(group) = &group {
        backup = backup.through(group.words());
    }
    let mut backup = backup.spawn();
    while !backup.is_over() {
        most.look(&sandbox);
        std::thread::sleep(Duration::from_millis(20));
    }
    let took = backup.wait().code(0).took;
    let full = group.as_ref().map(Group::times_full);
    eprintln!("{most:?}, at the group's limit {full:?} times, {took:?}");
    assert!(most.streams >= 1 && most.threads > 64, "{most:?}");
    assert!(most.threads <= THREADS_MAX, "{most:?}");
    assert!(most.files <= FILES_MAX, "{most:?}");
    assert!(most.memory <= MEMORY_MAX, "{most:?}");
    assert_ne!(full, Some(0), "there was memory enough");
    place.assert_latest_is(&source);
    place.assert_closed();
}
