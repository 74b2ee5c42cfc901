//! A link that breaks, by the whole program: nobody but the clock notices, nothing is lost, and
//! after the deadline the end is clean.

#[path = "../common/mod.rs"]
mod common;

mod relay;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{
    Place, Program, Proxy, Ran, Running, Sandbox, Shape, Sshd, decrypt, is_clean, large_file,
    output, plain_tree, root_or_skip, run, stored_bytes, tool, tool_or_skip, wait_for,
};
use relay::{Act, Relay};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
/// What takes longer hangs.
const HANG: Duration = Duration::from_secs(60);

/// A server behind a proxy.
struct Far {
    sshd: Sshd,
    proxy: Proxy,
}

impl Far {
    fn new(sandbox: &Sandbox) -> Self {
        Far::with(sandbox, &[])
    }

    /// With more lines in the server's configuration.
    fn with(sandbox: &Sandbox, extra: &[&str]) -> Self {
        let sshd = Sshd::with(sandbox, extra);
        let proxy = Proxy::to_port(sshd.port(), Shape::default());
        Far { sshd, proxy }
    }

    fn place<'a>(&self, sandbox: &'a Sandbox) -> Place<'a> {
        let mut place = Place::over(sandbox, &self.sshd);
        let (near, far) = (self.sshd.port(), self.proxy.port());
        place.location = place
            .location
            .replacen(&near.to_string(), &far.to_string(), 1);
        let alias = format!("HostKeyAlias=[127.0.0.1]:{near}");
        // A connection that has fallen silent is given up after 3 s.
        for option in [&alias, "ServerAliveInterval=1"] {
            place.options.extend(["--ssh-option".into(), option.into()]);
        }
        place
    }

    fn drop_link(&self) {
        self.proxy.refuse(true);
        self.proxy.cut();
    }
}

fn source(sandbox: &Sandbox) -> PathBuf {
    let source = sandbox.dir("source");
    plain_tree(&source, 40);
    source
}

/// The newest snapshot is its source, and the volume is one that e2fsck likes.
fn is_whole(place: &Place, source: &Path) {
    place.assert_latest_is(source);
    place.assert_closed();
    let plain = decrypt(place.sandbox, &place.stored);
    is_clean(&plain.path);
    fs::remove_file(&plain.path).expect("removed");
}

/// A backup of something new, slow enough to be disturbed, when some of it has arrived.
fn under_way(place: &Place, source: &Path, seed: u64, options: &[&str]) -> Running {
    large_file(&source.join("large"), 14 * MIB, seed);
    let backup = place
        .backup(source)
        .args(["--limit-upload", "5M", "--json"]);
    let before = stored_bytes(&place.stored);
    let running = backup.args(options).spawn();
    wait_for("some data", HANG, || {
        stored_bytes(&place.stored) > before + 3 * MIB
    });
    running
}

/// What each SFTP server has been asked, a file for each.
struct Protocol(PathBuf);

impl Protocol {
    fn new(sandbox: &Sandbox) -> Self {
        Protocol(sandbox.dir("protocol"))
    }

    /// For the server's configuration.
    fn rule(&self) -> String {
        let server = tool("sftp-server").get_program().to_owned();
        let (server, into) = (server.display(), self.0.display());
        format!("ForceCommand exec {server} -e -l DEBUG 2>>{into}/$$")
    }

    fn servers(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(&self.0).expect("a directory");
        files.map(|file| file.expect("a file").path()).collect()
    }
}

/// Writes that these servers were asked for and have done.
fn writes(servers: &[PathBuf]) -> usize {
    let of_one = |file: &PathBuf| {
        let text = fs::read_to_string(file).expect("a protocol");
        text.lines()
            .filter(|line| line.contains(": write "))
            .count()
    };
    servers.iter().map(of_one).sum()
}

#[test]
fn a_connection_that_ends_in_any_way_is_made_anew() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let protocol = Protocol::new(&sandbox);
    let far = Far::with(&sandbox, &[&protocol.rule()]);
    let place = far.place(&sandbox);
    let source = source(&sandbox);
    place.init("200M").ok();
    let late = ["--late-writes", "4s"];

    // Killed on the server's side, and its ssh on ours.
    let running = under_way(&place, &source, 1, &late);
    far.sshd.cut_sessions();
    running.wait().code(0);
    is_whole(&place, &source);
    let running = under_way(&place, &source, 2, &late);
    let processes = sandbox.processes().into_iter();
    let ssh: Vec<_> = processes
        .filter(|(_, line)| line.contains("ControlMaster=yes"))
        .collect();
    assert!(!ssh.is_empty(), "no ssh to kill");
    ssh.iter()
        .for_each(|(pid, _)| common::kill(*pid, Signal::KILL));
    running.wait().code(0);
    is_whole(&place, &source);

    // Packets vanish; those under way arrive when ssh is dead and its successor is at work. Sometimes
    // none is: then it is done again.
    let mut runs = 2_u64;
    let mut landed_late = 0;
    while landed_late == 0 {
        runs += 1;
        assert!(runs <= 5, "no write landed late: this shows nothing");
        let running = under_way(&place, &source, runs, &late);
        let connections = far.proxy.connections();
        far.proxy.freeze_connected();
        std::thread::sleep(Duration::from_millis(500)); // what had passed the link is done by then
        let dead = protocol.servers();
        let in_time = writes(&dead);
        let more = || far.proxy.connections() > connections;
        wait_for("a second connection", HANG, more);
        let begun = |servers: &[PathBuf]| servers.iter().any(|server| !dead.contains(server));
        wait_for("its servers", HANG, || begun(&protocol.servers()));
        assert_eq!(writes(&dead), in_time, "the link is frozen");
        far.proxy.thaw();
        running.wait().code(0);
        landed_late = writes(&dead) - in_time;
    }
    is_whole(&place, &source);
    assert_eq!(place.ids().len() as u64, runs);
}

#[test]
fn an_outage_is_told_and_survived() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let far = Far::new(&sandbox);
    let place = far.place(&sandbox);
    let source = source(&sandbox);
    place.init("200M").ok();
    let running = under_way(&place, &source, 1, &["--late-writes", "1s"]);
    far.drop_link();
    std::thread::sleep(Duration::from_millis(3500));
    far.proxy.refuse(false);
    let ran = running.wait().code(0);
    assert!(
        ran.stdout.contains("the link is down, dialling again"),
        "{ran}"
    );
    assert!(ran.stdout.contains("the link is up again"), "{ran}");
    let down = ran.stdout.lines().filter_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        line["link_down_seconds"].as_u64()
    });
    assert!(down.max() >= Some(2), "{ran}");
    is_whole(&place, &source);
}

#[test]
fn after_the_deadline_nothing_is_published_and_the_next_run_goes_on() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let far = Far::new(&sandbox);
    let place = far.place(&sandbox);
    let source = source(&sandbox);
    place.init("200M").ok();
    place.backup(&source).ok();
    for (deadline, attempts) in [("2s", "within 2.0 s"), ("0", "")] {
        let running = under_way(&place, &source, 1, &["--io-deadline", deadline]);
        far.drop_link();
        let broken = Instant::now();
        let ran = running.wait().code(14).says(attempts);
        assert!(broken.elapsed() < HANG, "{ran}");
        sandbox.assert_nothing_left();
        far.proxy.refuse(false);
        assert_eq!(place.ids().len(), 1);
    }
    place.backup(&source).ok();
    is_whole(&place, &source);
    assert_eq!(place.ids().len(), 2);
}

/// One signal ends a run whose server cannot be reached, long before the deadline; two end it at
/// once.
#[test]
fn a_backup_without_a_link_can_be_stopped() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let far = Far::new(&sandbox);
    let place = far.place(&sandbox);
    let source = source(&sandbox);
    place.init("200M").ok();
    for (round, signals) in [1, 2].into_iter().enumerate() {
        let options = ["--late-writes", "1s", "--io-deadline", "5m"];
        let running = under_way(&place, &source, round as u64, &options);
        far.drop_link();
        std::thread::sleep(Duration::from_secs(1));
        for _ in 0..signals {
            running.signal(Signal::TERM);
            std::thread::sleep(Duration::from_millis(500));
        }
        let asked = Instant::now();
        let ran = running.wait().code(130);
        assert!(asked.elapsed() < HANG / 2, "{ran}");
        let why = ran.stdout.contains("stopped while the link is down");
        assert_eq!(why, signals == 1, "{ran}");
        sandbox.assert_nothing_left();
        far.proxy.refuse(false);
        assert_eq!(place.ids().len(), round, "nothing is published");
        // As after a crash: it puts the filesystem in order first.
        place.backup(&source).ok();
        is_whole(&place, &source);
        assert_eq!(place.ids().len(), round + 1);
    }
}

/// Something synced and something that is not, on a mount.
fn mounted(place: &Place, options: &[&str]) -> PathBuf {
    let at = place.sandbox.dir("mnt");
    place.program("mount").arg(&at).args(options).ok();
    fs::write(at.join("synced"), "content").expect("written");
    run(tool("sync").arg("-f").arg(at.join("synced")));
    large_file(&at.join("not synced"), 2 * MIB, 1);
    at
}

/// Runs a tool that has to end by itself.
fn ends(program: &str, args: &[&str], at: &Path) -> bool {
    let mut command = tool("timeout");
    command.args(["--signal=KILL", "60", program]).args(args);
    let output = output(command.arg(at));
    assert!(
        output.status.code().is_some_and(|code| code != 137),
        "{program} hangs"
    );
    output.status.success()
}

#[test]
fn a_mount_without_a_link_hangs_nobody_beyond_the_deadline() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let far = Far::new(&sandbox);
    let place = far.place(&sandbox);
    place.init("200M").ok();
    let umount = |at: &Path| Program::new(&sandbox, "umount").arg(at);
    let bounded = |ran: Ran| {
        assert!(ran.took < HANG, "{ran}");
        assert!(sandbox.mounts().is_empty(), "{ran}");
        ran
    };

    let at = mounted(&place, &["--io-deadline", "4s"]);
    far.drop_link();
    ends("df", &[], &at);
    ends("find", &[], &at);
    assert!(!ends("sync", &["-f"], &at), "nothing can be synced");
    bounded(umount(&at).run().code_of(&[1, 14]));
    far.proxy.refuse(false);

    // With minutes to go, patience ends by force.
    let at = mounted(&place, &["--late-writes", "1s"]);
    far.drop_link();
    ends("df", &[], &at);
    let forced = bounded(umount(&at).arg("--force").run());
    forced.code(3).says("ended by force");
    sandbox.assert_nothing_left();
    far.proxy.refuse(false);

    // The link comes back while an unmount waits for it: nothing is lost.
    let at = mounted(&place, &["--late-writes", "1s"]);
    far.drop_link();
    let waiting = umount(&at).spawn();
    std::thread::sleep(Duration::from_secs(2));
    far.proxy.refuse(false);
    bounded(waiting.wait().code(0));
    let at = sandbox.dir("mnt");
    place.program("mount").arg(&at).arg("--read-only").ok();
    large_file(&sandbox.path("expected"), 2 * MIB, 1);
    run(tool("cmp")
        .arg(sandbox.path("expected"))
        .arg(at.join("not synced")));
    umount(&at).ok();
    place.assert_closed();
}

fn copy_sparse(from: &Path, to: &Path) {
    run(tool("cp").arg("--sparse=always").args([from, to]));
}

/// An image behind a relay, and what a run takes that nobody disturbs.
struct Relayed<'a> {
    place: Place<'a>,
    relay: Relay,
    source: PathBuf,
    /// The image after the first backup. Each run begins with that: with more snapshots it has
    /// more requests.
    first: PathBuf,
    requests: u64,
    runs: u64,
}

/// Before so many requests a run has not written anything, and fails at a break: connecting and
/// taking the lease are not tried again.
const BEGINNING: u64 = 40;

impl<'a> Relayed<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        let mut place = Place::piped(sandbox);
        place.init("200M").ok();
        let relay = Relay::before(&mut place, sandbox);
        let source = source(sandbox);
        let mut relayed = Relayed {
            place,
            relay,
            source,
            first: sandbox.path("first.img"),
            requests: 0,
            runs: 0,
        };
        relayed.place.backup(&relayed.source).ok();
        copy_sparse(&relayed.place.stored, &relayed.first);
        relayed.run(|_| Act::Pass).code(0);
        relayed.requests = relayed.relay.requests();
        assert!(relayed.requests > 2 * BEGINNING, "{}", relayed.requests);
        relayed
    }

    fn run(&mut self, script: impl FnMut(u64) -> Act + Send + 'static) -> Ran {
        self.runs += 1;
        copy_sparse(&self.first, &self.place.stored);
        large_file(&self.source.join("large"), 2 * MIB, self.runs);
        self.relay.script(script);
        let backup = self.place.backup(&self.source);
        let ran = backup.args(["--late-writes", "1s"]).run();
        eprintln!(
            "{} requests, {} breaks, {} writes forgotten, {:?}",
            self.relay.requests(),
            self.relay.breaks(),
            self.relay.forgotten(),
            ran.took
        );
        ran
    }

    /// It may only have failed where nothing was written yet; then the next run does it.
    fn check(&self, ran: Ran, moment: u64) {
        self.relay.script(|_| Act::Pass);
        if moment > BEGINNING {
            ran.code(0);
        } else if !ran.code_of(&[0, 14]).status.success() {
            self.place.backup(&self.source).ok();
            self.sweep_leases();
        }
        is_whole(&self.place, &self.source);
    }

    /// Removes what a break leaves while the lease is being made: a file that had not got its name
    /// yet, which nobody can take for anything.
    fn sweep_leases(&self) {
        let names = self.place.side_files().into_iter();
        for name in names.filter(|name| name.contains(".lease.") && name.ends_with(".new")) {
            fs::remove_file(self.place.stored.with_file_name(name)).expect("removed");
        }
    }

    /// Requests to act at: a handful, or with `E2EBAK_BREAKS=all` all of them, with
    /// `E2EBAK_BREAKS=3/8` every eighth from the third, without end: a run that has fewer is the last.
    fn moments(&self, handful: u64) -> Box<dyn Iterator<Item = u64>> {
        let Ok(wanted) = std::env::var("E2EBAK_BREAKS") else {
            let step = (self.requests - BEGINNING) / (handful + 1);
            return Box::new((1..=handful).map(move |n| BEGINNING + n * step));
        };
        let number = |text: &str| text.parse::<u64>().expect("all, or a part like 3/8");
        let (part, of) = match wanted.split_once('/') {
            Some((part, of)) => (number(part), number(of)),
            None => (1, 1),
        };
        Box::new((1..).filter(move |n| n % of == part % of))
    }

    /// Whether the run had fewer requests than that, which is the end of `E2EBAK_BREAKS`.
    fn was_over_before(&self, moment: u64) -> bool {
        let over = self.relay.breaks() == 0;
        let is_wanted = std::env::var("E2EBAK_BREAKS").is_ok();
        assert!(!over || is_wanted, "request {moment} was not reached");
        over
    }
}

#[test]
fn a_break_at_any_request_of_a_backup_loses_nothing() {
    if !root_or_skip() || !tool_or_skip("socat") {
        return;
    }
    let sandbox = Sandbox::new();
    let mut relayed = Relayed::new(&sandbox);
    for moment in relayed.moments(5) {
        let act = match moment % 2 {
            0 => Act::CutBefore,
            _ => Act::CutAfter,
        };
        let ran = relayed.run(move |number| if number == moment { act } else { Act::Pass });
        let over = relayed.was_over_before(moment);
        relayed.check(ran, moment);
        if over {
            break;
        }
    }
    // One break after the other. What is kept must go through between two of them.
    let mut left = 5;
    let often = move |number| match left > 0 && number > BEGINNING && number % 16 == 0 {
        true => {
            left -= 1;
            Act::CutAfter
        }
        false => Act::Pass,
    };
    let ran = relayed.run(often);
    assert!(relayed.relay.breaks() == 5, "{ran}");
    relayed.check(ran, u64::MAX);
}

#[test]
fn a_server_that_forgets_what_was_not_synced_loses_nothing() {
    if !root_or_skip() || !tool_or_skip("socat") {
        return;
    }
    let sandbox = Sandbox::new();
    let mut relayed = Relayed::new(&sandbox);
    let mut forgotten = 0;
    for moment in relayed.moments(4) {
        let restart = move |number| {
            if number == moment {
                Act::Forget
            } else {
                Act::Pass
            }
        };
        let ran = relayed.run(restart);
        forgotten += relayed.relay.forgotten();
        let over = relayed.was_over_before(moment);
        relayed.check(ran, moment);
        if over {
            break;
        }
    }
    assert!(forgotten > 0, "nothing was forgotten: this shows nothing");
}
