//! The kernel as one more judge: it replays the journal itself, and reads what was promised.

use std::path::Path;

use super::common::{output, private_shell};
use super::judge::Published;

/// Of the copy of a volume: the sums of all files of each snapshot that was promised; what is not
/// as it was, a sentence each.
pub fn judge(volume: &Path, source: &str, promised: &[Published<'_>]) -> Vec<String> {
    let copy = volume.with_extension("mounted");
    let script = "cp --sparse=always \"$1\" \"$2\"; mount -o loop,noatime \"$2\" /mnt; shift 2
        for tree; do echo \"tree $tree\"; cd \"/mnt/snapshots/$tree\"
        find . -type f -exec sha256sum -b {} +; done";
    let mut shell = private_shell(script);
    shell.arg("sh").arg(volume).arg(&copy);
    shell.args(promised.iter().map(|s| format!("{}{source}", s.id)));
    let told = output(&mut shell);
    let _ = std::fs::remove_file(&copy);
    if !told.status.success() {
        let said = String::from_utf8_lossy(&told.stderr);
        return vec![format!("the kernel: {}: {said}", told.status)];
    }
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let mut wrong = Vec::new();
    for snapshot in promised {
        let tree = format!("tree {}{source}\n", snapshot.id);
        let (_, after) = told.split_once(&tree).unwrap_or_default();
        let lines = after.split("tree ").next().unwrap_or_default().lines();
        // `SUM *./NAME`
        let mut sums: Vec<(&str, &str)> = lines
            .filter_map(|line| line.split_once(" *."))
            .map(|(sum, name)| (name, sum))
            .collect();
        sums.sort_unstable();
        let mut expected: Vec<(&str, &str)> = Vec::new();
        for (name, about) in snapshot.tree {
            let words: Vec<&str> = about.split(' ').collect();
            if let [_, _, "f", _, sum] = words[..] {
                expected.push((std::str::from_utf8(name).expect("UTF-8"), sum));
            }
        }
        if sums != expected {
            let differs = |(name, _): &&(&str, &str)| {
                let of = |sums: &[(&str, &str)]| {
                    let found = sums.iter().find(|(other, _)| other == name);
                    found.map(|(_, sum)| (*sum).to_string())
                };
                of(&sums) != of(&expected)
            };
            let first = sums.iter().chain(&expected).find(differs);
            wrong.push(format!(
                "the kernel reads another {}: {first:?}",
                snapshot.id
            ));
        }
    }
    wrong
}
