//! Deleting snapshots, in order and out of it.

use rustix::process::Signal;

use super::common::{Place, Sandbox, assert_same_tree, plain_tree, root_or_skip, run, tool};
use super::{Mount, forge, names, wait_until};

const OLD: [&str; 5] = [
    "2020-01-01T08-00-00Z",
    "2020-01-01T20-00-00Z",
    "2020-01-02T08-00-00Z",
    "2020-02-01T08-00-00Z",
    "2021-01-01T08-00-00Z",
];

/// An image with one real snapshot and the forged ones.
fn filled<'a>(sandbox: &'a Sandbox, files: usize) -> Place<'a> {
    let place = Place::piped(sandbox);
    plain_tree(&sandbox.dir("source"), files);
    place.init("1G").ok();
    place.backup(&sandbox.path("source")).ok();
    forge(&place, &OLD, 0);
    assert_eq!(place.ids().len(), 6);
    place
}

#[test]
fn what_a_dry_run_tells_is_what_a_run_does() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = filled(&sandbox, 50);
    let newest = place.ids().pop().expect("one");
    let prune = || {
        place
            .program("prune")
            .args(["--keep-daily", "3", "--keep-yearly", "2"])
    };

    let told = prune().arg("--dry-run").env("TZ", "UTC").ok().stdout;
    assert_eq!(place.ids().len(), 6, "a dry run deletes nothing");
    let fate = |id: &str| {
        told.lines()
            .find(|l| l.contains(id))
            .expect("told")
            .to_string()
    };
    assert!(fate(&newest).starts_with("keep") && fate(&newest).contains("daily 1, yearly 1"));
    assert!(fate(OLD[4]).contains("daily 2, yearly 2"), "{told}");
    assert!(fate(OLD[3]).contains("daily 3"), "{told}");
    for id in &OLD[..3] {
        assert!(
            fate(id).starts_with("delete") && fate(id).contains("no rule"),
            "{told}"
        );
    }

    let ran = prune().env("TZ", "UTC").ok();
    assert!(ran.stdout.contains("deleted 3 snapshots"), "{ran}");
    assert_eq!(place.ids(), [OLD[3], OLD[4], &newest]);
    place.assert_closed();
    let left = names(&place);
    assert_eq!(left.len(), 6, "trees and records: {left:?}");
    place
        .restore(
            &format!("{}:{}", OLD[3], sandbox.path("source").display()),
            &sandbox.path("r"),
        )
        .ok();
    assert_same_tree(&sandbox.path("source"), &sandbox.path("r"));
    prune().ok();
    assert_eq!(place.ids().len(), 3, "a second run has nothing to do");
}

/// At 21:30 UTC it is another day in Berlin than at 22:30 UTC.
#[test]
fn the_time_zone_of_the_user_decides_what_a_day_is() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    plain_tree(&sandbox.dir("source"), 3);
    place.init("1G").ok();
    place.backup(&sandbox.path("source")).ok();
    forge(&place, &["2020-07-01T21-30-00Z", "2020-07-01T22-30-00Z"], 0);
    let dry = |zone| {
        let prune = place
            .program("prune")
            .args(["--keep-daily", "9", "--dry-run"]);
        prune.env("TZ", zone).ok().stdout
    };
    assert!(dry("UTC").contains("delete 1 snapshot"), "{}", dry("UTC"));
    assert!(dry("CET-1CEST,M3.5.0,M10.5.0").contains("delete 0 snapshots"));
}

#[test]
fn pinned_named_and_the_newest_stay_and_partial_ones_are_let_alone() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = filled(&sandbox, 20);
    let newest = place.ids().pop().expect("one");
    let mount = Mount::of(&place);
    let snapshots = mount.at.join("snapshots");
    std::fs::create_dir(snapshots.join("2019-01-01T00-00-00Z")).expect("no record");
    std::fs::create_dir(snapshots.join("2019-02-01T00-00-00Z.inflight")).expect("unfinished");
    std::fs::write(snapshots.join(format!("{}.json", OLD[1])), "{damaged").expect("written");
    mount.close();

    place.program("pin").arg("2020-01-02").ok();
    place.program("pin").arg("2020-01-02").ok();
    let table = place.program("snapshots").run().code(3).stdout;
    let line = table.lines().find(|l| l.contains(OLD[2])).expect("listed");
    assert!(line.ends_with("pinned"), "{table}");
    assert_eq!(
        place
            .program("snapshots")
            .arg("--json")
            .run()
            .code(3)
            .json()[1]["pinned"],
        true
    );

    let prune = |args: &[&str]| place.program("prune").args(args).run();
    prune(&["--keep-id", "2020-02"])
        .code(3)
        .says(OLD[1])
        .says("2019-01-01");
    let ids = |place: &Place| -> Vec<String> {
        let listed = place
            .program("snapshots")
            .arg("--json")
            .run()
            .code(3)
            .json();
        listed
            .as_array()
            .expect("all")
            .iter()
            .map(|s| s["id"].as_str().expect("id").into())
            .collect()
    };
    assert_eq!(ids(&place), [OLD[2], OLD[3], &newest]);
    let left = names(&place);
    for name in [
        "2019-01-01T00-00-00Z",
        "2019-02-01T00-00-00Z.inflight",
        OLD[1],
    ] {
        assert!(left.iter().any(|n| n == name), "{name} of {left:?}");
    }
    place.program("unpin").arg(OLD[2]).ok();
    prune(&["--keep-last", "1"]).code(3);
    assert_eq!(ids(&place), [newest.as_str()]);
    place.assert_closed();
}

#[test]
fn what_cannot_be_meant_is_refused_before_anything_goes() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = filled(&sandbox, 5);
    place.program("prune").run().code(2).says("--keep-");
    place
        .program("prune")
        .args(["--keep-last", "0"])
        .run()
        .code(2);
    place
        .program("prune")
        .args(["--keep-last", "-1"])
        .run()
        .code(2);
    place
        .program("prune")
        .args(["--keep-within", "soon"])
        .run()
        .code(2)
        .says("soon");
    place
        .program("prune")
        .args(["--keep-id", "1999"])
        .run()
        .code(1)
        .says("1999");
    place.program("pin").arg("1999").run().code(1).says("1999");
    // During a backup, or any other hold.
    let mount = Mount::of(&place);
    place
        .program("prune")
        .args(["--keep-last", "1"])
        .run()
        .code(11);
    mount.close();
    assert_eq!(place.ids().len(), 6);
    place.assert_closed();
}

#[test]
fn other_sources_count_by_themselves() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = filled(&sandbox, 5);
    plain_tree(&sandbox.dir("other"), 3);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    place.backup(&sandbox.path("other")).ok();
    let dry = |args: &[&str]| {
        let prune = place
            .program("prune")
            .args(["--keep-last", "1", "--dry-run"]);
        prune.args(args).ok().stdout
    };
    assert!(
        dry(&[]).contains("delete 5 snapshots; 2 would stay"),
        "{}",
        dry(&[])
    );
    assert!(dry(&["--group-by", "none"]).contains("delete 6 snapshots; 1 would stay"));
}

#[test]
fn backup_prunes_by_the_policy_it_is_given() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = filled(&sandbox, 5);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let ran = place
        .backup(&sandbox.path("source"))
        .args(["--keep-last", "2"])
        .ok();
    assert!(ran.stdout.contains("deleted"), "{ran}");
    assert_eq!(place.ids().len(), 2);
    place.assert_closed();
}

/// Killed, or asked to stop, at any moment: what is listed is whole, and the next prune finishes.
#[test]
fn an_interrupted_prune_leaves_no_half_snapshot_and_is_finished_later() {
    if !root_or_skip() {
        return;
    }
    for signal in [Signal::INT, Signal::KILL] {
        let sandbox = Sandbox::new();
        let place = Place::local(&sandbox);
        let source = sandbox.dir("source");
        plain_tree(&source, 3000);
        place.init("1G").ok();
        place.backup(&source).ok();
        forge(&place, &OLD, 0);
        let mut running = place
            .program("prune")
            .args(["--keep-last", "1", "-v"])
            .spawn();
        // The log tells when the first tree is gone.
        let log = running.stderr_path();
        wait_until(&mut running, || {
            std::fs::read_to_string(&log).is_ok_and(|text| text.contains("deleted"))
        });
        match signal {
            Signal::KILL => sandbox.kill_processes(),
            _ => running.signal_group(signal),
        }
        let ran = running.wait();
        assert!(
            signal == Signal::KILL || ran.status.code() == Some(130),
            "{ran}"
        );

        // Through a mount, which replays the journal of a killed one.
        let left = names(&place);
        let begun = left
            .iter()
            .filter(|name| name.ends_with(".deleting"))
            .count();
        assert!((1..=5).contains(&begun), "{signal:?}: {left:?}");
        assert_eq!(place.ids().len(), 1, "the others are no snapshots any more");
        let ran = place.program("prune").args(["--keep-last", "1"]).ok();
        assert!(ran.stdout.contains("finished deleting"), "{ran}");
        let left = names(&place);
        assert_eq!(left.len(), 2, "{left:?}");
        place
            .restore(&format!("latest:{}", source.display()), &sandbox.path("r"))
            .ok();
        assert_same_tree(&source, &sandbox.path("r"));
        super::assert_filesystem_clean(&place);
        place.assert_closed();
    }
}

#[test]
fn latest_follows_when_what_it_points_to_goes() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = filled(&sandbox, 5);
    let newest = place.ids().pop().expect("one");
    let mount = Mount::of(&place);
    run(tool("ln")
        .args(["-sfn", "snapshots/2020-01-01T08-00-00Z"])
        .arg(mount.at.join("latest")));
    mount.close();
    place.program("prune").args(["--keep-last", "1"]).ok();
    let mount = Mount::of(&place);
    let target = std::fs::read_link(mount.at.join("latest")).expect("a link");
    mount.close();
    assert_eq!(
        target.to_str(),
        Some(format!("snapshots/{newest}").as_str())
    );
}
