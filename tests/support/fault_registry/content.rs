//! Bodies: whole or a range, and whatever goes wrong with them.

use std::convert::Infallible;
use std::ops::Range;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{Method, header};

use super::Fault;
use super::answer::{Asked, status};

/// Size of the pieces of a body, in bytes.
const PIECE: usize = 16 << 10;

/// Bytes with 200, or a range of them with 206, and whatever goes wrong with that.
pub(super) fn content(bytes: &Bytes, asked: &Asked<'_>, fault: Option<Fault>, ranges: bool) -> Response {
    if let Some(Fault::Odd(odd)) = &fault
        && let Some(response) = odd.answer(bytes, asked)
    {
        return response;
    }
    let size = bytes.len();
    let range = match asked.headers.get(header::RANGE) {
        Some(value) if ranges && !matches!(fault, Some(Fault::IgnoreRange)) => {
            match parse_range(value.to_str().unwrap_or_default(), size) {
                Some(range) => Some(range),
                None => return status(416),
            }
        }
        _ => None,
    };
    let kept = range.clone().unwrap_or(0..size);
    let mut body = bytes.slice(kept.clone());
    if let Some(Fault::Corrupt(offset)) = fault
        && kept.contains(&offset)
    {
        let mut copy = body.to_vec();
        copy[offset - kept.start] ^= 0x55;
        body = copy.into();
    }
    let mut response = status(if range.is_some() { 206 } else { 200 });
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, "application/octet-stream".parse().unwrap());
    if ranges {
        headers.insert(header::ACCEPT_RANGES, "bytes".parse().unwrap());
    }
    if !matches!(fault, Some(Fault::Short(_) | Fault::Long(_))) {
        headers.insert(header::CONTENT_LENGTH, body.len().into());
    }
    if let Some(range) = &range {
        let stated = match &fault {
            Some(Fault::ContentRange(text)) => Some(text.clone()),
            Some(Fault::NoContentRange) => None,
            _ => Some(format!("bytes {}-{}/{size}", range.start, range.end - 1)),
        };
        if let Some(stated) = stated {
            headers.insert(header::CONTENT_RANGE, stated.parse().unwrap());
        }
    }
    if let Some(Fault::Encoding(encoding)) = fault {
        headers.insert(header::CONTENT_ENCODING, encoding.parse().unwrap());
    }
    if asked.method != Method::HEAD {
        *response.body_mut() = faulty_body(body, fault);
    }
    response
}

fn faulty_body(body: Bytes, fault: Option<Fault>) -> Body {
    let whole = |bytes: Bytes| stream::iter(pieces(bytes).into_iter().map(Ok::<_, Infallible>));
    match fault {
        Some(Fault::Cut(after)) => {
            let pieces = pieces(body.slice(..after.min(body.len()))).into_iter().map(Ok);
            // Let what came before be sent: an error at once would take it along.
            let end = stream::once(async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(stream::iter(pieces).chain(end))
        }
        Some(Fault::Short(after)) => Body::from_stream(whole(body.slice(..after.min(body.len())))),
        // In one piece with it, where both are small.
        Some(Fault::Long(more)) => Body::from_stream(whole([&body[..], &vec![0; more]].concat().into())),
        Some(Fault::Stall(after)) => {
            Body::from_stream(whole(body.slice(..after.min(body.len()))).chain(stream::pending()))
        }
        Some(Fault::Drip(bytes, every)) => {
            let drops: Vec<Bytes> = body.chunks(bytes).map(Bytes::copy_from_slice).collect();
            Body::from_stream(stream::iter(drops).then(move |drop| async move {
                tokio::time::sleep(every).await;
                Ok::<_, std::io::Error>(drop)
            }))
        }
        Some(Fault::Silent(mut healing)) => Body::from_stream(stream::once(async move {
            // Whoever has ended has healed as well.
            let _ = healing.changed().await;
            Err::<Bytes, _>(std::io::Error::other("it was silent"))
        })),
        _ => Body::from_stream(whole(body)),
    }
}

pub(super) fn pieces(bytes: Bytes) -> Vec<Bytes> {
    (0..bytes.len())
        .step_by(PIECE)
        .map(|start| bytes.slice(start..bytes.len().min(start + PIECE)))
        .collect()
}

pub(super) fn parse_range(text: &str, size: usize) -> Option<Range<usize>> {
    let (start, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let start: usize = start.parse().ok()?;
    let end = match last {
        "" => size,
        last => last.parse::<usize>().ok()?.checked_add(1)?.min(size),
    };
    (start < end).then_some(start..end)
}
