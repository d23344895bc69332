//! The marks: how full the disk may get before what nobody needs gives way.
//!
//! kubelet watches the same file system. When it is 85 percent full it removes images, and when less than 15 percent are free it evicts
//! pods; neither knows that most of what it sees may be bytes that are only kept in case somebody pulls an image again. So those go before:
//! when the file system is fuller than `cache.high_percent`, layers that no snapshot refers to give way, least recently used first, until
//! it is no fuller than `cache.low_percent`, or none is left. Layers in use are left to the limits of the budget (budget.rs).
//!
//! How full it is, is reckoned as kubelet does: bytes that are not available to everybody, of all bytes. What `df` calls used is less by what
//! is reserved for root.
//!
//! It is looked at in a thread of its own: every [`PERIOD`], and when something was stored or let go.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use std::{io, thread};

use rustix::fs::StatVfs;

use super::Cache;

/// Longest time between two looks: others fill the disk too, and kubelet looks at it every 10 seconds.
const PERIOD: Duration = Duration::from_secs(10);
/// Shortest time between two looks, so that a disk that stays full costs nothing.
const REST: Duration = Duration::from_secs(2);

/// How full a file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fullness {
    /// All its bytes.
    pub total: u64,
    /// Bytes that anybody may still write.
    pub available: u64,
}

impl From<&StatVfs> for Fullness {
    fn from(stat: &StatVfs) -> Self {
        Fullness {
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
            available: stat.f_bavail.saturating_mul(stat.f_frsize),
        }
    }
}

impl Fullness {
    /// Bytes by which it is fuller than `percent`.
    pub fn over(self, percent: u8) -> u64 {
        self.free_at(percent).saturating_sub(self.available)
    }

    /// Bytes that are available when it is `percent` full.
    pub fn free_at(self, percent: u8) -> u64 {
        let free = u128::from(self.total) * u128::from(100 - percent.min(100)) / 100;
        u64::try_from(free).unwrap_or(u64::MAX)
    }
}

impl Cache {
    /// Begins to look at the marks in the background. Before, everything that is referred to has to be pinned.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn tend(self: &Arc<Self>) -> io::Result<()> {
        let (bell, rung) = sync_channel(1);
        let me = Arc::downgrade(self);
        if self.bell.set(bell).is_err() {
            return Ok(());
        }
        let work = move || {
            while rung.recv_timeout(PERIOD) != Err(RecvTimeoutError::Disconnected) {
                let Some(cache) = me.upgrade() else { return };
                cache.tidy();
                drop(cache);
                thread::sleep(REST);
            }
        };
        thread::Builder::new().name("lazuli-cache".to_owned()).spawn(work)?;
        self.give_pages_back()?;
        self.wake();
        Ok(())
    }

    /// Has the marks looked at soon. Waits for nothing.
    pub(super) fn wake(&self) {
        if let Some(bell) = self.bell.get() {
            // One that has not been heard yet is enough.
            let _ = bell.try_send(());
        }
    }

    /// Looks whether the bytes that are about to be written bring the disk over the mark.
    pub(super) fn watch(&self, stat: &StatVfs) {
        if self.is_above_mark(stat.into()) {
            self.wake();
        }
    }

    /// A mark of 100 is never reached.
    fn is_above_mark(&self, fullness: Fullness) -> bool {
        let high = self.config.high_percent;
        high < 100 && fullness.over(high) > 0
    }

    /// Counts what is on disk, deletes what nobody has open any more, forgets names that nobody asks for, and lets layers that no snapshot
    /// refers to give way if the disk is fuller than the high mark. Returns the bytes of layers that were given back.
    pub fn tidy(&self) -> u64 {
        self.sweep();
        self.recount();
        self.forget_idle_names();
        let Ok(stat) = rustix::fs::fstatvfs(&self.lock) else {
            return 0;
        };
        let mut fullness = Fullness::from(&stat);
        // What is being deleted is as good as free: otherwise everything would have to go before the first of it is.
        fullness.available = fullness.available.saturating_add(self.trash.bytes());
        self.give_way(fullness)
    }

    /// Drops layers that no snapshot refers to if the disk is that full; the bytes that were given back.
    pub(super) fn give_way(&self, fullness: Fullness) -> u64 {
        if !self.is_above_mark(fullness) {
            return 0;
        }
        let mut need = fullness.over(self.config.low_percent);
        let mut freed = 0;
        let mut free = |bytes: u64| {
            freed += bytes;
            need = need.saturating_sub(bytes);
            need > 0
        };
        let one = self.evicting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.keeps_all.load(Ordering::SeqCst) {
            return 0;
        }
        self.evict_unused(None, |layer| layer.gives_way(), &mut free);
        drop(one);
        if freed > 0 {
            self.count_evicted(freed);
            tracing::info!(
                freed,
                used = self.used_bytes(),
                available = fullness.available,
                disk = fullness.total,
                "layers that no snapshot refers to gave way, as the disk is fuller than cache.high_percent"
            );
        }
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fullness_is_what_is_not_available() {
        let at = |available| Fullness { total: 1000, available };
        assert_eq!(at(140).over(85), 10, "86 percent");
        assert_eq!(at(140).over(80), 60);
        assert_eq!(at(200).over(80), 0, "at the mark is not over it");
        assert_eq!(at(0).over(100), 0);
        let large = Fullness {
            total: u64::MAX,
            available: 0,
        };
        assert_eq!(large.over(0), u64::MAX);
    }
}
