//! What is done at random, and what must be seen.

use std::collections::VecDeque;

use super::random::Random;

/// What often begins or ends a range.
const BLOCK: usize = 4096;
/// Operations that are shown when something is wrong.
const SHOWN: usize = 30;

pub trait Subject {
    fn read(&mut self, at: u64, into: &mut [u8]);
    fn write(&mut self, at: u64, data: &[u8]);
    /// Makes a hole, which reads as zeros. If it is not done nothing has changed.
    fn discard(&mut self, at: u64, len: u64) -> bool;
    /// What is new reads as zeros. If it is not done nothing has changed.
    fn resize(&mut self, size: u64) -> bool;
    fn flush(&mut self);
    /// Closes and opens again.
    fn remount(&mut self);
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// Another one in every run, unless the environment names it.
pub fn seed() -> u64 {
    static SEED: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *SEED.get_or_init(|| {
        let chance = || {
            let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            clock.expect("after 1970").as_nanos() as u64 % 1_000_000_000
        };
        number("E2EBAK_EXERCISE_SEED").unwrap_or_else(chance)
    })
}

pub fn operations_or(usual: usize) -> usize {
    number("E2EBAK_EXERCISE_OPERATIONS").map_or(usual, |count| count as usize)
}

pub struct Exerciser {
    seed: u64,
    random: Random,
    model: Vec<u8>,
    /// Sizes are multiples of it.
    sector: usize,
    /// No resize goes beyond.
    size_max: usize,
    done: usize,
    last: VecDeque<String>,
}

impl Exerciser {
    /// `model` is what the subject holds at first; sizes are multiples of `sector`.
    pub fn new(seed: u64, model: Vec<u8>, sector: u64) -> Self {
        Exerciser {
            seed,
            random: Random(seed),
            sector: sector as usize,
            size_max: model.len(),
            model,
            done: 0,
            last: VecDeque::new(),
        }
    }

    pub fn model(&self) -> &[u8] {
        &self.model
    }

    /// So many operations, and a look at everything.
    pub fn run(&mut self, subject: &mut dyn Subject, operations: usize) {
        println!("E2EBAK_EXERCISE_SEED={}", self.seed);
        for _ in 0..operations {
            self.step(subject);
        }
        subject.remount();
        self.look(subject, 0, self.model.len());
    }

    /// Fails unless this is what must be there.
    pub fn compare(&self, at: usize, seen: &[u8]) {
        let expected = &self.model[at..at + seen.len()];
        let differs = seen.iter().zip(expected).position(|(a, b)| a != b);
        if let Some(place) = differs {
            let last: Vec<&str> = self.last.iter().map(String::as_str).collect();
            panic!(
                "byte {} is {} and must be {}; E2EBAK_EXERCISE_SEED={} E2EBAK_EXERCISE_OPERATIONS={}\n{}",
                at + place,
                seen[place],
                expected[place],
                self.seed,
                self.done,
                last.join("\n")
            );
        }
    }

    fn note(&mut self, what: String) {
        self.done += 1;
        if self.last.len() == SHOWN {
            self.last.pop_front();
        }
        self.last.push_back(what);
    }

    fn step(&mut self, subject: &mut dyn Subject) {
        let (at, len) = self.range();
        match self.random.below(1000) {
            0..350 => {
                self.note(format!("read {len} at {at}"));
                self.look(subject, at, len);
            }
            350..800 => {
                self.note(format!("write {len} at {at}"));
                // Seldom zeros: they are no hole.
                let first = self.random.next() as u8 & self.random.next() as u8;
                let content = (0..len).map(|i| first.wrapping_mul((i / 7) as u8 | 1));
                let data: Vec<u8> = content.collect();
                subject.write(at as u64, &data);
                self.model[at..at + len].copy_from_slice(&data);
            }
            800..900 => {
                self.note(format!("discard {len} at {at}"));
                if subject.discard(at as u64, len as u64) {
                    self.model[at..at + len].fill(0);
                }
            }
            900..920 => {
                let sectors = self.size_max / self.sector;
                let size = (sectors - self.random.below(sectors / 4)) * self.sector;
                self.note(format!("resize to {size}"));
                if subject.resize(size as u64) {
                    self.model.resize(size, 0);
                }
            }
            920..990 => {
                self.note("flush".into());
                subject.flush();
            }
            _ => {
                self.note("remount".into());
                subject.remount();
            }
        }
    }

    fn look(&mut self, subject: &mut dyn Subject, at: usize, len: usize) {
        let mut seen = vec![0x55; len];
        subject.read(at as u64, &mut seen);
        self.compare(at, &seen);
    }

    /// Mostly small and at odd places, often whole sectors, often the same few places again,
    /// sometimes large.
    fn range(&mut self) -> (usize, usize) {
        let size = self.model.len();
        let mut at = self.random.below(size);
        if self.random.below(3) == 0 {
            at = at % 20 * (size / 20);
        }
        let most = [600, 9000, 70_000, 600_000][self.random.below(16).saturating_sub(12)];
        let mut len = 1 + self.random.below(most);
        if self.random.below(3) == 0 {
            at -= at % BLOCK;
            len = len.next_multiple_of(BLOCK);
        }
        (at, len.min(size - at))
    }
}
