//! What reached the server, in order: one file that every relay appends to.
//!
//! A record is written whole under a lock. A relay that is killed half way leaves a part of one,
//! which the reader finds out by the mark that every record begins with.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

const MARK: [u8; 8] = *b"\xe2\xebREC\r\n\0";
/// Mark, length of the data, kind, file, tag, offset.
const HEAD: usize = 8 + 4 + 1 + 1 + 8 + 8;

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
    /// The server was asked to copy bytes from the image to the same place of the other file;
    /// `Written` when it said so.
    Copied,
    /// Bytes are about to become a hole.
    Punched,
    /// The file is there, and empty.
    Created,
    /// The other file takes the name of the image.
    Renamed,
    /// The test has seen something done; `data` says what.
    Seen,
}

const KINDS: [Kind; 10] = [
    Kind::Write,
    Kind::Written,
    Kind::Sync,
    Kind::Synced,
    Kind::InFile,
    Kind::Copied,
    Kind::Punched,
    Kind::Created,
    Kind::Renamed,
    Kind::Seen,
];

/// Which file it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Image,
    /// What a trim has the server make, to take the image's place.
    Lean,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub kind: Kind,
    pub which: Which,
    /// Ties an answer to its request.
    pub tag: u64,
    pub offset: u64,
    pub data: Vec<u8>,
}

impl Record {
    /// Of the image.
    pub fn new(kind: Kind, data: Vec<u8>) -> Record {
        Record {
            kind,
            which: Which::Image,
            tag: 0,
            offset: 0,
            data,
        }
    }

    /// The bytes that are copied or punched: `data` holds their number.
    pub fn range(&self) -> Range<u64> {
        let len = self.data[..8].try_into().expect("8 bytes");
        self.offset..self.offset + u64::from_le_bytes(len)
    }
}

pub struct Log(File);

impl Log {
    pub fn open(path: &Path) -> io::Result<Log> {
        let mut options = File::options();
        options.append(true).create(true).open(path).map(Log)
    }

    pub fn append(&self, record: &Record) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEAD + record.data.len());
        bytes.extend_from_slice(&MARK);
        bytes.extend_from_slice(&(record.data.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&[record.kind as u8, record.which as u8]);
        bytes.extend_from_slice(&record.tag.to_le_bytes());
        bytes.extend_from_slice(&record.offset.to_le_bytes());
        bytes.extend_from_slice(&record.data);
        flock(&self.0, FlockOperation::LockExclusive)?;
        let done = (&self.0).write_all(&bytes);
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
            which: *[Which::Image, Which::Lean].get(usize::from(head[13]))?,
            tag: number(14),
            offset: number(22),
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
        let mut record = Record::new(Kind::Write, data.to_vec());
        (record.tag, record.offset) = (tag, 4096 * tag);
        log.append(&record).expect("written");
    };
    append(1, &[1; 5000]);
    append(2, &[2; 5000]);
    let size = fs::metadata(&path).expect("there").len();
    let file = File::options().write(true).open(&path).expect("opened");
    let whole = HEAD as u64 + 5000;
    for lost in [1, 4999, 5000, whole - 1] {
        file.set_len(size - lost).expect("cut");
        append(3, b"x");
        let tags: Vec<u64> = read(&path).expect("read").iter().map(|r| r.tag).collect();
        assert_eq!(tags, [1, 3], "{lost} bytes lost");
        file.set_len(size - whole).expect("cut");
        append(2, &[2; 5000]);
    }
    assert_eq!(read(&path).expect("read").len(), 2);
}
