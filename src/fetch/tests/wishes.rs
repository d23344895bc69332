//! What is known to be read is asked for ahead.

use std::time::Duration;

use super::fake::{Bench, FakeBlob, ranged};
use crate::fetch::LayerData;

const LONG: Duration = Duration::from_secs(60);
/// Files that are too small to end a request, and too large to be taken along with a neighbour.
const FILE: usize = 60_000;

/// Waits until nothing is asked for any more.
async fn landed(layer: &crate::fetch::Layer) {
    while !layer.queue().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wishes_are_fetched_in_large_requests_and_nothing_else() {
    let (index, data, blob) = ranged(&[FILE; 30]);
    let places: Vec<u64> = index.chunks().iter().map(|chunk| chunk.data_offset).collect();
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (cached, layer) = bench.open("layer", index, &blob);
    // In any order, and with a part of a chunk: 5 to 9, and 20.
    let ranges: Vec<_> = [9, 5, 7, 6, 8].map(|at: usize| (places[at], FILE as u64)).into();
    let wished = layer.wish(&[&ranges[..], &[(places[20] + 7, 1)]].concat());
    assert_eq!(wished.ranges.len(), 6);
    assert_eq!(wished.ranges[5], (places[20], FILE as u64));
    landed(&layer).await;
    let ready: Vec<usize> = (0..30).filter(|&chunk| cached.is_chunk_ready(chunk)).collect();
    assert_eq!(ready, [5, 6, 7, 8, 9, 20]);
    assert_eq!(blob.requests(), 2, "{:?}", blob.asked.lock().unwrap());
    // What is here is not wished for again.
    let again = layer.wish(&ranges);
    assert_eq!((again.ranges.len(), again.bytes), (0, 0));
    let read = layer.read(places[6], FILE as u32, LONG).await.unwrap();
    assert_eq!(read, data[places[6] as usize..][..FILE]);
    assert_eq!(blob.requests(), 2);
}

/// Of what is only guessed, a little of what is beside it comes too, in one request for all that lies close to each other.
#[tokio::test(flavor = "multi_thread")]
async fn guesses_are_fetched_together_and_with_a_little_of_what_is_beside_them() {
    // Smaller than what is taken on either side.
    const SMALL: usize = 20_000;
    let (index, _, blob) = ranged(&[SMALL; 60]);
    let places: Vec<u64> = index.chunks().iter().map(|chunk| chunk.data_offset).collect();
    let at = |chunks: &[usize]| -> Vec<(u64, u64)> { chunks.iter().map(|&at| (places[at], 1)).collect() };
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (cached, layer) = bench.open("layer", index, &blob);
    let wished = layer.wish_and_guess(&at(&[40]), &at(&[10, 12, 14]));
    assert_eq!(wished.chunks, [10, 12, 14, 40]);
    landed(&layer).await;
    let ready: Vec<usize> = (0..60).filter(|&chunk| cached.is_chunk_ready(chunk)).collect();
    let beside = crate::fetch::window::LITTLE as usize / SMALL;
    let with_neighbours = 10 - beside..=14 + beside;
    assert_eq!(ready, with_neighbours.chain([40]).collect::<Vec<_>>());
    assert_eq!(blob.requests(), 2, "{:?}", blob.asked.lock().unwrap());
    // What is guessed does not keep others from reading ahead.
    assert!(!layer.has_wishes());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wish_that_is_taken_back_is_not_fetched_unless_somebody_waits() {
    let (index, data, blob) = ranged(&[FILE; 30]);
    let places: Vec<u64> = index.chunks().iter().map(|chunk| chunk.data_offset).collect();
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (cached, layer) = bench.open("layer", index, &blob);
    // Nothing is let in before it is taken back.
    let wished = {
        let mut queue = layer.queue();
        for chunk in [3, 12] {
            queue.want(chunk, chunk, crate::fetch::schedule::Class::Prefetch, None);
        }
        drop(queue);
        crate::fetch::Wished {
            chunks: vec![3, 12],
            ..crate::fetch::Wished::default()
        }
    };
    assert!(layer.has_wishes());
    let (waiter, wait) = crate::fetch::queue::Waiter::new(0..FILE);
    layer
        .queue()
        .want(12, 12, crate::fetch::schedule::Class::Demand, Some(waiter));
    layer.unwish(&wished);
    assert!(!layer.has_wishes());
    layer.dispatch(crate::fetch::schedule::Class::Demand);
    assert_eq!(wait.await.unwrap().unwrap(), data[places[12] as usize..][..FILE]);
    landed(&layer).await;
    assert!(!cached.is_chunk_ready(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn while_wishes_are_open_nothing_is_read_ahead() {
    let (index, _, blob) = ranged(&[FILE; 60]);
    let places: Vec<u64> = index.chunks().iter().map(|chunk| chunk.data_offset).collect();
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (cached, layer) = bench.open("layer", index, &blob);
    {
        let mut queue = layer.queue();
        queue.is_known = true;
        queue.want(50, 50, crate::fetch::schedule::Class::Prefetch, None);
    }
    layer.read(places[10], FILE as u32, LONG).await.unwrap();
    landed_but(&layer, 50).await;
    let ready: Vec<usize> = (0..60).filter(|&chunk| cached.is_chunk_ready(chunk)).collect();
    assert_eq!(ready, [10]);
}

/// Waits until nothing is asked for but `chunk`.
async fn landed_but(layer: &crate::fetch::Layer, chunk: usize) {
    loop {
        let others: Vec<usize> = (0..60).filter(|&other| other != chunk).collect();
        if !layer.queue().asks_for_any(&others) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
