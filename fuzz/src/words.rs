//! What people write: locations, sizes, durations, names of snapshots.

use std::time::Duration;

use e2ebak::location::{Location, RemotePath};
use e2ebak::snapshot::Id;
use e2ebak::units::{Bytes, parse_duration, show_duration};

pub fn words(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(location) = text.parse::<Location>() {
        let shown = location.to_string();
        assert_eq!(shown.parse(), Ok(location.clone()), "{shown}");
        assert!(!location.file_name().is_empty());
        if let Location::Sftp(server, _) = &location {
            // ssh would take it for an option.
            let words = server.user.iter().chain([&server.host]);
            assert!(
                words
                    .clone()
                    .all(|word| !word.is_empty() && !word.starts_with('-'))
            );
        }
    }
    if let Some(path) = RemotePath::new(text) {
        assert_eq!(path.with_suffix(".x").as_str(), format!("{text}.x"));
    }
    if let Ok(Bytes(size)) = text.parse() {
        // Shown with one decimal; at the very end of all numbers that is one too many.
        let shown = Bytes(size).to_string();
        let Bytes(again) = match shown.parse() {
            Err(_) if size > u64::MAX - (u64::MAX >> 12) => Bytes(size),
            read => read.unwrap_or_else(|why| panic!("{shown}: {why}")),
        };
        assert!(again.abs_diff(size) <= size / 15, "{size} became {again}");
    }
    if let Ok(duration) = parse_duration(text) {
        show_duration(duration);
        assert_eq!(duration, Duration::from_secs(duration.as_secs()));
    }
    if let Ok(id) = text.parse::<Id>() {
        assert_eq!(id.to_string(), text);
        assert_eq!(Id::at(id.time()), id);
        assert!(id.next() >= id);
    }
}
