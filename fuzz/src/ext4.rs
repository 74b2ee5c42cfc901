//! A filesystem whose every byte somebody has chosen: opened, walked, every file read, and its map of
//! free blocks drawn.

use std::sync::Arc;

use e2ebak::device::Device;
use e2ebak::layer::memory::Memory;
use e2ebak::restore::{Content, Filesystem, Piece, ROOT, Tree, metadata};

use super::input::Input;

/// Sizes are multiples of this many bytes; 256 at most.
pub const UNIT: usize = 16 << 10;
/// Files looked at, and pieces of each: no file may hold the fuzzer up by being a large hole.
const FILES: usize = 200;
const PIECES: usize = 50;

/// The size in units but one, then places and what is there: an offset, a length, bytes.
pub fn ext4(data: &[u8]) {
    let mut input = Input(data);
    let size = (usize::from(input.u8()) + 1) * UNIT;
    let mut bytes = vec![0; size];
    while !input.is_empty() {
        let at = input.u32() as usize % size;
        let content = input.string();
        let end = (at + content.len()).min(size);
        bytes[at..end].copy_from_slice(&content[..end - at]);
    }
    let memory = Arc::new(Memory::new(size as u64));
    memory.write_all_at(&bytes, 0).expect("as large");

    let mut read = |at: u64, into: &mut [u8]| memory.read_exact_at(into, at);
    if let Ok(Ok(map)) = e2ebak::ext4::map(&mut read, size as u64) {
        assert!(map.used <= map.size && map.size <= size as u64);
        assert!(e2ebak::ext4::without(&map.free, &map.live) == map.free);
    }
    for raw in bytes.chunks(UNIT) {
        let _ = e2ebak::ext4::HashTree::parse(raw);
        for (is_root, hash) in [(true, 0), (true, u32::MAX), (false, 0), (false, 1 << 31)] {
            let _ = e2ebak::ext4::next_block(raw, is_root, hash);
        }
    }
    if let Ok(filesystem) = Filesystem::open(memory.clone()) {
        walk(&filesystem);
    }
    let mut after = vec![0; size];
    memory.read_exact_at(&mut after, 0).expect("as large");
    assert!(after == bytes, "it was written to");
}

fn walk(filesystem: &Filesystem) {
    let _ = filesystem.names_in("snapshots");
    let _ = filesystem.read_small("a");
    for path in [&b"/a/../b/./c"[..], b"link/", b"../.."] {
        let _ = filesystem.resolve(ROOT, path);
        let _ = filesystem.resolve_itself(ROOT, path);
    }
    let Ok(tree) = Tree::load(filesystem, ROOT, None) else {
        return;
    };
    assert_eq!(tree.walk().count(), tree.len());
    for trouble in &tree.troubles {
        assert!(trouble.path.len() < 1 << 20);
    }
    let mut buf = vec![0; 10_000];
    for node in tree.walk().take(FILES) {
        assert!(tree.name(node).len() <= 255);
        if let Some(parent) = tree.parent(node) {
            assert!(tree.is_directory(parent));
        }
        let Ok(inode) = filesystem.inode(tree.inode(node)) else {
            continue;
        };
        let _ = metadata(&inode);
        let _ = filesystem.attributes(&inode);
        let _ = filesystem.read_link(&inode);
        let Ok(mut content) = filesystem.content(&inode) else {
            continue;
        };
        let mut read = 0_u64;
        for _ in 0..PIECES {
            read = match content.next(&mut buf) {
                Ok(Piece::Data(bytes)) => {
                    assert!(bytes > 0 && bytes <= buf.len());
                    read + bytes as u64
                }
                Ok(Piece::Hole(bytes)) => {
                    assert!(bytes > 0);
                    read.checked_add(bytes).expect("no file is so long")
                }
                Ok(Piece::End) => {
                    assert_eq!(read, inode.size);
                    break;
                }
                Err(_) => break,
            };
        }
        assert!(read <= inode.size);
    }
}

/// What [`ext4`] takes for an image: what is not zero, in pieces.
pub fn packed(image: &[u8]) -> Vec<u8> {
    /// So many zeros cost as much as a new piece.
    const GAP: usize = 5;
    let mut out = vec![u8::try_from(image.len() / UNIT - 1).expect("not too large")];
    let mut at = 0;
    while let Some(start) = image[at..].iter().position(|byte| *byte != 0) {
        let start = at + start;
        let mut end = start;
        while end < image.len() && end - start < 255 {
            let ahead = &image[end..image.len().min(end + GAP)];
            if ahead.iter().all(|byte| *byte == 0) {
                break;
            }
            end += 1;
        }
        out.extend(u32::try_from(start).expect("not too large").to_be_bytes());
        out.push((end - start) as u8);
        out.extend(&image[start..end]);
        at = end;
    }
    out
}
