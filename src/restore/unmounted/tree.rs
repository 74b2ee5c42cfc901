//! A whole tree of names in memory, read level by level so that over a link a level costs a few
//! round trips and not one for each directory. 64 bytes and its name for each file.

use std::collections::HashSet;

use super::{Filesystem, metadata};
use crate::error::{Error, Kind, Result};
use crate::ext4::Inode;
use crate::restore::descent::check_name;
use crate::restore::source::{FileKind, Metadata, Time};

/// Directories read at once.
const BATCH: usize = 512;
/// Deeper trees are not walked. No path reaches so far (`PATH_MAX` is 4096 bytes).
const DEPTH_MAX: u32 = 4096;

/// Names kept: two GiB of memory with the names themselves. An image that holds more of them was made to.
const NAMES_MAX: usize = 20_000_000;

/// What could not be read, by its path from the root of the tree.
#[derive(Debug)]
pub struct Trouble {
    pub node: Node,
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

/// A name and its [`Metadata`], side by side so that nothing is lost between them.
#[derive(Default)]
struct Stored {
    name_at: u64,
    size: u64,
    seconds: i64,
    nanoseconds: u32,
    uid: u32,
    gid: u32,
    device_minor: u32,
    parent: u32,
    first_child: u32,
    children_end: u32,
    inode: u32,
    device_major: u16,
    mode: u16,
    /// None: the inode could not be read.
    links: u16,
    name_length: u8,
    kind: Option<FileKind>,
}

/// There are millions of them.
const _: () = assert!(size_of::<Stored>() == 64);

impl Tree {
    /// Reads everything below `root`, or with `depth` only so many levels of directories. A
    /// directory that cannot be read is among the troubles, and so is a file whose inode cannot, and
    /// a directory with a name that none can have; such a name is left out.
    pub fn load(filesystem: &Filesystem, root: u32, depth: Option<u32>) -> Result<Tree> {
        let top = filesystem.inode(root)?;
        let mut tree = Tree {
            nodes: Vec::new(),
            names: Vec::new(),
            troubles: Vec::new(),
        };
        tree.push(0, b"", root, None);
        tree.nodes[0].fill(&top)?;
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
                    let mut refused: Option<Error> = None;
                    for entry in entries {
                        if let Err(error) = check_name(&entry.name) {
                            refused.get_or_insert(error);
                            continue;
                        }
                        // OK to unwrap: numbers of inodes have 32 bits.
                        let number = u32::try_from(entry.inode).unwrap_or(0);
                        self.push(node, &entry.name, number, entry.kind);
                    }
                    let end = self.nodes.len() as u32;
                    let stored = &mut self.nodes[node as usize];
                    (stored.first_child, stored.children_end) = (start, end);
                    if let Some(error) = refused {
                        self.trouble(node, error); // the first of them
                    }
                }
                Err(error) => self.trouble(node, error),
            }
        }
        let new: Vec<u32> = self.nodes[first..].iter().map(|node| node.inode).collect();
        filesystem.fetch_inodes(&new);
        for node in first..self.nodes.len() {
            let number = self.nodes[node].inode;
            let inode = filesystem.inode(number);
            match inode.and_then(|inode| self.nodes[node].fill(&inode)) {
                Ok(()) => {
                    if !self.is_directory(Node(node as u32)) {
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
            name_at: at,
            name_length: name.len() as u8, // 255 at most, in the format
            parent,
            inode,
            kind,
            ..Stored::default()
        });
    }

    fn trouble(&mut self, node: u32, error: Error) {
        let node = Node(node);
        let path = self.path(node);
        self.troubles.push(Trouble { node, path, error });
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
        self.name_of(&self.nodes[node.0 as usize])
    }

    fn name_of(&self, stored: &Stored) -> &[u8] {
        &self.names[stored.name_at as usize..][..stored.name_length.into()]
    }

    pub fn parent(&self, node: Node) -> Option<Node> {
        (node.0 != 0).then(|| Node(self.nodes[node.0 as usize].parent))
    }

    /// In the order of their names.
    pub fn children(&self, node: Node) -> impl DoubleEndedIterator<Item = Node> + use<> {
        let stored = &self.nodes[node.0 as usize];
        (stored.first_child..stored.children_end).map(Node)
    }

    pub fn child(&self, node: Node, name: &[u8]) -> Option<Node> {
        let stored = &self.nodes[node.0 as usize];
        let (start, end) = (stored.first_child, stored.children_end);
        let all = &self.nodes[start as usize..end as usize];
        let found = all.binary_search_by(|child| self.name_of(child).cmp(name));
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
        (stored.links > 0).then_some(Metadata {
            kind: stored.kind?,
            mode: u32::from(stored.mode) & 0o7777,
            uid: stored.uid,
            gid: stored.gid,
            size: stored.size,
            modified: Time {
                seconds: stored.seconds,
                nanoseconds: stored.nanoseconds,
            },
            accessed: None,
            device: (stored.device_major.into(), stored.device_minor),
            links: stored.links.into(),
            inode: stored.inode.into(),
        })
    }

    pub fn is_directory(&self, node: Node) -> bool {
        self.nodes[node.0 as usize].kind == Some(FileKind::Directory)
    }

    /// The same, or nobody knows what it is.
    pub fn may_be_directory(&self, node: Node) -> bool {
        let kind = self.nodes[node.0 as usize].kind;
        matches!(kind, None | Some(FileKind::Directory))
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

impl Stored {
    /// Notes what an inode says of its file.
    fn fill(&mut self, inode: &Inode) -> Result<()> {
        let all = metadata(inode)?;
        *self = Stored {
            size: all.size,
            seconds: all.modified.seconds,
            nanoseconds: all.modified.nanoseconds,
            uid: all.uid,
            gid: all.gid,
            device_major: all.device.0 as u16, // majors have 12 bits
            device_minor: all.device.1,
            mode: all.mode as u16,
            links: all.links as u16, // as many as the format has
            kind: Some(all.kind),
            ..*self
        };
        Ok(())
    }
}
