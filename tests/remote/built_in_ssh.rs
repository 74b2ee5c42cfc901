//! SSH without the ssh program, against a real sshd.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use e2ebak::error::{Error, Kind};
use e2ebak::link::built_in::{BuiltInDial, BuiltInOptions};
use e2ebak::link::{Dial, Occasion, STREAMS_MAX};
use e2ebak::location::Server;
use e2ebak::remote::Store;

use crate::link::{Frozen, connect_error};
use crate::rig::{Rig, Sshd, free_port, need, pattern, sftp_server};
use crate::shared::{engine, engines, use_it};

const MIB: u64 = 1 << 20;

fn dial(sshd: &Sshd, change: impl FnOnce(&mut BuiltInOptions, &mut Server)) -> BuiltInDial {
    let (mut options, mut server) = (sshd.built_in_options(), sshd.server());
    change(&mut options, &mut server);
    BuiltInDial::new(server, options).expect("a dial")
}

fn known_hosts(sshd: &Sshd, text: &str) -> BuiltInDial {
    let file = sshd.dir.path().join("other_hosts");
    fs::write(&file, text).expect("written");
    dial(sshd, |options, _| options.known_hosts = Some(vec![file]))
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn eight_channels_are_one_login_and_none_ends_another() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let dial = sshd.built_in_dial();
    let mut engines = engines(&dial, STREAMS_MAX - 1);
    thread::scope(|scope| {
        for (n, engine) in engines.iter().enumerate() {
            let dir = dir.path();
            scope.spawn(move || use_it(engine, dir, &format!("{n}.img")).expect("works"));
        }
    });
    assert_eq!(sshd.logins(), 1);
    drop(engines.remove(0));
    let another = engine(&dial, Occasion::Again).expect("dials");
    drop(dial);
    engines.push(another);
    for (n, engine) in engines.iter().enumerate() {
        use_it(engine, dir.path(), &format!("again {n}.img")).expect("works");
    }
    assert_eq!(sshd.logins(), 1);
    drop(engines);
    until("the connection has ended", || sshd.sessions().is_empty());
}

#[test]
fn a_server_that_refuses_channels_gets_connections() {
    let Some(sshd) = Sshd::with("MaxSessions 2") else {
        return;
    };
    let dir = tempfile::tempdir().expect("a directory");
    let engines = engines(&sshd.built_in_dial(), 3);
    for (n, engine) in engines.iter().enumerate() {
        use_it(engine, dir.path(), &format!("{n}.img")).expect("works");
    }
    assert_eq!(sshd.logins(), 3);
}

#[test]
fn a_connection_that_is_cut_ends_its_streams_and_is_made_anew() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let dial = sshd.built_in_dial();
    let before = engines(&dial, 2);
    for pid in sshd.sessions() {
        crate::link::kill(pid, rustix::process::Signal::KILL);
    }
    let begun = Instant::now();
    for (n, engine) in before.iter().enumerate() {
        let error = use_it(engine, dir.path(), &format!("{n}.img")).expect_err("is gone");
        assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
    }
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
    // The first one may find the end of the old connection; whoever redials tries again.
    let after = engine(&dial, Occasion::Again).or_else(|_| engine(&dial, Occasion::Again));
    use_it(&after.expect("dials"), dir.path(), "after.img").expect("works");
    assert_eq!(sshd.logins(), 2);
}

/// Only one stream's server ends; the others go on.
#[test]
fn a_stream_that_the_server_ends_says_how() {
    let Some(server) = sftp_server() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let (pids, script) = (dir.path().join("pids"), dir.path().join("server"));
    let text = format!(
        "#!/bin/sh\necho $$ >> {}\nexec {}\n",
        pids.display(),
        server.display()
    );
    fs::write(&script, text).expect("written");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("set");
    let Some(sshd) = Sshd::start_with(&format!("Subsystem sftp {}", script.display())) else {
        return;
    };
    let dial = sshd.built_in_dial();
    let first = engine(&dial, Occasion::First).expect("dials");
    let pid = fs::read_to_string(&pids)
        .expect("read")
        .trim()
        .parse()
        .expect("a pid");
    let second = engine(&dial, Occasion::Again).expect("dials");
    crate::link::kill(pid, rustix::process::Signal::TERM);
    until("the first is dead", || first.dead().is_some());
    let why = first.dead().expect("dead").report();
    assert!(why.contains("killed by signal TERM"), "{why}");
    use_it(&second, dir.path(), "second.img").expect("works");
}

#[test]
fn a_frozen_server_is_noticed() {
    let Some(sshd) = Sshd::start() else { return };
    let engines = engines(&sshd.built_in_dial(), 1);
    let _frozen = Frozen::new(sshd.sessions());
    let begun = Instant::now();
    while engines.iter().any(|engine| engine.dead().is_none()) {
        assert!(begun.elapsed() < Duration::from_secs(60), "nobody noticed");
        thread::sleep(Duration::from_millis(100));
    }
    let why = engines[0].dead().expect("dead").report();
    assert!(why.contains("the server stopped answering"), "{why}");
}

#[test]
fn many_megabytes_cross_on_one_channel() {
    let Some(rig) = Rig::built_in() else { return };
    let device = rig.store().create(64 * MIB).expect("creates");
    let data = pattern(48 * MIB as usize, 3);
    device.write_all_at(&data, 4097).expect("writes");
    let mut back = vec![0; data.len()];
    device.read_exact_at(&mut back, 4097).expect("reads");
    assert!(back == data);
}

#[test]
fn only_the_known_host_key_is_accepted() {
    let Some(sshd) = Sshd::start() else { return };
    let at = |name: &str| sshd.dir.path().join(name);
    let refused = |text: &str| -> Error {
        let error = connect_error(&known_hosts(&sshd, text));
        assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
        error
    };
    let works = |text: &str| {
        engine(&known_hosts(&sshd, text), Occasion::First)
            .map(drop)
            .expect("connects");
    };
    let right = fs::read_to_string(at("known_hosts")).expect("read");
    works(&right);

    let error = refused("# nobody\n");
    assert!(
        error.report().contains("is not known"),
        "{}",
        error.report()
    );
    let hint = error.deepest_hint().expect("a hint").to_string();
    let line = hint.split("known_hosts: ").nth(1).expect("a line to add");
    works(line);
    // Without a port it is another server.
    let plain = right.replacen(&format!("[127.0.0.1]:{}", sshd.port), "127.0.0.1", 1);
    refused(&plain);

    let other = fs::read_to_string(at("user.pub")).expect("read");
    let error = refused(&format!("[127.0.0.1]:{} {other}", sshd.port));
    assert!(
        error.report().contains("another host key"),
        "{}",
        error.report()
    );
    assert!(error.deepest_hint().is_some_and(|hint| hint.contains(line)));

    let error = refused(&format!("{right}@revoked {right}"));
    assert!(error.report().contains("revoked by"), "{}", error.report());
    let error = refused(&format!("@cert-authority {right}"));
    assert!(error.report().contains("certificate"), "{}", error.report());

    fs::write(at("hashed"), &right).expect("written");
    let hashed = Command::new("ssh-keygen")
        .args(["-q", "-H", "-f"])
        .arg(at("hashed"))
        .status();
    assert!(hashed.expect("runs").success());
    let hashed = fs::read_to_string(at("hashed")).expect("read");
    assert!(hashed.starts_with("|1|"), "{hashed}");
    works(&hashed);
    assert_eq!(sshd.logins(), 3, "nobody else came as far as the login");
}

#[test]
fn what_goes_wrong_is_put_into_words_with_a_hint() {
    let Some(sshd) = Sshd::start() else { return };
    let host_key = sshd.dir.path().join("host");
    let says = |error: Error, kind: Kind, text: &str| {
        assert_eq!(error.kind(), kind, "{}", error.report());
        assert!(error.report().contains(text), "{}", error.report());
        assert!(error.deepest_hint().is_some(), "{}", error.report());
    };
    let failing = dial(&sshd, |_, server| server.port = Some(free_port()));
    says(
        connect_error(&failing),
        Kind::Disconnected,
        "refused the connection",
    );
    let failing = dial(&sshd, |_, server| {
        server.host = "no-such-host.invalid".into()
    });
    says(
        connect_error(&failing),
        Kind::Disconnected,
        "could not be resolved",
    );
    let failing = dial(&sshd, |options, _| options.identity_file = Some(host_key));
    says(
        connect_error(&failing),
        Kind::Denied,
        "did not accept our login",
    );
    let failing = dial(&sshd, |_, server| {
        server.user = Some("nobody-of-that-name".into())
    });
    says(
        connect_error(&failing),
        Kind::Denied,
        "did not accept our login",
    );

    let Some(sshd) = Sshd::start_with("") else {
        return;
    };
    says(
        connect_error(&sshd.built_in_dial()),
        Kind::Unsupported,
        "the server offers no SFTP",
    );
    let Some(sshd) = Sshd::start_with("Subsystem sftp echo; sleep 0.05; echo Welcome; cat") else {
        return;
    };
    let error = connect_error(&sshd.built_in_dial());
    assert!(error.report().contains("`Welcome`"), "{}", error.report());
}

#[test]
fn a_stream_is_closed_while_its_login_hangs() {
    let Some(sshd) = Sshd::start() else { return };
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let port = silent.local_addr().expect("bound").port();
    let dial = dial(&sshd, |_, server| server.port = Some(port));
    let stream = dial.dial(Occasion::First).expect("starts");
    let begun = Instant::now();
    stream.handle.close();
    drop((stream, dial));
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
}

/// Not a test: the body of a process that logs in, and again after its connection was cut.
#[test]
#[ignore = "started by another test"]
fn a_process_that_logs_in_twice() {
    let Some(dir) = std::env::var_os("LOGIN_DIR") else {
        return;
    };
    let dir = Path::new(&dir);
    let server = Server {
        user: None,
        host: "127.0.0.1".into(),
        port: std::env::var("LOGIN_PORT")
            .ok()
            .and_then(|port| port.parse().ok()),
    };
    let options = BuiltInOptions {
        identity_file: std::env::var_os("LOGIN_KEY").map(Into::into),
        known_hosts: Some(vec![dir.join("known_hosts")]),
        batch: false,
    };
    let dial = BuiltInDial::new(server, options).expect("a dial");
    for occasion in [Occasion::First, Occasion::Again] {
        let engine = match engine(&dial, occasion) {
            Ok(engine) => engine,
            Err(error) => return println!("{}", error.report()),
        };
        fs::write(dir.join("cut"), "").expect("written");
        until("the cut", || engine.dead().is_some());
    }
    println!("logged in twice");
}

/// Runs that process; answers `answer` when it asks; cuts its connections when it wants.
fn log_in_twice(sshd: &Sshd, setting: &[(&str, &Path)], answer: Option<&str>) -> String {
    let exe = std::env::current_exe().expect("known");
    let body = format!(
        "{} built_in_ssh::a_process_that_logs_in_twice --exact --ignored --nocapture",
        exe.display()
    );
    let mut command = match answer {
        Some(_) => Command::new("script"),
        None => Command::new("setsid"),
    };
    match answer {
        Some(_) => command.args(["-qec", &body, "/dev/null"]),
        None => command.args(["-w", "sh", "-c", &body]),
    };
    command.env_remove("SSH_AUTH_SOCK");
    command
        .env("HOME", sshd.dir.path())
        .env("LOGIN_DIR", sshd.dir.path());
    command.env("LOGIN_PORT", sshd.port.to_string());
    command.envs(setting.iter().copied());
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("runs");
    let mut stdin = child.stdin.take().expect("piped");
    let mut stdout = child.stdout.take().expect("piped");
    let cut = sshd.dir.path().join("cut");
    let (tell, told) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut buf = [0; 4096];
        while let Ok(len @ 1..) = stdout.read(&mut buf) {
            let _ = tell.send(buf[..len].to_vec());
        }
    });
    let mut text = String::new();
    let mut answered = false;
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match told.recv_timeout(Duration::from_millis(50)) {
            Ok(bytes) => text.push_str(&String::from_utf8_lossy(&bytes)),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
        }
        let asks = text.contains("Passphrase of") || text.contains("Password of");
        if let Some(answer) = answer.filter(|_| asks && !answered) {
            answered = true;
            thread::sleep(Duration::from_millis(200)); // it turns off the echo after asking
            writeln!(stdin, "{answer}").expect("written");
        }
        if cut.exists() {
            for pid in sshd.sessions() {
                let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            fs::remove_file(&cut).expect("removed");
        }
        if Instant::now() > end {
            let _ = child.kill();
            let _ = child.wait();
            panic!("hangs: {text}");
        }
    }
    child.wait().expect("reaped");
    text
}

#[test]
fn a_passphrase_is_asked_for_once() {
    if need("script", &[]).is_none() || need("setsid", &[]).is_none() {
        return;
    }
    let Some(sshd) = Sshd::start() else { return };
    let key = sshd.dir.path().join("locked");
    fs::copy(sshd.dir.path().join("user"), &key).expect("copied");
    let locked = Command::new("ssh-keygen")
        .args(["-q", "-p", "-P", "", "-N", "open sesame", "-f"])
        .arg(&key)
        .status();
    assert!(locked.expect("runs").success());
    let text = log_in_twice(&sshd, &[("LOGIN_KEY", &key)], Some("open sesame"));
    assert!(text.contains("logged in twice"), "{text}");
    assert_eq!(text.matches("Passphrase of").count(), 1, "{text}");
    assert!(!text.contains("sesame"), "it was shown: {text}");
    assert_eq!(sshd.logins(), 2);
    // With nobody to ask, it says so and ends.
    let text = log_in_twice(&sshd, &[("LOGIN_KEY", &key)], None);
    assert!(text.contains("did not accept our login"), "{text}");
    assert!(text.contains("needs ssh-agent or a terminal"), "{text}");
}

#[test]
fn the_agent_is_asked_first() {
    if need("ssh-agent", &[]).is_none() || need("setsid", &[]).is_none() {
        return;
    }
    let Some(sshd) = Sshd::start() else { return };
    let socket = sshd.dir.path().join("agent");
    let mut agent = Command::new("ssh-agent")
        .arg("-D")
        .arg("-a")
        .arg(&socket)
        .stdout(Stdio::null())
        .spawn()
        .expect("runs");
    until("the agent", || socket.exists());
    let added = Command::new("ssh-add")
        .arg("-q")
        .arg(sshd.dir.path().join("user"))
        .env("SSH_AUTH_SOCK", &socket)
        .status();
    let text = log_in_twice(&sshd, &[("SSH_AUTH_SOCK", &socket)], None);
    let _ = agent.kill();
    agent.wait().expect("reaped");
    assert!(added.expect("runs").success());
    assert!(text.contains("logged in twice"), "{text}");
    let text = log_in_twice(&sshd, &[], None);
    assert!(text.contains("nothing was there to be tried"), "{text}");
}

/// sshd sees a shadow file of ours, in a mount namespace of its own.
#[test]
fn a_password_is_asked_for_once() {
    if need("script", &[]).is_none() || need("openssl", &[]).is_none() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return crate::rig::skip("needs root");
    }
    let hashed = Command::new("openssl")
        .args(["passwd", "-6", "open sesame"])
        .output();
    let hashed = String::from_utf8(hashed.expect("runs").stdout).expect("text");
    let Some(sshd) = Sshd::start_over(&format!("root:{}:19000:0:99999:7:::\n", hashed.trim()))
    else {
        return;
    };
    let text = log_in_twice(&sshd, &[], Some("open sesame"));
    assert!(text.contains("logged in twice"), "{text}");
    assert_eq!(text.matches("Password of").count(), 1, "{text}");
    assert!(!text.contains("sesame"), "it was shown: {text}");
}

/// Nothing is lost when streams come and go while others work.
#[test]
fn streams_come_and_go_under_load() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let dial = sshd.built_in_dial();
    let steady = engine(&dial, Occasion::First).expect("dials");
    thread::scope(|scope| {
        let at = dir.path();
        let worker = scope.spawn(move || {
            for n in 0..6 {
                use_it(&steady, at, &format!("steady {n}.img")).expect("works");
            }
        });
        let mut n = 0;
        while !worker.is_finished() {
            let passing = engine(&dial, Occasion::Again).expect("dials");
            let path = at.join(format!("passing {n}")).display().to_string();
            let path = e2ebak::location::RemotePath::new(path).expect("a path");
            let store =
                e2ebak::remote::sftp_store::SftpStore::over(Arc::clone(&passing), &path, "p");
            let device = store.create(MIB).expect("creates");
            device
                .write_all_at(&pattern(200_000, n), 0)
                .expect("writes");
            drop((device, store, passing));
            n += 1;
        }
    });
    assert_eq!(sshd.logins(), 1);
}
