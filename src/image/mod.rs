//! An image as a volume: dialled, inspected, unlocked, stacked; and created.
//!
//! ```text
//! Cache                 partial sectors, write-back, read-ahead
//!   Overlay             read-only sessions: a journal is replayed in memory only
//!     Crypt             sectors of the LUKS2 segment
//!       Store::open     the file: local, or over SFTP
//! ```

mod copy;
mod create;
mod data;
mod parallel;
mod quota;
mod server_shell;
mod trim;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use copy::{Copied, CopyJob, PART, SUMS, copy};
pub use create::{Created, Creation, create};
pub use data::{Read as DataRead, Reading, Subset, read as read_data};
pub use quota::{Quota, quota};
pub use server_shell::{data_ranges, stored_bytes};
pub use trim::{Backend, Job as TrimJob, Trimmed, trim};

use crate::device::Device;
use crate::error::{Attempt, Error, Kind, Result};
use crate::layer::cache::readahead;
use crate::layer::crypt::Segment;
use crate::layer::{Cache, Crypt, Overlay, cache};
use crate::link::Dial;
use crate::link::built_in::{BuiltInDial, BuiltInOptions};
use crate::link::command::CommandDial;
use crate::link::limit::{Limit, limited};
use crate::link::ssh::{SshDial, SshOptions};
use crate::location::{Location, Server};
use crate::luks::{self, Header, Loaded};
use crate::remote::engine::Bounds;
use crate::remote::{self, Access, Store};
use crate::secret::Secret;
use crate::xts;

/// How the server is reached.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LinkSettings {
    pub ssh: Ssh,
    /// Where the location names none.
    pub port: Option<u16>,
    pub identity_file: Option<PathBuf>,
    /// Another configuration file of ssh.
    pub ssh_config: Option<PathBuf>,
    /// Each is passed to ssh as `-o OPTION`.
    pub ssh_options: Vec<String>,
    /// Runs instead of ssh; split into words as a shell does.
    pub command: Option<String>,
    pub limit: Limit,
    /// Whether ssh may ask somebody; else it runs in batch mode.
    pub interactive: bool,
    /// How many SFTP sessions to use; as many as the link asks for if `None`.
    pub channels: Option<usize>,
    /// How long a broken link is dialled again before reads and writes fail.
    pub io_deadline: Option<Duration>,
    /// How long writes of a broken connection are taken to be able to arrive.
    pub late_writes: Option<Duration>,
}

impl LinkSettings {
    fn bounds(&self) -> Bounds {
        let usual = Bounds::default();
        Bounds {
            sessions: self.channels,
            io_deadline: self.io_deadline.unwrap_or(usual.io_deadline),
            late_after_end: self.late_writes.unwrap_or(usual.late_after_end),
            late_after_silence: self.late_writes.unwrap_or(usual.late_after_silence),
            ..usual
        }
    }
}

/// Who speaks SSH.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ssh {
    /// The `ssh` of the system, with the user's configuration.
    #[default]
    System,
    /// We do.
    BuiltIn,
}

impl LinkSettings {
    fn dial(&self, server: &Server) -> Result<Arc<dyn Dial>> {
        if let Some(command) = &self.command {
            return Ok(Arc::new(CommandDial::from_line(command)?));
        }
        let server = self.with_port(server)?;
        Ok(match self.ssh {
            Ssh::System => Arc::new(self.ssh_dial(server)),
            Ssh::BuiltIn => Arc::new(BuiltInDial::new(
                server,
                BuiltInOptions {
                    identity_file: self.identity_file.clone(),
                    batch: !self.interactive,
                    ..BuiltInOptions::default()
                },
            )?),
        })
    }

    /// What runs commands on the server; `None` where nothing of ours could.
    fn shell(&self, server: &Server) -> Result<Option<SshDial>> {
        if self.command.is_some() || self.ssh != Ssh::System {
            return Ok(None);
        }
        Ok(Some(self.ssh_dial(self.with_port(server)?)))
    }

    fn with_port(&self, server: &Server) -> Result<Server> {
        if let (Some(named), Some(given)) = (server.port, self.port)
            && named != given
        {
            let why = format!("the location names port {named}, and --ssh-port {given}");
            return Err(Error::new(Kind::Usage, why));
        }
        let port = server.port.or(self.port);
        Ok(Server {
            port,
            ..server.clone()
        })
    }

    fn ssh_dial(&self, server: Server) -> SshDial {
        let options = SshOptions {
            identity_file: self.identity_file.clone(),
            config_file: self.ssh_config.clone(),
            options: self.ssh_options.clone(),
            batch: !self.interactive,
            ..SshOptions::default()
        };
        SshDial::new(server, options)
    }
}

/// Dials the server of `location`, if it has one.
pub fn connect(location: &Location, link: &LinkSettings) -> Result<Arc<dyn Store>> {
    let dialler = |server: &Server| Ok(limited(link.dial(server)?, link.limit));
    remote::connect(location, dialler, link.bounds())
}

/// An image whose header was read and judged, still locked.
pub struct Sealed {
    device: Arc<dyn Device>,
    access: Access,
    loaded: Loaded,
}

/// Fails with [`Kind::NoImage`] when there is none.
pub fn require(store: &dyn Store) -> Result<()> {
    open(store, Access::ReadOnly).map(drop)
}

fn open(store: &dyn Store, access: Access) -> Result<Arc<dyn Device>> {
    store.open(access).map_err(|error| match error.kind() {
        Kind::NoImage => error.hint("`e2ebak init LOCATION --size SIZE` creates an image"),
        _ => error,
    })
}

/// Opens the image and reads its LUKS2 header.
pub fn inspect(store: &dyn Store, access: Access) -> Result<Sealed> {
    let device = open(store, access)?;
    let mut read = |offset: u64, into: &mut [u8]| device.read_exact_at(into, offset);
    let loaded = luks::load(&mut read, device.size()).attempt(|| "read the LUKS2 header")?;
    Ok(Sealed {
        device,
        access,
        loaded,
    })
}

/// A volume key, and the keyslot that gave it.
pub struct Unlocked {
    pub keyslot: usize,
    volume_key: Secret,
}

impl Sealed {
    pub fn header(&self) -> &Header {
        &self.loaded.header
    }

    /// The image file.
    pub fn image(&self) -> Arc<dyn Device> {
        self.device.clone()
    }

    /// Bytes of the image file.
    pub fn size(&self) -> u64 {
        self.device.size()
    }

    /// What was odd about the header, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.loaded.warnings
    }

    /// Tries the key on every keyslot. [`Kind::WrongKey`] when none opens.
    pub fn unlock(&self, key: &Secret) -> Result<Unlocked> {
        let header = &self.loaded.header;
        let area = header.first_area().unwrap_or(0..0);
        std::thread::scope(|scope| {
            // It comes while the key is derived, which takes seconds.
            let fetch = || {
                let mut bytes = vec![0; (area.end - area.start) as usize];
                let read = self.device.read_exact_at(&mut bytes, area.start);
                read.is_ok().then_some(bytes)
            };
            let thread = std::thread::Builder::new().name("keyslot".into());
            let mut fetching = thread.spawn_scoped(scope, fetch).ok();
            let mut read = |offset: u64, into: &mut [u8]| {
                let fetched = match offset == area.start {
                    true => fetching.take().and_then(|thread| thread.join().ok()?),
                    false => None,
                };
                match fetched.filter(|bytes| bytes.len() == into.len()) {
                    Some(bytes) => into.copy_from_slice(&bytes),
                    // Whatever was wrong with it, it is told here.
                    None => self.device.read_exact_at(into, offset)?,
                }
                Ok(())
            };
            let (keyslot, volume_key) = header.unlock(key, &mut read)?;
            Ok(Unlocked {
                keyslot,
                volume_key,
            })
        })
    }

    /// The volume inside.
    pub fn open(self, unlocked: Unlocked) -> Result<Opened> {
        let volume = stack(
            self.device,
            &self.loaded.header,
            &unlocked.volume_key,
            self.access,
        )?;
        Ok(Opened {
            header: self.loaded.header,
            keyslot: unlocked.keyslot,
            volume,
        })
    }
}

/// An unlocked image.
pub struct Opened {
    pub header: Header,
    pub keyslot: usize,
    pub volume: Volume,
}

/// The whole stack, in one place. Each layer is a [`Device`]; any suffix of it runs in a test.
fn stack(
    image: Arc<dyn Device>,
    header: &Header,
    volume_key: &Secret,
    access: Access,
) -> Result<Volume> {
    let key = xts::Key::new(volume_key.bytes()).ok_or_else(|| {
        Error::new(
            Kind::Unsupported,
            format!("a volume key of {} bytes is not for XTS", volume_key.len()),
        )
    })?;
    let at = header.segment();
    let segment = Segment {
        offset: at.offset(),
        size: (!at.is_dynamic()).then(|| at.size()),
        sector_size: at.sector_size(),
        first_tweak: at.iv_tweak(),
    };
    Volume::new(Crypt::new(image, key, segment)?, access)
}

/// The decrypted block device in an image.
pub struct Volume {
    crypt: Arc<Crypt>,
    cache: Arc<Cache>,
}

impl Volume {
    fn new(crypt: Crypt, access: Access) -> Result<Volume> {
        let crypt = Arc::new(crypt);
        let below: Arc<dyn Device> = match access {
            Access::ReadWrite => crypt.clone(),
            Access::ReadOnly => Arc::new(Overlay::new(crypt.clone())),
        };
        Ok(Volume {
            crypt,
            cache: Arc::new(Cache::new(below, cache::Settings::default())?),
        })
    }

    /// The volume as it is now in `image`, which is this one opened anew: for reading, with the key
    /// that is unlocked, and with nothing of what was read before.
    pub fn anew(&self, image: Arc<dyn Device>) -> Result<Volume> {
        Volume::new(self.crypt.over(image)?, Access::ReadOnly)
    }

    pub fn device(&self) -> Arc<dyn Device> {
        self.cache.clone()
    }

    /// Bytes accepted that the server has not yet stored.
    pub fn owed(&self) -> u64 {
        self.cache.stats().dirty_bytes
    }

    /// The same, for a thread that outlives the call.
    pub fn owed_later(&self) -> impl Fn() -> u64 + Send + use<> {
        let cache = Arc::downgrade(&self.cache);
        move || cache.upgrade().map_or(0, |cache| cache.stats().dirty_bytes)
    }

    /// Fits reading ahead to a link with this round trip and these bytes per second; for a thread
    /// that outlives the call.
    pub fn tune_later(&self) -> impl Fn(Duration, u64) + Send + use<> {
        let cache = Arc::downgrade(&self.cache);
        move |round_trip, bytes_per_second| {
            if let Some(cache) = cache.upgrade() {
                cache.adapt_readahead(readahead::Parameters::for_link(
                    round_trip,
                    bytes_per_second,
                ));
            }
        }
    }

    /// Everything written before is on stable storage, or the error says why not.
    pub fn flush(&self) -> Result<()> {
        self.cache.flush()
    }

    /// Ends the threads; nothing more is written, whatever is owed.
    pub fn abandon(&self) {
        self.cache.abandon();
    }

    /// Syncs and ends the threads. The volume must not be in use any more.
    pub fn close(self) -> Result<()> {
        self.cache.close()
    }
}
