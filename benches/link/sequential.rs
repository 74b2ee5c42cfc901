//! Reading and writing in order, 1 MiB a request; writes end with a sync on the server.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::common::{Proxy, Shape};
use crate::measure::{cpu_of_family, engine_cpu};
use crate::ours;
use crate::report::{ENGINE, OURS, Report, SFTP, SSHFS};
use crate::rig::{Rig, Turn, VOLUME_BASE};
use crate::work::{MIB, Work};

/// A loop device has several requests in flight.
const VOLUME_DEPTH: usize = 4;
/// What the cache sends at once, in requests of 1 MiB.
const ENGINE_DEPTH: usize = 24;

pub const READ: &str = "sequential read";
pub const WRITE: &str = "sequential write";

pub fn measure(turn: &Turn<'_>, report: &mut Report) {
    for write in [false, true] {
        for tool in turn.rotated(vec![OURS, SSHFS, SFTP, ENGINE]) {
            let what = if write { WRITE } else { READ };
            let cpu = || match tool {
                OURS => cpu_of_family(turn.ours.pid),
                SSHFS => cpu_of_family(turn.sshfs.pid()),
                SFTP => cpu_of_family(turn.sftp.borrow().pid()),
                _ => engine_cpu(),
            };
            let before = cpu();
            let (bytes, took) = one(turn, tool, write);
            let spent = cpu().saturating_sub(before).as_secs_f64();
            report.add(
                what,
                turn.rtt,
                tool,
                "mb_per_s",
                bytes / 1e6 / took.as_secs_f64(),
            );
            let gib = bytes / (1_u64 << 30) as f64;
            report.add(what, turn.rtt, tool, "cpu_s_per_gib", spent / gib);
        }
    }
}

/// The bytes, and how long they took.
fn one(turn: &Turn<'_>, tool: &str, write: bool) -> (f64, Duration) {
    let amounts = turn.rig.amounts;
    let many = amounts.there;
    let few = amounts.bytes_of_one_window(turn.rtt);
    let places = amounts.places();
    let from = if write { places.write } else { places.read };
    match tool {
        OURS => {
            let from = VOLUME_BASE + from;
            let work = Work::sequential(write, from, many, VOLUME_DEPTH);
            (many as f64, work.run(&turn.ours.open_volume()).synced)
        }
        SSHFS => {
            let file = ours::open(&turn.sshfs.file("peer"), false);
            let work = Work::sequential(write, from, few, 1);
            (few as f64, work.run(&file).synced)
        }
        SFTP => (few as f64, by_sftp(turn, write, few)),
        _ => {
            let work = Work::sequential(write, from, many, ENGINE_DEPTH);
            (many as f64, work.run(&turn.raw).synced)
        }
    }
}

fn by_sftp(turn: &Turn<'_>, write: bool, bytes: u64) -> Duration {
    let rig = turn.rig;
    let (here, there) = match write {
        true => (sized(rig, rig.local("put"), bytes), rig.stored("got")),
        false => (rig.local("got"), sized(rig, rig.stored("get"), bytes)),
    };
    let mut sftp = turn.sftp.borrow_mut();
    let start = Instant::now();
    match write {
        true => sftp.put(&here, &there),
        false => sftp.get(&there, &here),
    }
    start.elapsed()
}

/// A file of this size; made when the one before had another.
fn sized(rig: &Rig, path: PathBuf, bytes: u64) -> PathBuf {
    if path.metadata().is_ok_and(|about| about.len() == bytes) {
        return path;
    }
    let source = File::open(rig.stored("peer")).expect("the source");
    let mut target = File::create(&path).expect("a file");
    std::io::copy(&mut source.take(bytes), &mut target).expect("room");
    path
}

/// What the link itself carries with no delay.
pub fn proxy_alone(report: &mut Report) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let proxy = Proxy::to_port(port, Shape::default());
    let mut client = TcpStream::connect(("127.0.0.1", proxy.port())).expect("a link");
    let (mut server, _) = listener.accept().expect("a link");
    let bytes = 2048 * MIB;
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let chunk = vec![7; MIB as usize];
            (0..bytes / MIB).for_each(|_| client.write_all(&chunk).expect("a link"));
        });
        let mut buffer = vec![0; MIB as usize];
        let mut left = bytes;
        while left > 0 {
            left -= server.read(&mut buffer).expect("a link") as u64;
        }
    });
    let rate = bytes as f64 / 1e6 / start.elapsed().as_secs_f64();
    report.add("the proxy alone", 0, "TCP", "mb_per_s", rate);
}
