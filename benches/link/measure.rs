//! Processor time and memory of processes, and medians.

use std::fs;
use std::ops::Range;
use std::time::Duration;

use crate::common::with_descendants;

/// Processor time of a process, all its descendants, and those it has waited for.
pub fn cpu_of_family(pid: u32) -> Duration {
    with_descendants(pid).into_iter().map(cpu_of).sum()
}

fn cpu_of(pid: u32) -> Duration {
    ticks(pid, 11..15)
}

/// The sum of fields of proc(5): 11 and 12 are user and system time, 13 and 14 the same of children
/// that were waited for.
fn ticks(pid: u32, fields: Range<usize>) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(") ").next().unwrap_or_default();
    let all: Vec<&str> = after_name.split(' ').collect();
    let ticks = fields.filter_map(|i| all.get(i)?.parse::<u64>().ok());
    Duration::from_millis(ticks.sum::<u64>() * 10) // USER_HZ is 100
}

/// Processor time of the engine in this process, its ssh included.
pub fn engine_cpu() -> Duration {
    let own = ticks(std::process::id(), 11..13);
    // Other children of ours are started by way of setpriv, and are no ssh.
    let children = fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let children = children
        .map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default())
        .collect::<String>();
    let children = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    let name = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let ssh = children.filter(|pid| name(pid).trim() == "ssh");
    own + ssh.map(cpu_of_family).sum::<Duration>()
}

/// The most memory that a process has had, in MiB.
pub fn peak_memory_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(f64::NAN) / 1024.0
}

pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50)
}

pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values
        .get(last * percent / 100)
        .copied()
        .unwrap_or(f64::NAN)
}

/// What OpenSSL takes for AES-256-XTS in sectors of 4096 bytes, in seconds of processor time a GiB.
pub fn openssl_xts_seconds_per_gib() -> f64 {
    let mut command = crate::common::tool("openssl");
    let speed = ["speed", "-seconds", "1", "-bytes", "4096", "-mr", "-evp"];
    let text = crate::common::run(command.args(speed).arg("aes-256-xts"));
    // +F:25:AES-256-XTS:6597892654.55, in bytes a second of processor time.
    let line = text.lines().find(|line| line.starts_with("+F:"));
    let rate = line.and_then(|line| line.rsplit(':').next()?.parse::<f64>().ok());
    (1_u64 << 30) as f64 / rate.expect("what openssl speed prints")
}
