//! Who uses a layer: what goes last when there is no room.
//!
//! A layer is *pinned* while a guard says that it is used. A guard may be *idle* from some moment on: it stays, so that the layer is live
//! as before, but nothing refers to the layer any more, and its bytes go as those of layers that nobody has. They are fetched again if
//! somebody comes back.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::CachedLayer;
use crate::sync::primitives::Mutex;

/// How long a layer that nobody has pinned yet is left alone by the marks: it has just been made, and its pull is about to pin it.
const SETTLE: Duration = Duration::from_secs(60);

/// The guards of one layer.
pub(super) struct Pins {
    opened: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    /// From when on each guard is idle.
    idle_from: BTreeMap<u64, Option<Instant>>,
}

impl Pins {
    pub fn new() -> Self {
        Pins {
            opened: Instant::now(),
            state: Mutex::default(),
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_pinned(&self, now: Instant) -> bool {
        self.change(|state| state.idle_from.values().any(|from| from.is_none_or(|from| from > now)))
    }

    /// Whether somebody has pinned it, or has had the time for it.
    fn is_settled(&self, now: Instant) -> bool {
        self.change(|state| state.next > 0) || now.duration_since(self.opened) > SETTLE
    }
}

impl CachedLayer {
    /// Marks the layer as used by a container for as long as the guard lives: it is evicted after those that are not.
    pub fn pin(self: &Arc<Self>) -> InUse {
        let id = self.pins.change(|state| {
            let id = state.next;
            state.next += 1;
            state.idle_from.insert(id, None);
            id
        });
        InUse {
            layer: Arc::clone(self),
            id,
        }
    }

    /// Whether a container uses the layer.
    pub fn is_pinned(&self) -> bool {
        self.pins.is_pinned(Instant::now())
    }

    /// Whether the marks may take its bytes.
    pub(super) fn gives_way(&self) -> bool {
        let now = Instant::now();
        self.pins.is_settled(now) && !self.pins.is_pinned(now)
    }
}

/// A layer in use: see [`CachedLayer::pin`].
pub struct InUse {
    layer: Arc<CachedLayer>,
    id: u64,
}

impl InUse {
    /// Tells that nothing refers to the layer from `when` on: unless [`InUse::wanted`] is called, its bytes give way from then on.
    pub fn idle_from(&self, when: Instant) {
        let before = self
            .layer
            .pins
            .change(|state| state.idle_from.insert(self.id, Some(when)));
        if before == Some(None) {
            self.layer.cache.wake();
        }
    }

    /// Tells that the layer is used.
    pub fn wanted(&self) {
        self.layer.pins.change(|state| state.idle_from.insert(self.id, None));
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let last = self.layer.pins.change(|state| {
            state.idle_from.remove(&self.id);
            state.idle_from.is_empty()
        });
        if last {
            self.layer.cache.used_now(&self.layer.digest);
            self.layer.cache.wake();
        }
    }
}
