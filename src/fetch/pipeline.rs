//! The stages that a whole blob passes through, each on a thread of its own so that they overlap:
//!
//! ```text
//! download (tasks) -> hash the blob, decompress (thread) -> what the sink does with the tar (thread)
//! ```
//!
//! The first arrow carries what the registry sends, over one connection or several (lanes.rs), and is bounded by `fetch.stream_memory` over all
//! streams, of which one stream never has more than a part. The second carries [`DEPTH`] buffers of [`BUFFER`] bytes per stream. The
//! blob is hashed to its very end, also what follows the compressed data. Bytes that do not decode, or make no tar, are read to their end
//! all the same: if the blob has another digest than it should, it was damaged on its way and may be good the next time; otherwise the
//! layer itself is malformed.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc as threads};
use std::time::Duration;

use bytes::Buf;
use tokio::sync::{mpsc, watch};

use super::flights::Wishes;
use super::lanes::{Lanes, Piece, Shape};
use super::schedule::{Class, Scheduler};
use super::width::Links;
use crate::cache::{Spool, SpoolEnd};
use crate::layer::checkpoint::{Scanned, Scanner};
use crate::layer::compression::{Compression, MAGIC_LEN, decoder};
use crate::layer::digest::Hasher;
use crate::layer::{Digest, LayerError};
use crate::registry::{Blob, Origin, RegistryError};
use crate::sync::Budget;

/// Uncompressed bytes handed on at a time: enough that the threads rarely wait for each other.
const BUFFER: usize = 256 << 10;
/// Buffers between decompression and sink.
const DEPTH: usize = 8;
/// Pieces of the download in the first channel; their bytes are bounded by the memory limit, not by this.
const PIECES: usize = 1024;

/// Takes the tar, on a thread of its own.
pub(super) trait Sink: Send + 'static {
    /// The next bytes of the tar.
    ///
    /// # Errors
    /// What ends the stream.
    fn push(&mut self, bytes: &[u8]) -> Result<(), Fault>;

    /// Whether it wants to know where decoding can begin.
    const CUTS: bool = false;

    /// How the blob is compressed. Called before anything else.
    fn begin(&mut self, _compression: Compression) {}

    /// A span that ends with the bytes pushed last. Called only if it [cuts](Sink::CUTS).
    fn span(&mut self, _span: Scanned) {}
}

/// Uncompressed bytes on their way to the sink.
struct Buffer {
    compression: Compression,
    /// Where they begin.
    offset: u64,
    bytes: Vec<u8>,
    /// Spans that end in them, or with them.
    spans: Vec<Scanned>,
}

/// What decompresses.
enum Reader {
    Plain(Box<dyn Read + Send>),
    Cutting(Box<Scanner<Input>>),
}

impl Reader {
    fn new(compression: Compression, input: Input, cut: bool) -> io::Result<Self> {
        Ok(match cut {
            true => Reader::Cutting(Box::new(Scanner::new(compression, input)?)),
            false => Reader::Plain(decoder(compression, input)),
        })
    }

    /// Replaces what is in the buffer by the next bytes; none at the end.
    fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<Vec<Scanned>> {
        match self {
            Reader::Plain(reader) => {
                buffer.clear();
                reader.take(BUFFER as u64).read_to_end(buffer)?;
                Ok(Vec::new())
            }
            Reader::Cutting(scanner) => {
                scanner.read(buffer, BUFFER)?;
                Ok(scanner.spans())
            }
        }
    }
}

/// What passed through.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sums {
    pub blob_size: u64,
    pub compression: Compression,
}

/// Why a stream ended.
#[derive(Debug)]
pub(super) enum Fault {
    Source(RegistryError),
    Layer(LayerError),
    Disk(io::Error),
    /// The source was silent for that long.
    Silence(Duration),
    Closed,
    /// Nobody wants what the sink makes of the blob, but somebody the blob: it is read to its end.
    Unwanted,
}

/// What a stream uses of the fetcher.
pub(super) struct Resources {
    /// Bytes that may be between download and decompression, over all streams.
    pub memory: Arc<Budget>,
    /// The same for what is ahead of what comes first.
    pub ahead: Arc<Budget>,
    /// Longest silence of the source.
    pub patience: Duration,
    /// While it pauses, nothing more is taken from the source, which may be silent then.
    pub wishes: watch::Receiver<Wishes>,
    /// Counts the bytes of the blob that are there, in order.
    pub progress: Box<dyn Fn(u64) + Send + Sync>,
    /// Is told how many bytes of the blob have arrived, those included that come before it is their turn.
    pub arrived: Box<dyn Fn(u64) + Send + Sync>,
    /// Is told whether more connections may yet make it faster.
    pub grows: Box<dyn Fn(bool) + Send + Sync>,
    /// Counts bytes that arrive.
    pub fetched: prometheus::IntCounter,
    /// Counts ranges, by what became of them.
    pub stream_ranges: prometheus::IntCounterVec,
    /// Whose places it takes, in which class.
    pub origin: Origin,
    pub class: Class,
    pub scheduler: Arc<Scheduler>,
    /// How many connections help.
    pub links: Arc<Links>,
    /// Whether it may have more than one.
    pub wide: bool,
    /// Keeps the blob as it comes.
    pub spool: Option<Arc<Spool>>,
    pub shape: Shape,
}

impl Resources {
    /// Counts a range.
    pub(super) fn ranges(&self, outcome: &str) {
        self.stream_ranges.with_label_values(&[outcome]).inc();
    }
}

/// Runs a whole blob through the stages, and verifies its digest; the sink comes back with what it made of it.
pub(super) async fn run<S: Sink>(
    blob: &Arc<dyn Blob>,
    expected: Digest,
    sink: S,
    resources: Resources,
) -> Result<(S, Sums), Fault> {
    let (pieces, download) = mpsc::channel(PIECES);
    let (full, buffers) = threads::sync_channel::<Buffer>(DEPTH);
    // Buffers go round.
    let (spent, empty) = threads::channel::<Vec<u8>>();
    // Set when the sink cannot go on for a reason that has nothing to do with the bytes.
    let gone = Arc::new(AtomicBool::new(false));
    let input = Input::new(download, resources.spool.clone());
    let (consume_gone, gone) = (Arc::clone(&gone), gone);
    let decompress = tokio::task::spawn_blocking(move || decompress(input, expected, S::CUTS, full, &empty, &gone));
    let consume = tokio::task::spawn_blocking(move || consume(sink, &buffers, &spent, &consume_gone));
    let downloaded = fetch(blob, pieces, resources).await;
    // Both end on their own: the download has dropped its end of the channel.
    let (decompressed, consumed) = tokio::join!(decompress, consume);
    let join = |error| Fault::Disk(io::Error::other(error));
    let (decompressed, consumed) = (decompressed.map_err(join)?, consumed.map_err(join)?);
    // The first cause counts. A cut download looks like a damaged blob to the decoder, and a damaged blob like a malformed tar to
    // the sink; a sink that fails on its own closes the channel, which is no cause.
    downloaded?;
    match (decompressed, consumed) {
        (Ok(sums), Ok(sink)) => {
            blob.verified();
            Ok((sink, sums))
        }
        (Err(Fault::Closed) | Ok(_), Err(fault)) | (Err(fault), _) => Err(fault),
    }
}

/// Ends when the whole blob is handed on, or nobody takes it any more (whose error it is then).
async fn fetch(blob: &Arc<dyn Blob>, pieces: mpsc::Sender<Piece>, resources: Resources) -> Result<(), Fault> {
    let mut lanes = Lanes::new(Arc::clone(blob), resources);
    while let Some(piece) = lanes.next().await? {
        if pieces.send(piece).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The download as the decoder reads it.
#[derive(Clone)]
struct Input(Arc<Mutex<InputState>>);

struct InputState {
    download: mpsc::Receiver<Piece>,
    /// Pieces that were received and not yet read to their end.
    pieces: VecDeque<Piece>,
    hasher: Hasher,
    size: u64,
    spool: Option<Arc<Spool>>,
}

impl Input {
    fn new(download: mpsc::Receiver<Piece>, spool: Option<Arc<Spool>>) -> Self {
        if let Some(spool) = &spool {
            spool.begin();
        }
        Input(Arc::new(Mutex::new(InputState {
            download,
            pieces: VecDeque::new(),
            hasher: Hasher::new(),
            size: 0,
            spool,
        })))
    }

    fn with<T>(&self, act: impl FnOnce(&mut InputState) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl InputState {
    fn receive(&mut self) -> bool {
        let Some(piece) = self.download.blocking_recv() else {
            return false;
        };
        self.hasher.update(&piece.bytes);
        if let Some(spool) = &self.spool {
            spool.push(&piece.bytes);
        }
        self.size += piece.bytes.len() as u64;
        self.pieces.push_back(piece);
        true
    }

    /// The first bytes, without taking them.
    fn head(&mut self) -> Vec<u8> {
        loop {
            let head: Vec<u8> = self
                .pieces
                .iter()
                .flat_map(|p| p.bytes.iter().copied())
                .take(MAGIC_LEN)
                .collect();
            if head.len() >= MAGIC_LEN || !self.receive() {
                return head;
            }
        }
    }
}

impl Read for Input {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.with(|state| {
            loop {
                if let Some(piece) = state.pieces.front_mut() {
                    let count = piece.bytes.len().min(buf.len());
                    piece.bytes.copy_to_slice(&mut buf[..count]);
                    if piece.bytes.is_empty() {
                        state.pieces.pop_front();
                    }
                    if count > 0 || buf.is_empty() {
                        return Ok(count);
                    }
                } else if !state.receive() {
                    return Ok(0);
                }
            }
        })
    }
}

/// Decompresses the blob into buffers, reads it to its end, and verifies its digest.
fn decompress(
    input: Input,
    expected: Digest,
    cut: bool,
    full: threads::SyncSender<Buffer>,
    empty: &threads::Receiver<Vec<u8>>,
    gone: &AtomicBool,
) -> Result<Sums, Fault> {
    let head = input.with(InputState::head);
    // A blob that short is no layer of any kind; as a tar it gets the clearest error.
    let compression = Compression::sniff(&head).unwrap_or(Compression::None);
    let mut offset = 0;
    let mut pass = |reader: &mut Reader| {
        loop {
            let mut bytes = empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(BUFFER));
            let spans = reader.read(&mut bytes);
            let spans = spans.map_err(|error| broken(&error, input.with(|state| state.size)))?;
            let count = bytes.len();
            let buffer = Buffer {
                compression,
                offset,
                bytes,
                spans,
            };
            offset += count as u64;
            if full.send(buffer).is_err() {
                // The sink has failed. If the disk is why, the rest is of no use.
                return Err(Fault::Closed);
            }
            if count == 0 {
                return Ok(());
            }
        }
    };
    let reader = Reader::new(compression, input.clone(), cut).map_err(Fault::Disk);
    let decoded = reader.and_then(|mut reader| pass(&mut reader));
    drop(full);
    if matches!(decoded, Err(Fault::Closed)) && gone.load(Ordering::Acquire) {
        return Err(Fault::Closed);
    }
    // What follows the compressed data belongs to the blob, and to its digest.
    let (actual, blob_size, spool) = input.with(|state| {
        state.pieces.clear();
        while state.receive() {
            state.pieces.clear();
        }
        let actual = std::mem::take(&mut state.hasher).finish();
        (actual, state.size, state.spool.take())
    });
    if actual != expected {
        return Err(Fault::Layer(LayerError::DigestMismatch {
            what: "blob",
            expected,
            actual,
        }));
    }
    if let Some(spool) = spool {
        spool.settle(SpoolEnd::Verified);
    }
    decoded.map(|()| Sums { blob_size, compression })
}

/// A decoder's error, as one of the layer: the input itself never fails.
fn broken(error: &io::Error, length: u64) -> Fault {
    Fault::Layer(match error.kind() {
        io::ErrorKind::UnexpectedEof => LayerError::Truncated {
            format: "compressed layer",
            length,
            what: "its compressed data".to_owned(),
        },
        _ => LayerError::malformed("compressed layer", length, error.to_string()),
    })
}

fn consume<S: Sink>(
    mut sink: S,
    buffers: &threads::Receiver<Buffer>,
    spent: &threads::Sender<Vec<u8>>,
    gone: &AtomicBool,
) -> Result<S, Fault> {
    let mut begun = false;
    for buffer in buffers {
        if !begun {
            sink.begin(buffer.compression);
            begun = true;
        }
        let pushed = hand_over(&mut sink, buffer.offset, &buffer.bytes, buffer.spans);
        pushed
            .inspect_err(|fault| gone.store(!matches!(fault, Fault::Layer(_) | Fault::Unwanted), Ordering::Release))?;
        let _ = spent.send(buffer.bytes);
    }
    Ok(sink)
}

/// Gives bytes and the spans that end in them to the sink, in order.
fn hand_over<S: Sink>(sink: &mut S, offset: u64, bytes: &[u8], spans: Vec<Scanned>) -> Result<(), Fault> {
    let mut rest = bytes;
    for span in spans {
        let done = (bytes.len() - rest.len()) as u64;
        let count = span.data_end.saturating_sub(offset).saturating_sub(done);
        let (head, tail) = rest.split_at(rest.len().min(count as usize));
        sink.push(head)?;
        sink.span(span);
        rest = tail;
    }
    sink.push(rest)
}
