//! What a check has found, and what to do about it.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use crate::image::DataRead;
use crate::snapshot;
use crate::ui::say;
use crate::units::Bytes;

pub const HEADER_ADVICE: &str = "run `cryptsetup repair IMAGE` where the image is: it writes the \
    damaged copy anew from the good one; `cryptsetup luksHeaderBackup` keeps a spare one elsewhere";
pub const FILESYSTEM_ADVICE: &str = "restore or copy what you cannot lose (`e2ebak restore`, \
    `e2ebak copy`); then, on a copy of the image, `cryptsetup open` it and have e2fsck -f repair it";
pub const RECORD_ADVICE: &str = "it does not count as a snapshot and no policy deletes it; `e2ebak mount` \
    the image and look into snapshots/; what you do not need may be removed there";
pub const DATA_ADVICE: &str = "look into the server's disk before anything else; the files with these \
    inodes (`find MOUNTPOINT/snapshots -inum N`) are damaged; a new backup of changed files \
    does not repair what older snapshots share";

/// What is wrong, and what to do.
pub struct Finding {
    part: Part,
    what: String,
    advice: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Header,
    Filesystem,
    Snapshots,
    Data,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Header => "header",
            Part::Filesystem => "filesystem",
            Part::Snapshots => "snapshots",
            Part::Data => "data",
        })
    }
}

#[derive(Default)]
pub struct Report {
    pub findings: Vec<Finding>,
    /// What was looked at, one sentence each.
    checked: Vec<(Part, String)>,
    /// What was not looked at, and why.
    pub left_out: Vec<String>,
    pub snapshots: Option<snapshot::Checked>,
    pub data: Option<DataRead>,
}

impl Report {
    pub fn wrong(&mut self, part: Part, what: impl Into<String>, advice: &str) {
        let (what, advice) = (what.into(), advice.into());
        self.findings.push(Finding { part, what, advice });
    }

    pub fn fine(&mut self, part: Part, what: String) {
        self.checked.push((part, what));
    }

    /// Takes what came of reading the data.
    pub fn take_data(&mut self, read: DataRead) {
        if read.lost > 0 {
            let places = read.lost_at.iter().map(|(range, inode)| {
                format!(
                    "\n    {} bytes at {} (inode {inode})",
                    range.end - range.start,
                    range.start
                )
            });
            let places: String = places.collect();
            let what = format!(
                "the server has lost {} of what files hold: there are holes in the image{places}",
                Bytes(read.lost)
            );
            self.wrong(Part::Data, what, DATA_ADVICE);
        }
        if read.refused > 0 {
            let places = read.refused_at.iter().map(|(range, why)| {
                format!(
                    "\n    {} bytes at {}: {why}",
                    range.end - range.start,
                    range.start
                )
            });
            let places: String = places.collect();
            let what = format!("{} cannot be read{places}", Bytes(read.refused));
            self.wrong(Part::Data, what, DATA_ADVICE);
        }
        let mut what = format!("{} of {} read", Bytes(read.done), Bytes(read.total));
        if read.out_of_time {
            what += ", then the time was over";
        }
        self.fine(Part::Data, what);
        self.data = Some(read);
    }

    pub fn print(&self, quiet: bool) {
        if !quiet {
            for (part, what) in &self.checked {
                say!("{:<11} {what}", part.to_string());
            }
        }
        for why in &self.left_out {
            say!("warning: {why}");
        }
        for finding in &self.findings {
            say!("WRONG {}: {}", finding.part, finding.what);
            say!("  what to do: {}", finding.advice);
        }
        if self.findings.is_empty() && !quiet {
            say!("nothing is wrong with what was looked at");
        }
    }

    pub fn as_json(&self, took: Duration) -> Value {
        let findings = self.findings.iter().map(|finding| {
            let part = finding.part.to_string();
            json!({"part": part, "message": finding.what, "advice": finding.advice})
        });
        let data = self.data.as_ref().map(|read| {
            json!({
                "total_bytes": read.total, "chosen_bytes": read.chosen, "read_bytes": read.done,
                "lost_bytes": read.lost, "unreadable_bytes": read.refused,
                "out_of_time": read.out_of_time,
            })
        });
        let snapshots = self.snapshots.as_ref().map(|checked| {
            json!({
                "complete": checked.complete, "unfinished": checked.inflight,
                "files": checked.files,
            })
        });
        json!({
            "message_type": "summary",
            "version": 1,
            "sound": self.findings.is_empty(),
            "findings": findings.collect::<Vec<_>>(),
            "not_checked": self.left_out,
            "snapshots": snapshots,
            "data": data,
            "duration_seconds": took.as_secs_f64(),
        })
    }
}
