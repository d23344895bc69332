//! Reading a file of a layer, its data space, or metadata.
//!
//! Bytes that are ready are read into a buffer of the FUSE thread and answered there. For all others the reply moves into a task,
//! and the FUSE thread is free at once: a registry that does not answer stops the readers of its bytes, and nobody else.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fuser::{Errno, ReplyData};
use prometheus::{Histogram, IntCounter};
use tokio::runtime::Handle;

use super::counters::Counters;
use super::deadlines::Deadlines;
use super::errno::{self, ReadError};
use super::failures::Failures;
use super::image::{self, Metadata};
use super::waiting::{Place, Waiting};
use super::warn::WarnLimit;
use crate::fetch::LayerData;
use crate::layer::{BlobIndex, Ino, Inode, LayerIndex, ROOT_INO};

/// How long a read must have taken to fail for its bytes not to be tried again for a moment.
const SLOW: Duration = Duration::from_secs(1);
/// How much longer than its deadline a read is waited for: `fetch` answers in time by itself, and if it has a bug, the reader gets an
/// error all the same.
const GRACE: Duration = Duration::from_secs(1);
/// Longest buffer a FUSE thread keeps between requests, in bytes: the largest read that is negotiated with the kernel.
pub const BUFFER_MAX: usize = 1 << 20;
/// Longest path in a log line, in bytes, and the most directories it is put together from.
const LOGGED_PATH_MAX: usize = 400;
const LOGGED_DEPTH_MAX: usize = 64;

thread_local! {
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Where the answer to a read goes.
pub trait Answer: Send + 'static {
    /// The bytes. Fewer than were asked for mean that the file ends there.
    fn data(self, bytes: &[u8]);
    /// No bytes.
    fn error(self, errno: Errno);
}

impl Answer for ReplyData {
    fn data(self, bytes: &[u8]) {
        ReplyData::data(self, bytes);
    }

    fn error(self, errno: Errno) {
        ReplyData::error(self, errno);
    }
}

/// The part of the data space that `size` bytes at `offset` of the file `inode` are: offset and length, cut off where the file ends.
pub fn extent(inode: &Inode, offset: u64, size: u32) -> (u64, u32) {
    let len = inode.size.saturating_sub(offset).min(u64::from(size));
    (inode.data.saturating_add(offset), len as u32)
}

/// Answers with the `len` bytes at `offset` of the data space if they are ready; otherwise gives the answer back, and the error of
/// the disk if that is why.
pub fn answer_ready<A: Answer>(
    layer: &dyn LayerData,
    offset: u64,
    len: u32,
    answer: A,
) -> Result<(), (A, Option<std::io::Error>)> {
    answer_ready_padded(layer, Range { offset, len, zeros: 0 }, answer)
}

fn answer_ready_padded<A: Answer>(
    layer: &dyn LayerData,
    range: Range,
    answer: A,
) -> Result<(), (A, Option<std::io::Error>)> {
    with_buffer(range.total(), |buffer| {
        let (bytes, zeros) = buffer.split_at_mut(range.len as usize);
        let ready = match bytes.is_empty() {
            true => Some(Ok(())),
            false => layer.read_ready(range.offset, bytes),
        };
        match ready {
            Some(Ok(())) => {
                zeros.fill(0);
                answer.data(buffer);
                Ok(())
            }
            Some(Err(error)) => Err((answer, Some(error))),
            None => Err((answer, None)),
        }
    })
}

/// Calls `use_it` with `len` bytes of this thread's buffer, whatever is in them.
fn with_buffer<T>(len: usize, use_it: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut buffer = BUFFER.take();
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let result = use_it(buffer.split_at_mut(len).0);
    if buffer.len() <= BUFFER_MAX {
        BUFFER.set(buffer);
    }
    result
}

/// A part of the data space, and zeros behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    offset: u64,
    len: u32,
    zeros: u32,
}

impl Range {
    /// What `size` bytes at `offset` of the data file are. The data space ends before the file does.
    fn of_data(index: &BlobIndex, offset: u64, size: u32) -> Range {
        let until = |end: u64| end.saturating_sub(offset).min(u64::from(size)) as u32;
        let (len, total) = (until(index.data_size()), until(image::data_size(index)));
        Range {
            offset,
            len,
            zeros: total - len,
        }
    }

    /// The bytes of the data space.
    fn bytes(self) -> std::ops::Range<u64> {
        self.offset..self.offset.saturating_add(self.len.into())
    }

    fn total(self) -> usize {
        self.len as usize + self.zeros as usize
    }
}

/// Through what a layer is read, for the log.
#[derive(Debug, Clone, Copy)]
enum Through {
    /// A file of the tree face.
    File(Ino),
    /// The data file.
    Data,
}

/// Serves reads of files.
#[derive(Clone)]
pub(super) struct Reads {
    shared: Arc<Shared>,
}

struct Shared {
    runtime: Handle,
    deadlines: Deadlines,
    counters: Arc<Counters>,
    read_bytes: IntCounter,
    cold_seconds: Histogram,
    warnings: WarnLimit,
    failures: Failures,
    waiting: Arc<Waiting>,
}

impl Reads {
    pub(super) fn new(
        runtime: Handle,
        deadlines: Deadlines,
        waiting: Arc<Waiting>,
        counters: Arc<Counters>,
        metrics: &crate::metrics::Metrics,
    ) -> Self {
        Reads {
            shared: Arc::new(Shared {
                runtime,
                deadlines,
                counters,
                read_bytes: metrics.read_bytes_total.clone(),
                cold_seconds: metrics.cold_read_seconds.clone(),
                warnings: WarnLimit::default(),
                failures: Failures::default(),
                waiting,
            }),
        }
    }

    /// Answers a read of `size` bytes at `offset` of the file `inode`, which has number `ino`: now, or later from a task.
    pub(super) fn read_file<A: Answer>(
        &self,
        layer: &Arc<dyn LayerData>,
        ino: Ino,
        inode: &Inode,
        offset: u64,
        size: u32,
        answer: A,
    ) {
        let (offset, len) = extent(inode, offset, size);
        self.read(layer, Through::File(ino), Range { offset, len, zeros: 0 }, answer);
    }

    /// Answers a read of `size` bytes at `offset` of the layer's data file: now, or later from a task.
    pub(super) fn read_data<A: Answer>(&self, layer: &Arc<dyn LayerData>, offset: u64, size: u32, answer: A) {
        let range = Range::of_data(layer.index(), offset, size);
        self.read(layer, Through::Data, range, answer);
    }

    fn read<A: Answer>(&self, layer: &Arc<dyn LayerData>, through: Through, range: Range, answer: A) {
        if range.total() == 0 {
            return answer.data(&[]);
        }
        let answer = match answer_ready_padded(layer.as_ref(), range, answer) {
            Ok(()) => return self.shared.read_bytes.inc_by(range.total() as u64),
            Err((answer, None)) => answer,
            // The disk does not give what was there. `fetch` may know another way; if not, it says what is wrong.
            Err((answer, Some(error))) => {
                self.shared.warn(layer.as_ref(), through, range, &error.into());
                answer
            }
        };
        if matches!(through, Through::Data)
            && let Some(errno) = self.shared.failures.find(layer.id(), &range.bytes())
        {
            return answer.error(self.shared.counters.failed(errno));
        }
        let Some(place) = self.shared.waiting.enter(&layer.owner(), layer.id()) else {
            let error = ReadError::Crowded;
            answer.error(self.shared.counters.failed(errno::of(&error)));
            return self.shared.warn(layer.as_ref(), through, range, &error);
        };
        let shared = Arc::clone(&self.shared);
        let layer = Arc::clone(layer);
        self.shared
            .runtime
            .spawn(async move { shared.read_cold(layer, through, range, answer, place).await });
    }

    /// Answers a read of `size` bytes at `offset` of the metadata in `slot`.
    pub(super) fn read_metadata<A: Answer>(&self, slot: u32, metadata: &Metadata, offset: u64, size: u32, answer: A) {
        let len = metadata.size().saturating_sub(offset).min(u64::from(size)) as usize;
        with_buffer(len, |buffer| match metadata.read(offset, buffer) {
            Ok(()) => {
                answer.data(buffer);
                self.shared.read_bytes.inc_by(len as u64);
            }
            Err(error) => {
                let error = ReadError::Disk(error);
                answer.error(self.shared.counters.failed(errno::of(&error)));
                if let Some(suppressed) = self.shared.warnings.admit() {
                    tracing::warn!(slot, offset, len, suppressed, "a read of metadata failed: {error}");
                }
            }
        });
    }
}

impl Shared {
    async fn read_cold<A: Answer>(
        &self,
        layer: Arc<dyn LayerData>,
        through: Through,
        range: Range,
        answer: A,
        place: Place,
    ) {
        let start = Instant::now();
        let deadline = match through {
            Through::Data => self.deadlines.image,
            Through::File(_) => self.deadlines.tree,
        };
        let result = tokio::select! {
            result = self.fetch(layer.as_ref(), range.offset, range.len, deadline) => result,
            () = place.ended() => Err(ReadError::Ended),
        };
        drop(place);
        self.cold_seconds.observe(start.elapsed().as_secs_f64());
        match result {
            Ok(bytes) => {
                if range.zeros == 0 {
                    answer.data(&bytes);
                } else {
                    let mut padded = Vec::from(bytes);
                    padded.resize(range.total(), 0);
                    answer.data(&padded);
                }
                self.read_bytes.inc_by(range.total() as u64);
            }
            // No container gets this error, so it is none that is counted or logged.
            Err(error @ ReadError::Ended) => answer.error(errno::of(&error)),
            Err(error) => {
                let errno = errno::of(&error);
                let is_first = match through {
                    // What failed at once may be tried at once: the kernel's second try often succeeds.
                    Through::Data if start.elapsed() >= SLOW => self.failures.note(*layer.id(), range.bytes(), errno),
                    Through::File(_) | Through::Data => true,
                };
                // The reader first: putting the line together takes longer than the answer.
                answer.error(self.counters.failed(errno));
                if is_first {
                    self.warn(layer.as_ref(), through, range, &error);
                }
            }
        }
    }

    async fn fetch(
        &self,
        layer: &dyn LayerData,
        offset: u64,
        len: u32,
        deadline: Duration,
    ) -> Result<Bytes, ReadError> {
        let limit = deadline.saturating_add(GRACE);
        let bytes = tokio::time::timeout(limit, layer.read(offset, len, deadline))
            .await
            .map_err(|_| ReadError::Overdue { after: limit })??;
        if bytes.len() != len as usize {
            return Err(ReadError::Short {
                got: bytes.len(),
                wanted: len as usize,
            });
        }
        Ok(bytes)
    }

    fn warn(&self, layer: &dyn LayerData, through: Through, range: Range, error: &ReadError) {
        let Some(suppressed) = self.warnings.admit() else {
            return;
        };
        let names = layer.names().ok();
        let (face, ino) = match through {
            Through::File(ino) => ("tree", Some(ino)),
            Through::Data => ("image", names.as_ref().and_then(|names| file_at(names, range))),
        };
        let path = names
            .zip(ino)
            .map_or_else(String::new, |(names, ino)| path(&names, ino));
        tracing::warn!(
            layer = %layer.digest(),
            face,
            path,
            offset = range.offset,
            len = range.len,
            suppressed,
            "a read failed: {error}"
        );
    }
}

/// The first file that has any of the bytes of `range`. It is searched for, since the data space does not know its files.
fn file_at(index: &LayerIndex, range: Range) -> Option<Ino> {
    let end = range.offset.saturating_add(range.len.into());
    let overlaps =
        |inode: &Inode| inode.is_reg() && inode.data < end && inode.data.saturating_add(inode.size) > range.offset;
    let files = index.inodes().iter().enumerate().filter(|(_, inode)| overlaps(inode));
    let (position, _) = files.min_by_key(|(_, inode)| inode.data)?;
    Ino::try_from(position + 1).ok()
}

/// A path that leads to `ino`, for people to read. It is searched for, since files do not know their directory.
fn path(index: &LayerIndex, ino: Ino) -> String {
    let mut names = Vec::new();
    let mut at = ino;
    while at != ROOT_INO && names.len() < LOGGED_DEPTH_MAX {
        let holder = index.inodes().iter().find_map(|dir| {
            let entry = index.entries(dir).iter().find(|entry| entry.ino == at)?;
            Some((dir, index.name(entry)))
        });
        let Some((dir, name)) = holder else {
            return format!("inode {ino}");
        };
        names.push(name);
        // A directory's own number is not in it, but in its children; the entries found above are one.
        let own = index.inodes().iter().position(|inode| std::ptr::eq(inode, dir));
        at = own.map_or(ROOT_INO, |position| position as Ino + 1);
    }
    let mut path = Vec::new();
    for name in names.iter().rev() {
        path.push(b'/');
        path.extend_from_slice(name);
    }
    path.truncate(LOGGED_PATH_MAX);
    path.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::index::{Dirent, IndexParts, mode};
    use crate::layer::{Access, Codec};

    #[test]
    fn a_read_ends_where_its_file_ends() {
        let file = Inode {
            mode: mode::REG,
            size: 1000,
            data: 512,
            ..Inode::default()
        };
        assert_eq!(extent(&file, 0, 4096), (512, 1000));
        assert_eq!(extent(&file, 999, 4096), (1511, 1));
        assert_eq!(extent(&file, 10, 20), (522, 20));
        assert_eq!(extent(&file, 1000, 1).1, 0);
        assert_eq!(extent(&file, u64::MAX, u32::MAX).1, 0);
    }

    #[test]
    fn the_data_file_ends_with_a_whole_page() {
        let of = |data_size, offset, size| {
            let index = LayerIndex::new(IndexParts {
                access: Access::Stream,
                codec: Codec::None,
                data_size,
                blob_size: 0,
                inodes: vec![Inode {
                    mode: mode::DIR,
                    parent: 1,
                    ..Inode::default()
                }],
                dirents: Vec::new(),
                xattrs: Vec::new(),
                chunks: Vec::new(),
                checkpoints: Vec::new(),
                verify: crate::layer::Verify::Content,
                strings: Vec::new(),
            })
            .expect("the parts are an index");
            let range = Range::of_data(&index.blob(), offset, size);
            (range.offset, range.len, range.zeros)
        };
        assert_eq!(of(10_000, 0, 4096), (0, 4096, 0));
        assert_eq!(of(10_000, 8192, 4096), (8192, 1808, 2288));
        assert_eq!(of(10_000, 9000, 1 << 20), (9000, 1000, 2288));
        assert_eq!(of(10_000, 11_000, 4096), (11_000, 0, 1288));
        assert_eq!(of(10_000, 12_288, 4096), (12_288, 0, 0));
        assert_eq!(of(10_000, u64::MAX, u32::MAX), (u64::MAX, 0, 0));
        assert_eq!(of(8192, 4096, 8192), (4096, 4096, 0));
        assert_eq!(of(0, 0, 4096), (0, 0, 0));
    }

    #[test]
    fn a_log_line_names_the_file() {
        let dir = |parent, data| Inode {
            mode: mode::DIR,
            parent,
            data,
            count: 1,
            ..Inode::default()
        };
        let file = Inode {
            mode: mode::REG,
            data: 512,
            size: 100,
            ..Inode::default()
        };
        let dirent = |name, name_len, ino| Dirent { name, name_len, ino };
        let index = LayerIndex::new(IndexParts {
            access: Access::Stream,
            codec: Codec::None,
            data_size: 1024,
            blob_size: 0,
            inodes: vec![dir(1, 0), dir(1, 1), file],
            dirents: vec![dirent(0, 3, 2), dirent(3, 3, 3)],
            xattrs: Vec::new(),
            chunks: Vec::new(),
            verify: crate::layer::Verify::Content,
            checkpoints: Vec::new(),
            strings: b"usrx\n\xff".to_vec(),
        })
        .expect("the parts are an index");
        assert_eq!(path(&index, 3), r"/usr/x\n\xff");
        assert_eq!(path(&index, 2), "/usr");
        assert_eq!(path(&index, 9), "inode 9");
        let at = |offset, len| file_at(&index, Range { offset, len, zeros: 0 });
        assert_eq!((at(512, 1), at(0, 1024), at(611, 1)), (Some(3), Some(3), Some(3)));
        assert_eq!((at(0, 512), at(612, 412)), (None, None));
    }
}
