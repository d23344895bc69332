//! The budget: how many bytes the cache takes, and what goes when there is no room.
//!
//! Every byte is reserved before it is written, so that the limit holds whatever happens at once; the count starts from the blocks that
//! are really allocated and is set right by them whenever something is evicted. `min_free` is asked of the file system each time.
//!
//! In this order, until there is room: layers that no container uses, least recently used first (those that nobody has open vanish, of
//! the others the index stays); then the least recently used groups of chunks of layers in use that can be fetched in ranges; then, as
//! the last resort, streamed layers in use as a whole, but never the one that is being written: a miss in such a layer downloads
//! all of it again, so it is cheaper to serve others past the disk, and dropping is only for when not even that would go on. Layers whose
//! files are held (hold.rs) count, but never go.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Cache, CacheError, CachedLayer};
use crate::layer::{Access, Digest};

/// More than what is needed is freed at once, by this part of `max_size`, so that the next store does not have to evict again.
const SLACK_PART: u64 = 32;
/// How long it is not told again that the budget cannot be met: it comes up with every chunk.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// Longest wait for evicted files to be deleted when the disk is full.
const FULL_PATIENCE: Duration = Duration::from_secs(5);
/// Most that is freed beyond what is needed, in bytes.
const MAX_SLACK: u64 = 256 << 20;

impl Cache {
    /// Counts `bytes` as taken, after evicting others if need be. `writer` is the layer that they are for.
    ///
    /// # Errors
    /// The limit that stands in the way; nothing is counted then.
    pub(super) fn reserve(&self, bytes: u64, writer: Option<&Digest>) -> Result<(), String> {
        let Some((missing, _)) = self.take(bytes) else {
            return Ok(());
        };
        self.make_room(missing, writer);
        self.take(bytes).map_or(Ok(()), |(_, reason)| Err(reason))
    }

    /// Counts `bytes` as taken if there is room for them; otherwise tells how many bytes of room are missing, and which limit is reached.
    fn take(&self, bytes: u64) -> Option<(u64, String)> {
        let max = self.config.max_size;
        let limit = if max.0 == 0 { u64::MAX } else { max.0 };
        let take = |used: u64| used.checked_add(bytes).filter(|used| *used <= limit);
        if let Err(used) = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            let reason = format!("the cache's limit of {max} is reached (cache.max_size)");
            return Some((used.saturating_add(bytes).saturating_sub(limit), reason));
        }
        let short = self.shortfall(bytes);
        match short {
            Some(_) => self.release(bytes),
            None => self.show_use(),
        }
        short
    }

    /// Counts `bytes` as taken.
    pub(super) fn occupy(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        self.show_use();
    }

    /// Counts `bytes` as free again.
    pub(super) fn release(&self, bytes: u64) {
        let free = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free);
        self.show_use();
    }

    /// Bytes of the disk that the cache takes, with those that are about to be written.
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn show_use(&self) {
        let used = i64::try_from(self.used_bytes()).unwrap_or(i64::MAX);
        self.metrics().cache_bytes.set(used);
    }

    /// How many bytes too few are free on the disk if `more` are written.
    fn shortfall(&self, more: u64) -> Option<(u64, String)> {
        let min_free = self.config.min_free;
        let stat = rustix::fs::fstatvfs(&self.lock).ok()?;
        // What is being deleted is as good as free: who needs the room does not wait for it, unless the disk is full.
        let available = stat
            .f_bavail
            .saturating_mul(stat.f_frsize)
            .saturating_add(self.trash.bytes());
        let short = min_free.0.saturating_add(more).saturating_sub(available);
        (short > 0).then(|| {
            let reason =
                format!("only {available} bytes are free on the disk, and {min_free} shall stay free (cache.min_free)");
            (short, reason)
        })
    }

    /// Makes room on a disk that is full: evicts until about `bytes` are freed, and waits until they are.
    pub(super) fn make_room_now(&self, bytes: u64, writer: Option<&Digest>) {
        if self.trash.bytes() < bytes {
            self.make_room(bytes, writer);
        }
        if self.trash.bytes() > 0 {
            self.trash.empty(FULL_PATIENCE);
        }
    }

    /// Evicts until about `bytes` are freed.
    pub(super) fn make_room(&self, bytes: u64, writer: Option<&Digest>) {
        // One at a time: others that wait here will mostly find that there is room.
        let before = self.freed.load(Ordering::Relaxed);
        let _one = self.evicting.lock().unwrap_or_else(PoisonError::into_inner);
        let meanwhile = self.freed.load(Ordering::Relaxed).wrapping_sub(before);
        if meanwhile >= bytes {
            return;
        }
        let slack = (self.config.max_size.0 / SLACK_PART).min(MAX_SLACK);
        let mut need = bytes.saturating_add(slack);
        let mut freed = 0;
        let mut free = |bytes: u64| {
            freed += bytes;
            need = need.saturating_sub(bytes);
            need > 0
        };
        if self.evict_unused(writer, &mut free) && self.evict_groups(&mut free) {
            self.evict_streamed(writer, &mut free);
        }
        if freed < bytes {
            self.tell_held(bytes - freed);
        }
        if freed > 0 {
            self.freed.fetch_add(freed, Ordering::Relaxed);
            self.metrics().cache_evicted_bytes_total.inc_by(freed);
            tracing::debug!(freed, used = self.used_bytes(), "evicted from the cache");
        }
    }

    /// Layers that no container uses. Whether more has to be freed, as all of these.
    fn evict_unused(&self, writer: Option<&Digest>, free: &mut impl FnMut(u64) -> bool) -> bool {
        let candidates: Vec<Digest> = self.known().iter().rev().map(|(digest, _)| *digest).collect();
        for digest in candidates.iter().filter(|digest| Some(*digest) != writer) {
            let open = {
                let mut known = self.known();
                match known.peek(digest).map(|entry| entry.open.upgrade()) {
                    None => continue,
                    Some(None) => {
                        // Moved away under the lock, so that nobody opens it any more.
                        let bytes = known.pop(digest).map_or(0, |e| e.allocated.load(Ordering::Relaxed));
                        self.discard(digest, bytes);
                        drop(known);
                        if !free(bytes) {
                            return false;
                        }
                        continue;
                    }
                    Some(Some(open)) => open,
                }
            };
            if !open.is_pinned() && !open.is_held() && open.present_bytes() > 0 && !free(open.evict_all()) {
                return false;
            }
        }
        true
    }

    /// Groups of chunks of layers in use.
    fn evict_groups(&self, free: &mut impl FnMut(u64) -> bool) -> bool {
        let mut groups: Vec<(bool, u64, usize, u64)> = Vec::new();
        let layers = self.open_layers(Access::Ranges);
        for (at, layer) in layers.iter().enumerate() {
            // Those that were mounted last: they go as a whole, and while they still are, that frees nothing.
            let exposed = layer.is_exposed();
            let used = layer.groups().into_iter();
            groups.extend(used.map(|(used, group)| (exposed, used, at, group)));
        }
        groups.sort_unstable();
        groups
            .iter()
            .all(|(_, _, at, group)| free(layers[*at].evict_group(*group)))
    }

    /// Streamed layers in use.
    fn evict_streamed(&self, writer: Option<&Digest>, free: &mut impl FnMut(u64) -> bool) -> bool {
        let mut layers = self.open_layers(Access::Stream);
        layers.retain(|layer| Some(layer.digest()) != writer && layer.present_bytes() > 0);
        layers.sort_by_cached_key(|layer| (layer.is_exposed(), layer.last_used()));
        layers.iter().all(|layer| free(layer.evict_all()))
    }

    /// Layers that somebody has open, without those that are held.
    fn open_layers(&self, access: Access) -> Vec<Arc<CachedLayer>> {
        let known = self.known();
        let open = known.iter().filter_map(|(_, entry)| entry.open.upgrade());
        open.filter(|layer| layer.index().access() == access && !layer.is_held())
            .collect()
    }

    /// Bytes on disk that cannot be evicted because their files are mounted.
    pub fn held_bytes(&self) -> u64 {
        let known = self.known();
        let open = known.iter().filter_map(|(_, entry)| entry.open.upgrade());
        open.filter(|layer| layer.is_held())
            .map(|layer| layer.allocated_bytes())
            .sum()
    }

    /// Logs, not too often, that there is no room because of what is mounted.
    fn tell_held(&self, missing: u64) {
        let held = self.held_bytes();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if held > 0 && told.is_none_or(|told| told.elapsed() > TELL_AGAIN) {
            *told = Some(Instant::now());
            tracing::warn!(
                held,
                missing,
                used = self.used_bytes(),
                "the cache's budget cannot be met: complete layers of running containers are mounted from their files; \
                 what finds no room is served without being kept"
            );
        }
    }
}

/// The error for bytes that found no room.
pub(super) fn full(layer: &Digest, bytes: u64, reason: String) -> CacheError {
    CacheError::Full {
        layer: *layer,
        bytes,
        reason,
    }
}
