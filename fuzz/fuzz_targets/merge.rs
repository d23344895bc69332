//! Any tars, with checksums and lengths of records made right, as a chain of layers, and any index as one of them. What merges keeps to its layers: nothing is left of whiteouts, every
//! file lies in the data space of one layer, and a merged chain merges to itself.

#![no_main]

use lazuli::layer::merge::{Merged, merge};
use lazuli::layer::variant::on_top_of;
use lazuli::layer::{Access, Codec, LayerIndex, TarIndexer};
use libfuzzer_sys::fuzz_target;

#[path = "../repair.rs"]
mod repair;

#[path = "../sealed.rs"]
#[allow(dead_code)]
mod sealed;

/// What ends a layer in the input: no tar needs it.
const SEPARATOR: &[u8] = b"\xffLAYER\xff";
/// Bytes of memory that names and attributes of a layer may take: far more than 64 KiB of tar make.
const MEMORY: u64 = 32 << 20;

/// One layer: an index whose magic number and checksum are made right, or a tar.
fn layer(bytes: &[u8]) -> Option<LayerIndex> {
    if let Some(rest) = bytes.strip_prefix(b"I") {
        return LayerIndex::decode(&sealed::index(rest)).ok();
    }
    let mut tar = bytes.to_vec();
    repair::tar(&mut tar);
    let mut indexer = TarIndexer::with_memory(MEMORY);
    indexer.push(&tar).ok()?;
    let layout = indexer.finish().ok()?;
    layout.into_index(Access::Stream, Codec::None, Vec::new(), 0).ok()
}

fn check(layers: &[&LayerIndex], merged: &Merged) {
    let index = &merged.index;
    assert_eq!(merged.devices.len(), layers.len());
    let mut starts = vec![0];
    for (device, layer) in merged.devices.iter().zip(layers) {
        assert_eq!(*device, layer.data_size());
        starts.push(starts[starts.len() - 1] + device.next_multiple_of(512));
    }
    assert_eq!(starts.last(), Some(&index.data_size()));
    for inode in index.inodes() {
        assert!(!inode.is_whiteout() && inode.flags == 0);
        assert_eq!(index.xattr(inode, b"trusted.overlay.opaque"), None);
        if inode.is_reg() && inode.size > 0 {
            let at = starts.partition_point(|start| *start <= inode.data) - 1;
            assert!(inode.data + inode.size <= starts[at] + merged.devices[at]);
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut chain: Vec<LayerIndex> = Vec::new();
    let mut rest = bytes;
    loop {
        let end = rest.windows(SEPARATOR.len()).position(|window| window == SEPARATOR);
        if let Some(layer) = layer(&rest[..end.unwrap_or(rest.len())]) {
            let below: Vec<_> = chain.iter().rev().map(Some).collect();
            let looks = on_top_of(&layer, &below).ok().flatten();
            chain.push(looks.unwrap_or(layer));
        }
        let Some(end) = end else { break };
        rest = &rest[end + SEPARATOR.len()..];
    }
    let layers: Vec<_> = chain.iter().collect();
    let Ok(merged) = merge(&layers, None) else { return };
    check(&layers, &merged);
    assert_eq!(LayerIndex::decode(&merged.index.encode()).as_ref(), Ok(&merged.index));
    assert_eq!(
        merge(&[&merged.index], None).map(|again| again.index).as_ref(),
        Ok(&merged.index)
    );
    // In two runs it is the same tree.
    let (low, high) = layers.split_at(layers.len() / 2);
    if let Ok(low) = merge(low, None)
        && let Ok(high) = merge(high, Some(&low.index))
        && let Ok(stacked) = merge(&[&low.index, &high.index], None)
    {
        assert_eq!(stacked.index.inodes().len(), merged.index.inodes().len());
        assert_eq!(stacked.index.parts().dirents.len(), merged.index.parts().dirents.len());
    }
});
