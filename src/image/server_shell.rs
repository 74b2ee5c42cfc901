//! One shell on the server, over ssh, for what SFTP cannot: how much a file takes on its disk, and
//! holes inside it. Where only SFTP is allowed it is found out that there is none.
//!
//! The script needs nothing but a POSIX shell, `stat` and `fallocate`. Everything that depends on the
//! image goes in by its standard input, so nothing needs quoting.

use std::io::{BufRead, BufReader, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::LinkSettings;
use crate::error::{Attempt, Error, Kind, Result};
use crate::link::{Handle, Stream};
use crate::location::Location;
use crate::remote::Store;

/// How long the shell may take to say anything: logging in, or punching one batch of holes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Holes that are asked for at once. If we die, no more of them are punched than these.
const BATCH: usize = 256;

/// A login shell may greet; that much of it is passed over.
const LINES_MAX: usize = 100;

/// Tells the size and the stored blocks of a file.
const STAT: &str = r#"sh -c 'IFS= read -r f; echo "e2ebak at $(stat -L -c "%s %b %B" -- "$f")"'"#;

/// Tells the size of a file, and where it holds something.
const EXTENTS: &str = r#"sh -c 'IFS= read -r f;
if command -v filefrag > /dev/null 2>&1; then :; else echo "e2ebak no filefrag there"; exit 0; fi;
echo "e2ebak at $(stat -L -c %s -- "$f")";
filefrag -s -v -b4096 -- "$f" 2> /dev/null | while IFS= read -r x; do echo "e2ebak x $x"; done;
echo "e2ebak done"'"#;

/// Punches holes while the lease beside the file holds our nonce: it is looked at before each,
/// because we may be dead by then and somebody else may be writing.
const PUNCH: &str = r#"sh -c 'IFS= read -r f; read -r n;
held() { while IFS= read -r x; do case $x in *"$n"*) return 0;; esac; done < "$f.lease"; return 1; };
if command -v fallocate > /dev/null 2>&1; then :; else echo "e2ebak no fallocate there"; exit 0; fi;
if held 2> /dev/null; then :; else echo "e2ebak no such image there"; exit 0; fi;
echo "e2ebak ready";
while read -r o l; do case $o in
mark) echo "e2ebak done";;
*) if held; then :; else echo "e2ebak no lease"; exit 0; fi;
if fallocate -p -o "$o" -l "$l" "$f"; then :; else echo "e2ebak no holes in files there"; exit 0; fi;;
esac; done'"#;

/// A shell that has been asked something.
pub(super) struct Shell {
    writer: Box<dyn Write + Send>,
    lines: std::sync::mpsc::Receiver<String>,
    handle: Arc<dyn Handle>,
}

impl Shell {
    /// `None` where there can be none: a local file, `--ssh-command`, `--ssh built-in`, a path with a newline.
    pub fn start(location: &Location, link: &LinkSettings, script: &str) -> Result<Option<Shell>> {
        let Location::Sftp(server, path) = location else {
            return Ok(None);
        };
        if path.as_str().contains('\n') {
            return Ok(None);
        }
        let Some(dial) = link.shell(server)? else {
            return Ok(None);
        };
        // In one line: not every login shell takes more.
        let Stream {
            reader,
            mut writer,
            handle,
        } = dial.exec(&script.replace('\n', " "))?;
        let (sender, lines) = channel();
        let listen = move || {
            let mut reader = BufReader::new(reader);
            let mut line = Vec::new();
            // What is no text is no shell's; the bound is for what never ends a line.
            while Read::by_ref(&mut reader)
                .take(4096)
                .read_until(b'\n', &mut line)
                .is_ok_and(|count| count > 0)
            {
                let text = String::from_utf8_lossy(&line).trim().to_string();
                if sender.send(text).is_err() {
                    return;
                }
                line.clear();
            }
        };
        let started = thread::Builder::new()
            .name("server-shell".into())
            .spawn(listen);
        started.attempt(|| "start a thread")?;
        // A leading dash would be an option to `stat`'s poorer cousins.
        let path = path.as_str();
        let dot = if path.starts_with('/') { "" } else { "./" };
        let _ = writeln!(writer, "{dot}{path}"); // if nobody reads, nobody answers either
        Ok(Some(Shell {
            writer,
            lines,
            handle,
        }))
    }

    /// What comes after `e2ebak` in its next answer.
    pub fn answer(&self) -> Result<String> {
        let refused = |why: &str| Error::new(Kind::Unsupported, why);
        for _ in 0..LINES_MAX {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => {
                    if let Some(answer) = line.strip_prefix("e2ebak ") {
                        return Ok(answer.to_string());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(refused("the server runs no commands: nothing came back"));
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Err(refused("the server runs no commands"))
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.handle.close();
    }
}

/// Bytes that the image takes on the server's disk, if that can be found out.
pub fn stored_bytes(
    store: &dyn Store,
    location: &Location,
    link: &LinkSettings,
    size: u64,
) -> Result<Option<u64>> {
    if let Some(stored) = store.stored()? {
        return Ok(Some(stored));
    }
    let Some(shell) = Shell::start(location, link, STAT)? else {
        return Ok(None);
    };
    let Ok(answer) = shell.answer() else {
        return Ok(None);
    };
    let numbers: Vec<u64> = answer
        .strip_prefix("at ")
        .unwrap_or_default()
        .split(' ')
        .map_while(|word| word.parse().ok())
        .collect();
    // Another size is another file: a shell may begin in another directory than SFTP does.
    Ok(match numbers[..] {
        [found, blocks, unit] if found == size => blocks.checked_mul(unit),
        _ => None,
    })
}

/// Where the image of `size` bytes holds something, ascending, if that can be found out.
pub fn data_ranges(
    store: &dyn Store,
    location: &Location,
    link: &LinkSettings,
    size: u64,
) -> Result<Option<Vec<Range<u64>>>> {
    if let Some(ranges) = store.data_ranges()? {
        return Ok(Some(ranges));
    }
    let Some(shell) = Shell::start(location, link, EXTENTS)? else {
        return Ok(None);
    };
    // Another size is another file, as above.
    if shell.answer().ok() != Some(format!("at {size}")) {
        return Ok(None);
    }
    let mut lines = Vec::new();
    loop {
        match shell.answer() {
            Ok(line) if line == "done" => return Ok(extents(&lines, size)),
            Ok(line) => lines.push(line),
            Err(_) => return Ok(None),
        }
    }
}

/// What filefrag -v says (filefrag(8)), in blocks of 4096 bytes: `x 0: 0.. 8191: ...` for each
/// extent, and how many there are at the end; `None` when that is not what came.
fn extents(lines: &[String], size: u64) -> Option<Vec<Range<u64>>> {
    let said_all = lines.last()?.ends_with(" found");
    let mut ranges = Vec::new();
    for line in lines {
        let mut fields = line.strip_prefix("x ")?.trim().split(':');
        let is_extent = fields
            .next()
            .is_some_and(|n| n.trim().parse::<u64>().is_ok());
        let Some((first, last)) = fields.next().and_then(|places| places.split_once("..")) else {
            continue;
        };
        if is_extent {
            let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            let end = last.checked_add(1)?.checked_mul(4096)?;
            ranges.push(first.checked_mul(4096)?..end.min(size));
        }
    }
    let ascends = ranges.is_sorted_by(|a, b| a.end <= b.start);
    (said_all && ascends).then_some(ranges)
}

/// Punches holes with the server's own `fallocate`. `nonce` is that of the lease we hold.
///
/// # Errors
/// [`Kind::Unsupported`], saying what the server lacks; some holes may have been punched then.
pub(super) fn punch(
    location: &Location,
    link: &LinkSettings,
    nonce: &str,
    ranges: &[Range<u64>],
    tell: &dyn Fn(u64),
    check: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let no = |why: &str| Error::new(Kind::Unsupported, why.to_string());
    let Some(mut shell) = Shell::start(location, link, PUNCH)? else {
        return Err(no("only ssh itself runs commands on a server"));
    };
    let _ = writeln!(shell.writer, "{nonce}"); // as above
    let judge = |answer: String, expected: &str| match answer.strip_prefix("no ") {
        _ if answer == expected => Ok(()),
        Some(what) => Err(no(&format!("the server has no {what}"))),
        None => Err(no(&format!("the server answers {answer:?}"))),
    };
    judge(shell.answer()?, "ready")?;
    let mut punched = 0;
    for batch in ranges.chunks(BATCH) {
        check()?;
        let mut lines = String::new();
        for range in batch {
            lines.push_str(&format!("{} {}\n", range.start, range.end - range.start));
            punched += range.end - range.start;
        }
        lines.push_str("mark\n");
        let written = shell.writer.write_all(lines.as_bytes());
        written
            .and_then(|()| shell.writer.flush())
            .attempt(|| "talk to the shell on the server")?;
        judge(shell.answer()?, "done")?;
        tell(punched);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extents_of_filefrag_are_read_or_nothing_is() {
        let told = "x Filesystem type is: ef53
            x File size of /a.img is 41943040 (10240 blocks of 4096 bytes)
            x  ext:     logical_offset:        physical_offset: length:   expected: flags:
            x    0:        0..     255:      34816..     35071:    256:
            x    1:     4096..   10239:      38912..     45055:   6144:      35072: last,eof
            x /a.img: 2 extents found";
        let lines: Vec<String> = told.lines().map(|line| line.trim().into()).collect();
        let ranges = vec![0..256 * 4096, 4096 * 4096..41_943_040];
        assert_eq!(extents(&lines, 41_943_040), Some(ranges));
        assert_eq!(extents(&lines[..4], 41_943_040), None, "cut off");
        assert_eq!(extents(&[], 1), None);
        assert_eq!(extents(&["no".into()], 1), None);
        let mut wrong = lines.clone();
        wrong.swap(3, 4);
        assert_eq!(extents(&wrong, 41_943_040), None);
    }
}
