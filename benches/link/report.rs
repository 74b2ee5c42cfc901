//! Rows of figures, judged and printed.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Map, Value, json};

use crate::measure::{median, openssl_xts_seconds_per_gib};
use crate::{Args, common, ext4, latency, random, sequential};

pub const OURS: &str = "e2ebak";
pub const SSHFS: &str = "sshfs";
pub const SFTP: &str = "sftp";
pub const RESTIC: &str = "restic";
pub const BORG: &str = "borg";
pub const ENGINE: &str = "engine";
const TOGETHER: &str = "sftp + openssl";

const MEMORY: &str = "session process, most memory";

/// What is measured, and its heading.
const METRICS: [(&str, &str, usize); 11] = [
    ("mb_per_s", "MB/s", 0),
    (
        "ops_per_s",
        "Requests a second (writes: the sync included)",
        0,
    ),
    (
        "acknowledged_per_s",
        "Writes acknowledged a second, before the sync",
        0,
    ),
    ("median_round_trips", "Latency in round trips, median", 2),
    ("p95_round_trips", "Latency in round trips, 95 of 100", 2),
    ("median_ms", "Latency in ms, median", 2),
    ("seconds", "Seconds", 2),
    ("mib_sent", "MiB that the server has sent", 1),
    ("files_per_s", "Files a second", 0),
    (
        "cpu_s_per_gib",
        "Processor seconds a GiB, of all client processes",
        2,
    ),
    ("rss_mib", "Resident memory in MiB", 0),
];

struct Row {
    what: String,
    rtt: u64,
    tool: String,
    samples: BTreeMap<&'static str, Vec<f64>>,
}

struct Judgement {
    what: String,
    rtt: u64,
    tools: String,
    ratio: f64,
    target: f64,
    at_least: bool,
}

pub struct Report {
    args: Args,
    rows: Vec<Row>,
    judgements: Vec<Judgement>,
    notes: Vec<String>,
    started: std::time::Instant,
    /// What else the machine was doing then.
    load: String,
}

impl Report {
    pub fn new(args: &Args) -> Self {
        Report {
            args: args.clone(),
            rows: Vec::new(),
            judgements: Vec::new(),
            notes: Vec::new(),
            started: std::time::Instant::now(),
            load: load(),
        }
    }

    /// A line for the heading.
    pub fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// One sample.
    pub fn add(
        &mut self,
        what: impl AsRef<str>,
        rtt: u64,
        tool: &str,
        metric: &'static str,
        value: f64,
    ) {
        let what = what.as_ref();
        eprintln!("   {what:<42} {rtt:>3} ms  {tool:<8} {metric:<20} {value:>10.2}");
        let same = |row: &Row| row.what == what && row.rtt == rtt && row.tool == tool;
        let at = self.rows.iter().position(same).unwrap_or_else(|| {
            self.rows.push(Row {
                what: what.into(),
                rtt,
                tool: tool.into(),
                samples: BTreeMap::new(),
            });
            self.rows.len() - 1
        });
        self.rows[at].samples.entry(metric).or_default().push(value);
    }

    pub fn memory(&mut self, rtt: u64, mib: f64) {
        self.add(MEMORY, rtt, OURS, "rss_mib", mib);
    }

    fn samples(&self, what: &str, rtt: u64, tool: &str, metric: &str) -> &[f64] {
        let same = |row: &&Row| row.what == what && row.rtt == rtt && row.tool == tool;
        let row = self.rows.iter().find(same);
        row.and_then(|row| row.samples.get(metric))
            .map_or(&[], Vec::as_slice)
    }

    /// The median of the runs' ratios; `None` when one of the two was not measured.
    fn ratio(&self, what: &str, rtt: u64, over: &str, metric: &str) -> Option<f64> {
        let ours = self.samples(what, rtt, OURS, metric);
        let theirs = self.samples(what, rtt, over, metric);
        let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
        (!ratios.is_empty()).then(|| median(&ratios))
    }

    fn judge_one(&mut self, what: &str, rtt: u64, over: &str, ratio: Option<f64>, target: Target) {
        let (target, at_least) = match target {
            Target::AtLeast(target) => (target, true),
            Target::AtMost(target) => (target, false),
        };
        let Some(ratio) = ratio else { return };
        let tools = match over {
            "" => OURS.to_string(),
            over => format!("{OURS} / {over}"),
        };
        self.judgements.push(Judgement {
            what: what.into(),
            rtt,
            tools,
            ratio,
            target,
            at_least,
        });
    }

    /// Compares with the targets.
    pub fn judge(&mut self) {
        let mut trips: Vec<u64> = self.rows.iter().map(|row| row.rtt).collect();
        trips.sort_unstable();
        trips.dedup();
        for &rtt in &trips {
            for what in [sequential::READ, sequential::WRITE] {
                let over_sftp = match rtt {
                    0..10 => 0.9,
                    10..40 => 2.0,
                    _ => 5.0,
                };
                for (over, target) in [(SFTP, over_sftp), (SSHFS, 0.9)] {
                    let ratio = self.ratio(what, rtt, over, "mb_per_s");
                    self.judge_one(what, rtt, over, ratio, Target::AtLeast(target));
                }
            }
            let what = random::read_at(64);
            let ratio = self.ratio(&what, rtt, ENGINE, "ops_per_s");
            self.judge_one(&what, rtt, ENGINE, ratio, Target::AtLeast(1.0 / 1.5));
            let trips = self.samples(latency::WHAT, rtt, OURS, "median_round_trips");
            let trips = (!trips.is_empty()).then(|| median(trips));
            let what = format!("{}, round trips", latency::WHAT);
            self.judge_one(&what, rtt, "", trips, Target::AtMost(1.3));
        }
        self.judge_cpu(&trips);
        if let [first, .., last] = trips[..] {
            let seconds = |rtt| median(self.samples(ext4::UNPACK, rtt, OURS, "seconds"));
            let ratio = seconds(last) / seconds(first);
            let what = format!("{}, time over that at {first} ms", ext4::UNPACK);
            let ratio = (!ratio.is_nan()).then_some(ratio);
            self.judge_one(&what, last, "", ratio, Target::AtMost(1.5));
        }
        let memory = self.rows.iter().filter(|row| row.tool == OURS);
        let most = memory
            .filter_map(|row| row.samples.get("rss_mib"))
            .flatten()
            .copied()
            .reduce(f64::max);
        let longest = trips.last().copied().unwrap_or(0);
        self.judge_one(
            "resident memory, MiB",
            longest,
            "",
            most,
            Target::AtMost(300.0),
        );
    }

    fn judge_cpu(&mut self, trips: &[u64]) {
        if !self.args.wants("sequential") {
            return;
        }
        let xts = openssl_xts_seconds_per_gib();
        for &rtt in trips {
            for what in [sequential::READ, sequential::WRITE] {
                let sftp = self.samples(what, rtt, SFTP, "cpu_s_per_gib").to_vec();
                for seconds in sftp {
                    self.add(what, rtt, TOGETHER, "cpu_s_per_gib", seconds + xts);
                }
                let ratio = self.ratio(what, rtt, TOGETHER, "cpu_s_per_gib");
                let named = format!("{what}, processor time");
                self.judge_one(&named, rtt, TOGETHER, ratio, Target::AtMost(1.3));
            }
        }
    }

    pub fn print(&self) {
        let text = self.markdown();
        if let Some(path) = &self.args.markdown {
            std::fs::write(path, &text).expect("the file for the table");
        }
        match self.args.json {
            true => self.json(),
            false => print!("{text}"),
        }
    }

    fn json(&self) {
        for row in &self.rows {
            let mut object = Map::new();
            object.insert("what".into(), json!(row.what));
            object.insert("rtt_ms".into(), json!(row.rtt));
            object.insert("tool".into(), json!(row.tool));
            for (metric, samples) in &row.samples {
                object.insert((*metric).into(), json!(rounded(median(samples))));
                object.insert("runs".into(), json!(samples.len()));
            }
            println!("{}", Value::Object(object));
        }
        for judgement in &self.judgements {
            let object = json!({
                "what": judgement.what,
                "rtt_ms": judgement.rtt,
                "tool": judgement.tools,
                "ratio": rounded(judgement.ratio),
                "target": rounded(judgement.target),
                "target_is": if judgement.at_least { "at least" } else { "at most" },
                "met": judgement.met(),
            });
            println!("{object}");
        }
    }

    fn markdown(&self) -> String {
        let mut text = self.heading();
        if !self.judgements.is_empty() {
            text.push_str("\n## Targets\n\n| what | RTT ms | of | measured | target | |\n");
            text.push_str("|---|---:|---|---:|---:|---|\n");
        }
        for j in &self.judgements {
            let sign = if j.at_least { "≥" } else { "≤" };
            let met = if j.met() { "ok" } else { "**missed**" };
            let (what, rtt, tools) = (&j.what, j.rtt, &j.tools);
            let line = format!(
                "| {what} | {rtt} | {tools} | {:.2} | {sign} {:.2} | {met} |\n",
                j.ratio, j.target
            );
            text.push_str(&line);
        }
        for (metric, heading, digits) in METRICS {
            text.push_str(&self.pivot(metric, heading, digits));
        }
        text
    }

    /// A table of one metric, the tools side by side.
    fn pivot(&self, metric: &str, heading: &str, digits: usize) -> String {
        let rows: Vec<&Row> = self
            .rows
            .iter()
            .filter(|row| row.samples.contains_key(metric))
            .collect();
        let mut tools: Vec<&str> = Vec::new();
        let mut lines: Vec<(&str, u64)> = Vec::new();
        for row in &rows {
            if !tools.contains(&row.tool.as_str()) {
                tools.push(&row.tool);
            }
            if !lines.contains(&(row.what.as_str(), row.rtt)) {
                lines.push((&row.what, row.rtt));
            }
        }
        if rows.is_empty() {
            return String::new();
        }
        let order = [OURS, SSHFS, SFTP, ENGINE, TOGETHER, RESTIC, BORG];
        tools.sort_by_key(|tool| order.iter().position(|o| o == tool));
        let mut whats: Vec<&str> = lines.iter().map(|(what, _)| *what).collect();
        whats.dedup();
        lines.sort_by_key(|(what, rtt)| (whats.iter().position(|w| w == what), *rtt));
        let mut text = format!("\n## {heading}\n\n| what | RTT ms |");
        let _ = writeln!(text, " {} |", tools.join(" | "));
        let _ = writeln!(text, "|---|---:|{}", "---:|".repeat(tools.len()));
        for (what, rtt) in lines {
            let _ = write!(text, "| {what} | {rtt} |");
            for tool in &tools {
                let samples = self.samples(what, rtt, tool, metric);
                match samples.is_empty() {
                    true => text.push_str(" |"),
                    false => drop(write!(text, " {:.digits$} |", median(samples))),
                }
            }
            text.push('\n');
        }
        text
    }

    fn heading(&self) -> String {
        let line = |program: &str, args: &[&str]| {
            let output = common::output(common::tool(program).args(args));
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            text.lines().next().unwrap_or_default().trim().to_string()
        };
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu.lines().find_map(|l| l.strip_prefix("model name\t: "));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let store = if self.args.disk {
            "on disk"
        } else {
            "in memory (tmpfs)"
        };
        let bound = self
            .args
            .mbit
            .map_or("no bound on the rate".to_string(), |mbit| {
                format!("bounded to {mbit} Mbit/s a direction")
            });
        let (title, script, peers) = match self.args.restore {
            false => ("Benchmarks", "bench-link", line("sshfs", &["--version"])),
            true => {
                let peers = [line("restic", &["version"]), line("borg", &["--version"])];
                (
                    "Restoring over a long link",
                    "bench-restore",
                    peers.join(", "),
                )
            }
        };
        let text = format!(
            "# {title}\n\nMade by `scripts/{script}{}` on {}, in {} minutes.\n\n\
             - {cores} x {}, Linux {}; load average {} before, {} after\n- {}, {peers}\n\
             - the server's files are {store}; {bound}\n\
             - medians of {} runs, ratios within a run; everybody takes turns in every run\n",
            if self.args.quick { " --quick" } else { "" },
            line("date", &["-u", "+%Y-%m-%d"]),
            self.started.elapsed().as_secs() / 60,
            cpu.unwrap_or("processor"),
            line("uname", &["-r"]),
            self.load,
            load(),
            line("ssh", &["-V"]),
            self.args.runs(),
        );
        let notes = self.notes.iter().map(|note| format!("- {note}\n"));
        text + &notes.collect::<String>()
    }
}

/// Processes that wanted to run, over the last minute.
fn load() -> String {
    let all = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    all.split(' ').next().unwrap_or_default().to_string()
}

enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Judgement {
    fn met(&self) -> bool {
        match self.at_least {
            true => self.ratio >= self.target,
            false => self.ratio <= self.target,
        }
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}
