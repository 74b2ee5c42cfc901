//! An image as a mounted filesystem: image, volume, FUSE, loop device, mount; undone in reverse.
//!
//! A session is a process of its own, because whoever serves a FUSE file must never touch what is
//! mounted from it: a process killed inside such a system call would wait for itself for ever,
//! holding the FUSE descriptor that could free it. So the session process serves and starts
//! mount(8) and umount(8); the command that started it copies files and holds no such descriptor.
//!
//! ```text
//! command                         session process
//!   Session::start  -- plan, key -->  dial, lease, unlock, stack, export, mount
//!                   <---- Ready ----
//!   rsync, rename   <--- Status ----  serve
//!   Session::close  ---- Close ---->  umount, drain, sync, release
//!                   <---- Done -----
//! ```
//!
//! When the command dies, the session sees the end of the socket and tears down by itself. When
//! the session dies, the kernel ends the FUSE mount and everything above it.

mod client;
mod close;
mod fsck;
mod grow;
mod keeping;
mod mounts;
mod server;
mod signals;
mod stage;
mod telling;
#[doc(hidden)] // for `fuzz/`
pub mod wire;

pub use client::{KeySource, Session};
pub use close::{Closed, close_mount};
pub use fsck::{Fscked, fsck};
pub use grow::{fill_mounted, fill_unmounted};
pub use mounts::{PublicMount, enter_private, hint_at_mount, public_mount};
pub use server::serve;
pub use signals::{count_signals, end_at_second_signal, end_at_signals, end_at_signals_until};
pub use wire::{LinkDown, Place, Plan, Status};

/// The hidden verb that the session process is started with.
pub const VERB: &str = "session-process";
