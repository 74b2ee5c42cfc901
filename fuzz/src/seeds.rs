//! The seeds of all corpora. `cargo test --test fuzz_corpus -- --ignored` writes them anew.
//!
//! What cryptsetup and OpenSSH's `sftp-server` say comes from themselves. Files that the fuzzers
//! have found stay; a seed is named `seed-*`.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use e2ebak::sftp::{
    Attributes, Code, Conversation, Extended, Extension, Name, OpenFlags, Reply, Request, Status,
};

use super::sample;

/// Writes them all, after a run of each.
pub fn write(corpora: &Path) {
    for (target, seeds) in [
        ("luks_binary", luks_binary()),
        ("luks_json", luks_json()),
        ("luks_keyslot", luks_keyslot()),
        ("sftp_request", sftp_request()),
        ("sftp_reply", sftp_reply()),
        ("sftp_conversation", sftp_conversation()),
        ("words", words()),
        ("documents", documents()),
        ("cache", cache()),
        ("image", image()),
    ] {
        let directory = corpora.join(target);
        fs::create_dir_all(&directory).expect("writable");
        println!("{target}: {} seeds", seeds.len());
        for (number, seed) in seeds.iter().enumerate() {
            // Those that do not hold what they should would be worth nothing.
            super::run(target, seed);
            fs::write(directory.join(format!("seed-{number:02}")), seed).expect("writable");
        }
    }
}

/// Places and what is put there, with the control byte of `sample::spoil`.
fn patches(reseal: bool, places: &[(u32, &[u8])]) -> Vec<u8> {
    let mut out = vec![places.len() as u8 | if reseal { 0xc0 } else { 0 }];
    for (at, bytes) in places {
        out.extend(at.to_be_bytes());
        out.push(bytes.len() as u8);
        out.extend(*bytes);
    }
    out
}

fn luks_binary() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (at, bytes) in [
        (0, &b"SKUL"[..]),
        (6, &[0, 1]),
        (8, &[0, 0, 0, 0, 0, 0, 0x80, 0]),
        (8, &[0xff; 8]),
        (16, &[0, 0, 0, 0, 0, 0, 0, 9]),
        (24, b"a label\x1b[2J\0"),
        (72, b"sha512\0"),
        (72, b"whirlpool\0"),
        (168, b"not a uuid\0"),
        (208, b"subsystem\0"),
        (256, &[0, 0, 0, 0, 0, 0, 0x40, 0]),
        (448, &[0; 32]),
    ] {
        for (copy, reseal) in [(0, true), (1, true), (0, false)] {
            let mut seed = vec![0, copy];
            seed.extend(patches(reseal, &[(at, bytes)]));
            seeds.push(seed);
        }
    }
    for cut in [0, 1, 11, 12, 24, 255] {
        seeds.push(vec![cut, 2, 0, 0]);
    }
    seeds
}

fn luks_json() -> Vec<Vec<u8>> {
    let ours = sample::json(&sample::image(), 0);
    let mut seeds = vec![ours.to_string().into_bytes()];
    let mut with = |pointer: &str, value: serde_json::Value| {
        let mut json = ours.clone();
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        json.pointer_mut(parent).expect("is there")[key] = value;
        seeds.push(json.to_string().into_bytes());
    };
    let json = serde_json::from_str::<serde_json::Value>;
    for (pointer, value) in [
        (
            "/tokens/3",
            r#"{"type":"x","keyslots":["0"],"list":[1,-2.5e3,null,true,"\u0007"]}"#,
        ),
        ("/config/flags", r#"["allow-discards"]"#),
        (
            "/config/requirements",
            r#"{"mandatory":["online-reencrypt"]}"#,
        ),
        ("/segments/0/size", "\"65536\""),
        ("/segments/0/iv_tweak", "\"18446744073709551615\""),
        ("/segments/0/sector_size", "512"),
        (
            "/segments/1",
            r#"{"type":"linear","offset":"0","size":"dynamic"}"#,
        ),
        ("/keyslots/0/priority", "2"),
        ("/keyslots/0/type", "\"reencrypt\""),
        (
            "/keyslots/31",
            r#"{"type":"x","key_size":1,"area":{"offset":"290816","size":"4096"}}"#,
        ),
        ("/config/keyslots_size", "\"134217728\""),
        ("/digests/0/segments", "[]"),
    ] {
        with(pointer, json(value).expect("JSON"));
    }
    for text in [
        "{}",
        "{\"a\":{\"a\":{\"a\":[[[[[[{}]]]]]]}}}",
        "{\"a\":1,\"a\":1}",
    ] {
        seeds.push(text.as_bytes().to_vec());
    }
    seeds.extend(cryptsetup());
    seeds
}

/// The metadata of images that cryptsetup makes.
fn cryptsetup() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let path = std::env::temp_dir().join(format!("e2ebak-seed-{}", std::process::id()));
    for options in [
        &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"][..],
        &[
            "--pbkdf",
            "argon2i",
            "--pbkdf-force-iterations",
            "4",
            "--pbkdf-memory",
            "32",
        ],
        &[
            "--pbkdf",
            "argon2id",
            "--pbkdf-force-iterations",
            "4",
            "--pbkdf-memory",
            "32",
            "--sector-size",
            "4096",
            "--label",
            "x",
            "--key-size",
            "256",
        ],
        &[
            "--pbkdf",
            "pbkdf2",
            "--pbkdf-force-iterations",
            "1000",
            "--cipher",
            "serpent-xts-plain64",
            "--integrity",
            "hmac-sha256",
            "--integrity-no-wipe",
            "--offset",
            "65536",
        ],
    ] {
        fs::write(&path, "").expect("writable");
        let file = fs::File::options()
            .write(true)
            .open(&path)
            .expect("writable");
        file.set_len(64 << 20).expect("sparse");
        let mut child = Command::new("cryptsetup")
            .args([
                "luksFormat",
                "--batch-mode",
                "--type",
                "luks2",
                "--key-file",
                "-",
            ])
            .args(options)
            .arg(&path)
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("cryptsetup is installed");
        child
            .stdin
            .take()
            .expect("piped")
            .write_all(b"x")
            .expect("it reads");
        if child.wait().expect("it ends").success() {
            let mut head = vec![0; 16 << 10];
            let mut file = fs::File::open(&path).expect("readable");
            file.read_exact(&mut head).expect("as long");
            seeds.push(sample::json(&head, 0).to_string().into_bytes());
        }
    }
    drop(fs::remove_file(path));
    seeds
}

fn luks_keyslot() -> Vec<Vec<u8>> {
    let mut seeds = vec![vec![0], vec![0, 1, 0, 0, 0, 0, 1, 0xff]];
    let numbers = |head: &[u8], numbers: &[u32]| {
        let mut seed = head.to_vec();
        seed.extend(numbers.iter().flat_map(|number| number.to_be_bytes()));
        seed
    };
    for kind in [0, 1] {
        for costs in [
            [32, 4, 1],
            [32, 1, 4],
            [31, 4, 4],
            [4 << 20, 256, 16],
            [(4 << 20) + 1, 1, 1],
            [4 << 20, 257, 4],
            [u32::MAX, u32::MAX, u32::MAX],
            [32, 0, 1],
            [32, 4, 0],
            [512, 1, 17],
        ] {
            seeds.push(numbers(&[1, kind], &costs));
        }
    }
    for hash in 0..4 {
        for iterations in [0, 1, 1000, 500_000_001, u32::MAX] {
            seeds.push(numbers(&[2, hash], &[iterations]));
        }
    }
    for (place, number) in [(0, 32), (0, 0), (0, u32::MAX), (1, 1), (2, 32), (2, 0)] {
        seeds.push(numbers(&[3, place], &[number]));
    }
    seeds.push(b"\x03\x03\x06sha512".to_vec());
    seeds.push(b"\x03\x04\x0faes-xts-plain64".to_vec());
    seeds.push(numbers(&[0x80], &[u32::MAX]));
    seeds
}

fn attributes() -> Attributes {
    Attributes {
        size: Some(1 << 40),
        owner: Some((0, 1000)),
        permissions: Some(0o100_600),
        times: Some((1, u32::MAX)),
        extended: vec![(b"acl".to_vec(), b"x".to_vec())],
    }
}

#[rustfmt::skip]
fn requests() -> Vec<Request<'static>> {
    let (path, handle) = (&b"a.img"[..], &[0, 0, 0, 0][..]);
    let mut all = vec![
        Request::Realpath { path: b"." },
        Request::Extended(Extended::Limits),
        Request::Open { path, flags: OpenFlags(0x1b), attributes: attributes() },
        Request::Write { handle, offset: 4096, data: b"some data" },
        Request::Extended(Extended::Fsync { handle }),
        Request::Fstat { handle },
        Request::Read { handle, offset: 0, len: 64 },
        Request::Read { handle, offset: 1 << 62, len: 64 },
        Request::Fsetstat { handle, attributes: Attributes::with_size(100) },
        Request::Extended(Extended::CopyData { from: handle, from_offset: 0, len: 9, to: handle, to_offset: 50 }),
        Request::Close { handle },
        Request::Close { handle },
        Request::Stat { path }, Request::Lstat { path }, Request::Stat { path: b"gone" },
        Request::Setstat { path, attributes: Attributes::with_permissions(0o600) },
        Request::Extended(Extended::Hardlink { from: path, to: b"b.img" }),
        Request::Extended(Extended::PosixRename { from: b"b.img", to: b"c.img" }),
        Request::Rename { from: b"c.img", to: path },
        Request::Symlink { target: path, link: b"link" }, Request::Readlink { path: b"link" },
        Request::Mkdir { path: b"d", attributes: Attributes::default() },
        Request::Opendir { path: b"." }, Request::Readdir { handle }, Request::Readdir { handle },
        Request::Close { handle },
        Request::Rmdir { path: b"d" }, Request::Remove { path: b"link" },
        Request::Extended(Extended::StatVfs { path: b"." }),
        Request::Extended(Extended::ExpandPath { path: b"~/x" }),
        Request::Extended(Extended::Other { name: b"none@example.org", data: b"data" }),
    ];
    all.insert(0, Request::Init { version: 3 });
    all
}

fn sftp_request() -> Vec<Vec<u8>> {
    let packets = requests().into_iter().enumerate().map(|(id, request)| {
        let mut wire = Vec::new();
        request.encode(id as u32, &mut wire).expect("short");
        wire.split_off(4)
    });
    packets.collect()
}

/// What OpenSSH's server answers, packet by packet, without the lengths.
fn real_replies() -> Vec<Vec<u8>> {
    let home = std::env::temp_dir().join(format!("e2ebak-seeds-{}", std::process::id()));
    fs::create_dir_all(&home).expect("writable");
    let mut server = Command::new(sftp_server())
        .current_dir(&home)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("sftp-server is installed");
    let (mut to, mut from) = (
        server.stdin.take().expect("piped"),
        server.stdout.take().expect("piped"),
    );
    let mut replies = Vec::new();
    for packet in sftp_request() {
        to.write_all(&(packet.len() as u32).to_be_bytes())
            .expect("it reads");
        to.write_all(&packet).expect("it reads");
        let mut len = [0; 4];
        from.read_exact(&mut len).expect("an answer");
        let mut reply = vec![0; u32::from_be_bytes(len) as usize];
        from.read_exact(&mut reply).expect("an answer");
        replies.push(reply);
    }
    drop(to);
    server.wait().expect("it ends");
    fs::remove_dir_all(home).expect("removable");
    replies
}

fn sftp_server() -> PathBuf {
    let places = [
        "/usr/lib/openssh/sftp-server",
        "/usr/libexec/openssh/sftp-server",
    ];
    let found = places
        .iter()
        .map(PathBuf::from)
        .find(|place| place.exists());
    found.expect("sftp-server is installed")
}

fn sftp_reply() -> Vec<Vec<u8>> {
    let mut seeds = real_replies();
    let name = |name: &str| Name {
        name: name.into(),
        long_name: format!("-rw------- 1 {name}").into(),
        attributes: attributes(),
    };
    for reply in [
        Reply::Names(vec![name("a"), name("\x1b[2J")]),
        Reply::Status(Status::new(Code::from_number(99), "odd")),
        Reply::Attributes(attributes()),
        Reply::Data(vec![7; 30].into()),
        Reply::Extended(vec![0xff; 88]),
    ] {
        let mut wire = Vec::new();
        reply.encode(1, &mut wire).expect("short");
        seeds.push(wire.split_off(4));
    }
    seeds.push(b"Welcome to this host\r\n".to_vec());
    seeds.push(vec![104, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]);
    seeds
}

fn sftp_conversation() -> Vec<Vec<u8>> {
    let receive = |packet: &[u8]| {
        let mut step = vec![1];
        step.extend((packet.len() as u16).to_be_bytes());
        step.extend(packet);
        step
    };
    let packet = |reply: &Reply, id: u32| {
        let mut wire = Vec::new();
        reply.encode(id, &mut wire).expect("short");
        wire.split_off(4)
    };
    assert_eq!(Conversation::<()>::HELLO[4], 1);
    let hello = receive(&packet(
        &Reply::Version {
            version: 3,
            extensions: vec![(Extension::Fsync.name().into(), b"1".to_vec())],
        },
        0,
    ));
    let read = |len: u16| [&[0, 0, 1, b'h', 0, 0, 0, 9][..], &len.to_be_bytes()].concat();
    let ask = |kind: u8| vec![0, kind, 1, b'x'];
    let data = |len: usize| Reply::Data(vec![7; len].into());
    let status = Reply::Status(Status::new(Code::Eof, "end"));
    let handle = Reply::Handle(b"h".to_vec());
    let mut seeds = vec![
        hello.clone(),
        [hello.clone(), hello.clone()].concat(),
        receive(&packet(&handle, 0)),
        receive(&packet(
            &Reply::Version {
                version: 2,
                extensions: Vec::new(),
            },
            0,
        )),
        [
            hello.clone(),
            read(4),
            read(8),
            receive(&packet(&data(8), 1)),
            receive(&packet(&data(3), 0)),
        ]
        .concat(),
        [hello.clone(), read(4), receive(&packet(&data(5), 0))].concat(),
        [
            hello.clone(),
            read(4),
            receive(&packet(&status, 0)),
            receive(&packet(&status, 0)),
        ]
        .concat(),
        [hello.clone(), read(4), receive(&packet(&handle, 0))].concat(),
        [hello.clone(), read(4), receive(&packet(&data(4), 7))].concat(),
    ];
    for (kind, reply) in [
        (2, status.clone()),
        (3, Reply::Attributes(attributes())),
        (4, Reply::Names(Vec::new())),
        (6, Reply::Extended(vec![1; 32])),
        (7, Reply::Extended(vec![1; 88])),
        (8, Reply::Extended(Vec::new())),
    ] {
        seeds.push([hello.clone(), ask(kind), receive(&packet(&reply, 0))].concat());
    }
    seeds
}

fn words() -> Vec<Vec<u8>> {
    let texts = [
        "sftp://user@host:22/path/to/image",
        "sftp://host/~/image",
        "sftp://[::1]:2222/a",
        "sftp://h:0/a",
        "user@host:a/b",
        "host:~/a",
        "host:/a",
        "[fe80::1%eth0]:a",
        "me@[::1]:x",
        "-oProxyCommand=x:y",
        "a/b:c",
        "./a:b",
        "/a/b",
        "file:///a",
        "file://a",
        "http://x/y",
        "a/",
        "..",
        "host:",
        ":a",
        "é:ü",
        "sftp://a@b@c:1//x",
        "500G",
        "5T",
        "5TB",
        "1.5TiB",
        "0.000000001PB",
        "18446744073709551615",
        "16384P",
        "1.9999999999k",
        "90",
        "30m",
        "2h",
        "7d",
        "18446744073709551615d",
        "2026-11-21T02-14-05Z",
        "9999-12-30T22-00-00Z",
        "-000001-01-01T00-00-00Z",
        "2026-02-30T00-00-00Z",
    ];
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn documents() -> Vec<Vec<u8>> {
    let id = "2026-11-21T02-14-05Z";
    let record = format!(
        r#"{{"version":1,"id":"{id}","host":"h","sources":["/a"],"started":"2026-11-21T02:14:05Z","finished":"2026-11-21T02:15:05Z","duration_seconds":60.5,"files":3,"bytes":4,"new_files":1,"new_bytes":2,"rsync_exit_code":23,"error_count":1,"errors":["x"],"program":"e2ebak 0.1.0"}}"#
    );
    let lease = r#"{"version":1,"host":"h\u001b[2J","boot_id":"b","pid":1,"pid_namespace":"pid:[1]","start_ticks":1,"user":"u","program":"p","since":"2026-11-21T02:14:05Z","renewed":"2026-11-21T02:14:05Z","nonce":"00000000000000000000000000000000"}"#;
    let with = |kind: u8, bytes: &[u8]| [&[kind], bytes].concat();
    let frame =
        |kind: u8, bytes: &[u8]| [&[kind][..], &(bytes.len() as u32).to_le_bytes(), bytes].concat();
    let mut seeds = vec![
        with(0, record.as_bytes()),
        with(0, b"{}"),
        with(0, record.replace("60.5", "1e400").as_bytes()),
        with(0, record.replace("\"files\":3", "\"files\":-3").as_bytes()),
        with(1, lease.as_bytes()),
        with(1, lease.replace("\"pid\":1", "\"pid\":-1").as_bytes()),
        with(1, &lease.as_bytes()[..99]),
        frame(4, b"a key"),
        vec![4, 0xff, 0xff, 0xff, 0x7f, 1],
        vec![3, 0, 0, 0, 0],
    ];
    for order in [
        "\"Key\"",
        "\"NoKey\"",
        "\"Detach\"",
        "\"Close\"",
        "\"Abandon\"",
        "{\"Key\":1}",
    ] {
        seeds.push(frame(2, order.as_bytes()));
    }
    for report in [
        "\"NeedKey\"",
        "{\"Note\":\"x\"}",
        "{\"Ready\":\"/mnt\"}",
        "{\"Done\":{\"owed\":1,\"sent\":2,\"received\":3}}",
    ] {
        seeds.push(frame(3, report.as_bytes()));
    }
    let names = [
        id.to_string(),
        format!("{id}.json"),
        format!("{id}.inflight"),
        "latest".into(),
        "\u{fe}".into(),
    ];
    let mut catalogue = vec![5, names.len() as u8];
    for name in names {
        catalogue.push(name.len() as u8);
        catalogue.extend(name.as_bytes());
    }
    seeds.push(catalogue.clone());
    catalogue.extend(record.as_bytes());
    seeds.push(catalogue);
    seeds
}

/// Steps of every kind, from a generator that is the same in every run.
fn steps(mut state: u64, count: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..7 * count {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        out.push((state >> 33) as u8);
    }
    out
}

fn cache() -> Vec<Vec<u8>> {
    let seeds = (0..26_u8).map(|number| {
        let refuses = if number % 5 == 4 { 0x80 } else { 0 };
        let size = u32::from(number) * 25_000;
        let head = [&[(number % 13) | refuses][..], &size.to_be_bytes()].concat();
        [head, steps(number.into(), 4 + usize::from(number) * 2)].concat()
    });
    seeds.collect()
}

fn image() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for number in 0..8 {
        let head = [number, 0, 0];
        seeds.push([&head[..], &steps(number.into(), 20)].concat());
    }
    for (reseal, at, bytes) in [
        (false, 0, &b"broken"[..]),
        (false, 0x4000, b"broken"),
        (false, 0x8000, &[0xff; 9]),
        (false, 0x47000, &[0; 200]),
        (false, 0x48000, &[0xab; 255]),
        (true, 24, b"label\0"),
        (true, 0x4010, &[0, 0, 0, 0, 0, 0, 0, 9]),
        (true, 0x1000, b"["),
    ] {
        let head = [&[1, 0][..], &patches(reseal, &[(at, bytes)])].concat();
        seeds.push([head, steps(at.into(), 10)].concat());
    }
    for cut in [1, 100, 200, 206, 255] {
        seeds.push([&[1, cut, 0][..], &steps(cut.into(), 10)].concat());
    }
    seeds
}
