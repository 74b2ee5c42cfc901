//! The table against a plain map, under a scheduler that ends every I/O whenever it likes.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::tests::LIMITS;
use super::*;

const BLOCKS: u64 = 40;

/// What a block holds: the number of the write that put it there. 0 was there before.
type Version = u64;

#[derive(Clone, Debug)]
enum Step {
    Read(u64),
    Write { block: u64, whole: bool },
    Fetch { block: u64, window: u64 },
    Ahead { block: u64, length: u64 },
    Spare(Range<u64>),
    Send,
    EndFetch { which: usize, ok: bool },
    EndSend { which: usize, ok: bool },
    Flush,
    AskFlush(usize),
    EndSync { ok: bool },
    Discard(Range<u64>),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let block = || 0..BLOCKS;
    // A failure ends all writing, so it is rare.
    let ok = || prop::bool::weighted(0.997);
    prop_oneof![
        6 => block().prop_map(Step::Read),
        8 => (block(), any::<bool>()).prop_map(|(block, whole)| Step::Write { block, whole }),
        3 => (block(), 1..6_u64).prop_map(|(block, window)| Step::Fetch { block, window }),
        1 => (block(), 1..12_u64).prop_map(|(block, length)| Step::Ahead { block, length }),
        1 => (block(), 1..12_u64).prop_map(|(at, length)| Step::Spare(at..at + length)),
        6 => Just(Step::Send),
        5 => (any::<usize>(), prop::bool::weighted(0.9))
            .prop_map(|(which, ok)| Step::EndFetch { which, ok }),
        6 => (any::<usize>(), ok()).prop_map(|(which, ok)| Step::EndSend { which, ok }),
        1 => Just(Step::Flush),
        4 => any::<usize>().prop_map(Step::AskFlush),
        2 => ok().prop_map(|ok| Step::EndSync { ok }),
        1 => (block(), 1..8_u64).prop_map(|(at, length)| Step::Discard(at..at + length)),
        2 => (0..900_u64).prop_map(Step::Pass),
    ]
}

struct Pending {
    target: Sequence,
    /// What it has to make durable.
    promised: HashMap<u64, Version>,
}

struct World {
    table: Table,
    now: Duration,
    frames: BTreeMap<Frame, Version>,
    /// What a reader has to see.
    model: HashMap<u64, Version>,
    inner: HashMap<u64, Version>,
    /// What survives a crash for certain.
    durable: HashMap<u64, Version>,
    versions: Version,
    fetches: Vec<(Fetch, HashMap<u64, Version>)>,
    sends: Vec<(WriteBack, HashMap<u64, Version>)>,
    flushes: Vec<Pending>,
    sync: Option<(InnerFlush, HashMap<u64, Version>)>,
    failed: bool,
}

fn at(map: &HashMap<u64, Version>, block: u64) -> Version {
    map.get(&block).copied().unwrap_or(0)
}

impl World {
    fn new() -> Self {
        World {
            table: Table::new(LIMITS),
            now: Duration::ZERO,
            frames: BTreeMap::new(),
            model: HashMap::new(),
            inner: HashMap::new(),
            durable: HashMap::new(),
            versions: 0,
            fetches: Vec::new(),
            sends: Vec::new(),
            flushes: Vec::new(),
            sync: None,
            failed: false,
        }
    }

    fn in_flight(&self, block: u64) -> usize {
        let fetches = self
            .fetches
            .iter()
            .filter(|(f, _)| f.blocks().contains(&block));
        let sends = self
            .sends
            .iter()
            .filter(|(s, _)| s.blocks().contains(&block));
        fetches.count() + sends.count()
    }

    fn begin(&mut self, fetch: Fetch) {
        let read = fetch.blocks().map(|b| (b, at(&self.inner, b))).collect();
        self.fetches.push((fetch, read));
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Read(block) => match self.table.read(block) {
                Read::Hit(frame) => assert_eq!(self.frames[&frame], at(&self.model, block)),
                Read::Fetching(_) => assert_eq!(self.in_flight(block), 1),
                // What was evicted must be below.
                Read::Absent => assert_eq!(at(&self.inner, block), at(&self.model, block)),
            },
            Step::Write { block, whole } => self.write(block, whole),
            Step::Fetch { block, window } => {
                let window = block.saturating_sub(window)..block + window;
                if let Some(fetch) = self.table.fetch(block..block + 1, window) {
                    self.begin(fetch);
                }
            }
            Step::Ahead { block, length } => {
                for fetch in self.table.ahead(block..block + length) {
                    self.begin(fetch);
                }
            }
            Step::Spare(blocks) => self.table.spare(blocks),
            Step::Send => self.send(),
            Step::EndFetch { which, ok } => self.end_fetch(which, ok),
            Step::EndSend { which, ok } => self.end_send(which, ok),
            Step::Flush => {
                let target = self.table.flush_begin();
                self.flushes.push(Pending {
                    target,
                    promised: self.model.clone(),
                });
            }
            Step::AskFlush(which) => self.ask_flush(which),
            Step::EndSync { ok } => self.end_sync(ok),
            Step::Discard(range) => self.discard(range),
            Step::Pass(ms) => self.now += Duration::from_millis(ms),
        }
    }

    fn write(&mut self, block: u64, whole: bool) {
        let owed = self.table.owed();
        match self.table.write(block, whole, self.now) {
            Write::Into(frame) => {
                // A part is as good as the whole here, if the rest was there.
                if !whole {
                    assert_eq!(self.frames[&frame], at(&self.model, block));
                }
                self.versions += 1;
                self.frames.insert(frame, self.versions);
                self.model.insert(block, self.versions);
            }
            Write::Fetch => assert!(!whole && !self.table.is_present(block)),
            Write::Wait => {
                let frames = owed == LIMITS.dirty || self.fetches.len() + self.sends.len() > 0;
                assert!(frames, "nothing to wait for");
            }
        }
    }

    fn send(&mut self) {
        match self.table.next(self.now) {
            Action::Write(run) => {
                assert!(!self.failed, "sent after a failure");
                let copies: HashMap<u64, Version> = run
                    .blocks()
                    .map(|b| (b, self.frames[&self.table.frame_of(b).expect("sent")]))
                    .collect();
                assert!(copies.len() as u64 <= LIMITS.run);
                self.sends.push((run, copies));
            }
            Action::Wait(Some(until)) => assert!(until > self.now),
            Action::Wait(None) => {}
        }
    }

    fn end_fetch(&mut self, which: usize, ok: bool) {
        if self.fetches.is_empty() {
            return;
        }
        let (fetch, read) = self.fetches.swap_remove(which % self.fetches.len());
        for (&block, &version) in &read {
            assert_eq!(at(&self.inner, block), version, "written while it was read");
        }
        match ok {
            true => self.table.fetched(fetch, |block, frame| {
                self.frames.insert(frame, read[&block]);
            }),
            false => self.table.fetch_failed(fetch),
        }
    }

    fn end_send(&mut self, which: usize, ok: bool) {
        if self.sends.is_empty() {
            return;
        }
        let (run, copies) = self.sends.swap_remove(which % self.sends.len());
        for (&block, &version) in &copies {
            // One that failed may have got through in part.
            if ok || block % 2 == 0 {
                assert!(version >= at(&self.inner, block), "written out of order");
                self.inner.insert(block, version);
            }
        }
        match ok {
            true => self.table.written(run),
            false => {
                self.failed = true;
                self.table.write_failed(run);
            }
        }
    }

    fn ask_flush(&mut self, which: usize) {
        if self.flushes.is_empty() {
            return;
        }
        let which = which % self.flushes.len();
        match self.table.flush_step(self.flushes[which].target) {
            Flush::Done => {
                let done = self.flushes.swap_remove(which);
                for (block, version) in done.promised {
                    assert!(
                        at(&self.durable, block) >= version,
                        "promised and not durable"
                    );
                }
            }
            Flush::Wait => assert!(self.table.owed() > 0 || self.sync.is_some()),
            // The shell asks no more after a failure.
            Flush::Sync(sync) if self.failed => self.table.sync_failed(sync),
            Flush::Sync(sync) => {
                assert!(self.sync.is_none());
                self.sync = Some((sync, self.inner.clone()));
            }
        }
    }

    fn end_sync(&mut self, ok: bool) {
        let Some((sync, snapshot)) = self.sync.take() else {
            return;
        };
        if ok {
            self.durable = snapshot;
            self.table.synced(sync);
        } else {
            self.failed = true;
            self.table.sync_failed(sync);
        }
    }

    /// As the shell does it; the data below then count as the newest version.
    fn discard(&mut self, range: Range<u64>) {
        self.table.pause(true);
        if !self.table.is_busy(&range) {
            self.table.remove(&range);
            for block in range {
                self.versions += 1;
                self.model.insert(block, self.versions);
                self.inner.insert(block, self.versions);
                assert!(!self.table.is_present(block));
            }
        }
        self.table.pause(false);
    }

    /// Ends everything; if nothing failed, the inner device then has all of it.
    fn drain(&mut self) {
        self.apply(Step::Flush);
        for _ in 0..10_000 {
            if self.flushes.is_empty() || self.failed {
                break;
            }
            self.send();
            self.end_send(0, true);
            self.end_fetch(0, true);
            self.end_sync(true);
            self.ask_flush(self.versions as usize);
            self.versions += 1;
        }
        if !self.failed {
            assert!(self.flushes.is_empty(), "a flush never ends");
            assert_eq!(self.table.owed(), 0);
            for block in 0..BLOCKS {
                assert_eq!(at(&self.durable, block), at(&self.model, block));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_schedule_keeps_the_promises(steps in prop::collection::vec(step(), 1..600)) {
        let mut world = World::new();
        for step in steps {
            world.apply(step);
            world.table.check();
            for block in 0..BLOCKS + 12 {
                prop_assert!(world.in_flight(block) <= 1, "two I/Os in flight on {block}");
            }
        }
        world.drain();
        world.table.check();
    }
}
