//! Patterns of names as the shell has them, and what of a tree they select.

use std::collections::HashSet;

use crate::restore::{Node, Tree};

/// `*`, `?`, `[a-z]`, `[!a]` and `\`, on bytes. One without a slash means a name, wherever it is; one
/// with a slash means a path from the top of the tree, in which only `**` goes past slashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: Vec<u8>,
    is_path: bool,
}

impl Pattern {
    pub fn new(text: &[u8]) -> Pattern {
        let end = text.iter().rposition(|byte| *byte != b'/');
        let text = end.map_or(&text[..0], |end| &text[..=end]);
        let start = usize::from(text.starts_with(b"/"));
        Pattern {
            is_path: text.contains(&b'/'),
            text: text[start..].to_vec(),
        }
    }

    /// `path` is counted from the top of the tree and begins with no slash.
    pub fn matches(&self, path: &[u8]) -> bool {
        let name = match self.is_path {
            true => path,
            false => path.rsplit(|byte| *byte == b'/').next().unwrap_or(path),
        };
        matches(&self.text, name)
    }
}

/// Goes back to the last star only, so that no pattern takes longer than length times length; a
/// `**` is gone back to when the star after it has been tried.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // Where to go on if what follows does not fit: after the star, and from which byte.
    let mut star: Option<(usize, usize)> = None;
    let mut double: Option<(usize, usize)> = None;
    loop {
        if pattern[p..].starts_with(b"**") {
            p += 2;
            (double, star) = (Some((p, n)), None);
            continue;
        }
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            star = Some((p, n));
            continue;
        }
        let step = match (pattern.get(p), name.get(n)) {
            (None, None) => return true,
            (Some(_), Some(byte)) => one(&pattern[p..], *byte),
            _ => None,
        };
        if let Some(used) = step {
            (p, n) = (p + used, n + 1);
            continue;
        }
        if let Some((after, from)) = star
            && name.get(from).is_some_and(|byte| *byte != b'/')
        {
            (p, n) = (after, from + 1);
            star = Some((after, from + 1));
        } else if let Some((after, from)) = double
            && from < name.len()
        {
            (p, n) = (after, from + 1);
            (double, star) = (Some((after, from + 1)), None);
        } else {
            return false;
        }
    }
}

/// How many bytes of the pattern match this byte, if they do.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern[0] {
        b'?' => (byte != b'/').then_some(1),
        b'\\' if pattern.len() > 1 => (pattern[1] == byte).then_some(2),
        b'[' => match set(pattern, byte) {
            Some((used, found)) => (found && byte != b'/').then_some(used),
            None => (byte == b'[').then_some(1), // it is never closed
        },
        literal => (literal == byte).then_some(1),
    }
}

/// The length of the set that the pattern begins with, and whether the byte is in it.
fn set(pattern: &[u8], byte: u8) -> Option<(usize, bool)> {
    let negated = matches!(pattern.get(1), Some(b'!' | b'^'));
    let first = 1 + usize::from(negated);
    let mut at = first;
    let mut found = false;
    loop {
        match *pattern.get(at)? {
            b']' if at > first => return Some((at + 1, found != negated)),
            low => {
                let range = (pattern.get(at + 1), pattern.get(at + 2));
                let high = match range {
                    (Some(b'-'), Some(high)) if *high != b']' => {
                        at += 2;
                        *high
                    }
                    _ => low,
                };
                found |= (low..=high).contains(&byte);
                at += 1;
            }
        }
    }
}

/// What of a tree is wanted.
pub struct Selection {
    /// One answer for each name.
    wanted: Vec<bool>,
    in_doubt: HashSet<usize>,
    /// Places in the list of those to include.
    unmatched: Vec<usize>,
}

impl Selection {
    /// Without `include` everything, else what matches one of them, and what is in a directory that
    /// does, and the directories on the way, also to one that could not be read; in both cases
    /// without what matches `exclude` and what is in that.
    pub fn new(tree: &Tree, include: &[Pattern], exclude: &[Pattern]) -> Selection {
        let mut wanted = vec![false; tree.len()];
        let mut matched = vec![false; include.len()];
        let unread = tree.troubles.iter().map(|trouble| trouble.node);
        let unread: HashSet<usize> = unread
            .filter(|node| tree.may_be_directory(*node))
            .map(Node::index)
            .collect();
        let mut in_doubt = HashSet::new();
        let mut path = Vec::new();
        // A name, the length of the path to it, and whether a directory above is included.
        let mut stack = vec![(tree.root(), 0, include.is_empty())];
        while let Some((node, length, inside)) = stack.pop() {
            path.truncate(length);
            if node != tree.root() {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(tree.name(node));
                if exclude.iter().any(|pattern| pattern.matches(&path)) {
                    continue;
                }
            }
            let mut inside = inside;
            for (pattern, matched) in include.iter().zip(&mut matched) {
                if (!inside || !*matched) && pattern.matches(&path) {
                    (inside, *matched) = (true, true);
                }
            }
            let is_unread = unread.contains(&node.index());
            if is_unread {
                in_doubt.insert(node.index());
            }
            if inside || is_unread {
                let mut on_the_way = Some(node);
                while let Some(node) = on_the_way.filter(|node| !wanted[node.index()]) {
                    wanted[node.index()] = true;
                    on_the_way = tree.parent(node);
                }
            }
            let here = path.len();
            stack.extend(tree.children(node).rev().map(|child| (child, here, inside)));
        }
        wanted[tree.root().index()] = true;
        let unmatched = (0..matched.len()).filter(|at| !matched[*at]).collect();
        Selection {
            wanted,
            in_doubt,
            unmatched,
        }
    }

    pub fn wants(&self, node: Node) -> bool {
        self.wanted.get(node.index()).copied().unwrap_or(false)
    }

    /// Whether something that is wanted may be missing below it, because it could not be read.
    pub fn is_in_doubt(&self, node: Node) -> bool {
        self.in_doubt.contains(&node.index())
    }

    /// Which of the patterns to include match nothing, by their places in the list.
    pub fn unmatched(&self) -> impl Iterator<Item = usize> + use<'_> {
        self.unmatched.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_the_shell() {
        for (pattern, path, expected) in [
            ("*.txt", "home/ann/a.txt", true),
            ("*.txt", "a.txt.gz", false),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxbyy", false),
            ("[a-c]?", "b1", true),
            ("[!a-c]?", "b1", false),
            ("[]x]", "]", true),
            ("[", "[", true),
            ("\\*", "*", true),
            ("\\*", "x", false),
            ("/home/*/.cache", "home/ann/.cache", true),
            ("/home/*/.cache", "home/ann/deep/.cache", false),
            ("/home/**/.cache", "home/ann/deep/.cache", true),
            ("home/**", "home/ann", true),
            ("**/x*z/y", "a/b/xz/q/xxz/y", true),
            ("target/", "a/target", true),
            ("", "a", false),
        ] {
            let pattern_ = Pattern::new(pattern.as_bytes());
            assert_eq!(
                pattern_.matches(path.as_bytes()),
                expected,
                "{pattern} {path}"
            );
        }
    }

    #[test]
    fn no_pattern_takes_for_ever() {
        let pattern = Pattern::new("*a".repeat(60).as_bytes());
        assert!(!pattern.matches(&[b'a'; 59]));
        let pattern = Pattern::new(&[b"/".to_vec(), b"**a*b".repeat(40)].concat());
        assert!(!pattern.matches(&[b'a'; 2000]));
    }
}
