//! Random archives, cut at random places and damaged at random bytes.

use proptest::prelude::*;

use super::sparse::{extension, gnu_sparse, holey};
use crate::layer::testing::{Tar, layout, seal};
use crate::layer::{Access, Codec, TarIndexer};

/// Names for random tars, so few that they meet.
const NAMES: [&str; 16] = [
    "a",
    "b",
    "c",
    "a/a",
    "a/b",
    "b/a",
    "a/b/a",
    "b/a/c",
    "c/c",
    ".wh.a",
    ".wh.b",
    "a/.wh..wh..opq",
    "b/.wh.a",
    "./../a",
    "a/b/",
    ".",
];

/// Entries of a random tar.
fn random_tar() -> impl Strategy<Value = Vec<u8>> {
    let name = || prop::sample::select(&NAMES[..]);
    let content = (any::<u8>(), 0..1200usize).prop_map(|(byte, len)| vec![byte; len]);
    let entry = (0..9u8, name(), name(), content);
    proptest::collection::vec(entry, 0..20).prop_map(|entries| {
        let mut tar = Tar::default();
        for (what, name, other, content) in entries {
            match what {
                0 => tar.dir(name, 0o750),
                1 => tar.symlink(name, other),
                2 => tar.hardlink(name, other),
                3 => tar.pax(&[("path", other.as_bytes()), ("SCHILY.xattr.user.a", name.as_bytes())]),
                4 => tar.extended(b'L', other.as_bytes()),
                5 => {
                    let (map, stored, _) = holey(&[(3, 700), (2000, 1 + content.len() as u64)], 4000);
                    let size = stored.len() as u64;
                    tar.block(&gnu_sparse(name.as_bytes(), size, 4000, &map, true));
                    tar.block(&extension(&[], false)).content(&stored)
                }
                _ => tar.file(name, &content),
            };
        }
        tar.end().0.clone()
    })
}

proptest! {
    #[test]
    fn the_cuts_make_no_difference(tar in random_tar(), cuts in proptest::collection::vec(1..2000usize, 0..40)) {
        let whole = layout(&tar);
        let mut indexer = TarIndexer::new();
        let (mut rest, mut result) = (&tar[..], Ok(()));
        for cut in cuts.into_iter().chain([usize::MAX]) {
            let (piece, more) = rest.split_at(cut.min(rest.len()));
            result = result.and(indexer.push(piece));
            rest = more;
        }
        let pieces = result.and_then(|()| indexer.finish());
        prop_assert_eq!(&whole, &pieces);
        if let Ok(layout) = whole {
            // `LayerIndex::new` checks that the tree holds together.
            prop_assert!(layout.into_index(Access::Stream, Codec::None, Vec::new(), 0).is_ok());
        }
    }

    #[test]
    fn every_byte_may_be_wrong(tar in random_tar(), changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut tar = tar;
        for (at, byte) in changes {
            let at = at.index(tar.len());
            tar[at] = byte;
            // Otherwise most changes would stop at the checksum.
            let header = at / 512 * 512;
            let block = tar[header..].first_chunk_mut::<512>();
            if let Some(block) = block.filter(|block| &block[257..262] == b"ustar") {
                seal(block);
            }
        }
        if let Ok(layout) = layout(&tar) {
            prop_assert!(layout.into_index(Access::Stream, Codec::None, Vec::new(), 0).is_ok());
        }
    }
}
