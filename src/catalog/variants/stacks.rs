//! What layers of an image look like on each other, computed once for a pull, and what such stacks are known by.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::layer::variant::on_top_of;
use crate::layer::{Digest, LayerError, LayerIndex};

/// Tells the digest of a stack from digests of other things.
const STACK_DOMAIN: &[u8] = b"lazuli stack\0";
/// Images of which is kept what their lower layers look like, while they are pulled ...
const MAX_STACKS: usize = 16;
/// ... bytes of memory for it ...
const MAX_STACKS_MEMORY: u64 = 32 << 20;
/// ... and how long: longer than the next layer of an image that is being pulled takes.
const STACK_KEPT: Duration = Duration::from_secs(60);

/// For every layer, from the lowest up: its index on those below it, if that is another one. Nothing is known of layers that are `None`. For
/// those at the beginning `changed` has the answer already.
pub(super) fn stack(
    changed: &mut Vec<Option<Arc<LayerIndex>>>,
    layers: &[Option<&LayerIndex>],
) -> Result<(), LayerError> {
    for layer in layers.iter().skip(changed.len()) {
        let below: Vec<_> = changed
            .iter()
            .zip(layers)
            .map(|(changed, own)| changed.as_deref().or(*own))
            .rev()
            .collect();
        let on_those = layer.map(|index| on_top_of(index, &below)).transpose()?;
        changed.push(on_those.flatten().map(Arc::new));
    }
    Ok(())
}

/// What was computed for the lower layers of images that are being pulled. containerd asks for one layer after the other, and each needs all
/// below it.
pub(super) struct Stacks<T>(Mutex<Vec<Stack<T>>>);

/// The lower layers of one image.
struct Stack<T> {
    /// From the lowest up; `None`: not served here. They are not kept alive, but told from others that come later.
    layers: Vec<Option<Weak<T>>>,
    changed: Vec<Option<Arc<LayerIndex>>>,
    used: Instant,
}

impl<T> Stack<T> {
    /// How many layers are the same, from the lowest up.
    fn in_common(&self, layers: &[Option<Arc<T>>]) -> usize {
        let same = |(known, layer): (&Option<Weak<T>>, &Option<Arc<T>>)| match (known, layer) {
            (Some(known), Some(layer)) => std::ptr::eq(known.as_ptr(), Arc::as_ptr(layer)),
            (None, None) => true,
            _ => false,
        };
        let common = self.layers.iter().zip(layers).take_while(|pair| same(*pair));
        common.count().min(self.changed.len())
    }

    /// Bytes of memory.
    fn memory(&self) -> u64 {
        self.changed.iter().flatten().map(|index| index.memory()).sum()
    }
}

impl<T> Stacks<T> {
    /// Nothing is known.
    pub(super) fn new() -> Self {
        Stacks(Mutex::default())
    }

    /// For each of `layers`, from the lowest up, its index on those below it, if it looks different there. `last` says that nothing comes on
    /// top of them.
    pub(super) fn changed(
        &self,
        layers: &[Option<Arc<T>>],
        indexes: &[Option<&LayerIndex>],
        last: bool,
    ) -> Result<Vec<Option<Arc<LayerIndex>>>, LayerError> {
        let mut changed = self.known(layers);
        stack(&mut changed, indexes)?;
        if !last {
            self.keep(Stack {
                layers: layers.iter().map(|layer| layer.as_ref().map(Arc::downgrade)).collect(),
                changed: changed.clone(),
                used: Instant::now(),
            });
        }
        Ok(changed)
    }

    /// What is known of the lowest layers. It is taken out: whoever goes on puts it back, with more.
    fn known(&self, layers: &[Option<Arc<T>>]) -> Vec<Option<Arc<LayerIndex>>> {
        let mut stacks = self.lock();
        stacks.retain(|stack| stack.used.elapsed() < STACK_KEPT);
        let best = (0..stacks.len()).max_by_key(|&at| stacks[at].in_common(layers));
        let Some((at, common)) = best.map(|at| (at, stacks[at].in_common(layers))) else {
            return Vec::new();
        };
        let mut changed = match common == stacks[at].layers.len() {
            true => stacks.swap_remove(at).changed,
            // Another image on the same base.
            false => stacks[at].changed.clone(),
        };
        changed.truncate(common);
        changed
    }

    fn keep(&self, stack: Stack<T>) {
        let mut stacks = self.lock();
        stacks.push(stack);
        while stacks.len() > MAX_STACKS || stacks.iter().map(Stack::memory).sum::<u64>() > MAX_STACKS_MEMORY {
            let oldest = (0..stacks.len()).min_by_key(|&at| stacks[at].used);
            let Some(oldest) = oldest else { return };
            stacks.swap_remove(oldest);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Stack<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Digests of the stacks of the first layers, for each number of them.
pub(super) fn stacks(bases: &[Option<Digest>]) -> Vec<Digest> {
    let mut below = Digest::of(STACK_DOMAIN);
    let stack = |base: &Option<Digest>| {
        let layer = base.as_ref().map(|base| base.as_bytes().as_slice()).unwrap_or_default();
        below = Digest::of(&[STACK_DOMAIN, below.as_bytes(), layer].concat());
        below
    };
    bases.iter().map(stack).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{Access, Codec, TarIndexer};

    /// The index of a tar of one file.
    fn index_of(path: &str) -> Arc<LayerIndex> {
        let mut header = [0; 512];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[156] = if path.ends_with('/') { b'5' } else { b'0' };
        header[100..108].copy_from_slice(b"0000700\0");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let mut indexer = TarIndexer::new();
        indexer.push(&header).unwrap();
        let layout = indexer.finish().unwrap();
        Arc::new(layout.into_index(Access::Stream, Codec::None, Vec::new(), 0).unwrap())
    }

    #[test]
    fn what_lies_below_is_computed_once_for_a_pull() {
        let stacks = Stacks::new();
        let layers: Vec<_> = [index_of("d/")]
            .into_iter()
            .chain((0..10).map(|i| index_of(&format!("d/{i}"))))
            .map(Some)
            .collect();
        let topmost = |layers: &[Option<Arc<LayerIndex>>], last| {
            let indexes: Vec<_> = layers.iter().map(|layer| layer.as_deref()).collect();
            let mut changed = stacks.changed(layers, &indexes, last).unwrap();
            changed.pop().flatten()
        };
        let mode = |index: &LayerIndex| index.inode(index.lookup_path(b"d").unwrap()).unwrap().mode & 0o777;
        let mut before: Vec<Option<Arc<LayerIndex>>> = vec![topmost(&layers[..1], false)];
        for len in 2..=layers.len() {
            before.push(topmost(&layers[..len], false));
            assert_eq!(mode(before[len - 1].as_ref().unwrap()), 0o700);
            // One stack, which has grown; nothing below was made again.
            let kept = stacks.lock();
            assert_eq!((kept.len(), kept[0].changed.len()), (1, len));
            let same = |(a, b): (&Option<Arc<LayerIndex>>, &Option<Arc<LayerIndex>>)| match (a, b) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (a, b) => a.is_none() && b.is_none(),
            };
            assert!(kept[0].changed.iter().zip(&before).all(same), "{len}");
        }
        // Another image on five of them has its own, and what is the last layer of an image is the end of it.
        let other: Vec<_> = layers[..5].iter().cloned().chain([Some(index_of("d/other"))]).collect();
        let looks = topmost(&other, false).unwrap();
        assert_eq!(mode(&looks), 0o700);
        assert!(Arc::ptr_eq(
            stacks.lock()[1].changed[4].as_ref().unwrap(),
            before[4].as_ref().unwrap()
        ));
        let again = topmost(&other, true).unwrap();
        assert!(Arc::ptr_eq(&again, &looks));
        assert_eq!(stacks.lock().len(), 1);
        // An equal layer that is another one is not taken for it.
        let mut reloaded = layers.clone();
        reloaded[0] = Some(index_of("d/"));
        let looks = topmost(&reloaded, true).unwrap();
        assert!(!Arc::ptr_eq(&looks, before[10].as_ref().unwrap()));
        assert_eq!(*looks, **before[10].as_ref().unwrap());
    }
}
