//! Size, owner, mode and times of a file, each of which may be absent (draft section 5), and the
//! flags that a file is opened with (section 6.3).

use super::wire::{Fields, Malformed, put_len, put_string, put_u32, put_u64};

const SIZE: u32 = 1;
const OWNER: u32 = 2;
const PERMISSIONS: u32 = 4;
const TIMES: u32 = 8;
const EXTENDED: u32 = 0x8000_0000;

/// What is known of a file, or is to be set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Bytes.
    pub size: Option<u64>,
    /// User and group, by number.
    pub owner: Option<(u32, u32)>,
    /// Mode bits as in `st_mode`, file type included where the server tells it.
    pub permissions: Option<u32>,
    /// Last access and last modification, seconds since 1970.
    pub times: Option<(u32, u32)>,
    /// Type and data of what else the server tells.
    pub extended: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attributes {
    pub fn with_size(size: u64) -> Self {
        Attributes {
            size: Some(size),
            ..Attributes::default()
        }
    }

    pub fn with_permissions(permissions: u32) -> Self {
        Attributes {
            permissions: Some(permissions),
            ..Attributes::default()
        }
    }

    /// Whether it is a regular file; `None` when the server does not tell.
    pub fn is_regular(&self) -> Option<bool> {
        const FORMAT: u32 = 0o170_000;
        const REGULAR: u32 = 0o100_000;
        let format = self.permissions? & FORMAT;
        (format != 0).then_some(format == REGULAR)
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Self, Malformed> {
        let flags = fields.u32()?;
        let mut attributes = Attributes::default();
        if flags & SIZE != 0 {
            attributes.size = Some(fields.u64()?);
        }
        if flags & OWNER != 0 {
            attributes.owner = Some((fields.u32()?, fields.u32()?));
        }
        if flags & PERMISSIONS != 0 {
            attributes.permissions = Some(fields.u32()?);
        }
        if flags & TIMES != 0 {
            attributes.times = Some((fields.u32()?, fields.u32()?));
        }
        if flags & EXTENDED != 0 {
            // No capacity from the count: it is the sender's word alone.
            for _ in 0..fields.u32()? {
                let pair = (fields.string()?.to_vec(), fields.string()?.to_vec());
                attributes.extended.push(pair);
            }
        }
        Ok(attributes)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), Malformed> {
        let flag = |present: bool, flag: u32| if present { flag } else { 0 };
        let flags = flag(self.size.is_some(), SIZE)
            | flag(self.owner.is_some(), OWNER)
            | flag(self.permissions.is_some(), PERMISSIONS)
            | flag(self.times.is_some(), TIMES)
            | flag(!self.extended.is_empty(), EXTENDED);
        put_u32(out, flags);
        if let Some(size) = self.size {
            put_u64(out, size);
        }
        if let Some((user, group)) = self.owner {
            put_u32(out, user);
            put_u32(out, group);
        }
        if let Some(permissions) = self.permissions {
            put_u32(out, permissions);
        }
        if let Some((accessed, modified)) = self.times {
            put_u32(out, accessed);
            put_u32(out, modified);
        }
        if !self.extended.is_empty() {
            put_len(out, self.extended.len())?;
            for (kind, data) in &self.extended {
                put_string(out, kind)?;
                put_string(out, data)?;
            }
        }
        Ok(())
    }
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags(pub u32);

impl OpenFlags {
    pub const READ: OpenFlags = OpenFlags(0x01);
    pub const WRITE: OpenFlags = OpenFlags(0x02);
    pub const APPEND: OpenFlags = OpenFlags(0x04);
    pub const CREATE: OpenFlags = OpenFlags(0x08);
    pub const TRUNCATE: OpenFlags = OpenFlags(0x10);
    /// With `CREATE`: the file must not exist.
    pub const EXCLUSIVE: OpenFlags = OpenFlags(0x20);

    pub fn contains(self, flags: OpenFlags) -> bool {
        self.0 & flags.0 == flags.0
    }
}

impl std::ops::BitOr for OpenFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        OpenFlags(self.0 | other.0)
    }
}
