//! Answers to ranges as servers, caches and proxies give them.

use std::ops::Range;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use http::{HeaderName, header};

use super::answer::{Asked, status};
use super::content::{parse_range, pieces};

/// An answer with any head and any body.
#[derive(Debug, Clone)]
pub struct Odd {
    /// The status.
    pub status: u16,
    /// Headers; `{start}`, `{last}`, `{len}` and `{size}` stand for what was asked for, and what there is.
    pub headers: Vec<(&'static str, &'static str)>,
    /// The body.
    pub body: OddBody,
    /// Whether its length is stated.
    pub sized: bool,
    /// Whether whole blobs are answered so as well.
    pub always: bool,
}

/// What is sent.
#[derive(Debug, Clone)]
pub enum OddBody {
    /// What was asked for.
    Asked,
    /// All of the blob.
    Whole,
    /// The first bytes of what was asked for, so many.
    First(usize),
    /// What was asked for, and so many bytes before.
    Earlier(usize),
    /// What was asked for, as the only part of a `multipart/byteranges`.
    Multipart,
    /// These bytes.
    Bytes(Bytes),
    /// Nothing.
    Empty,
}

impl Odd {
    /// 206 with this body, no `Content-Range`, and its length.
    pub fn partial(body: OddBody) -> Self {
        Odd {
            status: 206,
            headers: Vec::new(),
            body,
            sized: true,
            always: false,
        }
    }

    /// 200 with this body and its length.
    pub fn full(body: OddBody) -> Self {
        Odd {
            status: 200,
            ..Odd::partial(body)
        }
    }

    /// The same with a header.
    pub fn with(mut self, name: &'static str, value: &'static str) -> Self {
        self.headers.push((name, value));
        self
    }

    /// The same without its length.
    pub fn unsized_(self) -> Self {
        Odd { sized: false, ..self }
    }

    /// The same, also in answer to requests for all of the blob.
    pub fn always(self) -> Self {
        Odd { always: true, ..self }
    }

    /// The answer; `None` if the request is answered as usual.
    pub(super) fn answer(&self, bytes: &Bytes, asked: &Asked<'_>) -> Option<Response> {
        let size = bytes.len();
        let range = asked.headers.get(header::RANGE);
        let range = range.and_then(|value| parse_range(value.to_str().unwrap_or_default(), size));
        if range.is_none() && !self.always {
            return None;
        }
        let range = range.unwrap_or(0..size);
        let body = match &self.body {
            OddBody::Asked => bytes.slice(range.clone()),
            OddBody::Whole => bytes.clone(),
            OddBody::First(count) => bytes.slice(range.start..range.end.min(range.start + count)),
            OddBody::Earlier(count) => bytes.slice(range.start.saturating_sub(*count)..range.end),
            OddBody::Multipart => multipart(bytes, &range),
            OddBody::Bytes(bytes) => bytes.clone(),
            OddBody::Empty => Bytes::new(),
        };
        let mut response = status(self.status);
        for (name, value) in &self.headers {
            let value = value
                .replace("{start}", &range.start.to_string())
                .replace("{last}", &(range.end - 1).to_string())
                .replace("{len}", &range.len().to_string())
                .replace("{size}", &size.to_string());
            let name = HeaderName::from_static(name);
            response.headers_mut().append(name, value.parse().unwrap());
        }
        if self.sized {
            response.headers_mut().insert(header::CONTENT_LENGTH, body.len().into());
        }
        let pieces = pieces(body).into_iter().map(Ok::<_, std::convert::Infallible>);
        *response.body_mut() = Body::from_stream(stream::iter(pieces));
        Some(response)
    }
}

fn multipart(bytes: &Bytes, range: &Range<usize>) -> Bytes {
    let head = format!(
        "\r\n--THE_BOUNDARY\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes {}-{}/{}\r\n\r\n",
        range.start,
        range.end - 1,
        bytes.len()
    );
    [head.as_bytes(), &bytes[range.clone()], b"\r\n--THE_BOUNDARY--\r\n"]
        .concat()
        .into()
}
