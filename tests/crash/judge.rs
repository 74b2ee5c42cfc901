//! Whether an image that a crash has left is what was promised.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use e2ebak::error::Error;
use e2ebak::snapshot::PIN;

use super::common::{output, tool};
use super::history::{BLOCK, History};
use super::kernel;
use super::tree::{Tree, on_disk};

/// What was found wrong, one sentence each.
#[derive(Default)]
pub struct Verdict {
    /// Of what was published before the last flush.
    pub lost: Vec<String>,
    /// Of what is there.
    pub torn: Vec<String>,
}

/// What the program has said by now.
#[derive(Default)]
pub struct Promised<'a> {
    pub published: Vec<Published<'a>>,
    /// Snapshots whose deletion is over.
    pub deleted: Vec<&'a str>,
    /// While the filesystem grows, e2fsck may have to repair it. It loses nothing.
    pub growing: bool,
}

/// A snapshot that a run has said to be published, and the tree that it is of.
pub struct Published<'a> {
    pub id: &'a str,
    pub tree: &'a Tree,
    pub pinned: bool,
}

pub struct Judge<'a> {
    pub history: &'a History,
    /// Every state of the sources at which a run was started.
    pub trees: &'a [Tree],
    pub source: &'a str,
    pub passphrase: &'a str,
    /// Where the volume is put together.
    pub scratch: &'a Path,
    /// The header's blocks that were last seen to open.
    pub opened: BTreeMap<u64, u32>,
}

impl Judge<'_> {
    /// If `by_kernel`, the kernel replays the journal of a copy and is asked for the content, too.
    pub fn judge(
        &mut self,
        image: &BTreeMap<u64, u32>,
        promised: &Promised<'_>,
        by_kernel: bool,
    ) -> Verdict {
        let mut verdict = Verdict::default();
        if let Err(why) = self.open_header(image) {
            verdict.torn.push(format!("LUKS does not open: {why}"));
        }
        self.put_together(image);
        if by_kernel {
            verdict.lost = kernel::judge(self.scratch, self.source, &promised.published);
        }
        let replay = run(tool("e2fsck")
            .args(["-fy", "-E", "journal_only"])
            .arg(self.scratch));
        if let Err(why) = replay.accept(&[0, 1]) {
            verdict
                .torn
                .push(format!("the journal is not replayed: {why}"));
        }
        if promised.growing {
            let repair = run(tool("e2fsck").arg("-fy").arg(self.scratch));
            if let Err(why) = repair.accept(&[0, 1]) {
                verdict.torn.push(format!("cannot be repaired: {why}"));
            }
        }
        let check = run(tool("e2fsck").arg("-fn").arg(self.scratch));
        if let Err(why) = check.accept(&[0]) {
            verdict.torn.push(format!("e2fsck finds errors: {why}"));
        }
        self.snapshots(promised, &mut verdict);
        verdict
    }

    fn open_header(&mut self, image: &BTreeMap<u64, u32>) -> Result<(), Error> {
        let header: BTreeMap<u64, u32> = image
            .range(..self.history.volume)
            .map(|(block, version)| (*block, *version))
            .collect();
        if header != self.opened {
            let versions: BTreeMap<u64, Vec<u8>> = header
                .iter()
                .map(|(block, version)| (*block, self.history.version(*version).to_vec()))
                .collect();
            super::history::unlock(
                |block| versions.get(&block),
                self.passphrase,
                self.history.size,
            )?;
            self.opened = header;
        }
        Ok(())
    }

    fn put_together(&self, image: &BTreeMap<u64, u32>) {
        let file = File::create(self.scratch).expect("a file");
        let start = self.history.volume;
        file.set_len(self.history.size - start * BLOCK as u64)
            .expect("grown");
        let mut run: Vec<u8> = Vec::new();
        let mut from = 0;
        for (block, version) in image.range(start..) {
            let at = (block - start) * BLOCK as u64;
            if at != from + run.len() as u64 {
                file.write_all_at(&run, from).expect("written");
                run.clear();
                from = at;
            }
            run.extend_from_slice(self.history.version(*version));
        }
        file.write_all_at(&run, from).expect("written");
    }

    /// Copies what is published out of the volume, and judges that.
    fn snapshots(&self, promised: &Promised<'_>, verdict: &mut Verdict) {
        let copied = self.scratch.with_extension("copied");
        fs::create_dir_all(copied.join("snapshots")).expect("a directory");
        let debugfs = |orders: &[String]| {
            let file = self.scratch.with_extension("orders");
            fs::write(&file, orders.join("\n")).expect("written");
            run(tool("debugfs").arg("-f").arg(file).arg(self.scratch))
        };
        // `/INODE/MODE/UID/GID/NAME/SIZE/`, a line each.
        let listed = debugfs(&["ls -p /snapshots".into()]).said;
        let names = || listed.lines().filter_map(|line| line.split('/').nth(5));
        for Published { id, .. } in promised.published.iter().filter(|s| s.pinned) {
            if !names().any(|name| name.strip_suffix(PIN) == Some(id)) {
                verdict.lost.push(format!("{id} is no longer pinned"));
            }
        }
        let published = |name: &&str| !name.contains('.') || name.ends_with(".json");
        let to = copied.display();
        let mut orders: Vec<String> = names()
            .filter(published)
            .map(|name| format!("rdump /snapshots/{name} {to}/snapshots"))
            .collect();
        orders.push(format!("rdump /latest {to}"));
        let dumped = debugfs(&orders);
        if let Err(why) = dumped.accept(&[0]) {
            verdict.torn.push(format!("debugfs cannot read it: {why}"));
        }
        self.judge_copy(&copied, promised, verdict);
        fs::remove_dir_all(&copied).expect("removed");
    }

    fn judge_copy(&self, copied: &Path, promised: &Promised<'_>, verdict: &mut Verdict) {
        let snapshots = copied.join("snapshots");
        let has_record = |id: &str| snapshots.join(format!("{id}.json")).is_file();
        let source = self.source.trim_start_matches('/');
        let read = |id: &str| {
            let tree = snapshots.join(id).join(source);
            tree.is_dir().then(|| on_disk(&tree))
        };
        for Published { id, tree, .. } in &promised.published {
            if !has_record(id) || read(id).as_ref() != Some(*tree) {
                let why = format!("the snapshot {id} is gone or damaged");
                verdict.lost.push(why);
            }
        }
        let entries = fs::read_dir(&snapshots).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        for id in names.filter(|name| !name.contains('.')) {
            let mut published = promised.published.iter();
            let is_promised = published.any(|snapshot| snapshot.id == id);
            if promised.deleted.contains(&id.as_str()) {
                verdict.torn.push(format!("the snapshot {id} is back"));
            }
            // Not yet promised, but there: then all of it.
            let whole = || has_record(&id) && read(&id).is_some_and(|t| self.trees.contains(&t));
            if !is_promised && !whole() {
                let why = format!("the snapshot {id} is published in part");
                verdict.torn.push(why);
            }
        }
        let latest = copied.join("latest");
        if fs::symlink_metadata(&latest).is_ok() && fs::metadata(&latest).is_err() {
            verdict.torn.push("`latest` leads nowhere".into());
        }
    }
}

struct Ran {
    code: Option<i32>,
    said: String,
}

fn run(command: &mut Command) -> Ran {
    let output = output(command);
    Ran {
        code: output.status.code(),
        said: String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr),
    }
}

impl Ran {
    fn accept(self, codes: &[i32]) -> Result<(), String> {
        match self.code {
            Some(code) if codes.contains(&code) => Ok(()),
            code => Err(format!("exit code {code:?}: {}", self.said)),
        }
    }
}
