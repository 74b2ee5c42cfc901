//! `known_hosts` files, as sshd(8) describes them: plain, wildcard, negated and hashed names, and
//! the markers `@revoked` and `@cert-authority`. Nothing is ever added to them.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::error::{Attempt, Error, Kind, Result};

const SSH_PORT: u16 = 22;

/// A file that is larger is none.
const FILE_MAX: u64 = 16 << 20;

/// What some files know.
#[derive(Debug, Default)]
pub struct KnownHosts {
    lines: Vec<Line>,
}

#[derive(Debug)]
struct Line {
    /// `file:number`.
    place: String,
    marker: Option<String>,
    names: String,
    key: Vec<u8>,
}

/// A host as it stands in these files: `name`, or `[name]:port` where the port is not 22.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    pub fn new(host: &str, port: u16) -> Self {
        let host = host.to_ascii_lowercase();
        match port {
            SSH_PORT => Name(host),
            port => Name(format!("[{host}]:{port}")),
        }
    }
}

impl KnownHosts {
    /// Reads these files; one that does not exist is empty. A line that cannot be read knows
    /// nobody, as it is with ssh.
    pub fn read(files: &[PathBuf]) -> Result<Self> {
        let mut known = KnownHosts::default();
        for file in files {
            let shown = file.display();
            let size = match fs::metadata(file) {
                Ok(about) => about.len(),
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error).attempt(|| format!("look at {shown}")),
            };
            if size > FILE_MAX {
                return Err(Error::new(
                    Kind::Usage,
                    format!("{shown} is too large for a file of known hosts: {size} bytes"),
                ));
            }
            let text = fs::read(file).attempt(|| format!("read {shown}"))?;
            known.add(file, &String::from_utf8_lossy(&text));
        }
        Ok(known)
    }

    fn add(&mut self, file: &Path, text: &str) {
        for (number, line) in (1_u64..).zip(text.lines()) {
            let place = format!("{}:{number}", file.display());
            self.lines.extend(Line::parse(place, line));
        }
    }

    fn of<'a>(&'a self, name: &'a Name) -> impl Iterator<Item = &'a Line> {
        self.lines.iter().filter(|line| line.names_match(&name.0))
    }

    /// The types of the keys that are known of a host: `ssh-ed25519` and so on. A server that has
    /// several is asked for one of these.
    pub fn key_types(&self, name: &Name) -> Vec<String> {
        let plain = self.of(name).filter(|line| line.marker.is_none());
        plain.filter_map(|line| key_type(&line.key)).collect()
    }

    /// Accepts a key only if it is the known one of its host.
    ///
    /// [`Kind::Disconnected`] otherwise, as ssh's own refusal; the hint has the line to add.
    pub fn check(&self, name: &Name, key: &[u8]) -> Result<()> {
        let refuse = |why: String, hint: String| {
            let fingerprint = STANDARD_NO_PAD.encode(Sha256::digest(key));
            let shown = format!("{} shows the key SHA256:{fingerprint}", name.0);
            Err(Error::new(Kind::Disconnected, why)
                .hint(hint)
                .because(shown))
        };
        let marked = |line: &&Line, marker: &str| line.marker.as_deref() == Some(marker);
        let has_key = |line: &&Line| line.key == key;
        if let Some(line) = self
            .of(name)
            .filter(has_key)
            .find(|l| marked(l, "@revoked"))
        {
            return refuse(
                format!("the host key of the server is revoked by {}", line.place),
                "somebody may be in between; ask who keeps that server".into(),
            );
        }
        let mut plain = self.of(name).filter(|line| line.marker.is_none());
        if plain.any(|line| line.key == key) {
            return Ok(());
        }
        let Some(kind) = key_type(key) else {
            return refuse(
                "the server shows a malformed host key".into(),
                String::new(),
            );
        };
        if let Some(line) = self.of(name).find(|line| marked(line, "@cert-authority")) {
            return refuse(
                format!("{} wants a certificate of the server", line.place),
                "host certificates need the ssh program: leave out `--ssh built-in`".into(),
            );
        }
        let to_add = format!("{} {kind} {}", name.0, STANDARD.encode(key));
        let mut plain = self.of(name).filter(|line| line.marker.is_none());
        match plain.find(|line| key_type(&line.key).as_deref() == Some(&kind)) {
            Some(line) => refuse(
                format!("the server shows another host key than {} says", line.place),
                format!(
                    "if the server was set up anew, replace that line by `{to_add}`; \
                     else somebody may be in between"
                ),
            ),
            None => refuse(
                "the host key of the server is not known".into(),
                format!("compare the fingerprint, then add to ~/.ssh/known_hosts: {to_add}"),
            ),
        }
    }
}

impl Line {
    fn parse(place: String, line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let mut names = words.next().filter(|word| !word.starts_with('#'))?;
        let marker = names.starts_with('@').then(|| names.to_string());
        if marker.is_some() {
            names = words.next()?;
        }
        let kind = words.next()?;
        let key = STANDARD.decode(words.next()?).ok()?;
        (key_type(&key).as_deref() == Some(kind)).then(|| Line {
            place,
            marker,
            names: names.to_string(),
            key,
        })
    }

    fn names_match(&self, name: &str) -> bool {
        if self.names.starts_with('|') {
            return hashed_matches(&self.names, name).unwrap_or(false);
        }
        let mut found = false;
        for pattern in self.names.split(',') {
            let pattern = pattern.to_ascii_lowercase();
            match pattern.strip_prefix('!') {
                Some(pattern) if matches(pattern.as_bytes(), name.as_bytes()) => return false,
                Some(_) => {}
                None => found |= matches(pattern.as_bytes(), name.as_bytes()),
            }
        }
        found
    }
}

/// `|1|salt|hash`: HMAC-SHA1 of the name under the salt.
fn hashed_matches(hashed: &str, name: &str) -> Option<bool> {
    let (salt, hash) = hashed.strip_prefix("|1|")?.split_once('|')?;
    let (salt, hash) = (STANDARD.decode(salt).ok()?, STANDARD.decode(hash).ok()?);
    let mut mac = Hmac::<Sha1>::new_from_slice(&salt).ok()?;
    mac.update(name.as_bytes());
    Some(mac.verify_slice(&hash).is_ok())
}

/// `*` and `?`. Walks back to the last star only, so the time is bounded by the product of the
/// lengths.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((at, from)) = star else { return false };
                star = Some((at, from + 1));
                p = at + 1;
                n = from + 1;
            }
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// The type that a public key begins with (RFC 4253 section 6.6).
pub fn key_type(key: &[u8]) -> Option<String> {
    let (len, rest) = key.split_first_chunk::<4>()?;
    let name = rest.get(..u32::from_be_bytes(*len) as usize)?;
    let good = !name.is_empty() && name.iter().all(u8::is_ascii_graphic);
    good.then(|| String::from_utf8_lossy(name).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(kind: &str, seed: u8) -> Vec<u8> {
        let mut key = (kind.len() as u32).to_be_bytes().to_vec();
        key.extend_from_slice(kind.as_bytes());
        key.extend_from_slice(&[seed; 36]);
        key
    }

    fn line(names: &str, key: &[u8]) -> String {
        let kind = key_type(key).expect("a type");
        format!("{names} {kind} {} comment\n", STANDARD.encode(key))
    }

    fn known(text: &str) -> KnownHosts {
        let mut known = KnownHosts::default();
        known.add(Path::new("kh"), text);
        known
    }

    /// Whether the key 1 of this host is accepted.
    fn accepts(text: &str, host: &str, port: u16) -> bool {
        let name = Name::new(host, port);
        known(text).check(&name, &key("ssh-ed25519", 1)).is_ok()
    }

    #[test]
    fn names_match_as_in_sshd_8() {
        let one = key("ssh-ed25519", 1);
        for (names, host, port, expected) in [
            ("nas", "nas", 22, true),
            ("nas", "NAS", 22, true),
            ("other,nas", "nas", 22, true),
            ("nas", "nas", 2222, false),
            ("[nas]:2222", "nas", 2222, true),
            ("[nas]:2222", "nas", 22, false),
            ("*.lan", "nas.lan", 22, true),
            ("*.lan,!bad.lan", "bad.lan", 22, false),
            ("!bad.lan,*.lan", "good.lan", 22, true),
            ("na?", "nas", 22, true),
            ("na?", "na", 22, false),
            ("[192.168.0.*]:22??", "192.168.0.77", 2222, true),
            ("*a*b*c", "xaxbxc", 22, true),
            ("*a*b*c", "xaxbx", 22, false),
            ("nas2", "nas", 22, false),
        ] {
            assert_eq!(
                accepts(&line(names, &one), host, port),
                expected,
                "{names} {host} {port}"
            );
        }
        for nonsense in [
            "",
            "#nas ssh-ed25519 AAAA",
            "nas",
            "nas ssh-ed25519 ???",
            "|1|x|y z AAAA",
        ] {
            assert!(!accepts(nonsense, "nas", 22), "{nonsense}");
        }
        // A type that is not the key's own.
        let lie = format!("nas ssh-rsa {}\n", STANDARD.encode(&one));
        assert!(!accepts(&lie, "nas", 22));
    }

    #[test]
    fn a_refusal_has_the_line_to_add() {
        let (one, two) = (key("ssh-ed25519", 1), key("ssh-ed25519", 2));
        let name = Name::new("nas", 2222);
        let added = format!("[nas]:2222 ssh-ed25519 {}", STANDARD.encode(&one));

        let error = known("").check(&name, &one).expect_err("unknown");
        assert!(
            error.report().contains("is not known"),
            "{}",
            error.report()
        );
        assert!(
            error
                .deepest_hint()
                .is_some_and(|hint| hint.ends_with(&added))
        );
        assert!(
            known(&added).check(&name, &one).is_ok(),
            "and that line is right"
        );

        let other = line("[nas]:2222", &two);
        let error = known(&other).check(&name, &one).expect_err("changed");
        assert!(
            error.report().contains("another host key than kh:1"),
            "{}",
            error.report()
        );
        assert!(
            error
                .deepest_hint()
                .is_some_and(|hint| hint.contains(&added))
        );
        // Two keys of one host are both right.
        assert!(known(&(other + &added)).check(&name, &one).is_ok());
    }

    #[test]
    fn marked_lines_are_refused_by_name() {
        let one = key("ssh-ed25519", 1);
        let name = Name::new("nas", 22);
        let good = line("nas", &one);
        let revoked = format!("@revoked {}", line("*", &one));
        let error = known(&(good.clone() + &revoked)).check(&name, &one);
        assert!(
            error
                .expect_err("revoked")
                .report()
                .contains("revoked by kh:2")
        );
        // Another key's end is not this one's.
        let other = format!("@revoked {}", line("*", &key("ssh-ed25519", 2)));
        assert!(known(&(good + &other)).check(&name, &one).is_ok());

        let authority = format!("@cert-authority {}", line("nas", &key("ssh-ed25519", 3)));
        let error = known(&authority)
            .check(&name, &one)
            .expect_err("no certificate");
        assert!(
            error.report().contains("wants a certificate"),
            "{}",
            error.report()
        );
        assert!(known(&authority).key_types(&name).is_empty());
    }

    /// `ssh-keygen -H` hashes the names.
    #[test]
    fn hashed_names_are_those_of_ssh_keygen() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("kh");
        let one = key("ssh-ed25519", 1);
        // ssh-keygen wants a key that is one: 32 bytes behind their length.
        let mut real = key("ssh-ed25519", 1)[..15].to_vec();
        real.extend_from_slice(&32_u32.to_be_bytes());
        real.extend_from_slice(&[7; 32]);
        fs::write(&file, line("nas", &real) + &line("[nas]:2222", &real)).expect("written");
        let hashed = std::process::Command::new("ssh-keygen")
            .arg("-H")
            .arg("-f")
            .arg(&file)
            .output();
        let Ok(output) = hashed else {
            eprintln!("skipped: no ssh-keygen");
            return;
        };
        assert!(output.status.success(), "{output:?}");
        let text = fs::read_to_string(&file).expect("read");
        assert!(text.contains("|1|") && !text.contains("nas"), "{text}");
        let known = KnownHosts::read(&[file, dir.path().join("none")]).expect("read");
        for (host, port, expected) in [("nas", 22, true), ("nas", 2222, true), ("nas", 23, false)] {
            let name = Name::new(host, port);
            assert_eq!(known.check(&name, &real).is_ok(), expected, "{host} {port}");
            assert!(known.check(&name, &one).is_err());
        }
        assert_eq!(known.key_types(&Name::new("nas", 22)), ["ssh-ed25519"]);
    }
}
