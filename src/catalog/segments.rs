//! Where the chains of this node are cut into segments.
//!
//! Pages of a file that the kernel caches belong to the mount that it was read through. If the layers of each image were merged into one image
//! of their own, eight images on one base would cache the base eight times. So a chain is shown as a few *segments*: runs of layers between
//! the points where chains of this node branch. Chains with the same beginning have the same segments there, and mount them together.
//!
//! Each segment more is a directory more in which overlayfs looks for names; so what is hardly worth sharing is not cut off: a segment of less
//! than [`MIN_BYTES`] goes with the one above it, and there are at most [`MAX_SEGMENTS`]. The same chains always give the same cuts.

use std::ops::Range;

use crate::layer::Digest;

/// Most segments of a chain: what is looked up in vain costs a look into each.
pub(super) const MAX_SEGMENTS: usize = 6;
/// Fewest bytes (of files, unpacked) of a segment that others share: less is cached twice rather than looked through by each look-up.
pub(super) const MIN_BYTES: u64 = 1 << 20;

/// The segments of `chain`, the lowest layer first, on a node with the chains `others` (it may be among them); `bytes` tells how large the
/// layers are.
pub(super) fn plan<'a>(
    chain: &[Digest],
    others: impl Iterator<Item = &'a [Digest]>,
    bytes: impl Fn(&Digest) -> u64,
) -> Vec<Range<usize>> {
    let mut cuts: Vec<usize> = others
        .map(|other| common(chain, other))
        .filter(|cut| (1..chain.len()).contains(cut))
        .collect();
    cuts.extend([0, chain.len()]);
    cuts.sort_unstable();
    cuts.dedup();
    let mut segments: Vec<(Range<usize>, u64)> = cuts
        .windows(2)
        .map(|pair| (pair[0]..pair[1], chain[pair[0]..pair[1]].iter().map(&bytes).sum()))
        .collect();
    // The topmost is shared with nobody, or has nothing above it that it could go with.
    while let Some((at, (_, least))) = segments
        .split_last()
        .and_then(|(_, below)| below.iter().enumerate().min_by_key(|(_, (_, bytes))| *bytes))
    {
        if *least >= MIN_BYTES && segments.len() <= MAX_SEGMENTS {
            break;
        }
        let (layers, bytes) = segments.remove(at);
        let above = &mut segments[at];
        above.0.start = layers.start;
        above.1 += bytes;
    }
    segments.into_iter().map(|(layers, _)| layers).collect()
}

/// How many layers two chains have in common at their beginnings.
pub(super) fn common(a: &[Digest], b: &[Digest]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chain(text: &str) -> Vec<Digest> {
        text.chars().map(|c| Digest::of(c.to_string().as_bytes())).collect()
    }

    /// Segments of the first, as texts; every layer is large.
    fn cut(chains: &[&str]) -> Vec<String> {
        let all: Vec<_> = chains.iter().map(|text| chain(text)).collect();
        let segments = plan(&all[0], all.iter().map(Vec::as_slice), |_| MIN_BYTES);
        segments.into_iter().map(|at| chains[0][at].to_owned()).collect()
    }

    #[test]
    fn chains_are_cut_where_they_branch() {
        assert_eq!(cut(&["abcd"]), ["abcd"]);
        assert_eq!(cut(&["abcd", "xyz"]), ["abcd"]);
        assert_eq!(cut(&["abcd", "abxy"]), ["ab", "cd"]);
        // What ends where another goes on is its base.
        assert_eq!(cut(&["abcd", "ab"]), ["ab", "cd"]);
        assert_eq!(cut(&["ab", "abcd"]), ["ab"]);
        assert_eq!(cut(&["abcd", "ab", "abx", "abcy", "bcd"]), ["ab", "c", "d"]);
    }

    #[test]
    fn what_is_not_worth_it_is_not_cut_off() {
        let all = [chain("abcd"), chain("a"), chain("ab")];
        let large = chain("ad");
        let bytes = |layer: &Digest| if large.contains(layer) { MIN_BYTES } else { 1 };
        let segments = plan(&all[0], all.iter().map(Vec::as_slice), bytes);
        assert_eq!(segments, [0..1, 1..4]);
        let segments = plan(&all[0], all.iter().map(Vec::as_slice), |_| 1);
        assert_eq!((segments.len(), segments[0].clone()), (1, 0..4));
    }

    proptest! {
        #[test]
        fn plans_hold_together(
            all in prop::collection::vec("[ab]{1,12}", 1..20),
            sizes in prop::collection::vec(0..3 * MIN_BYTES, 2),
        ) {
            // Layers of one chain differ: a letter is another one at each place after another beginning.
            let chains: Vec<Vec<Digest>> = all
                .iter()
                .map(|text| (1..=text.len()).map(|end| Digest::of(&text.as_bytes()[..end])).collect())
                .collect();
            let bytes = |layer: &Digest| sizes[usize::from(layer.as_bytes()[0] % 2)];
            for chain in &chains {
                let segments = plan(chain, chains.iter().map(Vec::as_slice), bytes);
                prop_assert!(segments.len() <= MAX_SEGMENTS);
                let ends: Vec<usize> = segments.iter().map(|at| at.end).collect();
                let starts: Vec<usize> = segments.iter().map(|at| at.start).collect();
                prop_assert_eq!(starts[0], 0);
                prop_assert_eq!(&starts[1..], &ends[..ends.len() - 1]);
                prop_assert_eq!(ends[ends.len() - 1], chain.len());
                for (at, segment) in segments.iter().enumerate() {
                    prop_assert!(!segment.is_empty());
                    // Each cut is a place where some chain branches, and cuts off enough.
                    let last = at + 1 == segments.len();
                    prop_assert!(last || chains.iter().any(|other| common(chain, other) == segment.end));
                    let sum: u64 = chain[segment.clone()].iter().map(bytes).sum();
                    prop_assert!(last || sum >= MIN_BYTES);
                }
                prop_assert_eq!(&plan(chain, chains.iter().rev().map(Vec::as_slice), bytes), &segments);
            }
        }
    }
}
