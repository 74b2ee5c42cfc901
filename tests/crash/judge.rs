//! Whether an image that a crash has left is what was promised.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use ext4_view::{Ext4, Ext4Error, PathBuf};

use super::common::{output, tool};
use super::history::{BLOCK, History};
use super::kernel;
use super::tree::{Tree, in_image};

/// What was found wrong, one sentence each.
#[derive(Default)]
pub struct Verdict {
    /// Of what was published before the last flush.
    pub lost: Vec<String>,
    /// Of what is there.
    pub torn: Vec<String>,
}

/// A snapshot that a run has said to be published, and the tree that it is of.
pub struct Published<'a> {
    pub id: &'a str,
    pub tree: &'a Tree,
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
        promised: &[Published<'_>],
        by_kernel: bool,
    ) -> Verdict {
        let mut verdict = Verdict::default();
        self.open_header(image);
        self.put_together(image);
        if by_kernel {
            verdict.lost = kernel::judge(self.scratch, self.source, promised);
        }
        let replay = run(tool("e2fsck")
            .args(["-fy", "-E", "journal_only"])
            .arg(self.scratch));
        if let Err(why) = replay.accept(&[0, 1]) {
            verdict
                .torn
                .push(format!("the journal is not replayed: {why}"));
        }
        let check = run(tool("e2fsck").arg("-fn").arg(self.scratch));
        if let Err(why) = check.accept(&[0]) {
            verdict.torn.push(format!("e2fsck finds errors: {why}"));
        }
        match Ext4::load_from_path(self.scratch) {
            Ok(filesystem) => self.snapshots(&filesystem, promised, &mut verdict),
            Err(error) => verdict.torn.push(format!("no filesystem: {error}")),
        }
        verdict
    }

    /// Panics when it does not open: it is written once, before anything is promised.
    fn open_header(&mut self, image: &BTreeMap<u64, u32>) {
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
            );
            self.opened = header;
        }
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

    fn snapshots(&self, filesystem: &Ext4, promised: &[Published<'_>], verdict: &mut Verdict) {
        let names = list(filesystem, "/snapshots").unwrap_or_default();
        let read = |id: &str| in_image(filesystem, &format!("/snapshots/{id}{}", self.source));
        for snapshot in promised {
            let id = snapshot.id;
            let whole = match read(id) {
                Ok(tree) if tree == *snapshot.tree => names.contains(&format!("{id}.json")),
                Ok(_) | Err(_) => false,
            };
            if !whole {
                verdict
                    .lost
                    .push(format!("the snapshot {id} is gone or damaged"));
            }
        }
        let is_promised = |id: &str| promised.iter().any(|snapshot| snapshot.id == id);
        let published = names.iter().filter(|name| !name.contains('.'));
        for id in published.filter(|id| !is_promised(id)) {
            // Not yet promised, but there: then all of it.
            let recorded = names.contains(&format!("{id}.json"));
            if !recorded || !read(id).is_ok_and(|tree| self.trees.contains(&tree)) {
                verdict
                    .torn
                    .push(format!("the snapshot {id} is published in part"));
            }
        }
        let latest = PathBuf::try_from("/latest").expect("a path");
        if filesystem.symlink_metadata(&latest).is_ok() && filesystem.metadata(&latest).is_err() {
            verdict.torn.push("`latest` leads nowhere".into());
        }
    }
}

fn list(filesystem: &Ext4, path: &str) -> Result<Vec<String>, Ext4Error> {
    let mut names = Vec::new();
    for entry in filesystem.read_dir(path)? {
        names.push(entry?.file_name().display().to_string());
    }
    names.retain(|name| name != "." && name != "..");
    Ok(names)
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
