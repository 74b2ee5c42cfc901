//! End-to-end-encrypted backup into one sparse LUKS2 image on a server that nobody has to trust.
//!
//! Five floors; a module uses only floors below its own (`tests/architecture.rs` has the table).

// Floor 0: words.
pub mod buffer; //   bytes that are handed on instead of copied
pub mod device; //   a run of bytes that can be read and written at any offset
pub mod error; //    what was attempted, on what, why it failed, what to do
pub mod location; // where an image is
pub mod progress; // how the engines report
pub mod secret; //   bytes that are wiped when dropped
pub mod units; //    sizes and durations

// Floor 1: formats. Bytes in, bytes out; no I/O, clock or randomness inside.
pub mod ext4; //     structures of the filesystem, read and judged
pub mod luks; //     the LUKS2 header: binary header, JSON metadata, keyslots, key derivation
pub mod retention; // which snapshots to keep
pub mod sftp; //     SFTP version 3 packets, and the client's side of the conversation
pub mod xts; //      AES-256-XTS over runs of sectors

// Floor 2: the world.
pub mod export; //   a device as one file in a FUSE mount
pub mod host; //     every child process, mount and namespace starts here
pub mod layer; //    devices that wrap a device: crypt, cache, overlay
pub mod link; //     the byte stream to the server
pub mod remote; //   a location as a device, and the small files beside it

// Floor 3: engines.
pub mod browse; //   finds, compares, packs and shows what snapshots hold
pub mod image; //    builds the stack; creates and opens images
pub mod restore; //  copies trees out of a snapshot, safely
pub mod session; //  image, volume, FUSE, loop device, mount; undone in reverse
pub mod snapshot; // takes and lists snapshots inside a mounted filesystem

// Floor 4: front.
pub mod cli; //      a verb is a page
pub mod ui; //       terminal, JSON, prompts
