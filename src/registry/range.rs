//! Ranges of bytes in HTTP (RFC 9110, section 14), as registries, caches and storage services really answer them.
//!
//! What an answer says of itself only decides where its bytes are put: every byte is verified by digest afterwards. So whatever can be understood is
//! taken: a part that is shorter than asked, a part that begins earlier, a whole blob where a part was asked for, other spellings of the
//! header, and no header at all where the length tells. Only what fits nothing is refused, and then the whole blob is asked for instead.

use std::ops::Range;

/// What a `Content-Range` header states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentRange {
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive as in the header.
    pub last: u64,
    /// Size of the whole, if it is given.
    pub total: Option<u64>,
}

impl ContentRange {
    /// Number of bytes.
    fn len(&self) -> u64 {
        (self.last - self.start).saturating_add(1)
    }

    fn holds(&self, byte: u64) -> bool {
        (self.start..=self.last).contains(&byte)
    }
}

/// Parses a `Content-Range` header such as `bytes 0-99/1000`, also without its unit or its total, and with other signs between them;
/// `None` if it names no range of bytes.
pub fn parse_content_range(text: &str) -> Option<ContentRange> {
    let text = text.trim();
    let (unit, rest) = text.split_at(text.find(|c: char| c.is_ascii_digit() || c == '*')?);
    let unit = unit.trim_end_matches([' ', '\t', '=', ':']);
    if !["", "byte", "bytes"]
        .iter()
        .any(|known| unit.eq_ignore_ascii_case(known))
    {
        return None;
    }
    let (range, total) = rest.split_once('/').unwrap_or((rest, "*"));
    let (start, last) = range.split_once('-')?;
    let range = ContentRange {
        start: number(start.trim())?,
        last: number(last.trim())?,
        total: number(total.trim()),
    };
    (range.start <= range.last).then_some(range)
}

/// The size of the blob that a 416 answer states: `bytes */1000`.
pub fn parse_unsatisfied(text: &str) -> Option<u64> {
    let (_, total) = text.split_once("*/")?;
    number(total.trim())
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

/// The head of a successful answer, as far as it says which bytes follow.
#[derive(Debug, Clone, Copy, Default)]
pub struct Head<'a> {
    /// Whether the status is 206.
    pub partial: bool,
    /// `Content-Range`.
    pub content_range: Option<&'a str>,
    /// `Content-Length`.
    pub length: Option<u64>,
    /// Whether the body is in the format `multipart/byteranges`.
    pub multipart: bool,
    /// Whether a `Content-Encoding` that changes bytes is claimed.
    pub encoded: bool,
}

/// The bytes that follow a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// All of the blob.
    Whole,
    /// Those from `start` on.
    Part {
        /// Offset in the blob of the first one.
        start: u64,
        /// Offset after the last one, if it is known.
        end: Option<u64>,
        /// The answer does not say so: it is what was asked for, if the host heeds ranges at all.
        guessed: bool,
    },
    /// Parts with heads of their own.
    Multipart,
}

impl Head<'_> {
    /// What follows this head, which answers a request for `asked` (for everything, if `None`) of a blob of `size` bytes.
    ///
    /// # Errors
    /// A text that says why that cannot be told.
    pub fn content(&self, asked: Option<&Range<u64>>, size: u64) -> Result<Content, String> {
        let stated = self.content_range.and_then(parse_content_range);
        match asked {
            Some(asked) if self.partial => self.part(asked, stated, size),
            // A part of what was asked for as a whole: where it begins must be stated.
            None if self.partial => self.part(&(0..size), stated, size),
            _ => self.whole(asked, stated, size),
        }
    }

    fn part(&self, asked: &Range<u64>, stated: Option<ContentRange>, size: u64) -> Result<Content, String> {
        if self.multipart {
            return Ok(Content::Multipart);
        }
        if let Some(ContentRange { total: Some(total), .. }) = stated
            && self.encoded
            && total != size
        {
            return Err(format!("it is a part of {total} encoded bytes"));
        }
        match (stated, self.length) {
            // All of it, whatever else is stated.
            (stated, Some(length)) if length == size && stated.is_none_or(|stated| stated.len() != length) => {
                Ok(Content::Whole)
            }
            (Some(stated), length) if stated.holds(asked.start) => {
                let end = stated
                    .start
                    .saturating_add(stated.len().min(length.unwrap_or(u64::MAX)));
                match end > asked.start {
                    true => Ok(Content::Part {
                        start: stated.start,
                        end: Some(end),
                        guessed: false,
                    }),
                    false => Err(format!(
                        "its {} bytes end before the first one wanted",
                        length.unwrap_or(0)
                    )),
                }
            }
            (Some(stated), _) => Err(format!(
                "Content-Range is bytes {}-{}, asked for were bytes {}-{}",
                stated.start,
                stated.last,
                asked.start,
                asked.end.saturating_sub(1)
            )),
            (None, Some(0)) => Err("206 without any bytes".to_owned()),
            (None, Some(length)) if length <= asked.end - asked.start => Ok(Content::Part {
                start: asked.start,
                end: Some(asked.start + length),
                guessed: true,
            }),
            (None, Some(length)) => Err(format!(
                "206 without a Content-Range that can be read, and {length} bytes"
            )),
            (None, None) => Ok(Content::Part {
                start: asked.start,
                end: None,
                guessed: true,
            }),
        }
    }

    fn whole(&self, asked: Option<&Range<u64>>, stated: Option<ContentRange>, size: u64) -> Result<Content, String> {
        match (asked, stated, self.length) {
            (_, _, Some(length)) if length == size => Ok(Content::Whole),
            (Some(asked), Some(stated), length)
                if stated.holds(asked.start)
                    && stated.len() < size
                    && length.is_none_or(|length| length == stated.len()) =>
            {
                Ok(Content::Part {
                    start: stated.start,
                    end: Some(stated.last.saturating_add(1)),
                    guessed: false,
                })
            }
            (Some(asked), _, Some(length)) if length == asked.end - asked.start && !self.encoded => Ok(Content::Part {
                start: asked.start,
                end: Some(asked.end),
                guessed: true,
            }),
            // The length is that of the encoded body.
            (_, _, Some(_)) if self.encoded => Ok(Content::Whole),
            (_, _, Some(length)) => Err(format!("the blob has {length} bytes, its descriptor says {size}")),
            (_, _, None) => Ok(Content::Whole),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1000;

    fn partial(content_range: Option<&str>, length: Option<u64>) -> Result<Content, String> {
        let head = Head {
            partial: true,
            content_range,
            length,
            ..Head::default()
        };
        head.content(Some(&(100..200)), SIZE)
    }

    fn full(content_range: Option<&str>, length: Option<u64>) -> Result<Content, String> {
        let head = Head {
            content_range,
            length,
            ..Head::default()
        };
        head.content(Some(&(100..200)), SIZE)
    }

    fn part(start: u64, end: u64) -> Result<Content, String> {
        Ok(Content::Part {
            start,
            end: Some(end),
            guessed: false,
        })
    }

    fn guess(start: u64, end: u64) -> Result<Content, String> {
        Ok(Content::Part {
            start,
            end: Some(end),
            guessed: true,
        })
    }

    #[test]
    fn spellings_of_content_range() {
        let range = |total| {
            Some(ContentRange {
                start: 0,
                last: 99,
                total,
            })
        };
        for text in [
            "bytes 0-99/1000",
            "Bytes 0-99/1000",
            "BYTES=0-99/1000",
            "bytes: 0-99/1000",
            "0-99/1000",
            " bytes  0 - 99 / 1000 ",
            "byte 0-99/1000",
        ] {
            assert_eq!(parse_content_range(text), range(Some(1000)), "{text}");
        }
        for text in ["bytes 0-99/*", "bytes 0-99", "0-99", "bytes 0-99/", "bytes 0-99/many"] {
            assert_eq!(parse_content_range(text), range(None), "{text}");
        }
        for text in [
            "",
            "bytes",
            "bytes */1000",
            "items 0-9/10",
            "bytes 9-0/10",
            "bytes +0-9/10",
            "bytes -9/10",
            "bytes 0-99999999999999999999/*",
            "nonsense",
        ] {
            assert_eq!(parse_content_range(text), None, "{text}");
        }
        assert_eq!(parse_unsatisfied("bytes */1000"), Some(1000));
        assert_eq!(parse_unsatisfied("bytes 0-9/1000"), None);
    }

    #[test]
    fn parts_are_told_by_what_there_is() {
        assert_eq!(partial(Some("bytes 100-199/1000"), Some(100)), part(100, 200));
        assert_eq!(partial(Some("bytes 100-199/1000"), None), part(100, 200));
        // A total is no reason to refuse bytes that are verified.
        assert_eq!(partial(Some("bytes 100-199/777"), Some(100)), part(100, 200));
        assert_eq!(partial(Some("bytes 100-149/1000"), Some(50)), part(100, 150));
        assert_eq!(partial(Some("bytes 50-199/1000"), Some(150)), part(50, 200));
        assert_eq!(partial(Some("bytes 0-999/1000"), Some(1000)), part(0, 1000));
        assert_eq!(partial(Some("bytes 100-200/1000"), Some(100)), part(100, 200));
        assert_eq!(partial(None, Some(100)), guess(100, 200));
        assert_eq!(partial(Some("nonsense"), Some(100)), guess(100, 200));
        assert_eq!(partial(None, Some(40)), guess(100, 140));
        assert_eq!(partial(None, Some(SIZE)), Ok(Content::Whole));
        assert_eq!(partial(Some("bytes 100-199/1000"), Some(SIZE)), Ok(Content::Whole));
        assert!(matches!(
            partial(None, None),
            Ok(Content::Part {
                end: None,
                guessed: true,
                ..
            })
        ));
        for (stated, length) in [
            (Some("bytes 0-9/1000"), Some(10)),
            (Some("bytes 200-299/1000"), Some(100)),
            (Some("bytes 0-150/1000"), Some(20)),
            (None, Some(101)),
            (None, Some(0)),
        ] {
            assert!(partial(stated, length).is_err(), "{stated:?} {length:?}");
        }
    }

    #[test]
    fn a_status_of_200_may_come_with_a_part() {
        assert_eq!(full(None, Some(SIZE)), Ok(Content::Whole));
        assert_eq!(full(None, None), Ok(Content::Whole));
        assert_eq!(full(Some("bytes 0-999/1000"), None), Ok(Content::Whole));
        assert_eq!(full(Some("bytes 100-199/1000"), Some(SIZE)), Ok(Content::Whole));
        assert_eq!(full(Some("bytes 100-199/1000"), Some(100)), part(100, 200));
        assert_eq!(full(Some("bytes 100-199/1000"), None), part(100, 200));
        assert_eq!(full(None, Some(100)), guess(100, 200));
        assert!(full(None, Some(999)).unwrap_err().contains("999 bytes"));
        let encoded = Head {
            encoded: true,
            length: Some(999),
            ..Head::default()
        };
        assert_eq!(encoded.content(None, SIZE), Ok(Content::Whole));
    }

    #[test]
    fn a_part_of_an_encoded_body_is_no_part_of_the_blob() {
        let head = |content_range| Head {
            partial: true,
            encoded: true,
            length: Some(100),
            content_range: Some(content_range),
            ..Head::default()
        };
        assert_eq!(
            head("bytes 100-199/1000").content(Some(&(100..200)), SIZE),
            part(100, 200)
        );
        assert!(head("bytes 100-199/400").content(Some(&(100..200)), SIZE).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "(bytes )?\\PC{0,40}", length in proptest::option::of(0..2000u64), partial: bool) {
            let _ = (parse_content_range(&text), parse_unsatisfied(&text));
            let head = Head { partial, content_range: Some(&text), length, ..Head::default() };
            if let Ok(Content::Part { start, end, .. }) = head.content(Some(&(100..200)), SIZE) {
                // Whoever reads it gets at least one byte that was wanted.
                prop_assert!(start <= 100 && end.is_none_or(|end| end > 100));
            }
        }

        #[test]
        fn what_is_written_is_read(start in 0..u64::MAX / 2, len in 1..u64::MAX / 4, more in 0..1000u64) {
            let (last, total) = (start + len - 1, start + len + more);
            let parsed = parse_content_range(&format!("bytes {start}-{last}/{total}"));
            prop_assert_eq!(parsed, Some(ContentRange { start, last, total: Some(total) }));
        }
    }
}
