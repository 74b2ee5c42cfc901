//! The long link that other tests and the benchmarks use does what it says.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{Proxy, Shape, wait_for};

/// Longer is hung.
const SOON: Duration = Duration::from_secs(20);
/// What does not come in this time, though nothing holds it, does not come.
const A_WHILE: Duration = Duration::from_millis(300);
const AT_ONCE: Shape = Shape {
    round_trip: Duration::ZERO,
    rate: None,
};

/// A server that hands over what connects to it.
fn server() -> (u16, mpsc::Receiver<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let port = listener.local_addr().expect("bound").port();
    let (hand, taken) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if hand.send(stream).is_err() {
                return;
            }
        }
    });
    (port, taken)
}

/// A proxy, and both ends of a connection through it.
fn connected(shape: Shape) -> (Proxy, TcpStream, TcpStream) {
    let (port, taken) = server();
    let proxy = Proxy::to_port(port, shape);
    let client = connect(&proxy);
    let server = taken.recv_timeout(SOON).expect("a connection");
    server.set_read_timeout(Some(SOON)).expect("set");
    (proxy, client, server)
}

fn connect(proxy: &Proxy) -> TcpStream {
    let client = TcpStream::connect(("127.0.0.1", proxy.port())).expect("accepted");
    client.set_read_timeout(Some(SOON)).expect("set");
    client
}

fn take(stream: &mut TcpStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).expect("as many bytes");
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// Whether nothing comes for a while.
fn is_silent(stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(A_WHILE)).expect("set");
    let peeked = stream.peek(&mut [0]);
    stream.set_read_timeout(Some(SOON)).expect("set");
    peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

fn is_reset(stream: &mut TcpStream) -> bool {
    let read = stream.read(&mut [0]);
    read.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn every_byte_arrives_in_order_and_is_counted() {
    for shape in [AT_ONCE, Shape::round_trip_ms(10)] {
        let (proxy, mut client, mut server) = connected(shape);
        let there = pattern(40 << 20);
        let back = pattern(3 << 20);
        std::thread::scope(|scope| {
            scope.spawn(|| client.write_all(&there).expect("goes"));
            assert!(take(&mut server, there.len()) == there);
        });
        // Small and large pieces, so that the places in the ring move.
        for piece in back.chunks(77_777) {
            server.write_all(piece).expect("goes");
            assert!(take(&mut client, piece.len()) == piece);
        }
        assert_eq!(proxy.sent_by_clients(), there.len() as u64);
        assert_eq!(proxy.sent_by_server(), back.len() as u64);
        assert_eq!(proxy.connections(), 1);
        // An end is passed on, and the other direction lives.
        client.shutdown(std::net::Shutdown::Write).expect("open");
        assert_eq!(server.read(&mut [0]).expect("no error"), 0);
        server.write_all(b"after").expect("goes");
        assert_eq!(take(&mut client, 5), b"after");
        drop(server);
        assert_eq!(client.read(&mut [0]).expect("no error"), 0);
        wait_for("the end of it", SOON, || proxy.connections() == 0);
    }
}

#[test]
fn each_direction_takes_half_the_round_trip_at_least() {
    let (proxy, mut client, mut server) = connected(Shape::round_trip_ms(60));
    let start = Instant::now();
    client.write_all(b"there").expect("goes");
    take(&mut server, 5);
    assert!(start.elapsed() >= Duration::from_millis(30));
    server.write_all(b"back").expect("goes");
    take(&mut client, 4);
    assert!(start.elapsed() >= Duration::from_millis(60));

    proxy.reshape(AT_ONCE);
    let start = Instant::now();
    for _ in 0..200 {
        client.write_all(b"x").expect("goes");
        take(&mut server, 1);
    }
    assert!(
        start.elapsed() < Duration::from_millis(30 * 200),
        "it does not wait any more"
    );
}

/// Bytes overtake no earlier ones and wait for none: many are on their way at once.
#[test]
fn a_delay_takes_no_throughput() {
    let (_proxy, mut client, mut server) = connected(Shape::round_trip_ms(200));
    let bytes = pattern(32 << 20);
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| client.write_all(&bytes).expect("goes"));
        assert!(take(&mut server, bytes.len()) == bytes);
    });
    // One read at a time, 256 KiB every 100 ms, would take 13 s.
    assert!(start.elapsed() < Duration::from_secs(8));
}

#[test]
fn the_rate_is_shared_by_all_connections() {
    let (port, taken) = server();
    let proxy = Proxy::to_port(port, AT_ONCE.mbit(160.0)); // 20 MB/s
    let bytes = pattern(5_000_000);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let mut client = connect(&proxy);
            let mut server = taken.recv_timeout(SOON).expect("a connection");
            let bytes = &bytes;
            scope.spawn(move || client.write_all(bytes).expect("goes"));
            scope.spawn(move || assert!(take(&mut server, bytes.len()) == *bytes));
        }
    });
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(450), "{took:?}");
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[test]
fn a_frozen_link_tells_nobody_and_delivers_late() {
    let (proxy, mut client, mut server) = connected(Shape::round_trip_ms(40));
    // Under way when it freezes, and sent afterwards.
    client.write_all(b"early ").expect("goes");
    proxy.freeze();
    client.write_all(b"late ").expect("goes");
    assert!(is_silent(&server) && is_silent(&client));
    // A new one is accepted, and is as dead.
    let mut second = connect(&proxy);
    second.write_all(b"hello").expect("goes");
    assert!(is_silent(&second));
    // Its sender dies; nobody hears of it yet.
    drop(client);
    assert!(is_silent(&server));
    proxy.thaw();
    let mut all = Vec::new();
    server.read_to_end(&mut all).expect("an end");
    assert_eq!(all, b"early late ");
}

#[test]
fn connections_of_before_can_freeze_alone() {
    let (port, taken) = server();
    let proxy = Proxy::to_port(port, AT_ONCE);
    let mut old = connect(&proxy);
    let mut old_server = taken.recv_timeout(SOON).expect("a connection");
    // The server may hear of it first.
    wait_for("the connection", SOON, || proxy.connections() == 1);
    proxy.freeze_connected();
    old.write_all(b"old").expect("goes");
    let mut new = connect(&proxy);
    let mut new_server = taken.recv_timeout(SOON).expect("a connection");
    new.write_all(b"new").expect("goes");
    new_server.set_read_timeout(Some(SOON)).expect("set");
    assert_eq!(take(&mut new_server, 3), b"new");
    assert!(is_silent(&old_server));
    proxy.thaw();
    assert_eq!(take(&mut old_server, 3), b"old");
}

#[test]
fn a_cut_resets_both_ends_and_loses_what_was_under_way() {
    for frozen in [false, true] {
        let (proxy, mut client, mut server) = connected(Shape::round_trip_ms(2_000));
        client.write_all(b"never arrives").expect("goes");
        wait_for("the bytes", SOON, || proxy.sent_by_clients() == 13);
        if frozen {
            proxy.freeze();
        }
        proxy.cut();
        assert!(is_reset(&mut client) && is_reset(&mut server));
        assert_eq!(proxy.connections(), 0);
        proxy.thaw();
        drop(connect(&proxy));
    }
}

#[test]
fn a_refusing_link_keeps_its_port() {
    let (proxy, mut client, mut server) = connected(AT_ONCE);
    proxy.refuse(true);
    let refused = TcpStream::connect(("127.0.0.1", proxy.port()));
    assert_eq!(
        refused.expect_err("refused").kind(),
        ErrorKind::ConnectionRefused
    );
    // What is up stays up.
    client.write_all(b"still").expect("goes");
    assert_eq!(take(&mut server, 5), b"still");
    proxy.refuse(false);
    connect(&proxy);
}

#[test]
fn without_a_server_clients_are_reset() {
    let unused = TcpListener::bind("127.0.0.1:0").expect("binds");
    let port = unused.local_addr().expect("bound").port();
    drop(unused);
    let proxy = Proxy::to_port(port, AT_ONCE);
    assert!(is_reset(&mut connect(&proxy)));
}
