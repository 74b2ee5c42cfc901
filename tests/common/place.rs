//! An image somewhere, and how the program reaches it.

use std::path::{Path, PathBuf};

use super::{Program, Sandbox, Sshd, assert_same_tree, run, tool};

pub struct Place<'a> {
    pub sandbox: &'a Sandbox,
    /// As the program is told.
    pub location: String,
    /// Arguments that belong to it.
    pub options: Vec<String>,
    /// The image's file, as the server sees it.
    pub stored: PathBuf,
}

impl<'a> Place<'a> {
    /// A local file.
    pub fn local(sandbox: &'a Sandbox) -> Self {
        let stored = sandbox.dir("store").join("a.img");
        Place {
            sandbox,
            location: stored.display().to_string(),
            options: Vec::new(),
            stored,
        }
    }

    /// A file behind OpenSSH's own SFTP server on pipes, without ssh.
    pub fn piped(sandbox: &'a Sandbox) -> Self {
        let stored = sandbox.dir("store").join("a.img");
        Place {
            sandbox,
            location: format!("pipe:{}", stored.display()),
            options: vec![
                "--ssh-command".into(),
                "/usr/lib/openssh/sftp-server -e".into(),
            ],
            stored,
        }
    }

    /// A file behind a real sshd.
    pub fn over(sandbox: &'a Sandbox, sshd: &Sshd) -> Self {
        Place {
            sandbox,
            location: sshd.location("a.img"),
            options: sshd.options(),
            stored: sshd.stored("a.img"),
        }
    }

    /// The program with this verb, at this location, with the test's passphrase.
    pub fn program(&self, verb: &str) -> Program<'a> {
        let program = Program::new(self.sandbox, verb);
        program.args(&self.options).arg(&self.location)
    }

    /// `init` with the cheapest key derivation that LUKS2 tools accept.
    pub fn init(&self, size: &str) -> Program<'a> {
        let program = self.program("init").args(["--size", size]);
        program.args(["--kdf-memory", "32M", "--kdf-time", "4"])
    }

    pub fn backup(&self, source: &Path) -> Program<'a> {
        self.program("backup").arg(source)
    }

    /// Restores `what` to `to`.
    pub fn restore(&self, what: &str, to: &Path) -> Program<'a> {
        self.program("restore").arg(what).arg(to)
    }

    /// Restores the newest snapshot of `source`, and fails unless that is what is there now.
    pub fn assert_latest_is(&self, source: &Path) {
        let restored = self.sandbox.path("restored");
        self.restore(&format!("latest:{}", source.display()), &restored)
            .ok();
        assert_same_tree(source, &restored);
        std::fs::remove_dir_all(&restored).expect("removed");
    }

    /// What `snapshots --json` lists, oldest first.
    pub fn snapshots(&self) -> Vec<serde_json::Value> {
        let listed = self.program("snapshots").arg("--json").ok().json();
        let array = listed.as_array().expect("an array of objects");
        assert!(array.iter().all(serde_json::Value::is_object), "{listed}");
        array.clone()
    }

    /// The ids of the snapshots, oldest first.
    pub fn ids(&self) -> Vec<String> {
        let id = |snapshot: &serde_json::Value| snapshot["id"].as_str().map(String::from);
        let ids = self.snapshots();
        ids.iter().map(|s| id(s).expect("an id")).collect()
    }

    /// Names of the files beside the image that are not the image.
    pub fn side_files(&self) -> Vec<String> {
        let dir = self.stored.parent().expect("a directory");
        let entries = std::fs::read_dir(dir).expect("readable").flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name != "a.img").collect()
    }

    /// Fails unless the program is gone without a trace: no process, mount or loop device, no lease.
    pub fn assert_closed(&self) {
        self.sandbox.assert_nothing_left();
        let side_files = self.side_files();
        assert!(side_files.is_empty(), "beside the image: {side_files:?}");
    }

    /// What stock cryptsetup says of the image.
    pub fn luks_dump(&self) -> String {
        run(tool("cryptsetup").arg("luksDump").arg(&self.stored))
    }
}
