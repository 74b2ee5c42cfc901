//! The recovery sheet: what to do, and the commands for it, as text and as a page to print.

use qrcode::{Color, EcLevel, QrCode};

use crate::error::{Error, Kind, Result};
use crate::location::Server;
use crate::units::Bytes;

/// What the sheet is about.
pub struct Sheet {
    pub location: String,
    pub address: Address,
    /// Bytes of the image.
    pub size: u64,
    pub uuid: String,
    pub label: String,
    pub cipher: String,
    pub keyslots: usize,
    /// The day on which it was printed.
    pub printed: String,
}

/// Where the image is, for somebody who has no configuration of ssh.
pub struct Address {
    pub server: Option<Server>,
    pub path: String,
}

/// A heading, why, and commands, each on a line that can be typed as it is.
struct Step {
    heading: String,
    text: &'static str,
    commands: Vec<String>,
}

/// Names of what the commands make; nothing of that name is on a fresh machine.
const VOLUME: &str = "e2ebak-restore";
const STORE: &str = "/tmp/e2ebak-store";
const FILES: &str = "/tmp/e2ebak-files";

impl Sheet {
    pub fn text(&self) -> String {
        let mut out = format!("RECOVERY SHEET FOR {}\n", self.location);
        out.push_str(&"=".repeat(out.trim_end().chars().count()));
        out.push('\n');
        for (name, value) in self.facts() {
            out.push_str(&format!("{name:<12}{value}\n"));
        }
        for paragraph in INTRODUCTION {
            out.push_str(&format!("\n{paragraph}\n"));
        }
        for step in self.steps() {
            out.push_str(&format!("\n{}\n{}\n\n", step.heading, step.text));
            for command in &step.commands {
                out.push_str(&format!("    {command}\n"));
            }
        }
        out.push_str(&format!("\n{CLOSING}\n"));
        out
    }

    /// One page that needs nothing from elsewhere.
    pub fn html(&self) -> Result<String> {
        let mut body = format!("<h1>Recovery sheet for {}</h1>\n", escaped(&self.location));
        body.push_str(&format!(
            "<div class=\"qr\">{}</div>\n<table>\n",
            qr(&self.essentials())?
        ));
        for (name, value) in self.facts() {
            let (name, value) = (escaped(name), escaped(&value));
            body.push_str(&format!("<tr><th>{name}</th><td>{value}</td></tr>\n"));
        }
        body.push_str("</table>\n");
        for paragraph in INTRODUCTION {
            body.push_str(&format!("<p>{}</p>\n", escaped(paragraph)));
        }
        for step in self.steps() {
            let (heading, text) = (escaped(&step.heading), escaped(step.text));
            let commands = escaped(&step.commands.join("\n"));
            body.push_str(&format!(
                "<h2>{heading}</h2>\n<p>{text}</p>\n<pre>{commands}</pre>\n"
            ));
        }
        body.push_str(&format!("<p>{}</p>\n", escaped(CLOSING)));
        Ok(format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
             <title>Recovery sheet</title>\n<style>{STYLE}</style></head>\n<body>\n{body}</body></html>"
        ))
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = Vec::new();
        if let Some(server) = &self.address.server {
            facts.push(("server", target(server)));
            let port = server.port.unwrap_or(22);
            facts.push(("port", port.to_string()));
        }
        facts.extend([
            ("file", shown(&self.address.path)),
            (
                "size",
                format!("{} ({} bytes, sparse)", Bytes(self.size), self.size),
            ),
            (
                "format",
                format!("LUKS2, {}, {} keyslots", shown(&self.cipher), self.keyslots),
            ),
            ("LUKS uuid", shown(&self.uuid)),
        ]);
        if !self.label.is_empty() {
            facts.push(("label", shown(&self.label)));
        }
        facts.push((
            "inside",
            "ext4; every directory in snapshots/ is a whole backup".into(),
        ));
        facts.push(("printed", self.printed.clone()));
        facts
    }

    /// What a phone reads off the page: enough to begin with.
    fn essentials(&self) -> String {
        let place = match &self.address.server {
            Some(server) => {
                let path = &self.address.path;
                let home = if path.starts_with('/') { "" } else { "/~/" };
                let port = server.port.unwrap_or(22);
                format!("sftp://{}:{port}{home}{path}", bracketed(server))
            }
            None => self.address.path.clone(),
        };
        format!(
            "{place}\nLUKS2 {}\ncryptsetup open --readonly FILE {VOLUME}\n\
             mount -o ro,noload /dev/mapper/{VOLUME} /mnt\nls /mnt/snapshots",
            self.uuid
        )
    }

    fn steps(&self) -> Vec<Step> {
        let path = &self.address.path;
        let mut steps = Vec::new();
        if let Some(server) = &self.address.server {
            let (directory, name) = match path.rsplit_once('/') {
                Some(("", name)) => ("/", name),
                Some((directory, name)) => (directory, name),
                None => (".", &**path),
            };
            steps.push(Step {
                heading: "1a. Reach the image over the network (sshfs)".into(),
                text: "Nothing is copied but what is read. As root, because cryptsetup and mount are next.",
                commands: vec![
                    format!("mkdir -p {STORE}"),
                    format!(
                        "sshfs -o ro{} {} {STORE}",
                        server.port.map_or(String::new(), |port| format!(",port={port}")),
                        quoted(&format!("{}:{directory}", bracketed(server)))
                    ),
                    format!("IMAGE={STORE}/{}", quoted(name)),
                ],
            });
            steps.push(Step {
                heading: "1b. Or copy it here (ssh)".into(),
                text: "Where the server allows commands; holes are not sent. A copy can be repaired, too.",
                commands: vec![
                    format!("mkdir -p {STORE}"),
                    format!(
                        "ssh{} {} {} | tar -xSf - -C {STORE}",
                        server.port.map_or(String::new(), |port| format!(" -p {port}")),
                        quoted(&target(server)),
                        quoted(&format!(
                            "tar -cSf - -C {} {}",
                            quoted(directory),
                            quoted(name)
                        )),
                    ),
                    format!("IMAGE={STORE}/{}", quoted(name)),
                ],
            });
        } else {
            steps.push(Step {
                heading: "1. The image".into(),
                text: "As root, because cryptsetup and mount are next.",
                commands: vec![format!("IMAGE={}", quoted(path))],
            });
        }
        steps.push(Step {
            heading: "2. Unlock it (cryptsetup)".into(),
            text: "It asks for the passphrase. With a key file: add --key-file FILE.",
            commands: vec![format!(
                "cryptsetup open --readonly --type luks2 \"$IMAGE\" {VOLUME}"
            )],
        });
        steps.push(Step {
            heading: "3. Look inside (mount)".into(),
            text: "noload: a journal that a crash has left is not replayed. Should files look damaged, \
                   work on a copy without --readonly and without noload.",
            commands: vec![
                format!("mkdir -p {FILES}"),
                format!("mount -o ro,noload /dev/mapper/{VOLUME} {FILES}"),
                format!("ls {FILES}/snapshots {FILES}/latest/"),
            ],
        });
        steps.push(Step {
            heading: "4. Take what you need".into(),
            text: "For example one directory, with owners, times, links, ACLs and attributes:",
            commands: vec![format!("cp -a {FILES}/latest/home /tmp/restored")],
        });
        let mut commands = vec![
            format!("umount {FILES}"),
            format!("cryptsetup close {VOLUME}"),
        ];
        if self.address.server.is_some() {
            commands.push(format!("fusermount3 -u {STORE}  # after 1a"));
        }
        steps.push(Step {
            heading: "5. Close it".into(),
            text: "In this order.",
            commands,
        });
        steps
    }
}

const INTRODUCTION: [&str; 2] = [
    "You need: this sheet; the passphrase or key file; a way to log in to the server (a password or a \
     private key). None of the three is in the others.",
    "Any Linux with openssh-client, sshfs and cryptsetup will do, for example a live system. With \
     e2ebak installed it is one command and needs no root: e2ebak restore LOCATION latest:/PATH DEST.",
];

const CLOSING: &str = "Keep a copy of the image's header, too: `cryptsetup luksHeaderBackup \"$IMAGE\" \
    --header-backup-file FILE`. Whoever has it and an old passphrase can open the image, whatever \
    passphrase is changed later.";

const STYLE: &str = "body{font:11pt/1.4 sans-serif;max-width:46em;margin:2em auto;padding:0 1em}\
    h1{font-size:15pt}h2{font-size:12pt;margin-bottom:0}th{text-align:left;padding-right:1em}\
    td,pre{font-family:monospace}pre{background:#eee;padding:.5em;white-space:pre-wrap;\
    overflow-wrap:anywhere}.qr{float:right;width:45mm;margin:0 0 1em 1em}.qr svg{width:100%}\
    @media print{body{margin:0}pre,h2{page-break-inside:avoid}}";

/// Who at which host, as ssh takes it.
fn target(server: &Server) -> String {
    let host = shown(&server.host);
    match &server.user {
        Some(user) => format!("{}@{host}", shown(user)),
        None => host,
    }
}

/// The same where a colon ends the host: an IPv6 address stands in brackets.
fn bracketed(server: &Server) -> String {
    shown(&server.to_string())
}

/// On one line, whatever the server or a header says.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

fn quoted(text: &str) -> String {
    shell_words::quote(&shown(text)).into_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// A QR code as SVG, with the quiet zone of four modules that readers need.
fn qr(text: &str) -> Result<String> {
    let code = QrCode::with_error_correction_level(text, EcLevel::M)
        .map_err(|error| Error::new(Kind::Unsupported, format!("draw a QR code: {error}")))?;
    let width = code.width();
    let mut path = String::new();
    for (at, color) in code.to_colors().into_iter().enumerate() {
        if color == Color::Dark {
            path.push_str(&format!("M{} {}h1v1h-1z", at % width + 4, at / width + 4));
        }
    }
    let side = width + 8;
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {side} {side}\" \
         shape-rendering=\"crispEdges\"><path fill=\"#fff\" d=\"M0 0h{side}v{side}H0z\"/>\
         <path d=\"{path}\"/></svg>"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sheet(host: &str, path: &str) -> Sheet {
        Sheet {
            location: format!("{host}:{path}"),
            address: Address {
                server: Some(Server {
                    user: Some("ann".into()),
                    host: host.into(),
                    port: Some(2222),
                }),
                path: path.into(),
            },
            size: 5 << 40,
            uuid: "6f3c1dd6-0f04-4c1e-8a43-6d5a3c1b2e90".into(),
            label: "<b>\x1b[2J".into(),
            cipher: "aes-xts-plain64".into(),
            keyslots: 2,
            printed: "2026-11-21".into(),
        }
    }

    #[test]
    fn names_are_quoted_for_the_shell_and_for_the_page() {
        let text = sheet("nas", "my files/it's $HOME.img").text();
        assert!(
            text.contains("sshfs -o ro,port=2222 'ann@nas:my files'"),
            "{text}"
        );
        assert!(!text.contains('\x1b'), "{text}");
        let copy = text
            .lines()
            .find(|line| line.contains("tar -cSf"))
            .expect("a line");
        let words = shell_words::split(copy.split('|').next().expect("a half")).expect("words");
        let remote = shell_words::split(words.last().expect("a word")).expect("words");
        assert_eq!(remote.last().map(String::as_str), Some("it's $HOME.img"));
        let html = sheet("nas", "a.img").html().expect("a page");
        assert!(
            html.contains("&lt;b&gt;") && html.contains("<svg"),
            "{html}"
        );
    }

    #[test]
    fn every_command_and_the_url_lead_to_the_same_file() {
        for (host, path, url, sshfs, ssh) in [
            (
                "nas",
                "a.img",
                "sftp://ann@nas:2222/~/a.img",
                "ann@nas:.",
                "ann@nas",
            ),
            (
                "nas",
                "/srv/a.img",
                "sftp://ann@nas:2222/srv/a.img",
                "ann@nas:/srv",
                "ann@nas",
            ),
            (
                "fe80::1",
                "/srv/a.img",
                "sftp://ann@[fe80::1]:2222/srv/a.img",
                "ann@[fe80::1]:/srv",
                "ann@fe80::1",
            ),
        ] {
            let mut sheet = sheet(host, path);
            let first = |sheet: &Sheet| sheet.essentials().lines().next().map(String::from);
            assert_eq!(first(&sheet).as_deref(), Some(url));
            let text = sheet.text();
            let word = |begin: &str, at: usize| {
                let line = text.lines().find(|line| line.trim().starts_with(begin));
                shell_words::split(line.expect(begin)).expect("words")[at].clone()
            };
            assert_eq!(word("sshfs ", 3), sshfs);
            assert_eq!(word("ssh ", 3), ssh);
            if let Some(server) = &mut sheet.address.server {
                server.port = None;
            }
            let usual = url.replace(":2222/", ":22/");
            assert_eq!(first(&sheet), Some(usual), "a phone knows no default");
        }
    }
}
