//! Nothing only grows.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use redb::{MultimapTableHandle as _, ReadableTableMetadata as _, TableHandle as _};

use super::super::{IndexRecord, LayerRecord, Store, StoreError};
use super::{image, layer, open, snapshot};
use crate::layer::Digest;

/// Records of each table, without the counters.
fn lengths(store: &Store) -> Vec<(String, u64)> {
    let transaction = store.inner.begin_read().unwrap();
    let mut lengths: Vec<_> = transaction
        .list_tables()
        .unwrap()
        .map(|table| {
            let table = transaction
                .open_untyped_table(table.clone())
                .map(|open| (table.name().to_owned(), open.len().unwrap()));
            table.unwrap()
        })
        .collect();
    for table in transaction.list_multimap_tables().unwrap() {
        let open = transaction.open_untyped_multimap_table(table.clone()).unwrap();
        lengths.push((table.name().to_owned(), open.len().unwrap()));
    }
    lengths.sort();
    lengths
}

/// Everything that a pull of an image of `layers` records.
fn pull(store: &Store, name: &str, layers: &[&[u8]]) {
    store.put_image(&image(name, layers)).unwrap();
    let mut parent = None;
    for (at, bytes) in layers.iter().enumerate() {
        let index = IndexRecord::Built { published: None };
        store.record_layer(layer(bytes), Some(index)).unwrap();
        let key = format!("{name}/{at}");
        let mut record = snapshot(0, parent.as_deref());
        record.layer = Some(Digest::of(bytes));
        let chain_id = format!("chain {name} {at}");
        record.labels.insert("containerd.io/snapshot.ref".to_owned(), chain_id);
        let created = key.clone();
        store
            .write_snapshots(move |snapshots| {
                record.id = snapshots.allocate_id()?;
                snapshots.put(&created, &record)
            })
            .unwrap();
        parent = Some(key);
    }
    let chain = layers.iter().map(|bytes| Digest::of(bytes)).collect();
    store
        .record_chain(Digest::of(name.as_bytes()), chain, crate::store::ChainRole::Lowest)
        .unwrap();
}

fn remove(store: &Store, name: &str, layers: usize) {
    for at in (0..layers).rev() {
        let key = format!("{name}/{at}");
        let removed = store.write_snapshots(move |snapshots| snapshots.remove(&key)).unwrap();
        assert!(removed.is_some());
    }
    store.remove_chain(&Digest::of(name.as_bytes())).unwrap();
}

/// As a release does it, with nothing live and nothing in the cache.
fn forget(store: &Store) {
    let needed: HashSet<Digest> = store
        .ancestors()
        .unwrap()
        .into_iter()
        .filter_map(|(_, known)| known.layer)
        .collect();
    store
        .forget_layers(move |digest| needed.contains(digest), |_| {})
        .unwrap();
    store.forget_images(|_| false).unwrap();
}

#[test]
fn a_thousand_pulls_and_removals_leave_nothing() {
    const PULLS: u64 = 1000;
    const THREADS: u64 = 20;
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&dir));
    // One image stays, and its base is that of all others.
    pull(&store, "stays", &[b"base", b"its own"]);
    let before = lengths(&store);
    let (next, size) = (AtomicU64::new(0), || std::fs::metadata(store.path()).unwrap().len());
    let round = |until: u64| {
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    loop {
                        let pull_number = next.fetch_add(1, Ordering::SeqCst);
                        if pull_number >= until {
                            break;
                        }
                        let (name, own) = (format!("image {pull_number}"), pull_number.to_le_bytes());
                        pull(&store, &name, &[b"base", &own]);
                        remove(&store, &name, 2);
                    }
                });
            }
        });
        next.store(until, Ordering::SeqCst);
        forget(&store);
    };
    round(PULLS / 10);
    let early = size();
    for tenth in 2..=10 {
        round(PULLS / 10 * tenth);
    }
    assert_eq!(lengths(&store), before);
    assert!(
        size() <= 2 * early,
        "{} bytes, and {early} after the first tenth",
        size()
    );
    // Numbers are never given again all the same.
    let slot = store.allocate_slot(&Digest::of(b"another")).unwrap();
    assert!(u64::from(slot) > PULLS, "{slot}");
}

#[test]
fn an_image_goes_with_the_snapshot_of_its_topmost_layer() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    pull(&store, "a", &[b"base", b"a"]);
    pull(&store, "b", &[b"base", b"b"]);
    assert_eq!(store.forget_images(|_| false).unwrap(), 0);
    let removed = store.write_snapshots(|snapshots| snapshots.remove("a/1")).unwrap();
    assert!(removed.is_some());
    // Its base is still there, and of another image too.
    let manifest = image("a", &[]).manifest;
    assert_eq!(
        store.forget_images(move |asked| *asked == manifest).unwrap(),
        0,
        "it is being pulled"
    );
    assert_eq!(store.forget_images(|_| false).unwrap(), 1);
    assert_eq!(store.image(&manifest).unwrap(), None);
    // One that containerd unpacked is known by its key.
    store
        .write_snapshots(|snapshots| {
            let mut record = snapshots.remove("b/1")?.unwrap_or_else(|| snapshot(7, None));
            record.labels.clear();
            snapshots.put("default/9/chain b 1", &record)
        })
        .unwrap();
    assert_eq!(store.forget_images(|_| false).unwrap(), 0);
    drop(store);
    let store = open(&dir);
    assert_eq!(store.forget_images(|_| false).unwrap(), 0, "after a restart");
    assert!(store.chain_ids().contains("chain b 0"));
}

#[test]
fn what_has_come_to_be_needed_meanwhile_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    store.record_layer(layer(b"a"), None).unwrap();
    let (asked, first) = (AtomicU64::new(0), Digest::of(b"a"));
    let needed = move |digest: &Digest| *digest == first && asked.fetch_add(1, Ordering::SeqCst) > 0;
    assert_eq!(store.forget_layers(needed, |_| {}).unwrap(), 0);
    assert!(store.layer(&first).unwrap().is_some());
    assert_eq!(store.forget_layers(|_| false, |_| {}).unwrap(), 1);
    assert_eq!(
        (store.layer(&first).unwrap(), store.slot(&first).unwrap()),
        (None, None)
    );
}

#[test]
fn variants_tell_their_layers() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let [base, variant] = [b"base".as_slice(), b"variant"].map(layer);
    let variant = LayerRecord {
        variant_of: Some(base.digest),
        ..variant
    };
    let expected = vec![(variant.digest, base.digest)];
    store.record_layer(base, None).unwrap();
    store.record_layer(variant, None).unwrap();
    assert_eq!(store.variants().unwrap(), expected);
}

#[test]
fn leftovers_of_earlier_versions_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    // Slots were for ever, and so was where an index came from.
    let [old, chain] = [b"old".as_slice(), b"chain"].map(Digest::of);
    store.allocate_slot(&old).unwrap();
    store.put_index(&old, &IndexRecord::Built { published: None }).unwrap();
    let slot = store
        .record_chain(chain, vec![old], crate::store::ChainRole::Lowest)
        .unwrap();
    let gone = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&gone);
    store
        .forget_layers(|_| false, move |digest| told.lock().unwrap().push(*digest))
        .unwrap();
    assert_eq!(*gone.lock().unwrap(), [old], "whoever believes something of it is told");
    assert_eq!((store.slot(&old).unwrap(), store.index(&old).unwrap()), (None, None));
    assert_eq!(store.slot(&chain).unwrap(), Some(slot), "the chain is still there");
}

#[test]
fn a_file_that_is_mostly_free_is_made_smaller() {
    let dir = tempfile::tempdir().unwrap();
    let size = |store: &Store| std::fs::metadata(store.path()).unwrap().len();
    let store = open(&dir);
    let text = "x".repeat(64 << 10);
    for round in 0..2_u8 {
        let text = text.clone();
        store
            .write_snapshots(move |snapshots| {
                for id in 0..200 {
                    let mut record = snapshot(id, None);
                    record.labels.insert("l".to_owned(), text.clone());
                    match round {
                        0 => snapshots.put(&id.to_string(), &record)?,
                        _ => drop(snapshots.remove(&id.to_string())?),
                    }
                }
                Ok::<_, StoreError>(())
            })
            .unwrap();
    }
    put_one(&store);
    let before = size(&store);
    drop(store);
    let store = open(&dir);
    assert!(
        before > 8 << 20 && size(&store) < before / 4,
        "{before} bytes are {}",
        size(&store)
    );
    assert!(store.snapshot("one").unwrap().is_some());
}

fn put_one(store: &Store) {
    store
        .write_snapshots(|snapshots| snapshots.put("one", &snapshot(1, None)))
        .unwrap();
}
