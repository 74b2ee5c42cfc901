//! Memory for keys: pages of their own, kept out of core dumps (`MADV_DONTDUMP`) and, where the
//! system allows it, out of swap (`mlock`), and wiped before they go back.
//!
//! Locking has a limit, `RLIMIT_MEMLOCK`: often 8 MiB, sometimes 64 KiB, none for root. A key that
//! cannot be locked is used all the same, with one message in the log. Nothing but secrets is
//! locked: `mlockall` would take the block cache of 128 MiB and the whole memory of Argon2 as well,
//! fail at nearly every limit, and from then on fail the allocations of everybody else.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Once;

use rustix::io;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use tracing::debug;

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Keys: few, short and long-lived. Locked.
    Key,
    /// Large and short-lived: in huge pages where there are any, not locked.
    Work,
}

/// A mapping that nobody else has. Wiped and unmapped on drop.
pub(crate) struct Pages {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its memory, and hands it out by the rules of `&` and `&mut`.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// The kernel's smallest page, to which mappings are aligned.
    pub const ALIGNMENT: usize = 4096;

    /// `len` zero bytes.
    pub fn zeroed(len: usize, usage: Use) -> io::Result<Pages> {
        if len == 0 {
            // A mapping cannot be empty.
            let start = NonNull::dangling();
            return Ok(Pages { start, len });
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let none = std::ptr::null_mut();
        // SAFETY: the kernel picks a place where nothing is.
        let start = unsafe { mmap_anonymous(none, len, protection, MapFlags::PRIVATE) }?;
        // SAFETY: it has just been mapped, and neither call changes what is in it.
        unsafe { protect(start, len, usage) };
        let start = NonNull::new(start.cast()).ok_or(io::Errno::NOMEM)?;
        Ok(Pages { start, len })
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for reading, zeroed by the kernel, and ours alone.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and mapped for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    fn wipe(&mut self) {
        self.bytes_mut().fill(0);
        // Or the compiler would see that nobody reads it again.
        zeroize::optimization_barrier(self.bytes());
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        self.wipe();
        #[cfg(test)]
        tests::seen_before_unmapping(self.bytes());
        // SAFETY: nobody can hold a reference into it any more.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        if let Err(errno) = unmapped {
            debug!(%errno, "memory was not given back");
        }
    }
}

/// Neither call matters enough to fail for: an old kernel or a low limit must not stop a restore.
///
/// # Safety
/// `start` and `len` are those of a mapping.
unsafe fn protect(start: *mut c_void, len: usize, usage: Use) {
    static TOLD: Once = Once::new();
    // SAFETY: the caller's promise.
    let outcome = unsafe {
        madvise(start, len, Advice::LinuxDontDump).and_then(|()| match usage {
            Use::Key => mlock(start, len),
            Use::Work => madvise(start, len, Advice::LinuxHugepage).or(Ok(())),
        })
    };
    if let Err(errno) = outcome {
        TOLD.call_once(|| debug!(%errno, len, "keys may be swapped out: memory cannot be locked"));
    }
}

/// A value in [`Pages`] of its own: an expanded key.
pub(crate) struct Guarded<T> {
    pages: Pages,
    value: PhantomData<T>,
}

impl<T> Guarded<T> {
    /// Moves a value there. What a move leaves behind is the caller's to wipe.
    pub fn new(value: T) -> Guarded<T> {
        const { assert!(align_of::<T>() <= Pages::ALIGNMENT && size_of::<T>() > 0) };
        let pages = Pages::zeroed(size_of::<T>(), Use::Key).unwrap_or_else(|_| no_memory());
        // SAFETY: the pages are long enough, aligned, and hold nothing yet.
        unsafe { pages.start.cast().write(value) };
        Guarded {
            pages,
            value: PhantomData,
        }
    }
}

impl<T> Deref for Guarded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` has put the value there, and it is borrowed as `self` is.
        unsafe { self.pages.start.cast().as_ref() }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as for `deref`.
        unsafe { self.pages.start.cast().as_mut() }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the value is not used again; its pages are wiped and unmapped after it.
        unsafe { self.pages.start.cast::<T>().drop_in_place() };
    }
}

/// As `Vec` and `Box` do when there is no memory.
pub(super) fn no_memory() -> ! {
    std::alloc::handle_alloc_error(std::alloc::Layout::new::<[u8; Pages::ALIGNMENT]>())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;

    use rustix::process::{Resource, getrlimit};

    use super::*;

    thread_local! {
        static WIPED: Cell<Option<bool>> = const { Cell::new(None) };
    }

    /// What memory holds when it goes back: nobody can look into it later.
    pub(super) fn seen_before_unmapping(bytes: &[u8]) {
        WIPED.set(Some(bytes.iter().all(|&byte| byte == 0)));
    }

    /// `VmFlags` of the mapping around an address (`proc_pid_smaps(5)`).
    fn flags(address: *const u8) -> Vec<String> {
        let smaps = fs::read_to_string("/proc/self/smaps").expect("readable");
        let mut inside = false;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|word| word.split_once('-'));
            let range = range.map(|(from, to)| {
                [from, to].map(|number| usize::from_str_radix(number, 16).unwrap_or(0))
            });
            if let Some([from, to]) = range.filter(|range| range[1] > 0) {
                inside = (from..to).contains(&address.addr());
            }
            if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
                return flags.split_whitespace().map(String::from).collect();
            }
        }
        panic!("no mapping holds {address:?}");
    }

    #[test]
    fn keys_are_kept_out_of_core_dumps_and_locked_where_allowed() {
        let ordinary = flags(vec![1_u8; 100].as_ptr());
        assert!(!ordinary.contains(&"dd".into()) && !ordinary.contains(&"lo".into()));

        let may_lock = getrlimit(Resource::Memlock).current;
        let secret = crate::secret::Secret::new(b"a passphrase".to_vec());
        let guarded = Guarded::new([7_u64; 100]);
        let addresses = [secret.bytes().as_ptr(), (&raw const *guarded).cast()];
        for flags in addresses.map(flags) {
            assert!(flags.contains(&"dd".into()), "{flags:?}");
            if may_lock.is_none_or(|bytes| bytes >= 1 << 20) {
                assert!(flags.contains(&"lo".into()), "{flags:?}");
            }
        }

        let work = Pages::zeroed(1 << 20, Use::Work).expect("1 MiB");
        let flags = flags(work.bytes().as_ptr());
        assert!(flags.contains(&"dd".into()) && !flags.contains(&"lo".into()));
    }

    #[test]
    fn they_are_wiped_before_they_go_back() {
        let wiped = |drop: &dyn Fn()| {
            WIPED.set(None);
            drop();
            WIPED.take()
        };
        assert_eq!(wiped(&|| drop(Guarded::new([1_u8; 5000]))), Some(true));
        let used = || {
            let mut pages = Pages::zeroed(10_000, Use::Work).expect("10 kB");
            assert!(pages.bytes().iter().all(|&byte| byte == 0));
            pages.bytes_mut().fill(0xee);
        };
        assert_eq!(wiped(&used), Some(true));
        assert_eq!(wiped(&|| drop(Pages::zeroed(0, Use::Key))), None);
    }

    #[test]
    fn a_value_is_dropped_once_and_in_its_place() {
        struct Counted<'a>(&'a Cell<u32>, u128);
        impl Drop for Counted<'_> {
            fn drop(&mut self) {
                self.0.set(self.0.get() + 1);
            }
        }
        let drops = Cell::new(0);
        let mut guarded = Guarded::new(Counted(&drops, 1));
        guarded.1 += 1;
        assert_eq!((guarded.1, drops.get()), (2, 0));
        let moved = guarded;
        drop(moved);
        assert_eq!(drops.get(), 1);
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        assert!(Pages::zeroed(usize::MAX / 4, Use::Work).is_err());
    }
}
