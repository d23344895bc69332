//! What the steps of a walk want to read, asked for together.
//!
//! Steps go side by side, and what they want lies side by side in the blob: modules of one package, descriptions of packages. Asked for one by one, each
//! would be a request of a few hundred bytes, since a request begins as soon as there is a place for it. So it is only asked for what is wanted
//! when no step is left that works: all others wait, and whatever can be known now is known.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::super::waves::{AtOnce, Waves};
use super::Walk;

/// Longest wait for steps that work: one may wait for another one's file. A small part of the time that a request takes.
const GATHER: Duration = Duration::from_millis(2);

/// What a step wants to read.
pub(super) struct Ask {
    layer: usize,
    /// Offset and length in the layer's data space.
    range: (u64, u64),
    /// Whether what is beside it may come with it.
    with_neighbours: bool,
    /// Is told when it is asked for.
    asked: oneshot::Sender<()>,
}

impl Ask {
    /// One for a range of a layer; and what is told when it is asked for.
    pub(super) fn new(layer: usize, range: (u64, u64), with_neighbours: bool) -> (Self, oneshot::Receiver<()>) {
        let (asked, told) = oneshot::channel();
        let ask = Ask {
            layer,
            range,
            with_neighbours,
            asked,
        };
        (ask, told)
    }
}

/// What was not asked for yet.
pub(super) struct Asks {
    coming: UnboundedReceiver<Ask>,
    gathered: Vec<Ask>,
    /// When they have to be asked for.
    late: Option<Instant>,
}

impl Asks {
    pub(super) fn new(coming: UnboundedReceiver<Ask>) -> Self {
        Asks {
            coming,
            gathered: Vec::new(),
            late: None,
        }
    }

    /// Takes what comes; ends when there may be something to do.
    pub(super) async fn gather(&mut self) {
        let late = self.late;
        let is_late = async {
            match late {
                Some(late) => tokio::time::sleep_until(late).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // The walk has the other end.
            Some(ask) = self.coming.recv() => {
                self.gathered.push(ask);
                self.begin();
            }
            () = is_late => {}
        }
    }

    /// Something waits from now on.
    pub(super) fn begin(&mut self) {
        self.late.get_or_insert_with(|| Instant::now() + GATHER);
    }

    /// Whether they have waited long enough.
    pub(super) fn are_late(&self) -> bool {
        self.late.is_some_and(|late| late <= Instant::now())
    }

    /// Asks for all of them, and for what of the waves is due; bytes that were not here.
    pub(super) fn ask(&mut self, walk: &Walk, waves: &mut Waves) -> u64 {
        while let Ok(ask) = self.coming.try_recv() {
            self.gathered.push(ask);
        }
        self.late = None;
        let mut by_layer: BTreeMap<usize, AtOnce> = BTreeMap::new();
        let mut asked = Vec::with_capacity(self.gathered.len());
        for ask in self.gathered.drain(..) {
            let Some(layer) = walk.layers.get(ask.layer) else {
                continue;
            };
            let of_layer = by_layer.entry(ask.layer).or_insert_with(|| AtOnce {
                layer: Arc::clone(layer),
                ranges: Vec::new(),
                guessed: Vec::new(),
            });
            match ask.with_neighbours {
                true => of_layer.guessed.push(ask.range),
                false => of_layer.ranges.push(ask.range),
            }
            asked.push(ask.asked);
        }
        let bytes = waves.go_on_with(by_layer.into_values().collect());
        for asked in asked {
            // A step that is gone waits no more.
            let _ = asked.send(());
        }
        bytes
    }
}

/// Counts the steps that wait for what they read.
#[derive(Default)]
pub(super) struct Waiting(Arc<AtomicUsize>);

/// A step that waits.
pub(super) struct Waits(Arc<AtomicUsize>);

impl Waiting {
    /// A step waits, until what is returned is dropped.
    pub(super) fn begin(&self) -> Waits {
        self.0.fetch_add(1, Ordering::Relaxed);
        Waits(Arc::clone(&self.0))
    }

    pub(super) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
