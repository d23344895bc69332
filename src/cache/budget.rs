//! The budget: how many bytes the cache takes, and what goes when there is no room.
//!
//! Every byte is reserved before it is written, so that the limit holds whatever happens at once; the count starts from the blocks that
//! are really allocated and is set right by them whenever something is evicted. `min_free` is asked of the file system each time.
//!
//! In this order, until there is room: layers that no container uses, least recently used first (those that nobody has open vanish, of
//! the others the index stays); then the least recently used groups of chunks of layers in use that can be fetched in ranges. Streamed
//! layers in use never go: a miss in one downloads all of it again, and needs the disk for that, so two of them that do not fit would take
//! turns in downloading everything for every read. It is cheaper to serve ranges of others past the disk, and to leave a new layer that
//! has to be streamed and does not fit to containerd. Layers whose files are held (hold.rs) or still mounted count, but never go: that
//! would free nothing.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::marks::Fullness;
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
        if self.end_spools() > 0 && self.take(bytes).is_none() {
            return Ok(());
        }
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

    /// Counts `now` bytes in place of `before`.
    pub(super) fn settle(&self, before: u64, now: u64) {
        let change = |used: u64| Some(used.saturating_add(now).saturating_sub(before));
        let _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
        self.show_use();
    }

    /// Counts bytes that were freed by evictions.
    pub(super) fn count_evicted(&self, bytes: u64) {
        self.freed.fetch_add(bytes, Ordering::Relaxed);
        self.metrics().cache_evicted_bytes_total.inc_by(bytes);
    }

    /// Bytes of the disk that the cache takes, with those that are about to be written.
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes that can be written before anything gives way that is used, and before the disk is fuller than the low mark: room for what nobody
    /// waits for.
    pub fn spare_bytes(&self) -> u64 {
        let Some((room, on_disk)) = self.room() else { return 0 };
        let below_mark = match self.config.high_percent {
            100.. => u64::MAX,
            _ => {
                let available = on_disk.available.saturating_add(self.trash.bytes());
                available.saturating_sub(on_disk.free_at(self.config.low_percent))
            }
        };
        room.min(below_mark).saturating_add(self.unused_bytes())
    }

    /// Bytes that can be written before anything has to give way, however full the disk is: room for what goes again in a moment.
    pub(super) fn room_bytes(&self) -> u64 {
        self.room().map_or(0, |(room, _)| room)
    }

    /// Bytes within the limits that always hold, and how full the disk is.
    fn room(&self) -> Option<(u64, Fullness)> {
        let max = match self.config.max_size.0 {
            0 => u64::MAX,
            max => max,
        };
        let within_limit = max.saturating_sub(self.used_bytes());
        let stat = rustix::fs::fstatvfs(&self.lock).ok()?;
        let on_disk = Fullness::from(&stat);
        let available = on_disk.available.saturating_add(self.trash.bytes());
        Some((
            within_limit.min(available.saturating_sub(self.config.min_free.0)),
            on_disk,
        ))
    }

    /// Bytes of layers that no container uses.
    fn unused_bytes(&self) -> u64 {
        let known = self.known();
        let entries = known
            .iter()
            .map(|(_, entry)| (entry.open.upgrade(), entry.allocated.load(Ordering::Relaxed)));
        // Let go of after the list is: a layer that is dropped looks into it.
        let entries: Vec<_> = entries.collect();
        drop(known);
        let unused = entries
            .iter()
            .filter(|(open, _)| open.as_ref().is_none_or(|layer| !layer.is_pinned() && !layer.is_held()));
        unused.map(|(_, bytes)| bytes).sum()
    }

    fn show_use(&self) {
        let used = i64::try_from(self.used_bytes()).unwrap_or(i64::MAX);
        self.metrics().cache_bytes.set(used);
    }

    /// How many bytes too few are free on the disk if `more` are written.
    fn shortfall(&self, more: u64) -> Option<(u64, String)> {
        let min_free = self.config.min_free;
        let stat = rustix::fs::fstatvfs(&self.lock).ok()?;
        self.watch(&stat);
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
        if self.end_spools() >= bytes {
            return;
        }
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
        if self.keeps_all.load(Ordering::SeqCst) {
            return;
        }
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
        if self.evict_unused(writer, |layer| !layer.is_pinned(), &mut free) {
            self.evict_groups(&mut free);
        }
        if freed < bytes {
            self.tell_held(bytes - freed);
        }
        if freed > 0 {
            self.count_evicted(freed);
            tracing::debug!(freed, used = self.used_bytes(), "evicted from the cache");
        }
    }

    /// Layers that no container uses; of those that somebody has open, the ones that `may_go`. Whether more has to be freed, as all of these.
    pub(super) fn evict_unused(
        &self,
        writer: Option<&Digest>,
        may_go: impl Fn(&CachedLayer) -> bool,
        free: &mut impl FnMut(u64) -> bool,
    ) -> bool {
        let candidates: Vec<Digest> = self.known().iter().rev().map(|(digest, _)| *digest).collect();
        for digest in candidates.iter().filter(|digest| Some(*digest) != writer) {
            let open = {
                // Asked before the list is locked.
                let is_mounted = self.is_mounted(digest);
                let mut known = self.known();
                match known.peek(digest).map(|entry| entry.open.upgrade()) {
                    None => continue,
                    Some(None) if is_mounted => continue,
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
            if may_go(&open) && !open.is_held() && open.present_bytes() > 0 && !free(open.evict_all()) {
                return false;
            }
        }
        true
    }

    /// Groups of chunks of layers in use.
    fn evict_groups(&self, free: &mut impl FnMut(u64) -> bool) -> bool {
        let mut groups: Vec<(bool, u64, usize, u64)> = Vec::new();
        let layers = self.open_ranged();
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

    /// Layers that somebody has open and that can be fetched in ranges, without those whose files are mounted.
    fn open_ranged(&self) -> Vec<Arc<CachedLayer>> {
        let mut open = self.open_layers();
        open.retain(|layer| layer.index().access() == Access::Ranges && !layer.is_held() && !layer.is_mounted());
        open
    }

    /// Layers that somebody has open.
    pub(super) fn open_layers(&self) -> Vec<Arc<CachedLayer>> {
        let known = self.known();
        known.iter().filter_map(|(_, entry)| entry.open.upgrade()).collect()
    }

    /// Bytes on disk that cannot be evicted because their files are mounted.
    pub fn held_bytes(&self) -> u64 {
        let mounted = |layer: &Arc<CachedLayer>| layer.is_held() || layer.is_mounted();
        let layers = self.open_layers();
        let held: u64 = layers.iter().filter(|l| mounted(l)).map(|l| l.allocated_bytes()).sum();
        held + self.replaced_bytes()
    }

    /// Logs, not too often, that there is no room because of what is mounted.
    fn tell_held(&self, missing: u64) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_some_and(|told| told.elapsed() <= TELL_AGAIN) {
            return;
        }
        let held = self.held_bytes();
        if held > 0 {
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
