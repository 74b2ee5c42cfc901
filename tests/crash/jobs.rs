//! Real jobs, recorded on their way to a real SFTP server.
//!
//! A verb that changes the image is one more step of [`Recorder::all`]. What it may take away it
//! says before it starts, with [`Recorder::see`]; the judge promises nothing of that from then on.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use super::common::{
    PASSPHRASE, Place, Program, Sandbox, kill, large_file, plain_tree, run, tool, wait_for,
};
use super::history::{BLOCK, History};
use super::log::{self, Kind, Log};
use super::random::Random;
use super::tree::{Tree, on_disk};

/// The least that holds the journal and what is backed up below.
const SIZE: &str = "256M";
const MIB: u64 = 1 << 20;
/// What an interrupted run copies, and of how much of it something has arrived when it is
/// interrupted.
const INTERRUPTED_FILES: u64 = 4;
const INTERRUPTED_AT: [u64; 2] = [MIB / 2, 3 * MIB];

pub struct Recording {
    pub history: History,
    pub trees: Vec<Tree>,
    /// The path of what was backed up.
    pub source: String,
}

struct Recorder<'a> {
    place: Place<'a>,
    source: PathBuf,
    log: PathBuf,
    trees: Vec<Tree>,
    random: Random,
}

/// Runs every job. One flush of `done` is done, as the relay has it; `seed` decides when a run is
/// interrupted.
pub fn record(sandbox: &Sandbox, done: u32, seed: u64) -> Recording {
    let log = sandbox.path("log");
    let stored = sandbox.dir("store").join("a.img");
    let relay = std::env::current_exe().expect("this program");
    let command = format!(
        "{} relay {} {done} /usr/lib/openssh/sftp-server -e",
        relay.display(),
        log.display()
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
    recorder.all();
    let records = log::read(&recorder.log).expect("the log");
    let size = fs::metadata(&stored).expect("the image").len();
    Recording {
        history: History::new(records, PASSPHRASE, size),
        trees: recorder.trees,
        source: recorder.source.display().to_string(),
    }
}

impl Recorder<'_> {
    fn all(&mut self) {
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
        let second = self.backup();

        for i in 0..2 {
            let name = format!("interrupted {i}");
            self.more_to_copy(&name, 10 + 10 * i);
            self.killed_backup();
            plain_tree(&source.join("newer"), 8);
            self.backup();
            // What every later snapshot held would be read at every cut.
            self.no_more_of(&name);
        }
        self.delete(&first);
        self.pin(&second);
        self.prune(&second);
        self.grow();

        self.more_to_copy("cut off", 30);
        self.backup_whose_server_dies();
    }

    fn see(&self, text: &str) {
        let log = Log::open(&self.log).expect("the log");
        log.append(Kind::Seen, 0, 0, text.as_bytes())
            .expect("recorded");
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
            let mut data = vec![0; (end - start) as usize];
            image.read_exact_at(&mut data, start).expect("readable");
            log.append(Kind::InFile, 0, start, &data).expect("recorded");
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

    /// A cut has the size that the image has in the end: the file grows before anything is written.
    fn grow(&self) {
        self.see("growing");
        self.place.program("grow").arg("+128M").ok();
        self.see("grown");
    }
}
