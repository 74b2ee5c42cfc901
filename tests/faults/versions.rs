//! What a volume may hold after a crash: of each unit the bytes of the last flush that returned, or
//! any that were written later.

use std::collections::BTreeMap;

pub struct Versions {
    /// What reads show while nothing fails.
    pub now: Vec<u8>,
    unit: usize,
    /// Of units that have changed since the last flush, what they held from then on.
    older: BTreeMap<usize, Vec<Vec<u8>>>,
    /// The size before a resize that has not returned.
    size_before: Option<usize>,
}

impl Versions {
    pub fn new(size: usize, unit: usize) -> Versions {
        Versions {
            now: vec![0; size],
            unit,
            older: BTreeMap::new(),
            size_before: None,
        }
    }

    /// To be told before it is done: a write that fails may be there in part.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        for unit in at / self.unit..(at + data.len()).div_ceil(self.unit) {
            let end = ((unit + 1) * self.unit).min(self.now.len());
            let held = self.now[unit * self.unit..end].to_vec();
            self.older.entry(unit).or_default().push(held);
        }
        self.now[at..at + data.len()].copy_from_slice(data);
    }

    /// A flush has returned.
    pub fn flushed(&mut self) {
        self.older.clear();
    }

    /// To be told before it is done; sizes are multiples of the unit.
    pub fn resize(&mut self, size: usize) {
        self.size_before = Some(self.now.len());
        self.now.resize(size, 0);
        self.older.retain(|unit, _| unit * self.unit < size);
    }

    pub fn resized(&mut self) {
        self.size_before = None;
    }

    /// Whether this may be there after a crash; if not, where and what.
    pub fn admits(&self, seen: &[u8]) -> Result<(), String> {
        if seen.len() != self.now.len() && Some(seen.len()) != self.size_before {
            return Err(format!("the size is {}", seen.len()));
        }
        let common = seen.len().min(self.now.len());
        let units = seen[..common].chunks(self.unit).enumerate();
        for (number, unit) in units {
            let at = number * self.unit;
            let older = self.older.get(&number).into_iter().flatten();
            let mut may = older
                .map(Vec::as_slice)
                .chain([&self.now[at..at + unit.len()]]);
            if !may.any(|version| version == unit) {
                return Err(format!("at {at} there is {:?}...", &unit[..8]));
            }
        }
        Ok(())
    }
}
