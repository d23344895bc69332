//! A layer that is read as a whole.

use std::time::Duration;

use super::fake::{Bench, FakeBlob, ranged};
use crate::fetch::LayerData;

const LONG: Duration = Duration::from_secs(60);
const FILE: usize = 100_000;
const FILES: usize = 400;

/// Reads these files one after the other; the requests that it took, and the bytes asked for because all seemed to be read.
async fn read(files: impl Iterator<Item = usize>) -> (usize, u64) {
    let (index, data, blob) = ranged(&[FILE; FILES]);
    let places: Vec<u64> = index.chunks().iter().map(|chunk| chunk.data_offset).collect();
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (_cached, layer) = bench.open("layer", index, &blob);
    for file in files {
        let at = places[file];
        let mut buf = vec![0; FILE];
        // As the file system asks: what is here is read at once.
        if layer.read_ready(at, &mut buf).is_none() {
            buf = layer.read(at, FILE as u32, LONG).await.unwrap().into();
        }
        assert_eq!(buf, data[at as usize..][..FILE]);
    }
    while !layer.queue().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    (blob.requests(), bench.metrics.dense_bytes_total.get())
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_reads_all_of_a_layer_asks_for_it_a_few_times() {
    // Backwards: nothing follows what was read before.
    let (requests, dense) = read((0..FILES).rev()).await;
    assert!(requests < FILES / 4, "{requests} requests");
    assert!(dense > (FILES * FILE / 4) as u64, "{dense} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leaves_half_of_it_out_gets_nothing_more() {
    let (requests, dense) = read((0..FILES).rev().step_by(2)).await;
    assert_eq!(dense, 0);
    assert!(requests > 0);
}
