//! Tests of the database as its users see it.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Barrier;

use redb::TableDefinition;

use super::*;
use crate::layer::Digest;

mod growth;
mod power;
mod writer;

impl Store {
    /// Opens a file whose writes and syncs fail when `fails` says so, for the tests of other rooms.
    pub(crate) fn open_failing(
        path: &Path,
        fails: impl Fn() -> std::io::Result<()> + Clone + Send + Sync + 'static,
    ) -> Result<Self, StoreError> {
        let file = path.to_owned();
        let open = move || {
            let backend = backend::file(&file)?;
            let fails = fails.clone();
            Ok(Failing { backend, fails })
        };
        Self::open_on(open, path, Arc::new(Metrics::new()))
    }
}

/// A file that fails.
struct Failing<F> {
    backend: backend::Whole,
    fails: F,
}

impl<F> std::fmt::Debug for Failing<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Failing")
    }
}

impl<F: Fn() -> std::io::Result<()> + Send + Sync + 'static> StorageBackend for Failing<F> {
    fn len(&self) -> std::io::Result<u64> {
        self.backend.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.backend.read(offset, out)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        (self.fails)()?;
        self.backend.set_len(len)
    }

    fn sync_data(&self) -> std::io::Result<()> {
        (self.fails)()?;
        self.backend.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        (self.fails)()?;
        self.backend.write(offset, data)
    }
}

fn open(dir: &tempfile::TempDir) -> Store {
    Store::open(&dir.path().join("metadata.redb")).unwrap()
}

fn snapshot(id: u64, parent: Option<&str>) -> SnapshotRecord {
    SnapshotRecord {
        id,
        kind: Kind::Committed,
        parent: parent.map(str::to_owned),
        labels: [("l".to_owned(), "v".to_owned())].into(),
        created: -5,
        updated: i64::MAX,
        layer: Some(Digest::of(b"layer")),
        chain: vec![None, Some(Digest::of(b"below"))],
        vouched: true,
        remapped: true,
        usage: Usage { bytes: 1, inodes: 2 },
    }
}

fn put(store: &Store, key: &str, record: &SnapshotRecord) {
    let (key, record) = (key.to_owned(), record.clone());
    store
        .write_snapshots(move |snapshots| snapshots.put(&key, &record))
        .unwrap();
}

fn keys<E>(listed: Vec<(String, Result<SnapshotRecord, E>)>) -> Vec<String> {
    listed.into_iter().map(|(key, _)| key).collect()
}

/// The record of a layer, without a slot.
fn layer(bytes: &[u8]) -> LayerRecord {
    LayerRecord {
        digest: Digest::of(bytes),
        blob: Some(Digest::of(b"blob")),
        proof: None,
        formerly: None,
        variant_of: None,
        diff_id: Some(Digest::of(b"tar")),
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        size: 7,
        annotations: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        slot: 0,
        sources: vec![LayerSource {
            host: "registry.example:5000".to_owned(),
            repository: "demo/app".to_owned(),
        }],
        streamed: None,
        images: vec!["sha256:m".to_owned()],
    }
}

/// The record of a layer that has a slot.
fn with_slot(store: &Store, bytes: &[u8]) -> LayerRecord {
    let record = layer(bytes);
    let slot = store.allocate_slot(&record.digest).unwrap();
    LayerRecord { slot, ..record }
}

/// An image of these layers, with chain ids `chain <name> <number>`.
fn image(name: &str, layers: &[&[u8]]) -> ImageRecord {
    let layers = layers.iter().enumerate().map(|(at, bytes)| ImageLayer {
        digest: Digest::of(bytes).to_string(),
        size: 9,
        media_type: "x".to_owned(),
        diff_id: "sha256:d".to_owned(),
        chain_id: format!("chain {name} {at}"),
        refused: None,
    });
    ImageRecord {
        manifest: Digest::of(name.as_bytes()),
        namespace: "k8s.io".to_owned(),
        names: vec![format!("registry.example/{name}:1")],
        host: "registry.example".to_owned(),
        repository: name.to_owned(),
        layers: layers.collect(),
    }
}

/// Writes bytes that are no record, as a fault of the disk or of a program would.
fn damage<'k, K: redb::Key + 'static>(store: &Store, table: &str, key: K::SelfType<'k>) {
    let definition: TableDefinition<K, &[u8]> = TableDefinition::new(table);
    let transaction = store.inner.access.with(Database::begin_write).unwrap().unwrap();
    transaction
        .open_table(definition)
        .unwrap()
        .insert(key, b"{".as_slice())
        .unwrap();
    transaction.commit().unwrap();
}

#[test]
fn everything_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let image = ImageRecord {
        manifest: Digest::of(b"manifest"),
        namespace: "k8s.io".to_owned(),
        names: vec!["registry.example/app:1".to_owned()],
        host: "registry.example".to_owned(),
        repository: "app".to_owned(),
        layers: vec![ImageLayer {
            digest: "sha512:ab".to_owned(),
            size: 9,
            media_type: "x".to_owned(),
            diff_id: "sha256:d".to_owned(),
            chain_id: "sha256:c".to_owned(),
            refused: Some("digest algorithm".to_owned()),
        }],
    };
    let store = open(&dir);
    let layer = with_slot(&store, b"blob");
    put(&store, "default/1/a b/c", &snapshot(1, None));
    store.put_layer(&layer).unwrap();
    store.put_image(&image).unwrap();
    drop(store);

    let store = open(&dir);
    assert_eq!(store.snapshot("default/1/a b/c").unwrap(), Some(snapshot(1, None)));
    assert_eq!(store.snapshot("default/1/a b").unwrap(), None);
    assert_eq!(store.layer(&layer.digest).unwrap(), Some(layer.clone()));
    assert_eq!(store.layers().unwrap().len(), 1);
    assert_eq!(store.image(&image.manifest).unwrap(), Some(image.clone()));
    assert_eq!(store.images().unwrap().len(), 1);
    assert!(store.remove_layer(&layer.digest).unwrap());
    assert!(!store.remove_layer(&layer.digest).unwrap());
    assert!(store.remove_image(&image.manifest).unwrap());
    assert_eq!(store.layer(&layer.digest).unwrap(), None);
    assert_eq!(store.image(&image.manifest).unwrap(), None);
    let mode = std::fs::metadata(store.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn the_index_of_children_follows_every_change() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    put(&store, "base", &snapshot(1, None));
    put(&store, "b", &snapshot(2, Some("base")));
    put(&store, "a", &snapshot(3, Some("base")));
    assert_eq!(keys(store.children("base").unwrap()), ["a", "b"]);
    assert_eq!(keys(store.children("").unwrap()), ["base"]);
    assert_eq!(keys(store.snapshots().unwrap()), ["a", "b", "base"]);
    assert!(
        store
            .write_snapshots(|snapshots| snapshots.has_children("base"))
            .unwrap()
    );

    put(&store, "b", &snapshot(2, None));
    assert_eq!(keys(store.children("base").unwrap()), ["a"]);
    let removed = store.write_snapshots(|snapshots| snapshots.remove("a")).unwrap();
    assert_eq!(removed, Some(snapshot(3, Some("base"))));
    assert_eq!(keys(store.children("base").unwrap()), [] as [&str; 0]);
    assert!(
        !store
            .write_snapshots(|snapshots| snapshots.has_children("base"))
            .unwrap()
    );
    assert_eq!(keys(store.children("").unwrap()), ["b", "base"]);
}

#[test]
fn a_chain_is_nearest_first_and_never_endless() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    put(&store, "1", &snapshot(1, None));
    put(&store, "2", &snapshot(2, Some("1")));
    put(&store, "3", &snapshot(3, Some("2")));
    let chain = store.chain("3").unwrap();
    assert_eq!(
        chain.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(),
        ["3", "2", "1"]
    );
    assert!(store.chain("none").unwrap().is_empty());

    put(&store, "1", &snapshot(1, Some("3")));
    assert!(matches!(store.chain("3"), Err(StoreError::Damaged { .. })));
    put(&store, "1", &snapshot(1, Some("gone")));
    let error = store.chain("3").unwrap_err();
    assert!(error.to_string().contains("parent is missing"), "{error}");
}

#[test]
fn chains_follow_every_change() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let chain = |store: &Store, key: &str| -> Vec<(String, u64)> {
        let chain = store.chain(key).unwrap();
        chain.into_iter().map(|(key, ancestor)| (key, ancestor.id)).collect()
    };
    let expected = |chain: &[(&str, u64)]| -> Vec<(String, u64)> {
        chain.iter().map(|(key, id)| ((*key).to_owned(), *id)).collect()
    };
    put(&store, "base", &snapshot(1, None));
    put(&store, "top", &snapshot(2, Some("base")));
    put(&store, "other", &snapshot(3, None));
    assert_eq!(chain(&store, "top"), expected(&[("top", 2), ("base", 1)]));

    // All of a transaction, and nothing of one that fails.
    let moved = store.write_snapshots(|snapshots| {
        snapshots.put("top", &snapshot(2, Some("other")))?;
        snapshots.remove("base")
    });
    assert!(moved.unwrap().is_some());
    assert_eq!(chain(&store, "top"), expected(&[("top", 2), ("other", 3)]));
    assert!(store.chain("base").unwrap().is_empty());
    let failed: Result<(), StoreError> = store.write_snapshots(|snapshots| {
        snapshots.remove("other")?;
        snapshots.put("top", &snapshot(9, None))?;
        Err(StoreError::Exhausted { what: "patience" })
    });
    assert!(failed.is_err());
    assert_eq!(chain(&store, "top"), expected(&[("top", 2), ("other", 3)]));

    drop(store);
    assert_eq!(chain(&open(&dir), "top"), expected(&[("top", 2), ("other", 3)]));
}

#[test]
fn a_damaged_ancestor_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    put(&store, "base", &snapshot(1, None));
    put(&store, "top", &snapshot(2, Some("base")));
    damage::<&str>(&store, "snapshots", "base");
    drop(store);
    let store = open(&dir);
    for key in ["top", "base"] {
        let error = store.chain(key).unwrap_err();
        assert!(error.to_string().contains(r#"damaged record "base""#), "{error}");
    }
}

#[test]
fn a_failed_change_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let failed: Result<(), StoreError> = store.write_snapshots(|snapshots| {
        assert_eq!(snapshots.allocate_id()?, 1);
        snapshots.put("a", &snapshot(1, None))?;
        Err(StoreError::Exhausted { what: "patience" })
    });
    assert!(failed.is_err());
    assert_eq!(store.snapshot("a").unwrap(), None);
    assert!(store.children("").unwrap().is_empty());
}

#[test]
fn ids_are_never_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let allocate = |store: &Store| store.write_snapshots(|snapshots| snapshots.allocate_id()).unwrap();
    let store = open(&dir);
    assert_eq!([allocate(&store), allocate(&store)], [1, 2]);
    put(&store, "a", &snapshot(2, None));
    store.write_snapshots(|snapshots| snapshots.remove("a")).unwrap();
    drop(store);
    assert_eq!(allocate(&open(&dir)), 3);
}

#[test]
fn a_layer_keeps_its_slot_while_it_is_recorded_and_nobody_else_gets_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let (a, b) = (with_slot(&store, b"a"), with_slot(&store, b"b"));
    assert_eq!((a.slot, b.slot), (1, 2));
    store.put_layer(&a).unwrap();
    drop(store);
    let store = open(&dir);
    assert_eq!(store.allocate_slot(&a.digest).unwrap(), 1);
    assert_eq!(
        store.record_layer(LayerRecord { slot: 9, ..a.clone() }, None).unwrap(),
        1
    );
    store.remove_layer(&b.digest).unwrap();
    assert_eq!(store.slot(&b.digest).unwrap(), None);
    drop(store);
    let store = open(&dir);
    assert_eq!(
        store.allocate_slot(&b.digest).unwrap(),
        3,
        "its number is not given again"
    );

    let stolen = LayerRecord { slot: 2, ..a };
    let error = store.put_layer(&stolen).unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::WrongSlot {
                claimed: 2,
                actual: 1,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn slots_are_different_for_concurrent_callers() {
    const THREADS: u8 = 8;
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let start = Barrier::new(usize::from(THREADS));
    let slots: Vec<u32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (store, start) = (&store, &start);
                scope.spawn(move || {
                    start.wait();
                    // Two threads share each digest.
                    store.allocate_slot(&Digest::of(&[thread / 2])).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut distinct: Vec<_> = slots.chunks(2).map(|pair| pair[0]).collect();
    assert!(slots.chunks(2).all(|pair| pair[0] == pair[1]), "{slots:?}");
    distinct.sort_unstable();
    assert_eq!(distinct, [1, 2, 3, 4]);
}

#[test]
fn a_damaged_record_is_an_error_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let (bad, good) = (with_slot(&store, b"bad"), with_slot(&store, b"good"));
    store.put_layer(&bad).unwrap();
    store.put_layer(&good).unwrap();
    damage::<&[u8; Digest::LEN]>(&store, "layers", bad.digest.as_bytes());
    let error = store.layer(&bad.digest).unwrap_err();
    assert!(error.to_string().contains(&bad.digest.to_string()), "{error}");
    let readable: Vec<_> = store
        .layers()
        .unwrap()
        .into_iter()
        .filter_map(|(_, record)| record.ok())
        .collect();
    assert_eq!(readable, [good]);
    assert!(store.remove_layer(&bad.digest).unwrap());
    assert_eq!(store.layers().unwrap().len(), 1);

    let manifest = Digest::of(b"manifest");
    damage::<&[u8; Digest::LEN]>(&store, "images", manifest.as_bytes());
    assert!(matches!(store.image(&manifest), Err(StoreError::Damaged { .. })));
    assert!(store.remove_image(&manifest).unwrap());
}

#[test]
fn a_damaged_snapshot_does_not_hide_others() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    put(&store, "good", &snapshot(1, None));
    put(&store, "bad", &snapshot(2, None));
    damage::<&str>(&store, "snapshots", "bad");
    assert!(matches!(store.snapshot("bad"), Err(StoreError::Damaged { .. })));
    let listed = store.snapshots().unwrap();
    assert!(listed[0].1.is_err() && listed[1].1.is_ok(), "{listed:?}");
    // The set of ids would be incomplete.
    assert!(store.write_snapshots(|snapshots| snapshots.ids()).is_err());
}

#[test]
fn only_one_process_can_have_it_open() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let error = Store::open(store.path()).unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
}

#[test]
fn what_is_no_database_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.redb");
    std::fs::write(&path, b"something else entirely").unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Open { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"something else entirely");
    assert!(Store::open(&dir.path().join("missing/metadata.redb")).is_err());
}

#[test]
fn readers_see_the_last_commit_and_do_not_wait_for_writers() {
    let dir = tempfile::tempdir().unwrap();
    let store = std::sync::Arc::new(open(&dir));
    put(&store, "a", &snapshot(1, None));
    let reader = std::sync::Arc::clone(&store);
    store
        .write_snapshots(move |snapshots| {
            snapshots.remove("a")?;
            // On the writer's very thread: a reader that waited for it would never come back.
            assert!(reader.snapshot("a")?.is_some());
            Ok::<_, StoreError>(())
        })
        .unwrap();
    assert_eq!(store.snapshot("a").unwrap(), None);
}

#[test]
fn chains_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let digest = Digest::of(b"chain");
    let record = ChainRecord {
        digest,
        slot: store.allocate_slot(&digest).unwrap(),
        layers: vec![Digest::of(b"low"), Digest::of(b"high")],
        role: ChainRole::Upper,
    };
    store.put_chain(&record).unwrap();
    drop(store);
    let store = open(&dir);
    let listed: Vec<_> = store.chains().unwrap().into_iter().map(|(_, r)| r.unwrap()).collect();
    assert_eq!(listed, [record]);
    damage::<&[u8; Digest::LEN]>(&store, "chains", digest.as_bytes());
    assert!(store.chains().unwrap()[0].1.is_err());
    assert!(store.remove_chain(&digest).unwrap());
    assert!(!store.remove_chain(&digest).unwrap());
    assert!(store.chains().unwrap().is_empty());
}

#[test]
fn a_database_from_before_there_were_chains_gets_them() {
    const CHAINS: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new("chains");
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let layer = with_slot(&store, b"blob");
    store.put_layer(&layer).unwrap();
    let transaction = store.inner.access.with(Database::begin_write).unwrap().unwrap();
    assert!(transaction.delete_table(CHAINS).unwrap());
    transaction.commit().unwrap();
    drop(store);
    let store = open(&dir);
    assert!(store.chains().unwrap().is_empty());
    assert_eq!(store.layer(&layer.digest).unwrap(), Some(layer));
}
