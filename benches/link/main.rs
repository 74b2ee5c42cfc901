//! The whole stack beside sshfs, sftp and the bare engine, over a link with a delay: `scripts/bench-link`;
//! and restoring beside restic and borg: `scripts/bench-restore`.
//!
//! Everybody takes turns in every run, against one sshd, so that a busy machine slows all alike;
//! figures are medians over the runs, and ratios are taken within a run.

#[path = "../../tests/common/mod.rs"]
mod common;
mod ext4;
mod latency;
mod measure;
mod ours;
mod peers;
mod random;
mod recipe;
mod report;
mod restore;
mod rig;
mod sequential;
mod stop;
mod tree;
mod work;

use clap::Parser;

use report::Report;
use rig::Rig;

/// Measures e2ebak beside sshfs, sftp and its own engine without FUSE and encryption, over a link
/// with a delay.
///
/// Prints a Markdown table. Needs root, FUSE, sshd, sftp, sshfs, openssl and tar.
#[derive(Parser, Clone, Debug)]
#[command(name = "bench-link", bin_name = "scripts/bench-link")]
pub struct Args {
    /// Round trips in milliseconds
    #[arg(long, value_delimiter = ',', default_value = "0,20,50")]
    rtt: Vec<u64>,

    /// How often everything is measured; the medians count
    #[arg(long, default_value_t = 5)]
    runs: usize,

    /// Bound the link to so many Mbit/s in each direction
    #[arg(long)]
    mbit: Option<f64>,

    /// A short run that shows that everything works; its figures mean little
    #[arg(long)]
    quick: bool,

    /// Print one JSON object a row instead of the table
    #[arg(long)]
    json: bool,

    /// Write the table to this file too
    #[arg(long, value_name = "FILE")]
    markdown: Option<std::path::PathBuf>,

    /// Only these: sequential, random, latency, file, unpack, proxy
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,

    /// The server keeps its files on disk, in TMPDIR, and not in memory
    #[arg(long)]
    disk: bool,

    /// Compares what a dropped link does instead (scripts/compare-recipe)
    #[arg(long, hide = true)]
    recipe: bool,

    /// How long the link is down then, in seconds
    #[arg(long, hide = true, default_value_t = 5.0)]
    outage: f32,

    /// Restores beside restic and borg instead (scripts/bench-restore)
    #[arg(long, hide = true)]
    restore: bool,

    /// How many files there are then
    #[arg(long, hide = true, default_value_t = 50_000)]
    files: u32,

    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == part)
    }

    fn trips(&self) -> Vec<u64> {
        let mut trips = self.rtt.clone();
        trips.retain(|rtt| !self.quick || *rtt <= 20);
        trips
    }

    fn runs(&self) -> usize {
        if self.quick { 1 } else { self.runs.max(1) }
    }
}

fn main() {
    let args = Args::parse();
    assert!(rustix::process::geteuid().is_root(), "this needs root");
    stop::at_signals();
    let run = std::panic::AssertUnwindSafe(|| run(&args));
    match std::panic::catch_unwind(run) {
        Ok(()) => {}
        Err(_) if stop::asked() => std::process::exit(130),
        Err(_) => std::process::exit(1),
    }
}

fn run(args: &Args) {
    if args.recipe {
        let args = Args {
            quick: true,
            ..args.clone()
        };
        let outage = std::time::Duration::from_secs_f32(args.outage);
        return recipe::compare(&Rig::new(&args), outage);
    }
    let mut report = Report::new(args);
    if args.restore {
        restore::compare(&Rig::empty(args), &args.trips(), &mut report);
        return report.print();
    }
    if args.wants("proxy") {
        sequential::proxy_alone(&mut report);
    }
    let rig = Rig::new(args);
    let trips = args.trips();
    for &rtt in &trips {
        for run in 0..args.runs() {
            let turn = rig.turn(rtt, run);
            eprintln!("-- {rtt} ms, run {} of {}", run + 1, args.runs());
            if args.wants("sequential") {
                sequential::measure(&turn, &mut report);
            }
            if args.wants("random") {
                random::measure(&turn, &mut report);
            }
            if args.wants("latency") {
                latency::measure(&turn, &mut report);
            }
            turn.end(&mut report);
            if args.wants("file") {
                ext4::measure_file(&rig, rtt, &mut report);
            }
        }
    }
    if args.wants("unpack") {
        ext4::measure_unpacking(&rig, &trips, &mut report);
    }
    report.judge();
    drop(rig);
    report.print();
}
