//! The image at any moment of its recorded life, as a crash of the server could leave it.
//!
//! A block of 4 KiB holds the last version that a finished flush covers, or any version that was
//! sent to the server since, acknowledged or not: the server's kernel writes back what it likes in
//! the order it likes. A flush covers what the server had acknowledged before it was asked.
//!
//! A file that took the image's name by a rename may be lost with that name until a flush of it that
//! was asked for later is finished: then the image is what it was before.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use e2ebak::error::Error;
use e2ebak::luks;
use e2ebak::secret::Secret;
use e2ebak::xts::{Key, Tweak};

use super::log::{Kind, Record, Which};

pub const BLOCK: usize = 4096;

/// Number of a version of some block.
type Version = u32;

pub enum Event {
    Write(Which, Vec<(u64, Version)>),
    Sync(u64),
    Synced(u64, Which),
    Created(Which),
    Renamed,
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
    pub fn new(records: &[Record], passphrase: &str, size: u64) -> History {
        let mut history = History {
            events: Vec::new(),
            versions: Vec::new(),
            acknowledged: Vec::new(),
            volume: 0,
            size,
        };
        let mut latest: [HashMap<u64, Version>; 2] = Default::default();
        let mut blocks_of = Vec::new();
        let mut unanswered: HashMap<u64, Vec<(u64, Version)>> = HashMap::new();
        let mut key = None;
        for record in records {
            let now = history.events.len();
            let event = match record.kind {
                Kind::Write | Kind::Copied => {
                    let which = record.which as usize;
                    let blocks = match record.kind {
                        Kind::Write => history.take_in(record, &mut latest[which], &mut blocks_of),
                        _ => history.copy(record.range(), &mut latest, &mut blocks_of),
                    };
                    unanswered.insert(record.tag, blocks.clone());
                    Event::Write(record.which, blocks)
                }
                Kind::InFile | Kind::Punched => {
                    let latest = &mut latest[Which::Image as usize];
                    let blocks = match record.kind {
                        Kind::InFile => history.take_in(record, latest, &mut blocks_of),
                        _ => history.punch(record.range(), latest, &mut blocks_of),
                    };
                    for (_, version) in &blocks {
                        history.acknowledged[*version as usize] = Some(now);
                    }
                    Event::Write(Which::Image, blocks)
                }
                Kind::Created => {
                    latest[record.which as usize].clear();
                    Event::Created(record.which)
                }
                Kind::Renamed => {
                    let [image, lean] = &mut latest;
                    *image = std::mem::take(lean);
                    Event::Renamed
                }
                Kind::Written => {
                    for (_, version) in unanswered.remove(&record.tag).unwrap_or_default() {
                        history.acknowledged[version as usize] = Some(now);
                    }
                    Event::Written
                }
                Kind::Sync => Event::Sync(record.tag),
                Kind::Synced => Event::Synced(record.tag, record.which),
                Kind::Seen => {
                    let text = String::from_utf8(record.data.clone()).expect("text");
                    if text == "init" {
                        let image = &latest[Which::Image as usize];
                        let read =
                            |block: u64| image.get(&block).map(|v| &history.versions[*v as usize]);
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
            let version = self.add(block, content, blocks_of);
            latest.insert(block, version);
            made.push((block, version));
            at += len as u64;
            data = &data[len..];
        }
        made
    }

    fn add(&mut self, block: u64, content: Vec<u8>, blocks_of: &mut Vec<u64>) -> Version {
        self.versions.push(content);
        self.acknowledged.push(None);
        blocks_of.push(block);
        (self.versions.len() - 1) as Version
    }

    /// What the lean copy gets of the image. The holes in it are zeros already.
    fn copy(
        &mut self,
        range: Range<u64>,
        latest: &mut [HashMap<u64, Version>; 2],
        blocks_of: &mut Vec<u64>,
    ) -> Vec<(u64, Version)> {
        let [image, lean] = latest;
        let mut made = Vec::new();
        for block in blocks(range) {
            if let Some(version) = image.get(&block) {
                let content = self.versions[*version as usize].clone();
                let version = self.add(block, content, blocks_of);
                lean.insert(block, version);
                made.push((block, version));
            }
        }
        made
    }

    /// What was written there is zeros now.
    fn punch(
        &mut self,
        range: Range<u64>,
        latest: &mut HashMap<u64, Version>,
        blocks_of: &mut Vec<u64>,
    ) -> Vec<(u64, Version)> {
        let mut made = Vec::new();
        for block in blocks(range) {
            if let Some(version) = latest.get_mut(&block) {
                *version = self.add(block, vec![0; BLOCK], blocks_of);
                made.push((block, *version));
            }
        }
        made
    }

    pub fn version(&self, version: Version) -> &[u8] {
        &self.versions[version as usize]
    }
}

fn blocks(range: Range<u64>) -> Range<u64> {
    let block = BLOCK as u64;
    assert!(range.start.is_multiple_of(block), "{range:?}");
    range.start / block..range.end.div_ceil(block)
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

/// What one file may hold after a crash.
#[derive(Default)]
struct Content {
    durable: BTreeMap<u64, Version>,
    loose: BTreeMap<u64, Vec<Version>>,
}

/// A walk through the history, from its beginning on.
pub struct Walk<'a> {
    history: &'a History,
    pub at: usize,
    image: Content,
    lean: Content,
    /// The image before a rename that may still be lost, and the event of that.
    replaced: Option<(Content, usize)>,
    asked: HashMap<u64, usize>,
    /// What the test had seen done by now.
    pub seen: Vec<&'a str>,
}

impl<'a> Walk<'a> {
    pub fn new(history: &'a History) -> Self {
        Walk {
            history,
            at: 0,
            image: Content::default(),
            lean: Content::default(),
            replaced: None,
            asked: HashMap::new(),
            seen: Vec::new(),
        }
    }

    fn file(&mut self, which: Which) -> &mut Content {
        match which {
            Which::Image => &mut self.image,
            Which::Lean => &mut self.lean,
        }
    }

    /// To the moment after the event before `to`.
    pub fn go(&mut self, to: usize) {
        let history = self.history;
        for now in self.at..to {
            match &history.events[now] {
                Event::Write(which, blocks) => {
                    let file = self.file(*which);
                    for (block, version) in blocks {
                        file.loose.entry(*block).or_default().push(*version);
                    }
                }
                Event::Sync(tag) => drop(self.asked.insert(*tag, now)),
                Event::Synced(tag, which) => {
                    if let Some(asked) = self.asked.remove(tag) {
                        self.file(*which).settle(asked, history);
                        let renamed = |at: usize| *which == Which::Image && at < asked;
                        self.replaced.take_if(|(_, at)| renamed(*at));
                    }
                }
                Event::Created(which) => *self.file(*which) = Content::default(),
                Event::Renamed => {
                    let lean = std::mem::take(&mut self.lean);
                    let image = std::mem::replace(&mut self.image, lean);
                    self.replaced = Some((image, now));
                }
                Event::Seen(text) => self.seen.push(text),
                Event::Written => {}
            }
        }
        self.at = to;
    }

    /// The last version that was sent. They are numbered in this order.
    pub fn newest(&self) -> Version {
        let loose = self.image.loose.values();
        let newest = loose.filter_map(|versions| versions.last());
        newest.copied().max().unwrap_or(0)
    }

    /// The version that each block has after a crash now. `choose` takes the versions since the last
    /// flush, the oldest first, and says which to keep, counted from 1; with 0 none. Where a rename
    /// may be lost, `is_lost` says whether it is.
    pub fn cut(
        &self,
        is_lost: bool,
        mut choose: impl FnMut(&[Version]) -> usize,
    ) -> BTreeMap<u64, Version> {
        let content = match &self.replaced {
            Some((image, _)) if is_lost => image,
            _ => &self.image,
        };
        let mut image = content.durable.clone();
        for (block, versions) in &content.loose {
            match choose(versions) {
                0 => {}
                chosen => drop(image.insert(*block, versions[chosen - 1])),
            }
        }
        image
    }
}

impl Content {
    fn settle(&mut self, asked: usize, history: &History) {
        let covered = |version: &Version| {
            let acknowledged = history.acknowledged[*version as usize];
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
}
