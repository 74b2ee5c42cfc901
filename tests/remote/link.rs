//! What happens to a link: real servers that refuse, die, freeze and run out of room.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use e2ebak::error::{Error, Kind};
use e2ebak::link::command::CommandDial;
use e2ebak::link::ssh::{SshDial, SshOptions};
use e2ebak::link::{Dial, Occasion};
use e2ebak::location::{Location, RemotePath, Server};
use e2ebak::remote::engine::{Bounds, Engine};
use e2ebak::remote::sftp_store::SftpStore;
use e2ebak::remote::{Access, Store, connect};

use crate::rig::{
    Rig, Sshd, engine, free_port, need, pattern, server_dial, sftp_server, skip, unforgiving,
};

const MIB: u64 = 1 << 20;

/// Our children by what their command line contains.
pub fn children(mark: &str) -> Vec<i32> {
    let me = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("read").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
        let stat = String::from_utf8_lossy(&read("stat")).into_owned();
        let parent = stat
            .rsplit(')')
            .next()
            .and_then(|r| r.split_whitespace().nth(1));
        let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        if parent == Some(&me) && command.contains(mark) {
            found.push(pid);
        }
    }
    found
}

pub fn kill(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, signal).expect("sent");
}

#[test]
fn a_server_that_dies_fails_all_callers_at_once() {
    let Some(rig) = Rig::pipes() else { return };
    let mark = rig.dir.path().display().to_string();
    let device = rig
        .store_with(unforgiving())
        .create(64 * MIB)
        .expect("creates");
    let [pid] = children(&mark)[..] else {
        panic!("one server")
    };
    thread::scope(|scope| {
        let callers: Vec<_> = (0..6)
            .map(|n| {
                let device = &device;
                scope.spawn(move || {
                    let data = pattern(MIB as usize, n);
                    loop {
                        if let Err(error) = device.write_all_at(&data, n * MIB) {
                            return (error, Instant::now());
                        }
                    }
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(150));
        kill(pid, rustix::process::Signal::KILL);
        let killed = Instant::now();
        for caller in callers {
            let (error, when) = caller.join().expect("ends");
            assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
            assert!(
                error.report().contains("killed by signal 9"),
                "{}",
                error.report()
            );
            assert!(when.duration_since(killed) < Duration::from_secs(1));
        }
    });
    let error = device.flush().expect_err("is gone");
    assert_eq!(error.kind(), Kind::Disconnected);
    assert!(children(&mark).is_empty(), "it has been reaped");
}

#[test]
fn a_frozen_server_is_given_up_after_the_bound() {
    let Some(rig) = Rig::pipes() else { return };
    let mark = rig.dir.path().display().to_string();
    let bounds = Bounds {
        silence: Duration::from_millis(500),
        ..unforgiving()
    };
    let dial = rig.dial.as_ref().expect("remote");
    let store =
        SftpStore::connect(dial.clone(), &rig.remote_path(), "a", bounds).expect("connects");
    let device = store.create(MIB).expect("creates");
    let [pid] = children(&mark)[..] else {
        panic!("one server")
    };
    kill(pid, rustix::process::Signal::STOP);
    let begun = Instant::now();
    let error = device.read_exact_at(&mut [0; 4096], 0).expect_err("frozen");
    assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    drop((device, store));
    assert!(
        children(&mark).is_empty(),
        "a stopped child is killed and reaped"
    );
}

#[test]
fn closing_ends_the_child_and_leaves_no_zombie() {
    let Some(rig) = Rig::pipes() else { return };
    let mark = rig.dir.path().display().to_string();
    let store = rig.store();
    assert_eq!(children(&mark).len(), 1);
    let begun = Instant::now();
    drop(store);
    assert!(children(&mark).is_empty());
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "it left by itself"
    );
}

/// The four signals of a terminal or a service manager; the thread that dialled is gone by then.
#[test]
fn the_child_is_deaf_and_outlives_the_thread_that_dialled() {
    let Some(server) = sftp_server() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let mark = dir.path().display().to_string();
    let dial = server_dial(&server, dir.path(), &[]);
    let engine = thread::spawn(move || engine(&dial)).join().expect("dials");
    let [pid] = children(&mark)[..] else {
        panic!("one server")
    };
    use rustix::process::Signal;
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        kill(pid, signal);
    }
    thread::sleep(Duration::from_millis(100));
    let path = RemotePath::new("a").expect("a path");
    let store = SftpStore::over(Arc::new(engine), &path, "a");
    store.create(MIB).expect("it still serves");
}

/// `sftp-server -R`, which writes nothing.
#[test]
fn a_server_that_writes_nothing_says_so() {
    let Some(rig) = Rig::pipes_with(&["-R"]) else {
        return;
    };
    fs::write(rig.image(), pattern(MIB as usize, 1)).expect("written");
    let store = rig.store();
    let device = store.open(Access::ReadOnly).expect("opens");
    let mut buf = vec![0; MIB as usize];
    device.read_exact_at(&mut buf, 0).expect("reads");
    assert!(buf == pattern(MIB as usize, 1));
    let error = store
        .open(Access::ReadWrite)
        .map(drop)
        .expect_err("refuses");
    assert_eq!(error.kind(), Kind::ReadOnly, "{}", error.report());
    for error in [
        store.create_side(".lease", b"x").expect_err("refuses"),
        store.remove().expect_err("refuses"),
    ] {
        assert_eq!(error.kind(), Kind::Denied, "{}", error.report());
        assert!(
            error.report().contains("permission denied"),
            "{}",
            error.report()
        );
    }
    assert!(rig.image().exists());
}

/// A server in a mount namespace of its own with a small tmpfs: all of it ends with the server.
fn small_server(dir: &Path, bytes: u64) -> Option<CommandDial> {
    let server = sftp_server()?;
    need("unshare", &[])?;
    let script =
        format!("mount -t tmpfs -o size={bytes} none \"$1\" && cd \"$1\" && exec \"$2\" -e");
    let root = match rustix::process::geteuid().is_root() {
        true => "-m",
        false => "-rm",
    };
    let probe = Command::new("unshare").args([root, "true"]).status();
    if !probe.is_ok_and(|status| status.success()) {
        skip("no mount namespaces");
        return None;
    }
    let mut argv: Vec<std::ffi::OsString> = ["unshare", root, "sh", "-c"].map(Into::into).into();
    argv.extend([script.into(), "sh".into(), dir.into(), server.into()]);
    CommandDial::new(argv)
}

#[test]
fn a_full_server_says_no_space() {
    let dir = tempfile::tempdir().expect("a directory");
    let Some(dial) = small_server(dir.path(), 4 * MIB) else {
        return;
    };
    let path = RemotePath::new("a.img").expect("a path");
    let store = SftpStore::connect(Arc::new(dial), &path, "nas:a.img", Bounds::default())
        .expect("connects");
    let device = store.create(64 * MIB).expect("sparse, so it fits");
    device
        .write_all_at(&pattern(MIB as usize, 1), 0)
        .expect("fits");
    let error = device
        .write_all_at(&pattern(8 * MIB as usize, 2), MIB)
        .expect_err("is full");
    assert_eq!(error.kind(), Kind::NoSpace, "{}", error.report());
    assert!(
        error.report().contains("no space on server"),
        "{}",
        error.report()
    );
    let error = store
        .create_side(".x", &pattern(60_000, 1))
        .expect_err("is full");
    assert_eq!(error.kind(), Kind::NoSpace, "{}", error.report());
    // What was there before is intact.
    let mut back = vec![0; MIB as usize];
    device.read_exact_at(&mut back, 0).expect("reads");
    assert!(back == pattern(MIB as usize, 1));
    drop((device, store));
    assert_eq!(
        fs::read_dir(dir.path()).expect("read").count(),
        0,
        "the mount was the server's"
    );
}

pub fn connect_error(dial: &(impl Dial + Clone + 'static)) -> Error {
    let path = RemotePath::new("a").expect("a path");
    let connected = SftpStore::connect(Arc::new(dial.clone()), &path, "nas:a", Bounds::default());
    connected.map(drop).expect_err("must not connect")
}

#[test]
fn a_missing_program_is_named() {
    let dial = CommandDial::new(["/nonexistent/program"]).expect("a command");
    let error = connect_error(&dial);
    assert_eq!(error.kind(), Kind::MissingTool, "{}", error.report());
    assert!(
        error.report().contains("/nonexistent/program"),
        "{}",
        error.report()
    );
    let server = Server {
        user: None,
        host: "nas".into(),
        port: None,
    };
    let options = SshOptions {
        program: Some("/nonexistent/ssh".into()),
        ..SshOptions::default()
    };
    let error = connect_error(&SshDial::new(server, options));
    assert_eq!(error.kind(), Kind::MissingTool, "{}", error.report());
    assert_eq!(
        error.deepest_hint(),
        Some("install the package openssh-client")
    );
}

#[test]
fn the_last_words_of_a_command_are_shown() {
    let dial = CommandDial::from_line("sh -c 'echo one >&2; echo two words >&2; exit 3'");
    let begun = Instant::now();
    let error = connect_error(&dial.expect("a command"));
    assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
    let report = error.report();
    assert!(
        report.contains("exit code 3") && report.contains("one; two words"),
        "{report}"
    );
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_banner_on_stdout_is_shown_and_the_child_ends() {
    let dial = CommandDial::from_line("sh -c 'echo Welcome to mark-1277; exec sleep 60'");
    let error = connect_error(&dial.expect("a command"));
    assert!(
        error.report().contains("`Welcome to mark-1277`"),
        "{}",
        error.report()
    );
    assert!(children("mark-1277").is_empty() && children("sleep 60").is_empty());
}

/// What ssh says to our sshd under other options, and what we make of it.
fn ssh_error(sshd: &Sshd, change: impl FnOnce(&mut SshOptions, &mut Server)) -> Error {
    let (mut options, mut server) = (sshd.options(), sshd.server());
    change(&mut options, &mut server);
    connect_error(&SshDial::new(server, options))
}

#[test]
fn what_ssh_reports_is_put_into_words_with_a_hint() {
    let Some(sshd) = Sshd::start() else { return };
    let at = |name: &str| sshd.dir.path().join(name);

    let error = ssh_error(&sshd, |_, server| server.port = Some(free_port()));
    assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
    assert!(
        error.report().contains("refused the connection"),
        "{}",
        error.report()
    );
    assert!(
        error.report().contains("port"),
        "ssh's own words: {}",
        error.report()
    );

    let error = ssh_error(&sshd, |_, server| {
        server.host = "no-such-host.invalid".into()
    });
    assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
    assert!(
        error.report().contains("could not be resolved"),
        "{}",
        error.report()
    );

    let error = ssh_error(&sshd, |options, _| {
        options.options.push("NoSuchOption=1".into())
    });
    assert_eq!(error.kind(), Kind::Usage, "{}", error.report());

    // The host's key where a user's was expected.
    let error = ssh_error(&sshd, |options, _| options.identity_file = Some(at("host")));
    assert_eq!(error.kind(), Kind::Denied, "{}", error.report());
    assert!(
        error.report().contains("did not accept our login"),
        "{}",
        error.report()
    );

    let error = ssh_error(&sshd, |options, _| {
        options.options.push("UserKnownHostsFile=/dev/null".into());
    });
    assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
    assert!(
        error.report().contains("is not known"),
        "{}",
        error.report()
    );
    assert!(
        error
            .deepest_hint()
            .is_some_and(|hint| hint.contains("`ssh 127.0.0.1`"))
    );

    let other = fs::read_to_string(at("user.pub")).expect("read");
    let line = format!("[127.0.0.1]:{} {other}", sshd.port);
    fs::write(at("other_hosts"), line).expect("written");
    let error = ssh_error(&sshd, |options, _| {
        let file = at("other_hosts").display().to_string();
        options.options.push(format!("UserKnownHostsFile={file}"));
    });
    assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
    assert!(
        error.report().contains("another host key"),
        "{}",
        error.report()
    );
    assert!(
        error
            .deepest_hint()
            .is_some_and(|hint| hint.contains("ssh-keygen -R"))
    );
}

#[test]
fn a_server_without_sftp_is_named() {
    let Some(sshd) = Sshd::start_with("") else {
        return;
    };
    let error = connect_error(&sshd.dial());
    assert_eq!(error.kind(), Kind::Unsupported, "{}", error.report());
    assert!(
        error.report().contains("the server offers no SFTP"),
        "{}",
        error.report()
    );
}

#[test]
fn a_login_that_prints_text_is_named() {
    let script = "Subsystem sftp echo; sleep 0.05; echo Welcome, friend; cat";
    let Some(sshd) = Sshd::start_with(script) else {
        return;
    };
    let error = connect_error(&sshd.dial());
    assert_eq!(error.kind(), Kind::Unsupported, "{}", error.report());
    assert!(
        error.report().contains("`Welcome, friend`"),
        "{}",
        error.report()
    );
}

/// Processes that are continued, stopped or not, when this is dropped.
pub struct Frozen(Vec<i32>);

impl Frozen {
    pub fn new(pids: Vec<i32>) -> Self {
        for pid in &pids {
            kill(*pid, rustix::process::Signal::STOP);
        }
        Frozen(pids)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for pid in &self.0 {
            let pid = rustix::process::Pid::from_raw(*pid).expect("a pid");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::CONT);
        }
    }
}

#[test]
fn a_frozen_connection_is_noticed_by_ssh() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let mut options = sshd.options();
    options.options.push("ServerAliveInterval=1".into());
    let path = dir.path().join("a").display().to_string();
    let path = RemotePath::new(path).expect("a path");
    let dial = SshDial::new(sshd.server(), options);
    let store =
        SftpStore::connect(Arc::new(dial), &path, "nas:a", unforgiving()).expect("connects");
    let device = store.create(MIB).expect("creates");
    let _frozen = Frozen::new(sshd.sessions());
    let begun = Instant::now();
    let error = device.read_exact_at(&mut [0; 4096], 0).expect_err("frozen");
    assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
    assert!(
        error.report().contains("the server stopped answering"),
        "{}",
        error.report()
    );
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "{:?}",
        begun.elapsed()
    );
}

/// Not a test: the body of a process that is killed with a link open.
#[test]
#[ignore = "started by another test"]
fn a_process_that_holds_a_link() {
    let Some(dir) = std::env::var_os("LINK_DIR") else {
        return;
    };
    let Some(server) = sftp_server() else { return };
    let engine = engine(&server_dial(&server, Path::new(&dir), &[]));
    println!("up");
    thread::sleep(Duration::from_secs(60));
    drop(engine);
}

#[test]
fn the_child_dies_with_us_however_we_die() {
    if sftp_server().is_none() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let mut holder = Command::new(std::env::current_exe().expect("known"))
        .args([
            "link::a_process_that_holds_a_link",
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env("LINK_DIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("runs");
    let mut lines = BufReader::new(holder.stdout.take().expect("piped")).lines();
    assert!(lines.any(|line| line.is_ok_and(|line| line.ends_with("up"))));
    // Its file of children is per thread, and the keeper is the parent thread.
    let mut pids = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", holder.id()))
        .expect("read")
        .flatten()
    {
        let children = fs::read_to_string(task.path().join("children")).expect("read");
        pids.extend(
            children
                .split_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    let [server] = pids[..] else {
        panic!("{pids:?}")
    };
    kill(server, rustix::process::Signal::STOP); // so that it cannot end by itself
    holder.kill().expect("killed");
    holder.wait().expect("reaped");
    let pid = rustix::process::Pid::from_raw(server).expect("a pid");
    let until = Instant::now() + Duration::from_secs(5);
    while is_running(server) && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    let survived = is_running(server);
    if survived {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    assert!(!survived);
}

/// Whether there is such a process and it is no zombie.
fn is_running(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.trim_start().chars().next());
    state.is_some_and(|state| state != 'Z')
}

#[test]
fn a_connection_that_is_cut_fails_within_a_second() {
    let Some(rig) = Rig::sshd() else { return };
    let device = rig
        .store_with(unforgiving())
        .create(16 * MIB)
        .expect("creates");
    let [ssh] = children("-s -- 127.0.0.1")[..] else {
        panic!("one ssh")
    };
    thread::scope(|scope| {
        let caller = scope.spawn(|| {
            loop {
                if let Err(error) = device.write_all_at(&pattern(MIB as usize, 1), 0) {
                    return (error, Instant::now());
                }
            }
        });
        thread::sleep(Duration::from_millis(150));
        let killed = Instant::now();
        kill(ssh, rustix::process::Signal::KILL);
        let (error, when) = caller.join().expect("ends");
        assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
        assert!(when.duration_since(killed) < Duration::from_secs(1));
    });
}

#[test]
fn the_users_own_ssh_options_win() {
    let server = Server {
        user: Some("ann".into()),
        host: "nas".into(),
        port: Some(2222),
    };
    let options = SshOptions {
        options: vec!["ServerAliveInterval=3".into()],
        batch: true,
        ..SshOptions::default()
    };
    let argv = SshDial::new(server, options).argv(Occasion::First);
    let words: Vec<&str> = argv.iter().filter_map(|word| word.to_str()).collect();
    let line = words.join(" ");
    let place = |text: &str| line.find(text).unwrap_or_else(|| panic!("{text}: {line}"));
    assert!(place("ServerAliveInterval=3") < place("ServerAliveInterval=10"));
    assert!(line.ends_with("-s -- nas sftp"), "{line}");
    place("-p 2222");
    place("-l ann");
    place("BatchMode=yes");
}

/// Not a test: the body of a process with or without a terminal.
#[test]
#[ignore = "started by another test"]
fn a_process_that_would_dial() {
    let server = Server {
        user: None,
        host: "nas".into(),
        port: None,
    };
    println!(
        "{:?}",
        SshDial::new(server, SshOptions::default()).argv(Occasion::First)
    );
}

#[test]
fn ssh_may_ask_only_on_a_terminal_in_the_foreground() {
    if need("script", &[]).is_none() || need("setsid", &[]).is_none() {
        return;
    }
    let exe = std::env::current_exe().expect("known");
    let body = format!(
        "{} link::a_process_that_would_dial --exact --ignored --nocapture",
        exe.display()
    );
    let argv = |program: &str, arguments: &[&str]| {
        let output = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("ConnectTimeout"), "{text}");
        text
    };
    let asks = |text: String| !text.contains("BatchMode=yes");
    assert!(asks(argv("script", &["-qec", &body, "/dev/null"])));
    let behind = format!("set -m; {body} & wait");
    assert!(!asks(argv("script", &["-qec", &behind, "/dev/null"])));
    assert!(!asks(argv("setsid", &["-w", "sh", "-c", &body])));
}

#[test]
fn the_cheapest_cipher_is_asked_for_unless_somebody_has_an_opinion() {
    if need("ssh", &[]).is_none()
        || !std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|c| c.contains(" aes "))
    {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("config");
    let ciphers = |content: &str| {
        fs::File::create(&config)
            .expect("made")
            .write_all(content.as_bytes())
            .expect("written");
        let server = Server {
            user: None,
            host: "nas".into(),
            port: None,
        };
        let options = SshOptions {
            config_file: Some(config.clone()),
            ..SshOptions::default()
        };
        let argv = SshDial::new(server, options).argv(Occasion::First);
        let words = argv.iter().filter_map(|word| word.to_str());
        words
            .into_iter()
            .find_map(|word| word.strip_prefix("Ciphers=").map(String::from))
    };
    let asked = ciphers("").expect("asks");
    assert!(asked.starts_with("aes128-gcm@openssh.com,"), "{asked}");
    assert!(
        asked.contains("chacha20-poly1305@openssh.com"),
        "the others remain: {asked}"
    );
    assert_eq!(ciphers("Ciphers aes256-ctr\n"), None);
}

#[test]
fn connect_picks_the_store_by_the_location() {
    let Some(server) = sftp_server() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let local: Location = dir
        .path()
        .join("l.img")
        .display()
        .to_string()
        .parse()
        .expect("a path");
    let store = connect(
        &local,
        |_| panic!("a path needs no link"),
        Bounds::default(),
    )
    .expect("connects");
    store.create(MIB).expect("creates");
    // Relative to where the session starts.
    let remote: Location = "ann@nas:r.img".parse().expect("a location");
    let store = connect(
        &remote,
        |server_name| {
            assert_eq!(server_name.host, "nas");
            Ok(Arc::new(server_dial(&server, dir.path(), &[])))
        },
        Bounds::default(),
    );
    store.expect("connects").create(MIB).expect("creates");
    for name in ["l.img", "r.img"] {
        let file = fs::metadata(dir.path().join(name)).expect("there");
        assert_eq!(file.len(), MIB);
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
    }
}

/// Nothing is lost when the thread that made an engine, its callers and its end all race.
#[test]
fn sessions_come_and_go_under_load() {
    let Some(rig) = Rig::pipes() else { return };
    rig.store().create(MIB).expect("creates");
    for _ in 0..20 {
        let dial = rig.dial.as_ref().expect("remote");
        let stream = dial.dial(Occasion::First).expect("starts");
        let handle = stream.handle.clone();
        let engine = Arc::new(Engine::start(stream, Bounds::default()).expect("starts"));
        let store = SftpStore::over(engine, &rig.remote_path(), "a");
        let device = store.open(Access::ReadWrite).expect("opens");
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| while device.write_all_at(&[1; 100_000], 0).is_ok() {});
            }
            thread::sleep(Duration::from_millis(5));
            handle.close();
        });
    }
}
