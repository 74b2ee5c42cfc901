//! Snapshots read as an ordinary user who may mount nothing: listed, printed, searched, compared,
//! packed and restored, against the trees that were backed up.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{
    Place, Program, Proxy, Ran, Sandbox, Shape, Sshd, assert_same_tree, differences, large_file,
    odd_tree, plain_tree, private_shell, root_or_skip, run, tool, tool_or_skip, wait_for,
};
use rustix::process::Signal;
use serde_json::Value;

const UID: u32 = 65_534;

/// An ordinary user in a user namespace of nobody's: no mounts, no FUSE.
fn as_user<'a>(program: Program<'a>) -> Program<'a> {
    program.by_user(UID)
}

/// Two snapshots of a tree that has changed in between. Their ids, older first.
fn two_snapshots(place: &Place, source: &Path) -> [String; 2] {
    let write = |name: &str, content: &[u8]| fs::write(source.join(name), content).expect("write");
    for dir in ["docs", "docs/old", "empty", "links"] {
        fs::create_dir_all(source.join(dir)).expect("mkdir");
    }
    write("docs/letter.txt", b"dear");
    write("docs/stays.txt", b"as it is");
    fs::hard_link(source.join("docs/stays.txt"), source.join("links/one")).expect("a link");
    write("docs/mode", b"x");
    write("docs/old/gone", b"soon");
    write("large", &vec![7; 3_000_000]);
    symlink("letter.txt", source.join("docs/link")).expect("symlink");
    place.init("1G").ok();
    place.backup(source).ok();
    std::thread::sleep(Duration::from_millis(1100));
    write("docs/letter.txt", b"dear Ann");
    write("docs/new", b"new");
    fs::remove_dir_all(source.join("docs/old")).expect("rm");
    fs::remove_file(source.join("docs/link")).expect("rm");
    fs::create_dir(source.join("docs/link")).expect("mkdir");
    let mode = fs::Permissions::from_mode(0o600);
    fs::set_permissions(source.join("docs/mode"), mode).expect("chmod");
    place.backup(source).ok();
    let ids = place.ids();
    assert_eq!(ids.len(), 2, "{ids:?}");
    [ids[0].clone(), ids[1].clone()]
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

fn objects(text: &str) -> Vec<Value> {
    let parsed = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    parsed.collect()
}

/// The image, readable for the user.
fn open_image(sandbox: &Sandbox, place: &Place) {
    sandbox.open_to(UID);
    chown(&place.stored, Some(UID), Some(UID)).expect("chown");
}

#[test]
fn snapshots_are_looked_into_without_any_privilege() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    let [first, second] = two_snapshots(&place, &source);
    open_image(&sandbox, &place);
    let top = source.display();
    let user = |verb: &str| as_user(place.program(verb));
    let before = fs::metadata(&place.stored).expect("stat");

    // What is there.
    let all = user("ls").ok().stdout;
    assert!(all.contains(&first) && all.contains(&second), "{all}");
    let listed = user("ls").arg(format!("latest:{top}/docs")).ok().stdout;
    assert_eq!(
        lines(&listed),
        ["letter.txt", "link", "mode", "new", "stays.txt"]
    );
    let long = user("ls")
        .args(["-l", &format!("{first}:{top}/docs")])
        .ok()
        .stdout;
    let link = long
        .lines()
        .find(|line| line.contains("link"))
        .expect("listed");
    assert!(
        link.starts_with("lrwxrwxrwx") && link.ends_with("link -> letter.txt"),
        "{link}"
    );
    let deep = user("ls")
        .args(["-R", &format!("{first}:{top}")])
        .ok()
        .stdout;
    assert!(
        lines(&deep).contains(&&*format!("{top}/docs/old/gone")),
        "{deep}"
    );
    let json = user("ls")
        .args(["--json", &format!("latest:{top}")])
        .ok()
        .stdout;
    let large = objects(&json)
        .into_iter()
        .find(|o| o["path"] == format!("{top}/large"));
    let large = large.expect("listed");
    assert_eq!(
        (&large["size"], &large["type"]),
        (&3_000_000.into(), &"file".into())
    );

    // What is in it.
    let letter = |id: &str| {
        user("cat")
            .arg(format!("{id}:{top}/docs/letter.txt"))
            .ok()
            .stdout
    };
    assert_eq!((&*letter(&first), &*letter(&second)), ("dear", "dear Ann"));
    let followed = user("cat")
        .arg(format!("{first}:{top}/docs/link"))
        .ok()
        .stdout;
    assert_eq!(followed, "dear");
    user("cat")
        .arg(format!("latest:{top}/docs"))
        .run()
        .code(2)
        .says("not a regular file");

    // Where things are.
    let found = |args: &[&str]| user("find").arg("latest").args(args).ok().stdout;
    assert_eq!(
        found(&["--name", "l*r.txt"]),
        format!("{top}/docs/letter.txt\n")
    );
    assert_eq!(found(&["--size", "+1M"]), format!("{top}/large\n"));
    assert_eq!(found(&["--older", "2000-01-01"]), "");
    let directories = found(&["--type", "d", "--name", "docs", "--newer", "1d"]);
    assert_eq!(directories, format!("{top}/docs\n"));

    // What has changed.
    let changed = user("diff")
        .args([&first, &second])
        .arg(&source)
        .ok()
        .stdout;
    let changed = lines(&changed);
    for line in [
        format!("M {top}/docs/letter.txt  (4 B -> 8 B)"),
        format!("T {top}/docs/link  (symlink -> directory)"),
        format!("A {top}/docs/mode  (mode 0644 -> 0600)"),
        format!("+ {top}/docs/new"),
        format!("- {top}/docs/old/"),
        format!("- {top}/docs/old/gone"),
        "1 added, 2 removed, 3 changed".into(),
    ] {
        assert!(changed.contains(&&*line), "no `{line}` in {changed:#?}");
    }
    assert_eq!(changed.len(), 7, "{changed:#?}");
    let json = user("diff").args(["--json", &first, &second]).ok().stdout;
    let kinds: Vec<_> = objects(&json).iter().map(|o| o["change"].clone()).collect();
    assert_eq!(kinds.len(), 6, "{json}");
    assert!(kinds.contains(&"content".into()), "{json}");

    // Every version of a path.
    let versions = |path: &str| {
        let path = format!("{top}/{path}");
        user("versions").arg(path).arg("--json").ok().json()
    };
    let letters = versions("docs/letter.txt");
    let sizes: Vec<_> = letters
        .as_array()
        .expect("rows")
        .iter()
        .map(|v| v["size"].clone())
        .collect();
    assert_eq!(sizes, [4, 8]);
    let stays = versions("docs/stays.txt");
    assert_eq!(stays.as_array().map(Vec::len), Some(1), "{stays}");
    assert_eq!(
        (&stays[0]["first"], &stays[0]["last"]),
        (&first.into(), &second.into())
    );
    let gone = versions("docs/old/gone");
    assert_eq!(
        (&gone[0]["present"], &gone[1]["present"]),
        (&true.into(), &false.into())
    );
    user("versions")
        .arg("/never")
        .run()
        .code(1)
        .says("no snapshot has it");

    // Output that cannot be written is a failure; a reader that has seen enough is none.
    let full = ["/bin/sh", "-c", "exec \"$@\" >/dev/full", "sh"];
    let large = format!("latest:{top}/large");
    for program in [
        user("ls").args(["-R", &large]),
        user("snapshots"),
        user("find").args(["latest", "--json"]),
        user("recovery-sheet").arg("--html"),
        user("cat").arg(&large),
        user("dump").args([&large, "--tar"]),
        as_user(Program::bare(&sandbox)).arg("--help"),
    ] {
        let ran = program.through(full).run().code(1);
        ran.says("error: cannot").says("No space left on device");
    }
    let head = "\"$@\" | head -c 10; exit ${PIPESTATUS[0]}";
    let head = ["/bin/bash", "-c", head, "bash"];
    for program in [
        user("cat").arg(&large),
        user("dump").args([&large, "--tar"]),
    ] {
        let ran = program.through(head).run().code(128 + 13);
        assert_eq!((ran.stdout.len(), &*ran.stderr), (10, ""), "{ran}");
    }

    let after = fs::metadata(&place.stored).expect("stat");
    let times = |m: &fs::Metadata| (m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
    assert_eq!(times(&before), times(&after), "the image was written to");
    place.assert_closed();
}

#[test]
fn what_is_not_there_is_said_and_what_is_near_is_named() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    let [first, _] = two_snapshots(&place, &source);
    let top = source.display();
    for verb in ["ls", "cat", "find", "restore", "dump"] {
        let with = |what: String| {
            let program = place.program(verb).arg(what);
            match verb {
                "restore" => program.arg(sandbox.path("nowhere")).run(),
                "dump" => program.arg("--tar").run(),
                _ => program.run(),
            }
        };
        with("1999:/x".into()).code(1).says("nearest");
        with(format!("{}:/x", &first[..8]))
            .code(2)
            .says("give more of the id");
        let missing = with(format!("latest:{top}/docs/leter.txt")).code(1);
        missing
            .says("there is no \"leter.txt\"")
            .says("there is \"letter.txt\"");
        with(":/x".into()).code(2);
        assert!(!sandbox.path("nowhere").exists());
    }
    let (letter, there) = (
        format!("latest:{top}/docs/letter.txt"),
        sandbox.path("there"),
    );
    fs::write(&there, b"mine").expect("write");
    place
        .restore(&letter, &there)
        .run()
        .code(3)
        .says("left as it is");
    assert_eq!(fs::read(&there).expect("read"), b"mine");
    place.assert_closed();
}

#[test]
fn a_restore_takes_what_it_is_told_to_take() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    let [first, _] = two_snapshots(&place, &source);
    let what = format!("latest:{}", source.display());
    let names = |dir: &Path| -> Vec<String> {
        let listed = run(tool("find")
            .arg(dir)
            .args(["-mindepth", "1", "-printf", "%P\\n"]));
        let mut names: Vec<String> = listed.lines().map(String::from).collect();
        names.sort();
        names
    };

    let dry = sandbox.path("dry");
    let told = place.restore(&what, &dry).arg("--dry-run").ok().stdout;
    assert!(
        told.contains(&format!("new        {}/docs/letter.txt", dry.display())),
        "{told}"
    );
    assert!(!dry.exists());

    let some = sandbox.path("some");
    let patterns = [
        "--include",
        "*.txt",
        "--include",
        "/large",
        "--exclude",
        "stays*",
    ];
    place.restore(&what, &some).args(patterns).ok();
    assert_eq!(names(&some), ["docs", "docs/letter.txt", "large"]);

    let stripped = sandbox.dir("stripped");
    place.restore(&what, &stripped).args(["--strip", "2"]).ok();
    assert_eq!(
        names(&stripped),
        ["letter.txt", "link", "mode", "new", "one", "stays.txt"]
    );
    let inode = |path: PathBuf| fs::metadata(path).expect("stat").ino();
    assert_eq!(
        inode(stripped.join("one")),
        inode(stripped.join("stays.txt"))
    );

    // Again and again: what is there and right is not read; what differs is replaced.
    let whole = sandbox.path("whole");
    place.restore(&what, &whole).arg("--verify").ok();
    assert_same_tree(&source, &whole);
    fs::write(whole.join("docs/new"), b"other").expect("write");
    fs::remove_file(whole.join("large")).expect("rm");
    let inside = format!("{what}/.");
    let told = place
        .restore(&inside, &whole)
        .args(["--overwrite=if-changed", "--verify"])
        .ok();
    assert!(told.stdout.contains("restored 2 files"), "{told}");
    assert!(told.stdout.contains("4 files were there already"), "{told}");
    // DEST itself was there before, and stays as it was made.
    run(tool("touch").arg("-r").arg(&source).arg(&whole));
    assert_same_tree(&source, &whole);

    // `--verify` finds what `--overwrite=never` has left.
    fs::write(whole.join("docs/new"), b"bad").expect("write");
    let told = place.restore(&inside, &whole).arg("--verify").run().code(3);
    let told = told
        .says("docs/new")
        .says("1 file is not what was restored");
    drop(told);

    let several = sandbox.dir("several");
    let letter = format!("{what}/docs/letter.txt");
    place
        .program("restore")
        .args([&letter, &format!("{what}/large")])
        .arg(&several)
        .ok();
    assert_eq!(names(&several), ["large", "letter.txt"]);

    // Two paths that share a file; the same inode in another snapshot is another file.
    let linked = sandbox.dir("linked");
    let paths = [
        format!("{what}/docs/stays.txt"),
        format!("{what}/links"),
        format!("{first}:{}/docs", source.display()),
    ];
    place.program("restore").args(&paths).arg(&linked).ok();
    let inode = |name: &str| inode(linked.join(name));
    assert_eq!(inode("stays.txt"), inode("links/one"));
    assert_ne!(inode("stays.txt"), inode("docs/stays.txt"));

    let mounted = sandbox.path("mounted");
    place.restore(&what, &mounted).arg("--mount").ok();
    assert_eq!(
        differences(&whole.join("empty"), &mounted.join("empty")),
        Vec::<String>::new()
    );
    assert_same_tree(&source, &mounted);
    place.assert_closed();
}

/// A directory above those that `--strip` leaves: nothing that is copied ever meets it.
#[test]
fn what_cannot_be_read_is_told_of_whatever_was_chosen() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.dir("source");
    for dir in ["a", "bad", "c/sub"] {
        fs::create_dir_all(source.join(dir)).expect("mkdir");
        fs::write(source.join(dir).join("file.txt"), dir).expect("write");
    }
    place.init("300M").ok();
    place.backup(&source).ok();
    let plain = common::decrypt(&sandbox, &place.stored).path;
    let path = format!("/snapshots/{}{}/bad", place.ids()[0], source.display());
    let mut debugfs = tool("debugfs");
    let block = run(debugfs.arg("-R").arg(format!("blocks {path}")).arg(&plain));
    let block: u64 = block.trim().parse().expect("one block");
    let image = fs::File::options().write(true).open(&place.stored);
    let at = (16 << 20) + block * 4096 + 64; // after the LUKS2 header
    image
        .expect("opens")
        .write_all_at(&[7; 16], at)
        .expect("write");

    let what = format!("latest:{}", source.display());
    let restore = |to: &str, args: &[&str]| {
        let to = sandbox.path(to);
        place.restore(&what, &to).args(args).run()
    };
    let one = "1 file could not be restored as it was";
    for (to, strip) in [("strip2", "2"), ("strip3", "3")] {
        let told = restore(to, &["--strip", strip]).code(3);
        told.says("/source/bad").says(one);
        let file = fs::read_to_string(sandbox.path(to).join("file.txt"));
        assert!(file.is_ok_and(|text| text == ["a", "c/sub"][usize::from(strip == "3")]));
    }
    let told = restore("include", &["--include", "*.txt"]).code(3);
    told.says("/source/bad").says(one);
    assert!(sandbox.path("include/c/sub/file.txt").exists());
    for args in [&["-n"][..], &["-n", "--strip", "3"]] {
        let told = restore("dry", args).code(3).says("1 file cannot be read");
        let word = told.stdout.contains("unreadable ") && told.stdout.contains("/dry/bad/\n");
        assert_eq!(word, args.len() == 1, "{told}");
    }
    restore("sound", &["--strip", "3", "--exclude", "bad"]).code(0);

    let told = restore("deep", &["--strip", "9", "--exclude", "bad"]).code(3);
    told.says("/source has no directory that is wanted 9 names deep");
    let patterns = [
        "--include",
        "*.txt",
        "--include",
        "*.text",
        "--exclude",
        "bad",
    ];
    let told = restore("none", &patterns).code(3);
    told.says("/source matches --include *.text");
    place.assert_closed();
}

#[test]
fn an_archive_unpacks_to_what_was_backed_up() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let source = sandbox.path("source");
    odd_tree(&source);
    let odd = source.join("attributes/user");
    for name in ["user.a=b", "user.a%3Db", "user.%25="] {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::lsetxattr(&odd, name, name.as_bytes(), flags).expect("setxattr");
    }
    place.init("10G").ok();
    place.backup(&source).ok();
    let archive: PathBuf = sandbox.path("tmp/archive.tar");
    let dump = place
        .program("dump")
        .arg("--tar")
        .arg(format!("latest:{}", source.display()));
    // Sockets are in no archive.
    let script = format!("exec \"$@\" > {}", archive.display());
    let ran = dump
        .through(["/bin/sh", "-c", &script, "sh"])
        .run()
        .code_of(&[0, 3]);
    let unpacked = sandbox.dir("unpacked");
    let options = [
        "--xattrs",
        "--xattrs-include=*",
        "--same-owner",
        "--numeric-owner",
        "-p",
    ];
    run(tool("tar")
        .args(options)
        .arg("-xf")
        .arg(&archive)
        .arg("-C")
        .arg(&unpacked));
    let differ = differences(&source, &unpacked.join("source"));
    let expected = |line: &String| line.contains("socket");
    let odd: Vec<_> = differ.iter().filter(|line| !expected(line)).collect();
    assert!(odd.is_empty(), "{odd:#?}\n{ran}");
    place.assert_closed();
}

/// What comes of `reader` when it is stopped in the middle, until `meanwhile` is over. `begun` says
/// whether it has begun to read files.
fn stopped_meanwhile(reader: Program, begun: impl Fn() -> bool, meanwhile: impl FnOnce()) -> Ran {
    let mut running = reader.args(["--limit-download", "16M"]).spawn();
    wait_for("the beginning", Duration::from_secs(60), begun);
    running.signal(Signal::STOP);
    assert!(!running.is_over());
    meanwhile();
    running.signal(Signal::CONT);
    running.wait()
}

/// An image with 64 MiB in one snapshot, that snapshot's id, and another small tree.
fn one_large_snapshot<'a>(sandbox: &'a Sandbox) -> (Place<'a>, String, PathBuf) {
    let place = Place::piped(sandbox);
    large_file(&sandbox.dir("source").join("large"), 64 << 20, 5);
    large_file(&sandbox.dir("other").join("small"), 1 << 20, 6);
    // So that little else is free when it is deleted.
    place.init("128M").ok();
    place.backup(&sandbox.path("source")).ok();
    let id = place.ids().remove(0);
    (place, id, sandbox.path("other"))
}

/// Whether anything large has arrived, under whatever name.
fn has_begun(dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(dir) else {
        return fs::metadata(dir).is_ok_and(|found| found.is_file() && found.blocks() > 2048);
    };
    entries.flatten().any(|entry| has_begun(&entry.path()))
}

#[test]
fn a_snapshot_that_is_deleted_while_it_is_read_is_told() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let (place, id, other) = one_large_snapshot(&sandbox);
    let large = sandbox.path("source/large");
    let what = format!("{id}:{}", large.display());
    let restored = sandbox.dir("restored");
    let printed = sandbox.path("tmp/printed");
    let script = format!("exec \"$@\" > {}", printed.display());
    let cat = place.program("cat").arg(&what);
    let cat = cat.through(["/bin/sh", "-c", &script, "sh"]);

    // Both have begun when it is deleted, and what they read is written over.
    let mut cat = Some(cat);
    let mut printed_to = None;
    let restore = place.restore(&what, &restored);
    let restore = stopped_meanwhile(
        restore,
        || has_begun(&restored),
        || {
            let cat = cat.take().expect("once");
            printed_to = Some(stopped_meanwhile(
                cat,
                || has_begun(&printed),
                || {
                    place.backup(&other).ok();
                    let keep = ["--keep-last", "1", "--group-by", "none"];
                    place.program("prune").args(keep).ok();
                    large_file(&other.join("large"), 64 << 20, 7);
                    place.backup(&other).ok();
                },
            ));
        },
    );
    for ran in [restore, printed_to.expect("it ran")] {
        ran.code(11)
            .says(&format!("snapshot {id} was deleted"))
            .says("may be wrong");
    }
    // It stays where it is, and it is wrong: what was there was read after it was written over.
    let begun = |path: &Path| fs::read(path).expect("read");
    assert!(begun(&restored.join("large")) != begun(&large));
    place.assert_closed();
}

#[test]
fn a_backup_meanwhile_is_nothing_to_a_reader() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let (place, id, other) = one_large_snapshot(&sandbox);
    let source = sandbox.path("source");
    let restored = sandbox.path("restored");
    let restore = place.restore(&format!("{id}:{}", source.display()), &restored);
    let ran = stopped_meanwhile(
        restore.arg("--verify"),
        || has_begun(&restored),
        || drop(place.backup(&other).ok()),
    );
    ran.code(0);
    assert_same_tree(&source, &restored);
    place.assert_closed();
}

/// A link of 50 ms: what is fetched is what is needed, in a few large reads.
#[test]
fn a_file_comes_from_afar_with_little_traffic() {
    if !root_or_skip() {
        return;
    }
    let files = std::env::var("E2EBAK_TEST_FILES").ok();
    let files: usize = files.and_then(|n| n.parse().ok()).unwrap_or(1500);
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let source = sandbox.dir("source");
    plain_tree(&source, files);
    large_file(&source.join("one"), 1 << 20, 7);
    let near = Place::over(&sandbox, &sshd);
    near.init("20G").ok();
    near.backup(&source).ok();
    let proxy = Proxy::to_port(sshd.port(), Shape::round_trip_ms(50));
    let mut far = Place::over(&sandbox, &sshd);
    let port = |port: u16| format!(":{port}/");
    far.location = far
        .location
        .replace(&port(sshd.port()), &port(proxy.port()));
    let alias = format!("HostKeyAlias=[127.0.0.1]:{}", sshd.port());
    far.options.extend(["--ssh-option".into(), alias]);
    let what = format!("latest:{}", source.display());
    let traffic = |name: &str, run: &dyn Fn()| -> u64 {
        let (began, before) = (std::time::Instant::now(), proxy.sent_by_server());
        run();
        let bytes = proxy.sent_by_server() - before;
        println!("{name}: {:?}, {} KiB", began.elapsed(), bytes >> 10);
        bytes
    };
    let login = traffic("info", &|| drop(far.program("info").ok()));
    let one = sandbox.path("one");
    let bytes = traffic("one file", &|| {
        far.restore(&format!("{what}/one"), &one).ok();
    });
    assert_eq!(
        fs::read(&one).expect("read"),
        fs::read(source.join("one")).expect("read")
    );
    let printed = traffic("one file printed", &|| {
        far.program("cat").arg(format!("{what}/one")).ok();
    });
    assert!(printed < 16 << 20, "{printed} bytes for 1 MiB");
    assert!(
        bytes < 16 << 20,
        "{bytes} bytes for 1 MiB; {login} for nothing"
    );
    traffic("ls -R", &|| {
        let listed = far.program("ls").args(["-R", &what]).ok().stdout;
        assert!(listed.lines().count() > files);
    });
    traffic("everything", &|| {
        far.restore(&what, &sandbox.path("restored")).ok();
    });
    assert_same_tree(&source, &sandbox.path("restored"));
}

/// The commands of a step of a sheet.
fn commands(sheet: &str, step: &str) -> Vec<String> {
    let after = sheet
        .split(&format!("\n{step}. "))
        .nth(1)
        .expect("the step");
    let lines = after.lines().skip_while(|line| !line.starts_with("    "));
    let lines = lines.take_while(|line| line.starts_with("    "));
    lines.map(|line| line.trim().to_string()).collect()
}

/// All but dm-crypt and the mount of what it gives, which this machine's kernel may not have.
#[test]
fn the_commands_of_the_recovery_sheet_reach_the_image() {
    if !root_or_skip() || !tool_or_skip("sshfs") || !tool_or_skip("cryptsetup") {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    place.init("1G").ok();
    let sheet = Program::bare(&sandbox)
        .arg("recovery-sheet")
        .args(&place.options);
    let sheet = sheet.arg(&place.location).ok().stdout;
    let page = Program::bare(&sandbox)
        .args(["recovery-sheet", "--html"])
        .args(&place.options);
    let page = page.arg(&place.location).ok().stdout;
    assert!(
        page.starts_with("<!DOCTYPE html>") && page.contains("<svg"),
        "{page}"
    );
    let uuid = place
        .luks_dump()
        .lines()
        .find_map(|l| Some(l.strip_prefix("UUID:")?.trim().to_string()));
    assert!(sheet.contains(&uuid.expect("a UUID")), "{sheet}");

    // What somebody's own configuration of ssh says: the key, and the server's.
    let home = sandbox.dir("home/.ssh");
    fs::write(home.join("config"), sshd.ssh_config()).expect("write");
    let key = sandbox.file("passphrase", common::PASSPHRASE);
    let store = sandbox.path("sheet-store");
    let ssh = tool("ssh").get_program().to_owned();
    let with = format!("{} -F {}", ssh.display(), home.join("config").display());
    let local = |command: &String| {
        let command = command.replace("/tmp/e2ebak-store", &store.display().to_string());
        match command.split_once(' ') {
            Some(("ssh", rest)) => format!("{with} {rest}"),
            Some(("sshfs", rest)) => format!("sshfs -o ssh_command='{with}' {rest}"),
            _ => command,
        }
    };
    for (step, undo) in [("1a", "fusermount3 -u"), ("1b", "rm -r")] {
        let mut script: Vec<String> = commands(&sheet, step).iter().map(local).collect();
        assert_eq!(script.len(), 3, "{sheet}");
        let unlock = commands(&sheet, "2");
        assert_eq!(unlock.len(), 1, "{sheet}");
        script.push(format!("trap '{undo} {}' EXIT", store.display()));
        let test = format!("open --test-passphrase --key-file {}", key.display());
        script.push(
            unlock[0]
                .replace("open", &test)
                .replace(" e2ebak-restore", ""),
        );
        let script = format!("set -eu\n{}", script.join("\n"));
        run(tool("timeout").args(["60", "sh", "-c", &script]));
        // And with another passphrase not: it is the image that was asked.
        let wrong = script.replace(&key.display().to_string(), &store.display().to_string());
        let wrong = tool("timeout")
            .args(["60", "sh", "-c", &wrong])
            .output()
            .expect("runs");
        assert!(!wrong.status.success(), "{script}");
    }
    place.assert_closed();
}

#[test]
fn snapshots_are_shown_in_a_directory_until_it_is_unmounted() {
    if !root_or_skip() || !tool_or_skip("fusermount3") {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let source = sandbox.path("source");
    odd_tree(&source);
    place.init("10G").ok();
    place.backup(&source).ok();
    let ids = place.ids();
    let dir = sandbox.dir("shown");
    let running = place.program("browse").arg(&dir).spawn();
    wait_for("the mount", Duration::from_secs(30), || {
        sandbox.mounts().contains(&dir)
    });
    let latest = fs::read_link(dir.join("latest")).expect("a link");
    assert_eq!(latest, PathBuf::from(&ids[0]));
    let inside = source.strip_prefix("/").expect("absolute");
    assert_same_tree(&source, &dir.join("latest").join(inside));
    fs::write(dir.join("latest/new"), b"").expect_err("read-only");
    run(tool("umount").arg(&dir));
    running.wait().code(0);
    let full = place.program("browse").arg(sandbox.path("store"));
    full.run().code(1).says("not empty");

    // An ordinary user, where FUSE is for everybody, as it is on other machines.
    open_image(&sandbox, &place);
    chown(&dir, Some(UID), Some(UID)).expect("chown");
    let script = format!(
        "mknod -m 666 \"$1/fuse\" c 10 229; mount --bind \"$1/fuse\" /dev/fuse
         as_user() {{ setpriv --reuid={UID} --regid={UID} --clear-groups \"$@\"; }}
         as_user \"$1/e2ebak\" browse -q \"$2\" \"$3\" >&2 &
         for i in $(seq 300); do as_user mountpoint -q \"$3\" && break; sleep 0.1; done
         as_user ls \"$3\"; as_user fusermount3 -u \"$3\"; wait $!"
    );
    let mut command = private_shell(&script);
    command
        .arg("sh")
        .args([sandbox.root(), &place.stored, &dir]);
    command.env("E2EBAK_PASSPHRASE", common::PASSPHRASE);
    command.env("XDG_RUNTIME_DIR", sandbox.path("run"));
    let listed = run(&mut command);
    assert_eq!(lines(&listed), [&*ids[0], "latest"]);

    // Ctrl-C ends it too, with somebody still in it.
    let running = place.program("browse").arg(&dir).spawn();
    wait_for("the mount", Duration::from_secs(30), || {
        sandbox.mounts().contains(&dir)
    });
    let held = fs::File::open(dir.join("latest/")).expect("opens");
    running.signal(rustix::process::Signal::INT);
    running.wait().code(0);
    drop(held);
    place.assert_closed();
}
