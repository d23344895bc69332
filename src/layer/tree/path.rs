//! Paths in archives: bytes, cleaned lexically.

use std::borrow::Cow;

use super::{Fault, bad};
use crate::layer::index::MAX_NAME_LEN;

/// Longest path, in bytes (PATH_MAX of Linux, less its terminator): what an unpacker could create.
pub(super) const MAX_PATH_LEN: usize = 4095;
/// Longest part of a name that an error repeats, in bytes.
const QUOTED_LEN: usize = 200;

/// Bytes of an archive as an error shows them: printable, and of limited length.
pub(in crate::layer) fn quoted(bytes: &[u8]) -> String {
    match bytes.get(..QUOTED_LEN) {
        Some(head) if bytes.len() > QUOTED_LEN => format!("\"{}...\"", head.escape_ascii()),
        _ => format!("\"{}\"", bytes.escape_ascii()),
    }
}

/// A path without empty, `.` and `..` components; its `..` go up lexically, and are lost where there is nothing to go up from, or are
/// kept in front if `keep_up` says so. And its longest component.
pub(in crate::layer) fn lexical(path: &[u8], keep_up: bool) -> (Cow<'_, [u8]>, usize) {
    let mut parts: Vec<&[u8]> = Vec::new();
    let mut plain = true;
    for part in path.split(|&c| c == b'/') {
        match part {
            b"" | b"." => plain = false,
            b".." => {
                plain = false;
                match parts.last() {
                    Some(last) if *last != b".." => drop(parts.pop()),
                    _ if keep_up => parts.push(part),
                    _ => {}
                }
            }
            _ => parts.push(part),
        }
    }
    let longest = parts.iter().map(|part| part.len()).max().unwrap_or(0);
    let path = if plain {
        Cow::Borrowed(path)
    } else {
        Cow::Owned(parts.join(&b'/'))
    };
    (path, longest)
}

/// What is before the last slash of a clean path, and what is behind it.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&c| c == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&path[..0], path),
    }
}

/// The path of an entry relative to the root, with its lengths checked.
pub(super) fn clean(path: &[u8]) -> Result<Cow<'_, [u8]>, Fault> {
    let (cleaned, longest) = lexical(path, false);
    if cleaned.contains(&0) {
        return bad("its name holds a NUL");
    }
    if cleaned.len() > MAX_PATH_LEN {
        return bad(format!(
            "its path has {} bytes, over the limit of {MAX_PATH_LEN}",
            cleaned.len()
        ));
    }
    if longest > MAX_NAME_LEN {
        return bad(format!(
            "a component of its path has {longest} bytes, over the limit of {MAX_NAME_LEN}"
        ));
    }
    Ok(cleaned)
}
