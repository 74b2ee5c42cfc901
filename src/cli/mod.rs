//! The command line: a verb is a page; this file only chooses it and turns its result into an
//! exit code.

mod args;
mod backup;
mod browse;
mod cat;
mod check;
mod copy;
mod diff;
mod dump;
mod entry;
mod find;
mod findings;
mod grow;
mod info;
mod init;
mod keep;
mod key;
mod look;
mod ls;
mod marks;
mod mount;
mod mounted;
mod opening;
mod pin;
mod prune;
mod recovery_sheet;
mod restore;
mod sheet;
mod snapshots;
mod trim;
mod umount;
mod unlock;
mod unmounted;
mod unpin;
mod usage;
mod versions;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Kind, Result};
use crate::session;
use crate::ui::{all_was_printed, printed, tell};

/// Encrypted backup into one LUKS2 image on a server that nobody has to trust.
#[derive(Parser)]
#[command(name = "e2ebak", version, about, after_help = AFTER_HELP, max_term_width = 100)]
struct Cli {
    /// Show decisions (-v) or every child process (-vv) on standard error
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    verb: Verb,
}

const AFTER_HELP: &str = "\
Locations:   [user@]host:path   sftp://[user@]host[:port]/path   /local/path   file:///path
Exit codes:  0 ok, 1 failed, 2 usage, 3 done with warnings, 10 no such image, 11 in use,
             12 wrong key, 13 corrupt, 14 disconnected, 130 interrupted";

#[derive(Subcommand)]
enum Verb {
    Init(init::Args),
    Backup(backup::Args),
    Snapshots(snapshots::Args),
    Ls(ls::Args),
    Cat(cat::Args),
    Find(find::Args),
    Diff(diff::Args),
    Versions(versions::Args),
    Restore(restore::Args),
    Dump(dump::Args),
    Browse(browse::Args),
    Prune(prune::Args),
    Pin(pin::Args),
    Unpin(unpin::Args),
    Usage(usage::Args),
    Check(check::Args),
    Copy(copy::Args),
    Trim(trim::Args),
    Grow(grow::Args),
    Mount(mount::Args),
    Umount(umount::Args),
    Info(info::Args),
    RecoverySheet(recovery_sheet::Args),
    Unlock(unlock::Args),
    #[command(name = session::VERB, hide = true)]
    SessionProcess,
}

/// How a verb that did not fail has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Clean,
    /// Done, with something that a person should look at.
    Warnings,
}

pub fn main() -> ExitCode {
    let matches = Cli::command().try_get_matches();
    let cli = match matches.and_then(|m| Cli::from_arg_matches(&m)) {
        Ok(cli) => cli,
        Err(error) => {
            printed(error.print());
            return match (error.exit_code(), all_was_printed()) {
                (0, Err(error)) => failed(&error),
                (code, _) => ExitCode::from(code as u8),
            };
        }
    };
    start_log(cli.verbose);
    keep_memory_from_disk();
    if let Verb::SessionProcess = cli.verb {
        return session::serve();
    }
    let ended = run(cli.verb);
    match ended.and_then(|ending| all_was_printed().map(|()| ending)) {
        Ok(Ending::Clean) => ExitCode::SUCCESS,
        Ok(Ending::Warnings) => ExitCode::from(3),
        Err(error) => failed(&error),
    }
}

fn failed(error: &Error) -> ExitCode {
    tell!("{}", error.report());
    ExitCode::from(error.kind().exit_code())
}

fn run(verb: Verb) -> Result<Ending> {
    match verb {
        Verb::Init(args) => init::run(args),
        Verb::Backup(args) => backup::run(args),
        Verb::Snapshots(args) => snapshots::run(args),
        Verb::Ls(args) => ls::run(args),
        Verb::Cat(args) => cat::run(args),
        Verb::Find(args) => find::run(args),
        Verb::Diff(args) => diff::run(args),
        Verb::Versions(args) => versions::run(args),
        Verb::Restore(args) => restore::run(args),
        Verb::Dump(args) => dump::run(args),
        Verb::Browse(args) => browse::run(args),
        Verb::Prune(args) => prune::run(args),
        Verb::Pin(args) => pin::run(args),
        Verb::Unpin(args) => unpin::run(args),
        Verb::Usage(args) => usage::run(args),
        Verb::Check(args) => check::run(args),
        Verb::Copy(args) => copy::run(args),
        Verb::Trim(args) => trim::run(args),
        Verb::Grow(args) => grow::run(args),
        Verb::Mount(args) => mount::run(args),
        Verb::Umount(args) => umount::run(args),
        Verb::Info(args) => info::run(args),
        Verb::RecoverySheet(args) => recovery_sheet::run(args),
        Verb::Unlock(args) => unlock::run(args),
        Verb::SessionProcess => Err(Error::new(Kind::Usage, "this verb is not for people")),
    }
}

/// Passphrases and keys are in it, here and in the processes that this one starts.
fn keep_memory_from_disk() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    if let Err(errno) = setrlimit(Resource::Core, none) {
        tracing::warn!(%errno, "core dumps stay possible");
    }
}

/// The level of the log; a session process takes it over from the command.
const LOG: &str = "E2EBAK_LOG";

fn start_log(verbose: u8) {
    let level = match verbose {
        0 => std::env::var(LOG).unwrap_or_else(|_| "e2ebak=warn".into()),
        1 => "e2ebak=info".into(),
        2 => "e2ebak=debug".into(),
        _ => "e2ebak=trace".into(),
    };
    let filter = EnvFilter::try_new(&level).unwrap_or_else(|_| EnvFilter::new("e2ebak=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}
