//! What this machine is.

use std::fs;

use crate::units::KIB;

/// The host name, as `uname -n` prints it.
pub fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

/// Bytes of memory in all (`MemTotal` in `/proc/meminfo`); 1 GiB if that cannot be read.
pub fn memory_bytes() -> u64 {
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    });
    total.map_or(1 << 30, |kib| kib * KIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_a_name_and_memory() {
        assert!(!host_name().is_empty());
        assert!(memory_bytes() > 16 << 20 && memory_bytes() != 1 << 30);
    }
}
