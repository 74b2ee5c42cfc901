//! One file as a line: a path, a long line as of `ls -l`, or an object.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use crate::cli::look::{mode_octal, printable};
use crate::restore::{FileKind, Filesystem, Metadata, Time};

/// How files are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Short,
    Long,
    Json,
}

impl Form {
    pub fn choose(long: bool, json: bool) -> Form {
        match (json, long) {
            (true, _) => Form::Json,
            (false, true) => Form::Long,
            (false, false) => Form::Short,
        }
    }

    /// The line of a file. `metadata` is nothing where it could not be read.
    pub fn line(
        self,
        filesystem: &Filesystem,
        path: &[u8],
        inode: u32,
        metadata: Option<&Metadata>,
    ) -> String {
        let target = || {
            let link = metadata.filter(|m| m.kind == FileKind::Symlink)?;
            let inode = filesystem.inode(u32::try_from(link.inode).ok()?).ok()?;
            filesystem.read_link(&inode).ok()
        };
        match (self, metadata) {
            (Form::Short, _) => printable(path),
            (Form::Long, None) => format!("?????????? {}", printable(path)),
            (Form::Long, Some(metadata)) => {
                let arrow = target().map(|target| format!(" -> {}", printable(&target)));
                let arrow = arrow.unwrap_or_default();
                format!("{} {}{arrow}", columns(metadata), printable(path))
            }
            (Form::Json, _) => object(path, inode, metadata, target()).to_string(),
        }
    }
}

fn columns(metadata: &Metadata) -> String {
    let size = match metadata.kind {
        FileKind::CharDevice | FileKind::BlockDevice => {
            format!("{}, {}", metadata.device.0, metadata.device.1)
        }
        _ => metadata.size.to_string(),
    };
    format!(
        "{} {:>3} {:>5} {:>5} {size:>12} {}",
        letters(metadata),
        metadata.links,
        metadata.uid,
        metadata.gid,
        local_time(metadata.modified)
    )
}

/// `drwxr-xr-x`.
fn letters(metadata: &Metadata) -> String {
    let mut text = String::from(match metadata.kind {
        FileKind::Regular => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::CharDevice => 'c',
        FileKind::BlockDevice => 'b',
        FileKind::Fifo => 'p',
        FileKind::Socket => 's',
    });
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = metadata.mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (metadata.mode & special != 0, bits & 1 != 0) {
            (false, false) => '-',
            (false, true) => 'x',
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
        });
    }
    text
}

pub fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Regular => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::CharDevice => "character device",
        FileKind::BlockDevice => "block device",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
    }
}

fn stamp(time: Time) -> Option<Timestamp> {
    // OK to unwrap: less than 10^9.
    let nanoseconds = i32::try_from(time.nanoseconds).unwrap_or(0);
    Timestamp::new(time.seconds, nanoseconds).ok()
}

/// By the clock on this machine's wall.
pub fn local_time(time: Time) -> String {
    let zoned = stamp(time).map(|stamp| stamp.to_zoned(TimeZone::system()));
    zoned.map_or("?".into(), |z| z.strftime("%Y-%m-%d %H:%M").to_string())
}

/// A path that is no text loses nothing: its bytes are given too.
pub fn path_fields(path: &[u8]) -> Value {
    let mut fields = json!({"path": String::from_utf8_lossy(path)});
    if std::str::from_utf8(path).is_err() {
        let hex: Vec<String> = path.iter().map(|byte| format!("{byte:02x}")).collect();
        fields["path_hex"] = hex.concat().into();
    }
    fields
}

/// What is known of a file, without its path.
pub fn metadata_fields(metadata: &Metadata) -> Value {
    let mut fields = json!({
        "type": kind_name(metadata.kind), "mode": mode_octal(metadata), "uid": metadata.uid,
        "gid": metadata.gid, "size": metadata.size, "links": metadata.links,
        "modified": stamp(metadata.modified).map(|stamp| stamp.to_string()),
    });
    if matches!(metadata.kind, FileKind::CharDevice | FileKind::BlockDevice) {
        fields["device"] = json!([metadata.device.0, metadata.device.1]);
    }
    fields
}

fn object(path: &[u8], inode: u32, metadata: Option<&Metadata>, target: Option<Vec<u8>>) -> Value {
    let mut object = path_fields(path);
    object["inode"] = inode.into();
    if let Some(metadata) = metadata {
        merge(&mut object, metadata_fields(metadata));
    }
    if let Some(target) = target {
        object["target"] = String::from_utf8_lossy(&target).into();
    }
    object
}

pub fn merge(into: &mut Value, fields: Value) {
    if let (Value::Object(into), Value::Object(fields)) = (into, fields) {
        into.extend(fields);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_those_of_ls() {
        let with = |kind, mode| {
            letters(&Metadata {
                kind,
                mode,
                uid: 0,
                gid: 0,
                size: 0,
                modified: Time::default(),
                accessed: None,
                device: (0, 0),
                links: 1,
                inode: 1,
            })
        };
        assert_eq!(with(FileKind::Directory, 0o1777), "drwxrwxrwt");
        assert_eq!(with(FileKind::Regular, 0o4640), "-rwSr-----");
        assert_eq!(with(FileKind::Fifo, 0o2711), "prwx--s--x");
    }
}
