//! CRC-32C (Castagnoli), a byte at a time from a table, and not inverted at the end, as ext4 and
//! jbd2 use it: what one call returns, the next goes on from.

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut value = i as u32;
        let mut bit = 0;
        while bit < 8 {
            value = match value & 1 {
                1 => value >> 1 ^ 0x82F6_3B78,
                _ => value >> 1,
            };
            bit += 1;
        }
        table[i] = value;
        i += 1;
    }
    table
};

pub(super) fn crc32c(sum: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(sum, |sum, byte| {
        sum >> 8 ^ TABLE[((sum ^ u32::from(*byte)) & 0xFF) as usize]
    })
}

/// Of the bytes with those of `hole` (the place of the checksum itself) taken as zeros.
pub(super) fn crc32c_without(sum: u32, bytes: &[u8], hole: std::ops::Range<usize>) -> u32 {
    let end = hole.end.min(bytes.len());
    let start = hole.start.min(end);
    let sum = crc32c(sum, &bytes[..start]);
    let sum = crc32c(sum, &[0; 8][..(end - start).min(8)]);
    crc32c(sum, &bytes[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnoli() {
        assert_eq!(!crc32c(!0, b"123456789"), 0xE306_9283);
        assert_eq!(
            crc32c_without(7, b"12abc89", 2..5),
            crc32c(7, b"12\0\0\x0089")
        );
    }
}
