//! Everything dies at once, as at the end of a service, of a machine, or of its memory.

use super::*;

/// Rounds for each order. A hang shows in one of three at the latest where a server is a member of
/// its own mount namespace.
const ROUNDS: u64 = 8;

/// The moments are those of a backup that is mounted, copies, and syncs.
#[test]
fn everything_can_be_killed_at_once_in_any_order() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let source = sandbox.dir("source");
    plain_tree(&source, 300);
    large_file(&source.join("large"), 300 * MIB, 1);
    place.init("100G").ok();
    let empty = common::stored_bytes(&place.stored);
    let session = |line: &str| line.contains("session-process");
    let keeper = |line: &str| line.trim_end().ends_with("cat");
    let mut seen = 0;
    for round in 0..3 * ROUNDS {
        let backup = place.backup(&source).spawn();
        wait_for("a mounted filesystem", Duration::from_secs(60), || {
            sandbox.processes().iter().any(|(_, line)| keeper(line))
        });
        std::thread::sleep(Duration::from_millis(round * 97 % 800));
        let alive = sandbox.processes();
        seen += u64::from(alive.iter().any(|(_, line)| session(line)));
        match round % 3 {
            0 => sandbox.kill_processes_by(|(_, line)| session(line)),
            1 => sandbox.kill_processes_by(|(_, line)| !session(line)),
            // As a control group is killed, in no order that anybody knows.
            _ => sandbox.kill_processes_by(|(pid, _)| u64::from(*pid).wrapping_mul(round) % 7),
        }
        drop(backup);
        sandbox.assert_nothing_left();
    }
    assert!(seen > 2 * ROUNDS, "only {seen} sessions were killed");
    assert!(common::stored_bytes(&place.stored) > empty);
    place.backup(&source).ok();
    place.assert_latest_is(&source);
    place.assert_closed();
}

/// Its namespace is that of the command's caller, so nothing of it dies with the mounts; relative
/// paths and a caller's chroot mean the same to it as to the command.
#[test]
fn a_session_stands_where_its_command_came_from() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    large_file(&source.join("large"), 100 * MIB, 1);
    place.init("10G").ok();
    let store = sandbox.path("store");
    let backup = |location: &str| Program::new(&sandbox, "backup").arg(location).arg(&source);
    let running = backup("a.img").cwd(&store).spawn();
    let mut session = None;
    wait_for("the session", Duration::from_secs(30), || {
        let processes = sandbox.processes();
        let found = processes
            .iter()
            .find(|(_, line)| line.contains("session-process"));
        session = found.map(|(pid, _)| PathBuf::from(format!("/proc/{pid}")));
        session.is_some()
    });
    let session = session.expect("just seen");
    let ours = fs::read_link("/proc/self/ns/mnt").expect("readable");
    let command = PathBuf::from(format!("/proc/{}", running.pid()));
    assert_eq!(
        fs::read_link(session.join("ns/mnt")).expect("readable"),
        ours
    );
    assert_ne!(
        fs::read_link(command.join("ns/mnt")).expect("readable"),
        ours
    );
    assert_eq!(fs::read_link(session.join("cwd")).expect("readable"), store);
    running.wait().code(0);
    place.assert_closed();

    let root = sandbox.dir("root");
    let script = "mount --rbind / \"$1\"; mount --bind \"$2\" \"$1/mnt\"";
    let within = backup("/mnt/a.img").after(script, &[&root, &store]);
    within.through([Path::new("/usr/sbin/chroot"), &root]).ok();
    assert_eq!(place.ids().len(), 2);
    place.assert_closed();
}

/// Without `--wait`: one backs up, the others say who does.
#[test]
fn of_several_that_start_at_once_exactly_one_writes() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let source = sandbox.dir("source");
    large_file(&source.join("large"), 60 * MIB, 1);
    place.init("10G").ok();
    // Slow enough that nobody is done before all have asked for the image.
    let backup = || {
        place
            .backup(&source)
            .args(["--limit-upload", "20M"])
            .spawn()
    };
    let racing: Vec<Running> = (0..4).map(|_| backup()).collect();
    let ran: Vec<Ran> = racing.into_iter().map(Running::wait).collect();
    let codes: Vec<Option<i32>> = ran.iter().map(|ran| ran.status.code()).collect();
    let of = |code| codes.iter().filter(|c| **c == Some(code)).count();
    assert_eq!((of(0), of(11)), (1, 3), "{codes:?}");
    assert_eq!(place.ids().len(), 1);
    place.assert_latest_is(&source);
    place.assert_closed();
}
