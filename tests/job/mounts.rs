//! The image as a mounted filesystem.

use super::*;

#[test]
fn a_mounted_image_is_a_filesystem_until_it_is_unmounted() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let sshd = Sshd::start(&sandbox);
    let place = Place::over(&sandbox, &sshd);
    let mounted = sandbox.dir("mnt");
    place.init("5T").ok();

    place.program("mount").arg(&mounted).ok();
    assert_eq!(
        sandbox.mounts().iter().filter(|m| **m == mounted).count(),
        1
    );
    large_file(&mounted.join("large"), 32 * MIB, 3);
    odd_tree(&mounted.join("odd"));
    Program::new(&sandbox, "umount").arg(&mounted).ok();
    // When it returns all is over: nothing to wait for.
    assert!(!sandbox.mounts().contains(&mounted));
    assert_eq!(place.side_files(), [""; 0]);
    place.assert_closed();

    place.program("mount").arg("--read-only").arg(&mounted).ok();
    odd_tree(&sandbox.path("expected"));
    large_file(&sandbox.path("large"), 32 * MIB, 3);
    run(tool("cmp")
        .arg(sandbox.path("large"))
        .arg(mounted.join("large")));
    let written = fs::write(mounted.join("new"), "x").expect_err("a read-only mount");
    assert_eq!(written.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    run(tool("umount").arg(&mounted));
    wait_for("the daemon's end", Duration::from_secs(20), || {
        sandbox.processes().len() <= 1
    });
    place.assert_closed();
}

/// What plain umount(8) has let go of is on the server, whatever happens to the daemon then.
#[test]
fn after_plain_umount_every_byte_is_on_the_server() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::piped(&sandbox);
    let mounted = sandbox.dir("mnt");
    large_file(&sandbox.path("large"), 64 * MIB, 5);
    place.init("100G").ok();
    place.program("mount").arg(&mounted).ok();
    fs::copy(sandbox.path("large"), mounted.join("large")).expect("copied");
    run(tool("umount").arg(&mounted));
    sandbox.kill_processes();
    place.program("mount").arg(&mounted).ok();
    run(tool("cmp")
        .arg(sandbox.path("large"))
        .arg(mounted.join("large")));
    Program::new(&sandbox, "umount").arg(&mounted).ok();
    place.assert_closed();
}

#[test]
fn mount_in_the_foreground_ends_with_its_mount() {
    if !root_or_skip() {
        return;
    }
    let sandbox = Sandbox::new();
    let place = Place::local(&sandbox);
    let mounted = sandbox.dir("mnt");
    place.init("10G").ok();
    let end_with: [&dyn Fn(&common::Running); 2] =
        [&|_| drop(run(tool("umount").arg(&mounted))), &|_| {
            drop(Program::new(&sandbox, "umount").arg(&mounted).ok())
        }];
    for end in end_with {
        let mount = place
            .program("mount")
            .arg("--foreground")
            .arg(&mounted)
            .spawn();
        mount.until_mounted();
        fs::write(mounted.join("file"), "content").expect("written");
        end(&mount);
        mount.wait().code(0);
        place.assert_closed();
    }
    let mount = place
        .program("mount")
        .arg("--foreground")
        .arg(&mounted)
        .spawn();
    mount.until_mounted();
    mount.signal(Signal::INT);
    mount.wait().code(130);
    place.assert_closed();
}
