//! Filesystems read without being mounted, against the kernel's own mount of the same.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use e2ebak::browse::write_tar;
use e2ebak::error::{Kind, Result};
use e2ebak::layer::{Cache, cache};
use e2ebak::progress::Silent;
use e2ebak::remote::local::LocalStore;
use e2ebak::remote::{Access, Store};
use e2ebak::restore::{
    Ahead, Content, Filesystem, HardLinks, Options, Outcome, Piece, Plan, ROOT, Tree,
    UnmountedTree, copy, copy_linking,
};

use crate::odd::odd_tree;
use crate::support::{
    KEEP, REPLACE, Scratch, assert_whole, differences, equipped, errors, run, set_attribute, write,
};

pub const TOOLS: &[&str] = &["rsync", "setfacl", "mount", "umount"];

pub fn shell(script: &str) {
    run(Command::new("sh")
        .args(["-euc", script])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"));
}

/// A filesystem of the kernel's, unmounted however the test ends.
pub struct Mounted(pub PathBuf);

impl Mounted {
    pub fn new(image: &Path, at: PathBuf, options: &str) -> Mounted {
        fs::create_dir_all(&at).expect("mkdir");
        shell(&format!(
            "timeout 60 mount -o loop,noinit_itable,{options} {} {}",
            image.display(),
            at.display()
        ));
        Mounted(at)
    }

    /// Unmounts, and copies the image to where nobody else's copy of the mount can reach it: a
    /// mount namespace that some other test makes meanwhile keeps the filesystem alive.
    pub fn settle(self, image: &Path, to: &Path) {
        shell(&format!("timeout 60 sync -f {}", self.0.display()));
        drop(self);
        copy_image(image, to);
    }
}

fn copy_image(from: &Path, to: &Path) {
    shell(&format!(
        "cp --sparse=always {} {}",
        from.display(),
        to.display()
    ));
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("timeout")
            .args(["60", "umount"])
            .arg(&self.0)
            .status();
        // However it ended, the scratch directory goes next, and not what is mounted in it.
        let _ = Command::new("umount").arg("-lq").arg(&self.0).status();
    }
}

fn make(image: &Path, options: &str) {
    shell(&format!(
        "truncate -s 160M {0}; mkfs.ext4 -q -F -N 8192 {options} {0} 2>/dev/null",
        image.display()
    ));
}

fn open(image: &Path) -> Arc<Filesystem> {
    let device = LocalStore::new(image).open(Access::ReadOnly);
    Arc::new(Filesystem::open(device.expect("opens")).expect("an ext4"))
}

fn restore_from(
    filesystem: &Arc<Filesystem>,
    from: &str,
    dest: &Path,
    options: Options<'_>,
) -> Result<Outcome> {
    let mut source = UnmountedTree::new(Arc::clone(filesystem), ROOT);
    copy(&mut source, Path::new(from), dest, options, &Silent)
}

/// What the structures of the filesystem are stretched by.
fn large_tree(tree: &Path) {
    odd_tree(&tree.join("odd"));
    fs::create_dir(tree.join("many")).expect("mkdir");
    for i in 0..3000 {
        write(
            tree.join(format!("many/a file with a longer name {i}")),
            &[],
        );
    }
    // Half of them: holes in the blocks of the directory.
    for i in (0..3000).step_by(2) {
        fs::remove_file(tree.join(format!("many/a file with a longer name {i}"))).expect("rm");
    }
    // More extents than fit into the inode, and than fit into one block.
    let broken = File::create(tree.join("broken")).expect("create");
    for i in 0..1500u64 {
        let piece = vec![i as u8 | 1; 4096];
        broken.write_all_at(&piece, i * 12_288).expect("write");
    }
    let sparse = File::create(tree.join("sparse")).expect("create");
    sparse.write_all_at(b"far", 50 << 20).expect("write");
    sparse.write_all_at(b"near", 1 << 20).expect("write");
    sparse.set_len(60 << 20).expect("truncate");
    let unwritten = File::create(tree.join("unwritten")).expect("create");
    // Old formats know no blocks that are allocated and not written.
    let _ = rustix::fs::fallocate(&unwritten, rustix::fs::FallocateFlags::empty(), 0, 1 << 20);
    unwritten.write_all_at(b"written", 500_000).expect("write");
    let noise: Vec<u8> = (0..3_000_000u32)
        .map(|i| (i.wrapping_mul(i) >> 7) as u8)
        .collect();
    write(tree.join("solid"), &noise);
    write(tree.join("attributes"), b"");
    for i in 0..8 {
        let value = vec![b'a' + i; 90];
        set_attribute(&tree.join("attributes"), &format!("user.n{i}"), &value);
    }
    symlink("x".repeat(59), tree.join("59")).expect("symlink");
    symlink("x".repeat(60), tree.join("60")).expect("symlink");
    let mut deep = tree.join("deep");
    for _ in 0..70 {
        deep.push("a directory");
    }
    fs::create_dir_all(&deep).expect("mkdir");
    write(deep.join("bottom"), b"reached");
}

fn as_the_kernel_reads_it(options: &str, more: impl Fn(&Path)) {
    let scratch = Scratch::new();
    let image = scratch.0.join("image");
    make(&image, options);
    let mounted = Mounted::new(&image, scratch.0.join("mount"), "rw,acl,user_xattr");
    let tree = mounted.0.join("tree");
    fs::create_dir(&tree).expect("mkdir");
    large_tree(&tree);
    more(&tree);
    let far = File::create(mounted.0.join("far")).expect("create");
    far.write_all_at(b"far", 5 << 30).expect("write");
    drop(far);
    let (made, image) = (image, scratch.0.join("settled"));
    mounted.settle(&made, &image);

    let filesystem = open(&image);
    let dest = scratch.dir("dest");
    let outcome = restore_from(&filesystem, "tree", &dest, KEEP).expect("restores");
    assert_whole(&outcome);
    let mounted = Mounted::new(&image, scratch.0.join("mount"), "rw,noatime");
    let differ = differences(&mounted.0.join("tree"), &dest.join("tree"));
    assert_eq!(differ, "", "{options}");

    // The tree that is loaded whole is the same as the one that is walked.
    let top = filesystem.resolve(ROOT, b"tree").expect("is there");
    let loaded = Tree::load(&filesystem, top, None).expect("loads");
    assert!(loaded.troubles.is_empty(), "{:?}", loaded.troubles);
    let mut paths: Vec<Vec<u8>> = loaded.walk().map(|node| loaded.path(node)).collect();
    paths.sort();
    let found = Command::new("find")
        .arg(mounted.0.join("tree"))
        .args(["-printf", "%P\\0"])
        .output()
        .expect("find");
    let mut expected: Vec<&[u8]> = found.stdout.split(|byte| *byte == 0).collect();
    expected.pop();
    expected.sort();
    assert_eq!(paths, expected);

    let far = filesystem.resolve(ROOT, b"far").expect("is there");
    let mut far = filesystem
        .content(&filesystem.inode(far).expect("sound"))
        .expect("opens");
    let mut buf = [0; 100_000];
    let mut hole = 0;
    let data = loop {
        match far.next(&mut buf).expect("reads") {
            Piece::Hole(bytes) => hole += bytes,
            piece => break piece,
        }
    };
    assert_eq!((hole, data), (5 << 30, Piece::Data(3)));
    assert_eq!(&buf[..3], b"far");
    assert_eq!(far.next(&mut buf).expect("reads"), Piece::End);
}

#[test]
fn a_filesystem_as_we_make_it_reads_as_the_kernel_reads_it() {
    if !equipped(TOOLS) {
        return;
    }
    let options = "-b 4096 -I 256 -G 4096 -m 0 -O none,has_journal,ext_attr,resize_inode,dir_index,\
        filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,\
        metadata_csum";
    as_the_kernel_reads_it(options, |_| {});
}

#[test]
fn an_old_filesystem_with_numbers_of_blocks_reads_as_the_kernel_reads_it() {
    if !equipped(TOOLS) {
        return;
    }
    let options = "-b 1024 -I 256 -O ^extent,^64bit,^metadata_csum,^flex_bg,^huge_file,meta_bg,\
        ^resize_inode,^dir_index";
    as_the_kernel_reads_it(options, |_| {});
}

#[test]
fn content_in_inodes_and_attributes_in_inodes_read_as_the_kernel_reads_them() {
    if !equipped(TOOLS) {
        return;
    }
    let options = "-b 1024 -I 512 -O inline_data,ea_inode,large_dir,metadata_csum,\
        metadata_csum_seed,64bit";
    as_the_kernel_reads_it(options, |tree| {
        fs::create_dir(tree.join("small")).expect("mkdir");
        for length in [1, 59, 60, 61, 100, 200] {
            let name = format!("small/{}", "n".repeat(length.min(20)) + &length.to_string());
            write(tree.join(name), &vec![b'x'; length]);
        }
        symlink("y".repeat(150), tree.join("small/link")).expect("symlink");
        // As large as the filesystem that it is restored to takes.
        write(tree.join("valued"), b"");
        set_attribute(&tree.join("valued"), "user.large", &[b'v'; 3500]);
    });
}

#[test]
fn a_journal_that_was_not_replayed_counts() {
    if !equipped(TOOLS) {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.0.join("image");
    make(
        &image,
        "-b 4096 -J size=8 -O metadata_csum,64bit,^orphan_file,^fast_commit",
    );
    let mounted = Mounted::new(&image, scratch.0.join("mount"), "rw,data=journal");
    let tree = mounted.0.join("tree");
    fs::create_dir(&tree).expect("mkdir");
    // Directories whose blocks become those of files: what was logged of them is revoked.
    for i in 0..40 {
        fs::create_dir(tree.join(format!("gone{i}"))).expect("mkdir");
    }
    shell(&format!("timeout 60 sync -f {}", tree.display()));
    for i in 0..40 {
        fs::remove_dir(tree.join(format!("gone{i}"))).expect("rmdir");
        // Content that begins like a block of the journal has to be escaped in it.
        let mut content = vec![0xC0, 0x3B, 0x39, 0x98];
        content.extend(vec![i as u8; 9000]);
        write(tree.join(format!("kept{i}")), &content);
    }
    shell(&format!("timeout 60 sync -f {}", tree.display()));
    let crashed = scratch.0.join("crashed");
    // As a crash leaves it: what the journal holds is not yet where it belongs.
    copy_image(&image, &crashed);
    drop(mounted);
    let before = fs::read(&crashed).expect("read");
    let filesystem = open(&crashed);
    let dest = scratch.dir("dest");
    let outcome = restore_from(&filesystem, "tree", &dest, KEEP).expect("restores");
    assert_whole(&outcome);
    assert!(outcome.files == 40, "{outcome:?}");
    assert!(
        before == fs::read(&crashed).expect("read"),
        "it was written to"
    );
    let told = Command::new("sh")
        .args(["-c", &format!("dumpe2fs -h {}", crashed.display())])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output()
        .expect("runs");
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains("needs_recovery"), "no crash at all: {told}");
    let mounted = Mounted::new(&crashed, scratch.0.join("mount"), "rw");
    assert_eq!(differences(&mounted.0.join("tree"), &dest.join("tree")), "");
}

/// Blocks of directories that are gone now hold the content of a file, which is not in the journal:
/// what the journal has of these blocks must not come back.
#[test]
fn what_the_journal_revokes_does_not_come_back() {
    if !equipped(TOOLS) {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.0.join("image");
    shell(&format!(
        "truncate -s 24M {0}; mkfs.ext4 -q -F -b 4096 -m 0 -J size=4 -O ^orphan_file,^fast_commit {0}",
        image.display()
    ));
    let mounted = Mounted::new(&image, scratch.0.join("mount"), "rw,data=ordered");
    let tree = mounted.0.join("tree");
    let sync = || shell(&format!("timeout 60 sync -f {}", mounted.0.display()));
    for i in 0..100 {
        fs::create_dir_all(tree.join(format!("gone{i}"))).expect("mkdir");
    }
    sync();
    for i in 0..100 {
        fs::remove_dir(tree.join(format!("gone{i}"))).expect("rmdir");
    }
    sync();
    // All that is free, and so those blocks too.
    let full = File::create(tree.join("full")).expect("create");
    let piece = vec![0x5A; 4096];
    let mut at = 0;
    while full.write_all_at(&piece, at).is_ok() {
        at += 4096;
    }
    drop(full);
    sync();
    let crashed = scratch.0.join("crashed");
    copy_image(&image, &crashed);
    drop(mounted);
    let filesystem = open(&crashed);
    let inode = filesystem.resolve(ROOT, b"tree/full").expect("is there");
    let inode = filesystem.inode(inode).expect("sound");
    let content = filesystem.read_whole(&inode, 24 << 20).expect("reads");
    assert!(content.len() > 8 << 20, "{} bytes", content.len());
    let other = content.iter().position(|byte| *byte != 0x5A);
    assert_eq!(other, None, "something came back");
}

#[test]
fn what_is_damaged_is_named_and_costs_nothing_else() {
    if !equipped(TOOLS) {
        return;
    }
    let scratch = Scratch::new();
    let made = scratch.0.join("made");
    make(&made, "-b 4096 -O metadata_csum,64bit");
    let mounted = Mounted::new(&made, scratch.0.join("mount"), "rw");
    let tree = mounted.0.join("tree");
    for dir in ["a", "b"] {
        fs::create_dir_all(tree.join(dir)).expect("mkdir");
        for file in ["x", "y"] {
            write(tree.join(dir).join(file), b"content");
        }
    }
    fs::create_dir(tree.join("c")).expect("mkdir");
    write(tree.join("c/file"), b"kept");
    symlink("kept", tree.join("c/link")).expect("symlink");
    for (name, value) in [("c", b'1'), ("c/file", b'2'), ("c/link", b'3')] {
        set_attribute(&tree.join(name), "trusted.large", &[value; 600]);
    }
    write(tree.join("d"), b"too large");
    write(mounted.0.join("largest"), b"as large as can be");
    let image = scratch.0.join("image");
    mounted.settle(&made, &image);
    // As after a clean end, so that the journal has nothing to say.
    shell(&format!(
        "e2fsck -fy {} >/dev/null || true",
        image.display()
    ));
    // A file's inode, the block of a directory, blocks of attributes, and a size.
    shell(&format!(
        "cd {}
         inode=$(debugfs -R 'imap /tree/a/x' image 2>/dev/null | sed -n 's/.*block \\([0-9]*\\), offset \\(0x[0-9a-f]*\\).*/\\1 \\2/p')
         set -- $inode; printf X | dd of=image bs=1 seek=$(($1 * 4096 + $2 + 4)) conv=notrunc 2>/dev/null
         block=$(debugfs -R 'blocks /tree/b' image 2>/dev/null)
         printf X | dd of=image bs=1 seek=$((block * 4096 + 30)) conv=notrunc 2>/dev/null
         for name in c c/file c/link; do
             block=$(debugfs -R \"stat /tree/$name\" image 2>/dev/null | sed -n 's/.*File ACL: \\([1-9][0-9]*\\).*/\\1/p')
             printf X | dd of=image bs=1 seek=$((block * 4096 + 3000)) conv=notrunc 2>/dev/null
         done
         debugfs -w -R 'sif /tree/d size 0x100000000001' image 2>/dev/null
         debugfs -w -R 'sif /largest size 0x100000000000' image 2>/dev/null",
        scratch.0.display()
    ));
    let filesystem = open(&image);
    let number = |path: &str| filesystem.resolve(ROOT, path.as_bytes());
    let largest = filesystem.inode(number("largest").expect("is there"));
    assert_eq!(largest.expect("sound").size, 1 << 44);
    // Else the copy would never end.
    let error = number("tree/d").unwrap_err().chain().join(": ");
    assert!(error.contains("more blocks than any file"), "{error}");
    let dest = scratch.dir("dest");
    let outcome = restore_from(&filesystem, "tree", &dest, REPLACE).expect("restores");
    let mut told = errors(&outcome);
    told.sort();
    assert_eq!(told.len(), 6, "{told:?}");
    assert!(told[0].starts_with("tree/a/x: ") && told[0].contains("wrong checksum"));
    assert!(told[1].starts_with("tree/b: ") && told[1].contains("wrong checksum"));
    for (at, path) in ["tree/c/file: ", "tree/c/link: ", "tree/c: "]
        .into_iter()
        .enumerate()
    {
        let told = &told[2 + at];
        assert!(told.starts_with(path) && told.contains("its attribute block"));
    }
    assert!(told[5].starts_with("tree/d: "), "{told:?}");
    assert_eq!(outcome.files, 3, "a/y, c/file, c/link");
    assert_eq!(fs::read(dest.join("tree/c/file")).expect("read"), b"kept");
    assert!(dest.join("tree/c/link").is_symlink());
    let top = filesystem.resolve(ROOT, b"tree").expect("is there");
    let loaded = Tree::load(&filesystem, top, None).expect("loads");
    let mut paths: Vec<_> = loaded.troubles.iter().map(|t| t.path.clone()).collect();
    paths.sort();
    assert_eq!(paths, [b"a/x".to_vec(), b"b".to_vec(), b"d".to_vec()]);
    let (names, told) = archive(&filesystem, &loaded, &scratch);
    assert_eq!(names, ["./", "a/", "a/y", "b/", "c/", "c/file", "c/link"]);
    assert_eq!(told, ["c", "c/file", "c/link"]);
}

/// What GNU tar finds in an archive of a tree, and what was told of.
fn archive(
    filesystem: &Arc<Filesystem>,
    tree: &Tree,
    scratch: &Scratch,
) -> (Vec<String>, Vec<String>) {
    let path = scratch.0.join("archive.tar");
    let mut out = File::create(&path).expect("create");
    let ahead = Ahead::start(filesystem, Arc::new(Plan::of_archive(tree)), Arc::default());
    let mut told = Vec::new();
    let mut tell = |path: &[u8], _| told.push(String::from_utf8_lossy(path).into_owned());
    write_tar(filesystem, tree, b"", &mut out, &ahead, &mut tell).expect("writes");
    let listed = run(Command::new("tar").arg("-Ptf").arg(&path));
    (listed.lines().map(String::from).collect(), told)
}

#[test]
fn hostile_names_are_in_no_tree_and_in_no_archive() {
    if !equipped(TOOLS) {
        return;
    }
    let scratch = Scratch::new();
    let (made, image) = (scratch.0.join("made"), scratch.0.join("image"));
    make(&made, "-b 4096 -O ^metadata_csum");
    let mounted = Mounted::new(&made, scratch.0.join("mount"), "rw");
    let sub = mounted.0.join("tree/sub");
    fs::create_dir_all(&sub).expect("mkdir");
    for name in ["evil__name", "evil__none", "good", "zero"] {
        write(sub.join(name), b"content");
    }
    mounted.settle(&made, &image);
    shell(&format!(
        "cd {}
         e2fsck -fy image >/dev/null || true
         debugfs -R 'blocks /tree/sub' image 2>/dev/null >block",
        scratch.0.display()
    ));
    let block = fs::read_to_string(scratch.0.join("block")).expect("read");
    let at = block.trim().parse::<u64>().expect("a block") * 4096;
    let file = File::options().read(true).write(true).open(&image);
    let file = file.expect("opens");
    let mut raw = [0; 4096];
    file.read_exact_at(&mut raw, at).expect("read");
    for (name, evil) in [
        (b"evil__name", b"../../evil"),
        (b"evil__none", b"/etc/evil\0"),
    ] {
        let found = raw.windows(10).position(|bytes| bytes == name);
        let found = at + found.expect("the name") as u64;
        file.write_all_at(evil, found).expect("write");
    }
    let filesystem = open(&image);
    let top = filesystem.resolve(ROOT, b"tree").expect("is there");
    let tree = Tree::load(&filesystem, top, None).expect("loads");
    assert_eq!(tree.troubles.len(), 1, "{:?}", tree.troubles);
    let trouble = &tree.troubles[0];
    let why = trouble.error.chain().join(": ");
    assert!(
        trouble.path == b"sub" && why.contains("../../evil"),
        "{why}"
    );
    let (names, told) = archive(&filesystem, &tree, &scratch);
    assert_eq!(names, ["./", "sub/", "sub/good", "sub/zero"]);
    assert!(told.is_empty(), "{told:?}");
    let dest = scratch.dir("dest");
    let outcome = restore_from(&filesystem, "tree", &dest, KEEP).expect("restores");
    assert_eq!((outcome.files, outcome.errors.count()), (2, 2));
}

#[test]
fn names_of_one_file_in_several_paths_become_one_file() {
    if !equipped(TOOLS) {
        return;
    }
    let scratch = Scratch::new();
    let (made, image) = (scratch.0.join("made"), scratch.0.join("image"));
    make(&made, "");
    let mounted = Mounted::new(&made, scratch.0.join("mount"), "user_xattr");
    let both = mounted.0.join("both");
    for dir in ["one/deep", "two"] {
        fs::create_dir_all(both.join(dir)).expect("mkdir");
    }
    let link = |from: &str, to: &str| fs::hard_link(both.join(from), both.join(to)).expect("link");
    write(both.join("one/deep/file"), b"the file");
    link("one/deep/file", "two/same");
    link("one/deep/file", "outside");
    symlink("one/deep/file", both.join("one/link")).expect("symlink");
    link("one/link", "two/link");
    // Two files of one name, and another name of the first.
    write(both.join("one/x"), b"first");
    write(both.join("two/x"), b"second");
    link("one/x", "two/y");
    shell(&format!("timeout 60 sync -f {}", both.display()));
    copy_image(&made, &image);
    let filesystem = open(&image);
    let restore = |from: &str, dest: &Path, options, links: &mut HardLinks| {
        let mut source = UnmountedTree::new(Arc::clone(&filesystem), ROOT);
        let outcome = copy_linking(&mut source, from.as_ref(), dest, options, links, &Silent);
        assert_whole(&outcome.expect("restores"));
    };
    fs::remove_file(both.join("outside")).expect("rm");

    let (shared, apart) = (scratch.dir("shared"), scratch.dir("apart"));
    let mut links = HardLinks::default();
    for path in ["both/one", "both/two"] {
        restore(path, &shared, KEEP, &mut links);
        restore(path, &apart, KEEP, &mut HardLinks::default());
    }
    run(Command::new("touch")
        .arg("-r")
        .arg(&both)
        .args([&shared, &apart]));
    assert_eq!(differences(&both, &shared), "");
    assert_ne!(differences(&both, &apart), "", "the judge counts links");

    // What has come into the place of the first is not linked to.
    let dest = scratch.dir("replaced");
    let mut links = HardLinks::default();
    for path in ["both/one/x", "both/two/x"] {
        restore(path, &dest, REPLACE, &mut links);
    }
    let mut source = UnmountedTree::new(Arc::clone(&filesystem), ROOT);
    let last = copy_linking(
        &mut source,
        "both/two/y".as_ref(),
        &dest,
        REPLACE,
        &mut links,
        &Silent,
    );
    assert_eq!(last.expect("restores").shortfall.hard_links, 1);
    let content = |name: &str| fs::read_to_string(dest.join(name)).expect("read");
    assert_eq!((&*content("x"), &*content("y")), ("second", "first"));
}

#[test]
fn one_file_of_a_large_directory_costs_no_other_inode() {
    if !equipped(TOOLS) {
        return;
    }
    const FILES: usize = 12_000;
    let scratch = Scratch::new();
    let (made, image) = (scratch.0.join("made"), scratch.0.join("image"));
    shell(&format!(
        "truncate -s 160M {0}; mkfs.ext4 -q -F -N 16384 {0} 2>/dev/null",
        made.display()
    ));
    let mounted = Mounted::new(&made, scratch.0.join("mount"), "user_xattr");
    for i in 0..FILES {
        write(mounted.0.join(format!("a file of many {i}")), b"");
    }
    write(mounted.0.join("a file of many 7"), b"found");
    mounted.settle(&made, &image);
    let device = LocalStore::new(&image)
        .open(Access::ReadOnly)
        .expect("opens");
    let cache = Arc::new(Cache::new(device, cache::Settings::default()).expect("a cache"));
    let filesystem = Arc::new(Filesystem::open(cache.clone()).expect("an ext4"));
    let dest = scratch.0.join("dest");
    assert_whole(&restore_from(&filesystem, "a file of many 7", &dest, KEEP).expect("restores"));
    assert_eq!(fs::read(&dest).expect("read"), b"found");
    let fetched = cache.stats().fetched_bytes;
    let inodes = FILES as u64 * 256;
    assert!(fetched < inodes / 2, "{fetched} bytes of {inodes}");
}

/// By every hash that the format knows, each name is found by a few blocks of a directory of hundreds.
#[test]
fn a_name_in_a_large_directory_is_found_by_its_index() {
    if !equipped(TOOLS) {
        return;
    }
    const FILES: usize = 30_000;
    let scratch = Scratch::new();
    let (made, image) = (scratch.0.join("made"), scratch.0.join("image"));
    // Small blocks, so that the tree has a level below its root.
    shell(&format!(
        "truncate -s 60M {0}; mkfs.ext4 -q -F -b 1024 -N 32768 {0} 2>/dev/null",
        made.display()
    ));
    let mounted = Mounted::new(&made, scratch.0.join("mount"), "user_xattr");
    let name = |i: usize| format!("Straße {i} {}", "ß".repeat(i % 9 * i % 14));
    for i in 0..FILES {
        File::create(mounted.0.join(name(i))).expect("a file");
    }
    mounted.settle(&made, &image);
    for (algorithm, flags) in [("legacy", 1), ("half_md4", 1), ("tea", 1), ("half_md4", 2)] {
        shell(&format!(
            "tune2fs -E hash_alg={algorithm} {0} >/dev/null
            debugfs -w -R 'ssv flags {flags}' {0} 2>/dev/null
            e2fsck -fyD {0} >/dev/null || [ $? = 1 ]",
            image.display()
        ));
        let device = LocalStore::new(&image).open(Access::ReadOnly);
        let cache = Cache::new(device.expect("opens"), cache::Settings::default());
        let cache = Arc::new(cache.expect("a cache"));
        let filesystem = Filesystem::open(cache.clone()).expect("an ext4");
        let root = filesystem.inode(ROOT).expect("the root");
        assert!(root.has_index && root.size > 1 << 20, "{root:?}");
        let listed = filesystem.list(&root).expect("a list");
        let read = || {
            let stats = cache.stats();
            stats.hits + stats.misses
        };
        for i in (0..FILES).step_by(FILES / 50) {
            let before = read();
            let found = filesystem.lookup(&root, name(i).as_bytes());
            let found = found.expect("is there");
            let blocks = read() - before;
            assert!(blocks < 20, "{algorithm} {flags}: {} by {blocks}", name(i));
            let entry = listed.iter().find(|e| e.name == name(i).as_bytes());
            assert_eq!(Some(u64::from(found)), entry.map(|entry| entry.inode));
        }
        for other in ["Straße", "Straße 30000 "] {
            let error = filesystem.lookup(&root, other.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), Kind::NotFound);
        }
    }
}
