//! Real jobs, recorded on their way to a real SFTP server.
//!
//! A verb that changes the image is one more step of [`Recorder::all`]. What it may take away it
//! says before it starts, with [`Recorder::see`]; the judge promises nothing of that from then on.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use super::common::{
    PASSPHRASE, Place, Program, Sandbox, kill, large_file, plain_tree, run, tool, wait_for,
};
use super::history::{BLOCK, History};
use super::log::{self, Kind, Log, Record};
use super::random::Random;
use super::tree::{Tree, on_disk};

/// The least that holds the journal and what is backed up below.
const SIZE: &str = "256M";
const MIB: u64 = 1 << 20;
/// Seen before and after a trim.
pub const TRIMMING: &str = "trimming";
pub const TRIMMED: &str = "trimmed";
/// What an interrupted run copies, and of how much of it something has arrived when it is
/// interrupted.
const INTERRUPTED_FILES: u64 = 4;
const INTERRUPTED_AT: [u64; 2] = [MIB / 2, 3 * MIB];

pub struct Recording {
    records: Vec<Record>,
    size: u64,
    pub history: History,
    pub trees: Vec<Tree>,
    /// The path of what was backed up.
    pub source: String,
}

impl Recording {
    /// As it would be if the program had done something else: what `change` makes of each record
    /// that tells of the image.
    pub fn changed(&self, change: impl FnMut(&Record) -> Option<Record>) -> Recording {
        let records: Vec<Record> = self.records.iter().filter_map(change).collect();
        Recording {
            history: History::new(&records, PASSPHRASE, self.size),
            records,
            size: self.size,
            trees: self.trees.clone(),
            source: self.source.clone(),
        }
    }

    pub fn records(&self) -> &[Record] {
        &self.records
    }
}

/// What is recorded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Jobs {
    All,
    /// Those before and in which space is given back to the server.
    Trims,
}

struct Recorder<'a> {
    place: Place<'a>,
    source: PathBuf,
    log: PathBuf,
    trees: Vec<Tree>,
    random: Random,
}

/// Runs the jobs. One flush of `done` is done, as the relay has it; `seed` decides when a run is
/// interrupted.
pub fn record(sandbox: &Sandbox, jobs: Jobs, done: u32, seed: u64) -> Recording {
    let log = sandbox.path("log");
    let stored = sandbox.dir("store").join("a.img");
    let rig = std::env::current_exe().expect("this program");
    let (rig, told) = (rig.display(), log.display());
    let command = format!("{rig} relay {told} {done} /usr/lib/openssh/sftp-server -e");
    server_with_a_shell(
        &sandbox.dir("bin"),
        &command,
        &format!("{rig} punch {told}"),
    );
    let mut recorder = Recorder {
        place: Place {
            sandbox,
            location: format!("pipe:{}", stored.display()),
            // Three streams: one for what is small, two for what is not.
            options: ["--channels", "3", "--late-writes", "1s", "--ssh-command"]
                .map(String::from)
                .into_iter()
                .chain([command])
                .collect(),
            stored: stored.clone(),
        },
        source: sandbox.dir("source"),
        log,
        trees: Vec::new(),
        random: Random(seed),
    };
    match jobs {
        Jobs::All => recorder.all(),
        Jobs::Trims => recorder.trims(),
    }
    let records = log::read(&recorder.log).expect("the log");
    let size = fs::metadata(&stored).expect("the image").len();
    Recording {
        history: History::new(&records, PASSPHRASE, size),
        records,
        size,
        trees: recorder.trees,
        source: recorder.source.display().to_string(),
    }
}

/// Programs for the path: an `ssh` to a server where commands may be run, whose SFTP goes through
/// the relay, and the `fallocate` there.
fn server_with_a_shell(directory: &Path, relay: &str, punch: &str) {
    let ssh = format!(
        "for last; do :; done\n\
         case \" $* \" in\n\
         *\" -G \"*) exit 0;;\n\
         *\" -s -- \"*) exec {relay};;\n\
         *) exec sh -c \"$last\";;\n\
         esac"
    );
    let programs = [("ssh", ssh), ("fallocate", format!("exec {punch} \"$@\""))];
    for (name, script) in programs {
        let path = directory.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("a program");
    }
}

impl Recorder<'_> {
    fn all(&mut self) {
        let (first, second) = self.two_backups();
        for i in 0..2 {
            let name = format!("interrupted {i}");
            self.more_to_copy(&name, 10 + 10 * i);
            self.killed_backup();
            plain_tree(&self.source.join("newer"), 8);
            self.backup();
            // What every later snapshot held would be read at every cut.
            self.no_more_of(&name);
        }
        self.delete(&first);
        self.trim_by_shell();
        self.pin(&second);
        self.prune(&second);
        self.trim();
        self.grow();

        self.more_to_copy("cut off", 30);
        self.backup_whose_server_dies();
    }

    fn trims(&mut self) {
        let (first, _) = self.two_backups();
        self.delete(&first);
        self.trim_by_shell();
        self.trim();
    }

    fn two_backups(&mut self) -> (String, String) {
        self.place.init(SIZE).ok();
        self.see("init");
        let source = self.source.clone();
        plain_tree(&source, 24);
        fs::hard_link(source.join("00/00/0.txt"), source.join("hard link")).expect("a link");
        symlink("00/00/0.txt", source.join("symlink")).expect("a symlink");
        large_file(&source.join("large"), MIB, 1);
        let first = self.backup();

        fs::rename(source.join("large"), source.join("renamed")).expect("renamed");
        fs::remove_dir_all(source.join("01")).expect("removed");
        fs::write(source.join("00/00/0.txt"), "changed").expect("written");
        plain_tree(&source.join("new"), 12);
        (first, self.backup())
    }

    fn see(&self, text: &str) {
        let log = Log::open(&self.log).expect("the log");
        let seen = Record::new(Kind::Seen, text.into());
        log.append(&seen).expect("recorded");
    }

    fn more_to_copy(&self, name: &str, seed: u64) {
        for i in 0..INTERRUPTED_FILES {
            let path = self.source.join(format!("{name} {i}"));
            large_file(&path, MIB, seed + i);
            // rsync leaves a hole at the end, and sets the size before the kernel has written anything.
            let file = File::options().write(true).open(path).expect("opened");
            file.set_len(MIB + i % 2 * 65_536).expect("longer");
        }
    }

    fn no_more_of(&self, name: &str) {
        for i in 0..INTERRUPTED_FILES {
            fs::remove_file(self.source.join(format!("{name} {i}"))).expect("removed");
        }
    }

    /// The id of the snapshot.
    fn backup(&mut self) -> String {
        self.trees.push(on_disk(&self.source));
        let ran = self.place.backup(&self.source).arg("--json").ok();
        self.published(&ran.stdout)
    }

    fn published(&self, told: &str) -> String {
        let summary = told.lines().last().expect("a summary");
        let summary: serde_json::Value = serde_json::from_str(summary).expect("JSON");
        let id = summary["id"].as_str().expect("an id").to_string();
        self.see(&format!("published {id} {}", self.trees.len() - 1));
        id
    }

    /// Everything is killed at once, the relays and their servers, too.
    fn killed_backup(&mut self) {
        self.trees.push(on_disk(&self.source));
        let enough = self.enough();
        let backup = self.place.backup(&self.source).spawn();
        self.wait_until_recorded(enough);
        self.place.sandbox.kill_processes();
        drop(backup);
        self.place.sandbox.assert_nothing_left();
        self.look_what_was_written();
        self.see("killed");
    }

    /// The servers die and the program does not: it dials again and sends again what no flush had
    /// covered.
    fn backup_whose_server_dies(&mut self) {
        self.trees.push(on_disk(&self.source));
        let enough = self.enough();
        let backup = self.place.backup(&self.source).arg("--json").spawn();
        self.wait_until_recorded(enough);
        self.see("the servers die");
        for (pid, line) in self.place.sandbox.processes() {
            if line.starts_with("/usr/lib/openssh/sftp-server") {
                kill(pid, Signal::KILL);
            }
        }
        self.published(&backup.wait().code(0).stdout);
    }

    /// Bytes of the log. The image does not grow where room is used again.
    fn enough(&mut self) -> u64 {
        let [least, most] = INTERRUPTED_AT;
        let more = self.random.below((most - least) as usize) as u64;
        self.recorded() + least + more
    }

    fn recorded(&self) -> u64 {
        fs::metadata(&self.log).expect("the log").len()
    }

    fn wait_until_recorded(&self, bytes: u64) {
        wait_for("a part of the data", Duration::from_secs(60), || {
            self.recorded() > bytes
        });
    }

    /// Of writes that no server has answered, and none ever will, only the file tells whether they
    /// were made.
    fn look_what_was_written(&self) {
        let mut unanswered = std::collections::BTreeMap::new();
        for record in log::read(&self.log).expect("the log") {
            match record.kind {
                Kind::Write => drop(unanswered.insert(record.tag, record)),
                Kind::Written => drop(unanswered.remove(&record.tag)),
                _ => {}
            }
        }
        let image = File::open(&self.place.stored).expect("the image");
        let log = Log::open(&self.log).expect("the log");
        for write in unanswered.into_values() {
            let start = write.offset / BLOCK as u64 * BLOCK as u64;
            let end = (write.offset + write.data.len() as u64).next_multiple_of(BLOCK as u64);
            let mut in_file = Record::new(Kind::InFile, vec![0; (end - start) as usize]);
            in_file.offset = start;
            let data = &mut in_file.data;
            image.read_exact_at(data, start).expect("readable");
            log.append(&in_file).expect("recorded");
        }
    }

    /// By hand, in a mounted image, among other things that are no backup and may harm none.
    fn delete(&mut self, id: &str) {
        let at: &Path = &self.place.sandbox.dir("mnt");
        self.place.program("mount").arg(at).ok();
        plain_tree(&at.join("by hand"), 20);
        run(tool("sync").arg("-f").arg(at));
        self.see(&format!("deleting {id}"));
        let snapshots = at.join("snapshots");
        let going = snapshots.join(format!("{id}.deleting"));
        fs::rename(snapshots.join(id), &going).expect("renamed");
        fs::remove_file(snapshots.join(format!("{id}.json"))).expect("removed");
        fs::remove_dir_all(going).expect("removed");
        fs::remove_dir_all(at.join("by hand")).expect("removed");
        Program::new(self.place.sandbox, "umount").arg(at).ok();
        self.see(&format!("deleted {id}"));
    }

    fn pin(&self, id: &str) {
        self.place.program("pin").arg(id).ok();
        self.see(&format!("pinned {id}"));
    }

    /// Deletes all but the newest and the one that is pinned. A run that was killed late may have
    /// published one more than was told.
    fn prune(&self, pinned: &str) {
        let mut goes = self.place.ids();
        goes.pop().expect("the newest");
        goes.retain(|id| id != pinned);
        let see_each = |word| goes.iter().for_each(|id| self.see(&format!("{word} {id}")));
        see_each("deleting");
        let ran = self.place.program("prune").args(["--keep-last", "1"]).ok();
        assert!(ran.stdout.contains("2 stay"), "{ran}");
        see_each("deleted");
    }

    /// By the only way of a server without commands: it copies what is in use to another file, which
    /// takes the image's name.
    fn trim(&self) {
        self.trimming(self.place.program("trim"), "copy-data");
    }

    /// By `fallocate` on the server.
    fn trim_by_shell(&self) {
        let bin = self.place.sandbox.path("bin");
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", bin.display());
        let trim = Program::new(self.place.sandbox, "trim")
            .arg(format!("sftp://server{}", self.place.stored.display()))
            .args(["--ssh-option", "ControlMaster=no", "--late-writes", "1s"])
            .env("PATH", path);
        self.trimming(trim, "fallocate on the server");
    }

    fn trimming(&self, trim: Program<'_>, way: &str) {
        self.see(TRIMMING);
        let ran = trim.args(["--granularity", "4K"]).ok();
        assert!(ran.stdout.contains(way), "{ran}");
        self.see(TRIMMED);
    }

    /// A cut has the size that the image has in the end: the file grows before anything is written.
    fn grow(&self) {
        self.see("growing");
        self.place.program("grow").arg("+128M").ok();
        self.see("grown");
    }
}
