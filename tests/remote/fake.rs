//! The other side played packet by packet: what no real server does, or not on demand.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use e2ebak::device::{Device, Durability};
use e2ebak::error::{Error, Kind, Result};
use e2ebak::link::{Handle, Stream};
use e2ebak::location::RemotePath;
use e2ebak::remote::engine::{Bounds, Engine};
use e2ebak::remote::sftp_store::SftpStore;
use e2ebak::remote::{Access, Store};
use e2ebak::sftp::{Attributes, Code, Extended, Limits, Reply, Request, StatVfs, Status};

/// Bounds short enough to be waited for.
pub fn bounds() -> Bounds {
    Bounds {
        greeting: Duration::from_millis(400),
        silence: Duration::from_millis(400),
        silence_of_disk: Duration::from_millis(1200),
        ..Bounds::default()
    }
}

struct Ends([UnixStream; 2]);

impl Handle for Ends {
    fn close(&self) {
        for end in &self.0 {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
    fn diagnosis(&self) -> Option<Error> {
        None
    }
}

/// The server's end of a stream.
pub struct Peer(UnixStream);

impl Peer {
    /// The next packet; `None` when the client has gone.
    pub fn next(&mut self) -> Option<Vec<u8>> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).ok()?;
        let mut packet = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut packet).ok()?;
        Some(packet)
    }

    pub fn send(&mut self, id: u32, reply: &Reply) {
        let mut wire = Vec::new();
        reply.encode(id, &mut wire).expect("short");
        self.raw(&wire);
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes); // the client may have had enough
    }

    pub fn status(&mut self, id: u32, code: Code) {
        self.send(id, &Reply::Status(Status::new(code, "so be it")));
    }

    /// Answers INIT.
    pub fn greet(&mut self, extensions: &[(&str, &str)]) {
        self.next().expect("INIT");
        let extensions = extensions.iter();
        let reply = Reply::Version {
            version: 3,
            extensions: extensions
                .map(|(n, d)| ((*n).into(), (*d).into()))
                .collect(),
        };
        self.send(0, &reply);
    }
}

/// A stream to a thread that plays the server.
pub fn stream(play: impl FnOnce(&mut Peer) + Send + 'static) -> (Stream, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let player = thread::spawn(move || play(&mut Peer(theirs)));
    let clone = || ours.try_clone().expect("cloned");
    let stream = Stream {
        reader: Box::new(clone()),
        writer: Box::new(clone()),
        handle: Arc::new(Ends([clone(), clone()])),
    };
    (stream, player)
}

/// A server that serves one file of `size` bytes and leaves reads and writes to `play`.
fn file(
    size: u64,
    extensions: &'static [(&str, &str)],
    mut play: impl FnMut(&mut Peer, u32, Request<'_>) + Send + 'static,
) -> Arc<dyn Device> {
    let (stream, _) = stream(move |peer| {
        peer.greet(extensions);
        while let Some(packet) = peer.next() {
            match Request::decode(&packet).expect("a request") {
                (id, Request::Open { .. }) => peer.send(id, &Reply::Handle(b"h".to_vec())),
                (id, Request::Fstat { .. }) => {
                    peer.send(id, &Reply::Attributes(Attributes::with_size(size)));
                }
                (id, Request::Extended(Extended::Limits)) => {
                    let limits = Limits {
                        read: 5000,
                        write: 5000,
                        ..Limits::default()
                    };
                    peer.send(id, &Reply::Extended(limits.encode()));
                }
                (id, request) => play(peer, id, request),
            }
        }
    });
    let engine = Engine::start(stream, bounds()).expect("starts");
    let path = RemotePath::new("dir/a.img").expect("a path");
    let store = SftpStore::over(Arc::new(engine), &path, "nas:a.img");
    store.open(Access::ReadWrite).expect("opens")
}

fn refused(started: Result<Engine>) -> Error {
    started.map(drop).expect_err("must not start")
}

#[test]
fn text_before_sftp_is_named() {
    let (stream, _) = stream(|peer| peer.raw(b"Welcome to nas!\nBe nice.\n"));
    let error = refused(Engine::start(stream, bounds()));
    let text = "the server printed text before SFTP: `Welcome to nas! Be nice.`, \
                check its shell start-up files";
    assert_eq!(error.to_string(), text);
    assert_eq!(error.kind(), Kind::Unsupported);
}

#[test]
fn a_server_that_does_not_begin_is_not_waited_for() {
    let (stream, _player) = stream(|peer| while peer.next().is_some() {});
    let begun = Instant::now();
    let error = refused(Engine::start(stream, bounds()));
    assert_eq!(error.kind(), Kind::TimedOut, "{}", error.report());
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_server_that_hangs_up_is_gone() {
    let (stream, _) = stream(|peer| drop(peer.next()));
    let error = refused(Engine::start(stream, bounds()));
    assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
}

#[test]
fn an_older_version_is_refused() {
    let (stream, _) = stream(|peer| {
        let version = Reply::Version {
            version: 2,
            extensions: vec![],
        };
        peer.send(0, &version);
        while peer.next().is_some() {}
    });
    let error = refused(Engine::start(stream, bounds()));
    assert_eq!(error.kind(), Kind::Unsupported, "{}", error.report());
}

#[test]
fn short_data_are_asked_for_again() {
    let device = file(100_000, &[], |peer, id, request| match request {
        Request::Read { offset, len, .. } => {
            // A third of what was asked for, and one byte at last.
            let bytes = (offset..offset + u64::from(len).div_ceil(3)).map(|at| at as u8);
            peer.send(id, &Reply::Data(bytes.collect::<Vec<u8>>().into()));
        }
        _ => peer.status(id, Code::Ok),
    });
    let mut buf = vec![0; 90_000];
    device.read_exact_at(&mut buf, 77).expect("reads");
    assert!(buf.iter().zip(77_u64..).all(|(byte, at)| *byte == at as u8));
}

#[test]
fn replies_in_any_order_find_their_place() {
    let mut held: Vec<(u32, u64, u32)> = Vec::new();
    let device = file(
        40_000,
        &[("limits@openssh.com", "1")],
        move |peer, id, request| {
            let Request::Read { offset, len, .. } = request else {
                return peer.status(id, Code::Ok);
            };
            // The server's limit of 5000 bytes, cut to whole sectors.
            assert!(len <= 4096);
            held.push((id, offset, len));
            // The client keeps all of them in flight, so all can be held back.
            if held.len() == 10 {
                for (id, offset, len) in held.drain(..).rev() {
                    let bytes: Vec<u8> = (offset..offset + u64::from(len))
                        .map(|at| (at / 7) as u8)
                        .collect();
                    peer.send(id, &Reply::Data(bytes.into()));
                }
            }
        },
    );
    let mut buf = vec![0; 40_000];
    device.read_exact_at(&mut buf, 0).expect("reads");
    assert!(
        buf.iter()
            .zip(0_u64..)
            .all(|(byte, at)| *byte == (at / 7) as u8)
    );
}

/// A read that the server answers so, and what becomes of it.
fn read_answered(answer: impl Fn(&mut Peer, u32) + Send + 'static) -> Error {
    let device = file(100_000, &[], move |peer, id, request| match request {
        Request::Read { .. } => answer(peer, id),
        _ => peer.status(id, Code::Ok),
    });
    let begun = Instant::now();
    let error = device.read_exact_at(&mut [0; 1000], 0).expect_err("fails");
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    error
}

#[test]
fn violations_end_the_session_at_once() {
    type Answer = fn(&mut Peer, u32);
    let cases: [(Answer, &str); 5] = [
        (
            |p, id| p.send(id, &Reply::Data(vec![0; 1001].into())),
            "1001 bytes, 1000 were asked for",
        ),
        (
            |p, id| p.send(id + 1000, &Reply::Data(vec![0; 1000].into())),
            "which was not made",
        ),
        (
            |p, id| p.send(id, &Reply::Handle(b"h".to_vec())),
            "HANDLE packet out of place",
        ),
        (
            |p, _| p.raw(&[0x7f, 0xff, 0xff, 0xff, 0]),
            "a packet of 2147483647 bytes",
        ),
        (|p, _| p.raw(&[0, 0, 0, 3, 103, 0, 0]), "malformed packet"),
    ];
    for (answer, text) in cases {
        let error = read_answered(answer);
        assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
        assert!(error.report().contains(text), "{}", error.report());
    }
}

#[test]
fn no_progress_is_an_end_and_the_end_is_no_zeros() {
    let error = read_answered(|peer, id| peer.send(id, &Reply::Data(vec![].into())));
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.report());
    let error = read_answered(|peer, id| peer.status(id, Code::Eof));
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.report());
}

#[test]
fn every_status_has_its_kind_and_its_words() {
    for (code, kind) in [
        (Code::NoSuchFile, Kind::NotFound),
        (Code::PermissionDenied, Kind::Denied),
        (Code::Failure, Kind::Io),
        (Code::BadMessage, Kind::Io),
        (Code::NoConnection, Kind::Disconnected),
        (Code::ConnectionLost, Kind::Disconnected),
        (Code::OpUnsupported, Kind::Unsupported),
        (Code::Other(77), Kind::Io),
        (Code::Ok, Kind::Io),
    ] {
        let error = read_answered(move |peer, id| peer.status(id, code));
        assert_eq!(error.kind(), kind, "{}", error.report());
        let words = format!("SFTP status {}: so be it", code.number());
        assert!(error.report().contains(&words), "{}", error.report());
    }
}

#[test]
fn a_silent_server_is_given_up_and_everybody_is_told() {
    let device = file(100_000, &[], |_, _, _| {});
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                let error = device
                    .read_exact_at(&mut [0; 1000], 0)
                    .expect_err("silence");
                assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
                assert!(error.report().contains("not said a word for 0.4 s"));
            });
        }
    });
    let waited = begun.elapsed();
    assert!(
        waited >= bounds().silence && waited < bounds().silence * 3,
        "{waited:?}"
    );
    let error = device.read_exact_at(&mut [0; 1], 0).expect_err("is dead");
    assert_eq!(error.kind(), Kind::Disconnected);
}

#[test]
fn a_slow_server_is_not_a_silent_one() {
    // Each reply takes less than the bound, all together take much longer.
    let device = file(
        100_000,
        &[("limits@openssh.com", "1")],
        |peer, id, request| {
            let Request::Read { len, .. } = request else {
                return;
            };
            thread::sleep(bounds().silence / 4);
            peer.send(id, &Reply::Data(vec![0; len as usize].into()));
        },
    );
    let begun = Instant::now();
    device
        .read_exact_at(&mut [1; 40_960], 0)
        .expect("slow but sure");
    assert!(begun.elapsed() > bounds().silence * 2);
}

#[test]
fn a_trickle_of_bytes_is_not_silence() {
    let device = file(100_000, &[], |peer, id, request| {
        let Request::Read { len, .. } = request else {
            return;
        };
        let mut wire = Vec::new();
        let reply = Reply::Data(vec![0; len as usize].into());
        reply.encode(id, &mut wire).expect("short");
        for part in wire.chunks(wire.len() / 8) {
            thread::sleep(bounds().silence / 4);
            peer.raw(part);
        }
    });
    device
        .read_exact_at(&mut [1; 1000], 0)
        .expect("slow but sure");
}

#[test]
fn an_idle_session_may_be_silent() {
    let device = file(100_000, &[], |peer, id, _| {
        peer.send(id, &Reply::Data(vec![5; 8].into()));
    });
    let mut buf = [0; 8];
    device.read_exact_at(&mut buf, 0).expect("reads");
    thread::sleep(bounds().silence * 2);
    device.read_exact_at(&mut buf, 0).expect("reads");
}

#[test]
fn a_disk_at_work_may_be_silent_for_longer() {
    let device = file(
        100_000,
        &[("fsync@openssh.com", "1")],
        |peer, id, request| {
            if matches!(request, Request::Extended(Extended::Fsync { .. })) {
                thread::sleep(bounds().silence * 2);
            }
            peer.status(id, Code::Ok);
        },
    );
    assert_eq!(device.caps().durability, Durability::Stable);
    device.flush().expect("slow but sure");
}

#[test]
fn without_fsync_a_flush_is_best_effort() {
    let device = file(100_000, &[], |peer, id, request| {
        assert!(!matches!(request, Request::Extended(_)));
        peer.status(id, Code::Ok);
    });
    assert_eq!(device.caps().durability, Durability::BestEffort);
    device.flush().expect("nothing to be done");
}

#[test]
fn one_failed_chunk_fails_the_write_when_all_are_answered() {
    let all_answered = Arc::new(AtomicBool::new(false));
    let answered = all_answered.clone();
    let device = file(
        100_000,
        &[("limits@openssh.com", "1")],
        move |peer, id, request| {
            let Request::Write { offset, .. } = request else {
                return;
            };
            if offset == 32_768 {
                thread::sleep(Duration::from_millis(200));
                answered.store(true, Ordering::Relaxed);
            }
            peer.status(
                id,
                if offset == 8192 {
                    Code::Failure
                } else {
                    Code::Ok
                },
            );
        },
    );
    let error = device
        .write_all_at(&[7; 40_000], 0)
        .expect_err("one chunk fails");
    assert_eq!(error.kind(), Kind::Io, "{}", error.report());
    assert!(
        all_answered.load(Ordering::Relaxed),
        "what is still on its way could land on what is written next"
    );
    device
        .write_all_at(&[7; 4096], 0)
        .expect("the session goes on");
}

#[test]
fn failure_on_a_full_disk_is_no_space() {
    const STATVFS: &[(&str, &str)] = &[("statvfs@openssh.com", "2")];
    for (available, kind) in [(10, Kind::NoSpace), (1 << 20, Kind::Io)] {
        let device = file(100_000, STATVFS, move |peer, id, request| match request {
            Request::Extended(Extended::StatVfs { path }) => {
                assert_eq!(path, b"dir");
                let stat = StatVfs {
                    fragment_size: 4096,
                    blocks: 1 << 30,
                    blocks_available: available,
                    files: 10,
                    files_available: 5,
                    ..StatVfs::default()
                };
                peer.send(id, &Reply::Extended(stat.encode()));
            }
            _ => peer.status(id, Code::Failure),
        });
        let error = device.write_all_at(&[7; 4096], 0).expect_err("fails");
        assert_eq!(error.kind(), kind, "{}", error.report());
    }
}

#[test]
fn no_more_is_in_flight_than_the_bounds_allow() {
    let (stream, player) = stream(|peer| {
        peer.greet(&[]);
        let mut waiting = Vec::new();
        loop {
            // Whatever comes within this time is in flight together.
            let _ = peer.0.set_read_timeout(Some(Duration::from_millis(100)));
            let mut seen = 0;
            while let Some(packet) = peer.next() {
                let (id, request) = Request::decode(&packet).expect("a request");
                let Request::Read { len, .. } = request else {
                    panic!("{request:?}")
                };
                seen += len;
                waiting.push((id, len));
            }
            if waiting.is_empty() {
                return;
            }
            assert!(seen <= 65_536, "{seen} bytes in flight");
            assert!(waiting.len() <= 3, "{} requests in flight", waiting.len());
            for (id, len) in waiting.drain(..) {
                peer.send(id, &Reply::Data(vec![0; len as usize].into()));
            }
        }
    });
    let bounds = Bounds {
        bytes_in_flight: 65_536,
        requests_in_flight: 3,
        silence: Duration::from_secs(5),
        ..bounds()
    };
    let engine = Engine::start(stream, bounds).expect("starts");
    thread::scope(|scope| {
        for len in [32_768, 32_768, 30_000, 5, 5, 5, 5, 70_000, 5] {
            let engine = &engine;
            scope.spawn(move || {
                let request = Request::Read {
                    handle: b"h",
                    offset: 0,
                    len: len.min(65_536),
                };
                engine.call(&request).expect("reads");
            });
        }
    });
    player.join().expect("the server is content");
    drop(engine);
}

#[test]
fn a_server_that_hangs_up_in_mid_packet_leaves_nobody_waiting() {
    for cut in [0, 2, 4, 6, 500] {
        let device = file(100_000, &[], move |peer, id, request| {
            let Request::Read { len, .. } = request else {
                return;
            };
            let mut wire = Vec::new();
            let reply = Reply::Data(vec![0; len as usize].into());
            reply.encode(id, &mut wire).expect("short");
            peer.raw(&wire[..cut]);
            let _ = peer.0.shutdown(Shutdown::Both);
        });
        let begun = Instant::now();
        let error = device.read_exact_at(&mut [1; 1000], 0).expect_err("gone");
        assert_eq!(error.kind(), Kind::Disconnected, "{}", error.report());
        assert!(
            begun.elapsed() < bounds().silence,
            "noticed by its end, not by silence"
        );
    }
}
