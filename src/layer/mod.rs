//! Devices that wrap a device, each one concern: stacked in one function, any suffix runs in a test.

pub mod cache; //   write-back, read-ahead, any alignment
pub mod crypt; //   plaintext above, LUKS2 ciphertext below
pub mod fault; //   fails, delays and loses power when told to, for tests
pub mod memory; //  a device in memory, for tests
pub mod overlay; // writes stay in memory, the device below is only read

#[cfg(test)]
pub(crate) mod conformance; // what every device must do, as a property test

pub use cache::Cache;
pub use crypt::Crypt;
pub use overlay::Overlay;
