//! Filling: a layer that is read lazily becomes whole while nobody waits for anything.
//!
//! What is missing is asked for in the order of the blob, in pieces, of which [`FLYING`] are under way, as [`Class::Background`]. Before each
//! piece the filler waits until nobody has wanted anything else for [`CALM`]: a container that starts meets those alone that are under way, and
//! pieces are as large as arrives in [`PIECE_TIME`], however fast the link is. That also makes requests run side by side where each connection
//! is slower than the link: with every piece that comes faster than the one before, more of them fit into the next.
//!
//! Nothing gives way to it ([`crate::cache::Cache::spare_bytes`]). What fails is left to the next time.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::Layer;
use super::schedule::Class;
use crate::layer::Access;
use crate::sync::blocking;
use crate::sync::primitives::Mutex;

/// How long nobody may have wanted anything else before a piece is asked for. A container that starts asks several times within it.
const CALM: Duration = Duration::from_millis(500);
/// How often it is looked whether it is calm.
const LOOK: Duration = Duration::from_millis(100);
/// What a piece should take: whoever comes meanwhile shares the link with those under way for so long.
const PIECE_TIME: Duration = Duration::from_millis(125);
/// Pieces under way: while one is decoded and written, the next one arrives.
const FLYING: usize = 2;
/// The first piece, and the smallest one, in bytes of the blob: one request that is worth its round trip.
const PIECE_LEAST: u64 = 1 << 20;
/// The largest piece, in bytes: what a link of 1 Gbit/s brings in that time.
const PIECE_MOST: u64 = 16 << 20;
/// How much a piece may be larger than the one before.
const GROWTH: u64 = 2;
/// Longest time until it is looked again whether a piece has come, if nothing tells so.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How far a layer has been filled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filled {
    /// Bytes of the blob that were asked for.
    pub bytes: u64,
    /// Whether all of the layer is there now.
    pub whole: bool,
}

/// How fast background work may be, over all of it.
#[derive(Debug)]
pub struct Rate {
    /// Bytes in a second; 0: as fast as it can.
    limit: u64,
    /// When what was let pass is over.
    next: Mutex<Instant>,
}

impl Rate {
    /// At most `limit` bytes in a second, or any number of them (0).
    pub fn new(limit: u64) -> Self {
        Rate {
            limit,
            next: Mutex::new(Instant::now()),
        }
    }

    /// Waits until `bytes` more may be asked for.
    pub async fn pass(&self, bytes: u64) {
        if self.limit == 0 {
            return;
        }
        let at = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let at = (*next).max(Instant::now());
            *next = at + Duration::from_secs_f64(bytes as f64 / self.limit as f64);
            at
        };
        tokio::time::sleep_until(at).await;
    }
}

/// Chunks that are asked for together.
struct Piece {
    chunks: Vec<usize>,
    /// Bytes of the blob that hold them.
    bytes: u64,
    /// Bytes that they take on the disk.
    data: u64,
}

/// A layer that is being filled.
struct Filling {
    filled: Filled,
    /// Pieces under way.
    flying: VecDeque<Piece>,
    /// Bytes of the next piece.
    size: u64,
    /// When the last piece had come, or the only one was asked for.
    landed: Instant,
}

impl Filling {
    /// Bytes of the disk that a piece takes, with those under way.
    fn room(&self, piece: &Piece) -> u64 {
        let flying = self.flying.iter().map(|piece| piece.data);
        flying.fold(piece.data, u64::saturating_add)
    }
}

/// The size of the next piece, after one of `size` bytes took `time`.
fn next_size(size: u64, time: Duration) -> u64 {
    let part = PIECE_TIME.as_secs_f64() / time.as_secs_f64().max(0.001);
    let fits = (size as f64 * part) as u64;
    fits.min(size.saturating_mul(GROWTH)).clamp(PIECE_LEAST, PIECE_MOST)
}

impl Layer {
    /// Whether something of it is missing that can be fetched in ranges.
    pub fn can_be_filled(&self) -> bool {
        self.cached.index().access() == Access::Ranges && !self.is_streamed() && !self.is_there()
    }

    /// Whether every byte is on the disk, verified or not.
    fn is_there(&self) -> bool {
        self.cached.present_bytes() >= self.cached.index().stored_size()
    }

    /// Fetches what is missing, behind everything that anybody wants, until all of it is there, or it does not go on: the layer is closed, its
    /// source does not deliver, or there is no room that nobody needs.
    pub async fn fill_up(self: &Arc<Self>) -> Filled {
        let mut filling = Filling {
            filled: Filled::default(),
            flying: VecDeque::new(),
            size: PIECE_LEAST,
            landed: Instant::now(),
        };
        let mut rank = 0;
        loop {
            let piece = self.next_piece(&mut rank, filling.size);
            if piece.chunks.is_empty() {
                while !filling.flying.is_empty() {
                    if !self.land(&mut filling).await {
                        return filling.filled;
                    }
                }
                filling.filled.whole = self.is_there();
                return filling.filled;
            }
            // Of those under way, nobody knows how much has been written.
            while filling.flying.len() >= FLYING || !self.has_room(filling.room(&piece)).await {
                if !self.land(&mut filling).await {
                    return filling.filled;
                }
            }
            if !self.may_ask(piece.bytes).await {
                return filling.filled;
            }
            if filling.flying.is_empty() {
                filling.landed = Instant::now();
            }
            filling.flying.push_back(self.ask_for_piece(piece).await);
        }
    }

    /// Waits for the piece that was asked for first. `false`: there is none, or it has not come.
    async fn land(&self, filling: &mut Filling) -> bool {
        let Some(piece) = filling.flying.pop_front() else {
            return false;
        };
        if !self.arrived(&piece).await {
            return false;
        }
        filling.filled.bytes += piece.bytes;
        self.fetcher.metrics.filled_bytes_total.inc_by(piece.bytes);
        filling.size = next_size(piece.bytes, filling.landed.elapsed());
        filling.landed = Instant::now();
        true
    }

    /// Whether there is room for so many bytes that nobody needs.
    async fn has_room(self: &Arc<Self>, bytes: u64) -> bool {
        let me = Arc::clone(self);
        // Asks the file system.
        blocking(move || me.fetcher.cache.spare_bytes()).await >= bytes
    }

    /// Waits until a piece may be asked for. `false`: none may any more.
    async fn may_ask(&self, bytes: u64) -> bool {
        while self.fetcher.scheduler.calm() < CALM {
            if timeout(LOOK, self.closing.cancelled()).await.is_ok() {
                return false;
            }
        }
        self.fetcher.background.pass(bytes).await;
        !self.is_streamed() && !self.closing.is_cancelled()
    }

    /// The next chunks that are missing, from `rank` on: `size` bytes of the blob, or a chunk more.
    fn next_piece(&self, rank: &mut usize, size: u64) -> Piece {
        let all = self.cached.index().chunks();
        let (mut chunks, mut bytes, mut data) = (Vec::new(), 0, 0);
        while bytes < size && *rank < all.len() {
            let chunk = self.ranks.chunk(*rank);
            *rank += 1;
            if let Some(record) = all.get(chunk)
                && !self.cached.is_chunk_ready(chunk)
                && !self.cached.is_suspect(chunk)
            {
                chunks.push(chunk);
                bytes += u64::from(record.blob_len).max(1);
                data += u64::from(record.data_len);
            }
        }
        Piece { chunks, bytes, data }
    }

    /// Takes of a piece what is in the cache under another name, and has the rest fetched.
    async fn ask_for_piece(self: &Arc<Self>, mut piece: Piece) -> Piece {
        let me = Arc::clone(self);
        let piece = blocking(move || {
            let is_far = |chunk: usize| !me.cached.is_elsewhere(chunk) || !me.cached.take_from_elsewhere(chunk);
            piece.chunks.retain(|&chunk| is_far(chunk));
            piece
        });
        let piece = piece.await;
        self.ask_for(&piece.chunks, Class::Background);
        piece
    }

    /// Waits until nothing of a piece is asked for any more; whether any of it has come. A source that brings nothing, or a place that is not to
    /// be had, holds up the layers of others no longer than a request.
    async fn arrived(&self, piece: &Piece) -> bool {
        let (mut present, mut since) = (self.cached.present_bytes(), Instant::now());
        loop {
            let landed = self.landed.notified();
            if !self.queue().asks_for_any(&piece.chunks) {
                break;
            }
            tokio::select! {
                () = landed => {}
                () = sleep(LOOK_AGAIN) => {}
                () = self.closing.cancelled() => return false,
            }
            let now = self.cached.present_bytes();
            if now != present {
                (present, since) = (now, Instant::now());
            } else if since.elapsed() > self.fetcher.patience {
                return false;
            }
        }
        let mut chunks = piece.chunks.iter();
        piece.chunks.is_empty() || chunks.any(|&chunk| self.cached.is_chunk_ready(chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_as_large_as_comes_in_their_time() {
        let second = Duration::from_secs(1);
        assert_eq!(next_size(16 << 20, second), 2 << 20);
        assert_eq!(next_size(8 << 20, second / 8), 8 << 20);
        assert_eq!(next_size(1 << 20, second / 20), 2 << 20);
        // One that comes at once, as from this machine, says little of the next one.
        assert_eq!(next_size(4 << 20, Duration::ZERO), 8 << 20);
        assert_eq!(next_size(15 << 20, second / 100), PIECE_MOST);
        assert_eq!(next_size(PIECE_LEAST, second * 100), PIECE_LEAST);
        // The rest of a layer, and of a small one all of it.
        assert_eq!(next_size(1000, Duration::ZERO), PIECE_LEAST);
    }

    #[tokio::test(start_paused = true)]
    async fn background_work_is_no_faster_than_it_may_be() {
        let rate = Rate::new(1000);
        let begun = Instant::now();
        for _ in 0..4 {
            rate.pass(500).await;
        }
        // Whoever asks for the first bytes has not waited, and whoever came next has waited for those.
        assert_eq!(begun.elapsed(), Duration::from_millis(1500));
        sleep(Duration::from_secs(60)).await;
        let begun = Instant::now();
        rate.pass(1_000_000).await;
        assert_eq!(
            begun.elapsed(),
            Duration::ZERO,
            "a rest is not made up for, and begins no new one"
        );
        let free = Rate::new(0);
        let begun = Instant::now();
        free.pass(u64::MAX).await;
        free.pass(u64::MAX).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
