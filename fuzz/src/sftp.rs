//! SFTP packets in both directions, and the client's side of a conversation.

use std::collections::HashMap;

use e2ebak::sftp::{
    Attributes, Conversation, Event, Extended, Limits, OpenFlags, Reply, Request, StatVfs, frame,
};

use super::input::Input;

/// What a server takes from a client.
pub fn request(packet: &[u8]) {
    let Ok((id, request)) = Request::decode(packet) else {
        return;
    };
    let mut wire = Vec::new();
    request.encode(id, &mut wire).expect("it came in a packet");
    let len = frame::length([wire[0], wire[1], wire[2], wire[3]], false).expect("a length");
    assert_eq!(len, wire.len() - 4);
    assert_eq!(Request::decode(&wire[4..]), Ok((id, request)));
}

/// What a client takes from a server.
pub fn reply(packet: &[u8]) {
    if let Some(first) = packet.first_chunk() {
        for is_first in [true, false] {
            if let Ok(len) = frame::length(*first, is_first) {
                assert!((1..=frame::PACKET_MAX).contains(&len));
            }
        }
    }
    let shown = frame::printable(packet);
    assert!(shown.chars().count() <= frame::TEXT_MAX && !shown.contains(char::is_control));

    let Ok((id, reply)) = Reply::decode(packet.to_vec()) else {
        return;
    };
    if let Reply::Extended(data) = &reply {
        read_extended(data);
    }
    let mut wire = Vec::new();
    // A packet may grow a little: a status without words is given empty ones.
    reply
        .encode(id, &mut wire)
        .expect("about as short as it came");
    assert_eq!(Reply::decode(wire.split_off(4)), Ok((id, reply)));
}

fn read_extended(data: &[u8]) {
    if let Ok(limits) = Limits::decode(data) {
        assert_eq!(Limits::decode(&limits.encode()), Ok(limits));
    }
    if let Ok(room) = StatVfs::decode(data) {
        assert_eq!(StatVfs::decode(&room.encode()), Ok(room));
    }
}

/// Requests of ours and packets of a server, in any order, until it does what no server may.
pub fn conversation(data: &[u8]) {
    let mut input = Input(data);
    let mut conversation = Conversation::default();
    // Ticket and bytes asked for, by the id on the wire.
    let mut waiting: HashMap<u32, (u32, Option<u32>)> = HashMap::new();
    let mut tickets = 0;
    while !input.is_empty() {
        if input.u8() % 2 == 0 {
            let (request, asked) = some_request(&mut input);
            let mut out = Vec::new();
            tickets += 1;
            let made = conversation.request(&request, tickets, &mut out);
            made.expect("short enough");
            let id = u32::from_be_bytes([out[5], out[6], out[7], out[8]]);
            assert!(
                waiting.insert(id, (tickets, asked)).is_none(),
                "a number used twice"
            );
            continue;
        }
        let len = input.u16();
        match conversation.receive(input.take(len.into()).to_vec()) {
            Err(_) => break,
            Ok(Event::Ready(_)) => {}
            Ok(Event::Reply { ticket, reply }) => {
                let answered = waiting.iter().find(|(_, waits)| waits.0 == ticket);
                let (&id, &(_, asked)) = answered.expect("somebody waits for it");
                waiting.remove(&id);
                match reply {
                    Reply::Data(data) => {
                        assert!(data.bytes().len() <= asked.expect("a read") as usize);
                    }
                    Reply::Extended(data) => read_extended(&data),
                    _ => {}
                }
            }
        }
        assert_eq!(conversation.outstanding(), waiting.len());
    }
    // Whoever still waits hears of it, and hears once.
    let mut abandoned = conversation.abandon();
    let mut left: Vec<u32> = waiting.into_values().map(|(ticket, _)| ticket).collect();
    abandoned.sort_unstable();
    left.sort_unstable();
    assert_eq!(abandoned, left);
}

fn some_request<'a>(input: &mut Input<'a>) -> (Request<'a>, Option<u32>) {
    let kind = input.u8() % 9;
    let name = input.string();
    let attributes = Attributes::default();
    let request = match kind {
        0 => {
            let (offset, len) = (input.u32().into(), input.u16().into());
            let handle = name;
            return (
                Request::Read {
                    handle,
                    offset,
                    len,
                },
                Some(len),
            );
        }
        1 => {
            let (path, flags) = (name, OpenFlags(input.u32()));
            Request::Open {
                path,
                flags,
                attributes,
            }
        }
        2 => Request::Close { handle: name },
        3 => Request::Stat { path: name },
        4 => Request::Readdir { handle: name },
        5 => Request::Realpath { path: name },
        6 => Request::Extended(Extended::Limits),
        7 => Request::Extended(Extended::StatVfs { path: name }),
        _ => Request::Extended(Extended::Other { name, data: b"x" }),
    };
    (request, None)
}
