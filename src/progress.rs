//! How the engines report: through a [`Monitor`]. The library never prints.

/// One thing worth telling while a job runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Odd, but handled; the run goes on. Shown even when quiet.
    Warning(String),
    /// State changed; shown unless quiet.
    Note(String),
    /// A new phase has begun: `copy`, `sync`, `unmount`.
    Phase(&'static str),
    /// How far the phase is.
    Progress(Progress),
}

/// Figures of a running phase; a field that is not known stays `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub files: Option<u64>,
    pub files_total: Option<u64>,
    pub bytes: Option<u64>,
    /// What `bytes` will be at the end of the phase.
    pub bytes_total: Option<u64>,
    /// Bytes accepted that the server has not yet stored.
    pub owed: Option<u64>,
    /// Bytes sent over the link since the job began.
    pub sent: Option<u64>,
    pub link: Option<LinkState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    Up,
    /// For so many seconds, after so many failed dials.
    Down {
        seconds: u64,
        attempts: u32,
    },
}

pub trait Monitor: Send + Sync {
    fn report(&self, event: Event);
}

/// Hears everything and tells nobody.
pub struct Silent;

impl Monitor for Silent {
    fn report(&self, _event: Event) {}
}
