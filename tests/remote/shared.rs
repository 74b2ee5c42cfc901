//! Several streams over one connection of ssh, and what happens where that is not possible.

use std::ffi::OsStr;
use std::fs;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use e2ebak::error::{Error, Kind, Result};
use e2ebak::link::ssh::{SshDial, SshOptions};
use e2ebak::link::{Dial, Occasion, STREAMS_MAX};
use e2ebak::location::{RemotePath, Server};
use e2ebak::remote::Store;
use e2ebak::remote::engine::{Bounds, Engine};
use e2ebak::remote::sftp_store::SftpStore;

use crate::link::{Frozen, children, connect_error, kill};
use crate::rig::{Sshd, pattern};

const MIB: u64 = 1 << 20;

/// Our children that are masters.
fn masters() -> Vec<i32> {
    children("ControlMaster=yes")
}

/// The directory of the only master's socket.
fn socket_dir() -> PathBuf {
    let [master] = masters()[..] else {
        panic!("one master")
    };
    let line = fs::read(format!("/proc/{master}/cmdline")).expect("read");
    let mut words = line.split(|byte| *byte == 0);
    words.find(|word| *word == b"-S").expect("a socket");
    let socket = PathBuf::from(OsStr::from_bytes(words.next().expect("a path")));
    socket.parent().expect("a directory").into()
}

pub fn engine(dial: &dyn Dial, occasion: Occasion) -> Result<Arc<Engine>> {
    Engine::start(dial.dial(occasion)?, Bounds::default()).map(Arc::new)
}

/// The first stream and `more` others, all at once.
pub fn engines(dial: &dyn Dial, more: usize) -> Vec<Arc<Engine>> {
    thread::scope(|scope| {
        let occasions =
            std::iter::once(Occasion::First).chain(std::iter::repeat_n(Occasion::Again, more));
        let starting: Vec<_> = occasions
            .map(|occasion| scope.spawn(move || engine(dial, occasion)))
            .collect();
        let engines = starting
            .into_iter()
            .map(|thread| thread.join().expect("no panic"));
        engines
            .map(|engine| engine.unwrap_or_else(|e| panic!("{}", e.report())))
            .collect()
    })
}

/// Writes over this stream and reads it back.
pub fn use_it(engine: &Arc<Engine>, dir: &Path, name: &str) -> Result<()> {
    let path = RemotePath::new(dir.join(name).display().to_string()).expect("a path");
    let store = SftpStore::over(engine.clone(), &path, name);
    let device = store.create(4 * MIB)?;
    let data = pattern(3 * MIB as usize, name.len() as u64);
    device.write_all_at(&data, 5)?;
    let mut back = vec![0; data.len()];
    device.read_exact_at(&mut back, 5)?;
    assert!(back == data);
    Ok(())
}

#[test]
fn eight_streams_are_one_login_and_none_ends_another() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let dial = sshd.dial();
    let mut engines = engines(&dial, STREAMS_MAX - 1);
    for (n, engine) in engines.iter().enumerate() {
        use_it(engine, dir.path(), &format!("{n}.img")).expect("works");
    }
    assert_eq!(sshd.logins(), 1);
    let socket_dir = socket_dir();
    let mode = fs::metadata(&socket_dir)
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700);

    // The first goes, one is killed: the others live.
    drop(engines.remove(0));
    let killed = children("-s -- 127.0.0.1")[0];
    kill(killed, rustix::process::Signal::KILL);
    thread::sleep(Duration::from_millis(300));
    let alive = engines.iter().filter(|engine| engine.dead().is_none());
    assert_eq!(alive.clone().count(), STREAMS_MAX - 2);
    for (n, engine) in alive.enumerate() {
        use_it(engine, dir.path(), &format!("again {n}.img")).expect("works");
    }
    // Another one, though the dial has been used up: the same login.
    let another = engine(&dial, Occasion::Again).expect("dials");
    drop(dial);
    use_it(&another, dir.path(), "another.img").expect("works");
    assert_eq!(sshd.logins(), 1);

    drop((another, engines));
    assert!(masters().is_empty() && children("-- 127.0.0.1").is_empty());
    assert!(!socket_dir.exists());
}

#[test]
fn a_server_that_refuses_sessions_gets_connections() {
    let Some(sshd) = Sshd::with("MaxSessions 2") else {
        return;
    };
    let dir = tempfile::tempdir().expect("a directory");
    let dial = sshd.dial();
    let engines = engines(&dial, 3);
    for (n, engine) in engines.iter().enumerate() {
        use_it(engine, dir.path(), &format!("{n}.img")).expect("works");
    }
    assert_eq!(sshd.logins(), 3, "one for two streams, two for the others");

    // Who could log in no more says why it had to.
    fs::write(sshd.dir.path().join("authorized_keys"), "").expect("written");
    let error = connect_error(&dial);
    assert_eq!(error.kind(), Kind::Denied, "{}", error.report());
    assert!(
        error.report().contains("no more streams on one connection")
            && error.report().contains("Permission denied"),
        "{}",
        error.report()
    );
    assert!(
        error
            .deepest_hint()
            .is_some_and(|hint| hint.contains("MaxSessions"))
    );
}

#[test]
fn a_master_that_is_killed_ends_its_streams_and_is_replaced() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let dial = sshd.dial();
    let before = engines(&dial, 2);
    let [master] = masters()[..] else {
        panic!("one master")
    };
    kill(master, rustix::process::Signal::KILL);
    for (n, engine) in before.iter().enumerate() {
        let error = use_it(engine, dir.path(), &format!("{n}.img")).expect_err("is gone");
        assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
        assert!(
            error.report().contains("killed by signal 9"),
            "{}",
            error.report()
        );
    }
    let after = engine(&dial, Occasion::Again).expect("dials");
    use_it(&after, dir.path(), "after.img").expect("works");
    assert_eq!(sshd.logins(), 2);
    assert_eq!(masters().len(), 1);
}

#[test]
fn a_frozen_connection_ends_all_its_streams() {
    let Some(sshd) = Sshd::start() else { return };
    let mut options = sshd.options();
    options.options.push("ServerAliveInterval=1".into());
    let dial = SshDial::new(sshd.server(), options);
    let engines = engines(&dial, 2);
    let _frozen = Frozen::new(sshd.sessions());
    let until = Instant::now() + Duration::from_secs(20);
    while engines.iter().any(|engine| engine.dead().is_none()) {
        assert!(Instant::now() < until, "a stream has not noticed");
        thread::sleep(Duration::from_millis(50));
    }
    for engine in &engines {
        let error = engine.dead().expect("is dead");
        assert!(
            error.report().contains("the server stopped answering"),
            "{}",
            error.report()
        );
    }
}

#[test]
fn what_the_user_says_about_sharing_is_kept() {
    let Some(sshd) = Sshd::start() else { return };
    for option in ["ControlMaster=no", "controlpath none"] {
        let mut options = sshd.options();
        options.options.push(option.into());
        let before = sshd.logins();
        let engines = engines(&SshDial::new(sshd.server(), options), 2);
        assert_eq!(sshd.logins() - before, engines.len());
        assert!(masters().is_empty());
    }
}

/// A configuration file that shares connections: its master is used while there is one, and our
/// own otherwise.
#[test]
fn a_master_of_the_users_own_is_used() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("socket");
    let options = sshd.options();
    let file = options.config_file.as_ref().expect("a file");
    let mut config = fs::read_to_string(file).expect("read");
    config.push_str(&format!(
        "ControlMaster auto\nControlPath {}\n",
        socket.display()
    ));
    fs::write(file, config).expect("written");

    let mut command = Command::new("ssh");
    command.arg("-F").arg(file).arg("-i");
    command.arg(options.identity_file.as_ref().expect("a file"));
    command.args(["-N", "-p", &sshd.port.to_string(), "127.0.0.1"]);
    let mut users = command.stdin(Stdio::null()).spawn().expect("runs");
    let until = Instant::now() + Duration::from_secs(10);
    while !socket.exists() && Instant::now() < until {
        thread::sleep(Duration::from_millis(20));
    }
    let dial = SshDial::new(sshd.server(), options);
    let shared = engines(&dial, 2);
    let (logins, ours) = (sshd.logins(), masters().len());
    drop(shared);
    let survived = users.try_wait().expect("a child").is_none();
    let _ = users.kill();
    users.wait().expect("reaped");
    assert!(
        survived && (logins, ours) == (1, 0),
        "{survived} {logins} {ours}"
    );

    let _ = fs::remove_file(&socket);
    let shared = engines(&dial, 2);
    assert_eq!((sshd.logins(), masters().len()), (2, 1));
    for (n, engine) in shared.iter().enumerate() {
        use_it(engine, dir.path(), &format!("{n}.img")).expect("works");
    }
}

#[test]
fn an_ssh_that_cannot_share_is_used_as_it_can() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let says = "echo 'command-line: line 0: Bad configuration option: controlmaster' >&2; exit 255";
    let goes_on = "echo 'ControlSocket already exists, disabling multiplexing' >&2; exec sleep 60";
    for (n, instead) in [says, goes_on].into_iter().enumerate() {
        let program = dir.path().join(format!("ssh{n}"));
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *ControlMaster=yes*) {instead};; esac\nexec ssh \"$@\"\n"
        );
        fs::write(&program, script).expect("written");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("set");
        let mut options = sshd.options();
        options.program = Some(program);
        let dial = SshDial::new(sshd.server(), options);
        let before = sshd.logins();
        let engines = engines(&dial, 2);
        for (m, engine) in engines.iter().enumerate() {
            use_it(engine, dir.path(), &format!("{n}.{m}.img")).expect("works");
        }
        assert_eq!(sshd.logins() - before, 3);
        assert!(children("sleep 60").is_empty());
    }
}

/// A server that accepts and never says a word.
#[test]
fn a_stream_is_closed_while_its_login_hangs() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("binds");
    let server = Server {
        user: None,
        host: "127.0.0.1".into(),
        port: Some(silent.local_addr().expect("bound").port()),
    };
    let options = SshOptions {
        batch: true,
        ..SshOptions::default()
    };
    let dial = SshDial::new(server, options);
    let stream = dial.dial(Occasion::First).expect("starts");
    let socket_dir = socket_dir();
    let handle = stream.handle.clone();
    let begun = Instant::now();
    handle.close();
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    let why: Option<Error> = handle.diagnosis();
    assert!(why.is_some_and(|why| why.report().contains("was closed")));
    drop((dial, stream, handle));
    assert!(masters().is_empty());
    assert!(!socket_dir.exists());
}
