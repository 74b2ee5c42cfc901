//! Looking into snapshots that are not mounted: finding, comparing, packing, showing.

mod diff;
mod pattern;
mod search;
mod shown;
mod tar;
mod view;

pub use diff::{Change, diff, is_same};
pub use pattern::{Pattern, Selection};
pub use search::{Criteria, Size};
pub use shown::Shown;
pub use tar::write_tar;
pub use view::View;
