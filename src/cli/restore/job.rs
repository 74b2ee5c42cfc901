//! One path of a restore without a mount: its tree is read, and what is wanted of it is copied.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{self, AtomicBool};

use super::Args;
use super::sum::Sum;
use crate::browse::{Pattern, Selection};
use crate::cli::look::{Look, What, joined, printable, tell_trouble};
use crate::error::{Attempt, Result};
use crate::restore::{
    self, Ahead, FileKind, HardLinks, LISTED_MAX, Node, Options, Plan, Tree, UnmountedTree,
};
use crate::snapshot::Id;
use crate::ui::{Terminal, tell};

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
        self.tell_unmatched(&tree, &selection);
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
                // Else it is among the troubles.
                parts.extend(tree.metadata(node).map(|_| node));
            } else if depth < self.args.strip {
                let wanted = tree.children(node).filter(|child| selection.wants(*child));
                stack.extend(wanted.rev().map(|child| (child, depth + 1)));
            }
        }
        let lost = self.tell_lost(&tree, &selection, own);
        if parts.is_empty() && lost == 0 {
            self.tell_nothing_left();
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

    /// What could not be read above the names that `--strip` leaves: nothing that is copied meets
    /// it. `own` is the depth of the tree's root. Says how much there was.
    fn tell_lost(&mut self, tree: &Tree, selection: &Selection, own: u32) -> u64 {
        let mut lost = 0;
        for trouble in &tree.troubles {
            let names = match trouble.path.is_empty() {
                true => 0,
                false => trouble.path.split(|byte| *byte == b'/').count(),
            };
            let depth = u64::from(own) + names as u64;
            let is_copied = match depth.cmp(&self.args.strip.into()) {
                Ordering::Less => false,
                Ordering::Equal => tree.metadata(trouble.node).is_some(),
                Ordering::Greater => true,
            };
            if is_copied || !selection.is_in_doubt(trouble.node) {
                continue;
            }
            if lost < LISTED_MAX as u64 {
                tell_trouble(&joined(&self.what.path, &trouble.path), &trouble.error);
            }
            lost += 1;
        }
        match self.args.dry_run {
            true => self.sum.unreadable += lost,
            false => self.sum.errors += lost,
        }
        lost
    }

    fn tell_nothing_left(&mut self) {
        let (path, names) = (printable(&self.what.path), self.args.strip);
        let wanted = match self.args.include.is_empty() && self.args.exclude.is_empty() {
            true => "",
            false => " that is wanted",
        };
        tell!("warning: {path} has no directory{wanted} {names} names deep");
        self.sum.missed += 1;
    }

    fn tell_unmatched(&mut self, tree: &Tree, selection: &Selection) {
        if !tree.is_directory(tree.root()) {
            return; // patterns choose of what is in a directory
        }
        for at in selection.unmatched() {
            let pattern = self.args.include.get(at).map(|text| text.as_bytes());
            let (path, pattern) = (&self.what.path, printable(pattern.unwrap_or_default()));
            tell!(
                "warning: nothing in {} matches --include {pattern}",
                printable(path)
            );
            self.sum.missed += 1;
        }
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
        self.begun.store(true, atomic::Ordering::Relaxed);
        let (mut from_here, links) = (source(), &mut *self.links);
        let outcome =
            restore::copy_linking(&mut from_here, &from, dest, options, links, self.terminal)?;
        drop(from_here);
        let landing = outcome.landing.clone();
        self.sum.add(outcome);
        if args.verify {
            let found = restore::verify(&mut source(), &from, &landing, options, self.terminal)?;
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
        let size = regular.map_or(0, |metadata| metadata.size);
        bytes = u64::saturating_add(bytes, size);
        stack.extend(tree.children(node));
    }
    (files, bytes)
}
