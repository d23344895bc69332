//! As much of X.509 as has to be read beside the TLS library: where some fields of a certificate are. Nothing is trusted because of it.

use std::ops::Range;
use std::time::SystemTime;

use time::macros::format_description;
use time::{PrimitiveDateTime, UtcDateTime};

const BOOLEAN: u8 = 0x01;
const OCTET_STRING: u8 = 0x04;
const OID: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
/// `[0]` of the version, and `[3]` of the extensions.
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;
/// Tags of fields that are optional and before the extensions: unique identifiers.
const UNIQUE_IDS: [u8; 4] = [0x81, 0x82, 0xa1, 0xa2];

const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];
const SERVER_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01];
const ANY_USAGE: &[u8] = &[0x55, 0x1d, 0x25, 0x00];

/// What is of interest of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EndCertificate<'a> {
    /// The part that is signed, as a range of the whole.
    pub signed: Range<usize>,
    /// The name of its issuer, with its header.
    pub issuer: &'a [u8],
    /// From when to when it is valid.
    pub valid: (SystemTime, SystemTime),
    /// Where the byte is that says that it is an authority, if it is one.
    pub authority: Option<usize>,
    /// Whether it may be used by servers; `None` if it does not say what for it may be used.
    pub for_servers: Option<bool>,
    /// Whether it has a list of names.
    pub has_names: bool,
}

/// An element: its tag, where it begins, and where its content is.
#[derive(Debug, Clone)]
struct Element {
    tag: u8,
    start: usize,
    content: Range<usize>,
}

/// Reads elements one after another.
struct Reader<'a> {
    bytes: &'a [u8],
    rest: Range<usize>,
}

impl Reader<'_> {
    fn next(&mut self) -> Option<Element> {
        let start = self.rest.start;
        let byte = |at: usize| self.bytes.get(at).copied().filter(|_| at < self.rest.end);
        let (tag, first) = (byte(start)?, byte(start + 1)?);
        let (len, header) = match first {
            0..=0x7f => (usize::from(first), 2),
            // No certificate is longer than 2^32 bytes.
            0x81..=0x84 => {
                let count = usize::from(first - 0x80);
                let mut len = 0;
                for at in 0..count {
                    len = len << 8 | usize::from(byte(start + 2 + at)?);
                }
                (len, 2 + count)
            }
            _ => return None,
        };
        let content = start + header..start.checked_add(header)?.checked_add(len)?;
        if content.end > self.rest.end {
            return None;
        }
        self.rest.start = content.end;
        Some(Element { tag, start, content })
    }

    fn expect(&mut self, tag: u8) -> Option<Element> {
        self.next().filter(|element| element.tag == tag)
    }

    fn peek(&self) -> Option<u8> {
        self.bytes
            .get(self.rest.start)
            .copied()
            .filter(|_| !self.rest.is_empty())
    }

    fn inside(&self, element: &Element) -> Self {
        Reader {
            bytes: self.bytes,
            rest: element.content.clone(),
        }
    }
}

impl<'a> EndCertificate<'a> {
    /// Reads a certificate; `None` if it is none, or of another shape than any that is in use.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut reader = Reader {
            bytes,
            rest: 0..bytes.len(),
        };
        let certificate = reader.expect(SEQUENCE)?;
        let signed = reader.inside(&certificate).expect(SEQUENCE)?;
        let mut fields = reader.inside(&signed);
        if fields.peek() == Some(VERSION) {
            fields.next()?;
        }
        // Serial number and algorithm.
        fields.next()?;
        fields.expect(SEQUENCE)?;
        let issuer = fields.expect(SEQUENCE)?;
        let validity = fields.expect(SEQUENCE)?;
        let mut validity = fields.inside(&validity);
        let valid = (instant(bytes, &validity.next()?)?, instant(bytes, &validity.next()?)?);
        // Subject and key.
        fields.expect(SEQUENCE)?;
        fields.expect(SEQUENCE)?;
        let mut found = EndCertificate {
            signed: signed.start..signed.content.end,
            issuer: bytes.get(issuer.start..issuer.content.end)?,
            valid,
            authority: None,
            for_servers: None,
            has_names: false,
        };
        while fields.peek().is_some_and(|tag| UNIQUE_IDS.contains(&tag)) {
            fields.next()?;
        }
        if let Some(extensions) = fields.expect(EXTENSIONS) {
            let list = fields.inside(&extensions).expect(SEQUENCE)?;
            let mut list = fields.inside(&list);
            while let Some(extension) = list.next() {
                found.extension(bytes, list.inside(&extension))?;
            }
        }
        Some(found)
    }

    fn extension(&mut self, bytes: &[u8], mut extension: Reader<'_>) -> Option<()> {
        let id = extension.expect(OID)?;
        if extension.peek() == Some(BOOLEAN) {
            extension.next()?;
        }
        let value = extension.expect(OCTET_STRING)?;
        let mut value = extension.inside(&value);
        match bytes.get(id.content)? {
            BASIC_CONSTRAINTS => {
                let constraints = value.expect(SEQUENCE)?;
                let flag = value.inside(&constraints).expect(BOOLEAN);
                let is_set = |flag: &Element| flag.content.len() == 1 && bytes.get(flag.content.start) == Some(&0xff);
                self.authority = flag.filter(is_set).map(|flag| flag.content.start);
            }
            EXTENDED_KEY_USAGE => {
                let usages = value.expect(SEQUENCE)?;
                let mut usages = value.inside(&usages);
                let mut for_servers = false;
                while let Some(usage) = usages.next() {
                    let usage = bytes.get(usage.content)?;
                    for_servers |= usage == SERVER_AUTH || usage == ANY_USAGE;
                }
                self.for_servers = Some(for_servers);
            }
            SUBJECT_ALT_NAME => self.has_names = true,
            _ => {}
        }
        Some(())
    }
}

/// A time. Years of two digits are those from 1950 to 2049.
fn instant(bytes: &[u8], element: &Element) -> Option<SystemTime> {
    let text = std::str::from_utf8(bytes.get(element.content.clone())?).ok()?;
    let text = match element.tag {
        UTC_TIME if text < "5" => format!("20{text}"),
        UTC_TIME => format!("19{text}"),
        GENERALIZED_TIME => text.to_owned(),
        _ => return None,
    };
    let form = format_description!("[year][month][day][hour][minute][second]Z");
    let instant = PrimitiveDateTime::parse(&text, form).ok()?;
    Some(UtcDateTime::new(instant.date(), instant.time()).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn element(tag: u8, content: &[u8]) -> Vec<u8> {
        let len = match content.len() {
            len @ 0..0x80 => vec![len as u8],
            len => vec![0x82, (len >> 8) as u8, len as u8],
        };
        [&[tag][..], &len, content].concat()
    }

    fn extension(id: &[u8], value: &[u8]) -> Vec<u8> {
        element(SEQUENCE, &[element(OID, id), element(OCTET_STRING, value)].concat())
    }

    fn certificate(extensions: &[Vec<u8>]) -> Vec<u8> {
        let sequence = |content: &[u8]| element(SEQUENCE, content);
        let times = [
            element(UTC_TIME, b"491231235959Z"),
            element(GENERALIZED_TIME, b"20500101000000Z"),
        ]
        .concat();
        let signed = [
            element(VERSION, &element(2, &[2])),
            element(2, &[1; 20]),
            sequence(&[]),
            sequence(b"issuer"),
            sequence(&times),
            sequence(b"subject"),
            sequence(&[7; 300]),
            element(EXTENSIONS, &sequence(&extensions.concat())),
        ]
        .concat();
        sequence(&[sequence(&signed), sequence(&[]), element(3, &[0; 70])].concat())
    }

    #[test]
    fn fields_are_found() {
        let authority = element(SEQUENCE, &[element(BOOLEAN, &[0xff]), element(2, &[0])].concat());
        let usages = element(SEQUENCE, &element(OID, ANY_USAGE));
        let bytes = certificate(&[
            extension(&[0x55, 0x1d, 0x0e], b"any"),
            extension(BASIC_CONSTRAINTS, &authority),
            extension(EXTENDED_KEY_USAGE, &usages),
            extension(SUBJECT_ALT_NAME, &element(SEQUENCE, &[])),
        ]);
        let found = EndCertificate::parse(&bytes).unwrap();
        assert_eq!(found.issuer, b"\x30\x06issuer");
        assert!(bytes[found.authority.unwrap() - 2..].starts_with(&[BOOLEAN, 1, 0xff, 2]));
        assert_eq!((found.for_servers, found.has_names), (Some(true), true));
        assert_eq!(found.valid.1.duration_since(found.valid.0).unwrap().as_secs(), 1);
        assert_eq!(&bytes[found.signed.clone()][..2], [SEQUENCE, 0x82]);
        let plain = certificate(&[extension(BASIC_CONSTRAINTS, &element(SEQUENCE, &[]))]);
        let found = EndCertificate::parse(&plain).unwrap();
        assert_eq!(
            (found.authority, found.for_servers, found.has_names),
            (None, None, false)
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0..400usize, byte: u8) {
            let _ = EndCertificate::parse(&bytes);
            let mut damaged = certificate(&[extension(BASIC_CONSTRAINTS, &element(SEQUENCE, &element(BOOLEAN, &[0xff])))]);
            if let Some(place) = damaged.get_mut(at) {
                *place = byte;
            }
            if let Some(found) = EndCertificate::parse(&damaged) {
                prop_assert!(found.signed.end <= damaged.len());
                prop_assert!(found.authority.is_none_or(|at| found.signed.contains(&at)));
            }
        }
    }
}
