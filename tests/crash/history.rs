//! The image at any moment of its recorded life, as a crash of the server could leave it.
//!
//! A block of 4 KiB holds the last version that a finished flush covers, or any version that was
//! sent to the server since, acknowledged or not: the server's kernel writes back what it likes in
//! the order it likes. A flush covers what the server had acknowledged before it was asked.

use std::collections::{BTreeMap, HashMap};

use e2ebak::error::Error;
use e2ebak::luks;
use e2ebak::secret::Secret;
use e2ebak::xts::{Key, Tweak};

use super::log::{Kind, Record};

pub const BLOCK: usize = 4096;

/// Number of a version of some block.
type Version = u32;

pub enum Event {
    Write(Vec<(u64, Version)>),
    Sync(u64),
    Synced(u64),
    Seen(String),
    Written,
}

pub struct History {
    pub events: Vec<Event>,
    /// Plaintext of the volume, ciphertext of the header.
    versions: Vec<Vec<u8>>,
    /// The event by which the server had acknowledged it.
    acknowledged: Vec<Option<usize>>,
    /// First block of the volume.
    pub volume: u64,
    pub size: u64,
}

impl History {
    /// `size` in bytes of the image.
    pub fn new(records: Vec<Record>, passphrase: &str, size: u64) -> History {
        let mut history = History {
            events: Vec::new(),
            versions: Vec::new(),
            acknowledged: Vec::new(),
            volume: 0,
            size,
        };
        let mut latest: HashMap<u64, Version> = HashMap::new();
        let mut blocks_of = Vec::new();
        let mut unanswered: HashMap<u64, Vec<(u64, Version)>> = HashMap::new();
        let mut key = None;
        for record in records {
            let now = history.events.len();
            let event = match record.kind {
                Kind::Write => {
                    let blocks = history.take_in(&record, &mut latest, &mut blocks_of);
                    unanswered.insert(record.tag, blocks.clone());
                    Event::Write(blocks)
                }
                Kind::InFile => {
                    let blocks = history.take_in(&record, &mut latest, &mut blocks_of);
                    for (_, version) in &blocks {
                        history.acknowledged[*version as usize] = Some(now);
                    }
                    Event::Write(blocks)
                }
                Kind::Written => {
                    for (_, version) in unanswered.remove(&record.tag).unwrap_or_default() {
                        history.acknowledged[version as usize] = Some(now);
                    }
                    Event::Written
                }
                Kind::Sync => Event::Sync(record.tag),
                Kind::Synced => Event::Synced(record.tag),
                Kind::Seen => {
                    let text = String::from_utf8(record.data).expect("text");
                    if text == "init" {
                        let read =
                            |block: u64| latest.get(&block).map(|v| &history.versions[*v as usize]);
                        let (header, unlocked) =
                            unlock(read, passphrase, size).expect("the image opens");
                        history.volume = header.segment().offset() / BLOCK as u64;
                        key = Some((header, unlocked));
                    }
                    Event::Seen(text)
                }
            };
            history.events.push(event);
        }
        let (header, key) = key.expect("the image was created");
        let segment = header.segment();
        for (version, block) in blocks_of.into_iter().enumerate() {
            let data = &mut history.versions[version];
            if block < history.volume || data.iter().all(|byte| *byte == 0) {
                continue;
            }
            let offset = (block - history.volume) * BLOCK as u64;
            let tweak = Tweak::at(segment.iv_tweak(), offset);
            key.decrypt(segment.sector_size(), tweak, data)
                .expect("whole sectors");
        }
        history
    }

    /// The versions that a write makes. Of a block that it covers in part it keeps the rest.
    fn take_in(
        &mut self,
        write: &Record,
        latest: &mut HashMap<u64, Version>,
        blocks_of: &mut Vec<u64>,
    ) -> Vec<(u64, Version)> {
        let mut made = Vec::new();
        let mut at = write.offset;
        let mut data = &write.data[..];
        while !data.is_empty() {
            let (block, inside) = (at / BLOCK as u64, (at % BLOCK as u64) as usize);
            let len = data.len().min(BLOCK - inside);
            let mut content = match (len, latest.get(&block)) {
                (BLOCK, _) | (_, None) => vec![0; BLOCK],
                (_, Some(version)) => self.versions[*version as usize].clone(),
            };
            content[inside..inside + len].copy_from_slice(&data[..len]);
            let version = self.versions.len() as Version;
            self.versions.push(content);
            self.acknowledged.push(None);
            blocks_of.push(block);
            latest.insert(block, version);
            made.push((block, version));
            at += len as u64;
            data = &data[len..];
        }
        made
    }

    pub fn version(&self, version: Version) -> &[u8] {
        &self.versions[version as usize]
    }
}

/// Opens the header with our own library, as it is on the server.
pub fn unlock<'a>(
    block: impl Fn(u64) -> Option<&'a Vec<u8>>,
    passphrase: &str,
    size: u64,
) -> Result<(luks::Header, Key), Error> {
    let mut read = |offset: u64, into: &mut [u8]| -> Result<(), Error> {
        for (i, byte) in into.iter_mut().enumerate() {
            let at = offset + i as u64;
            let content = block(at / BLOCK as u64);
            *byte = content.map_or(0, |content| content[(at % BLOCK as u64) as usize]);
        }
        Ok(())
    };
    let loaded = luks::load(&mut read, size)?;
    let passphrase = Secret::new(passphrase.as_bytes().to_vec());
    let (_, key) = loaded.header.unlock(&passphrase, &mut read)?;
    let key = Key::new(key.bytes()).expect("a key for XTS");
    Ok((loaded.header, key))
}

/// A walk through the history, from its beginning on.
pub struct Walk<'a> {
    history: &'a History,
    pub at: usize,
    durable: BTreeMap<u64, Version>,
    loose: BTreeMap<u64, Vec<Version>>,
    asked: HashMap<u64, usize>,
    /// What the test had seen done by now.
    pub seen: Vec<&'a str>,
}

impl<'a> Walk<'a> {
    pub fn new(history: &'a History) -> Self {
        Walk {
            history,
            at: 0,
            durable: BTreeMap::new(),
            loose: BTreeMap::new(),
            asked: HashMap::new(),
            seen: Vec::new(),
        }
    }

    /// To the moment after the event before `to`.
    pub fn go(&mut self, to: usize) {
        for now in self.at..to {
            match &self.history.events[now] {
                Event::Write(blocks) => {
                    for (block, version) in blocks {
                        self.loose.entry(*block).or_default().push(*version);
                    }
                }
                Event::Sync(tag) => drop(self.asked.insert(*tag, now)),
                Event::Synced(tag) => {
                    if let Some(asked) = self.asked.remove(tag) {
                        self.settle(asked);
                    }
                }
                Event::Seen(text) => self.seen.push(text),
                Event::Written => {}
            }
        }
        self.at = to;
    }

    fn settle(&mut self, asked: usize) {
        let covered = |version: &Version| {
            let acknowledged = self.history.acknowledged[*version as usize];
            acknowledged.is_some_and(|at| at < asked)
        };
        let durable = &mut self.durable;
        self.loose.retain(|block, versions| {
            if let Some(last) = versions.iter().rposition(covered) {
                durable.insert(*block, versions[last]);
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }

    /// The last version that was sent. They are numbered in this order.
    pub fn newest(&self) -> Version {
        let loose = self.loose.values().filter_map(|versions| versions.last());
        loose.copied().max().unwrap_or(0)
    }

    /// The version that each block has after a crash now. `choose` takes the versions since the last
    /// flush, the oldest first, and says which to keep, counted from 1; with 0 none.
    pub fn cut(&self, mut choose: impl FnMut(&[Version]) -> usize) -> BTreeMap<u64, Version> {
        let mut image = self.durable.clone();
        for (block, versions) in &self.loose {
            match choose(versions) {
                0 => {}
                chosen => drop(image.insert(*block, versions[chosen - 1])),
            }
        }
        image
    }
}
