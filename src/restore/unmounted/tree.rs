//! A whole tree of names in memory, read level by level so that over a link a level costs a few
//! round trips and not one for each directory. About 80 bytes and its name for each file.

use std::collections::HashSet;

use super::{Filesystem, metadata};
use crate::error::{Error, Kind, Result};
use crate::ext4::Inode;
use crate::restore::source::{FileKind, Metadata, Time};

/// Directories read at once.
const BATCH: usize = 512;
/// Deeper trees are not walked. No path reaches so far (`PATH_MAX` is 4096 bytes).
const DEPTH_MAX: u32 = 4096;

/// Names kept: two GiB of memory. An image that holds more of them was made to.
const NAMES_MAX: usize = 20_000_000;

/// What could not be read, by its path from the root of the tree.
#[derive(Debug)]
pub struct Trouble {
    pub path: Vec<u8>,
    pub error: Error,
}

/// All names below a directory, in the order of their bytes.
pub struct Tree {
    nodes: Vec<Stored>,
    names: Vec<u8>,
    pub troubles: Vec<Trouble>,
}

/// One name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node(u32);

impl Node {
    /// Below [`Tree::len`], another one for each name.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

struct Stored {
    name: (u64, u8),
    parent: u32,
    children: (u32, u32),
    inode: u32,
    facts: Facts,
}

/// [`Metadata`] in 40 bytes.
#[derive(Clone, Copy)]
struct Facts {
    size: u64,
    seconds: i64,
    nanoseconds: u32,
    uid: u32,
    gid: u32,
    device: (u16, u32),
    mode: u16,
    links: u16,
    kind: Option<FileKind>,
}

impl Tree {
    /// Reads everything below `root`, or with `depth` only so many levels of directories. A
    /// directory that cannot be read is among the troubles, and so is a file whose inode cannot.
    pub fn load(filesystem: &Filesystem, root: u32, depth: Option<u32>) -> Result<Tree> {
        let top = filesystem.inode(root)?;
        let mut tree = Tree {
            nodes: Vec::new(),
            names: Vec::new(),
            troubles: Vec::new(),
        };
        tree.push(0, b"", root, None);
        tree.nodes[0].facts = facts(&top)?;
        let mut seen = HashSet::from([root]);
        let mut level = vec![0];
        let deepest = depth.unwrap_or(DEPTH_MAX);
        let mut at = 0;
        while !level.is_empty() && at < deepest {
            at += 1;
            let mut next = Vec::new();
            for batch in level.chunks(BATCH) {
                tree.read(filesystem, batch, &mut seen, &mut next);
            }
            level = next;
        }
        if depth.is_none()
            && let Some(node) = level.first()
        {
            let what = format!("directories nest more than {DEPTH_MAX} deep");
            tree.trouble(*node, Error::new(Kind::Unsupported, what));
        }
        Ok(tree)
    }

    /// Lists some directories, and reads the inodes of what is in them.
    fn read(
        &mut self,
        filesystem: &Filesystem,
        directories: &[u32],
        seen: &mut HashSet<u32>,
        next: &mut Vec<u32>,
    ) {
        let number = |tree: &Tree, node: u32| tree.nodes[node as usize].inode;
        let mut inodes = Vec::new();
        for node in directories {
            match filesystem.inode(number(self, *node)) {
                Ok(inode) if inode.is_directory() => inodes.push((*node, inode)),
                Ok(_) => {}
                Err(error) => self.trouble(*node, error),
            }
        }
        filesystem.fetch_content(inodes.iter().map(|(_, inode)| inode));
        let first = self.nodes.len();
        for (node, inode) in inodes {
            if self.nodes.len() > NAMES_MAX {
                let what = format!("more than {NAMES_MAX} names");
                self.trouble(node, Error::new(Kind::Unsupported, what));
                continue;
            }
            match filesystem.list(&inode) {
                Ok(mut entries) => {
                    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
                    let start = self.nodes.len() as u32;
                    for entry in entries {
                        // OK to unwrap: numbers of inodes have 32 bits.
                        let number = u32::try_from(entry.inode).unwrap_or(0);
                        self.push(node, &entry.name, number, entry.kind);
                    }
                    self.nodes[node as usize].children = (start, self.nodes.len() as u32);
                }
                Err(error) => self.trouble(node, error),
            }
        }
        let new: Vec<u32> = self.nodes[first..].iter().map(|node| node.inode).collect();
        filesystem.fetch_inodes(&new);
        for node in first..self.nodes.len() {
            let number = self.nodes[node].inode;
            let read = filesystem.inode(number).and_then(|inode| facts(&inode));
            match read {
                Ok(facts) => {
                    self.nodes[node].facts = facts;
                    if facts.kind != Some(FileKind::Directory) {
                        continue;
                    }
                    if seen.insert(number) {
                        next.push(node as u32);
                    } else {
                        let what = format!("directory inode {number} has a second name");
                        self.trouble(node as u32, Error::new(Kind::Corrupt, what));
                    }
                }
                Err(error) => self.trouble(node as u32, error),
            }
        }
    }

    fn push(&mut self, parent: u32, name: &[u8], inode: u32, kind: Option<FileKind>) {
        let at = self.names.len() as u64;
        self.names.extend_from_slice(name);
        self.nodes.push(Stored {
            name: (at, name.len() as u8), // 255 at most, in the format
            parent,
            children: (0, 0),
            inode,
            facts: Facts {
                size: 0,
                seconds: 0,
                nanoseconds: 0,
                uid: 0,
                gid: 0,
                device: (0, 0),
                mode: 0,
                links: 0,
                kind,
            },
        });
    }

    fn trouble(&mut self, node: u32, error: Error) {
        let path = self.path(Node(node));
        self.troubles.push(Trouble { path, error });
    }

    pub fn root(&self) -> Node {
        Node(0)
    }

    /// How many names, the root among them.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        false
    }

    pub fn name(&self, node: Node) -> &[u8] {
        let (at, length) = self.nodes[node.0 as usize].name;
        &self.names[at as usize..][..length.into()]
    }

    pub fn parent(&self, node: Node) -> Option<Node> {
        (node.0 != 0).then(|| Node(self.nodes[node.0 as usize].parent))
    }

    /// In the order of their names.
    pub fn children(&self, node: Node) -> impl DoubleEndedIterator<Item = Node> + use<> {
        let (start, end) = self.nodes[node.0 as usize].children;
        (start..end).map(Node)
    }

    pub fn child(&self, node: Node, name: &[u8]) -> Option<Node> {
        let (start, end) = self.nodes[node.0 as usize].children;
        let all = &self.nodes[start as usize..end as usize];
        let name_of =
            |stored: &Stored| &self.names[stored.name.0 as usize..][..stored.name.1.into()];
        let found = all.binary_search_by(|child| name_of(child).cmp(name));
        found.ok().map(|i| Node(start + i as u32))
    }

    pub fn inode(&self, node: Node) -> u32 {
        self.nodes[node.0 as usize].inode
    }

    /// The path from the root, which has none.
    pub fn path(&self, node: Node) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = node;
        while at.0 != 0 {
            names.push(self.name(at));
            at = Node(self.nodes[at.0 as usize].parent);
        }
        names.reverse();
        names.join(&b"/"[..])
    }

    /// What its inode says; nothing where it could not be read. Access times are left out.
    pub fn metadata(&self, node: Node) -> Option<Metadata> {
        let stored = &self.nodes[node.0 as usize];
        let facts = &stored.facts;
        (facts.links > 0).then_some(Metadata {
            kind: facts.kind?,
            mode: u32::from(facts.mode) & 0o7777,
            uid: facts.uid,
            gid: facts.gid,
            size: facts.size,
            modified: Time {
                seconds: facts.seconds,
                nanoseconds: facts.nanoseconds,
            },
            accessed: None,
            device: (facts.device.0.into(), facts.device.1),
            links: facts.links.into(),
            inode: stored.inode.into(),
        })
    }

    pub fn is_directory(&self, node: Node) -> bool {
        self.nodes[node.0 as usize].facts.kind == Some(FileKind::Directory)
    }

    /// All names, each directory before what is in it.
    pub fn walk(&self) -> impl Iterator<Item = Node> + use<'_> {
        let mut stack = vec![self.root()];
        std::iter::from_fn(move || {
            let node = stack.pop()?;
            stack.extend(self.children(node).rev());
            Some(node)
        })
    }
}

fn facts(inode: &Inode) -> Result<Facts> {
    let all = metadata(inode)?;
    Ok(Facts {
        size: all.size,
        seconds: all.modified.seconds,
        nanoseconds: all.modified.nanoseconds,
        uid: all.uid,
        gid: all.gid,
        device: (all.device.0 as u16, all.device.1), // majors have 12 bits
        mode: all.mode as u16,
        links: all.links as u16, // as many as the format has
        kind: Some(all.kind),
    })
}
