//! Who may use whom. The table is in building order: a module uses only modules above its own
//! line, so a cycle cannot be written.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const MAY_USE: &[(&str, &[&str])] = &[
    // floor 0
    ("error", &[]),
    ("units", &[]),
    ("secret", &["error"]),
    ("progress", &[]),
    ("location", &[]),
    ("buffer", &[]),
    ("device", &["error", "buffer"]),
    // floor 1
    ("xts", &["secret"]),
    ("luks", &["error", "units", "secret", "xts"]),
    ("sftp", &[]),
    ("retention", &["units"]),
    ("ext4", &[]),
    // floor 2
    ("host", &["error", "units", "secret", "progress"]),
    ("link", &["error", "units", "secret", "location", "host"]),
    (
        "remote",
        &[
            "error", "units", "progress", "location", "buffer", "device", "luks", "sftp", "link",
        ],
    ),
    ("layer", &["error", "units", "buffer", "device", "xts"]),
    ("export", &["error", "device", "host"]),
    // floor 3
    (
        "image",
        &[
            "error", "units", "secret", "progress", "location", "device", "luks", "ext4", "xts",
            "host", "link", "remote", "layer",
        ],
    ),
    ("restore", &["error", "units", "progress", "device", "ext4"]),
    ("browse", &["error", "ext4", "export", "restore"]),
    (
        "snapshot",
        &["error", "units", "progress", "host", "restore", "retention"],
    ),
    (
        "session",
        &[
            "error", "units", "secret", "progress", "location", "device", "host", "link", "remote",
            "layer", "export", "image",
        ],
    ),
    // floor 4
    ("ui", &["error", "units", "secret", "progress"]),
    (
        "cli",
        &[
            "error",
            "units",
            "secret",
            "progress",
            "location",
            "device",
            "luks",
            "ext4",
            "host",
            "link",
            "remote",
            "image",
            "restore",
            "browse",
            "retention",
            "snapshot",
            "session",
            "ui",
        ],
    ),
];

fn rust_files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("src is readable") {
        let path = entry.expect("src is readable").path();
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// The first path segment after every `crate::`, also inside `crate::{a::x, b}`.
fn modules_named_in(source: &str) -> BTreeSet<String> {
    let word = |text: &str| -> String {
        text.trim_start()
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let mut names = BTreeSet::new();
    for (at, found) in source.match_indices("crate::") {
        let rest = &source[at + found.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            names.insert(word(rest));
            continue;
        };
        names.insert(word(group));
        let mut depth = 1;
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => drop(names.insert(word(&group[i + 1..]))),
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    names.remove("");
    names
}

#[test]
fn every_module_uses_only_what_the_table_allows() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    assert!(files.len() > 10, "found only {} files", files.len());

    let mut breaches = Vec::new();
    for file in files {
        let inside = file.strip_prefix(&src).expect("under src");
        let module = inside
            .iter()
            .next()
            .expect("a name")
            .to_string_lossy()
            .replace(".rs", "");
        if module == "lib" || module == "main" {
            continue;
        }
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == module) else {
            breaches.push(format!(
                "{} belongs to no module of the table",
                inside.display()
            ));
            continue;
        };
        let source = fs::read_to_string(&file).expect("readable");
        for used in modules_named_in(&source) {
            if used != module && !allowed.contains(&used.as_str()) {
                breaches.push(format!(
                    "{}: `{module}` may not use `{used}`",
                    inside.display()
                ));
            }
        }
    }
    assert!(breaches.is_empty(), "\n{}", breaches.join("\n"));
}

#[test]
fn the_table_has_no_cycle() {
    for (i, (module, allowed)) in MAY_USE.iter().enumerate() {
        for used in *allowed {
            let stands_above = MAY_USE[..i].iter().any(|(name, _)| name == used);
            assert!(
                stands_above,
                "`{module}` may use `{used}`, which is built later"
            );
        }
    }
}

#[test]
fn the_scan_sees_every_way_to_name_a_module() {
    let found = modules_named_in(
        "use crate::error::X; use crate::{link::{A, B}, remote::C};\nfn f() { crate::xts::go() }",
    );
    assert_eq!(
        found.into_iter().collect::<Vec<_>>(),
        ["error", "link", "remote", "xts"]
    );
}
