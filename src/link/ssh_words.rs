//! What ssh says when it fails, put into words with a hint.

use super::child::Ending;
use crate::error::{Error, Kind};
use crate::location::Server;

/// The exit code with which ssh reports an error of its own, and not of what it ran.
const SSH_FAILED: i32 = 255;

/// What a master says when its server lets it open no more channels (`MaxSessions`); the ssh of
/// that stream then connects by itself, asking nobody.
const NO_MORE_SESSIONS: &str = "Session open refused by peer";

/// What an ssh with a connection of its own says of a server without SFTP.
const NO_SUBSYSTEM: &str = "subsystem request failed";

/// A way for ssh to fail: what it prints then, and what that means.
struct Failure {
    marks: &'static [&'static str],
    kind: Kind,
    text: &'static str,
    hint: &'static str,
}

/// In order: a changed host key also says that verification failed, and so on.
#[rustfmt::skip]
const FAILURES: &[Failure] = &[
    Failure {
        marks: &["REMOTE HOST IDENTIFICATION HAS CHANGED", "REVOKED HOST KEY DETECTED"],
        kind: Kind::Disconnected,
        text: "the server shows another host key than it did before",
        hint: "if the server was set up anew, remove its old key with `ssh-keygen -R HOST`; else somebody may be in between",
    },
    Failure {
        marks: &["Host key verification failed", "No matching host key fingerprint"],
        kind: Kind::Disconnected,
        text: "the host key of the server is not known",
        hint: "run `ssh HOST` once by hand, as the same user, and compare the fingerprint",
    },
    Failure {
        marks: &["Permission denied (", "Too many authentication failures", "No more authentication methods"],
        kind: Kind::Denied,
        text: "the server did not accept our login",
        hint: "try `ssh HOST` by hand, as the same user; a key with a passphrase needs ssh-agent or a terminal",
    },
    Failure {
        marks: &[NO_SUBSYSTEM],
        kind: Kind::Unsupported,
        text: "the server offers no SFTP",
        hint: "it needs a line `Subsystem sftp internal-sftp` in its sshd_config",
    },
    Failure {
        marks: &["Bad configuration option", "bad configuration option", "command-line line 0", "Bad owner or permissions"],
        kind: Kind::Usage,
        text: "ssh does not accept its configuration",
        hint: "`ssh -G HOST` shows what it makes of it",
    },
    Failure {
        marks: &["Could not resolve hostname"],
        kind: Kind::Disconnected,
        text: "the name of the server could not be resolved",
        hint: "check the host name and the network",
    },
    Failure {
        marks: &["Connection refused"],
        kind: Kind::Disconnected,
        text: "the server refused the connection",
        hint: "check that sshd runs there, and its port",
    },
    Failure {
        marks: &["No route to host", "Network is unreachable", "Host is down", "Connection timed out", "Operation timed out"],
        kind: Kind::Disconnected,
        text: "the server could not be reached",
        hint: "check the network",
    },
    Failure {
        marks: &["not responding"],
        kind: Kind::Disconnected,
        text: "the server stopped answering",
        hint: "check the network",
    },
];

/// Reads what ssh said when it ended.
pub fn explain(server: &Server, ending: &Ending) -> Error {
    let said = |mark: &&str| ending.says(mark);
    let own = ending
        .status
        .is_none_or(|status| status.code() == Some(SSH_FAILED));
    let failure = FAILURES
        .iter()
        .find(|failure| own && failure.marks.iter().any(said));
    match failure {
        Some(failure) if failure.kind == Kind::Denied && ending.says(NO_MORE_SESSIONS) => {
            Error::new(failure.kind, "the server takes no more streams on one connection, and another connection may not ask for a login")
                .hint("raise MaxSessions in its sshd_config, or log in by ssh-agent or a key without a passphrase")
                .because(ending.error(failure.kind, "ssh"))
        }
        None => ending.error(Kind::Disconnected, "ssh"),
        Some(failure) => Error::new(failure.kind, failure.text)
            .hint(failure.hint.replace("HOST", &server.host))
            .because(ending.error(failure.kind, "ssh")),
    }
}

/// The same for a stream of a master that is still up. There a refused subsystem ends ssh without
/// a word.
pub fn explain_shared(server: &Server, ending: &Ending) -> Error {
    let failed = ending.status.and_then(|status| status.code()) == Some(SSH_FAILED);
    let mut ending = ending.clone();
    if failed && ending.words.is_empty() && !ending.answered {
        ending.words.push(NO_SUBSYSTEM.into());
    }
    explain(server, &ending)
}
