//! Real jobs, recorded on their way to a real SFTP server.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::common::{
    PASSPHRASE, Place, Program, Sandbox, large_file, plain_tree, run, stored_bytes, tool, wait_for,
};
use super::history::History;
use super::log::{self, Kind, Log};
use super::tree::{Tree, on_disk};

/// The least that holds the journal and what is backed up below.
const SIZE: &str = "256M";
const MIB: u64 = 1 << 20;

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
}

/// Runs every job. One flush of `done` is done, as the relay has it.
pub fn record(sandbox: &Sandbox, done: u32) -> Recording {
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
            options: vec!["--ssh-command".into(), command],
            stored: stored.clone(),
        },
        source: sandbox.dir("source"),
        log,
        trees: Vec::new(),
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
        plain_tree(&source, 60);
        fs::hard_link(source.join("00/00/0.txt"), source.join("hard link")).expect("a link");
        symlink("00/00/0.txt", source.join("symlink")).expect("a symlink");
        large_file(&source.join("large"), 3 * MIB, 1);
        self.backup();

        fs::rename(source.join("large"), source.join("renamed")).expect("renamed");
        fs::remove_dir_all(source.join("01")).expect("removed");
        fs::write(source.join("00/00/0.txt"), "changed").expect("written");
        plain_tree(&source.join("new"), 30);
        self.backup();

        for i in 0..8 {
            large_file(&source.join(format!("interrupted {i}")), 2 * MIB, 10 + i);
        }
        self.killed_backup();
        plain_tree(&source.join("newer"), 20);
        self.backup();
        self.mount();
    }

    fn see(&self, text: &str) {
        let log = Log::open(&self.log).expect("the log");
        log.append(Kind::Seen, 0, 0, text.as_bytes())
            .expect("recorded");
    }

    fn backup(&mut self) {
        self.trees.push(on_disk(&self.source));
        let ran = self.place.backup(&self.source).arg("--json").ok();
        let summary = ran.stdout.lines().last().expect("a summary");
        let summary: serde_json::Value = serde_json::from_str(summary).expect("JSON");
        let id = summary["id"].as_str().expect("an id");
        self.see(&format!("published {id} {}", self.trees.len() - 1));
        // Snapshots are named by the second.
        std::thread::sleep(Duration::from_millis(1100));
    }

    /// Everything is killed at once, the relay and its server, too.
    fn killed_backup(&mut self) {
        self.trees.push(on_disk(&self.source));
        let before = stored_bytes(&self.place.stored);
        let backup = self.place.backup(&self.source).spawn();
        wait_for("a part of the data", Duration::from_secs(60), || {
            stored_bytes(&self.place.stored) > before + 5 * MIB
        });
        self.place.sandbox.kill_processes();
        drop(backup);
        self.place.sandbox.assert_nothing_left();
        self.see("killed");
    }

    /// What is not a backup may not harm one either.
    fn mount(&mut self) {
        let at: &Path = &self.place.sandbox.dir("mnt");
        self.place.program("mount").arg(at).ok();
        plain_tree(&at.join("by hand"), 40);
        run(tool("sync").arg("-f").arg(at));
        fs::remove_dir_all(at.join("by hand")).expect("removed");
        Program::new(self.place.sandbox, "umount").arg(at).ok();
        self.see("unmounted");
    }
}
