//! Where the first name of every file with several names was restored to.
//!
//! Directories are a tree of their own here, so that one costs its name and not its path.

use std::collections::HashMap;

use super::descent::Identity;

/// A directory, by the order in which it was entered; zero is the one where all begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(usize);

/// What was restored so far of one snapshot into one directory, so that names of one file become
/// names of one file, also over several calls of [`copy_linking`](super::copy_linking).
#[derive(Default)]
pub struct HardLinks {
    /// The directory where all begins.
    top: Option<Identity>,
    /// What each is in, and its name there.
    directories: Vec<(Place, Box<[u8]>)>,
    /// By inode in the source.
    files: HashMap<u64, File>,
}

struct File {
    directory: Place,
    name: Box<[u8]>,
    /// Its inode where it was restored: a later path may put something else under the name.
    made: u64,
}

/// Where the first name of a file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct First<'a> {
    /// The names of the directories from the top down.
    pub way: Vec<&'a [u8]>,
    /// In the last of them.
    pub name: &'a [u8],
    /// The inode that was made there.
    pub made: u64,
}

impl HardLinks {
    pub(super) const TOP: Place = Place(0);

    /// What was restored into another directory is forgotten.
    pub(super) fn begin_in(&mut self, top: Identity) {
        if self.top != Some(top) {
            *self = HardLinks {
                top: Some(top),
                ..HardLinks::default()
            };
        }
    }

    pub(super) fn add_directory(&mut self, above: Place, name: &[u8]) -> Place {
        self.directories.push((above, name.into()));
        Place(self.directories.len())
    }

    pub(super) fn add_file(&mut self, inode: u64, directory: Place, name: &[u8], made: u64) {
        let file = File {
            directory,
            name: name.into(),
            made,
        };
        self.files.insert(inode, file);
    }

    pub(super) fn first(&self, inode: u64) -> Option<First<'_>> {
        let file = self.files.get(&inode)?;
        let mut place = file.directory;
        let mut names = Vec::new();
        while let Some(index) = place.0.checked_sub(1) {
            let (above, name) = self.directories.get(index)?;
            names.push(&**name);
            place = *above;
        }
        names.reverse();
        Some(First {
            way: names,
            name: &file.name,
            made: file.made,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_by_its_way_from_the_top() {
        let mut links = HardLinks::default();
        let home = links.add_directory(HardLinks::TOP, b"home");
        let user = links.add_directory(home, b"user");
        links.add_directory(home, b"other");
        links.add_file(7, user, b"file", 70);
        links.add_file(8, HardLinks::TOP, b"top", 80);
        let at = |way: &[&'static [u8]], name, made| {
            let way = way.to_vec();
            Some(First { way, name, made })
        };
        assert_eq!(links.first(7), at(&[b"home", b"user"], b"file", 70));
        assert_eq!(links.first(8), at(&[], b"top", 80));
        assert_eq!(links.first(9), None);
        let (device, inode) = (1, 2);
        links.begin_in(Identity { device, inode });
        assert_eq!(links.first(7), None, "it was restored to another place");
    }
}
