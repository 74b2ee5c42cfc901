//! Nobody there: no terminal, no environment, standard input closed. The cron line and the systemd
//! unit are taken from the manual and run as cron and systemd run them.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{
    PASSPHRASE, Place, Program, Sandbox, Sshd, assert_same_tree, output, plain_tree, private_shell,
    root_or_skip, run, tool, wait_for,
};

const MANUAL: &str = include_str!("../docs/unattended.md");

/// The night of a machine: its own /etc, /home and /usr/local/bin, root's ssh configuration with
/// the alias `nas`, and nothing of the real ones.
struct Night<'a> {
    sandbox: &'a Sandbox,
}

impl<'a> Night<'a> {
    fn new(sandbox: &'a Sandbox, sshd: &Sshd) -> Self {
        let etc = sandbox.path("etc");
        run(tool("cp").arg("-a").arg("/etc").arg(&etc));
        let passwd = fs::read_to_string("/etc/passwd").expect("passwd");
        let root_home = sandbox.path("home/root");
        // ssh takes the home directory from the passwd file and not from HOME.
        let root_line = format!("root:x:0:0:root:{}:/bin/sh\n", root_home.display());
        fs::write(etc.join("passwd"), root_line + &passwd).expect("written");
        fs::create_dir_all(etc.join("e2ebak")).expect("a directory");
        fs::write(
            etc.join("e2ebak/laptop.key"),
            b"not a line\n but \0 bytes \xff\n",
        )
        .expect("a key");

        fs::create_dir_all(root_home.join(".ssh")).expect("a directory");
        let config = sshd.ssh_config().replace('\n', "\n  ");
        let config = format!(
            "Host nas\n  HostName 127.0.0.1\n  Port {}\n  {config}\n",
            sshd.port()
        );
        fs::write(root_home.join(".ssh/config"), config).expect("a configuration");
        plain_tree(&sandbox.dir("home/ann"), 30);

        let local = sandbox.dir("local");
        fs::copy(Program::binary(), local.join("e2ebak")).expect("the program");
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(local.join("e2ebak"), executable).expect("a mode");
        fs::create_dir_all(sshd.store().join("backups")).expect("a directory");
        Night { sandbox }
    }

    /// Runs a command line as cron does: `/bin/sh -c` with cron's environment, no terminal.
    fn cron(&self, line: &str) -> Output {
        let home = self.sandbox.path("home/root");
        let script = "mount --bind \"$1/etc\" /etc; mount --bind \"$1/home\" /home
            mount --bind \"$1/local\" /usr/local/bin; cd \"$2\"
            exec setsid --wait env -i HOME=\"$2\" LOGNAME=root SHELL=/bin/sh PATH=/usr/bin:/bin \
                /bin/sh -c \"$3\" <&-";
        let mut command = private_shell(script);
        command
            .arg("sh")
            .arg(self.sandbox.root())
            .arg(home)
            .arg(line);
        output(&mut command)
    }

    fn ok(&self, line: &str) -> String {
        let output = self.cron(line);
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let trouble = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{line}\n{}\n{told}{trouble}",
            output.status
        );
        told
    }

    fn init(&self) {
        self.ok(
            "/usr/local/bin/e2ebak init --key-file /etc/e2ebak/laptop.key --size 50G \
             --kdf-memory 32M --kdf-time 4 nas:backups/laptop.img",
        );
    }

    /// Two nights by this line: both silent, both a snapshot of everything.
    fn two_nights(&self, line: &str) {
        for _ in 0..2 {
            let output = self.cron(line);
            assert!(output.status.success(), "{line}\n{output:?}");
            assert!(
                output.stdout.is_empty() && output.stderr.is_empty(),
                "{output:?}"
            );
            std::thread::sleep(Duration::from_millis(1100));
        }
        let key = "--key-file /etc/e2ebak/laptop.key nas:backups/laptop.img";
        let listed = self.ok(&format!("/usr/local/bin/e2ebak snapshots --json {key}"));
        let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
        assert_eq!(listed.as_array().map(Vec::len), Some(2), "{listed}");
        let restored = self.sandbox.path("restored");
        self.ok(&format!(
            "/usr/local/bin/e2ebak restore {key} latest {}",
            restored.display()
        ));
        assert_same_tree(&self.sandbox.path("home/ann"), &restored.join("home/ann"));
        assert_same_tree(&self.sandbox.path("etc"), &restored.join("etc"));
    }
}

/// `home/…` relative to the server's home lands in the sandbox.
fn nas(sandbox: &Sandbox) -> Sshd {
    let store = sandbox.dir("store");
    Sshd::with(
        sandbox,
        &[&format!(
            "ForceCommand internal-sftp -d {}",
            store.display()
        )],
    )
}

#[test]
fn the_cron_line_of_the_manual_works_night_after_night() {
    if !root_or_skip() {
        return;
    }
    let line = MANUAL
        .lines()
        .find_map(|line| line.strip_prefix("17 2 * * * root "));
    let line = line.expect("the manual has a cron line");
    assert!(
        MANUAL.contains("```cron"),
        "the cron line is not in a block of its own"
    );
    let readme = include_str!("../README.md");
    assert!(readme.contains(line), "README.md has another cron line");
    let sandbox = Sandbox::new();
    let sshd = nas(&sandbox);
    let night = Night::new(&sandbox, &sshd);
    night.init();
    night.two_nights(line);
    sandbox.assert_nothing_left();
}

#[test]
fn the_systemd_unit_of_the_manual_works_night_after_night() {
    if !root_or_skip() {
        return;
    }
    let value = |name: &str| {
        let line = MANUAL.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("the manual has no {name}"))
    };
    let sandbox = Sandbox::new();
    let sshd = nas(&sandbox);
    let night = Night::new(&sandbox, &sshd);
    night.init();
    // What systemd does with LoadCredential and %d.
    let (name, from) = value("LoadCredential=").split_once(':').expect("name:path");
    let credentials = sandbox.dir("credentials");
    let from = sandbox.root().join(from.trim_start_matches('/'));
    fs::copy(from, credentials.join(name)).expect("the credential");
    let line = value("ExecStart=").replace("%d", &credentials.display().to_string());
    night.two_nights(&format!("exec {line}"));
    sandbox.assert_nothing_left();
}

/// The units are what systemd takes for units, where systemd is there to be asked.
#[test]
fn the_systemd_units_are_valid() {
    let blocks: Vec<&str> = MANUAL.split("```ini\n").skip(1).collect();
    assert_eq!(blocks.len(), 2);
    let unit = |block: &str| block.split("```").next().unwrap_or_default().to_string();
    for section in ["[Service]", "[Timer]"] {
        assert!(blocks.iter().any(|block| unit(block).contains(section)));
    }
    if common::find_tool("systemd-analyze").is_none() {
        eprintln!("systemd is not installed: only the sections were looked at");
        return;
    }
    let sandbox = Sandbox::new();
    let program = "ExecStart=/usr/local/bin/e2ebak";
    let there = format!("ExecStart={}", Program::binary().display());
    for block in &blocks {
        let text = unit(block).replace(program, &there);
        let name = if text.contains("[Timer]") {
            "e2ebak.timer"
        } else {
            "e2ebak.service"
        };
        sandbox.file(name, text);
    }
    let mut verify = tool("systemd-analyze");
    verify
        .arg("verify")
        .arg(sandbox.path("e2ebak.timer"))
        .arg(sandbox.path("e2ebak.service"));
    let told = output(&mut verify);
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(
        !told.contains("e2ebak.timer:") && !told.contains("e2ebak.service:"),
        "{told}"
    );
}

#[test]
fn quiet_prints_nothing_but_trouble() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let (source, mounted) = (sandbox.dir("source"), sandbox.dir("mnt"));
    plain_tree(&source, 10);
    let what = format!("latest:{}", source.display());
    let runs = [
        place.init("1G").arg("--quiet"),
        place.backup(&source).arg("--quiet"),
        place.backup(&source).arg("-q"),
        place
            .restore(&what, &sandbox.path("restored"))
            .arg("--quiet"),
        place.program("mount").arg(&mounted).arg("--quiet"),
        Program::new(&sandbox, "umount")
            .arg(&mounted)
            .arg("--quiet"),
    ];
    for run in runs {
        let ran = run.ok();
        assert!(ran.stdout.is_empty() && ran.stderr.is_empty(), "{ran}");
        std::thread::sleep(Duration::from_millis(1100));
    }
    let wrong = place
        .backup(&source)
        .arg("--quiet")
        .env("E2EBAK_PASSPHRASE", "wrong");
    wrong.run().code(12).says("error:");
    place.assert_closed();
}

/// Without a terminal the progress is plain lines: nothing that moves a cursor.
#[test]
fn without_a_terminal_the_output_is_plain_lines() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    common::large_file(&source.join("large"), 50 << 20, 1);
    for run in [
        place.init("1G"),
        place.backup(&source),
        place.program("snapshots"),
        place.program("info"),
    ] {
        let ran = run.ok();
        let all = ran.stdout.clone() + &ran.stderr;
        assert!(!all.contains(['\x1b', '\r']), "{all:?}");
        assert!(!ran.stdout.is_empty(), "{ran}");
    }
}

#[test]
fn a_second_run_exits_11_or_waits() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let (source, mounted) = (sandbox.dir("source"), sandbox.dir("mnt"));
    plain_tree(&source, 10);
    place.init("1G").ok();
    place.program("mount").arg(&mounted).ok();
    let at_once = place.backup(&source).run().code(11);
    assert!(at_once.took < Duration::from_secs(5), "{at_once}");
    let patient = place.backup(&source).args(["--wait", "2s"]).run().code(11);
    assert!(patient.took >= Duration::from_secs(2), "{patient}");
    let mut waiting = place.backup(&source).args(["--wait", "30m"]).spawn();
    std::thread::sleep(Duration::from_secs(2));
    assert!(!waiting.is_over(), "{}", waiting.wait());
    Program::new(&sandbox, "umount").arg(&mounted).ok();
    let waited = waiting.wait().code(0);
    assert!(waited.took < Duration::from_secs(60), "{waited}");
    assert_eq!(place.ids().len(), 1);
    place.assert_closed();
}

/// ssh in batch mode: an unknown host is an error and not a question.
#[test]
fn nobody_is_asked_where_nobody_is() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    fs::write(sandbox.path("sshd/known_hosts"), "").expect("written");
    let place = Place::over(&sandbox, &sshd);
    let asks: Vec<String> = sshd
        .options()
        .into_iter()
        .map(|option| option.replace("StrictHostKeyChecking=yes", "StrictHostKeyChecking=ask"))
        .collect();
    let place = Place {
        options: asks,
        ..place
    };
    let ran = place
        .program("snapshots")
        .through(["setsid", "--wait"])
        .run();
    assert!(ran.took < Duration::from_secs(20), "{ran}");
    ran.code(14).says("host key");

    // No passphrase, and no terminal to ask on.
    let local = Place::local(&sandbox);
    local.init("1G").ok();
    let program = local.program("snapshots").env_remove("E2EBAK_PASSPHRASE");
    let ran = program
        .through(["setsid", "--wait"])
        .run()
        .code_of(&[2, 12]);
    ran.says("passphrase").says("--passphrase-file");
}

/// Every source of a passphrase, each alone and each before the next one.
#[test]
fn the_first_source_of_a_passphrase_wins() {
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    place.init("1G").ok();
    let right = sandbox.file("right", format!("{PASSPHRASE}\n"));
    let exact = sandbox.file("exact", PASSPHRASE);
    let two_lines = sandbox.file("two lines", format!("{PASSPHRASE}\n\n"));
    let wrong = sandbox.file("wrong", "wrong");
    let no_shell = sandbox.file("a file with $(spaces)", PASSPHRASE);
    let list = || place.program("snapshots").env_remove("E2EBAK_PASSPHRASE");

    list().arg("--key-file").arg(&exact).ok();
    // A key file is taken byte by byte; elsewhere one newline at the end goes, and only one.
    list().arg("--key-file").arg(&right).run().code(12);
    list().arg("--passphrase-file").arg(&right).ok();
    list().arg("--passphrase-file").arg(&exact).ok();
    list()
        .arg("--passphrase-file")
        .arg(&two_lines)
        .run()
        .code(12);
    let shell = ["/bin/sh", "-c", "f=$1; shift; exec \"$@\" 7<\"$f\"", "sh"];
    list()
        .args(["--passphrase-fd", "7"])
        .through(shell)
        .through([&right])
        .ok();
    let command = format!("cat '{}'", no_shell.display());
    list().args(["--passphrase-command", &command]).ok();
    list()
        .args(["--passphrase-command", "false"])
        .run()
        .code_of(&[1, 2, 12]);
    list()
        .args(["--passphrase-file", "/no/such/file"])
        .run()
        .code_of(&[1, 2])
        .says("/no/such/file");

    list().env("E2EBAK_PASSPHRASE_FILE", &right).ok();
    list()
        .env("E2EBAK_PASSPHRASE_FD", "7")
        .through(shell)
        .through([&right])
        .ok();
    list().env("E2EBAK_PASSPHRASE_COMMAND", &command).ok();
    list().env("E2EBAK_PASSPHRASE", PASSPHRASE).ok();

    // Flags before the environment; in it the file, the descriptor, the command, the words.
    let mut env: Vec<(&str, String)> = vec![
        ("E2EBAK_PASSPHRASE", "wrong".into()),
        (
            "E2EBAK_PASSPHRASE_COMMAND",
            format!("cat '{}'", wrong.display()),
        ),
        ("E2EBAK_PASSPHRASE_FD", "8".into()),
        ("E2EBAK_PASSPHRASE_FILE", wrong.display().to_string()),
    ];
    let both = [
        "/bin/sh",
        "-c",
        "f=$1 w=$2; shift 2; exec \"$@\" 7<\"$f\" 8<\"$w\"",
        "sh",
    ];
    let all = |env: &[(&str, String)]| {
        let program = env
            .iter()
            .fold(list(), |program, (name, value)| program.env(name, value));
        program.through(both).through([&right, &wrong])
    };
    all(&env).arg("--passphrase-file").arg(&right).ok();
    all(&env).run().code(12);
    env[3].1 = right.display().to_string();
    all(&env).ok();
    env.truncate(3);
    env[2].1 = "7".into();
    all(&env).ok();
    env.truncate(2);
    env[1].1 = format!("cat '{}'", right.display());
    all(&env).ok();
}

/// On a terminal: hidden, and asked twice for a new image.
#[test]
fn a_terminal_is_asked_without_echo() {
    if !common::tool_or_skip("script") {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let ask = |verb: &str, typed: &[&str]| -> (bool, String) {
        let program = Program::binary();
        let line = format!("{} {verb}", program.display());
        let mut typing = String::new();
        for words in typed {
            typing += &format!("sleep 1; printf '%s\\n' '{words}'; ");
        }
        let pipe = format!("({typing} sleep 1) | script -qec '{line}' /dev/null");
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &pipe]).env_clear().stdin(Stdio::null());
        shell
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("TERM", "xterm");
        let output = output(shell.env("HOME", sandbox.path("home")));
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.success(), told)
    };
    let image = place.stored.display();
    let init = format!("init {image} --size 1G --kdf-memory 32M --kdf-time 4");
    let (created, told) = ask(&init, &[PASSPHRASE, "something else"]);
    assert!(!created && !place.stored.exists(), "{told}");
    let (created, told) = ask(&init, &[PASSPHRASE, PASSPHRASE]);
    assert!(created, "{told}");
    assert!(
        !told.contains(PASSPHRASE),
        "the passphrase was echoed: {told}"
    );
    place.program("snapshots").ok();
    let (listed, told) = ask(&format!("snapshots {image}"), &["wrong", PASSPHRASE]);
    assert!(listed, "a second try is not given: {told}");
    assert!(
        !told.contains(PASSPHRASE),
        "the passphrase was echoed: {told}"
    );
}

/// What nobody may read in a process list, an environment of a child or a core file.
#[test]
fn the_passphrase_is_in_no_command_line_and_no_child_environment() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let mounted = sandbox.dir("mnt");
    place.init("1G").ok();
    // From under a limit that allows core files.
    let raised = ["sh", "-c", "ulimit -c unlimited; exec \"$@\"", "sh"];
    let mount = place.program("mount").arg(&mounted);
    mount.through(raised).ok();
    let mut seen = 0;
    for (pid, line) in sandbox.processes() {
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        for bytes in [line.as_bytes(), &environ] {
            let found = bytes
                .windows(PASSPHRASE.len())
                .any(|w| w == PASSPHRASE.as_bytes());
            assert!(!found, "process {pid} shows the passphrase: {line}");
        }
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
        let core = limits
            .lines()
            .find(|line| line.starts_with("Max core file size"));
        if line.contains("e2ebak") && !line.contains("sftp-server") {
            assert!(
                core.is_some_and(|core| core.contains(" 0 ")),
                "process {pid}: {core:?}"
            );
            seen += 1;
        }
    }
    assert!(seen > 0, "no process of the program was looked at");
    Program::new(&sandbox, "umount").arg(&mounted).ok();
    wait_for("the end", Duration::from_secs(10), || {
        sandbox.processes().is_empty()
    });
    place.assert_closed();
}
