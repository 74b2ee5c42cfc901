//! A tree as a tar archive in the POSIX format (pax), as GNU tar and bsdtar read it: with long
//! names, large numbers, fractions of seconds, hard links and extended attributes. Holes are
//! written as zeros.

use std::collections::HashMap;
use std::io::Write;

use crate::error::{Attempt, Error, Kind, Result};
use crate::restore::{Ahead, Content, FileKind, Filesystem, Metadata, Node, Piece, Tree};

/// The unit of the format, in bytes.
const BLOCK: usize = 512;
/// Read and written at once.
const PIECE: usize = 256 << 10;

/// Writes a tree, all names below `prefix`, as `ahead` has it fetched. What cannot be read is told to
/// `trouble`, and left out: a file, or only its attributes; a file that breaks off in the middle is filled with
/// zeros, for its size was already said.
pub fn write_tar(
    filesystem: &Filesystem,
    tree: &Tree,
    prefix: &[u8],
    out: &mut dyn Write,
    ahead: &Ahead,
    trouble: &mut dyn FnMut(&[u8], Error),
) -> Result<()> {
    let attempt = || "write the archive";
    let mut first_names: HashMap<u64, Vec<u8>> = HashMap::new();
    for node in tree.walk() {
        let below = tree.path(node);
        let path = match (prefix.is_empty(), below.is_empty()) {
            (true, true) => b".".to_vec(),
            (true, false) => below,
            (false, true) => prefix.to_vec(),
            (false, false) => [prefix, b"/", &below].concat(),
        };
        let Some(metadata) = tree.metadata(node) else {
            continue; // among the troubles of the tree
        };
        ahead.await_inode(tree.inode(node))?;
        let linked = first_names.get(&metadata.inode).cloned();
        let entry = match entry(filesystem, tree, node, &path, &metadata, linked, trouble) {
            Ok(entry) => entry,
            Err(error) => {
                trouble(&path, error);
                continue;
            }
        };
        out.write_all(&entry.head()).attempt(attempt)?;
        if metadata.links > 1 && metadata.kind != FileKind::Directory && entry.kind != b'1' {
            first_names.insert(metadata.inode, path.clone());
        }
        if entry.size > 0
            && let Err(error) = content(filesystem, ahead, tree.inode(node), entry.size, out)?
        {
            trouble(&path, error);
        }
    }
    out.write_all(&[0; 2 * BLOCK]).attempt(attempt)?;
    out.flush().attempt(attempt)
}

struct Entry<'a> {
    path: Vec<u8>,
    kind: u8,
    link: Vec<u8>,
    size: u64,
    metadata: &'a Metadata,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

fn entry<'a>(
    filesystem: &Filesystem,
    tree: &Tree,
    node: Node,
    path: &[u8],
    metadata: &'a Metadata,
    linked: Option<Vec<u8>>,
    trouble: &mut dyn FnMut(&[u8], Error),
) -> Result<Entry<'a>> {
    let inode = filesystem.inode(tree.inode(node))?;
    let (kind, link) = match (metadata.kind, linked) {
        (FileKind::Directory, _) => (b'5', Vec::new()),
        (_, Some(first)) => (b'1', first),
        (FileKind::Regular, None) => (b'0', Vec::new()),
        (FileKind::Symlink, None) => (b'2', filesystem.read_link(&inode)?),
        (FileKind::CharDevice, None) => (b'3', Vec::new()),
        (FileKind::BlockDevice, None) => (b'4', Vec::new()),
        (FileKind::Fifo, None) => (b'6', Vec::new()),
        (FileKind::Socket, None) => {
            let why = "a tar archive holds no sockets";
            return Err(Error::new(Kind::Unsupported, why));
        }
    };
    if kind == b'0' {
        // Before its size is promised.
        filesystem.content(&inode)?;
    }
    let attributes = match kind {
        b'1' => Vec::new(),
        _ => filesystem.attributes(&inode).unwrap_or_else(|error| {
            trouble(path, error);
            Vec::new()
        }),
    };
    let mut path = path.to_vec();
    if kind == b'5' {
        path.push(b'/');
    }
    Ok(Entry {
        path,
        kind,
        link,
        size: if kind == b'0' { metadata.size } else { 0 },
        metadata,
        attributes: attributes.into_iter().map(|a| (a.name, a.value)).collect(),
    })
}

impl Entry<'_> {
    /// The header, and before it one with what does not fit.
    fn head(&self) -> Vec<u8> {
        let time = self.metadata.modified;
        let mut records = Vec::new();
        if self.path.len() > 100 || !self.path.is_ascii() {
            record(&mut records, b"path", &self.path);
        }
        if self.link.len() > 100 || !self.link.is_ascii() {
            record(&mut records, b"linkpath", &self.link);
        }
        for (name, value, most) in [
            (&b"size"[..], self.size, 8 * (1 << 30)),
            (b"uid", self.metadata.uid.into(), 1 << 21),
            (b"gid", self.metadata.gid.into(), 1 << 21),
        ] {
            if value >= most {
                record(&mut records, name, value.to_string().as_bytes());
            }
        }
        if time.nanoseconds > 0 || time.seconds < 0 || time.seconds >= 8 * (1 << 30) {
            record(
                &mut records,
                b"mtime",
                decimal(time.seconds, time.nanoseconds).as_bytes(),
            );
        }
        for (name, value) in &self.attributes {
            record(&mut records, &attribute_keyword(name), value);
        }
        let mut head = Vec::new();
        if !records.is_empty() {
            let size = records.len() as u64;
            head.extend(self.header(b'x', b"pax", b"", size));
            head.append(&mut records);
            head.resize(head.len().next_multiple_of(BLOCK), 0);
        }
        head.extend(self.header(self.kind, &self.path, &self.link, self.size));
        head
    }

    fn header(&self, kind: u8, path: &[u8], link: &[u8], size: u64) -> [u8; BLOCK] {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8], room: usize| {
            let length = bytes.len().min(room);
            header[at..at + length].copy_from_slice(&bytes[..length]);
        };
        // Numbers that do not fit stand in a record; here they are the largest that fits.
        let octal = |value: u64, digits: u32| {
            let value = value.min((1 << (3 * digits)) - 1);
            format!("{value:0width$o}\0", width = digits as usize).into_bytes()
        };
        let metadata = self.metadata;
        put(0, path, 100);
        put(100, &octal(metadata.mode.into(), 7), 8);
        put(108, &octal(metadata.uid.into(), 7), 8);
        put(116, &octal(metadata.gid.into(), 7), 8);
        put(124, &octal(size, 11), 12);
        put(136, &octal(metadata.modified.seconds.max(0) as u64, 11), 12);
        put(148, b"        ", 8);
        put(156, &[kind], 1);
        put(157, link, 100);
        put(257, b"ustar\x0000", 8);
        put(329, &octal(metadata.device.0.into(), 7), 8);
        put(337, &octal(metadata.device.1.into(), 7), 8);
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
        header[148..155].copy_from_slice(&octal(sum, 6));
        header[155] = b' ';
        header
    }
}

/// An `=` would end the keyword: GNU tar writes and reads it, and the `%`, as in a URL.
fn attribute_keyword(name: &[u8]) -> Vec<u8> {
    let mut keyword = b"SCHILY.xattr.".to_vec();
    for byte in name {
        match byte {
            b'%' => keyword.extend(b"%25"),
            b'=' => keyword.extend(b"%3D"),
            byte => keyword.push(*byte),
        }
    }
    keyword
}

/// `LENGTH KEYWORD=VALUE\n`, and the length counts itself.
fn record(records: &mut Vec<u8>, keyword: &[u8], value: &[u8]) {
    let rest = keyword.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length += 1;
    }
    records.extend(length.to_string().into_bytes());
    records.push(b' ');
    records.extend_from_slice(keyword);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

fn decimal(seconds: i64, nanoseconds: u32) -> String {
    match (seconds < 0, nanoseconds) {
        (false, _) => format!("{seconds}.{nanoseconds:09}"),
        (true, 0) => seconds.to_string(),
        // Half a second after -2 is -1.5.
        (true, _) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds),
    }
}

/// Writes exactly `size` bytes. The outer error is of the archive, the inner one of the file.
fn content(
    filesystem: &Filesystem,
    ahead: &Ahead,
    inode: u32,
    size: u64,
    out: &mut dyn Write,
) -> Result<Result<()>> {
    let attempt = || "write the archive";
    let mut buf = vec![0; PIECE];
    let mut left = size;
    let mut result = Ok(());
    let zeros = |out: &mut dyn Write, count: u64| -> Result<()> {
        let blank = [0; 4096];
        let mut count = count;
        while count > 0 {
            let now = count.min(blank.len() as u64);
            out.write_all(&blank[..now as usize]).attempt(attempt)?;
            count -= now;
        }
        Ok(())
    };
    let inode = filesystem.inode(inode);
    let opened = inode.and_then(|inode| Ok(ahead.follow(&inode, filesystem.content(&inode)?)));
    match opened {
        Err(error) => result = Err(error),
        Ok(mut content) => {
            while left > 0 {
                match content.next(&mut buf) {
                    Ok(Piece::Data(bytes)) => {
                        let bytes = (bytes as u64).min(left);
                        out.write_all(&buf[..bytes as usize]).attempt(attempt)?;
                        left -= bytes;
                    }
                    Ok(Piece::Hole(bytes)) => {
                        let bytes = bytes.min(left);
                        zeros(out, bytes)?;
                        left -= bytes;
                    }
                    Ok(Piece::End) => break,
                    Err(error) => {
                        result = Err(error);
                        break;
                    }
                }
            }
        }
    }
    if left > 0 && result.is_ok() {
        let what = format!("the file ends {left} bytes before its size");
        result = Err(Error::new(Kind::Corrupt, what));
    }
    zeros(out, left)?;
    let padding = size.next_multiple_of(BLOCK as u64) - size;
    zeros(out, padding)?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_themselves() {
        for length in [1, 80, 88, 89, 90, 979, 9990] {
            let mut out = Vec::new();
            record(&mut out, b"path", &vec![b'x'; length]);
            let text = String::from_utf8(out).expect("text");
            let (number, _) = text.split_once(' ').expect("a space");
            assert_eq!(number.parse(), Ok(text.len()));
        }
    }

    #[test]
    fn times_before_1970_are_decimals() {
        assert_eq!(decimal(5, 7), "5.000000007");
        assert_eq!(decimal(-2, 500_000_000), "-1.500000000");
        assert_eq!(decimal(-1, 250_000_000), "-0.750000000");
    }
}
