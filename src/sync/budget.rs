//! Memory that grows with what comes from outside, out of one budget: who needs some takes a share of it before, and waits if there is none.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::primitives::{AtomicU32, AtomicU64, Ordering};

/// Unit in which shares are counted, in bytes: a semaphore has no place for all bytes of a large machine.
const UNIT: u64 = 4096;

/// A number of bytes that holders of [`Share`]s may use together. Shares are given in the order in which they were asked for, so that a large
/// one is not starved by small ones.
#[derive(Debug)]
pub struct Budget {
    units: Arc<Semaphore>,
    total: AtomicU32,
    /// Units that are held. The semaphore does not tell: it counts those as gone that the first in the queue has collected.
    held: AtomicU64,
    waiting: AtomicU64,
}

/// A part of a [`Budget`]; dropped, it is given back.
#[derive(Debug)]
pub struct Share {
    permit: OwnedSemaphorePermit,
    budget: Arc<Budget>,
}

impl Budget {
    /// A budget of `bytes`, at least one unit of 4096.
    pub fn new(bytes: u64) -> Arc<Self> {
        let most = Semaphore::MAX_PERMITS.min(u32::MAX as usize) as u64;
        let total = (bytes / UNIT).clamp(1, most) as u32;
        Arc::new(Budget {
            units: Arc::new(Semaphore::new(total as usize)),
            total: AtomicU32::new(total),
            held: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
        })
    }

    /// Takes `bytes` out for good, as a budget of its own: who waits for the one never stands behind who waits for the other. Only what nobody
    /// holds can be taken out, and one unit stays.
    pub fn split_off(&self, bytes: u64) -> Arc<Self> {
        let units = self.units_of(bytes).min(self.total.load(Ordering::Relaxed) - 1);
        let taken = self.units.forget_permits(units as usize) as u32;
        self.total.fetch_sub(taken, Ordering::Relaxed);
        Budget::new(u64::from(taken) * UNIT)
    }

    /// Waits for `bytes`. More than the whole budget is taken as the whole of it: then nobody else holds any, and the caller's own limits
    /// say how much more it is. Dropping the future gives up the place in the queue.
    ///
    /// Who holds a share must not wait for another one, or all may wait for each other; [`Share::grow`] does not wait.
    pub async fn take(self: &Arc<Self>, bytes: u64) -> Share {
        let units = self.units_of(bytes);
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _leaving = Leaving(&self.waiting);
        let permit = Arc::clone(&self.units).acquire_many_owned(units).await;
        // The semaphore is never closed.
        self.share(permit.unwrap_or_else(|closed| unreachable!("{closed}")))
    }

    /// `bytes` if they are there now.
    pub fn try_take(self: &Arc<Self>, bytes: u64) -> Option<Share> {
        let permit = Arc::clone(&self.units)
            .try_acquire_many_owned(self.units_of(bytes))
            .ok()?;
        Some(self.share(permit))
    }

    fn share(self: &Arc<Self>, permit: OwnedSemaphorePermit) -> Share {
        self.held.fetch_add(permit.num_permits() as u64, Ordering::Relaxed);
        Share {
            permit,
            budget: Arc::clone(self),
        }
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        u64::from(self.total.load(Ordering::Relaxed)) * UNIT
    }

    /// Bytes that are held now.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed) * UNIT
    }

    /// How many wait for a share.
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    fn units_of(&self, bytes: u64) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT))
            .unwrap_or(u32::MAX)
            .min(self.total.load(Ordering::Relaxed))
    }
}

impl Share {
    /// Bytes of the share.
    pub fn bytes(&self) -> u64 {
        self.permit.num_permits() as u64 * UNIT
    }

    /// Makes the share at least `bytes` if there is room now; whether it is.
    pub fn grow(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.bytes());
        let Some(added) = self.more(more) else {
            return false;
        };
        self.budget
            .held
            .fetch_add(added.num_permits() as u64, Ordering::Relaxed);
        self.permit.merge(added);
        true
    }

    fn more(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        Arc::clone(&self.budget.units).try_acquire_many_owned(units).ok()
    }

    /// Gives back what is more than `bytes`.
    pub fn shrink(&mut self, bytes: u64) {
        let keep = usize::try_from(bytes.div_ceil(UNIT)).unwrap_or(usize::MAX);
        let more = self.permit.num_permits().saturating_sub(keep);
        self.budget.held.fetch_sub(more as u64, Ordering::Relaxed);
        drop(self.permit.split(more));
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget
            .held
            .fetch_sub(self.permit.num_permits() as u64, Ordering::Relaxed);
    }
}

struct Leaving<'a>(&'a AtomicU64);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[tokio::test]
    async fn shares_come_in_order_and_go_back() {
        let budget = Budget::new(10 * MIB);
        let held = budget.take(6 * MIB).await;
        let mut large = budget.take(8 * MIB).boxed();
        let mut small = budget.take(MIB).boxed();
        assert!(futures::poll!(&mut large).is_pending());
        assert!(futures::poll!(&mut small).is_pending(), "behind the large one");
        assert_eq!((budget.held(), budget.waiting()), (6 * MIB, 2));
        drop(held);
        let large = large.await;
        drop(small.await);
        drop(large);
        assert_eq!((budget.held(), budget.waiting()), (0, 0));
    }

    #[tokio::test]
    async fn more_than_all_is_all() {
        let budget = Budget::new(MIB);
        let mut share = budget.take(u64::MAX).await;
        assert_eq!(share.bytes(), MIB);
        assert!(budget.try_take(1).is_none());
        share.shrink(MIB / 2);
        assert_eq!(budget.held(), MIB / 2);
        assert!(share.grow(MIB) && !share.grow(2 * MIB));
    }

    #[tokio::test]
    async fn who_leaves_holds_nothing() {
        let budget = Budget::new(MIB);
        let held = budget.take(MIB).await;
        let mut leaves = budget.take(MIB).boxed();
        assert!(futures::poll!(&mut leaves).is_pending());
        drop(leaves);
        drop(held);
        assert_eq!((budget.held(), budget.waiting()), (0, 0));
    }

    #[tokio::test]
    async fn a_part_has_its_own_queue() {
        let budget = Budget::new(10 * MIB);
        let part = budget.split_off(4 * MIB);
        assert_eq!((budget.total(), part.total()), (6 * MIB, 4 * MIB));
        let all = budget.take(u64::MAX).await;
        assert_eq!(all.bytes(), 6 * MIB);
        assert!(budget.try_take(1).is_none());
        assert_eq!(part.take(u64::MAX).await.bytes(), 4 * MIB);
        drop(all);
        let rest = budget.split_off(u64::MAX);
        assert_eq!((budget.total(), rest.total()), (4096, 6 * MIB - 4096));
    }
}
