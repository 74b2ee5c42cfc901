//! What `find` looks for.

use super::Pattern;
use crate::restore::{FileKind, Metadata};

/// A bound for sizes, in bytes, as `find -size` has them: `+10M`, `-10M`, `10M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    AtLeast(u64),
    AtMost(u64),
    Exactly(u64),
}

/// All that is given has to hold.
#[derive(Clone, Debug, Default)]
pub struct Criteria {
    /// One of them, if there are any.
    pub names: Vec<Pattern>,
    /// Changed at this time or later, in seconds since 1970.
    pub newer: Option<i64>,
    /// Changed before it.
    pub older: Option<i64>,
    /// Of regular files.
    pub sizes: Vec<Size>,
    pub kinds: Vec<FileKind>,
}

impl Criteria {
    pub fn matches(&self, path: &[u8], metadata: &Metadata) -> bool {
        let time = metadata.modified.seconds;
        let named = || self.names.iter().any(|pattern| pattern.matches(path));
        let fits = |size: &Size| {
            let regular = metadata.kind == FileKind::Regular;
            regular
                && match *size {
                    Size::AtLeast(bytes) => metadata.size >= bytes,
                    Size::AtMost(bytes) => metadata.size <= bytes,
                    Size::Exactly(bytes) => metadata.size == bytes,
                }
        };
        (self.kinds.is_empty() || self.kinds.contains(&metadata.kind))
            && self.newer.is_none_or(|limit| time >= limit)
            && self.older.is_none_or(|limit| time < limit)
            && self.sizes.iter().all(fits)
            && (self.names.is_empty() || named())
    }
}
