//! An image whose every byte the server has chosen: opened, unlocked, read, written, discarded,
//! flushed, closed, and opened once more.

use std::sync::Arc;

use e2ebak::device::Device;
use e2ebak::error::{Error, Kind, Result};
use e2ebak::image::{self, Volume};
use e2ebak::layer::memory::Memory;
use e2ebak::remote::{Access, Space, Store, Traffic};
use e2ebak::secret::Secret;

use super::input::Input;
use super::sample::{self, Price, SIZE};
use super::steps;

pub fn image(data: &[u8]) {
    let mut input = Input(data);
    let access = match input.u8() % 4 {
        0 => Access::ReadOnly,
        _ => Access::ReadWrite,
    };
    let mut bytes = sample::image();
    let len = match input.u8() {
        0 => SIZE,
        cut => SIZE * usize::from(cut) / 256,
    };
    sample::spoil(&mut bytes, 0..SIZE, &mut input);
    bytes.truncate(len);
    let memory = Arc::new(Memory::new(len as u64));
    memory.write_all_at(&bytes, 0).expect("as large");
    let store = OneImage(memory);

    let Some(volume) = open(&store, access) else {
        return;
    };
    let device = volume.device();
    assert!(device.size() <= len as u64);
    let mut model = steps::content(&*device);
    steps::run(&*device, &mut model, 0, &mut input);
    drop(device);
    volume.close().expect("nothing fails below");
    match access {
        Access::ReadOnly => assert!(steps::content(&*store.0) == bytes, "it was written to"),
        Access::ReadWrite => {
            let again = open(&store, Access::ReadOnly).expect("it opened before");
            assert!(
                steps::content(&*again.device()) == model,
                "the volume differs"
            );
            again.close().expect("nothing fails below");
        }
    }
}

fn open(store: &OneImage, access: Access) -> Option<Volume> {
    let sealed = image::inspect(store, access).ok()?;
    let prices = sample::prices(sealed.header());
    if prices.contains(&Price::Dear) {
        return None;
    }
    let key = Secret::new(sample::PASSPHRASE.to_vec());
    let unlocked = sealed.unlock(&key).ok()?;
    // A key that the digest has confirmed, and a segment that was judged: nothing is left to fail.
    Some(sealed.open(unlocked).expect("it opens").volume)
}

struct OneImage(Arc<Memory>);

fn nothing<T>() -> Result<T> {
    Err(Error::new(Kind::Unsupported, "there is only the image"))
}

impl Store for OneImage {
    fn open(&self, _: Access) -> Result<Arc<dyn Device>> {
        Ok(self.0.clone())
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
        Ok(None)
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
