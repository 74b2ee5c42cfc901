//! A source tree as a tar archive, the same from every run: sizes around 4 KiB, a few large.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::work::scatter;

const FILES_PER_DIRECTORY: u32 = 25;
const FILE_MAX: f64 = 1e6;

/// Writes the archive; gives the bytes of its files.
pub fn write(path: &Path, files: u32) -> u64 {
    let mut out = BufWriter::new(File::create(path).expect("a file"));
    let text: Vec<u8> = (0..FILE_MAX as u64 / 8 + 1)
        .flat_map(|i| scatter(i).to_le_bytes())
        .map(|byte| b' ' + byte % 95)
        .collect();
    let mut total = 0;
    for number in 0..files {
        let directory = number / FILES_PER_DIRECTORY;
        let directory = format!("src/{:02}/{:03}/", directory / 40, directory);
        if number % FILES_PER_DIRECTORY == 0 {
            header(&mut out, &directory, 0, b'5');
        }
        let size = size_of(number);
        header(
            &mut out,
            &format!("{directory}file-{number:05}.c"),
            size,
            b'0',
        );
        let from = scatter(u64::from(number)) as usize % (text.len() - size as usize);
        out.write_all(&text[from..from + size as usize])
            .expect("room");
        pad(&mut out, size);
        total += size;
    }
    out.write_all(&[0; 1024]).expect("room");
    out.flush().expect("room");
    total
}

/// Log-normal with a median of 4 KiB and a deviation of 1.3, as source trees have.
fn size_of(number: u32) -> u64 {
    let uniform = |salt: u64| {
        let bits = scatter(u64::from(number) << 8 | salt) >> 11;
        (bits as f64 + 0.5) / (1_u64 << 53) as f64
    };
    // Box and Muller.
    let normal = (-2.0 * uniform(1).ln()).sqrt() * (std::f64::consts::TAU * uniform(2)).cos();
    (4096.0 * (1.3 * normal).exp()).min(FILE_MAX) as u64
}

/// A header of POSIX ustar.
fn header(out: &mut impl Write, name: &str, size: u64, kind: u8) {
    let mut block = [0; 512];
    let mut put = |at: usize, text: &str| {
        block[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, name);
    put(100, if kind == b'5' { "0000755" } else { "0000644" });
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "14000000000");
    put(148, "        ");
    put(257, "ustar");
    put(263, "00");
    block[156] = kind;
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    out.write_all(&block).expect("room");
}

fn pad(out: &mut impl Write, size: u64) {
    let rest = size.next_multiple_of(512) - size;
    out.write_all(&[0; 512][..rest as usize]).expect("room");
}
