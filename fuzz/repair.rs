//! Tars made right where a fuzzer would have to guess: checksums of headers, and lengths of PAX records.

const BLOCK: usize = 512;

/// Repairs every block that looks like a header, and the records after one of an extended header.
pub fn tar(tar: &mut [u8]) {
    let mut at = 0;
    while let Some(block) = tar.get_mut(at..at + BLOCK) {
        at += BLOCK;
        if &block[257..262] != b"ustar" {
            continue;
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        if matches!(block[156], b'x' | b'g') {
            let text = block[124..136].iter().take_while(|byte| byte.is_ascii_digit());
            let size = text.fold(0, |size: usize, digit| {
                size.saturating_mul(8).saturating_add(usize::from(digit & 7))
            });
            let end = at.saturating_add(size).min(tar.len());
            records(&mut tar[at..end]);
        }
    }
}

/// Every line is a record: what stands before its first space becomes its length, with zeros in front.
fn records(body: &mut [u8]) {
    for line in body.split_inclusive_mut(|byte| *byte == b'\n') {
        let length = line.len();
        let Some(width) = line.iter().position(|byte| *byte == b' ') else {
            continue;
        };
        let digits = format!("{length:0width$}");
        if digits.len() == width {
            line[..width].copy_from_slice(digits.as_bytes());
        }
    }
}
