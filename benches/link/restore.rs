//! Getting files back over a long link, by e2ebak, restic and borg from repositories of the same
//! tree: `scripts/bench-restore`.
//!
//! Each command begins cold, as on a machine that has seen none of the repositories, and runs as its
//! manual shows it. Key derivations are what each tool makes by default.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::common::{PASSPHRASE, Program, large_file, run, tool};
use crate::ext4::patiently;
use crate::report::{BORG, OURS, RESTIC, Report};
use crate::rig::Rig;
use crate::stop;
use crate::tree;

const ONE: &str = "one";
const ONE_BYTES: u64 = 1 << 20;

/// What is done, and its row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Job {
    Snapshots,
    File,
    List,
    Everything,
}

const JOBS: [(Job, &str); 4] = [
    (Job::Snapshots, "list the snapshots"),
    (Job::File, "restore one file of 1 MiB"),
    (Job::List, "list all files"),
    (Job::Everything, "restore everything"),
];

/// Measures all, in turns.
pub fn compare(rig: &Rig, trips: &[u64], report: &mut Report) {
    let tree = Tree::make(rig);
    report.note(format!(
        "{} files, {} MiB, and one of 1 MiB; each command begins cold, with an empty cache; the key \
         derivation is {}",
        tree.files,
        tree.bytes >> 20,
        match rig.args.quick {
            true => "each tool's default, but e2ebak's the cheapest",
            false => "each tool's default, which for e2ebak takes two seconds of every figure",
        }
    ));
    report.note(
        "where the time and the bytes go: [performance.md](performance.md), reading snapshots from afar"
            .into(),
    );
    for &rtt in trips {
        for number in 0..rig.args.runs() {
            eprintln!("-- {rtt} ms, run {} of {}", number + 1, rig.args.runs());
            for (job, what) in JOBS {
                let mut tools = [OURS, RESTIC, BORG];
                tools.rotate_left(number % 3);
                for tool in tools {
                    stop::check();
                    tree.measure(rig, rtt, tool, (job, what), report);
                }
            }
        }
    }
}

/// What is in every repository.
struct Tree {
    source: PathBuf,
    files: u64,
    bytes: u64,
}

impl Tree {
    /// The tree, and a repository of it for each of them, made on the server.
    fn make(rig: &Rig) -> Tree {
        let count = if rig.args.quick {
            1_000
        } else {
            rig.args.files
        };
        eprintln!("-- {count} files in three repositories");
        let (tar, source) = (rig.local("tree.tar"), rig.local("tree"));
        let bytes = tree::write(&tar, count);
        fs::create_dir(&source).expect("a directory");
        patiently(tool("tar").arg("-xf").arg(&tar).arg("-C").arg(&source));
        fs::remove_file(tar).expect("the archive");
        large_file(&source.join(ONE), ONE_BYTES, 7);

        let image = rig.stored("a.img");
        let ours = |verb: &str| Program::new(&rig.sandbox, verb).arg(&image);
        let cheap = ["--kdf-memory", "32M", "--kdf-time", "4"];
        let cheap = if rig.args.quick { &cheap[..] } else { &[] };
        ours("init").args(["--size", "20G"]).args(cheap).ok();
        ours("backup").arg(&source).ok();
        let restic = || {
            let mut command = tool("restic");
            command.args(["-q", "-r"]).arg(rig.stored("restic"));
            command.env("RESTIC_PASSWORD", PASSPHRASE);
            command.env("RESTIC_CACHE_DIR", rig.local("restic-cache"));
            command
        };
        run(restic().arg("init"));
        run(restic().arg("backup").arg(&source));
        let borg = || {
            let mut command = tool("borg");
            for (name, value) in borg_environment(&rig.local("borg-cache")) {
                command.env(name, value);
            }
            command
        };
        let repository = rig.stored("borg");
        run(borg()
            .args(["init", "-e", "repokey-blake2"])
            .arg(&repository));
        let archive = format!("{}::archive", repository.display());
        run(borg().arg("create").arg(archive).arg(&source));
        Tree {
            source,
            files: u64::from(count),
            bytes,
        }
    }

    fn measure(&self, rig: &Rig, rtt: u64, who: &str, job: (Job, &str), report: &mut Report) {
        let (job, what) = job;
        let cold = rig.local("cold");
        let into = cold.join("into");
        fs::create_dir_all(&into).expect("a directory");
        let listing = cold.join("listing");
        let mut command = match who {
            OURS => self.ours(rig, rtt, job, &into),
            RESTIC => self.restic(rig, rtt, job, &cold),
            _ => self.borg(rig, rtt, job, &cold),
        };
        command.stdout(File::create(&listing).expect("a file"));
        // Nobody pays for what the one before has left to be written.
        rustix::fs::sync();
        let (before, began) = (rig.sent_by_server(), Instant::now());
        patiently(&mut command);
        report.add(what, rtt, who, "seconds", began.elapsed().as_secs_f64());
        if rig.is_proxied(rtt) {
            let sent = (rig.sent_by_server() - before) as f64;
            report.add(what, rtt, who, "mib_sent", sent / f64::from(1 << 20));
        }
        self.check(job, who, &into, &listing);
        fs::remove_dir_all(&cold).expect("what was restored");
    }

    /// That it has done what it was asked to.
    fn check(&self, job: Job, who: &str, into: &Path, listing: &Path) {
        let whole = self.source.strip_prefix("/").expect("absolute");
        let restored = match who {
            OURS => into.join("tree"),
            _ => into.join(whole),
        };
        match job {
            Job::Snapshots => assert!(fs::metadata(listing).is_ok_and(|m| m.len() > 0), "{who}"),
            Job::List => {
                let text = fs::read(listing).expect("a listing");
                let lines = text.iter().filter(|byte| **byte == b'\n').count();
                assert!(lines as u64 > self.files, "{who} lists {lines} files");
            }
            Job::File => {
                let found = match who {
                    OURS => into.join(ONE),
                    RESTIC => listing.into(),
                    _ => restored.join(ONE),
                };
                run(tool("cmp").arg(found).arg(self.source.join(ONE)));
            }
            Job::Everything => {
                run(tool("diff").args(["-rq"]).arg(&self.source).arg(restored));
            }
        }
    }

    fn ours(&self, rig: &Rig, rtt: u64, job: Job, into: &Path) -> Command {
        let mut command = Command::new(Program::binary());
        command.env("E2EBAK_PASSPHRASE", PASSPHRASE);
        let verb = match job {
            Job::Snapshots => "snapshots",
            Job::List => "ls",
            Job::File | Job::Everything => "restore",
        };
        command.arg(verb).args(rig.options());
        command.arg(rig.location("a.img", rtt));
        let latest = format!("latest:{}", self.source.display());
        match job {
            Job::Snapshots => &mut command,
            Job::List => command.args(["-R", &latest]),
            Job::File => command.arg(format!("{latest}/{ONE}")).arg(into),
            Job::Everything => command.arg(latest).arg(into),
        };
        command
    }

    fn restic(&self, rig: &Rig, rtt: u64, job: Job, cold: &Path) -> Command {
        let mut command = tool("restic");
        command.env("RESTIC_PASSWORD", PASSPHRASE);
        command.env("RESTIC_CACHE_DIR", cold.join("cache"));
        let ssh = format!("sftp.command={} 127.0.0.1 -s sftp", self.ssh(rig, rtt));
        command.args(["-q", "-o", &ssh, "-r"]);
        command.arg(format!("sftp:127.0.0.1:{}", rig.stored("restic").display()));
        match job {
            Job::Snapshots => command.arg("snapshots"),
            Job::List => command.args(["ls", "latest"]),
            // Quicker than `restore --include`.
            Job::File => command.args(["dump", "latest"]).arg(self.source.join(ONE)),
            Job::Everything => command
                .args(["restore", "latest", "--target"])
                .arg(cold.join("into")),
        };
        command
    }

    fn borg(&self, rig: &Rig, rtt: u64, job: Job, cold: &Path) -> Command {
        let mut command = tool("borg");
        for (name, value) in borg_environment(&cold.join("cache")) {
            command.env(name, value);
        }
        command.env("BORG_RSH", self.ssh(rig, rtt));
        let repository = format!(
            "ssh://127.0.0.1:{}{}",
            rig.port(rtt),
            rig.stored("borg").display()
        );
        let archive = format!("{repository}::archive");
        let inside = self.source.strip_prefix("/").expect("absolute");
        match job {
            Job::Snapshots => command.args(["list", &repository]),
            Job::List => command.args(["list", &archive]),
            Job::File => command.args(["extract", &archive]).arg(inside.join(ONE)),
            Job::Everything => command.args(["extract", &archive]),
        };
        command.current_dir(cold.join("into"));
        command.stderr(Stdio::null()); // what it says of a repository that it has not met
        command
    }

    fn ssh(&self, rig: &Rig, rtt: u64) -> String {
        let config = rig.peers_config();
        format!("ssh -F {} -p {}", config.display(), rig.port(rtt))
    }
}

/// All that borg keeps is in `base`, and it asks nothing.
fn borg_environment(base: &Path) -> [(&'static str, String); 3] {
    [
        ("BORG_PASSPHRASE", PASSPHRASE.into()),
        ("BORG_BASE_DIR", base.display().to_string()),
        ("BORG_RELOCATED_REPO_ACCESS_IS_OK", "yes".into()),
    ]
}
