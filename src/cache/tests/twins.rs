//! The same chunks in other layers.

use super::*;

/// A layer called `name` with chunks of the layers in `of`, at the positions named there.
fn mixed(cache: &Arc<Cache>, name: &str, of: &[(&str, usize)]) -> Arc<CachedLayer> {
    let mut parts = index(name, of.len(), CHUNK as u64, Access::Ranges).parts().clone();
    for (chunk, (layer, at)) in parts.chunks.iter_mut().zip(of) {
        chunk.digest = Digest::of(&bytes(layer, *at));
    }
    cache.insert(&digest(name), LayerIndex::new(parts).unwrap()).unwrap()
}

fn shared(cache: &Cache) -> u64 {
    cache.metrics().cache_shared_bytes_total.get()
}

/// What a read gives of a chunk, if all of it is found without a registry.
fn present(layer: &CachedLayer, chunk: usize) -> Option<Vec<u8>> {
    let mut buf = vec![0; CHUNK];
    let missing = layer.read_present(chunk as u64 * CHUNK as u64, &mut buf, &BTreeMap::new());
    missing.is_empty().then_some(buf)
}

#[test]
fn a_chunk_that_another_layer_has_is_taken_from_there() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let first = insert(&cache, "first", 4);
    let second = mixed(&cache, "second", &[("second", 0), ("first", 2), ("first", 3)]);
    assert!(!second.is_elsewhere(1), "nobody has it yet");
    first.store(2, &bytes("first", 2)).unwrap();
    assert!(second.is_elsewhere(1) && !second.is_elsewhere(0) && !second.is_elsewhere(2) && !second.is_elsewhere(99));
    assert_eq!(present(&second, 1).unwrap(), bytes("first", 2));
    assert_eq!(present(&second, 0), None);
    assert_eq!(present(&second, 2), None);
    assert!(second.is_chunk_ready(1));
    assert_eq!(shared(&cache), CHUNK as u64);
    // Its own from now on, and another may have it from there.
    first.evict_all();
    assert_eq!(present(&second, 1).unwrap(), bytes("first", 2));
    let third = mixed(&cache, "third", &[("first", 2)]);
    assert_eq!(present(&third, 0).unwrap(), bytes("first", 2));
}

#[test]
fn what_is_evicted_or_closed_or_damaged_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let first = insert(&cache, "first", 3);
    fill(&first, "first");
    let second = mixed(&cache, "second", &[("first", 0), ("first", 1), ("first", 2)]);
    // Other bytes than the map says: they never get to anyone.
    let data = dir.path().join("layers").join(digest("first").hex()).join("data");
    let file = fs::File::options().write(true).open(&data).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"damaged", 100).unwrap();
    assert!(second.is_elsewhere(0));
    assert_eq!(present(&second, 0), None);
    assert!(!second.is_chunk_ready(0) && !second.is_elsewhere(0), "not tried again");
    assert_eq!(present(&second, 1).unwrap(), bytes("first", 1));
    assert!(second.is_elsewhere(2));
    first.evict_all();
    assert!(!second.is_elsewhere(2));
    assert_eq!(present(&second, 2), None);
    fill(&first, "first");
    assert!(second.is_elsewhere(2));
    drop(first);
    assert!(!second.is_elsewhere(2));
    assert_eq!(present(&second, 2), None);
    assert_eq!(shared(&cache), CHUNK as u64);
}

#[test]
fn a_layer_that_is_opened_again_brings_its_chunks_along() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    fill(&insert(&cache, "first", 3), "first");
    let first = cache.get(&digest("first")).unwrap().unwrap();
    // Closed without order: it may be anything, and is verified when it is taken.
    let data = dir.path().join("layers").join(digest("first").hex()).join("data");
    let file = fs::File::options().write(true).open(&data).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"damaged", 100).unwrap();
    assert!(first.is_suspect(0) && first.is_suspect(1));
    let second = mixed(&cache, "second", &[("first", 0), ("first", 1)]);
    assert_eq!(present(&second, 0), None);
    assert!(
        !first.is_suspect(0) && !first.is_chunk_ready(0),
        "the damage is known by now"
    );
    assert_eq!(present(&second, 1).unwrap(), bytes("first", 1));
    assert!(first.is_chunk_ready(1));
    assert!(!restores(&first, "first", 0));
    drop(first);
    let first = insert(&cache, "first", 3);
    fill(&first, "first");
    (0..3).for_each(|chunk| assert!(restores(&first, "first", chunk)));
    cache.close();
    drop(first);
    let first = cache.get(&digest("first")).unwrap().unwrap();
    assert!(first.is_complete());
    let third = mixed(&cache, "third", &[("first", 1)]);
    assert_eq!(present(&third, 0).unwrap(), bytes("first", 1));
}

#[test]
fn pieces_of_a_stream_are_not_offered() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let streamed = index("first", 2, CHUNK as u64, Access::Stream);
    let first = cache.insert(&digest("first"), streamed).unwrap();
    fill(&first, "first");
    assert!(!mixed(&cache, "second", &[("first", 1)]).is_elsewhere(0));
}

#[test]
fn evictions_at_the_same_time_give_right_bytes_or_none() {
    const ROUNDS: usize = 300;
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let first = insert(&cache, "first", 2);
    let second = mixed(&cache, "second", &[("first", 0), ("first", 1)]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                fill(&first, "first");
                first.evict_all();
            }
        });
        for _ in 0..ROUNDS {
            for chunk in 0..2 {
                if let Some(got) = present(&second, chunk) {
                    assert!(got == bytes("first", chunk));
                }
            }
            second.evict_all();
        }
    });
    fill(&first, "first");
    assert!((0..2).all(|chunk| present(&second, chunk).is_some()));
}
