//! Looking into snapshots that are not mounted: finding, comparing, packing.

mod diff;
mod pattern;
mod search;
mod tar;

pub use diff::{Change, diff, is_same};
pub use pattern::{Pattern, Selection};
pub use search::{Criteria, Size};
pub use tar::write_tar;
