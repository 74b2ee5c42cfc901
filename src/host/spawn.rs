//! What a child process inherits from us beyond its arguments: whether it dies with us, and which
//! signals it hears.
//!
//! A terminal sends Ctrl-C to every process of the foreground group. The ssh below an image must
//! not hear it, or the link would be gone before the last writes went over it; so such a child
//! runs deaf, and dies with its parent instead.
//!
//! This is the only place that runs code between fork and exec. There only async-signal-safe
//! calls are allowed (`signal-safety(7)`): bare system calls, no allocation, no lock.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use super::view::Door;

/// The signals that a terminal, a service manager or an administrator ends programs with.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// What shall become of a child. The default is what `fork(2)` gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// The kernel kills it (SIGKILL) when its parent dies, however that dies.
    ///
    /// The parent is the **thread** that spawns it (`PR_SET_PDEATHSIG` in `prctl(2)`): spawn from
    /// a thread that lives as long as the child shall. A child that is set-user-ID or has file
    /// capabilities (fusermount3) loses this at exec.
    pub die_with_parent: bool,
    /// SIGINT, SIGTERM, SIGHUP and SIGQUIT are ignored, also after exec, unless the program sets
    /// handlers of its own. OpenSSH's client sets them only for signals that are not ignored.
    pub deaf_to_signals: bool,
    /// It leads a process group of its own: a terminal's Ctrl-C does not reach it, and it cannot
    /// read from that terminal.
    pub new_group: bool,
}

/// Arranges `fate` for the next spawns of `command`, which must happen in this process (not after
/// another fork).
///
/// With `die_with_parent`, a spawn fails with `ESRCH` in the child if the parent died first.
pub fn prepare(command: &mut Command, fate: Fate) {
    if fate.new_group {
        command.process_group(0);
    }
    if !fate.die_with_parent && !fate.deaf_to_signals {
        return; // std can then use vfork
    }
    let parent = rustix::process::getpid();
    // SAFETY: the closure makes prctl, getppid and sigaction calls and nothing else; it captures
    // two Copy values, and an error made of an errno allocates nothing.
    unsafe {
        command.pre_exec(move || apply(fate, parent));
    }
}

/// Keeps our own settings (`E2EBAK_*`, a passphrase among them) out of the environment of the next
/// spawns of `command`.
pub fn hide_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"E2EBAK_") {
            command.env_remove(name);
        }
    }
}

/// Has the next spawns of `command` start on the other side of `door`, where its program is also
/// looked up.
pub fn start_behind(command: &mut Command, door: Arc<Door>) {
    // SAFETY: four system calls; an error made of an errno allocates nothing.
    unsafe {
        command.pre_exec(move || Ok(door.pass()?));
    }
}

fn apply(fate: Fate, parent: Pid) -> io::Result<()> {
    if fate.deaf_to_signals {
        for signal in ENDING {
            ignore(signal)?;
        }
    }
    if fate.die_with_parent {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the line above; nobody would send the signal then.
        if getppid() != Some(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
    Ok(())
}

fn ignore(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: SIG_IGN runs no code of ours; signal(2) is async-signal-safe.
    match unsafe { libc::signal(signal, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `script` in a shell and gives back its output.
    fn shell(fate: Fate, script: &str) -> String {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        prepare(&mut command, fate);
        let output = command.output().expect("sh runs");
        String::from_utf8(output.stdout).expect("text")
    }

    #[test]
    fn a_deaf_child_and_its_programs_ignore_the_four_signals() {
        let mask = |fate| {
            let status = shell(fate, "exec grep SigIgn /proc/self/status");
            let hex = status.split_whitespace().nth(1).expect("SigIgn: <hex>");
            u64::from_str_radix(hex, 16).expect("hex")
        };
        let four: u64 = ENDING.iter().map(|signal| 1 << (signal - 1)).sum();
        let deaf = Fate {
            deaf_to_signals: true,
            ..Fate::default()
        };
        assert_eq!(mask(deaf) & four, four);
        assert_eq!(mask(Fate::default()) & four, 0);
    }

    #[test]
    fn a_new_group_is_led_by_the_child() {
        let lead = |new_group| {
            let fate = Fate {
                new_group,
                ..Fate::default()
            };
            // Field 5 of stat is the process group.
            let text = shell(fate, "echo $$; cut -d' ' -f5 /proc/$$/stat");
            let mut lines = text.lines();
            lines.next() == lines.next()
        };
        assert!(lead(true) && !lead(false));
    }

    #[test]
    fn a_child_dies_with_the_thread_that_spawned_it() {
        let fate = Fate {
            die_with_parent: true,
            deaf_to_signals: true,
            new_group: false,
        };
        let spawn = move || {
            let mut command = Command::new("sleep");
            command.arg("60");
            prepare(&mut command, fate);
            command.spawn().expect("sleep runs")
        };
        let mut child = std::thread::spawn(spawn).join().expect("no panic");
        let status = child.wait().expect("waits");
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(status.signal(), Some(libc::SIGKILL));
    }
}
