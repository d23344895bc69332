//! A blob behind HTTP, and the body that resumes.
//!
//! A host that answers a range with the whole blob costs what comes before the range. Who can do with the whole says so
//! ([`Blob::read_part`]) and gets [`RegistryError::NoRanges`] instead: what has begun to arrive is kept for the read of the whole that
//! follows ([`super::quirks`]).

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use http::{StatusCode, header};
use tokio::time::timeout;

use super::answer::{Answer, Broken};
use super::encoding::Encodings;
use super::exchange::Ask;
use super::operation::Operation;
use super::quirks::Served;
use super::{Repository, lock};
use crate::layer::Digest;
use crate::registry::attempts::Failure;
use crate::registry::hosts::wire::Response;
use crate::registry::peers::Peer;
use crate::registry::range::{Content, Head, parse_unsatisfied};
use crate::registry::{Blob, Body, Origin, RegistryError};

/// Bytes beside those wanted that are downloaded in vain rather than to have the blob read as a whole: about what a request costs.
const BESIDE: u64 = 256 << 10;

/// How long a read waits for the first one to find out whether there are ranges: where there are none, all who ask at once would be sent the
/// whole blob. No longer, as the first one may hang at a host that does not answer.
const PROBE: Duration = Duration::from_secs(3);
/// How long a blob of which a part was read is taken to have others: a cache does not forget it from one moment to the next.
const PROBED: Duration = Duration::from_secs(10);

/// A blob of a repository.
pub(super) struct RemoteBlob {
    repository: Arc<Repository>,
    digest: Digest,
    size: u64,
    /// What bytes came from last.
    served: Arc<Mutex<Option<Served>>>,
    /// What the host claimed of bytes that turned out wrong, for errors.
    suspicion: Mutex<Option<String>>,
    /// Held by the first read of a part.
    probe: tokio::sync::Mutex<()>,
    /// When a part of it has been read last.
    probed: Mutex<Option<Instant>>,
}

impl RemoteBlob {
    pub(super) fn new(repository: Arc<Repository>, digest: Digest, size: u64) -> Self {
        RemoteBlob {
            repository,
            digest,
            size,
            served: Arc::default(),
            suspicion: Mutex::default(),
            probe: tokio::sync::Mutex::default(),
            probed: Mutex::default(),
        }
    }

    /// The body of `range`. If `part`, hosts that have no ranges are asked for none of it. If `beside`, over a connection of its own.
    async fn open(&self, range: Range<u64>, part: bool, beside: bool) -> Result<Body, RegistryError> {
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
        let mut ask = ask(&self.repository.name, self.digest, self.size, range.clone());
        ask.beside = beside;
        let whole = ask.range.is_none();
        let mut reader = Reader {
            operation: Operation::new(self.repository.clone(), ask).await?,
            digest: self.digest,
            size: self.size,
            position: range.start,
            end: range.end,
            answer: None,
            peer: None,
            part: part && !whole,
            plain: false,
            untold: Vec::new(),
            no_ranges: None,
            served: self.served.clone(),
        };
        if whole {
            reader.take_parked();
        }
        // Wait for the first good answer here, so that a blob that cannot be had fails before its body is used.
        if reader.answer.is_none() {
            let is_probed = lock(&self.probed).is_some_and(|at| at.elapsed() < PROBED);
            let probe = match reader.part && !is_probed {
                true => tokio::time::timeout(PROBE, self.probe.lock()).await.ok(),
                false => None,
            };
            reader.connect().await?;
            drop(probe);
            if !whole {
                *lock(&self.probed) = Some(Instant::now());
            }
        }
        let body = stream::try_unfold(reader, |mut reader| async move {
            let piece = reader.next().await?;
            Ok(piece.map(|piece| (piece, reader)))
        });
        Ok(body.boxed())
    }
}

impl Blob for RemoteBlob {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        Box::pin(self.open(range, false, false))
    }

    fn read_part(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        Box::pin(self.open(range, true, false))
    }

    fn read_beside(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        Box::pin(self.open(range, true, true))
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn describe(&self) -> String {
        let suspicion = lock(&self.suspicion).clone().unwrap_or_default();
        format!("{}@{}{suspicion}", self.repository.describe(), self.digest)
    }

    fn refusals(&self, host: &str) -> Option<u64> {
        let is_asked = self.repository.host == host;
        is_asked.then(|| self.repository.refusals.load(Ordering::Relaxed))
    }

    fn origin(&self) -> Origin {
        Origin::new(&self.repository.host, &self.repository.name)
    }

    fn distrust(&self) {
        self.repository.locations.forget_all(self.digest);
        // Several parts may be under way; of a whole, each answer is judged once.
        let served = {
            let mut served = lock(&self.served);
            match &*served {
                Some(part) if part.part => served.clone(),
                _ => served.take(),
            }
        };
        let Some(served) = served else { return };
        if let Some(claimed) = &served.claimed {
            let claimed = claimed.text();
            tracing::warn!(host = %served.base, blob = %self.digest, claimed, "bytes with a Content-Encoding are not the blob's");
            *lock(&self.suspicion) = Some(format!(" (its host claims Content-Encoding {claimed})"));
        }
        let now = Instant::now();
        if !self.repository.quirks.another_way(&served, self.digest, now) {
            self.repository.shared.health.failed(&served.base, now);
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
    /// Its connection, among those to the same host.
    peer: Option<Peer>,
    /// Whether hosts without ranges are left alone.
    part: bool,
    /// Whether all of the blob is asked for, as ranges were of no use.
    plain: bool,
    /// Places whose answer to a range could not be told to be any part: once may be an accident.
    untold: Vec<usize>,
    /// What was left alone: a host that has the blob, but no ranges of it.
    no_ranges: Option<RegistryError>,
    served: Arc<Mutex<Option<Served>>>,
}

/// What to do with an answer.
enum Verdict {
    /// Read it.
    Take(Answer, Served),
    /// It brings all of the blob, which is too much.
    TooMuch(Response),
    /// Ranges of this blob are of no use at this host.
    NoRanges(String),
    /// It cannot be told which part it is.
    Untold(String),
    /// It is no answer.
    Fail(String),
}

impl Reader {
    /// Gets an answer that begins at, or before, the next byte wanted.
    async fn connect(&mut self) -> Result<(), RegistryError> {
        let name = self.operation.repository.name.clone();
        if self.part
            && let Some(host) = self.operation.all_rangeless(self.digest)
        {
            return Err(self.without_ranges(host));
        }
        loop {
            let range = if self.plain {
                0..self.size
            } else {
                self.position..self.end
            };
            let beside = self.operation.ask.beside;
            self.operation.ask = Ask {
                beside,
                ..ask(&name, self.digest, self.size, range)
            };
            let (place, response) = match self.operation.respond().await {
                Ok(answer) => answer,
                // Nobody has ranges; but somebody has the blob.
                Err(error) => return Err(self.no_ranges.take().unwrap_or(error)),
            };
            let base = self.operation.address(place).unwrap_or_default();
            match self.judge(place, response) {
                Verdict::Take(answer, served) => {
                    self.take(answer, served);
                    return Ok(());
                }
                Verdict::TooMuch(response) => {
                    self.note_rangeless(place, "it answers a range with the whole blob");
                    self.operation.repository.quirks.park(self.digest, &base, response);
                    self.leave(place);
                }
                Verdict::Untold(problem) if self.part && !self.untold.contains(&place) => {
                    self.untold.push(place);
                    // What is said if no attempt is left.
                    self.no_ranges = Some(self.without_ranges(self.operation.endpoint(place)));
                    let failure = Failure::new(self.operation.protocol(place, problem), "protocol");
                    self.operation.failed(place, failure);
                }
                Verdict::NoRanges(problem) | Verdict::Untold(problem) => {
                    self.note_rangeless(place, &problem);
                    match self.part {
                        true => self.leave(place),
                        false => {
                            self.operation.repository.retried("protocol");
                            self.plain = true;
                        }
                    }
                }
                Verdict::Fail(problem) => {
                    let failure = Failure::new(self.operation.protocol(place, problem), "protocol");
                    self.operation.failed(place, failure);
                }
            }
        }
    }

    /// Goes on with an answer that another read did not want.
    fn take_parked(&mut self) {
        let Some((base, response)) = self.operation.repository.quirks.take_parked(self.digest) else {
            return;
        };
        if let Some(place) = self.operation.place_of(&base)
            && let Verdict::Take(answer, served) = self.judge(place, response)
        {
            self.take(answer, served);
        }
    }

    fn take(&mut self, answer: Answer, served: Served) {
        // Where it breaks off, its rest is not to be had by a range.
        self.plain |= answer.is_decoded();
        *lock(&self.served) = Some(served);
        self.peer = self.operation.peer(answer.place);
        self.answer = Some(answer);
    }

    fn without_ranges(&self, host: String) -> RegistryError {
        RegistryError::NoRanges {
            host,
            what: self.operation.ask.what.clone(),
        }
    }

    /// Asks the host no more; it is no fault of its own.
    fn leave(&mut self, place: usize) {
        let error = self.without_ranges(self.operation.endpoint(place));
        self.no_ranges = Some(error.clone());
        let failure = Failure {
            passing: false,
            ..Failure::new(error, "protocol")
        };
        self.operation.failed(place, failure);
    }

    fn note_rangeless(&self, place: usize, problem: &str) {
        let base = self.operation.address(place).unwrap_or_default();
        let quirks = &self.operation.repository.quirks;
        if quirks.no_ranges(&base, self.digest, Instant::now()) {
            let host = self.operation.endpoint(place);
            tracing::warn!(%host, blob = %self.digest, problem, "ranges of this blob are of no use; it is read as a whole");
        }
    }

    /// Judges an answer by its head.
    fn judge(&self, place: usize, response: Response) -> Verdict {
        let headers = response.headers();
        let text = |name: header::HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let ranges = headers.get_all(header::CONTENT_RANGE);
        let mut ranges = ranges.iter().filter_map(|value| value.to_str().ok());
        let claimed = Encodings::of(headers);
        let asked = self.operation.ask.range.as_ref();
        let status = response.status();
        match status {
            StatusCode::PARTIAL_CONTENT | StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION => {}
            StatusCode::RANGE_NOT_SATISFIABLE if asked.is_some() => {
                return match ranges.find_map(parse_unsatisfied) {
                    Some(total) if total != self.size => {
                        Verdict::Fail(format!("the blob has {total} bytes, its descriptor says {}", self.size))
                    }
                    _ => Verdict::NoRanges("it answers 416 to a range that there is".to_owned()),
                };
            }
            other => return Verdict::Fail(format!("status {other}")),
        }
        let head = Head {
            partial: status == StatusCode::PARTIAL_CONTENT,
            content_range: ranges.next(),
            length: text(header::CONTENT_LENGTH).and_then(|text| text.trim().parse().ok()),
            multipart: text(header::CONTENT_TYPE).is_some_and(|text| {
                text.trim_start()
                    .to_ascii_lowercase()
                    .starts_with("multipart/byteranges")
            }),
            encoded: claimed.is_some(),
        };
        let base = self.operation.address(place).unwrap_or_default();
        let quirks = &self.operation.repository.quirks;
        let content = match head.content(asked, self.size) {
            Ok(content) => content,
            Err(problem) if asked.is_some() && head.partial => return Verdict::Untold(problem),
            Err(problem) => return Verdict::Fail(problem),
        };
        let mut served = Served {
            base,
            claimed,
            part: content != Content::Whole,
            guessed: false,
        };
        match content {
            Content::Multipart => Verdict::Take(Answer::multipart(place, response, self.position), served),
            Content::Part { start, end, guessed } => {
                if asked.is_some() && !guessed {
                    quirks.has_ranges(&served.base, self.digest);
                }
                served.guessed = guessed;
                Verdict::Take(Answer::new(place, response, start, self.position, end), served)
            }
            Content::Whole => {
                if asked.is_some() {
                    let beside = self.size.saturating_sub(self.end - self.position);
                    if self.part && beside > BESIDE {
                        return Verdict::TooMuch(response);
                    }
                    self.note_rangeless(place, "it answers a range with the whole blob");
                }
                // Encoded bytes have another length, but for a chance in millions.
                let encoded = match head.length {
                    Some(length) => length != self.size,
                    None => quirks.is_encoded(&served.base, self.digest),
                };
                let decoder = match served.claimed.as_ref().filter(|_| encoded) {
                    None => None,
                    Some(claimed) => match claimed.decoder() {
                        Ok(decoder) => Some(decoder),
                        Err(name) => {
                            return Verdict::Fail(format!(
                                "the body has the Content-Encoding {name:?}, which was not asked for and is not known here"
                            ));
                        }
                    },
                };
                let answer = Answer::new(place, response, 0, self.position, None);
                Verdict::Take(
                    match decoder {
                        Some(decoder) => answer.decoded(decoder),
                        None => answer,
                    },
                    served,
                )
            }
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
            let operation = &self.operation;
            let stall = operation.stall(place);
            let asked = Instant::now();
            let is_slow = stall.is_some() && self.peer.as_ref().is_some_and(|peer| peer.is_slow(asked));
            let mut next = async || answer.next(|bytes| operation.received(bytes)).await;
            let next = match stall {
                Some(_) if is_slow => Err(Broken::Stalled),
                // What has arrived is looked at before the clock, which goes on while nobody asks for more.
                Some(stall) => timeout(stall, next()).await.unwrap_or(Err(Broken::Stalled)),
                None => next().await,
            };
            let failure = match next {
                Ok(Some(mut piece)) => {
                    operation.heard(place);
                    if let Some(peer) = &mut self.peer {
                        peer.brought(piece.len(), asked.elapsed());
                    }
                    piece.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
                    self.position += piece.len() as u64;
                    self.operation.progressed(piece.len());
                    if self.position == self.end {
                        self.operation.succeeded(place);
                    }
                    return Ok(Some(piece));
                }
                // A part that is shorter than asked for is no fault: the rest is asked for.
                Ok(None) if answer.is_complete() => {
                    self.leave_answer();
                    continue;
                }
                // What ends early without a break, and without having stated a length, may be encoded after all. Then what was handed on
                // is wrong from the beginning: its reader finds that out, and asks again.
                Ok(None) if self.may_be_encoded() => {
                    self.position = self.end;
                    self.leave_answer();
                    return Ok(None);
                }
                Ok(None) => {
                    let problem = format!("the body ended {wanted} bytes too early");
                    Failure::new(self.operation.protocol(place, problem), "cut")
                }
                Err(Broken::Stalled) => {
                    self.operation.stalled(place);
                    let what = match is_slow {
                        true => "the answer came much more slowly than others from there".to_owned(),
                        false => "the answer stalled".to_owned(),
                    };
                    let host = self.operation.endpoint(place);
                    Failure::new(RegistryError::Unreachable { host, what }, "slow")
                }
                Err(Broken::Connection(cut)) => self.operation.broken(place, &cut),
                Err(Broken::Content(problem)) => {
                    // The other way of reading it is tried.
                    self.note_wrong(place);
                    Failure::new(self.operation.protocol(place, problem), "protocol")
                }
            };
            self.leave_answer();
            self.operation.failed(place, failure);
        }
    }

    fn leave_answer(&mut self) {
        (self.answer, self.peer) = (None, None);
    }

    /// Whether the answer claims an encoding that was not undone.
    fn may_be_encoded(&self) -> bool {
        let served = lock(&self.served);
        let claims = served
            .as_ref()
            .is_some_and(|served| served.claimed.is_some() && !served.part);
        claims && self.answer.as_ref().is_some_and(|answer| !answer.is_decoded())
    }

    /// What the answer brought cannot be read as it says: other ways are left.
    fn note_wrong(&mut self, place: usize) {
        let served = lock(&self.served).take();
        let now = Instant::now();
        match served {
            Some(served) if served.claimed.is_some() => {
                self.operation.repository.quirks.another_way(&served, self.digest, now);
            }
            _ => self.note_rangeless(place, "its ranges cannot be read"),
        }
        self.plain |= !self.part;
    }
}
