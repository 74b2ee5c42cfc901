//! How much the server lets its user store where the image is, by the server's own `quota(1)`.
//!
//! SFTP does not tell, and `statvfs` counts what is free for everybody. Where no commands run, or
//! that program is not there, it stays unknown.

use super::LinkSettings;
use super::server_shell::Shell;
use crate::error::Result;
use crate::location::Location;
use crate::units::KIB;

/// Tells the device that holds the image, and what quota(1) says of it in lines that are not folded.
const QUOTA: &str = r#"sh -c 'IFS= read -r f;
if command -v quota > /dev/null 2>&1; then :; else echo "e2ebak no quota there"; exit 0; fi;
echo "e2ebak on $(df -P -- "$(dirname -- "$f")" 2> /dev/null | tail -n 1)";
quota -w -u -g 2> /dev/null | while IFS= read -r x; do echo "e2ebak q $x"; done;
echo "e2ebak done"'"#;

/// What a user or group may store, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    pub used: u64,
    /// The hard limit, or the soft one where there is no other. `None`: no limit.
    pub limit: Option<u64>,
}

/// The tightest quota there is for us where the image is; `None` when that cannot be found out.
pub fn quota(location: &Location, link: &LinkSettings) -> Result<Option<Quota>> {
    let Some(shell) = Shell::start(location, link, QUOTA)? else {
        return Ok(None);
    };
    let Some(on) = shell.answer().ok().filter(|line| line.starts_with("on ")) else {
        return Ok(None);
    };
    let mut lines = Vec::new();
    loop {
        match shell.answer() {
            Ok(line) if line == "done" => return Ok(tightest(&on, &lines)),
            Ok(line) => lines.push(line),
            Err(_) => return Ok(None),
        }
    }
}

/// `on` is the line of df -P. Of each quota there is a line: device, blocks of 1 KiB in use (with a
/// star where that is too many), soft and hard limit, and more; or only that there is none.
fn tightest(on: &str, lines: &[String]) -> Option<Quota> {
    let device = on.strip_prefix("on ")?.split_whitespace().next()?;
    let mut quotas = Vec::new();
    let mut none = false;
    for line in lines {
        let mut words = line.strip_prefix("q ")?.split_whitespace();
        if line.starts_with("q Disk quotas for ") {
            none = true;
        }
        if words.next() != Some(device) {
            continue;
        }
        let mut kib = || -> Option<u64> {
            let number: u64 = words.next()?.trim_end_matches('*').parse().ok()?;
            number.checked_mul(KIB)
        };
        let (used, soft, hard) = (kib()?, kib()?, kib()?);
        let limit = [hard, soft].into_iter().find(|limit| *limit > 0);
        quotas.push(Quota { used, limit });
    }
    let left = |quota: &Quota| {
        let left = quota.limit.map(|limit| limit.saturating_sub(quota.used));
        left.unwrap_or(u64::MAX)
    };
    let free = Quota {
        used: 0,
        limit: None,
    };
    // It speaks of us and names no quota on this device.
    quotas.into_iter().min_by_key(left).or(none.then_some(free))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: &str = "on /dev/sda2 4031680 203780 3602556 6% /home";

    fn told(text: &str) -> Option<Quota> {
        let lines: Vec<String> = text.lines().map(|line| format!("q {line}")).collect();
        tightest(ON, &lines)
    }

    #[test]
    fn the_tightest_quota_of_the_right_device_counts() {
        let both = "Disk quotas for user u4 (uid 1004): \n\
            Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n\
            /dev/sda1     900    1000    1000              10       0       0        \n\
            /dev/sda2  204800*  100000  300000   6days      2       0       0        \n\
            Disk quotas for group g4 (gid 1004): \n\
            Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n\
            /dev/sda2  204800       0  250000              2       0       0";
        let quota = told(both).expect("told");
        let (used, limit) = (204_800 * KIB, Some(250_000 * KIB));
        assert_eq!((quota.used, quota.limit), (used, limit));
        let soft = both.replace("300000", "0").replace("250000", "0");
        assert_eq!(told(&soft).expect("told").limit, Some(100_000 * KIB));
    }

    #[test]
    fn none_is_none_and_nonsense_is_unknown() {
        let none = told("Disk quotas for user u4 (uid 1004): none").expect("told");
        assert_eq!(none.limit, None);
        assert_eq!(told(""), None);
        assert_eq!(told("/dev/sda2 many 0 0"), None);
        assert_eq!(told("/dev/sda2 18446744073709551615 0 0"), None);
        assert_eq!(tightest("on ", &[]), None);
    }
}
