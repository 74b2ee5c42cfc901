//! How many sessions a link asks for: decides from figures alone, with no I/O and no clock.
//!
//! One SSH channel carries 2 MiB per round trip, so a long and wide link needs several; a short one
//! is limited by the processors, and more sessions only cost. Nobody knows the link's rate before
//! it is full. So the number is raised while callers wait for room, and taken back where the rate
//! did not rise with it.

use std::time::Duration;

/// Numbers of sessions, each a step. With more than one, bulk data leave the first alone: small
/// reads never wait behind them. With three, one can sync while another writes.
const STEPS: [usize; 3] = [1, 3, 8];

/// The step that is taken wherever there is much to carry.
const STEP_ALWAYS: usize = 1;

/// The step that is taken, and tried, where the round trip is long: at once, since every step takes
/// several round trips.
const STEP_LONG: usize = 2;

/// Below this round trip a session is never full before a processor is.
const SHORT: Duration = Duration::from_millis(2);

/// Callers have to wait for so long, without a pause, before anything is done about it.
const FULL_FOR: Duration = Duration::from_millis(150);

/// A new session needs time to fill, at least this and so many round trips; the rate is measured
/// after that, for as long again.
const SETTLING: Duration = Duration::from_millis(300);
const SETTLING_ROUND_TRIPS: u32 = 6;

/// What a step must bring to be kept.
const GAIN: f64 = 1.08;

/// A step that brought nothing is not tried again for so long.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// Sessions that nobody used for so long are closed.
const IDLE_AFTER: Duration = Duration::from_secs(60);

/// What was seen since the last look.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Time since the link came up.
    pub now: Duration,
    /// Bytes carried since then, both directions.
    pub bytes: u64,
    /// Whether a caller had to wait for room.
    pub full: bool,
    pub sessions: usize,
    pub round_trip: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Trial {
    /// Bytes per second before it.
    rate: f64,
    /// When all sessions were up, and what had been carried once they were filled.
    up: Option<Duration>,
    filled: Option<(Duration, u64)>,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Growth {
    most: usize,
    pinned: bool,
    step: usize,
    trial: Option<Trial>,
    not_before: Duration,
    full_since: Option<(Duration, u64)>,
    last_used: Duration,
    last_bytes: u64,
}

impl Growth {
    /// At most `most` sessions; exactly so many if `pinned`.
    pub fn new(most: usize, pinned: bool) -> Self {
        Growth {
            most: most.max(1),
            pinned,
            step: 0,
            trial: None,
            not_before: Duration::ZERO,
            full_since: None,
            last_used: Duration::ZERO,
            last_bytes: 0,
        }
    }

    pub fn wanted(&self) -> usize {
        match self.pinned {
            true => self.most,
            false => STEPS.get(self.step).copied().unwrap_or(1).min(self.most),
        }
    }

    /// The server, or the way there, bears no more than `sessions`.
    pub fn refused(&mut self, sessions: usize, now: Duration) {
        self.trial = None;
        while self.step > 0 && self.wanted() > sessions.max(1) {
            self.step -= 1;
        }
        self.not_before = now + RETRY_AFTER;
    }

    pub fn look(&mut self, sample: Sample) {
        if sample.bytes > self.last_bytes + 4096 {
            self.last_used = sample.now;
        }
        self.last_bytes = sample.bytes;
        if sample.now > self.last_used + IDLE_AFTER {
            self.step = 0;
            self.trial = None;
        }
        if !sample.full {
            self.full_since = None;
            return;
        }
        let (since, bytes) = *self.full_since.get_or_insert((sample.now, sample.bytes));
        if self.trial.is_some() {
            self.judge(sample);
            return;
        }
        let full_for = sample.now.saturating_sub(since);
        let long = sample.round_trip.is_some_and(|time| time > SHORT);
        let next = match long {
            true => STEP_LONG,
            false => STEP_ALWAYS,
        };
        let may = next > self.step && self.wanted() < self.most;
        if full_for < FULL_FOR || !may {
            return;
        }
        if sample.now < self.not_before || sample.sessions < self.wanted() {
            return;
        }
        let rate = (sample.bytes - bytes) as f64 / full_for.as_secs_f64();
        self.step = next;
        self.full_since = None;
        if next > STEP_ALWAYS {
            self.trial = Some(Trial {
                rate,
                up: None,
                filled: None,
            });
        }
    }

    fn judge(&mut self, sample: Sample) {
        let wanted = self.wanted();
        let Some(trial) = &mut self.trial else { return };
        if sample.sessions < wanted {
            return;
        }
        let round_trips = sample.round_trip.unwrap_or_default() * SETTLING_ROUND_TRIPS;
        let settling = SETTLING.max(round_trips);
        let up = *trial.up.get_or_insert(sample.now);
        if sample.now < up + settling {
            return;
        }
        let (begun, bytes) = *trial.filled.get_or_insert((sample.now, sample.bytes));
        let took = sample.now.saturating_sub(begun);
        if took < settling {
            return;
        }
        let rate = (sample.bytes - bytes) as f64 / took.as_secs_f64();
        if rate < trial.rate * GAIN {
            self.step = STEP_ALWAYS;
            self.not_before = sample.now + RETRY_AFTER;
        }
        self.trial = None;
        self.full_since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(50);

    /// Runs a link on which `rate` tells bytes per second from the number of sessions.
    fn run(growth: &mut Growth, round_trip_ms: u64, seconds: u64, rate: impl Fn(usize) -> f64) {
        let (mut now, mut bytes) = (growth.last_used, growth.last_bytes);
        let end = now + Duration::from_secs(seconds);
        while now < end {
            now += TICK;
            bytes += (rate(growth.wanted()) * TICK.as_secs_f64()) as u64;
            growth.look(Sample {
                now,
                bytes,
                full: rate(1) > 0.0,
                sessions: growth.wanted(),
                round_trip: Some(Duration::from_millis(round_trip_ms)),
            });
        }
    }

    #[test]
    fn a_long_wide_link_gets_all() {
        let mut growth = Growth::new(8, false);
        run(&mut growth, 50, 6, |sessions| sessions as f64 * 40e6);
        assert_eq!(growth.wanted(), 8);
    }

    #[test]
    fn a_narrow_link_keeps_three_and_a_short_one_too() {
        let mut narrow = Growth::new(8, false);
        run(&mut narrow, 50, 20, |_| 12e6);
        assert_eq!(narrow.wanted(), 3);
        let mut short = Growth::new(8, false);
        run(&mut short, 0, 20, |sessions| sessions as f64 * 300e6);
        assert_eq!(short.wanted(), 3);
    }

    #[test]
    fn an_idle_link_goes_back_to_one() {
        let mut growth = Growth::new(8, false);
        run(&mut growth, 50, 6, |sessions| sessions as f64 * 40e6);
        run(&mut growth, 50, 0, |_| 0.0);
        let mut now = growth.last_used;
        for _ in 0..30 {
            now += Duration::from_secs(3);
            let sample = Sample {
                now,
                bytes: growth.last_bytes,
                full: false,
                sessions: 8,
                round_trip: None,
            };
            growth.look(sample);
        }
        assert_eq!(growth.wanted(), 1);
    }

    #[test]
    fn a_server_that_refuses_more_is_left_alone_for_a_while() {
        let mut growth = Growth::new(8, false);
        run(&mut growth, 50, 1, |sessions| sessions as f64 * 40e6);
        assert!(growth.wanted() >= 3);
        growth.refused(1, growth.last_used);
        assert_eq!(growth.wanted(), 1);
        run(&mut growth, 50, 30, |sessions| sessions as f64 * 40e6);
        assert_eq!(growth.wanted(), 1);
        run(&mut growth, 50, 60, |sessions| sessions as f64 * 40e6);
        assert!(growth.wanted() > 1);
    }

    #[test]
    fn a_pinned_number_stays() {
        let mut growth = Growth::new(4, true);
        assert_eq!(growth.wanted(), 4);
        run(&mut growth, 50, 5, |_| 1e6);
        assert_eq!(growth.wanted(), 4);
    }
}
