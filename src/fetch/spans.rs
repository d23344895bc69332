//! What makes a layer that is being streamed readable in ranges later: its bytes are cut at the places where decoding can begin, and
//! each piece is decoded again from there, on a thread of its own, before the index promises that it can be: a zstd frame as a whole, of a
//! gzip span as much as proves it.
//!
//! Of a window, only the bytes count that the stream really refers back to. Those are found by decoding the first 32 KiB of the span
//! with two other windows, made so that a byte that comes from the window tells from where; all others are made zeros. That way a
//! window takes 1.6 kB instead of 12 (measured on a layer of 190 MB), and a whole index half a percent of its layer.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use super::pieces::{PIECE, digest};
use crate::layer::checkpoint::scan::SPAN_MAX;
use crate::layer::checkpoint::{self, Entry, MAX_WINDOW, Scanned, Windows, windows};
use crate::layer::index::MAX_CHUNKS;
use crate::layer::{Checkpoint, Chunk, Codec, Copy, Digest, LayerError, decode_member};
use crate::sync::Share;

/// Bytes of an uncompressed layer per chunk: nothing has to be decoded, so that a read need not fetch much more than it wants.
const PLAIN_PIECE: usize = 256 << 10;
/// Bytes that are decoded of a gzip span to prove that decoding can begin there: nothing behind the first [`MAX_WINDOW`] bytes refers back to
/// the window, and whoever has come so far with the right bytes goes on as the stream did. Twice as many, since it costs little.
const PROOF: usize = 2 * MAX_WINDOW;
/// Of so many gzip spans one is decoded to its end, in case that the bytes kept for it are not all that it takes: no damage comes of that,
/// as every span is verified when it is fetched, but the layer would have to be streamed again.
const WHOLE_EVERY: usize = 32;
/// Pieces that wait to be verified. With those at work, a stream holds at most five of either kind, compressed and not.
const WAITING: usize = 1;
const PIECES_HELD: u64 = 2 * 5;
/// Memory of a first pass in bytes: spans as they are cut (a little over 1 MiB), and the buffers between its threads. Where the places at which
/// decoding can begin are farther apart, it takes more if there is some at once; otherwise the layer is cut no further.
pub(super) const STREAM: u64 = PIECES_HELD * SPAN_USUAL + BUFFERS;
const SPAN_USUAL: u64 = 5 << 18;
const BUFFERS: u64 = 4 << 20;

/// A piece to be verified.
struct Job {
    offset: u64,
    bytes: Vec<u8>,
    codec: Codec,
    /// What it can be decoded from; `None` if from nothing, or if it is not compressed.
    span: Option<Scanned>,
}

/// A piece of the tar: a chunk, unless it is all zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    offset: u64,
    len: u32,
    /// Bytes of the blob that it is decoded from; the same as `offset` and `len` if it is not compressed, and 0 if it cannot be.
    blob_offset: u64,
    blob_len: u32,
    /// Uncompressed bytes before it there.
    skip: u32,
    digest: Option<Digest>,
}

/// What is known of all pieces.
#[derive(Default)]
struct Checked {
    pieces: Vec<Piece>,
    checkpoints: Vec<Checkpoint>,
    windows: Windows,
    /// Spans that were cut.
    spans: usize,
    /// Why not all bytes can be had from spans.
    streamed: Option<String>,
}

/// Cuts the tar, and has the pieces verified.
pub(super) struct Cutting {
    codec: Codec,
    /// What has come since the last piece, and where it begins.
    pending: Vec<u8>,
    from: u64,
    /// Whether no span can come any more.
    loose: bool,
    /// Memory, and how long the pieces may be that it is enough for.
    share: Share,
    covered: u64,
    jobs: SyncSender<Job>,
    checked: Receiver<Checked>,
}

/// How the bytes of a layer can be had again.
pub(super) struct Cut {
    pieces: Vec<Piece>,
    /// For chunks that can be fetched; `None`: the layer has to be streamed again.
    pub ranges: Option<Ranges>,
}

/// What is needed to fetch chunks in ranges.
pub(super) struct Ranges {
    pub codec: Codec,
    pub checkpoints: Vec<Checkpoint>,
    pub windows: Windows,
}

impl Cutting {
    /// At the beginning of a tar. `spawn` starts a thread; `share` is of [`STREAM`] bytes.
    pub fn new(spawn: impl FnOnce(Box<dyn FnOnce() + Send>), share: Share) -> Self {
        let (jobs, queue) = sync_channel(WAITING);
        let (done, checked) = channel();
        spawn(Box::new(move || check(&queue, &done)));
        Cutting {
            codec: Codec::None,
            pending: Vec::new(),
            from: 0,
            loose: false,
            share,
            covered: SPAN_USUAL,
            jobs,
            checked,
        }
    }

    /// How the blob is compressed. Called before anything else.
    pub fn begin(&mut self, codec: Codec) {
        self.codec = codec;
    }

    /// The next bytes of the tar.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
        self.loose |= self.codec != Codec::None && !self.covers(self.pending.len() as u64);
        if self.loose {
            self.cut_pieces(PIECE as usize);
        } else if self.codec == Codec::None {
            self.cut_pieces(PLAIN_PIECE);
        }
    }

    /// Whether a piece may be that long: because of what chunks may be, and because of memory.
    fn covers(&mut self, len: u64) -> bool {
        while !self.loose && len > self.covered {
            let more = self.covered * 2;
            if len > SPAN_MAX {
                return false;
            }
            if !self.share.grow(PIECES_HELD * more + BUFFERS) {
                tracing::info!(
                    "too little memory to find out where decoding can begin: the layer can only be streamed"
                );
                return false;
            }
            self.covered = more;
        }
        len <= self.covered
    }

    /// A span that ends here.
    pub fn span(&mut self, span: Scanned) {
        let end = self.from + self.pending.len() as u64;
        // Always so, as long as spans follow each other; what is not covered by one is streamed.
        if !self.loose && (span.data_offset, span.data_end) == (self.from, end) {
            let bytes = std::mem::take(&mut self.pending);
            self.job(bytes, Some(span));
        } else {
            self.loose = true;
        }
    }

    fn cut_pieces(&mut self, len: usize) {
        while self.pending.len() >= len {
            let rest = self.pending.split_off(len);
            let bytes = std::mem::replace(&mut self.pending, rest);
            self.job(bytes, None);
        }
    }

    fn job(&mut self, bytes: Vec<u8>, span: Option<Scanned>) {
        let offset = self.from;
        self.from += bytes.len() as u64;
        // Fails only if the other thread has panicked, which the end of the stream shows.
        let _ = self.jobs.send(Job {
            offset,
            bytes,
            codec: self.codec,
            span,
        });
    }

    /// At the end of the tar. Waits for the last piece to be verified. `None`: the thread that did it has ended early.
    pub fn finish(mut self) -> Option<Cut> {
        if self.codec == Codec::None {
            self.cut_pieces(PLAIN_PIECE);
        } else {
            self.cut_pieces(PIECE as usize);
        }
        if !self.pending.is_empty() {
            let bytes = std::mem::take(&mut self.pending);
            self.job(bytes, None);
        }
        drop(self.jobs);
        let mut checked = self.checked.recv().ok()?;
        let loose = || checked.pieces.iter().any(|piece| piece.blob_len == 0);
        let why = match self.codec {
            Codec::None => {
                for piece in &mut checked.pieces {
                    (piece.blob_offset, piece.blob_len) = (piece.offset, piece.len);
                }
                None
            }
            Codec::Zstd if checked.spans < 2 => Some("it is one zstd frame".to_owned()),
            _ if checked.streamed.is_some() => checked.streamed.take(),
            _ => loose().then(|| "there are too few places where decoding can begin".to_owned()),
        };
        let codec = match self.codec {
            Codec::Gzip => Codec::GzipSpans,
            other => other,
        };
        let ranges = match why {
            None => Some(Ranges {
                codec,
                checkpoints: checked.checkpoints,
                windows: checked.windows,
            }),
            Some(why) => {
                tracing::debug!("the layer can only be streamed: {why}");
                None
            }
        };
        Some(Cut {
            pieces: checked.pieces,
            ranges,
        })
    }
}

impl Cut {
    /// The chunks of the tar itself.
    pub fn chunks(&self) -> Vec<Chunk> {
        let ranges = self.ranges.is_some();
        let chunk = |piece: &Piece| {
            Some(Chunk {
                data_offset: piece.offset,
                data_len: piece.len,
                blob_offset: if ranges { piece.blob_offset } else { 0 },
                blob_len: if ranges { piece.blob_len } else { 0 },
                skip: if ranges { piece.skip } else { 0 },
                digest: piece.digest?,
            })
        };
        self.pieces.iter().filter_map(chunk).collect()
    }

    /// The chunks of files that the tar stores in pieces, each of which comes from a piece of the tar. `read` reads the data space.
    /// `None`: they would be too many.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn copied<E>(
        &self,
        copies: &[Copy],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Option<Vec<Chunk>>, E> {
        let plain = self.ranges.as_ref().is_some_and(|ranges| ranges.codec == Codec::None);
        let mut chunks = Vec::new();
        let mut bytes = Vec::new();
        for copy in copies {
            let mut done = 0;
            while done < copy.len {
                let from = copy.from.saturating_add(done);
                let at = self
                    .pieces
                    .partition_point(|piece| piece.offset + u64::from(piece.len) <= from);
                // Copies lie within the tar, and pieces cover it.
                let Some(piece) = self.pieces.get(at).filter(|piece| piece.offset <= from) else {
                    break;
                };
                let before = from - piece.offset;
                let len = (u64::from(piece.len) - before).min(copy.len - done);
                let to = copy.to.saturating_add(done);
                done += len;
                if piece.digest.is_none() {
                    continue;
                }
                bytes.resize(len as usize, 0);
                read(to, &mut bytes)?;
                let Some(digest) = digest(&bytes) else { continue };
                if chunks.len() + self.pieces.len() >= MAX_CHUNKS {
                    return Ok(None);
                }
                chunks.push(Chunk {
                    data_offset: to,
                    data_len: len as u32,
                    blob_offset: if plain { from } else { piece.blob_offset },
                    blob_len: if plain { len as u32 } else { piece.blob_len },
                    skip: if plain { 0 } else { piece.skip + before as u32 },
                    digest,
                });
            }
        }
        Ok(Some(chunks))
    }
}

/// Verifies pieces until no more come.
fn check(jobs: &Receiver<Job>, done: &Sender<Checked>) {
    let mut checked = Checked::default();
    for job in jobs {
        match &job.span {
            None => checked.plain(&job),
            Some(span) => {
                let result = match job.codec {
                    Codec::Zstd => checked.frames(&job, span),
                    _ => checked.span(&job, span),
                };
                if let Err(error) = result {
                    let what = format!("its bytes from {} on cannot be decoded again: {error}", job.offset);
                    checked.streamed.get_or_insert(what);
                    checked.plain(&job);
                }
            }
        }
    }
    // Nobody listens if the stream has failed.
    let _ = done.send(checked);
}

impl Checked {
    /// Pieces that are not decoded from a span.
    fn plain(&mut self, job: &Job) {
        self.cut(job, 0, 0);
    }

    fn cut(&mut self, job: &Job, blob_offset: u64, blob_len: u32) {
        for (at, bytes) in (0u32..).step_by(PIECE as usize).zip(job.bytes.chunks(PIECE as usize)) {
            self.pieces.push(Piece {
                offset: job.offset + u64::from(at),
                len: bytes.len() as u32,
                blob_offset,
                blob_len,
                skip: at,
                digest: digest(bytes),
            });
        }
    }

    /// A span of zstd frames.
    fn frames(&mut self, job: &Job, span: &Scanned) -> Result<(), LayerError> {
        same(
            &decode_member(Codec::Zstd, &span.compressed, 0, job.bytes.len() as u32)?,
            &job.bytes,
        )?;
        self.spans += 1;
        self.cut(job, span.blob_offset, span.compressed.len() as u32);
        Ok(())
    }

    /// A span of a gzip stream.
    fn span(&mut self, job: &Job, span: &Scanned) -> Result<(), LayerError> {
        let (entry, window) = sparse(span, &job.bytes)?;
        let len = job.bytes.len() as u32;
        let proof = match self.spans.is_multiple_of(WHOLE_EVERY) {
            true => job.bytes.len(),
            false => job.bytes.len().min(PROOF),
        };
        same(
            &checkpoint::decode(entry, &span.compressed, &window, 0, proof as u32)?,
            &job.bytes[..proof],
        )?;
        let checkpoint = Checkpoint {
            data_offset: job.offset,
            data_len: len,
            blob_offset: span.blob_offset,
            blob_len: span.compressed.len() as u32,
            entry,
            digest: Digest::of(&span.compressed),
        };
        self.windows.push(&windows::compress(&window)?);
        self.checkpoints.push(checkpoint);
        self.spans += 1;
        self.pieces.push(Piece {
            offset: job.offset,
            len,
            blob_offset: checkpoint.start(),
            blob_len: checkpoint.blob_len,
            skip: 0,
            digest: digest(&job.bytes),
        });
        Ok(())
    }
}

fn same(decoded: &[u8], streamed: &[u8]) -> Result<(), LayerError> {
    if decoded != streamed {
        return Err(LayerError::malformed("gzip span", 0, "it gives other bytes"));
    }
    Ok(())
}

/// The window of a span that begins with `bytes`, with zeros for what the span does not refer back to, and without what of that comes
/// first; and the entry with its length.
fn sparse(span: &Scanned, bytes: &[u8]) -> Result<(Entry, Vec<u8>), LayerError> {
    let Entry::Block { bits, .. } = span.entry else {
        return Ok((span.entry, Vec::new()));
    };
    // Nothing behind that can refer back so far.
    let head = &bytes[..bytes.len().min(MAX_WINDOW)];
    // Each byte is changed, in a different way for each place: the two changes of a byte of the output tell where it comes from.
    let mark = |place: fn(usize) -> usize| -> Result<Vec<u8>, LayerError> {
        let marked: Vec<u8> = (0..)
            .zip(&span.window)
            .map(|(i, &byte)| byte ^ (1 + place(i)) as u8)
            .collect();
        checkpoint::decode(span.entry, &span.compressed, &marked, 0, head.len() as u32)
    };
    let (low, high) = (mark(|i| i % MARKS)?, mark(|i| i / MARKS)?);
    let mut window = vec![0; span.window.len()];
    let mut first = window.len();
    for ((&byte, low), high) in head.iter().zip(low).zip(high) {
        let (low, high) = (usize::from(byte ^ low), usize::from(byte ^ high));
        if (low, high) == (0, 0) {
            continue;
        }
        let place = low
            .checked_sub(1)
            .zip(high.checked_sub(1))
            .map(|(low, high)| high * MARKS + low);
        // A place outside shows that the window is not that of the span.
        let place = place.and_then(|place| Some((place, *span.window.get(place)?)));
        let (place, original) = place.ok_or_else(|| LayerError::malformed("gzip span", 0, "its window is another"))?;
        window[place] = original;
        first = first.min(place);
    }
    window.drain(..first);
    let entry = Entry::Block {
        bits,
        window: window.len() as u32,
    };
    Ok((entry, window))
}

/// Marks that a byte can have, besides none; their square is more than a window has places.
const MARKS: usize = 255;

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::layer::Compression;
    use crate::layer::checkpoint::Scanner;
    use crate::sync::Budget;

    /// What comes of a gzip stream whose spans pass through `change`, which is told their numbers: whether it can be read in ranges, and the
    /// number of its spans.
    fn cut(change: impl Fn(usize, &mut Scanned)) -> (bool, usize) {
        cut_within(u64::MAX, change)
    }

    fn cut_within(memory: u64, change: impl Fn(usize, &mut Scanned)) -> (bool, usize) {
        let mut seed = 7u32;
        let text: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Sixteen letters: nothing can be left out, much refers back.
            b'a' + (seed >> 28) as u8
        })
        .take(4 << 20)
        .collect();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        gzip.write_all(&text).unwrap();
        let blob = gzip.finish().unwrap();
        let mut scanner = Scanner::new(Compression::Gzip, blob.as_slice()).unwrap();
        let share = Budget::new(memory).try_take(STREAM).unwrap();
        let mut cutting = Cutting::new(|check| drop(std::thread::spawn(check)), share);
        cutting.begin(Codec::Gzip);
        let (mut buffer, mut count) = (Vec::new(), 0);
        loop {
            scanner.read(&mut buffer, 1 << 20).unwrap();
            let mut begin = 0;
            for mut span in scanner.spans() {
                change(count, &mut span);
                count += 1;
                // Spans end within the buffer.
                let end = (span.data_end - (cutting.from + cutting.pending.len() as u64)) as usize + begin;
                cutting.push(&buffer[begin..end]);
                cutting.span(span);
                begin = end;
            }
            cutting.push(&buffer[begin..]);
            if buffer.is_empty() {
                break;
            }
        }
        let cut = cutting.finish().unwrap();
        (cut.ranges.is_some(), count)
    }

    #[test]
    fn a_span_that_does_not_decode_is_not_promised() {
        let (ranges, count) = cut(|_, _| ());
        assert!(ranges && count > 2, "{count} spans");
        let ranges = |change: fn(usize, &mut Scanned)| cut(change).0;
        assert!(!ranges(|number, span| if number == 1 {
            span.window.iter_mut().for_each(|byte| *byte ^= 1);
        }));
        assert!(!ranges(|number, span| if number == 1 {
            span.window.rotate_left(1);
        }));
        assert!(!ranges(|number, span| if number == 2 {
            span.compressed[300] ^= 4;
        }));
        // The first is decoded to its end.
        assert!(!ranges(|number, span| if number == 0 {
            span.compressed.truncate(span.compressed.len() - 20);
        }));
    }

    #[test]
    fn without_memory_for_long_pieces_the_layer_is_cut_no_further() {
        // The spans are in order, but each is pushed together with what is read beyond it.
        let (ranges, spans) = cut_within(STREAM, |_, _| {});
        assert!(spans > 2 && ranges, "of the usual length");
        let budget = Budget::new(STREAM);
        let share = budget.try_take(STREAM).unwrap();
        let mut cutting = Cutting::new(|check| drop(std::thread::spawn(check)), share);
        cutting.begin(Codec::Gzip);
        let bytes = vec![1; SPAN_USUAL as usize];
        cutting.push(&bytes);
        assert!(!cutting.loose);
        cutting.push(&bytes[..1]);
        assert!(cutting.loose);
        let cut = cutting.finish().unwrap();
        assert!(cut.ranges.is_none());
        assert_eq!(budget.held(), 0);
    }
}
