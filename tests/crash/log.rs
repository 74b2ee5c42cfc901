//! What reached the server, in order: one file that every relay appends to.
//!
//! A record is written whole under a lock. A relay that is killed half way leaves a part of one,
//! which the reader finds out by the mark that every record begins with.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

const MARK: [u8; 8] = *b"\xe2\xebREC\r\n\0";
/// Mark, length of the data, kind, tag, offset.
const HEAD: usize = 8 + 4 + 1 + 8 + 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A write was sent to the server; `Written` when it said so.
    Write,
    Written,
    /// A flush was sent to the server; `Synced` when it said so.
    Sync,
    Synced,
    /// The server has taken it up, whoever sent it: it is in the file, flushed or not.
    InFile,
    /// The test has seen something done; `data` says what.
    Seen,
}

const KINDS: [Kind; 6] = [
    Kind::Write,
    Kind::Written,
    Kind::Sync,
    Kind::Synced,
    Kind::InFile,
    Kind::Seen,
];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub kind: Kind,
    /// Ties an answer to its request.
    pub tag: u64,
    pub offset: u64,
    pub data: Vec<u8>,
}

pub struct Log(File);

impl Log {
    pub fn open(path: &Path) -> io::Result<Log> {
        let mut options = File::options();
        options.append(true).create(true).open(path).map(Log)
    }

    pub fn append(&self, kind: Kind, tag: u64, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut record = Vec::with_capacity(HEAD + data.len());
        record.extend_from_slice(&MARK);
        record.extend_from_slice(&(data.len() as u32).to_le_bytes());
        record.push(kind as u8);
        record.extend_from_slice(&tag.to_le_bytes());
        record.extend_from_slice(&offset.to_le_bytes());
        record.extend_from_slice(data);
        flock(&self.0, FlockOperation::LockExclusive)?;
        let done = (&self.0).write_all(&record);
        flock(&self.0, FlockOperation::Unlock)?;
        done
    }
}

/// All whole records.
pub fn read(path: &Path) -> io::Result<Vec<Record>> {
    Ok(parse(&fs::read(path)?))
}

fn parse(bytes: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    let mut at = 0;
    while let Some(record) = whole(&bytes[at..]) {
        let (record, len) = match record {
            Some((record, len)) => (Some(record), len),
            // A part of one: the next begins at the next mark.
            None => {
                let rest = &bytes[at + 1..];
                let next = rest.windows(MARK.len()).position(|window| window == MARK);
                (None, next.map_or(bytes.len() - at, |next| next + 1))
            }
        };
        records.extend(record);
        at += len;
    }
    records
}

/// Nothing at the end of the log; `Some(None)` when no whole record begins here.
fn whole(bytes: &[u8]) -> Option<Option<(Record, usize)>> {
    if bytes.is_empty() {
        return None;
    }
    let parse = || {
        let head = bytes.get(..HEAD).filter(|head| head[..8] == MARK)?;
        let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        let len = u32::from_le_bytes(head[8..12].try_into().expect("4 bytes")) as usize;
        let data = bytes.get(HEAD..HEAD + len)?;
        // One that was torn has swallowed the next one's mark, or the beginning of it.
        let inside = &bytes[MARK.len()..HEAD + len];
        let after = bytes.get(HEAD + len);
        let ends = !inside.windows(MARK.len()).any(|window| window == MARK)
            && after.is_none_or(|first| *first == MARK[0]);
        let record = Record {
            kind: *KINDS.get(usize::from(head[12]))?,
            tag: number(13),
            offset: number(21),
            data: data.to_vec(),
        };
        ends.then_some((record, HEAD + len))
    };
    Some(parse())
}

/// Part of the rig's own test.
pub fn a_torn_record_costs_no_other() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("log");
    let append = |tag, data: &[u8]| {
        let log = Log::open(&path).expect("opened");
        log.append(Kind::Write, tag, 4096 * tag, data)
            .expect("written");
    };
    append(1, &[1; 5000]);
    append(2, &[2; 5000]);
    let size = fs::metadata(&path).expect("there").len();
    let file = File::options().write(true).open(&path).expect("opened");
    for lost in [1, 4999, 5000, 5028] {
        file.set_len(size - lost).expect("cut");
        append(3, b"x");
        let tags: Vec<u64> = read(&path).expect("read").iter().map(|r| r.tag).collect();
        assert_eq!(tags, [1, 3], "{lost} bytes lost");
        file.set_len(size - 5029).expect("cut");
        append(2, &[2; 5000]);
    }
    assert_eq!(read(&path).expect("read").len(), 2);
}
