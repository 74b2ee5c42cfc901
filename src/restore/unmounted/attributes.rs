//! Extended attributes of a file, from wherever they are.

use super::Filesystem;
use crate::error::{Attempt, Result};
use crate::ext4::{self, Fault, Inode, Value};
use crate::restore::source::Attribute;

impl Filesystem {
    /// All of them, with ACLs as Linux passes them.
    pub fn attributes(&self, inode: &Inode) -> Result<Vec<Attribute>> {
        let attempt = || "read its extended attributes";
        let mut found = ext4::inode_attributes(inode)?;
        if inode.attribute_block != 0 {
            let raw = self.read_block(inode.attribute_block).attempt(attempt)?;
            found.extend(ext4::block_attributes(&self.superblock, inode, &raw)?);
        }
        let whole = found.into_iter().map(|attribute| {
            let value = match attribute.value {
                Value::Here(value) => value,
                Value::Inode(number, size) => self.value(number, size).attempt(attempt)?,
            };
            Ok(Attribute {
                name: attribute.name,
                value,
            })
        });
        whole.collect()
    }

    fn value(&self, number: u32, size: u32) -> Result<Vec<u8>> {
        let inode = self.inode(number)?;
        if !inode.is_attribute || inode.size != u64::from(size) {
            let what = format!("inode {number} does not hold the value of an attribute");
            return Err(Fault::Damaged(what).into());
        }
        self.read_whole(&inode, size.into())
    }
}
