//! Files in memory, with devices that break and lose power together.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use e2ebak::device::Device;
use e2ebak::error::{Error, Kind, Result};
use e2ebak::layer::fault::{Faults, Faulty, Operation};
use e2ebak::layer::memory::Memory;
use e2ebak::remote::{Access, Space, Store, Traffic};

#[derive(Default)]
pub struct Shelf {
    pub faults: Arc<Faults>,
    images: Mutex<BTreeMap<String, Arc<Faulty>>>,
    sides: Mutex<BTreeMap<String, Vec<u8>>>,
}

impl Shelf {
    pub fn over(faults: &Arc<Faults>) -> Arc<Shelf> {
        Arc::new(Shelf {
            faults: faults.clone(),
            ..Shelf::default()
        })
    }

    pub fn store(self: &Arc<Self>, name: &str) -> Arc<dyn Store> {
        Arc::new(OnShelf {
            shelf: self.clone(),
            name: name.into(),
        })
    }

    pub fn image(&self, name: &str) -> Option<Arc<Faulty>> {
        self.images.lock().unwrap().get(name).cloned()
    }

    /// The power goes and comes back; nothing fails any more. What names stand for is never lost.
    pub fn cut(&self, unit: u64, seed: u64) {
        for (seed, image) in (seed << 8..).zip(self.images.lock().unwrap().values()) {
            image.cut(unit, seed).expect("memory");
        }
        self.faults.heal();
        // The holder of a lease has died with it.
        self.sides.lock().unwrap().clear();
    }

    fn is_there(&self, name: &str) -> bool {
        self.images.lock().unwrap().contains_key(name)
    }
}

struct OnShelf {
    shelf: Arc<Shelf>,
    name: String,
}

impl OnShelf {
    fn begin(&self) -> Result<()> {
        self.shelf.faults.begin(Operation::Name)
    }

    fn named(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.name)
    }
}

impl Store for OnShelf {
    fn open(&self, _: Access) -> Result<Arc<dyn Device>> {
        self.begin()?;
        match self.shelf.image(&self.name) {
            Some(image) => Ok(image),
            None => Err(Error::new(Kind::NoImage, "there is no such image")),
        }
    }

    fn create(&self, size: u64) -> Result<Arc<dyn Device>> {
        self.begin()?;
        if self.shelf.is_there(&self.name) {
            return Err(Error::new(Kind::Exists, "there is one"));
        }
        let memory = Arc::new(Memory::new(size));
        let image = Arc::new(Faulty::volatile(memory, self.shelf.faults.clone()));
        let mut images = self.shelf.images.lock().unwrap();
        images.insert(self.name.clone(), image.clone());
        Ok(image)
    }

    fn remove(&self) -> Result<()> {
        self.begin()?;
        match self.shelf.images.lock().unwrap().remove(&self.name) {
            Some(_) => Ok(()),
            None => Err(Error::new(Kind::NoImage, "there is no such image")),
        }
    }

    fn create_side(&self, suffix: &str, content: &[u8]) -> Result<()> {
        self.begin()?;
        let mut sides = self.shelf.sides.lock().unwrap();
        if sides.contains_key(&self.named(suffix)) {
            return Err(Error::new(Kind::Exists, "there is one"));
        }
        sides.insert(self.named(suffix), content.to_vec());
        Ok(())
    }

    fn read_side(&self, suffix: &str) -> Result<Option<Vec<u8>>> {
        self.begin()?;
        let sides = self.shelf.sides.lock().unwrap();
        Ok(sides.get(&self.named(suffix)).cloned())
    }

    fn replace_side(&self, suffix: &str, content: &[u8]) -> Result<()> {
        self.begin()?;
        let mut sides = self.shelf.sides.lock().unwrap();
        sides.insert(self.named(suffix), content.to_vec());
        Ok(())
    }

    fn remove_side(&self, suffix: &str) -> Result<()> {
        self.begin()?;
        let mut sides = self.shelf.sides.lock().unwrap();
        sides.remove(&self.named(suffix));
        Ok(())
    }

    fn beside(&self, suffix: &str) -> Result<Arc<dyn Store>> {
        Ok(self.shelf.store(&self.named(suffix)))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.begin()?;
        let mut images = self.shelf.images.lock().unwrap();
        match images.remove(&self.named(from)) {
            Some(image) => {
                images.insert(self.named(to), image);
                Ok(())
            }
            None => Err(Error::new(Kind::NotFound, "there is no such image")),
        }
    }

    fn space(&self) -> Result<Option<Space>> {
        Ok(None)
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}
