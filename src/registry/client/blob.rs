//! A blob behind HTTP, and the body that resumes.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use http::{StatusCode, header};
use reqwest::Response;

use super::exchange::Ask;
use super::operation::Operation;
use super::{Repository, lock};
use crate::layer::Digest;
use crate::registry::attempts::Failure;
use crate::registry::range::parse_content_range;
use crate::registry::{Blob, Body, Origin, RegistryError};

/// Bytes that are always worth throwing away to get at a range, if a host ignores ranges.
const MAX_SKIP: u64 = 64 << 20;
/// Bytes thrown away per byte wanted beyond that: resuming near the end of a large layer is still worth it.
const SKIP_PER_BYTE: u64 = 16;

/// A blob of a repository.
pub(super) struct RemoteBlob {
    repository: Arc<Repository>,
    digest: Digest,
    size: u64,
    /// Address of the endpoint that bytes came from last.
    served_by: Arc<Mutex<Option<String>>>,
}

impl RemoteBlob {
    pub(super) fn new(repository: Arc<Repository>, digest: Digest, size: u64) -> Self {
        RemoteBlob {
            repository,
            digest,
            size,
            served_by: Arc::default(),
        }
    }

    async fn open(&self, range: Range<u64>) -> Result<Body, RegistryError> {
        if range.start > range.end || range.end > self.size {
            return Err(RegistryError::Image {
                what: self.describe(),
                problem: format!(
                    "bytes {}..{} were asked for, it has {}",
                    range.start, range.end, self.size
                ),
            });
        }
        if range.is_empty() {
            return Ok(stream::empty().boxed());
        }
        let ask = ask(&self.repository.name, self.digest, self.size, range.clone());
        let mut reader = Reader {
            operation: Operation::new(self.repository.clone(), ask).await?,
            digest: self.digest,
            size: self.size,
            position: range.start,
            end: range.end,
            answer: None,
            served_by: self.served_by.clone(),
        };
        // Wait for the first good answer here, so that a blob that cannot be had fails before its body is used.
        reader.connect().await?;
        let body = stream::try_unfold(reader, |mut reader| async move {
            let piece = reader.next().await?;
            Ok(piece.map(|piece| (piece, reader)))
        });
        Ok(body.boxed())
    }
}

impl Blob for RemoteBlob {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        Box::pin(self.open(range))
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn describe(&self) -> String {
        format!("{}@{}", self.repository.describe(), self.digest)
    }

    fn origin(&self) -> Origin {
        Origin::new(&self.repository.host, &self.repository.name)
    }

    fn distrust(&self) {
        self.repository.locations.forget_all(self.digest);
        if let Some(endpoint) = lock(&self.served_by).take() {
            self.repository.shared.health.failed(&endpoint, Instant::now());
        }
    }
}

/// The request for `range` of a blob; the whole is asked for without a range.
fn ask(repository: &str, digest: Digest, size: u64, range: Range<u64>) -> Ask {
    let whole = range == (0..size);
    let what = match whole {
        true => format!("blob {digest} of {repository}"),
        false => format!(
            "bytes {}-{} of blob {digest} of {repository}",
            range.start,
            range.end - 1
        ),
    };
    Ask {
        range: (!whole).then_some(range),
        blob: Some(digest),
        ..Ask::get("blobs", digest.to_string(), what)
    }
}

/// A range of a blob that is being received.
struct Reader {
    operation: Operation,
    digest: Digest,
    size: u64,
    /// Offset in the blob of the next byte wanted.
    position: u64,
    /// Offset after the last byte wanted.
    end: u64,
    answer: Option<Answer>,
    served_by: Arc<Mutex<Option<String>>>,
}

struct Answer {
    place: usize,
    response: Response,
    /// Bytes still to be thrown away: those before the range, from a host that ignores ranges.
    skip: u64,
}

impl Reader {
    /// Gets an answer that begins at, or before, the next byte wanted.
    async fn connect(&mut self) -> Result<(), RegistryError> {
        let repository = &self.operation.repository;
        let name = repository.name.clone();
        self.operation.ask = ask(&name, self.digest, self.size, self.position..self.end);
        loop {
            let (place, response) = self.operation.respond().await?;
            match self.check(place, &response) {
                Ok(skip) => {
                    *lock(&self.served_by) = self.operation.address(place);
                    self.answer = Some(Answer { place, response, skip });
                    return Ok(());
                }
                Err(problem) => {
                    let failure = Failure::new(self.operation.protocol(place, problem), "protocol");
                    self.operation.failed(place, failure);
                }
            }
        }
    }

    /// Checks the head of an answer. Gives the number of bytes before the next one wanted.
    fn check(&self, place: usize, response: &Response) -> Result<u64, String> {
        let header = |name: header::HeaderName| response.headers().get(name).and_then(|value| value.to_str().ok());
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let text = header(header::CONTENT_RANGE).ok_or("206 without a Content-Range")?;
                let range = parse_content_range(text).ok_or_else(|| format!("Content-Range {text:?}"))?;
                range.check(&(self.position..self.end), self.size)?;
                Ok(0)
            }
            StatusCode::OK => {
                if let Some(length) = header(header::CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok())
                    && length != self.size
                {
                    return Err(format!(
                        "the blob has {length} bytes, its descriptor says {}",
                        self.size
                    ));
                }
                if self.operation.ask.range.is_none() {
                    return Ok(0);
                }
                let endpoint = self.operation.endpoint(place);
                if lock(&self.operation.repository.rangeless).insert(endpoint.clone()) {
                    tracing::warn!(host = %endpoint, "this host answers a range with the whole blob; lazy reads will be slow");
                }
                let affordable = (self.end - self.position).saturating_mul(SKIP_PER_BYTE).max(MAX_SKIP);
                if self.position > affordable {
                    return Err(format!("it ignores ranges, and {} bytes come before", self.position));
                }
                Ok(self.position)
            }
            other => Err(format!("status {other}")),
        }
    }

    /// The next bytes, or `None` after the last.
    async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            let wanted = self.end - self.position;
            if wanted == 0 {
                return Ok(None);
            }
            let Some(answer) = &mut self.answer else {
                self.connect().await?;
                continue;
            };
            let place = answer.place;
            let failure = match answer.response.chunk().await {
                Ok(Some(mut piece)) => {
                    self.operation.received(piece.len());
                    self.operation.heard(place);
                    let skipped = answer.skip.min(piece.len() as u64);
                    answer.skip -= skipped;
                    // `skipped` and what is kept are at most the length of the piece, which is a `usize`.
                    let mut piece = piece.split_off(skipped as usize);
                    piece.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
                    if piece.is_empty() {
                        continue;
                    }
                    self.position += piece.len() as u64;
                    self.operation.progressed(piece.len());
                    if self.position == self.end {
                        self.operation.succeeded(place);
                    }
                    return Ok(Some(piece));
                }
                Ok(None) => {
                    let problem = format!("the body ended {wanted} bytes too early");
                    Failure::new(self.operation.protocol(place, problem), "cut")
                }
                Err(error) => self.operation.broken(place, error),
            };
            self.answer = None;
            self.operation.failed(place, failure);
        }
    }
}
