//! Every way to a server, by the whole program: a job of init, backup and restore through each.

#[path = "common/mod.rs"]
mod common;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use common::{
    Place, Program, Sandbox, Sshd, assert_same_tree, plain_tree, root_or_skip, tool, tool_or_skip,
    wait_for,
};

/// A program of ours that ends with the test.
struct Helper(Child);

impl Helper {
    fn start(program: &str, args: &[&str]) -> Self {
        let mut command = tool("setpriv");
        let path = common::find_tool(program).unwrap_or_else(|| panic!("{program}"));
        command.args(["--pdeathsig", "KILL"]).arg(path).args(args);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Helper(command.spawn().expect("setpriv"))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Passes every connection to a unix socket on to a command that speaks SFTP.
fn relay(sandbox: &Sandbox, command: &str) -> (Helper, PathBuf) {
    let socket = sandbox.path("relay.socket");
    let script = sandbox.file("relay.sh", format!("exec {command}\n"));
    let listen = format!("UNIX-LISTEN:{},fork,mode=600", socket.display());
    let run = format!("EXEC:/bin/sh {}", script.display());
    let helper = Helper::start("socat", &[&listen, &run]);
    wait_for("the relay", Duration::from_secs(10), || socket.exists());
    (helper, socket)
}

fn through_socket(socket: &Path) -> Vec<String> {
    let command = format!("socat - UNIX-CONNECT:{}", socket.display());
    vec!["--ssh-command".into(), command]
}

/// init, two backups, restore and comparison, each run by way of `wrapper`.
fn whole_job(place: &Place, wrapper: &[&str]) {
    let source = place.sandbox.dir("source");
    plain_tree(&source, 40);
    place.init("1G").through(wrapper).ok();
    place.backup(&source).through(wrapper).ok();
    place.sandbox.file("source/later", "later");
    place.backup(&source).through(wrapper).ok();
    let restored = place.sandbox.path("restored");
    let what = format!("latest:{}", source.display());
    place.restore(&what, &restored).through(wrapper).ok();
    assert_same_tree(&source, &restored);
}

#[test]
fn a_socket_that_socat_serves() {
    if !root_or_skip() || !tool_or_skip("socat") {
        return;
    }
    let sandbox = Sandbox::new();
    let (relay, socket) = relay(&sandbox, "/usr/lib/openssh/sftp-server -e");
    let mut place = Place::piped(&sandbox);
    place.options = through_socket(&socket);
    whole_job(&place, &[]);
    drop(relay);
    place.assert_closed();
}

/// As in a Qubes setup: who encrypts has no network at all, and only a unix socket to a relay,
/// which alone has a network, and the ssh keys, and never sees a key of the image.
#[test]
fn a_machine_without_a_network_behind_a_relay() {
    if !root_or_skip() || !tool_or_skip("socat") {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let config = sandbox.file("ssh_config", sshd.ssh_config());
    let ssh = format!(
        "ssh -F {} -p {} -T -s -- 127.0.0.1 sftp",
        config.display(),
        sshd.port()
    );
    let (relay, socket) = relay(&sandbox, &ssh);
    let mut place = Place::over(&sandbox, &sshd);

    // With nothing but a loopback interface that is down, there is no way to the server.
    let nothing = ["/usr/bin/unshare", "--net"];
    let direct = place.init("1G").through(nothing).run().code(14);
    assert!(direct.stderr.contains("Network is unreachable"), "{direct}");
    assert!(!place.stored.exists());

    place.options = through_socket(&socket);
    place.location = format!("relay:{}", place.stored.display());
    whole_job(&place, &nothing);
    assert!(place.stored.exists());
    drop(relay);
    place.assert_closed();
}

/// ssh hands its environment on to a ProxyCommand, and to the server what SendEnv names.
#[test]
fn nothing_that_carries_the_link_sees_our_settings() {
    let sandbox = Sandbox::new();
    let seen = sandbox.path("seen");
    let script = |exec: &str| format!("#!/bin/sh\nenv >>{}\nexec {exec}\n", seen.display());
    let relay = sandbox.file("relay.sh", script("/usr/lib/openssh/sftp-server -e"));
    sandbox.dir("bin");
    let ssh = sandbox.file("bin/ssh", script("/usr/bin/ssh \"$@\""));
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&ssh, mode).expect("a mode");

    let mut place = Place::piped(&sandbox);
    place.options[1] = format!("/bin/sh {}", relay.display());
    let path = format!("{}:/usr/bin:/bin", sandbox.path("bin").display());
    let refused = Program::new(&sandbox, "info").arg("sftp://127.0.0.1:1/a.img");
    for (ended, program) in [(10, place.program("info")), (14, refused)] {
        let program = program.env("PATH", &path).env("E2EBAK_LOG", "e2ebak=warn");
        program.run().code(ended);
        let told = std::fs::read_to_string(&seen).expect("it was started");
        assert!(told.lines().any(|line| line.starts_with("HOME=")), "{told}");
        let ours = |line: &str| line.starts_with("E2EBAK_");
        assert!(!told.lines().any(ours), "{told}");
        std::fs::remove_file(&seen).expect("removed");
    }
}

#[test]
fn no_ssh_program_at_all() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let known = std::fs::read_to_string(sandbox.path("sshd/known_hosts")).expect("read");
    sandbox.dir("home/.ssh");
    let mut place = Place::over(&sandbox, &sshd);
    let key = sandbox.path("sshd/user_key").display().to_string();
    place.options = ["--ssh", "built-in", "-i", &key].map(String::from).into();

    // A key that nobody has vouched for.
    let ran = place.init("1G").run().code(14).says("is not known");
    let line: Vec<&str> = known.split_whitespace().take(3).collect();
    assert!(
        ran.stderr.contains(&line.join(" ")),
        "the line to add: {ran}"
    );
    sandbox.file("home/.ssh/known_hosts", known);
    // Where there is no ssh, none is missed.
    let hide = "mount --bind /dev/null /usr/bin/ssh";
    let source = sandbox.dir("source");
    plain_tree(&source, 40);
    place.init("1G").after(hide, &[]).ok();
    place.backup(&source).after(hide, &[]).ok();
    let restored = sandbox.path("restored");
    let what = format!("latest:{}", source.display());
    place.restore(&what, &restored).after(hide, &[]).ok();
    assert_same_tree(&source, &restored);
    place.assert_closed();
}

#[test]
fn key_port_and_configuration_are_passed_on() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let mut place = Place::over(&sandbox, &sshd);
    let lines = sshd.ssh_config();
    let others = lines
        .lines()
        .filter(|line| !line.trim().starts_with("IdentityFile"));
    let config = format!(
        "Host nas\nHostName 127.0.0.1\n{}\n",
        others.collect::<Vec<_>>().join("\n")
    );
    let config = sandbox.file("ssh_config", config).display().to_string();
    let key = sandbox.path("sshd/user_key").display().to_string();
    let port = sshd.port().to_string();
    let whole = ["-i", &key, "--ssh-port", &port, "--ssh-config", &config].map(String::from);
    place.location = format!("nas:{}", place.stored.display());
    // Without any one of them it does not come through.
    for missing in 0..3 {
        let mut options = whole.to_vec();
        options.drain(2 * missing..2 * missing + 2);
        place.options = options;
        place.init("1G").run().code_of(&[1, 14]);
    }
    place.options = whole.to_vec();
    whole_job(&place, &[]);
    place.assert_closed();

    place.location = format!("sftp://nas:1{}", place.stored.display());
    place
        .program("info")
        .run()
        .code(2)
        .says("the location names port 1");
}

#[test]
fn a_limit_is_kept_and_one_that_makes_no_sense_is_refused() {
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    for limit in ["--limit-rate", "--limit-upload", "--limit-download"] {
        for (rate, says) in [
            ("20", "bytes per second are too few"),
            ("fast", "not a size"),
        ] {
            place
                .program("info")
                .args([limit, rate])
                .run()
                .code(2)
                .says(says);
        }
    }
    if !root_or_skip() {
        return;
    }
    let source = sandbox.dir("source");
    common::large_file(&source.join("file"), 6 << 20, 1);
    place.init("1G").ok();
    // At 4 MiB/s 6 MiB need a second and a half.
    let ran = place.backup(&source).args(["--limit-upload", "4M"]).ok();
    assert!(ran.took > Duration::from_millis(1300), "{ran}");
    let restored = sandbox.path("restored");
    let what = format!("latest:{}", source.display());
    let ran = place
        .restore(&what, &restored)
        .args(["--limit-rate", "1G", "--limit-download", "4M"])
        .ok();
    assert!(ran.took > Duration::from_millis(1300), "{ran}");
    assert_same_tree(&source, &restored);
    place.assert_closed();
}

/// A killed program leaves no master behind, and the next one sweeps what it could not remove.
#[test]
fn a_killed_program_takes_its_connection_with_it() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let silent = TcpListener::bind("127.0.0.1:0").expect("binds");
    let port = silent.local_addr().expect("bound").port();
    let location = format!("sftp://127.0.0.1:{port}/a.img");
    let running = Program::new(&sandbox, "info").arg(location).spawn();
    let masters = || {
        let all = sandbox.processes().into_iter();
        let ours = all.filter(|(_, line)| line.contains("ControlMaster=yes"));
        ours.collect::<Vec<_>>()
    };
    wait_for("the master", Duration::from_secs(20), || {
        masters().len() == 1
    });
    let line = masters()[0].1.clone();
    let mut words = line.split(' ').skip_while(|word| *word != "-S");
    let socket = PathBuf::from(words.nth(1).expect("a path"));
    let directory = socket.parent().expect("a directory");
    assert!(directory.exists());
    running.signal(rustix::process::Signal::KILL);
    drop(running);
    wait_for("its end", Duration::from_secs(5), || masters().is_empty());
    assert!(directory.exists(), "nobody was left to remove it");

    let refused = "sftp://127.0.0.1:1/a.img";
    Program::new(&sandbox, "info").arg(refused).run().code(14);
    assert!(!directory.exists());
    sandbox.assert_nothing_left();
}
