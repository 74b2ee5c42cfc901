//! Limits on bytes per second, shared by all streams of a dial.
//!
//! Every piece that has been moved is charged to a common account that fills at the rate; who
//! overdraws it waits until it is even again. Those who wait are served in the order in which they
//! came, one small piece each, so a stream with little to say is not behind a bulk stream for
//! longer than one piece of each. A link that was idle has some credit, and is not delayed.
//!
//! What is charged is SFTP; the encryption of SSH adds about one part in a hundred. A server sends
//! up to what fits its window (2 MiB per stream) before it feels our slower reading.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Dial, Occasion, STREAMS_MAX, Stream};
use crate::error::Result;
use crate::units::{Bytes, KIB};

/// Bytes per second; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    pub upload: Option<u64>,
    pub download: Option<u64>,
}

/// The lowest rate. With less, one of [`STREAMS_MAX`] streams would need more than the 30 s after
/// which a silent server is given up for one packet of 128 KiB.
pub const RATE_MIN: u64 = 64 * KIB;

/// Pieces per second at the rate, and the bounds of a piece.
const PIECES: u64 = 64;
const PIECE_MIN: u64 = KIB;
const PIECE_MAX: u64 = 64 * KIB;

/// The time whose bytes a link that was idle may move at once.
const CREDIT: Duration = Duration::from_millis(50);

const _: () = assert!(128 * KIB * STREAMS_MAX as u64 / RATE_MIN < 30);

/// Reads a rate: bytes per second, as sizes are written.
pub fn parse_rate(text: &str) -> std::result::Result<u64, String> {
    let Bytes(rate) = text.strip_suffix("/s").unwrap_or(text).parse()?;
    match rate {
        RATE_MIN.. => Ok(rate),
        _ => Err(format!(
            "{rate} bytes per second are too few, {} is the least; write 20M for 20 MiB per second",
            Bytes(RATE_MIN)
        )),
    }
}

/// The same dial with its streams held to `limit`.
pub fn limited(dial: Arc<dyn Dial>, limit: Limit) -> Arc<dyn Dial> {
    if limit == Limit::default() {
        return dial;
    }
    let account = |rate: Option<u64>| rate.map(|rate| Arc::new(Account::new(rate)));
    Arc::new(LimitedDial {
        dial,
        upload: account(limit.upload),
        download: account(limit.download),
    })
}

struct LimitedDial {
    dial: Arc<dyn Dial>,
    upload: Option<Arc<Account>>,
    download: Option<Arc<Account>>,
}

impl Dial for LimitedDial {
    fn dial(&self, occasion: Occasion) -> Result<Stream> {
        let mut stream = self.dial.dial(occasion)?;
        if let Some(account) = self.download.clone() {
            let inner = stream.reader;
            stream.reader = Box::new(LimitedReader { inner, account });
        }
        if let Some(account) = self.upload.clone() {
            let inner = stream.writer;
            stream.writer = Box::new(LimitedWriter { inner, account });
        }
        Ok(stream)
    }

    fn streams_max(&self) -> usize {
        self.dial.streams_max()
    }

    fn patience(&self) -> Duration {
        self.dial.patience()
    }
}

/// What was moved and what may be.
struct Account {
    rate: u64,
    /// When all that was moved is paid for.
    even: Mutex<Instant>,
}

impl Account {
    fn new(rate: u64) -> Self {
        Account {
            rate: rate.max(1),
            even: Mutex::new(Instant::now()),
        }
    }

    /// The most bytes that are moved at once.
    fn piece(&self) -> usize {
        // At most PIECE_MAX, so it fits.
        (self.rate / PIECES).clamp(PIECE_MIN, PIECE_MAX) as usize
    }

    /// Charges bytes that were moved, and tells how long to wait.
    fn charge(&self, bytes: usize, now: Instant) -> Duration {
        let price = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        let mut even = self.even.lock().unwrap_or_else(PoisonError::into_inner);
        let with_credit = now.checked_sub(CREDIT).unwrap_or(now);
        *even = (*even).max(with_credit) + price;
        even.saturating_duration_since(now)
    }

    fn pay(&self, bytes: usize) {
        let wait = self.charge(bytes, Instant::now());
        if !wait.is_zero() {
            thread::sleep(wait);
        }
    }
}

struct LimitedReader {
    inner: Box<dyn Read + Send>,
    account: Arc<Account>,
}

impl Read for LimitedReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(self.account.piece());
        let got = self.inner.read(&mut buf[..len])?;
        self.account.pay(got);
        Ok(got)
    }
}

struct LimitedWriter {
    inner: Box<dyn Write + Send>,
    account: Arc<Account>,
}

impl Write for LimitedWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let len = data.len().min(self.account.piece());
        let written = self.inner.write(&data[..len])?;
        self.account.pay(written);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::MIB;

    const RATE: u64 = MIB;

    /// The clock of a test: every stream moves pieces and waits as it is told. Gives what each has
    /// moved within `time`, and the longest that each had to wait.
    fn run(account: &Account, sizes: &[usize], time: Duration) -> Vec<(u64, Duration)> {
        let begin = Instant::now();
        let mut streams = vec![(begin, 0, Duration::ZERO); sizes.len()];
        loop {
            let next = (0..sizes.len())
                .min_by_key(|n| streams[*n].0)
                .expect("a stream");
            let (now, moved, longest) = &mut streams[next];
            if now.duration_since(begin) >= time {
                break;
            }
            let wait = account.charge(sizes[next], *now);
            *now += wait.max(Duration::from_nanos(1));
            *moved += sizes[next] as u64;
            *longest = (*longest).max(wait);
        }
        streams
            .into_iter()
            .map(|(_, moved, longest)| (moved, longest))
            .collect()
    }

    #[test]
    fn the_sum_of_all_streams_keeps_to_the_rate() {
        let account = Account::new(RATE);
        let piece = account.piece();
        let moved = run(&account, &[piece; 8], Duration::from_secs(10));
        let sum: u64 = moved.iter().map(|(bytes, _)| bytes).sum();
        let most = RATE * 10 + RATE / 20 + 8 * piece as u64;
        assert!(
            (RATE * 10 - 8 * piece as u64..=most).contains(&sum),
            "{sum}"
        );
        // And each has its share.
        for (bytes, _) in moved {
            assert!(
                bytes.abs_diff(sum / 8) <= 2 * piece as u64,
                "{bytes} of {sum}"
            );
        }
    }

    #[test]
    fn a_small_request_waits_for_one_piece_of_each_other() {
        let account = Account::new(RATE);
        let piece = account.piece();
        let moved = run(
            &account,
            &[piece, piece, piece, 100],
            Duration::from_secs(2),
        );
        let bound = Duration::from_secs_f64(4.0 * piece as f64 / RATE as f64);
        assert!(moved[3].1 <= bound, "{:?} of {bound:?}", moved[3].1);
    }

    #[test]
    fn an_idle_link_is_not_delayed() {
        let account = Account::new(RATE);
        let mut now = Instant::now() + Duration::from_secs(1);
        for _ in 0..1000 {
            assert_eq!(account.charge(10_000, now), Duration::ZERO);
            now += Duration::from_millis(20);
        }
    }

    #[test]
    fn a_rate_is_bytes_per_second() {
        assert_eq!(parse_rate("20M"), Ok(20 * MIB));
        assert_eq!(parse_rate("1.5MB/s"), Ok(1_500_000));
        for text in ["", "20", "63K", "fast", "0"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}
