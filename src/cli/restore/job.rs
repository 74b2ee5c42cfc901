//! One path of a restore without a mount: its tree is read, and what is wanted of it is copied.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Args;
use super::sum::Sum;
use crate::browse::{Pattern, Selection};
use crate::cli::look::{Look, What, joined};
use crate::error::{Attempt, Result};
use crate::restore::{self, Ahead, FileKind, HardLinks, Node, Options, Plan, Tree, UnmountedTree};
use crate::snapshot::Id;
use crate::ui::Terminal;

/// Of each snapshot: the same inode in another one is another file.
pub(super) type Links = BTreeMap<Id, HardLinks>;

/// One path that is restored.
pub(super) struct Job<'a> {
    pub args: &'a Args,
    pub look: &'a Look,
    /// The snapshot's directory.
    pub root: u32,
    pub what: &'a What,
    pub links: &'a mut HardLinks,
    pub stop: &'a Arc<AtomicBool>,
    /// Set when copying begins.
    pub begun: &'a AtomicBool,
    pub terminal: &'a Terminal,
    pub sum: &'a mut Sum,
}

impl Job<'_> {
    pub fn run(&mut self) -> Result<()> {
        let patterns = |texts: &[OsString]| -> Vec<Pattern> {
            texts
                .iter()
                .map(|text| Pattern::new(text.as_bytes()))
                .collect()
        };
        let top = self
            .look
            .filesystem
            .resolve_itself(self.root, &self.what.path)?;
        let tree = Tree::load(&self.look.filesystem, top, None)?;
        let (include, exclude) = (patterns(&self.args.include), patterns(&self.args.exclude));
        let selection = Selection::new(&tree, &include, &exclude);
        if self.args.strip == 0 {
            let from = self.what.path.clone();
            return self.part(&tree, &selection, tree.root(), &from);
        }
        // As many names as the path has itself are left out from the first.
        let own = self.what.path.split(|byte| *byte == b'/');
        let own = u32::from(own.filter(|n| !matches!(*n, b"" | b"." | b"..")).count() > 0);
        let mut parts = Vec::new();
        let mut stack = vec![(tree.root(), own)];
        while let Some((node, depth)) = stack.pop() {
            if depth == self.args.strip && tree.is_directory(node) {
                parts.push(node);
            } else if depth < self.args.strip {
                let wanted = tree.children(node).filter(|child| selection.wants(*child));
                stack.extend(wanted.rev().map(|child| (child, depth + 1)));
            }
        }
        let dest = &self.args.destination;
        if parts.len() > 1 && !self.args.dry_run && !dest.exists() {
            // It is none of them.
            std::fs::create_dir(dest).attempt(|| format!("make {}", dest.display()))?;
        }
        for node in parts {
            let path = joined(&self.what.path, &tree.path(node));
            let inside = [&*path, b"/."].concat();
            self.part(&tree, &selection, node, &inside)?;
        }
        Ok(())
    }

    /// Restores `node` of the tree, which is `from` in the snapshot.
    fn part(&mut self, tree: &Tree, selection: &Selection, node: Node, from: &[u8]) -> Result<()> {
        let (args, filesystem) = (self.args, &self.look.filesystem);
        if args.dry_run {
            self.pretend(tree, selection, node, from);
            return Ok(());
        }
        let plan = Arc::new(Plan::of_copy(tree, node, |node| selection.wants(node)));
        let (files, bytes) = totals(tree, selection, node);
        let wants = |path: &[u8]| {
            let mut at = Some(node);
            for name in path.split(|byte| *byte == b'/') {
                at = at.and_then(|node| tree.child(node, name));
            }
            // What the tree could not hold meets its error in the copier, which tells it.
            at.is_none_or(|node| selection.wants(node))
        };
        let options = Options {
            overwrite: args.overwrite(),
            wants: Some(&wants),
            totals: Some((files, bytes)),
            stop: self.stop,
        };
        let from = PathBuf::from(OsString::from_vec(from.to_vec()));
        let source = || {
            let ahead = Ahead::start(filesystem, Arc::clone(&plan), Arc::clone(self.stop));
            UnmountedTree::new(Arc::clone(filesystem), self.root).with_ahead(ahead)
        };
        let dest = &args.destination;
        self.sum.has_begun = true;
        self.begun.store(true, Ordering::Relaxed);
        let (mut from_here, links) = (source(), &mut *self.links);
        let outcome =
            restore::copy_linking(&mut from_here, &from, dest, options, links, self.terminal)?;
        drop(from_here);
        self.sum.add(outcome);
        if args.verify {
            let found = restore::verify(&mut source(), &from, dest, options, self.terminal)?;
            self.sum.different += found.count();
        }
        Ok(())
    }
}

/// How many names that are no directories will be made, and the bytes that they show.
fn totals(tree: &Tree, selection: &Selection, top: Node) -> (u64, u64) {
    let (mut files, mut bytes) = (0, 0);
    let mut stack = vec![top];
    while let Some(node) = stack.pop() {
        if !selection.wants(node) {
            continue;
        }
        files += u64::from(!tree.is_directory(node));
        let regular = tree.metadata(node).filter(|m| m.kind == FileKind::Regular);
        bytes += regular.map_or(0, |metadata| metadata.size);
        stack.extend(tree.children(node));
    }
    (files, bytes)
}
