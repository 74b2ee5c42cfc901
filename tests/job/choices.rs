//! What users choose: what is restored where, what is left out, which host.

use super::*;

#[test]
fn restore_behaves_like_cp() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    let top = source.display();
    plain_tree(&source.join("tree"), 10);
    fs::write(source.join("letter"), "Dear Ann").expect("a file");
    place.init("10G").ok();
    place.backup(&source).ok();
    let id = place.ids().remove(0);
    let here = sandbox.dir("here");

    // A file into a directory, by its snapshot's id, by a prefix of it, and by `latest`.
    for snapshot in [&id[..], &id[..id.len() - 1], "latest"] {
        place
            .restore(&format!("{snapshot}:{top}/letter"), Path::new("."))
            .cwd(&here)
            .ok();
        assert_eq!(
            fs::read(here.join("letter")).expect("restored"),
            b"Dear Ann"
        );
        fs::remove_file(here.join("letter")).expect("removed");
    }
    // As a new name.
    place
        .restore(&format!("latest:{top}/letter"), &here.join("note"))
        .ok();
    assert_eq!(fs::read(here.join("note")).expect("restored"), b"Dear Ann");
    // Never over an existing file, unless told.
    fs::write(here.join("note"), "precious").expect("a file");
    place
        .restore(&format!("latest:{top}/letter"), &here.join("note"))
        .run()
        .code(3)
        .says("note");
    assert_eq!(fs::read(here.join("note")).expect("there"), b"precious");
    place
        .restore(&format!("latest:{top}/letter"), &here.join("note"))
        .arg("--overwrite")
        .ok();
    assert_eq!(fs::read(here.join("note")).expect("there"), b"Dear Ann");
    // A directory into a directory, and as a new name.
    place.restore(&format!("latest:{top}/tree"), &here).ok();
    assert_same_tree(&source.join("tree"), &here.join("tree"));
    place
        .restore(&format!("latest:{top}/tree"), &here.join("other"))
        .ok();
    assert_same_tree(&source.join("tree"), &here.join("other"));
    // The whole snapshot, under the full path.
    place.restore("latest", &sandbox.path("whole")).ok();
    let inside = source.strip_prefix("/").expect("an absolute path");
    assert_same_tree(&source, &sandbox.path("whole").join(inside));

    for (what, says) in [
        ("2001-01-01T00-00-00Z", "2001-01-01"),
        ("latest:/no/such/path", "/no/such/path"),
        ("nonsense", "nonsense"),
    ] {
        place
            .restore(what, &here.join("nothing"))
            .run()
            .code(1)
            .says(says);
        assert!(!here.join("nothing").exists(), "{what} made something");
    }
    // A path that climbs leads nowhere but into the snapshot.
    place
        .restore("latest:/../../../../etc/hostname", &here.join("climbed"))
        .run()
        .code_of(&[1, 2]);
    assert!(!here.join("climbed").exists());
    place.assert_closed();
}

#[test]
fn sources_are_filtered_as_told() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    for name in [
        "keep",
        "a.tmp",
        "b.o",
        "sub/keep",
        "sub/c.tmp",
        "cache/inside",
        "other/inside",
    ] {
        let path = source.join(name);
        fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
        fs::write(path, name).expect("a file");
    }
    let tag = "Signature: 8a477f597d28d172789f06886806bc55\n";
    fs::write(source.join("cache/CACHEDIR.TAG"), tag).expect("a file");
    fs::write(source.join("other/CACHEDIR.TAG"), "not the signature").expect("a file");
    let patterns = sandbox.file("patterns", "*.o\n");
    let elsewhere = sandbox.dir("source/elsewhere");
    place.init("10G").ok();

    // Another filesystem below the source, for this one run.
    let script = "mount -t tmpfs none \"$1\"; touch \"$1/on another\"";
    let backup = place
        .backup(&source)
        .args(["--exclude", "*.tmp", "--exclude-from"]);
    let backup = backup
        .arg(&patterns)
        .args(["--exclude-caches", "--one-file-system"]);
    backup.after(script, &[&elsewhere]).ok();

    let restored = sandbox.path("restored");
    place
        .restore(&format!("latest:{}", source.display()), &restored)
        .ok();
    let found = run(tool("find")
        .args([".", "-type", "f"])
        .current_dir(&restored));
    let mut found: Vec<&str> = found.lines().collect();
    found.sort();
    // A cache keeps its tag and nothing else, as with tar and restic.
    assert_eq!(
        found,
        [
            "./cache/CACHEDIR.TAG",
            "./keep",
            "./other/CACHEDIR.TAG",
            "./other/inside",
            "./sub/keep"
        ]
    );
    place.assert_closed();
}

#[test]
fn an_alias_of_the_ssh_configuration_is_a_host() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::with(
        &sandbox,
        &[&format!(
            "ForceCommand internal-sftp -d {}",
            sandbox.dir("store").display()
        )],
    );
    let home = sandbox.dir("home/.ssh");
    let config = sshd.ssh_config().replace('\n', "\n  ");
    let config = format!(
        "Host nas\n  HostName 127.0.0.1\n  Port {}\n  {config}\n",
        sshd.port()
    );
    fs::write(home.join("config"), config).expect("a configuration");
    // ssh takes the home directory from the passwd file and not from HOME.
    let passwd = fs::read_to_string("/etc/passwd").expect("passwd");
    let moved = format!(
        "root:x:0:0:root:{}:/bin/sh\n",
        sandbox.path("home").display()
    );
    sandbox.file("passwd", moved + &passwd);
    let passwd = sandbox.path("passwd");
    let wrap = |program: Program<'_>| {
        let program = program.after("mount --bind \"$1\" /etc/passwd", &[&passwd]);
        program.ok()
    };
    let source = sandbox.dir("source");
    plain_tree(&source, 5);
    let place = Place {
        sandbox: &sandbox,
        location: "nas:a.img".into(),
        options: Vec::new(),
        stored: sshd.stored("a.img"),
    };
    wrap(place.init("10G"));
    wrap(place.backup(&source));
    let listed = wrap(place.program("snapshots").arg("--json"));
    assert_eq!(listed.json().as_array().map(Vec::len), Some(1));
    assert!(place.stored.exists());
    place.assert_closed();
}
