//! PAX extended headers: records `LENGTH KEY=VALUE\n`, where LENGTH is decimal and counts the whole record.

use super::sparse::decimal;
use crate::layer::tree::quoted;

/// Prefix of the keys that carry extended attributes.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";
/// Most records of extended attributes in one header: some come twice, and of an inode there are no more than 1024.
const MAX_XATTR_RECORDS: usize = 4096;

/// What one extended header says of the entry after it. `None`: it says nothing, the header's own field counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::layer) struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    /// Seconds, and nanoseconds after them.
    pub mtime: Option<(i64, u32)>,
    /// Full names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: SparseRecords,
}

/// The records of GNU sparse files in PAX archives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::layer) struct SparseRecords {
    pub major: Vec<u8>,
    pub minor: Vec<u8>,
    pub name: Vec<u8>,
    /// `GNU.sparse.size` or `GNU.sparse.realsize`: the size of the file with its holes.
    pub size: Option<u64>,
    pub real_size: Option<u64>,
    pub count: Vec<u8>,
    pub map: Vec<u8>,
}

/// Reads the body of an extended header. Of two records with one key the last counts.
///
/// # Errors
/// Where in the body, and what is wrong.
pub(in crate::layer) fn parse(body: &[u8]) -> Result<Pax, (usize, String)> {
    let mut pax = Pax::default();
    let mut pairs = 0;
    let mut at = 0;
    while at < body.len() {
        let (key, value, len) = record(&body[at..]).map_err(|what| (at, what.to_owned()))?;
        let wrong = || (at, format!("record {} has the value {}", quoted(key), quoted(value)));
        // An empty value takes a record back.
        let given = (!value.is_empty()).then_some(value);
        match key {
            b"path" | b"linkpath" if value.contains(&0) => return Err(wrong()),
            b"path" => pax.path = given.map(<[u8]>::to_vec),
            b"linkpath" => pax.link = given.map(<[u8]>::to_vec),
            b"size" => pax.size = given.map(|v| decimal(v).ok_or_else(wrong)).transpose()?,
            b"uid" => pax.uid = given.map(|v| signed(v).ok_or_else(wrong)).transpose()?,
            b"gid" => pax.gid = given.map(|v| signed(v).ok_or_else(wrong)).transpose()?,
            b"mtime" => pax.mtime = given.map(|v| time(v).ok_or_else(wrong)).transpose()?,
            b"GNU.sparse.major" => pax.sparse.major = value.to_vec(),
            b"GNU.sparse.minor" => pax.sparse.minor = value.to_vec(),
            b"GNU.sparse.name" => pax.sparse.name = value.to_vec(),
            b"GNU.sparse.size" => pax.sparse.size = given.map(|v| decimal(v).ok_or_else(wrong)).transpose()?,
            b"GNU.sparse.realsize" => pax.sparse.real_size = given.map(|v| decimal(v).ok_or_else(wrong)).transpose()?,
            b"GNU.sparse.numblocks" => pax.sparse.count = value.to_vec(),
            b"GNU.sparse.map" => pax.sparse.map = value.to_vec(),
            // Version 0.0 repeats two keys, in turn. They make the map of version 0.1.
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let offset = key == b"GNU.sparse.offset";
                if offset != (pairs % 2 == 0) || value.contains(&b',') {
                    return Err(wrong());
                }
                if pairs == 0 {
                    pax.sparse.map.clear();
                } else {
                    pax.sparse.map.push(b',');
                }
                pax.sparse.map.extend_from_slice(value);
                pairs += 1;
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    if pax.xattrs.len() >= MAX_XATTR_RECORDS {
                        let what = format!("more than {MAX_XATTR_RECORDS} records of extended attributes");
                        return Err((at, what));
                    }
                    pax.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        at += len;
    }
    Ok(pax)
}

/// Key and value of the first record, and its length.
pub(in crate::layer) fn record(body: &[u8]) -> Result<(&[u8], &[u8], usize), &'static str> {
    let space = body.iter().position(|&c| c == b' ');
    let space = space.ok_or("a record has no length")?;
    let len = decimal(&body[..space]).ok_or("a record's length is not a number")?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let rest = body.get(space + 1..len).ok_or("a record's length does not fit")?;
    let (b'\n', rest) = rest.split_last().ok_or("a record is empty")? else {
        return Err("a record does not end with a newline");
    };
    let equals = rest.iter().position(|&c| c == b'=').ok_or("a record has no value")?;
    let (key, value) = (&rest[..equals], &rest[equals + 1..]);
    if key.is_empty() || key.contains(&0) {
        return Err("a record's key is empty or holds a NUL");
    }
    Ok((key, value, len))
}

fn signed(digits: &[u8]) -> Option<i64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Seconds, optionally with a fraction; what is smaller than a nanosecond is cut off.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (seconds, fraction) = match text.iter().position(|&c| c == b'.') {
        Some(point) => (&text[..point], &text[point + 1..]),
        None => (text, &b""[..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let negative = seconds.first() == Some(&b'-');
    let seconds = signed(seconds)?;
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0'));
    let nanos = digits.take(9).fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    if negative && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read() {
        let body = b"20 path=a b=c\xff d/e\n\n14 size=00123\n8 uid=7\n30 SCHILY.xattr.user.k=v\x00=\n w\n";
        let pax = parse(body).unwrap_or_else(|(at, what)| panic!("{at}: {what}"));
        assert_eq!(pax.path.as_deref(), Some(&b"a b=c\xff d/e\n"[..]));
        assert_eq!((pax.size, pax.uid), (Some(123), Some(7)));
        assert_eq!(pax.xattrs, [(b"user.k".to_vec(), b"v\0=\n w".to_vec())]);
    }

    #[test]
    fn the_last_record_counts_and_an_empty_one_takes_back() {
        let pax = parse(b"9 path=a\n9 path=b\n").unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"b"[..]));
        assert_eq!(parse(b"9 path=a\n8 path=\n").unwrap().path, None);
    }

    #[test]
    fn malformed_records_are_refused() {
        for body in [
            &b"x"[..],
            b" path=a\n",
            b"99 path=a\n",
            b"9 path=ab",
            b"7 path\n",
            b"5 =a\n",
            b"2 \n",
            b"3 a=b\n",
            b"+9 path=a\n",
            b"11 path=a\0b\n",
            b"9 size=-\n",
            b"12 mtime=1.x\n",
            b"99999999999999999999999 path=a\n",
            b"24 GNU.sparse.numbytes=1\n",
        ] {
            assert!(parse(body).is_err(), "{}", body.escape_ascii());
        }
    }

    #[test]
    fn times() {
        for (text, expected) in [
            (&b"0"[..], Some((0, 0))),
            (b"1.5", Some((1, 500_000_000))),
            (b"1.0000000019", Some((1, 1))),
            (b"-1.25", Some((-2, 750_000_000))),
            (b"-0.5", Some((-1, 500_000_000))),
            (b"7.", Some((7, 0))),
            (b".5", None),
            (b"1.-5", None),
            (b"99999999999999999999", None),
        ] {
            assert_eq!(time(text), expected, "{}", text.escape_ascii());
        }
    }
}
