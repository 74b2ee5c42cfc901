//! Extended attributes, in the inode and in a block of their own; POSIX ACLs are two of them, in a
//! form of their own.

use super::checksum::{crc32c, crc32c_without};
use super::{Fault, Inode, Superblock, damaged, u16_at, u32_at};

const MAGIC: u32 = 0xEA02_0000;
const BLOCK_HEADER: usize = 32;
const ENTRY: usize = 16;
/// The largest value that Linux passes (`XATTR_SIZE_MAX`).
const VALUE_MAX: u32 = 65536;

const SYSTEM: u8 = 7;
const ACCESS_ACL: u8 = 2;
const DEFAULT_ACL: u8 = 3;

/// A value, or where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Here(Vec<u8>),
    /// The content of an inode, with its length in bytes.
    Inode(u32, u32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// With its namespace: `user.x`.
    pub name: Vec<u8>,
    pub value: Value,
}

/// What is in the inode itself.
pub fn inode_attributes(inode: &Inode) -> Result<Vec<Attribute>, Fault> {
    let found = raw_attributes(inode)?.into_iter();
    found
        .filter(|(index, name, _)| !is_inline_data(*index, name))
        .map(|(index, name, value)| named(inode, index, name, value))
        .collect()
}

/// The part of inline content that does not fit into the inode's root.
pub fn inline_data(inode: &Inode) -> Result<Vec<u8>, Fault> {
    let mut found = raw_attributes(inode)?.into_iter();
    match found.find(|(index, name, _)| is_inline_data(*index, name)) {
        Some((.., Value::Here(value))) => Ok(value),
        Some((.., Value::Inode(..))) => {
            damaged(format!("inode {}: inline data lie elsewhere", inode.number))
        }
        None => Ok(Vec::new()),
    }
}

/// What is in the block of attributes of an inode, which begins at byte `offset` of the volume.
pub fn block_attributes(
    sb: &Superblock,
    inode: &Inode,
    raw: &[u8],
) -> Result<Vec<Attribute>, Fault> {
    let wrong = |what: &str| {
        damaged(format!(
            "inode {}: its attribute block {what}",
            inode.number
        ))
    };
    if u32_at(raw, 0) != MAGIC || u32_at(raw, 8) != 1 {
        return wrong("is none");
    }
    if sb.checksums {
        let sum = crc32c(sb.seed, &inode.attribute_block.to_le_bytes());
        if crc32c_without(sum, raw, 0x10..0x14) != u32_at(raw, 0x10) {
            return wrong("has a wrong checksum");
        }
    }
    let found = entries(inode, raw, BLOCK_HEADER, 0)?.into_iter();
    found
        .map(|(index, name, value)| named(inode, index, name, value))
        .collect()
}

type Raw<'a> = (u8, &'a [u8], Value);

fn raw_attributes(inode: &Inode) -> Result<Vec<Raw<'_>>, Fault> {
    match u32_at(&inode.tail, 0) {
        // Values are counted from the first entry.
        MAGIC => entries(inode, &inode.tail, 4, 4),
        _ => Ok(Vec::new()),
    }
}

fn is_inline_data(index: u8, name: &[u8]) -> bool {
    index == SYSTEM && name == b"data"
}

fn entries<'a>(
    inode: &Inode,
    raw: &'a [u8],
    first: usize,
    origin: usize,
) -> Result<Vec<Raw<'a>>, Fault> {
    let wrong = |what: &str| damaged(format!("inode {}: an attribute {what}", inode.number));
    let mut found = Vec::new();
    let mut at = first;
    // Four zeros end the list, or the bytes do.
    while at + 4 <= raw.len() && u32_at(raw, at) != 0 {
        let end = at + ENTRY + raw.get(at).map_or(0, |length| usize::from(*length));
        if end > raw.len() {
            return wrong("reaches beyond its end");
        }
        let name = &raw[at + ENTRY..end];
        let (value_inode, size) = (u32_at(raw, at + 4), u32_at(raw, at + 8));
        if size > VALUE_MAX {
            return wrong("has a value that is too large");
        }
        let value = match value_inode {
            0 => {
                let start = origin + usize::from(u16_at(raw, at + 2));
                let bytes = raw.get(start..).and_then(|rest| rest.get(..size as usize));
                match bytes {
                    Some(bytes) => Value::Here(bytes.to_vec()),
                    None => return wrong("has its value beyond the end"),
                }
            }
            inode => Value::Inode(inode, size),
        };
        found.push((raw[at + 1], name, value));
        at = end.next_multiple_of(4);
    }
    Ok(found)
}

fn named(inode: &Inode, index: u8, name: &[u8], value: Value) -> Result<Attribute, Fault> {
    let (prefix, is_acl) = match index {
        0 => ("", false),
        1 => ("user.", false),
        ACCESS_ACL => ("system.posix_acl_access", true),
        DEFAULT_ACL => ("system.posix_acl_default", true),
        4 => ("trusted.", false),
        6 => ("security.", false),
        SYSTEM => ("system.", false),
        8 => ("system.richacl", false),
        _ => {
            return damaged(format!(
                "inode {}: an attribute in the unknown namespace {index}",
                inode.number
            ));
        }
    };
    let value = match value {
        Value::Here(bytes) if is_acl => match acl(&bytes) {
            Some(bytes) => Value::Here(bytes),
            None => return damaged(format!("inode {}: an ACL makes no sense", inode.number)),
        },
        value => value,
    };
    let name = [prefix.as_bytes(), name].concat();
    Ok(Attribute { name, value })
}

/// From ext4's form, where entries for nobody in particular have no id, to Linux's
/// (`linux/posix_acl_xattr.h`).
fn acl(disk: &[u8]) -> Option<Vec<u8>> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    if disk.len() < 4 || u32_at(disk, 0) != 1 {
        return None;
    }
    let mut out = 2u32.to_le_bytes().to_vec();
    let mut rest = &disk[4..];
    while !rest.is_empty() {
        let (head, tail) = rest.split_at_checked(4)?;
        out.extend(head);
        rest = match u16_at(head, 0) {
            USER | GROUP => {
                let (id, tail) = tail.split_at_checked(4)?;
                out.extend(id);
                tail
            }
            0x01 | 0x04 | 0x10 | 0x20 => {
                out.extend([0xFF; 4]);
                tail
            }
            _ => return None,
        };
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acl_gets_the_ids_it_lacks() {
        let disk = [1, 0, 0, 0, 1, 0, 7, 0, 2, 0, 5, 0, 0xE1, 0x10, 0, 0];
        let linux = [
            2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 5, 0, 0xE1, 0x10, 0, 0,
        ];
        assert_eq!(acl(&disk).as_deref(), Some(&linux[..]));
        for end in [0, 3, 5, 10, 15] {
            assert_eq!(acl(&disk[..end]), None, "{end}");
        }
        assert_eq!(acl(&[1, 0, 0, 0, 3, 0, 7, 0]), None);
    }
}
