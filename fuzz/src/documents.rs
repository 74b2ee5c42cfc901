//! Documents that others have written: completion records, the lease, and what our two processes
//! say to each other. There is no configuration file.

use std::sync::Arc;

use e2ebak::device::Device;
use e2ebak::error::{Error, Kind, Result};
use e2ebak::remote::lease::Lease;
use e2ebak::remote::{Access, Space, Store, Traffic};
use e2ebak::session::wire;
use e2ebak::snapshot::{Catalogue, Files, Record};

use super::input::Input;

const ID: &str = "2026-11-21T02-14-05Z";

pub fn documents(data: &[u8]) {
    let mut input = Input(data);
    match input.u8() % 6 {
        0 => record(input.rest()),
        1 => lease(input.rest()),
        2 => drop(wire::receive::<wire::Order>(&mut input.rest())),
        3 => drop(wire::receive::<wire::Report>(&mut input.rest())),
        4 => key(input.rest()),
        _ => catalogue(input),
    }
}

fn record(bytes: &[u8]) {
    let Ok(mut record) = Record::parse(bytes, ID) else {
        return;
    };
    assert_eq!(record.id, ID);
    // A fraction may lose its last bit on its way.
    record.duration_seconds = 0.0;
    let again = Record::parse(&record.to_json(), ID).expect("was good before");
    assert_eq!(again, record);
}

fn lease(bytes: &[u8]) {
    if let Ok(holder) = Lease::peek(&OneFile(bytes)) {
        let holder = holder.expect("the file is there");
        assert!(!holder.describe().contains(char::is_control));
        holder.is_dead();
    }
}

fn key(mut bytes: &[u8]) {
    let all = bytes;
    if let Ok(key) = wire::receive_key(&mut bytes) {
        assert_eq!(key.bytes(), &all[4..4 + key.len()]);
    }
}

/// A directory of the input's names, in which every file has the input's rest.
fn catalogue(mut input: Input) {
    struct Directory {
        names: Vec<Vec<u8>>,
        content: Vec<u8>,
    }
    impl Files for Directory {
        fn names(&mut self, _: &str) -> Result<Vec<Vec<u8>>> {
            Ok(self.names.clone())
        }
        fn read(&mut self, _: &str) -> Result<Vec<u8>> {
            Ok(self.content.clone())
        }
    }
    let names = (0..input.u8() % 8)
        .map(|_| input.string().to_vec())
        .collect();
    let content = input.rest().to_vec();
    let catalogue = Catalogue::load(&mut Directory { names, content }).expect("it reads");
    assert!(catalogue.complete.is_sorted_by_key(|found| found.id));
    for found in &catalogue.complete {
        let by_name = catalogue.find(&found.id.to_string()).expect("is there");
        assert_eq!(by_name.id, found.id);
    }
    assert!(catalogue.latest().map(|found| found.id) <= catalogue.newest_id());
}

/// A store of side files, all alike.
struct OneFile<'a>(&'a [u8]);

fn nothing<T>() -> Result<T> {
    Err(Error::new(Kind::Unsupported, "there is only one file"))
}

impl Store for OneFile<'_> {
    fn open(&self, _: Access) -> Result<Arc<dyn Device>> {
        nothing()
    }
    fn create(&self, _: u64) -> Result<Arc<dyn Device>> {
        nothing()
    }
    fn remove(&self) -> Result<()> {
        nothing()
    }
    fn create_side(&self, _: &str, _: &[u8]) -> Result<()> {
        nothing()
    }
    fn read_side(&self, _: &str) -> Result<Option<Vec<u8>>> {
        Ok(Some(self.0.to_vec()))
    }
    fn replace_side(&self, _: &str, _: &[u8]) -> Result<()> {
        nothing()
    }
    fn remove_side(&self, _: &str) -> Result<()> {
        nothing()
    }
    fn space(&self) -> Result<Option<Space>> {
        Ok(None)
    }
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}
