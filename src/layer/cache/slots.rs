//! Frames and what is in them: the bookkeeping under the [table](super::table), which says what the
//! states mean. Here the counts and orders are kept in step, and the frame to give up is chosen.

use std::collections::BTreeSet;
use std::time::Duration;

use rustc_hash::FxHashMap;

/// A place for one block's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Frame(u32);

impl Frame {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// The number of a write or a flush, in the order they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sequence(pub u64);

/// The number of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FetchId(pub u64);

/// The oldest write that a frame owes, and when it came.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    pub sequence: Sequence,
    pub at: Duration,
}

#[derive(Clone, Copy, Debug)]
pub enum State {
    /// No block is here.
    Free,
    Fetching(FetchId),
    Superseded(Mark),
    Clean,
    /// With the number of its coming, for the order of eviction.
    Cold(u64),
    Dirty(Mark),
    Sending(Mark),
    Resend {
        sent: Mark,
        unsent: Mark,
    },
}

#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pub block: u64,
    pub state: State,
    /// Was read since it came.
    pub read: bool,
    /// Was read again since the clock's hand passed.
    referenced: bool,
}

pub struct Slots {
    frames_max: usize,
    /// By frame. Grows to `frames_max`, so that memory is taken as it is used.
    slots: Vec<Slot>,
    frames: FxHashMap<u64, Frame>,
    free: Vec<Frame>,
    /// The clock's hand.
    hand: usize,
    /// Dirty blocks by their oldest write.
    ready: BTreeSet<(Sequence, Frame)>,
    /// Owed blocks that cannot be sent now (Superseded, Sending, Resend) by their oldest write.
    held: BTreeSet<(Sequence, Frame)>,
    /// Cold blocks in the order of their coming.
    cold: BTreeSet<(u64, Frame)>,
    colds: u64,
    clean: usize,
    /// Blocks in Fetching and Superseded.
    pub fetching: usize,
    /// Blocks in Sending and Resend.
    pub sending: usize,
}

impl Slots {
    pub fn new(frames_max: usize) -> Self {
        Slots {
            frames_max,
            slots: Vec::new(),
            frames: FxHashMap::default(),
            free: Vec::new(),
            hand: 0,
            ready: BTreeSet::new(),
            held: BTreeSet::new(),
            cold: BTreeSet::new(),
            colds: 0,
            clean: 0,
            fetching: 0,
            sending: 0,
        }
    }

    pub fn find(&self, block: u64) -> Option<(Frame, Slot)> {
        let frame = *self.frames.get(&block)?;
        Some((frame, self.slots[frame.index()]))
    }

    pub fn iter(&self) -> impl Iterator<Item = (Frame, &Slot)> {
        let frames = (0..).map(Frame);
        frames.zip(&self.slots)
    }

    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    pub fn owed(&self) -> usize {
        self.ready.len() + self.held.len()
    }

    /// The Dirty block with the oldest write.
    pub fn oldest_ready(&self) -> Option<(u64, Mark)> {
        let &(_, frame) = self.ready.first()?;
        let slot = &self.slots[frame.index()];
        match slot.state {
            State::Dirty(mark) => Some((slot.block, mark)),
            _ => None,
        }
    }

    pub fn oldest_owed(&self) -> Option<Sequence> {
        let ready = self.ready.first();
        let held = self.held.first();
        ready.into_iter().chain(held).map(|&(s, _)| s).min()
    }

    /// The block in this frame was read.
    pub fn touch(&mut self, frame: Frame) {
        let slot = &mut self.slots[frame.index()];
        slot.referenced |= slot.read;
        slot.read = true;
        if let State::Cold(_) = slot.state {
            self.enter(frame, State::Clean);
        }
    }

    /// The block in this frame will be read soon: the clock's hand leaves it where it is, once.
    pub fn spare(&mut self, frame: Frame) {
        self.touch(frame);
        self.slots[frame.index()].referenced = true;
    }

    /// A frame for a block that has none, in Free until it [enters](Slots::enter) a state.
    pub fn allocate(&mut self, block: u64) -> Option<Frame> {
        let fresh = Slot {
            block,
            state: State::Free,
            read: false,
            referenced: false,
        };
        if self.free.is_empty() && self.slots.len() < self.frames_max {
            self.free.push(Frame(self.slots.len() as u32));
            self.slots.push(fresh);
        }
        if self.free.is_empty() {
            let victim = self.victim()?;
            self.release(victim);
        }
        let frame = self.free.pop()?;
        self.slots[frame.index()] = fresh;
        self.frames.insert(block, frame);
        Some(frame)
    }

    fn victim(&mut self) -> Option<Frame> {
        if let Some(&(_, frame)) = self.cold.first() {
            return Some(frame);
        }
        if self.clean == 0 {
            return None;
        }
        // Ends within two rounds: the first clears what spared the Clean block.
        loop {
            let index = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[index];
            if !matches!(slot.state, State::Clean) {
                continue;
            }
            if !std::mem::take(&mut slot.referenced) {
                return Some(Frame(index as u32));
            }
        }
    }

    /// Forgets the block in this frame.
    pub fn release(&mut self, frame: Frame) {
        self.enter(frame, State::Free);
        self.frames.remove(&self.slots[frame.index()].block);
        self.free.push(frame);
    }

    pub fn enter_cold(&mut self, frame: Frame) {
        self.colds += 1;
        self.enter(frame, State::Cold(self.colds));
    }

    /// The only way from one state to another.
    pub fn enter(&mut self, frame: Frame, state: State) {
        self.account(frame, self.slots[frame.index()].state, false);
        self.account(frame, state, true);
        self.slots[frame.index()].state = state;
    }

    /// Counts a frame into a state's books, or out of them.
    fn account(&mut self, frame: Frame, state: State, into: bool) {
        let count = |number: &mut usize| match into {
            true => *number += 1,
            false => *number -= 1,
        };
        fn list<K: Ord>(set: &mut BTreeSet<(K, Frame)>, entry: (K, Frame), into: bool) {
            match into {
                true => set.insert(entry),
                false => set.remove(&entry),
            };
        }
        match state {
            State::Free => {}
            State::Fetching(_) => count(&mut self.fetching),
            State::Superseded(mark) => {
                count(&mut self.fetching);
                list(&mut self.held, (mark.sequence, frame), into);
            }
            State::Clean => count(&mut self.clean),
            State::Cold(came) => list(&mut self.cold, (came, frame), into),
            State::Dirty(mark) => list(&mut self.ready, (mark.sequence, frame), into),
            State::Sending(sent) | State::Resend { sent, .. } => {
                count(&mut self.sending);
                list(&mut self.held, (sent.sequence, frame), into);
            }
        }
    }

    /// The books, recomputed.
    #[cfg(test)]
    pub fn check(&self) {
        let mut recounted = Slots::new(self.frames_max);
        for (frame, slot) in self.iter() {
            let mapped = self.frames.get(&slot.block) == Some(&frame);
            let free = matches!(slot.state, State::Free);
            assert_eq!((mapped, self.free.contains(&frame)), (!free, free));
            recounted.account(frame, slot.state, true);
        }
        assert_eq!(self.frames.len() + self.free.len(), self.slots.len());
        assert!(self.slots.len() <= self.frames_max);
        assert_eq!(
            (self.clean, self.fetching, self.sending),
            (recounted.clean, recounted.fetching, recounted.sending)
        );
        assert_eq!(
            (&self.ready, &self.held, &self.cold),
            (&recounted.ready, &recounted.held, &recounted.cold)
        );
    }
}
