//! Who may write: of many that try at once, exactly one.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use e2ebak::error::Kind;
use e2ebak::remote::Store;
use e2ebak::remote::lease::{Holder, Lease, SUFFIX};
use e2ebak::remote::local::LocalStore;

use crate::rig::Rig;

fn take(store: &Arc<dyn Store>) -> e2ebak::error::Result<Lease> {
    Lease::take(store.clone(), "nas:a.img")
}

/// The lease of a process that has died, taken by that process itself.
fn dead_holder(rig: &Rig) -> Holder {
    let child = Command::new(std::env::current_exe().expect("known"))
        .args([
            "lease::a_process_that_dies_with_its_lease",
            "--exact",
            "--ignored",
        ])
        .env("LEASE_IMAGE", rig.image())
        .stdout(Stdio::null())
        .status();
    assert!(child.expect("runs").code() == Some(77), "it took the lease");
    let holder = Lease::peek(&*rig.store())
        .expect("reads")
        .expect("is left behind");
    assert!(holder.is_dead());
    holder
}

/// Not a test: the body of a child process.
#[test]
#[ignore = "started by other tests"]
fn a_process_that_dies_with_its_lease() {
    let Some(image) = std::env::var_os("LEASE_IMAGE") else {
        return;
    };
    let store: Arc<dyn Store> = Arc::new(LocalStore::new(image));
    let lease = take(&store).expect("takes");
    std::mem::forget(lease);
    std::process::exit(77);
}

fn rewrite(store: &Arc<dyn Store>, holder: &Holder, suffix: &str) {
    let content = serde_json::to_vec(holder).expect("encodes");
    store.replace_side(suffix, &content).expect("replaces");
}

pub fn one_takes_it_and_the_other_hears_who(rig: &Rig) {
    let (first, second) = (rig.store(), rig.store());
    let lease = take(&first).expect("takes");
    let error = take(&second).map(drop).expect_err("is in use");
    assert_eq!(error.kind(), Kind::InUse, "{}", error.report());
    let pid = std::process::id().to_string();
    for part in [&pid, &lease.holder().host, &lease.holder().since, "renewed"] {
        assert!(error.report().contains(part), "{part}: {}", error.report());
    }
    lease.renew().expect("is still ours");
    let holder = Lease::peek(&*second).expect("reads").expect("is held");
    assert_eq!(holder.nonce, lease.holder().nonce);
    assert_eq!(holder.since, lease.holder().since);
    lease.release().expect("releases");
    assert!(Lease::peek(&*second).expect("reads").is_none());
    drop(take(&second).expect("takes"));
    assert!(
        Lease::peek(&*first).expect("reads").is_none(),
        "drop releases too"
    );
}

pub fn a_dead_holder_is_succeeded(rig: &Rig) {
    let dead = dead_holder(rig);
    let store = rig.store();
    let lease = take(&store).expect("succeeds");
    assert!(
        lease
            .note()
            .expect("a note")
            .contains(&dead.pid.to_string())
    );
    lease.check().expect("is ours");
    lease.release().expect("releases");
    let left = std::fs::read_dir(rig.dir.path()).expect("read").count();
    assert_eq!(left, 0, "nothing is left behind");
}

pub fn of_many_takers_one_wins(rig: &Rig) {
    const TAKERS: usize = 5;
    const ROUNDS: usize = 12;
    let stores: Vec<_> = (0..TAKERS).map(|_| rig.store()).collect();
    let start = Barrier::new(TAKERS);
    let over = Barrier::new(TAKERS);
    let wins = AtomicUsize::new(0);
    for round in 0..ROUNDS {
        // Every other round begins with a dead holder, and some with a dead successor too.
        if round % 2 == 1 {
            let dead = dead_holder(rig);
            if round % 4 == 3 {
                let successor = Holder {
                    nonce: format!("{round:032x}"),
                    ..dead.clone()
                };
                rewrite(
                    &stores[0],
                    &successor,
                    &format!("{SUFFIX}.after-{}", dead.nonce),
                );
            }
        }
        wins.store(0, Ordering::SeqCst);
        thread::scope(|scope| {
            for store in &stores {
                let (start, over, wins) = (&start, &over, &wins);
                scope.spawn(move || {
                    start.wait();
                    let taken = take(store);
                    if taken.is_ok() {
                        wins.fetch_add(1, Ordering::SeqCst);
                    }
                    over.wait(); // it is held until everybody has tried
                    match taken {
                        Ok(lease) => lease.release().expect("is ours"),
                        Err(error) => {
                            assert_eq!(error.kind(), Kind::InUse, "{}", error.report());
                        }
                    }
                });
            }
        });
        assert_eq!(wins.load(Ordering::SeqCst), 1, "round {round}");
        assert!(Lease::peek(&*stores[0]).expect("reads").is_none());
    }
}

/// Takers that come and go: whoever holds it is alone, and nobody releases another's.
pub fn holders_never_overlap(rig: &Rig) {
    let stores: Vec<_> = (0..4).map(|_| rig.store()).collect();
    let holding = AtomicUsize::new(0);
    let taken = AtomicUsize::new(0);
    thread::scope(|scope| {
        for store in &stores {
            let (holding, taken) = (&holding, &taken);
            scope.spawn(move || {
                for _ in 0..30 {
                    let Ok(lease) = take(store) else { continue };
                    assert_eq!(holding.fetch_add(1, Ordering::SeqCst), 0);
                    taken.fetch_add(1, Ordering::SeqCst);
                    lease.renew().expect("is ours");
                    thread::sleep(Duration::from_micros(200));
                    holding.fetch_sub(1, Ordering::SeqCst);
                    lease.release().expect("is ours");
                }
            });
        }
    });
    assert!(taken.load(Ordering::SeqCst) > 10);
}

pub fn a_foreign_lease_needs_force(rig: &Rig) {
    let store = rig.store();
    let dead = dead_holder(rig);
    let foreign = Holder {
        host: "elsewhere".into(),
        boot_id: "another".into(),
        ..dead
    };
    rewrite(&store, &foreign, SUFFIX);
    let error = take(&store).map(drop).expect_err("is foreign");
    assert_eq!(error.kind(), Kind::InUse, "{}", error.report());
    let hint = error.deepest_hint().expect("a hint");
    assert!(hint.contains("e2ebak unlock nas:a.img --force"), "{hint}");
    let error = Lease::clear(store.clone(), "nas:a.img", false).expect_err("needs force");
    assert_eq!(error.kind(), Kind::InUse, "{}", error.report());
    let cleared = Lease::clear(store.clone(), "nas:a.img", true).expect("clears");
    assert_eq!(cleared.expect("somebody's").host, "elsewhere");
    assert!(
        Lease::clear(store.clone(), "nas:a.img", false)
            .expect("free")
            .is_none()
    );
    drop(take(&store).expect("takes"));
}

pub fn a_lease_taken_away_is_noticed_and_not_removed(rig: &Rig) {
    let store = rig.store();
    let lease = take(&store).expect("takes");
    Lease::clear(rig.store(), "nas:a.img", true).expect("clears");
    assert_eq!(lease.renew().expect_err("is gone").kind(), Kind::InUse);
    let other = take(&store).expect("takes");
    let error = lease.renew().expect_err("is another's");
    assert_eq!(error.kind(), Kind::InUse, "{}", error.report());
    assert_eq!(
        lease.release().expect_err("is another's").kind(),
        Kind::InUse
    );
    other.check().expect("is untouched");
}

pub fn an_unreadable_lease_needs_force(rig: &Rig) {
    let store = rig.store();
    for content in ["", "{}", "\0\u{1}"] {
        store
            .replace_side(SUFFIX, content.as_bytes())
            .expect("writes");
        let error = take(&store).map(drop).expect_err("unreadable");
        assert_eq!(error.kind(), Kind::InUse, "{}", error.report());
        assert!(Lease::clear(store.clone(), "nas:a.img", false).is_err());
        Lease::clear(store.clone(), "nas:a.img", true).expect("clears");
    }
    drop(take(&store).expect("takes"));
}

/// Many processes, of which some die while they hold it.
#[test]
fn processes_that_die_lose_nothing_but_their_lease() {
    let Some(rig) = Rig::local() else { return };
    for _ in 0..3 {
        let mut children: Vec<Child> = (0..4).map(|_| dying_taker(&rig)).collect();
        let outcomes: Vec<Option<i32>> = children
            .iter_mut()
            .map(|child| child.wait().expect("ends").code())
            .collect();
        // Each takes it after the other's death, or finds it in use; nothing else.
        assert!(outcomes.contains(&Some(77)), "{outcomes:?}");
        assert!(
            outcomes.iter().all(|code| matches!(code, Some(77 | 101))),
            "{outcomes:?}"
        );
    }
    let store = rig.store();
    take(&store).expect("succeeds").release().expect("releases");
}

fn dying_taker(rig: &Rig) -> Child {
    Command::new(std::env::current_exe().expect("known"))
        .args([
            "lease::a_process_that_dies_with_its_lease",
            "--exact",
            "--ignored",
        ])
        .env("LEASE_IMAGE", rig.image())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("runs")
}

/// A holder that is stopped is not dead, and neither is one that sleeps.
#[test]
fn a_living_process_is_not_succeeded() {
    let Some(rig) = Rig::local() else { return };
    let mut child = Command::new("sh")
        .args(["-c", "echo; exec sleep 60"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("runs");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped").take(1))
        .read_line(&mut line)
        .expect("reads");
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("read");
    let start: u64 = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().nth(19))
        .and_then(|field| field.parse().ok())
        .expect("field 22");
    let store = rig.store();
    let mine = take(&store).expect("takes");
    let holder = Holder {
        pid: child.id() as i32,
        start_ticks: start,
        ..mine.holder().clone()
    };
    drop(mine);
    rewrite(&store, &holder, SUFFIX);
    let error = take(&store).map(drop).expect_err("is alive");
    assert_eq!(error.kind(), Kind::InUse, "{}", error.report());
    child.kill().expect("killed");
    // Not even waited for: what is left of it holds nothing.
    thread::sleep(Duration::from_millis(100));
    drop(take(&store).expect("succeeds"));
    child.wait().expect("reaped");
}
