//! Layers of which everything is read, and how far ahead of such a reader is asked for more.
//!
//! A request brings what lies beside the file that somebody waits for ([`super::window`]), since an image is started with a tenth of its bytes.
//! Whoever reads all of a layer, though (a backup, a scanner, a copy, an import of everything), waits for hundreds of requests one after the
//! other, in which most of the link is idle. He is known by what he leaves out, which is nothing: a file that he has read
//! lies between files that he has read too. So of the files that were read for the first time, each is judged when [`LATELY`] more have been: are both of
//! its neighbours in the blob read as well? If they are for nearly all of the last [`JUDGED`] files, the layer is read *densely*. A start leaves
//! out much of every directory; who reads in the order of directories, with several processes or backwards, does not; and who reads in no order at
//! all is known when he has read nearly everything. Files count, not bytes: a large program is a single file, however much of it is read
//! ([`super::onward`] looks after one that is read from its beginning to its end).
//!
//! While a layer is read densely, as many bytes are on their way, or here and not read yet, as were read so in it: never more in vain
//! than were of use, and twice as many with each round trip, until the window covers bandwidth x delay. They are wishes of read-ahead, in
//! the order of the blob from where somebody waited last, and from the beginning when its end is reached; or the other way round, if he goes backwards.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::PoisonError;

use super::Layer;
use super::queue::{Ranks, View};
use super::schedule::Class;
use crate::cache::Bitmap;
use crate::sync::primitives::Mutex;

/// Files read after one before that one is judged: as many as several processes are apart that read beside each other. Those that read further
/// apart each have a neighbourhood of their own.
const LATELY: usize = 32;
/// Judged files that say how densely a layer is read.
const JUDGED: usize = 32;
/// Of those, with both neighbours read: so many that it begins to be read densely, and so many that it still is.
const BEGINS: usize = 28;
const GOES_ON: usize = 24;
/// Files that were read one before the other in the blob, after which it goes on like that.
const FALLS: i32 = 8;
/// Most bytes of the blob that are on their way or not read yet: 2 Gbit/s at a round trip of 100 ms, requests included.
const MOST: u64 = super::onward::MOST;
/// Chunks of a file, and of the blob in search of what is missing, that are looked at in one go.
const LOOK: usize = 512;
const SEARCH: usize = 1 << 16;
/// Chunks that are asked for in one go.
const ASKED: usize = 4096;

/// Who reads a layer, and how.
pub(super) struct Density {
    /// Chunks that were read, by rank. Asked without a lock: most reads are of what was read before.
    read: Bitmap,
    reading: Mutex<Reading>,
}

/// What should be asked for.
#[derive(Default)]
struct Asked {
    chunks: Vec<usize>,
    /// Bytes of the blob that hold them.
    bytes: u64,
}

impl Density {
    /// Nothing was read yet of a layer with so many chunks.
    pub fn new(chunks: usize) -> Self {
        Density {
            read: Bitmap::new(chunks),
            reading: Mutex::default(),
        }
    }

    /// Somebody reads these chunks, and waits for some of them unless all are here: what should be asked for because of that, if anything `may` be
    /// asked for ahead.
    fn note<V: View>(
        &self,
        ranks: &Ranks,
        view: &V,
        chunks: impl Iterator<Item = usize>,
        is_here: bool,
        may: impl FnOnce() -> bool,
    ) -> Asked {
        let read = &self.read;
        let mut new = chunks
            .map(|chunk| ranks.rank(chunk))
            .filter(|&rank| !read.get(rank))
            .peekable();
        if new.peek().is_none() {
            return Asked::default();
        }
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let files = Files { ranks, view };
        for rank in new {
            if read.set(rank) {
                reading.note(&files, rank, is_here);
            }
        }
        match reading.ahead.as_ref().is_some_and(Ahead::has_room) && may() {
            true => reading.next(&files, read),
            false => Asked::default(),
        }
    }
}

/// What is known of the reading.
#[derive(Default)]
struct Reading {
    /// Files of which anything was read, by the rank of their first chunk.
    files: Option<Bitmap>,
    /// Those that were read lately, and are not judged yet.
    lately: VecDeque<usize>,
    /// Of those judged last: whether their neighbours were read, and their bytes of the blob.
    judged: VecDeque<(bool, u64)>,
    /// Of the latest of them, how many more lay before the one that was read just before than behind it.
    falls: i32,
    /// The one that was read last.
    last: usize,
    /// While the layer is read densely.
    ahead: Option<Ahead>,
}

/// What is asked for ahead.
struct Ahead {
    /// Bytes of the blob that were read densely.
    read: u64,
    /// Those that were asked for ahead and not read yet.
    unread: u64,
    /// Chunks that were asked for, by rank.
    asked: Bitmap,
    /// The rank that was asked for last, or where somebody waited since.
    cursor: usize,
}

impl Reading {
    /// Something of the chunk at `rank` was read, for the first time.
    fn note<V: View>(&mut self, files: &Files<'_, V>, rank: usize, is_here: bool) {
        if let Some(ahead) = &mut self.ahead {
            ahead.note(files, rank, is_here);
        }
        let Some(first) = files.first(rank) else { return };
        let read = self.files.get_or_insert_with(|| Bitmap::new(files.view.len()));
        if !read.set(first) {
            return;
        }
        let fall = if first < self.last { 1 } else { -1 };
        self.falls = (self.falls + fall).clamp(-2 * FALLS, 2 * FALLS);
        self.last = first;
        self.lately.push_back(first);
        if self.lately.len() <= LATELY {
            return;
        }
        let Some(judged) = self.lately.pop_front() else { return };
        let is_read = |file: Option<usize>| file.is_some_and(|file| read.get(file));
        let next = files.end(judged);
        // There is nothing beyond the first and the last one that anybody could leave out.
        let before = judged == 0 || is_read(files.first(judged - 1));
        let behind = next.is_none_or(|next| next >= files.view.len() || read.get(next));
        self.judged
            .push_back((before && behind, files.bytes(judged..next.unwrap_or(judged + 1))));
        if self.judged.len() > JUDGED {
            self.judged.pop_front();
        }
        let dense = self.judged.iter().filter(|(dense, _)| *dense).count();
        match self.ahead {
            None if dense >= BEGINS => {
                self.ahead = Some(Ahead {
                    read: self.judged.iter().map(|(_, bytes)| bytes).sum(),
                    unread: 0,
                    asked: Bitmap::new(files.view.len()),
                    cursor: rank,
                });
            }
            Some(_) if dense < GOES_ON => {
                self.ahead = None;
                // What has been of use once is not reckoned with again.
                self.judged.clear();
            }
            _ => {}
        }
    }

    /// What should be asked for now, because it will be read.
    fn next<V: View>(&mut self, files: &Files<'_, V>, read: &Bitmap) -> Asked {
        let backwards = self.falls >= FALLS;
        let ahead = self.ahead.as_mut();
        ahead.map_or_else(Asked::default, |ahead| ahead.next(files, read, backwards))
    }
}

impl Ahead {
    fn note<V: View>(&mut self, files: &Files<'_, V>, rank: usize, is_here: bool) {
        let bytes = files.bytes(rank..rank + 1);
        self.read = self.read.saturating_add(bytes);
        if self.asked.get(rank) {
            self.unread = self.unread.saturating_sub(bytes);
        } else if !is_here {
            // He is where nobody expected him.
            self.cursor = rank;
        }
    }

    /// Bytes of the blob that may be on their way or not read yet.
    fn window(&self) -> u64 {
        self.read.min(MOST)
    }

    /// Whether it is time to ask for more: not with each file that is read, since requests should be worth their round trip.
    fn has_room(&self) -> bool {
        self.unread <= self.window() / 2
    }

    fn next<V: View>(&mut self, files: &Files<'_, V>, read: &Bitmap, backwards: bool) -> Asked {
        let window = self.window();
        let mut next = Asked::default();
        let len = files.view.len();
        for _ in 0..SEARCH.min(len) {
            if self.unread >= window || next.chunks.len() >= ASKED {
                break;
            }
            self.cursor = match backwards {
                true => self.cursor.checked_sub(1).unwrap_or(len - 1),
                false => (self.cursor + 1) % len,
            };
            let rank = self.cursor;
            let chunk = files.ranks.chunk(rank);
            if !read.get(rank) && !files.view.is_ready(chunk) && self.asked.set(rank) {
                let bytes = files.bytes(rank..rank + 1);
                self.unread = self.unread.saturating_add(bytes);
                next.bytes += bytes;
                next.chunks.push(chunk);
            }
        }
        next
    }
}

/// The files of a layer in the order of the blob.
struct Files<'a, V> {
    ranks: &'a Ranks,
    view: &'a V,
}

impl<V: View> Files<'_, V> {
    /// Whether the chunks at two ranks are of one file. What is of no file that is known is a file by itself.
    fn is_same(&self, rank: usize, other: usize) -> bool {
        let (one, other) = (
            self.view.owner(self.ranks.chunk(rank)),
            self.view.owner(self.ranks.chunk(other)),
        );
        one.file != 0 && (one.dir, one.file) == (other.dir, other.file)
    }

    /// The rank of the first chunk of the file that has the one at `rank`, unless it is far away.
    fn first(&self, rank: usize) -> Option<usize> {
        let mut first = rank;
        while first > 0 && self.is_same(first - 1, rank) {
            first -= 1;
            if rank - first >= LOOK {
                return None;
            }
        }
        Some(first)
    }

    /// The rank behind the last chunk of the file that begins at `first`, unless it is far away.
    fn end(&self, first: usize) -> Option<usize> {
        let last = self.view.len().min(first + LOOK);
        let end = (first + 1..last).find(|&rank| !self.is_same(rank, first));
        end.or_else(|| (last == self.view.len()).then_some(last))
    }

    /// Bytes of the blob that hold these chunks. Those that several have in common count for the first of them.
    fn bytes(&self, ranks: Range<usize>) -> u64 {
        let blob = |rank: usize| self.view.blob(self.ranks.chunk(rank));
        let mut end = ranks.start.checked_sub(1).map_or(0, |before| blob(before).end);
        let mut bytes = 0;
        for rank in ranks {
            let blob = blob(rank);
            bytes += blob.end.saturating_sub(blob.start.max(end));
            end = end.max(blob.end);
        }
        bytes
    }
}

impl Layer {
    /// Somebody reads `len` bytes at `offset`; `is_here` if he need not wait.
    pub(super) fn note_read(&self, offset: u64, len: u64, is_here: bool) {
        self.watchers.note(offset, len);
        // Of what is here as a whole, and of what comes as a whole, nothing has to be asked for.
        if self.cached.is_complete() || self.is_streamed() {
            return;
        }
        let chunks = self.cached.index().chunks_at(offset, len);
        // What is known to be read comes first, and is all that a start needs.
        let ahead = self
            .density
            .note(&self.ranks, self, chunks, is_here, || !self.has_wishes());
        if ahead.chunks.is_empty() {
            return;
        }
        self.fetcher.metrics.dense_bytes_total.inc_by(ahead.bytes);
        self.ask_for(&ahead.chunks, Class::ReadAhead);
    }
}

#[cfg(test)]
mod tests;
