//! Every move of the table, one by one.

use super::*;

pub const LIMITS: Limits = Limits {
    frames: 16,
    dirty: 8,
    low: 4,
    sending: 8,
    fetching: 8,
    run: 4,
    age: Duration::from_secs(1),
};

const START: Duration = Duration::ZERO;
const LATER: Duration = Duration::from_secs(1);

impl Table {
    pub fn check(&self) {
        self.slots.check();
        assert!(self.owed() <= self.limits.dirty);
        assert!(self.slots.sending <= self.limits.sending);
        for (_, slot) in self.slots.iter() {
            if let State::Resend { sent, unsent } = slot.state {
                assert!(sent.sequence < unsent.sequence);
            }
        }
    }

    fn state_of(&self, block: u64) -> &'static str {
        match self.slots.find(block).map(|(_, slot)| slot.state) {
            None => "absent",
            Some(State::Free) => unreachable!("a mapped frame is not free"),
            Some(State::Fetching(_)) => "Fetching",
            Some(State::Superseded(_)) => "Superseded",
            Some(State::Clean) => "Clean",
            Some(State::Cold(_)) => "Cold",
            Some(State::Dirty(_)) => "Dirty",
            Some(State::Sending(_)) => "Sending",
            Some(State::Resend { .. }) => "Resend",
        }
    }

    fn put(&mut self, block: u64) {
        assert!(matches!(self.write(block, true, START), Write::Into(_)));
    }

    fn begin_fetch(&mut self, block: u64) -> Fetch {
        self.fetch(block..block + 1, block..block + 1)
            .expect("a frame")
    }

    fn bring(&mut self, block: u64) {
        let fetch = self.begin_fetch(block);
        self.fetched(fetch, |_, _| {});
    }

    fn send(&mut self) -> WriteBack {
        match self.next(LATER) {
            Action::Write(run) => run,
            Action::Wait(until) => panic!("nothing to write until {until:?}"),
        }
    }

    /// Brings a block into a state by the shortest way.
    fn reach(&mut self, block: u64, state: &str) -> (Option<Fetch>, Option<WriteBack>) {
        let (mut fetch, mut send) = (None, None);
        match state {
            "absent" => {}
            "Fetching" => fetch = Some(self.begin_fetch(block)),
            "Superseded" => {
                fetch = Some(self.begin_fetch(block));
                self.put(block);
            }
            "Clean" => self.bring(block),
            "Cold" => {
                self.put(block);
                let run = self.send();
                self.written(run);
            }
            "Dirty" => self.put(block),
            "Sending" | "Resend" => {
                self.put(block);
                send = Some(self.send());
                if state == "Resend" {
                    self.put(block);
                }
            }
            other => panic!("{other} is no state"),
        }
        assert_eq!(self.state_of(block), state);
        (fetch, send)
    }
}

fn after(
    from: &str,
    event: impl FnOnce(&mut Table, Option<Fetch>, Option<WriteBack>),
) -> &'static str {
    let mut table = Table::new(LIMITS);
    let (fetch, send) = table.reach(5, from);
    event(&mut table, fetch, send);
    table.check();
    table.state_of(5)
}

#[test]
fn a_write_of_a_whole_block_moves_every_state() {
    for (from, to) in [
        ("absent", "Dirty"),
        ("Fetching", "Superseded"),
        ("Superseded", "Superseded"),
        ("Clean", "Dirty"),
        ("Cold", "Dirty"),
        ("Dirty", "Dirty"),
        ("Sending", "Resend"),
        ("Resend", "Resend"),
    ] {
        assert_eq!(after(from, |table, _, _| table.put(5)), to, "{from}");
    }
}

#[test]
fn a_write_of_a_part_needs_the_rest() {
    for (from, answer, to) in [
        ("absent", Some(Write::Fetch), "absent"),
        ("Fetching", Some(Write::Wait), "Fetching"),
        ("Superseded", None, "Superseded"),
        ("Clean", None, "Dirty"),
        ("Cold", None, "Dirty"),
        ("Dirty", None, "Dirty"),
        ("Sending", None, "Resend"),
        ("Resend", None, "Resend"),
    ] {
        let state = after(from, |table, _, _| match table.write(5, false, START) {
            Write::Into(_) => assert_eq!(answer, None, "{from}"),
            other => assert_eq!(Some(other), answer, "{from}"),
        });
        assert_eq!(state, to, "{from}");
    }
}

#[test]
fn a_read_hits_every_state_that_has_data() {
    for (from, hit, to) in [
        ("absent", false, "absent"),
        ("Fetching", false, "Fetching"),
        ("Superseded", true, "Superseded"),
        ("Clean", true, "Clean"),
        ("Cold", true, "Clean"),
        ("Dirty", true, "Dirty"),
        ("Sending", true, "Sending"),
        ("Resend", true, "Resend"),
    ] {
        let state = after(from, |table, _, _| {
            assert_eq!(matches!(table.read(5), Read::Hit(_)), hit, "{from}");
        });
        assert_eq!(state, to, "{from}");
    }
}

#[test]
fn a_fetch_fills_what_was_not_written_meanwhile() {
    for (from, ok, filled, to) in [
        ("Fetching", true, 1, "Clean"),
        ("Fetching", false, 0, "absent"),
        ("Superseded", true, 0, "Dirty"),
        ("Superseded", false, 0, "Dirty"),
    ] {
        let state = after(from, |table, fetch, _| {
            let fetch = fetch.expect("a fetch");
            let mut fills = 0;
            match ok {
                true => table.fetched(fetch, |_, _| fills += 1),
                false => table.fetch_failed(fetch),
            }
            assert_eq!(fills, filled, "{from} {ok}");
        });
        assert_eq!(state, to, "{from} {ok}");
    }
}

#[test]
fn a_completed_write_leaves_only_what_it_wrote_clean() {
    for (from, read, ok, to) in [
        ("Sending", false, true, "Cold"),
        ("Sending", true, true, "Clean"),
        ("Sending", false, false, "Dirty"),
        ("Resend", false, true, "Dirty"),
        ("Resend", true, false, "Dirty"),
    ] {
        let state = after(from, |table, _, send| {
            if read {
                table.read(5);
            }
            let send = send.expect("a write");
            match ok {
                true => table.written(send),
                false => table.write_failed(send),
            }
        });
        assert_eq!(state, to, "{from} {read} {ok}");
    }
}

#[test]
fn remove_spares_what_is_in_flight() {
    for (from, to) in [
        ("Fetching", "Fetching"),
        ("Superseded", "Superseded"),
        ("Clean", "absent"),
        ("Cold", "absent"),
        ("Dirty", "absent"),
        ("Sending", "Sending"),
        ("Resend", "Resend"),
    ] {
        let state = after(from, |table, _, _| {
            assert_eq!(table.is_busy(&(5..6)), from == to);
            assert!(!table.is_busy(&(6..100)));
            table.remove(&(5..6));
        });
        assert_eq!(state, to, "{from}");
    }
}

#[test]
fn only_clean_blocks_are_evicted() {
    for (from, survives) in [
        ("Fetching", true),
        ("Superseded", true),
        ("Clean", false),
        ("Cold", false),
        ("Dirty", true),
        ("Sending", true),
        ("Resend", true),
    ] {
        let state = after(from, |table, _, _| {
            for block in 100..200 {
                table.bring(block);
            }
        });
        assert_eq!(state != "absent", survives, "{from}");
    }
}

#[test]
fn streaming_writes_leave_what_was_read_alone() {
    let mut table = Table::new(LIMITS);
    for block in 0..10 {
        table.bring(block);
        table.read(block);
    }
    for block in 1000..2000 {
        table.put(block);
        let run = table.send();
        table.written(run);
        table.check();
    }
    assert!((0..10).all(|block| table.is_present(block)));
}

#[test]
fn a_block_read_twice_outlives_one_read_once() {
    let mut table = Table::new(LIMITS);
    for block in 0..16 {
        table.bring(block);
        table.read(block);
    }
    table.read(3);
    for block in 100..115 {
        table.bring(block);
    }
    assert!(table.is_present(3));
    for block in 200..204 {
        table.bring(block);
    }
    assert!(!table.is_present(3), "a second chance is not a third");
}

#[test]
fn what_is_spared_outlives_what_is_fetched_after_it() {
    let mut table = Table::new(LIMITS);
    for block in 0..16 {
        table.bring(block);
    }
    table.spare(2..4);
    for block in 100..114 {
        table.bring(block);
    }
    assert!((2..4).all(|block| table.is_present(block)));
    assert!(!(4..16).any(|block| table.is_present(block)));
    for block in 200..204 {
        table.bring(block);
    }
    assert!(!table.is_present(2), "not for good");
}

#[test]
fn a_fetch_takes_the_absent_neighbours_up_to_a_run() {
    let mut table = Table::new(LIMITS);
    table.bring(4);
    let fetch = table.fetch(6..7, 0..16).expect("frames");
    assert_eq!(fetch.blocks(), 6..10, "forward first, one run at most");
    let behind = table.fetch(5..6, 0..16).expect("frames");
    assert_eq!(behind.blocks(), 5..6, "between what is there");
    assert!(table.fetch(6..7, 6..7).is_none(), "never fetched twice");
    assert!(table.is_fetching(6, fetch.id()) && !table.is_fetching(6, behind.id()));
    table.check();
}

#[test]
fn guesses_are_bounded_and_wishes_are_not() {
    let mut table = Table::new(LIMITS);
    let ahead = table.ahead(2..100);
    let blocks: Vec<_> = ahead.iter().map(Fetch::blocks).collect();
    assert_eq!(
        blocks,
        [2..4, 4..8, 8..10],
        "runs end at multiples of a run"
    );
    assert_eq!(table.room_ahead(), 0);
    assert!(table.ahead(200..300).is_empty());
    let wanted = table.fetch(50..51, 48..64).expect("a frame");
    assert_eq!(wanted.blocks(), 50..51);
    table.check();
}

#[test]
fn a_writer_waits_at_the_bound_unless_the_block_is_owed_already() {
    let mut table = Table::new(LIMITS);
    for block in 0..8 {
        table.put(block);
    }
    assert_eq!(table.write(8, true, START), Write::Wait);
    assert_eq!(table.write(8, false, START), Write::Wait);
    table.put(3);
    table.check();
    let run = table.send();
    assert_eq!(
        table.write(8, true, START),
        Write::Wait,
        "not before it is written"
    );
    table.written(run);
    table.put(8);
}

#[test]
fn without_a_frame_everybody_waits() {
    let mut table = Table::new(LIMITS);
    let fetches: Vec<_> = (0..16).map(|block| table.begin_fetch(block)).collect();
    assert_eq!(table.write(100, true, START), Write::Wait);
    assert!(table.fetch(100..101, 100..101).is_none());
    for fetch in fetches {
        table.fetch_failed(fetch);
    }
    table.put(100);
    table.check();
}

#[test]
fn write_back_starts_with_the_oldest_and_stays_in_its_stretch() {
    let mut table = Table::new(LIMITS);
    for block in [5, 9, 4, 6, 3, 8] {
        table.put(block);
    }
    assert_eq!(table.send().blocks(), 4..7);
    assert_eq!(table.send().blocks(), 8..10);
    assert!(
        matches!(table.next(LATER), Action::Wait(None)),
        "two runs are the bound"
    );
    table.check();
}

#[test]
fn write_back_waits_for_age_the_low_mark_or_a_flush() {
    let mut table = Table::new(LIMITS);
    table.put(0);
    let Action::Wait(Some(until)) = table.next(START) else {
        panic!("too early");
    };
    assert_eq!(until, LATER);
    for block in [10, 20, 30] {
        table.put(block);
    }
    assert!(matches!(table.next(START), Action::Wait(Some(_))));
    table.put(40);
    assert!(
        matches!(table.next(START), Action::Write(_)),
        "above the low mark"
    );
    assert!(matches!(table.next(START), Action::Wait(Some(_))));
    table.flush_begin();
    assert!(matches!(table.next(START), Action::Write(_)));
    table.pause(true);
    assert!(matches!(table.next(START), Action::Wait(None)));
    table.pause(false);
    assert!(matches!(table.next(START), Action::Write(_)));
}

#[test]
fn a_flush_waits_for_older_writes_only() {
    let mut table = Table::new(LIMITS);
    table.put(0);
    let first = table.send();
    let target = table.flush_begin();
    table.put(0);
    table.put(7);
    assert!(matches!(table.flush_step(target), Flush::Wait));
    table.written(first);
    assert_eq!(table.state_of(0), "Dirty");
    let Flush::Sync(sync) = table.flush_step(target) else {
        panic!("the later writes hold it up");
    };
    let second = table.flush_begin();
    assert!(
        matches!(table.flush_step(second), Flush::Wait),
        "one at a time"
    );
    table.synced(sync);
    assert!(matches!(table.flush_step(target), Flush::Done));
    assert!(
        matches!(table.flush_step(second), Flush::Wait),
        "its writes are owed"
    );
}

#[test]
fn an_overwritten_block_keeps_its_oldest_number() {
    let mut table = Table::new(LIMITS);
    table.put(0);
    let target = table.flush_begin();
    table.put(0);
    assert!(matches!(table.flush_step(target), Flush::Wait));
    let run = table.send();
    table.put(0);
    table.write_failed(run);
    assert!(
        matches!(table.flush_step(target), Flush::Wait),
        "also after a failure"
    );
}

#[test]
fn flushes_share_an_inner_flush_that_began_after_both() {
    let mut table = Table::new(LIMITS);
    let (first, second) = (table.flush_begin(), table.flush_begin());
    let Flush::Sync(sync) = table.flush_step(first) else {
        panic!("nothing is owed");
    };
    let late = table.flush_begin();
    table.synced(sync);
    assert!(matches!(table.flush_step(first), Flush::Done));
    assert!(matches!(table.flush_step(second), Flush::Done));
    assert!(
        matches!(table.flush_step(late), Flush::Sync(_)),
        "it came after the start"
    );
}

#[test]
fn after_a_failure_nothing_is_sent() {
    for by_sync in [false, true] {
        let mut table = Table::new(LIMITS);
        table.put(0);
        if by_sync {
            let target = table.flush_begin();
            let run = table.send();
            table.written(run);
            let Flush::Sync(sync) = table.flush_step(target) else {
                panic!("nothing is owed");
            };
            table.sync_failed(sync);
            assert!(!matches!(table.flush_step(target), Flush::Done));
        } else {
            let run = table.send();
            table.write_failed(run);
        }
        table.put(9);
        assert!(matches!(table.next(LATER), Action::Wait(None)));
    }
}
