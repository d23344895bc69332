//! Ranges of bytes in HTTP (RFC 9110, section 14).

use std::ops::Range;

/// What a `Content-Range` header of a 206 answer states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentRange {
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive as in the header.
    pub last: u64,
    /// Size of the whole, unless it is given as `*`.
    pub total: Option<u64>,
}

impl ContentRange {
    /// Checks that this is exactly what was asked for.
    ///
    /// # Errors
    /// A text that says what differs.
    pub fn check(&self, asked: &Range<u64>, size: u64) -> Result<(), String> {
        if self.start != asked.start || Some(self.last) != asked.end.checked_sub(1) {
            return Err(format!(
                "Content-Range is bytes {}-{}, asked for were bytes {}-{}",
                self.start,
                self.last,
                asked.start,
                asked.end.saturating_sub(1)
            ));
        }
        match self.total {
            Some(total) if total != size => Err(format!(
                "Content-Range says that the blob has {total} bytes, its descriptor says {size}"
            )),
            _ => Ok(()),
        }
    }
}

/// Parses a `Content-Range` header such as `bytes 0-99/1000`; `None` if it is anything else.
pub fn parse_content_range(text: &str) -> Option<ContentRange> {
    let text = text.trim();
    let (unit, rest) = text.split_once(' ')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (range, total) = rest.trim_start().split_once('/')?;
    let (start, last) = range.split_once('-')?;
    let range = ContentRange {
        start: number(start)?,
        last: number(last)?,
        total: if total == "*" { None } else { Some(number(total)?) },
    };
    let fits = range.start <= range.last && range.total.is_none_or(|total| range.last < total);
    fits.then_some(range)
}

/// Digits only: `u64::from_str` would take a sign.
fn number(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// The `Range` header for `range`, which is not empty.
pub fn range_header(range: &Range<u64>) -> String {
    format!("bytes={}-{}", range.start, range.end.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn forms_are_told_apart() {
        let whole = ContentRange {
            start: 0,
            last: 99,
            total: Some(1000),
        };
        assert_eq!(parse_content_range("bytes 0-99/1000"), Some(whole));
        assert_eq!(
            parse_content_range("Bytes 0-99/*"),
            Some(ContentRange { total: None, ..whole })
        );
        for text in [
            "",
            "bytes",
            "bytes */1000",
            "items 0-9/10",
            "bytes 9-0/10",
            "bytes 0-10/10",
            "bytes +0-9/10",
            "bytes 0-9/",
            "bytes 0-99999999999999999999/*",
        ] {
            assert_eq!(parse_content_range(text), None, "{text}");
        }
    }

    #[test]
    fn a_difference_is_named() {
        let range = parse_content_range("bytes 10-19/100").unwrap();
        assert_eq!(range.check(&(10..20), 100), Ok(()));
        assert!(range.check(&(10..21), 100).is_err());
        assert!(range.check(&(9..20), 100).is_err());
        assert!(range.check(&(10..20), 101).unwrap_err().contains("100"));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "(bytes )?\\PC{0,40}") {
            let _ = parse_content_range(&text);
        }

        #[test]
        fn what_is_written_is_read(start in 0..u64::MAX / 2, len in 1..u64::MAX / 4, more in 0..1000u64) {
            let (last, total) = (start + len - 1, start + len + more);
            let parsed = parse_content_range(&format!("bytes {start}-{last}/{total}")).unwrap();
            prop_assert_eq!(parsed.check(&(start..start + len), total), Ok(()));
        }
    }
}
