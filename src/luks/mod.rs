//! The LUKS2 header: what opens an image, and what makes one.
//!
//! After the LUKS2 On-Disk Format Specification 1.1.4, and the behaviour of cryptsetup where the
//! specification leaves it open. [`load()`] reads and judges the two copies of the header,
//! [`Header::unlock`] turns a passphrase into the volume key, [`Format`] makes the bytes of a new
//! header. Nothing here touches a file: bytes come in through a `read` closure and go out as a
//! list of writes; random bytes come in through a closure too.
//!
//! ```text
//! 0         16 KiB      32 KiB                       16 MiB
//! | primary | secondary | keyslot areas ...          | volume ...
//! | 4 KiB binary header, 12 KiB JSON |
//! ```
//! What this program cannot serve is refused by name; nothing is ever repaired.

mod binary;
mod digest;
mod fault;
mod format;
mod hash;
mod header;
mod json;
pub mod kdf;
mod keyslot;
mod load;
#[cfg(test)]
mod sample;
mod segment;
mod split;
mod unlock;

pub use binary::{HEAD_BYTES, HeaderCopy, uuid_of};
pub use digest::Digest;
pub use format::{Format, Formatted, Write};
pub use hash::Hash;
pub use header::{Header, Token};
pub use keyslot::{Area, Keyslot, Lock, Priority};
pub use load::{Loaded, load};
pub use segment::Segment;
