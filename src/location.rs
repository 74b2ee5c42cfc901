//! Where an image is: `sftp://[user@]host[:port]/path`, `[user@]host:path`, a local path, or
//! `file:///path`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A parsed location. What it prints parses to itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    Local(PathBuf),
    Sftp(Server, RemotePath),
}

/// Whom to dial. The host may be an alias of the ssh configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub user: Option<String>,
    pub host: String,
    pub port: Option<u16>,
}

/// A path on the server: absolute, or relative to the home that the SFTP session starts in.
/// Never empty, no NUL.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RemotePath(String);

impl RemotePath {
    pub fn new(path: impl Into<String>) -> Option<Self> {
        let path = path.into();
        let good = !path.is_empty() && !path.ends_with('/') && !path.contains('\0');
        good.then_some(RemotePath(path))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path with something added to its last name: `a/b.img` + `.lease`.
    pub fn with_suffix(&self, suffix: &str) -> Self {
        RemotePath(format!("{}{suffix}", self.0))
    }
}

impl Location {
    /// The last name of the path.
    pub fn file_name(&self) -> &str {
        match self {
            Location::Local(path) => path.file_name().and_then(|n| n.to_str()).unwrap_or("image"),
            Location::Sftp(_, path) => path.0.rsplit('/').next().unwrap_or("image"),
        }
    }
}

impl FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| Err(format!("`{text}` is not a location: {why}"));
        if text.is_empty() || text.contains('\0') {
            return wrong("it is empty or contains a NUL");
        }
        if let Some(rest) = text.strip_prefix("file://") {
            return match rest.starts_with('/') {
                true => local(text, rest),
                false => wrong("write file:///path, with three slashes"),
            };
        }
        if let Some(rest) = text.strip_prefix("sftp://") {
            let Some((authority, path)) = rest.split_once('/') else {
                return wrong("the path is missing; write sftp://host/path/to/image");
            };
            let (user_host, port) = split_port(authority);
            let port = match port.map(u16::from_str) {
                None => None,
                Some(Ok(port)) if port > 0 => Some(port),
                Some(_) => return wrong("the port is a number from 1 to 65535"),
            };
            let server = match server(user_host, port) {
                Ok(server) => server,
                Err(why) => return wrong(why),
            };
            let path = match path.strip_prefix("~/") {
                Some(relative) => relative.to_string(),
                None => format!("/{path}"),
            };
            return match RemotePath::new(path) {
                Some(path) => Ok(Location::Sftp(server, path)),
                None => wrong("the path must name a file"),
            };
        }
        let in_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        if text
            .split_once("://")
            .is_some_and(|(scheme, _)| scheme.chars().all(in_scheme))
        {
            return wrong("only sftp:// and file:// are known");
        }
        // As scp: a colon before any slash means a host.
        let host_ends = colon_after_host(text);
        match host_ends.map(|at| (&text[..at], &text[at + 1..])) {
            Some((host, path)) => {
                let server = match server(host, None) {
                    Ok(server) => server,
                    Err(why) => return wrong(why),
                };
                if path.starts_with(':') {
                    return wrong("write an IPv6 address in brackets");
                }
                let path = path.strip_prefix("~/").unwrap_or(path);
                match RemotePath::new(path) {
                    Some(path) => Ok(Location::Sftp(server, path)),
                    None => wrong("the path must name a file"),
                }
            }
            None => local(text, text),
        }
    }
}

fn local(text: &str, path: &str) -> Result<Location, String> {
    if path.ends_with('/') || Path::new(path).file_name().is_none() {
        return Err(format!(
            "`{text}` is not a location: the path must name a file"
        ));
    }
    Ok(Location::Local(PathBuf::from(path)))
}

/// Where scp would end the host: the first colon outside brackets, if no slash comes before it.
fn colon_after_host(text: &str) -> Option<usize> {
    let start = match text.find('[') {
        Some(open) if open == 0 || text[..open].ends_with('@') => open + text[open..].find(']')?,
        _ => 0,
    };
    let colon = start + text[start..].find(':')?;
    text.find('/')
        .is_none_or(|slash| colon < slash)
        .then_some(colon)
}

fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    }
}

fn server(user_host: &str, port: Option<u16>) -> Result<Server, &'static str> {
    let (user, host) = match user_host.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, user_host),
    };
    let host = match host.strip_prefix('[') {
        Some(rest) => rest
            .strip_suffix(']')
            .ok_or("the bracket after the host is missing")?,
        None if host.contains(':') => return Err("write an IPv6 address in brackets"),
        None => host,
    };
    // A leading dash would be read by ssh as an option.
    for word in user.iter().chain([&host]) {
        if word.is_empty() {
            return Err("user and host must not be empty");
        }
        if word.starts_with('-') || word.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err("user and host must not begin with a dash or contain white space");
        }
    }
    let user_is_odd = user.is_some_and(|user| user.contains([':', '/', '[', ']']));
    if user_is_odd || host.contains(['/', '[', ']']) {
        return Err("user and host must not contain brackets, slashes or a password");
    }
    Ok(Server {
        user: user.map(String::from),
        host: host.to_string(),
        port,
    })
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        match self.host.contains(':') {
            true => write!(f, "[{}]", self.host),
            false => f.write_str(&self.host),
        }
    }
}

impl Location {
    /// Ways to write it, the plainest first. Odd names are not read back from all of them: a colon
    /// can end a host, `~/` means the home, `://` ends a scheme.
    fn spellings(&self) -> Vec<String> {
        match self {
            Location::Local(path) => {
                let text = path.display();
                match path.is_absolute() {
                    true => vec![format!("{text}"), format!("file://{text}")],
                    false => vec![format!("{text}"), format!("./{text}")],
                }
            }
            Location::Sftp(server, RemotePath(path)) => {
                let port = server.port.map_or(String::new(), |port| format!(":{port}"));
                let mut all = Vec::new();
                if server.port.is_none() {
                    all.push(format!("{server}:{path}"));
                }
                match path.starts_with('/') {
                    true => all.push(format!("sftp://{server}{port}{path}")),
                    false => all.push(format!("sftp://{server}{port}/~/{path}")),
                }
                all
            }
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spellings = self.spellings();
        let read_back = |text: &&String| Location::from_str(text).as_ref() == Ok(self);
        let text = spellings.iter().find(read_back).or(spellings.last());
        f.write_str(text.map_or("", String::as_str))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sftp(user: Option<&str>, host: &str, port: Option<u16>, path: &str) -> Location {
        let server = Server {
            user: user.map(String::from),
            host: host.into(),
            port,
        };
        Location::Sftp(server, RemotePath::new(path).expect("a good path"))
    }

    #[test]
    fn every_form_parses_and_prints_back() {
        for (text, location) in [
            (
                "nas:backups/laptop.img",
                sftp(None, "nas", None, "backups/laptop.img"),
            ),
            (
                "ann@nas:/srv/a.img",
                sftp(Some("ann"), "nas", None, "/srv/a.img"),
            ),
            ("nas:~/a.img", sftp(None, "nas", None, "a.img")),
            (
                "sftp://ann@nas:2222/srv/a.img",
                sftp(Some("ann"), "nas", Some(2222), "/srv/a.img"),
            ),
            ("sftp://nas/~/a b.img", sftp(None, "nas", None, "a b.img")),
            ("sftp://[::1]:22/a", sftp(None, "::1", Some(22), "/a")),
            ("[fe80::1]:a", sftp(None, "fe80::1", None, "a")),
            ("ann@[::1]:a", sftp(Some("ann"), "::1", None, "a")),
            ("/srv/a.img", Location::Local("/srv/a.img".into())),
            ("file:///srv/a.img", Location::Local("/srv/a.img".into())),
            ("./nas:a", Location::Local("./nas:a".into())),
            ("a.img", Location::Local("a.img".into())),
            // Found by fuzzing: printed so that they were read back as something else.
            ("a/b:c", Location::Local("a/b:c".into())),
            ("file:///a://b", Location::Local("/a://b".into())),
            ("./a://b", Location::Local("./a://b".into())),
            ("nas:a://b", sftp(None, "nas", None, "a://b")),
            ("sftp://nas//a", sftp(None, "nas", None, "//a")),
            ("sftp://nas/~/~/a", sftp(None, "nas", None, "~/a")),
            ("sftp://nas/~/:a", sftp(None, "nas", None, ":a")),
            ("nas:/~/a", sftp(None, "nas", None, "/~/a")),
        ] {
            assert_eq!(text.parse(), Ok(location.clone()), "{text}");
            assert_eq!(location.to_string().parse(), Ok(location), "{text}");
        }
    }

    #[test]
    fn a_local_path_that_looks_like_a_server_is_not_printed_as_one() {
        let path = Location::Local("nas:a".into());
        assert_eq!(path.to_string(), "./nas:a");
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for text in [
            "",
            "nas:",
            "nas:dir/",
            "sftp://nas",
            "sftp://nas/",
            "sftp:///a",
            "sftp://nas:0/a",
            "sftp://nas:x/a",
            "http://nas/a",
            "-oProxyCommand=x:a",
            "me@[[]:]:x",
            "sftp://ann:secret@nas:22/a",
            "sftp://-oX/a",
            "@nas:a",
            "fe80::1:a/b",
            "file://a",
            "/srv/",
            "..",
            "na s:a",
            "sftp://nas:99999/a",
        ] {
            match text.parse::<Location>() {
                Err(error) => assert!(error.contains(text), "{text}: {error}"),
                Ok(location) => panic!("{text} parsed as {location:?}"),
            }
        }
    }
}
