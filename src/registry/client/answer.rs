//! The bytes of a blob out of one answer: without what comes before the part wanted, out of the frame of a `multipart/byteranges`,
//! decoded where a proxy has encoded it, and no further than the answer's own end.

use std::io;

use bytes::Bytes;

use super::encoding::Decoder;
use crate::registry::hosts::wire::{Cut, Response};
use crate::registry::range::{ContentRange, parse_content_range};

/// Longest head of a part in a `multipart/byteranges`, in bytes.
const MAX_PART_HEAD: usize = 8 << 10;

/// An answer that is being read.
pub(super) struct Answer {
    /// Place of the endpoint that gave it.
    pub(super) place: usize,
    response: Response,
    /// The head of the part, as far as it has arrived, while it has not all.
    head: Option<Vec<u8>>,
    decoder: Option<Decoder>,
    /// Offset in the blob of the next byte.
    at: u64,
    /// Offset of the first byte wanted.
    wanted: u64,
    /// Offset after the last byte, if the answer says so.
    end: Option<u64>,
}

/// Why no more bytes come.
pub(super) enum Broken {
    /// It brings nothing, and another host may.
    Stalled,
    /// The connection broke.
    Connection(Cut),
    /// The bytes are not what the head says.
    Content(String),
}

impl Answer {
    /// One that brings the blob from `start` on, of which bytes from `wanted` on are of use.
    pub(super) fn new(place: usize, response: Response, start: u64, wanted: u64, end: Option<u64>) -> Self {
        Answer {
            place,
            response,
            head: None,
            decoder: None,
            at: start,
            wanted,
            end,
        }
    }

    /// One that brings parts with heads of their own; the first of them counts.
    pub(super) fn multipart(place: usize, response: Response, wanted: u64) -> Self {
        Answer {
            head: Some(Vec::new()),
            ..Answer::new(place, response, wanted, wanted, None)
        }
    }

    /// The same, whose body has to be decoded.
    pub(super) fn decoded(self, decoder: Decoder) -> Self {
        Answer {
            decoder: Some(decoder),
            ..self
        }
    }

    /// Whether it has brought all that it said it would.
    pub(super) fn is_complete(&self) -> bool {
        self.end.is_some_and(|end| self.at >= end)
    }

    /// Whether its body is decoded.
    pub(super) fn is_decoded(&self) -> bool {
        self.decoder.is_some()
    }

    /// The next bytes that are wanted, never none; or `None` at its end. `arrived` is told of all bytes that are received for that.
    pub(super) async fn next(&mut self, mut arrived: impl FnMut(usize)) -> Result<Option<Bytes>, Broken> {
        while !self.is_complete() {
            let Some(piece) = self.response.chunk().await.map_err(Broken::Connection)? else {
                return match &self.head {
                    Some(_) => Err(Broken::Content("it is no multipart/byteranges".to_owned())),
                    None => Ok(None),
                };
            };
            arrived(piece.len());
            let piece = self.unwrap(piece)?;
            let piece = match &mut self.decoder {
                Some(decoder) => decoder
                    .push(&piece)
                    .map(Bytes::from)
                    .map_err(|error| undecodable(&error))?,
                None => piece,
            };
            let piece = self.cut(piece);
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    /// Without the head of a part.
    fn unwrap(&mut self, piece: Bytes) -> Result<Bytes, Broken> {
        let Some(head) = &mut self.head else { return Ok(piece) };
        head.extend_from_slice(&piece);
        let Some((part, body)) = part_head(head) else {
            return match head.len() > MAX_PART_HEAD {
                true => Err(Broken::Content("it is no multipart/byteranges".to_owned())),
                false => Ok(Bytes::new()),
            };
        };
        let part = part.filter(|part| (part.start..=part.last).contains(&self.wanted));
        let Some(part) = part else {
            return Err(Broken::Content(
                "a multipart/byteranges without the part asked for".to_owned(),
            ));
        };
        let body = Bytes::copy_from_slice(head.get(body..).unwrap_or_default());
        (self.at, self.end, self.head) = (part.start, part.last.checked_add(1), None);
        Ok(body)
    }

    /// Without what comes before the first byte wanted, and after the last of the answer.
    fn cut(&mut self, mut piece: Bytes) -> Bytes {
        if let Some(end) = self.end {
            piece.truncate(usize::try_from(end.saturating_sub(self.at)).unwrap_or(usize::MAX));
        }
        // At most the length of the piece, which is a `usize`.
        let before = self.wanted.saturating_sub(self.at).min(piece.len() as u64);
        self.at += piece.len() as u64;
        piece.split_off(before as usize)
    }
}

fn undecodable(error: &io::Error) -> Broken {
    Broken::Content(format!("its body is not encoded as it claims: {error}"))
}

/// The range that the first part of a `multipart/byteranges` states, and where its bytes begin; `None` while its head has not ended.
fn part_head(bytes: &[u8]) -> Option<(Option<ContentRange>, usize)> {
    // The line of the boundary, perhaps after an empty one, and lines of headers until an empty one.
    let mut lines = 0;
    let (mut at, mut range) = (0, None);
    while let Some(len) = bytes.get(at..)?.iter().position(|c| *c == b'\n') {
        let line = String::from_utf8_lossy(&bytes[at..at + len]);
        let line = line.trim();
        at += len + 1;
        match (line.is_empty(), lines) {
            (true, 0) => {}
            (true, _) => return Some((range, at)),
            (false, _) => {
                lines += 1;
                if let Some((name, value)) = line.split_once(':')
                    && name.trim().eq_ignore_ascii_case("content-range")
                {
                    range = parse_content_range(value);
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_of_parts() {
        let head = b"\r\n--x\r\nContent-Type: a/b\r\ncontent-range: bytes 5-9/20\r\n\r\nBODY";
        let (range, at) = part_head(head).unwrap();
        assert_eq!(&head[at..], b"BODY");
        assert_eq!(range.map(|range| (range.start, range.last)), Some((5, 9)));
        for end in 0..head.len() - 5 {
            assert!(part_head(&head[..end]).is_none(), "{end}");
        }
        assert_eq!(part_head(b"--x\n\nBODY").unwrap(), (None, 5));
    }
}
