//! Every child process, mount and namespace starts here.

pub mod holders; //     who keeps a mount busy
pub mod keeper; //      keeps a mount namespace until its server has ended
pub mod loop_device; // settings of the block device between a file and its filesystem
pub mod machine; //     its name and memory
pub mod mkfs; //        making an ext4 that minds no noise in blocks never written
pub mod mount; //       mounting a volume file, by a loop device or fuse2fs, and unmounting it
pub mod mount_table; // what is mounted where
pub mod namespace; //   where mounts are made: a namespace that leaves nothing behind
pub mod privilege; //   what this process can mount with
pub mod spawn; //       what a child inherits: its parent's death, its deafness to signals
pub mod stream; //      following a program's output line by line
pub mod tool; //        running another program to its end
pub mod view; //        acting in a mount namespace without being of it

pub use machine::{host_name, memory_bytes};
pub use mkfs::make_ext4;
pub use namespace::{Private, enter_private, runtime_directory};
pub use privilege::Means;
pub use tool::{Tool, require};
pub use view::{View, in_private};
