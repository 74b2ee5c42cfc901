//! Shows a job's events: a bar on a terminal, plain lines elsewhere, JSON lines for scripts, only
//! trouble when quiet.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::output::{say, tell};
use crate::progress::{Event, LinkState, Monitor, Progress};
use crate::units::{Bytes, show_duration};

/// A job that is over sooner shows no bar.
const BAR_AFTER: Duration = Duration::from_millis(250);
/// How often a log gets a line.
const LINE_EVERY: Duration = Duration::from_secs(60);
/// How often a script gets a line.
const JSON_EVERY: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Bar,
    Lines,
    Json,
    Quiet,
}

impl Style {
    /// What the flags and the terminal ask for.
    pub fn choose(quiet: bool, json: bool) -> Self {
        match () {
            () if json => Style::Json,
            () if quiet => Style::Quiet,
            () if std::io::stderr().is_terminal() => Style::Bar,
            () => Style::Lines,
        }
    }
}

/// Everything goes to standard error, but JSON, which goes to standard output.
pub struct Terminal {
    style: Style,
    state: Mutex<State>,
}

struct State {
    bar: ProgressBar,
    began: Instant,
    phase_began: Instant,
    said: Instant,
    phase: &'static str,
    progress: Progress,
}

impl Terminal {
    pub fn new(style: Style) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        // OK to unwrap: the template is a constant; a test builds it.
        let looks = ProgressStyle::with_template("{spinner} {wide_msg}")
            .unwrap_or(ProgressStyle::default_spinner());
        bar.set_style(looks);
        let now = Instant::now();
        let state = State {
            bar,
            began: now,
            phase_began: now,
            said: now,
            phase: "",
            progress: Progress::default(),
        };
        Terminal {
            style,
            state: Mutex::new(state),
        }
    }

    /// Prints something while the bar is out of the way.
    pub fn suspend(&self, print: impl FnOnce()) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.bar.suspend(print);
    }

    /// Takes the bar away; what follows is the result.
    pub fn finish(&self) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .bar
            .finish_and_clear();
    }
}

impl Monitor for Terminal {
    fn report(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Warning(text) if self.style == Style::Json => {
                say!("{}", json!({"message_type": "warning", "message": text}));
            }
            Event::Warning(text) => state.bar.suspend(|| tell!("warning: {text}")),
            Event::Note(text) => match self.style {
                Style::Quiet => {}
                Style::Json => say!("{}", json!({"message_type": "note", "message": text})),
                Style::Bar | Style::Lines => state.bar.suspend(|| tell!("{text}")),
            },
            Event::Phase(phase) => {
                state.phase = phase;
                state.phase_began = Instant::now();
                state.progress.bytes_total = None;
                self.show(&mut state);
            }
            Event::Progress(progress) => {
                state.progress = merged(state.progress, progress);
                self.show(&mut state);
            }
        }
    }
}

impl Terminal {
    fn show(&self, state: &mut State) {
        let due = |every: Duration| state.said.elapsed() >= every;
        match self.style {
            Style::Bar => {
                if state.bar.is_hidden() && state.began.elapsed() >= BAR_AFTER {
                    state.bar.set_draw_target(ProgressDrawTarget::stderr());
                    state.bar.enable_steady_tick(Duration::from_millis(200));
                }
                state.bar.set_message(sentence(state));
            }
            Style::Lines if due(LINE_EVERY) => {
                state.said = Instant::now();
                tell!("{}", sentence(state));
            }
            Style::Json if due(JSON_EVERY) => {
                state.said = Instant::now();
                let p = state.progress;
                say!(
                    "{}",
                    json!({
                        "message_type": "status", "phase": state.phase,
                        "seconds_elapsed": state.began.elapsed().as_secs(),
                        "files_done": p.files, "total_files": p.files_total, "bytes_done": p.bytes,
                        "total_bytes": p.bytes_total,
                        "seconds_remaining": remaining(state).map(|left| left.as_secs()),
                        "bytes_owed": p.owed, "bytes_sent": p.sent,
                        "link_down_seconds": link_down(p.link),
                    })
                );
            }
            Style::Lines | Style::Json | Style::Quiet => {}
        }
    }
}

fn link_down(link: Option<LinkState>) -> Option<u64> {
    match link {
        Some(LinkState::Down { seconds, .. }) => Some(seconds),
        Some(LinkState::Up) | None => None,
    }
}

/// The newer figure where there is one.
fn merged(old: Progress, new: Progress) -> Progress {
    Progress {
        files: new.files.or(old.files),
        files_total: new.files_total.or(old.files_total),
        bytes: new.bytes.or(old.bytes),
        bytes_total: new.bytes_total.or(old.bytes_total),
        owed: new.owed.or(old.owed),
        sent: new.sent.or(old.sent),
        link: new.link.or(old.link),
    }
}

/// What the phase will take yet, if it goes on as it has gone.
fn remaining(state: &State) -> Option<Duration> {
    let (done, total) = (state.progress.bytes?, state.progress.bytes_total?);
    let elapsed = state.phase_began.elapsed().as_secs_f64();
    if done == 0 || elapsed < 1.0 {
        return None;
    }
    let left = total.saturating_sub(done) as f64;
    Duration::try_from_secs_f64(elapsed / done as f64 * left).ok()
}

fn sentence(state: &State) -> String {
    let p = state.progress;
    let elapsed = state.began.elapsed();
    let mut parts = vec![format!("{} {}", state.phase, show_duration(elapsed))];
    match (p.files, p.files_total) {
        (Some(done), Some(total)) => parts.push(format!("{done}/{total} files")),
        (Some(done), None) => parts.push(format!("{done} files")),
        _ => {}
    }
    if let (Some(done), Some(total)) = (p.bytes, p.bytes_total) {
        parts.push(format!("{} of {}", Bytes(done), Bytes(total)));
        let rate = done as f64 / state.phase_began.elapsed().as_secs_f64().max(0.001);
        parts.push(format!("{}/s", Bytes(rate as u64)));
        if let Some(left) = remaining(state) {
            parts.push(format!("{} left", show_duration(left)));
        }
    } else if let Some(done) = p.bytes {
        parts.push(format!("{} copied", Bytes(done)));
        let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
        parts.push(format!("{}/s", Bytes(rate as u64)));
    }
    if let Some(sent) = p.sent.filter(|sent| *sent > 0) {
        parts.push(format!("{} sent", Bytes(sent)));
    }
    if let Some(owed) = p.owed.filter(|owed| *owed > 0) {
        parts.push(format!("{} still to send", Bytes(owed)));
    }
    if let Some(LinkState::Down { seconds, attempts }) = p.link {
        let shown = show_duration(Duration::from_secs(seconds));
        parts.push(format!("link down for {shown}, attempt {}", attempts + 1));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_template_is_good() {
        assert!(ProgressStyle::with_template("{spinner} {wide_msg}").is_ok());
    }

    #[test]
    fn the_sentence_has_what_is_known_and_no_more() {
        let mut state = State {
            bar: ProgressBar::hidden(),
            began: Instant::now(),
            phase_began: Instant::now(),
            said: Instant::now(),
            phase: "copy",
            progress: Progress::default(),
        };
        assert_eq!(sentence(&state), "copy 0.0 s");
        state.progress = Progress {
            files: Some(3),
            files_total: Some(9),
            sent: Some(2 << 20),
            owed: Some(0),
            ..Progress::default()
        };
        assert_eq!(sentence(&state), "copy 0.0 s, 3/9 files, 2.0 MiB sent");
        state.progress.owed = Some(1 << 30);
        assert!(sentence(&state).ends_with(", 1.0 GiB still to send"));
        state.progress.link = Some(LinkState::Down {
            seconds: 12,
            attempts: 2,
        });
        assert!(sentence(&state).ends_with(", link down for 12 s, attempt 3"));
    }

    #[test]
    fn what_is_left_is_guessed_from_what_the_phase_has_done() {
        let mut state = State {
            bar: ProgressBar::hidden(),
            began: Instant::now(),
            phase_began: Instant::now() - Duration::from_secs(30),
            said: Instant::now(),
            phase: "read",
            progress: Progress {
                bytes: Some(25 << 20),
                bytes_total: Some(100 << 20),
                ..Progress::default()
            },
        };
        assert_eq!(remaining(&state).map(|left| left.as_secs()), Some(90));
        assert!(sentence(&state).contains("25.0 MiB of 100.0 MiB, "));
        assert!(sentence(&state).ends_with("1 min 30 s left"));
        state.progress.bytes = Some(0);
        assert_eq!(remaining(&state), None);
    }

    #[test]
    fn figures_from_both_sides_are_kept() {
        let copy = Progress {
            files: Some(3),
            bytes: Some(10),
            ..Progress::default()
        };
        let link = Progress {
            owed: Some(7),
            ..Progress::default()
        };
        let both = merged(merged(Progress::default(), copy), link);
        assert_eq!(
            (both.files, both.bytes, both.owed),
            (Some(3), Some(10), Some(7))
        );
    }
}
