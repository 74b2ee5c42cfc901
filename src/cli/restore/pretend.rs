//! A restore that is only talked about.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::job::Job;
use crate::browse::Selection;
use crate::cli::look::printable;
use crate::restore::{FileKind, Node, Overwrite, Tree};
use crate::ui::say;

impl Job<'_> {
    /// Says what would happen to each file.
    pub(super) fn pretend(&mut self, tree: &Tree, selection: &Selection, top: Node, from: &[u8]) {
        let name = from.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let name = (!matches!(name, b"" | b"." | b"..")).then(|| OsStr::from_bytes(name));
        let dest = &self.args.destination;
        let base = match name {
            Some(name) if dest.is_dir() => dest.join(name),
            _ => dest.clone(),
        };
        let skipped = tree.path(top).len();
        let mut stack = vec![top];
        while let Some(node) = stack.pop() {
            if !selection.wants(node) {
                continue;
            }
            stack.extend(tree.children(node).rev());
            let path = tree.path(node);
            let below = path.get(skipped..).unwrap_or_default();
            let below = below.strip_prefix(b"/").unwrap_or(below);
            let to = match below.is_empty() {
                true => base.clone(),
                false => base.join(OsStr::from_bytes(below)),
            };
            if tree.is_directory(node) && selection.is_in_doubt(node) {
                self.sum.unreadable += 1;
                say!("unreadable {}/", printable(to.as_os_str().as_bytes()));
                continue;
            }
            self.pretend_one(tree, node, &to);
        }
    }

    fn pretend_one(&mut self, tree: &Tree, node: Node, to: &Path) {
        let shown = printable(to.as_os_str().as_bytes());
        let Some(metadata) = tree.metadata(node) else {
            self.sum.unreadable += 1;
            say!("unreadable {shown}");
            return;
        };
        let existing = to.symlink_metadata().ok();
        if metadata.kind == FileKind::Directory {
            if existing.is_none() {
                say!("new        {shown}/");
            }
            self.sum.total.directories += 1;
            return;
        }
        let is_same = |found: &std::fs::Metadata| {
            use std::os::unix::fs::MetadataExt;
            found.is_file()
                && metadata.kind == FileKind::Regular
                && found.len() == metadata.size
                && found.mtime() == metadata.modified.seconds
                && found.mtime_nsec() == i64::from(metadata.modified.nanoseconds)
        };
        let word = match (&existing, self.args.overwrite()) {
            (None, _) => "new",
            (Some(_), Overwrite::Never) => "keep",
            (Some(found), Overwrite::IfChanged) if is_same(found) => "unchanged",
            (Some(_), _) => "replace",
        };
        if matches!(word, "new" | "replace") {
            self.sum.total.files += 1;
            if metadata.kind == FileKind::Regular {
                let bytes = &mut self.sum.total.bytes;
                *bytes = bytes.saturating_add(metadata.size);
            }
        }
        say!("{word:<10} {shown}");
    }
}
