//! Where the first name of every file with several names was restored to.
//!
//! Directories are a tree of their own here, so that one costs its name and not its path.

use std::collections::HashMap;

/// A directory, by the order in which it was entered; zero is the one where all begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(usize);

#[derive(Default)]
pub(super) struct HardLinks {
    /// What each is in, and its name there.
    directories: Vec<(Place, Box<[u8]>)>,
    /// By inode: the directory, and the name there.
    files: HashMap<u64, (Place, Box<[u8]>)>,
}

impl HardLinks {
    pub const TOP: Place = Place(0);

    pub fn add_directory(&mut self, above: Place, name: &[u8]) -> Place {
        self.directories.push((above, name.into()));
        Place(self.directories.len())
    }

    pub fn add_file(&mut self, inode: u64, directory: Place, name: &[u8]) {
        self.files.insert(inode, (directory, name.into()));
    }

    /// The names of the directories from the top down, and the name in the last of them.
    pub fn first(&self, inode: u64) -> Option<(Vec<&[u8]>, &[u8])> {
        let (mut place, name) = self.files.get(&inode).map(|(place, name)| (*place, name))?;
        let mut names = Vec::new();
        while let Some(index) = place.0.checked_sub(1) {
            let (above, name) = self.directories.get(index)?;
            names.push(&**name);
            place = *above;
        }
        names.reverse();
        Some((names, name))
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
        links.add_file(7, user, b"file");
        links.add_file(8, HardLinks::TOP, b"top");
        let way: Vec<&[u8]> = vec![b"home", b"user"];
        assert_eq!(links.first(7), Some((way, &b"file"[..])));
        assert_eq!(links.first(8), Some((Vec::new(), &b"top"[..])));
        assert_eq!(links.first(9), None);
    }
}
