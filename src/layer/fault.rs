//! A device that breaks as it is told, for tests: operations fail in their turn, take long, or end
//! in a power cut.
//!
//! ```text
//! Faults      which operation fails next, and how long each takes; devices may share it
//! Faulty      passes everything on, unless Faults says otherwise
//!   volatile  keeps writes to itself until a flush: a cut loses any of them, in parts, too
//! ```

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::device::{Caps, Device, Discard, check_range};
use crate::error::{Error, Kind, Result};

/// The calls that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    Resize,
    /// Of a store: to create, name or remove something. No device has it.
    Name,
}

/// What goes wrong, and when. At first nothing does.
#[derive(Default)]
pub struct Faults {
    state: Mutex<Plan>,
}

#[derive(Default)]
struct Plan {
    fail: Option<Fail>,
    delay: Option<(Duration, Dice)>,
    met: u64,
}

struct Fail {
    /// `None` for any operation.
    operation: Option<Operation>,
    /// Operations that still succeed.
    spared: u64,
    once: bool,
    kind: Kind,
}

impl Faults {
    /// Lets `spared` more calls of `operation` (of any, if `None`) succeed and fails those after
    /// them, until [`Faults::heal`].
    pub fn fail(&self, operation: Option<Operation>, spared: u64, kind: Kind) {
        self.set(operation, spared, kind, false);
    }

    /// The same, for one call only.
    pub fn fail_once(&self, operation: Option<Operation>, spared: u64, kind: Kind) {
        self.set(operation, spared, kind, true);
    }

    fn set(&self, operation: Option<Operation>, spared: u64, kind: Kind, once: bool) {
        lock(&self.state).fail = Some(Fail {
            operation,
            spared,
            once,
            kind,
        });
    }

    /// Nothing fails any more. Delays stay.
    pub fn heal(&self) {
        lock(&self.state).fail = None;
    }

    /// From now on every operation takes up to `most` longer, before its effect and after it; some
    /// only give up the processor. The seed decides.
    pub fn delay(&self, most: Duration, seed: u64) {
        lock(&self.state).delay = Some((most, Dice(seed)));
    }

    /// Calls that have failed so far.
    pub fn met(&self) -> u64 {
        lock(&self.state).met
    }

    /// Takes its time, and fails if the turn of this call has come.
    pub fn begin(&self, operation: Operation) -> Result<()> {
        self.pause();
        let mut state = lock(&self.state);
        let Some(fail) = &mut state.fail else {
            return Ok(());
        };
        if fail.operation.is_some_and(|only| only != operation) {
            return Ok(());
        }
        if let Some(left) = fail.spared.checked_sub(1) {
            fail.spared = left;
            return Ok(());
        }
        let kind = fail.kind;
        if fail.once {
            state.fail = None;
        }
        state.met += 1;
        Err(Error::new(kind, format!("{operation:?} fails as asked")))
    }

    fn pause(&self) {
        let length = lock(&self.state).delay.as_mut().map(|(most, dice)| {
            let nanos = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
            match dice.below(4) {
                0 => Duration::ZERO,
                _ => Duration::from_nanos(dice.below(nanos.max(1))),
            }
        });
        match length {
            None => {}
            Some(Duration::ZERO) => thread::yield_now(),
            Some(length) => thread::sleep(length),
        }
    }
}

/// Sebastiano Vigna's SplitMix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// A device over another one, at the mercy of [`Faults`].
pub struct Faulty {
    inner: Arc<dyn Device>,
    faults: Arc<Faults>,
    /// What the inner device does not have yet; `None` where everything is passed on at once.
    held: Option<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    changes: VecDeque<Change>,
    /// Of the next change.
    number: u64,
}

struct Change {
    number: u64,
    at: u64,
    what: What,
    /// The caller was told that it failed. Reads do not show it, but a cut may leave it.
    failed: bool,
}

enum What {
    Data(Vec<u8>),
    /// So many bytes become a hole.
    Hole(u64),
}

impl Change {
    fn end(&self) -> u64 {
        self.at
            + match &self.what {
                What::Data(data) => data.len() as u64,
                What::Hole(len) => *len,
            }
    }

    /// Applies the part in `range`, which is not empty.
    fn apply(&self, range: Range<u64>, to: &dyn Device) -> Result<()> {
        match &self.what {
            What::Data(data) => {
                let inside = (range.start - self.at) as usize..(range.end - self.at) as usize;
                to.write_all_at(&data[inside], range.start)
            }
            What::Hole(_) => to.discard(range),
        }
    }
}

impl Faulty {
    /// Passes everything on at once.
    pub fn new(inner: Arc<dyn Device>) -> Self {
        Faulty {
            inner,
            faults: Arc::default(),
            held: None,
        }
    }

    /// Keeps what is written to itself until a flush. `faults` may be shared with other devices.
    pub fn volatile(inner: Arc<dyn Device>, faults: Arc<Faults>) -> Self {
        Faulty {
            inner,
            faults,
            held: Some(Mutex::default()),
        }
    }

    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Cuts the power of a volatile device: of what no flush has covered, writes that failed
    /// included, the inner device gets any part in units of `unit` bytes; the seed decides. The rest is
    /// lost. Fails only if the inner device does.
    ///
    /// Whoever uses this device meanwhile should be failing by then ([`Faults::fail`]).
    pub fn cut(&self, unit: u64, seed: u64) -> Result<()> {
        let Some(held) = &self.held else {
            return Ok(());
        };
        let mut dice = Dice(seed);
        // Nothing, rarely, evenly, mostly, everything.
        let share = [0, 1, 8, 15, 16][dice.below(5) as usize];
        for change in lock(held).changes.drain(..) {
            let mut at = change.at;
            while at < change.end() {
                let end = ((at / unit + 1) * unit).min(change.end());
                if dice.below(16) < share {
                    change.apply(at..end, &*self.inner)?;
                }
                at = end;
            }
        }
        Ok(())
    }

    /// Does a change, or keeps it until the flush.
    fn change(&self, at: u64, what: What, begun: Result<()>) -> Result<()> {
        let Some(held) = &self.held else {
            begun?;
            let change = Change {
                number: 0,
                at,
                what,
                failed: false,
            };
            return change.apply(at..change.end(), &*self.inner);
        };
        let held = &mut *lock(held);
        held.changes.push_back(Change {
            number: held.number,
            at,
            what,
            failed: begun.is_err(),
        });
        held.number += 1;
        begun
    }

    fn need_writable(&self) -> Result<()> {
        match self.caps().writable {
            true => Ok(()),
            false => Err(Error::new(Kind::ReadOnly, "the device is read-only")),
        }
    }
}

impl Device for Faulty {
    fn caps(&self) -> Caps {
        self.inner.caps()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.faults.begin(Operation::Read)?;
        {
            let held = self.held.as_ref().map(lock);
            self.inner.read_exact_at(buf, offset)?;
            let end = offset + buf.len() as u64;
            for change in held.iter().flat_map(|held| &held.changes) {
                let (from, to) = (offset.max(change.at), end.min(change.end()));
                if from >= to || change.failed {
                    continue;
                }
                let shown = &mut buf[(from - offset) as usize..(to - offset) as usize];
                match &change.what {
                    What::Data(data) => {
                        let inside = (from - change.at) as usize..(to - change.at) as usize;
                        shown.copy_from_slice(&data[inside]);
                    }
                    What::Hole(_) => shown.fill(0),
                }
            }
        }
        self.faults.pause();
        Ok(())
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.need_writable()?;
        check_range(self.caps(), self.size(), offset, data.len())?;
        let begun = self.faults.begin(Operation::Write);
        self.change(offset, What::Data(data.to_vec()), begun)?;
        self.faults.pause();
        Ok(())
    }

    /// Covers what had returned when it was called.
    fn flush(&self) -> Result<()> {
        let covered = self.held.as_ref().map(|held| lock(held).number);
        self.faults.begin(Operation::Flush)?;
        if let (Some(held), Some(covered)) = (&self.held, covered) {
            let mut held = lock(held);
            while held.changes.front().is_some_and(|c| c.number < covered) {
                let Some(change) = held.changes.pop_front() else {
                    break;
                };
                if !change.failed {
                    change.apply(change.at..change.end(), &*self.inner)?;
                }
            }
        }
        self.inner.flush()?;
        self.faults.pause();
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.need_writable()?;
        if self.caps().discard == Discard::Refused {
            return self.inner.discard(range);
        }
        let len = range.end.saturating_sub(range.start);
        check_range(self.caps(), self.size(), range.start, len as usize)?;
        let begun = self.faults.begin(Operation::Discard);
        self.change(range.start, What::Hole(len), begun)
    }

    /// Takes effect at once, whatever is kept back; what is cut off is forgotten.
    fn resize(&self, size: u64) -> Result<()> {
        self.faults.begin(Operation::Resize)?;
        let held = self.held.as_ref().map(lock);
        self.inner.resize(size)?;
        if let Some(mut held) = held {
            held.changes.retain(|change| change.at < size);
            for change in &mut held.changes {
                let left = size - change.at;
                match &mut change.what {
                    What::Data(data) => data.truncate(left as usize),
                    What::Hole(len) => *len = (*len).min(left),
                }
            }
        }
        Ok(())
    }
}

/// A test that panicked elsewhere must not hide its own message behind this lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layer::conformance;
    use crate::layer::memory::Memory;

    proptest! {
        #[test]
        fn with_no_fault_it_is_a_device(steps in conformance::steps(), volatile: bool) {
            let memory = Arc::new(Memory::new(50_000));
            let device = match volatile {
                true => Faulty::volatile(memory.clone(), Arc::default()),
                false => Faulty::new(memory.clone()),
            };
            conformance::check(&device, &steps)?;
            device.flush().expect("no fault");
            let (mut above, mut below) = (vec![0; device.size() as usize], vec![0; memory.size() as usize]);
            device.read_exact_at(&mut above, 0).expect("in range");
            memory.read_exact_at(&mut below, 0).expect("in range");
            prop_assert!(above == below, "a flush has not brought everything");
        }
    }

    #[test]
    fn calls_fail_in_their_turn_and_change_nothing() {
        let memory = Arc::new(Memory::new(1 << 20));
        let device = Faulty::new(memory.clone());
        device
            .faults()
            .fail(Some(Operation::Write), 1, Kind::NoSpace);
        device.write_all_at(&[1; 8], 4096).expect("spared");
        device.read_exact_at(&mut [0; 4], 0).expect("not meant");
        for _ in 0..2 {
            let refused = device.write_all_at(&[2; 8], 4096).unwrap_err();
            assert_eq!(refused.kind(), Kind::NoSpace);
        }
        device.faults().heal();
        device.flush().expect("healed");
        device.faults().fail_once(None, 1, Kind::Io);
        device.flush().expect("spared");
        assert_eq!(device.discard(0..4096).unwrap_err().kind(), Kind::Io);
        device.discard(0..4096).expect("only once");
        assert_eq!(device.faults().met(), 3);
        assert_eq!(memory.counts().writes, 1);
        let mut kept = [0; 8];
        device.read_exact_at(&mut kept, 4096).expect("healed");
        assert_eq!(kept, [1; 8]);
    }

    /// Every unit is the flushed one, or one of those that were written later.
    #[test]
    fn a_cut_keeps_what_was_flushed_and_any_part_of_the_rest() {
        const UNITS: usize = 64;
        let mut seen = [false; 4];
        let mut mixed = false;
        for seed in 0..40 {
            let memory = Arc::new(Memory::new(UNITS as u64 * 512));
            let device = Faulty::volatile(memory.clone(), Arc::default());
            let fill = |byte| device.write_all_at(&[byte; UNITS * 512], 0);
            fill(1).expect("kept back");
            assert_eq!(memory.allocated(), 0);
            device.flush().expect("no fault");
            fill(2).expect("kept back");
            device.faults().fail(None, 0, Kind::Io);
            fill(3).expect_err("fails");
            device.cut(512, seed).expect("memory");
            device.faults().heal();
            let mut left = [0; UNITS * 512];
            device.read_exact_at(&mut left, 0).expect("healed");
            for unit in left.chunks(512) {
                assert!(unit.iter().all(|byte| *byte == unit[0]), "torn in a unit");
                seen[usize::from(unit[0])] = true;
            }
            mixed |= left.iter().any(|byte| *byte != left[0]);
        }
        assert_eq!((seen, mixed), ([false, true, true, true], true));
    }

    #[test]
    fn delays_come_and_harm_nothing() {
        let device = Faulty::new(Arc::new(Memory::new(1 << 16)));
        device.faults().delay(Duration::from_micros(50), 1);
        let begun = std::time::Instant::now();
        for _ in 0..100 {
            device.write_all_at(&[1; 512], 512).expect("no fault");
        }
        assert!(begun.elapsed() > Duration::from_millis(1));
    }
}
