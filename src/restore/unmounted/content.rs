//! The bytes of a file: which blocks are where, and reading them in order.

use super::Filesystem;
use crate::error::{Attempt, Error, Kind, Result};
use crate::ext4::{self, Fault, Format, Inode, Run, Step};
use crate::restore::source::{Content, Piece};

/// Numbers of blocks in an inode, before those of blocks of numbers.
const DIRECT: u64 = 12;
/// Blocks of numbers of blocks of numbers of blocks of numbers.
const INDIRECTIONS: u32 = 3;

/// Finds the blocks of a file. Nodes are read again each time, from the cache below: memory does
/// not grow with the file.
pub(super) struct Map<'a> {
    filesystem: &'a Filesystem,
    inode: &'a Inode,
}

impl<'a> Map<'a> {
    pub fn new(filesystem: &'a Filesystem, inode: &'a Inode) -> Map<'a> {
        Map { filesystem, inode }
    }

    /// The run that begins with `block` of the file.
    pub fn at(&self, block: u64) -> Result<Run> {
        let run = match self.inode.format {
            Format::Extents => self.extent(block)?,
            Format::Blocks => self.indirect(block)?,
            Format::Inline | Format::ShortLink => {
                let what = format!("inode {} has no blocks", self.inode.number);
                return Err(Fault::Damaged(what).into());
            }
        };
        Ok(run)
    }

    fn extent(&self, block: u64) -> Result<Run> {
        let sb = &self.filesystem.superblock;
        let mut node_block = ext4::IN_INODE;
        let mut raw = self.inode.root.to_vec();
        let mut end = 1 << 32;
        let mut above: Option<u16> = None;
        loop {
            let node = ext4::parse_node(sb, self.inode, node_block, &raw)?;
            if above.is_some_and(|above| node.depth + 1 != above) {
                let what = format!("inode {}: an extent node is misplaced", self.inode.number);
                return Err(Fault::Damaged(what).into());
            }
            match node.find(block, end) {
                Step::Run(run) => return Ok(run),
                Step::Down(next, until) => {
                    above = Some(node.depth);
                    (node_block, end) = (Some(next), until);
                    raw = self.filesystem.read_block(next)?;
                }
            }
        }
    }

    fn indirect(&self, block: u64) -> Result<Run> {
        let per_block = self.filesystem.superblock.block_size / 4;
        if block < DIRECT {
            return self.numbers(&self.inode.root[..48], block as usize);
        }
        let mut within = block - DIRECT;
        for depth in 1..=INDIRECTIONS {
            let span = per_block.pow(depth);
            if within >= span {
                within -= span;
                continue;
            }
            let at = 48 + 4 * (depth as usize - 1);
            let mut table = number(&self.inode.root, at / 4);
            for level in (0..depth).rev() {
                let below = per_block.pow(level);
                if table == 0 {
                    return Ok(Run {
                        start: None,
                        length: per_block * below - within,
                    });
                }
                let raw = self.filesystem.read_block(table)?;
                let index = (within / below) as usize;
                if level == 0 {
                    return self.numbers(&raw, index);
                }
                table = number(&raw, index);
                within %= below;
                if table == 0 {
                    return Ok(Run {
                        start: None,
                        length: below - within,
                    });
                }
            }
        }
        Ok(Run {
            start: None,
            length: u64::MAX >> 17, // beyond every file of this kind
        })
    }

    /// The run at one place of a list of numbers of blocks.
    fn numbers(&self, list: &[u8], index: usize) -> Result<Run> {
        let first = number(list, index);
        let step = u64::from(first != 0);
        let mut length = 1;
        while index + (length as usize) < list.len() / 4
            && number(list, index + length as usize) == first + step * length
        {
            length += 1;
        }
        if first + length > self.filesystem.superblock.blocks {
            let what = format!("inode {} points beyond the end", self.inode.number);
            return Err(Fault::Damaged(what).into());
        }
        Ok(Run {
            start: (first != 0).then_some(first),
            length,
        })
    }
}

fn number(list: &[u8], index: usize) -> u64 {
    let raw = list.get(index * 4..index * 4 + 4);
    // OK to unwrap: four bytes are four bytes; a place beyond the list is a hole.
    let raw: [u8; 4] = raw.and_then(|raw| raw.try_into().ok()).unwrap_or_default();
    u32::from_le_bytes(raw).into()
}

impl Filesystem {
    /// The content of a regular file, of a directory or of a long symbolic link, in order.
    pub fn content<'a>(&'a self, inode: &Inode) -> Result<FileContent<'a>> {
        if inode.is_encrypted {
            let what = format!("inode {} is encrypted by fscrypt", inode.number);
            return Err(Error::new(Kind::Unsupported, what)
                .hint("mount the image and unlock the directory with fscrypt"));
        }
        let inline = match inode.format {
            Format::Inline => {
                let mut bytes = inode.root.to_vec();
                bytes.extend(ext4::inline_data(inode)?);
                if inode.size > bytes.len() as u64 {
                    let what = format!("inode {} has less content than its size", inode.number);
                    return Err(Fault::Damaged(what).into());
                }
                bytes.truncate(inode.size as usize);
                Some(bytes)
            }
            Format::ShortLink => {
                Some(inode.root[..(inode.size as usize).min(inode.root.len())].to_vec())
            }
            Format::Extents | Format::Blocks => None,
        };
        Ok(FileContent {
            filesystem: self,
            inode: inode.clone(),
            inline,
            position: 0,
            run: None,
        })
    }

    /// All of a file that is no larger than `most` bytes.
    pub fn read_whole(&self, inode: &Inode, most: u64) -> Result<Vec<u8>> {
        if inode.size > most {
            let what = format!(
                "inode {} has {} bytes, more than {most}",
                inode.number, inode.size
            );
            return Err(Error::new(Kind::Corrupt, what));
        }
        let mut bytes = vec![0; inode.size as usize];
        let mut content = self.content(inode)?;
        let mut at = 0;
        loop {
            match content.next(&mut bytes[at..])? {
                Piece::Data(read) => at += read,
                Piece::Hole(hole) => at += hole as usize,
                Piece::End => return Ok(bytes),
            }
        }
    }

    /// Where a symbolic link leads.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>> {
        const PATH_MAX: u64 = 4096; // linux/limits.h
        let target = self.read_whole(inode, PATH_MAX)?;
        if target.is_empty() || target.contains(&0) {
            let what = format!("the symbolic link in inode {} leads nowhere", inode.number);
            return Err(Fault::Damaged(what).into());
        }
        Ok(target)
    }
}

/// The bytes of one file, in order.
pub struct FileContent<'a> {
    filesystem: &'a Filesystem,
    inode: Inode,
    inline: Option<Vec<u8>>,
    position: u64,
    /// Where the run at the position ends, in bytes of the file, and how far the volume's bytes
    /// are from the file's.
    run: Option<(u64, Option<u64>)>,
}

impl FileContent<'_> {
    /// Where the next piece begins.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Goes on reading from here. A position beyond the end reads nothing.
    pub fn seek(&mut self, position: u64) {
        self.position = position;
        self.run = None;
    }

    /// The run at the position: its end, and where on the volume the position is.
    fn run(&mut self) -> Result<(u64, Option<u64>)> {
        let size = self.filesystem.superblock.block_size;
        if let Some((end, start)) = self.run.filter(|(end, _)| self.position < *end) {
            return Ok((end, start));
        }
        let block = self.position / size;
        let run = Map::new(self.filesystem, &self.inode).at(block)?;
        let end = block.saturating_add(run.length).saturating_mul(size);
        let end = end.min(self.inode.size);
        let start = run.start.map(|start| start * size + self.position % size);
        self.run = Some((end, start));
        Ok((end, start))
    }
}

impl Content for FileContent<'_> {
    fn next(&mut self, buf: &mut [u8]) -> Result<Piece> {
        let attempt = |at: u64| format!("read at offset {at}");
        if self.position >= self.inode.size {
            return Ok(Piece::End);
        }
        if let Some(bytes) = &self.inline {
            let rest = bytes.get(self.position as usize..).unwrap_or_default();
            let length = rest.len().min(buf.len());
            buf[..length].copy_from_slice(&rest[..length]);
            self.position += length as u64;
            return Ok(Piece::Data(length));
        }
        let at = self.position;
        let (end, start) = self.run().attempt(|| attempt(at))?;
        let Some(start) = start else {
            self.position = end;
            return Ok(Piece::Hole(end - at));
        };
        let length = (end - at).min(buf.len() as u64) as usize;
        self.filesystem
            .read(&mut buf[..length], start)
            .attempt(|| attempt(at))?;
        self.position += length as u64;
        self.run = Some((end, Some(start + length as u64)));
        Ok(Piece::Data(length))
    }
}
