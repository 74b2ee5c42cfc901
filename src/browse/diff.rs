//! What is different between two trees.

use crate::error::Result;
use crate::restore::{FileKind, Filesystem, Metadata, Node, Tree};

/// How a path differs. Where it is in both, both sides are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Added(Metadata),
    Removed(Metadata),
    /// Another type of file.
    Replaced(Metadata, Metadata),
    /// Other content: the size or the time of the last change differ, or where a link leads.
    Content(Metadata, Metadata),
    /// Only mode, owner or device differ.
    Attributes(Metadata, Metadata),
}

/// Tells of each difference between two trees of one filesystem, in the order of the paths. What is
/// in a directory that is only in one of them is told too. Names whose inodes cannot be read are
/// left out: they are among the troubles of their tree.
pub fn diff(
    filesystem: &Filesystem,
    old: &Tree,
    new: &Tree,
    tell: &mut dyn FnMut(&[u8], Change) -> Result<()>,
) -> Result<()> {
    let mut path = Vec::new();
    // What is to be compared, the next last, with the length of the path to it.
    let mut stack = vec![(Some(old.root()), Some(new.root()), 0)];
    while let Some((before, after, length)) = stack.pop() {
        path.truncate(length);
        let name = match (before, after) {
            (Some(node), _) => old.name(node),
            (None, Some(node)) => new.name(node),
            (None, None) => continue,
        };
        if !path.is_empty() && !name.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        let metadata = (
            before.and_then(|node| old.metadata(node)),
            after.and_then(|node| new.metadata(node)),
        );
        let change = match metadata {
            (None, Some(new)) if before.is_none() => Some(Change::Added(new)),
            (Some(old), None) if after.is_none() => Some(Change::Removed(old)),
            (Some(old), Some(new)) => compare(filesystem, old, new)?,
            _ => None,
        };
        if let Some(change) = change {
            tell(&path, change)?;
        }
        push_children(old, before, new, after, path.len(), &mut stack);
    }
    Ok(())
}

type Pair = (Option<Node>, Option<Node>, usize);

/// Both lists are in order.
fn push_children(
    old: &Tree,
    before: Option<Node>,
    new: &Tree,
    after: Option<Node>,
    length: usize,
    stack: &mut Vec<Pair>,
) {
    let mut olds = before
        .into_iter()
        .flat_map(|n| old.children(n))
        .rev()
        .peekable();
    let mut news = after
        .into_iter()
        .flat_map(|n| new.children(n))
        .rev()
        .peekable();
    loop {
        let order = match (olds.peek(), news.peek()) {
            (None, None) => return,
            (Some(_), None) => std::cmp::Ordering::Greater,
            (None, Some(_)) => std::cmp::Ordering::Less,
            (Some(a), Some(b)) => old.name(*a).cmp(new.name(*b)),
        };
        let a = if order.is_ge() { olds.next() } else { None };
        let b = if order.is_le() { news.next() } else { None };
        stack.push((a, b, length));
    }
}

fn compare(filesystem: &Filesystem, old: Metadata, new: Metadata) -> Result<Option<Change>> {
    if old.inode == new.inode {
        return Ok(None); // one file, linked into both snapshots
    }
    Ok(if old.kind != new.kind {
        Some(Change::Replaced(old, new))
    } else if !has_same_content(filesystem, &old, &new)? {
        Some(Change::Content(old, new))
    } else if !has_same_attributes(&old, &new) {
        Some(Change::Attributes(old, new))
    } else {
        None
    })
}

/// Whether two names of two snapshots are the same version of a file.
pub fn is_same(filesystem: &Filesystem, old: &Metadata, new: &Metadata) -> Result<bool> {
    Ok(old.inode == new.inode && old.kind != FileKind::Directory
        || old.kind == new.kind
            && has_same_attributes(old, new)
            && has_same_content(filesystem, old, new)?
            && (old.kind != FileKind::Directory || old.modified == new.modified))
}

/// As rsync judges it: by size and time.
fn has_same_content(filesystem: &Filesystem, old: &Metadata, new: &Metadata) -> Result<bool> {
    Ok(match old.kind {
        FileKind::Regular => old.size == new.size && old.modified == new.modified,
        FileKind::Symlink => {
            let target = |of: &Metadata| {
                // OK to unwrap: numbers of inodes have 32 bits.
                let inode = filesystem.inode(u32::try_from(of.inode).unwrap_or(0))?;
                filesystem.read_link(&inode)
            };
            old.size == new.size && target(old)? == target(new)?
        }
        FileKind::CharDevice | FileKind::BlockDevice => old.device == new.device,
        FileKind::Directory | FileKind::Fifo | FileKind::Socket => true,
    })
}

fn has_same_attributes(old: &Metadata, new: &Metadata) -> bool {
    (old.mode, old.uid, old.gid) == (new.mode, new.uid, new.gid)
}
