//! Names that leave memory, and come back.

use std::time::Duration;

use super::*;

/// A layer with `count` chunks and as many empty files.
fn named(cache: &Arc<Cache>, name: &str, count: usize) -> Arc<CachedLayer> {
    let mut parts = index(name, count, CHUNK as u64, Access::Ranges).parts().clone();
    for number in 0..count {
        let text = format!("{name} {number:05}");
        parts.dirents.push(crate::layer::Dirent {
            name: parts.strings.len() as u32,
            name_len: text.len() as u32,
            ino: number as u32 + 2,
        });
        parts.strings.extend_from_slice(text.as_bytes());
        parts.inodes.push(Inode {
            mode: mode::REG | 0o644,
            nlink: 1,
            ..Inode::default()
        });
    }
    parts.inodes[0].count = count as u32;
    cache.insert(&digest(name), LayerIndex::new(parts).unwrap()).unwrap()
}

#[test]
fn names_that_nobody_asks_for_leave_memory_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let layer = named(&cache, "a", 3);
    let before = (*layer.names().unwrap()).clone();
    assert_eq!(cache.names_bytes(), before.memory());
    cache.forget_names_idle_for(Duration::from_secs(3600));
    assert!(layer.has_names(), "just asked for");
    cache.tidy();
    assert_eq!(cache.metrics().names_memory_bytes.get(), before.memory() as i64);
    cache.forget_names_idle_for(Duration::ZERO);
    assert!(!layer.has_names());
    assert_eq!(cache.names_bytes(), 0);
    // Bytes come and go without them.
    fill(&layer, "a");
    assert!((0..3).all(|chunk| holds(&layer, "a", chunk)));
    assert!(layer.evict_all() > 0);
    fill(&layer, "a");
    assert_eq!(fs::read(layer.hold().unwrap().0).unwrap().len(), 3 * CHUNK);
    assert_eq!(
        (layer.index().inodes(), layer.index().fingerprint()),
        (4, before.fingerprint())
    );
    assert_eq!(layer.index(), &before.blob());
    assert!(!layer.has_names());
    assert_eq!(*layer.names().unwrap(), before);
    assert!(layer.names().unwrap().lookup_path(b"a 00001").is_some());
    assert_eq!(cache.names_bytes(), before.memory());
    drop(layer);
    assert_eq!(cache.names_bytes(), 0);
}

/// Chunks of a large layer stay on the disk: from the beginning, after a restart, and when the layer goes while somebody has it.
#[test]
fn chunks_of_large_layers_are_read_from_the_index_file() {
    const COUNT: usize = 1500;
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    assert!(!named(&cache, "small", 3).has_mapped_index());
    let made = insert(&cache, "large", COUNT);
    let before = (*made.names().unwrap()).blob();
    let fill_some = |layer: &CachedLayer| {
        for chunk in [0, 700, COUNT - 1] {
            assert_eq!(layer.store(chunk, &bytes("large", chunk)).unwrap(), Stored::Cached);
            layer.release_index();
            assert!(holds(layer, "large", chunk));
        }
        assert!(!holds(layer, "large", 701));
    };
    assert!(made.has_mapped_index());
    fill_some(&made);
    drop((made, cache));
    let cache = open(dir.path(), 0);
    let opened = cache.get(&digest("large")).unwrap().unwrap();
    assert!(opened.has_mapped_index());
    assert_eq!(opened.index(), &before);
    assert!(
        restores(&opened, "large", 700),
        "verified again, since the cache was not closed"
    );
    assert!(opened.evict_all() > 0);
    fs::remove_dir_all(dir.path().join("layers").join(digest("large").hex())).unwrap();
    fill_some(&opened);
}

#[test]
fn names_in_use_stay() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let layer = named(&cache, "a", 3);
    let used = layer.names().unwrap();
    cache.forget_names_idle_for(Duration::ZERO);
    assert!(Arc::ptr_eq(&used, &layer.names().unwrap()), "not twice in memory");
    drop(used);
    cache.forget_names_idle_for(Duration::ZERO);
    assert!(!layer.has_names());
}

#[test]
fn of_too_many_names_those_used_last_stay() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let layers = ["a", "b", "c", "d"].map(|name| named(&cache, name, 50));
    let each = layers[0].names().unwrap().memory();
    assert_eq!(cache.names_bytes(), 4 * each);
    cache.forget_names_idle_for(Duration::ZERO);
    cache.residents.set_max(2 * each);
    for layer in &layers {
        // Time goes by milliseconds.
        std::thread::sleep(Duration::from_millis(3));
        layer.names().unwrap();
        assert!(layer.has_names() || cache.names_bytes() <= 2 * each);
    }
    assert_eq!(
        layers.each_ref().map(|layer| layer.has_names()),
        [false, false, true, true]
    );
    // Also of those that are opened: as after a restart.
    let again = named(&cache, "e", 50);
    assert!(cache.names_bytes() <= 2 * each);
    drop((layers, again, cache));
    let cache = open(dir.path(), 0);
    cache.residents.set_max(2 * each);
    let layers = ["a", "b", "c", "d", "e"].map(|name| cache.get(&digest(name)).unwrap().unwrap());
    assert_eq!(cache.names_bytes(), 2 * each);
    assert!(layers.iter().all(|layer| layer.names().is_ok()));
}

#[test]
fn names_that_cannot_be_read_any_more_are_an_error_and_the_layer_is_made_again() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 3] = [
        ("flipped", |index| flip(index, 70)),
        ("gone", |index| fs::remove_file(index).unwrap()),
        ("of another layer", |index| {
            let other = tempfile::tempdir().unwrap();
            drop(named(&open(other.path(), 0), "a", 4));
            let path = other.path().join("layers").join(digest("a").hex()).join("index");
            fs::copy(path, index).unwrap();
        }),
    ];
    for (what, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 0);
        let layer = named(&cache, "a", 3);
        fill(&layer, "a");
        cache.forget_names_idle_for(Duration::ZERO);
        damage(&dir.path().join("layers").join(digest("a").hex()).join("index"));
        let error = layer.names().unwrap_err();
        assert!(matches!(error, CacheError::Io { .. }), "{what}: {error}");
        assert!(layer.portable().is_err(), "{what}");
        assert_eq!(cache.names_bytes(), 0);
        // Bytes are served without names, as long as somebody has the layer.
        assert!(holds(&layer, "a", 1), "{what}");
        drop(layer);
        // Nothing of another index's map is believed either.
        let again = cache.get(&digest("a")).unwrap();
        assert!(again.is_none_or(|layer| layer.present_bytes() == 0), "{what}");
    }
}

/// Readers of names while these are forgotten: everybody sees all of them.
#[test]
fn names_come_and_go_under_readers() {
    const READS: u64 = 2_000;
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let layer = named(&cache, "a", 20);
    let (done, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert!(layer.names().unwrap().lookup_path(b"a 00019").is_some());
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| {
            while reads.load(Ordering::Relaxed) < READS {
                cache.forget_names_idle_for(Duration::ZERO);
            }
            done.store(true, Ordering::Relaxed);
        });
    });
    layer.names().unwrap();
    assert_eq!(cache.names_bytes(), layer.names().unwrap().memory());
    drop(layer);
    assert_eq!(cache.names_bytes(), 0);
}
