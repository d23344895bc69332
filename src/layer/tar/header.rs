//! One 512-byte tar header, in the dialects v7, ustar, star and GNU.
//!
//! ```text
//! 0 name 100 | 100 mode 8 | 108 uid 8 | 116 gid 8 | 124 size 12 | 136 mtime 12 | 148 checksum 8 | 156 type 1 | 157 link name 100
//! 257 magic 6 + version 2: "ustar\0" ustar and star, "ustar " + " \0" GNU, anything else v7
//! 265 user name 32 | 297 group name 32 | 329 major 8 | 337 minor 8
//! ustar: 345 prefix 155     star: 345 prefix 131, 476 atime 12, 488 ctime 12, 508 "tar\0"
//! GNU:   345 atime 12, 357 ctime 12, 386 four sparse entries of 24, 482 "more follow", 483 real size 12
//! ```

/// Length of a header, and of the blocks that everything in a tar is padded to.
pub(in crate::layer) const BLOCK: usize = 512;

/// One block of a tar.
pub(in crate::layer) type Block = [u8; BLOCK];

/// A header as it stands, before extended headers are applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::layer) struct Header {
    pub kind: u8,
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub size: i64,
    pub mode: i64,
    pub uid: i64,
    pub gid: i64,
    pub mtime: i64,
    pub major: i64,
    pub minor: i64,
    /// Whether the sparse fields of the GNU dialect are there.
    pub gnu: bool,
}

/// Reads a header.
///
/// # Errors
/// A text that says which field is wrong.
pub(in crate::layer) fn parse(block: &Block) -> Result<Header, String> {
    let stated = octal(&block[148..156]).ok_or("the checksum is not a number")?;
    let (unsigned, signed) = checksums(block);
    if stated != unsigned && stated != signed {
        return Err(format!(
            "the header's checksum is {unsigned}, and the header says {stated}"
        ));
    }
    let field = |what: &str, from: usize, len: usize| {
        number(&block[from..from + len]).ok_or_else(|| {
            let text = block[from..from + len].escape_ascii();
            format!("the field {what} is not a number: \"{text}\"")
        })
    };
    let mut header = Header {
        kind: block[156],
        name: text(&block[..100]).to_vec(),
        link: text(&block[157..257]).to_vec(),
        size: field("size", 124, 12)?,
        mode: field("mode", 100, 8)?,
        uid: field("uid", 108, 8)?,
        gid: field("gid", 116, 8)?,
        mtime: field("mtime", 136, 12)?,
        major: 0,
        minor: 0,
        gnu: false,
    };
    let mut prefix: &[u8] = b"";
    let ustar = &block[257..263] == b"ustar\0";
    header.gnu = &block[257..265] == b"ustar  \0";
    if ustar || header.gnu {
        header.major = field("device major number", 329, 8)?;
        header.minor = field("device minor number", 337, 8)?;
    }
    if ustar && &block[508..512] == b"tar\0" {
        prefix = text(&block[345..476]);
    } else if ustar {
        prefix = text(&block[345..500]);
    } else if header.gnu && (!is_time(&block[345..357]) || !is_time(&block[357..369])) {
        // Go before 1.8 wrote a ustar prefix into GNU headers. Old images have such layers.
        prefix = text(&block[345..500]);
        if !prefix.is_ascii() {
            prefix = b"";
        }
    }
    if !prefix.is_empty() {
        header.name = [prefix, b"/", &header.name].concat();
    }
    Ok(header)
}

fn is_time(field: &[u8]) -> bool {
    field[0] == 0 || number(field).is_some()
}

/// Sums of the header's bytes, its checksum field taken as spaces: of unsigned bytes, as POSIX says, and of signed ones, as some
/// old programs computed it.
fn checksums(block: &Block) -> (i64, i64) {
    let (mut unsigned, mut signed) = (0, 0);
    for (at, &byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte as i8);
    }
    (unsigned, signed)
}

/// A field up to its first NUL.
pub(in crate::layer) fn text(field: &[u8]) -> &[u8] {
    let len = field.iter().position(|&c| c == 0).unwrap_or(field.len());
    &field[..len]
}

/// A numeric field: octal digits, or, where the first bit is set, a big-endian number in two's complement.
pub(in crate::layer) fn number(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    // The bit after the marker is the sign.
    let mut value = i128::from(first & 0x3f) - i128::from(first & 0x40);
    for &byte in rest {
        value = value.checked_mul(256)?.checked_add(byte.into())?;
    }
    value.try_into().ok()
}

/// An octal number with spaces and NULs around it; nothing at all is 0.
fn octal(field: &[u8]) -> Option<i64> {
    let padding = |c: &u8| *c == b' ' || *c == 0;
    let Some(first) = field.iter().position(|c| !padding(c)) else {
        return Some(0);
    };
    let last = field.iter().rposition(|c| !padding(c))?;
    let mut value = 0i64;
    for &c in text(&field[first..=last]) {
        let digit = c.checked_sub(b'0').filter(|digit| *digit < 8)?;
        value = value.checked_mul(8)?.checked_add(digit.into())?;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_all_their_forms() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"644\0junk", Some(0o644)),
            (b"00006 44", None),
            (b"00000008", None),
            (b"-0000001", None),
            (b"\x80\0\0\0\0\0\x01\x02", Some(0x102)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"777777777777", Some((1 << 36) - 1)),
        ] {
            assert_eq!(number(field), value, "{}", field.escape_ascii());
        }
    }
}
