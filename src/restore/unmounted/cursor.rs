//! A [`Source`] over a directory of a filesystem that nobody has mounted.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Ahead, Filesystem, metadata};
use crate::error::{Attempt, Error, Kind, Result};
use crate::ext4::Inode;
use crate::restore::descent::show;
use crate::restore::source::{Attribute, Content, Entry, FileKind, HERE, Metadata, Source};

/// A tree in an unmounted filesystem, from one of its directories down.
pub struct UnmountedTree {
    filesystem: Arc<Filesystem>,
    root: u32,
    way: Vec<Level>,
    /// What was asked about last, and likely is next.
    last: Option<Inode>,
    ahead: Option<Ahead>,
}

struct Level {
    directory: u32,
    /// Its names, once somebody has listed them.
    names: Option<HashMap<Vec<u8>, u32>>,
    /// Else the one that was asked for last.
    asked: Option<(Vec<u8>, u32)>,
}

impl Level {
    fn at(directory: u32) -> Level {
        Level {
            directory,
            names: None,
            asked: None,
        }
    }
}

impl UnmountedTree {
    /// The directory `root` becomes the root of the tree: nothing above it or beside it can be
    /// reached.
    pub fn new(filesystem: Arc<Filesystem>, root: u32) -> UnmountedTree {
        UnmountedTree {
            filesystem,
            root,
            way: vec![Level::at(root)],
            last: None,
            ahead: None,
        }
    }

    /// What is used next is fetched by it from now on.
    pub fn with_ahead(self, ahead: Ahead) -> UnmountedTree {
        UnmountedTree {
            ahead: Some(ahead),
            ..self
        }
    }

    fn here(&mut self) -> &mut Level {
        if self.way.is_empty() {
            self.way.push(Level::at(self.root));
        }
        let last = self.way.len() - 1;
        &mut self.way[last]
    }

    fn number(&mut self, name: &[u8]) -> Result<u32> {
        let here = self.here();
        if let Some(names) = &here.names {
            let number = names.get(name).copied();
            return number
                .ok_or_else(|| Error::new(Kind::NotFound, format!("there is no {}", show(name))));
        }
        if let Some((_, number)) = here.asked.as_ref().filter(|(asked, _)| asked == name) {
            return Ok(*number);
        }
        // Who asks for one name may want no other: to list means to fetch what all of them are.
        let directory = here.directory;
        let directory = self.filesystem.inode(directory)?;
        let number = self.filesystem.lookup(&directory, name)?;
        self.here().asked = Some((name.to_vec(), number));
        Ok(number)
    }

    fn inode(&mut self, name: &[u8]) -> Result<Inode> {
        let number = match name {
            HERE => self.here().directory,
            name => self.number(name)?,
        };
        if let Some(inode) = self.last.as_ref().filter(|inode| inode.number == number) {
            return Ok(inode.clone());
        }
        if let Some(ahead) = &self.ahead {
            ahead.await_inode(number)?;
        }
        let inode = self.filesystem.inode(number)?;
        self.last = Some(inode.clone());
        Ok(inode)
    }
}

impl Source for UnmountedTree {
    fn go(&mut self, path: &[u8]) -> Result<()> {
        let found = self.filesystem.resolve(self.root, path)?;
        if !self.filesystem.inode(found)?.is_directory() {
            let what = format!("{} is not a directory", show(path));
            return Err(Error::new(Kind::NotFound, what));
        }
        self.way = vec![Level::at(found)];
        Ok(())
    }

    fn enter(&mut self, name: &[u8]) -> Result<()> {
        let inode = self.inode(name)?;
        if !inode.is_directory() {
            let what = format!("{} is not a directory", show(name));
            return Err(Error::new(Kind::Corrupt, what));
        }
        self.way.push(Level::at(inode.number));
        Ok(())
    }

    fn leave(&mut self) -> Result<()> {
        match self.way.len() {
            0 | 1 => Err(Error::new(Kind::Usage, "leave the topmost directory")),
            _ => {
                self.way.pop();
                Ok(())
            }
        }
    }

    fn list(&mut self) -> Result<Vec<Entry>> {
        let inode = self.inode(HERE)?;
        if let Some(ahead) = &self.ahead {
            ahead.await_names(&inode)?;
        }
        let entries = self
            .filesystem
            .list(&inode)
            .attempt(|| "list a directory")?;
        let mut names = HashMap::with_capacity(entries.len());
        for entry in &entries {
            // OK to unwrap: numbers of inodes have 32 bits.
            let number = u32::try_from(entry.inode).unwrap_or(0);
            names.entry(entry.name.clone()).or_insert(number);
        }
        if self.ahead.is_none() {
            let numbers: Vec<u32> = names.values().copied().collect();
            self.filesystem.fetch_inodes(&numbers);
        }
        self.here().names = Some(names);
        Ok(entries)
    }

    fn metadata(&mut self, name: &[u8]) -> Result<Metadata> {
        let inode = self.inode(name);
        inode
            .and_then(|inode| metadata(&inode))
            .attempt(|| format!("examine {}", show(name)))
    }

    fn read_link(&mut self, name: &[u8]) -> Result<Vec<u8>> {
        let inode = self.inode(name)?;
        self.filesystem
            .read_link(&inode)
            .attempt(|| format!("read the symbolic link {}", show(name)))
    }

    fn attributes(&mut self, name: &[u8]) -> Result<Vec<Attribute>> {
        let inode = self.inode(name)?;
        self.filesystem
            .attributes(&inode)
            .attempt(|| format!("read the extended attributes of {}", show(name)))
    }

    fn open(&mut self, name: &[u8]) -> Result<Box<dyn Content + '_>> {
        let inode = self.inode(name)?;
        if metadata(&inode)?.kind != FileKind::Regular {
            let what = format!("{} is no regular file", show(name));
            return Err(Error::new(Kind::Corrupt, what));
        }
        let content = self.filesystem.content(&inode)?;
        match &self.ahead {
            Some(ahead) => Ok(Box::new(ahead.follow(&inode, content))),
            None => Ok(Box::new(content)),
        }
    }
}
