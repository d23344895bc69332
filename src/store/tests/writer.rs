//! The writer: batches are whole or not there, durable when answered, and cost as few commits as they can.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex};

use redb::StorageBackend;

use super::super::{IndexRecord, Kind, SnapshotRecord, SnapshotsWrite, Store, StoreError, Usage, schema};
use super::{image, layer, snapshot};
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::sync::random::Random;

/// The bytes of a database, of which a power cut keeps what was synced; it can fail, and be held in a sync.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    now: Mutex<Vec<u8>>,
    synced: Mutex<Vec<u8>>,
    syncs: AtomicUsize,
    /// Syncs that succeed before all fail.
    left: Mutex<Option<usize>>,
    held: Mutex<bool>,
    released: Condvar,
    waiting: AtomicBool,
}

impl Disk {
    fn hold(&self) {
        *self.0.held.lock().unwrap() = true;
    }

    fn release(&self) {
        *self.0.held.lock().unwrap() = false;
        self.0.released.notify_all();
    }

    fn syncs(&self) -> usize {
        self.0.syncs.load(Ordering::SeqCst)
    }

    /// What is left after a power cut.
    fn after_power_cut(&self) -> Disk {
        let disk = Disk::default();
        disk.0.now.lock().unwrap().clone_from(&self.0.synced.lock().unwrap());
        disk
    }

    fn open(&self, metrics: &Arc<Metrics>) -> Store {
        let disk = self.clone();
        // As a file is opened.
        let open = move || match disk.sync_data() {
            Ok(()) => Ok(disk.clone()),
            Err(source) => Err(StoreError::Io {
                path: "in memory".into(),
                source,
            }),
        };
        Store::open_on(open, std::path::Path::new("in memory"), Arc::clone(metrics)).unwrap()
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.0.now.lock().unwrap().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let bytes = self.0.now.lock().unwrap();
        let range = offset as usize..offset as usize + out.len();
        let range = bytes.get(range).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(range);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.0.now.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        let mut held = self.0.held.lock().unwrap();
        while *held {
            self.0.waiting.store(true, Ordering::SeqCst);
            held = self.0.released.wait(held).unwrap();
        }
        drop(held);
        if let Some(left) = &mut *self.0.left.lock().unwrap() {
            *left = left.checked_sub(1).ok_or_else(|| io::Error::other("the disk fails"))?;
        }
        self.0.syncs.fetch_add(1, Ordering::SeqCst);
        self.0.synced.lock().unwrap().clone_from(&self.0.now.lock().unwrap());
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        let range = offset as usize..offset as usize + data.len();
        self.0.now.lock().unwrap()[range].copy_from_slice(data);
        Ok(())
    }
}

fn commits(metrics: &Metrics) -> u64 {
    metrics.database_commit_seconds.get_sample_count()
}

/// Two records that always change together, in `snapshots` under the keys `<name>.a` and `<name>.b`.
fn put_pair(snapshots: &SnapshotsWrite<'_>, name: &str, value: u64) -> Result<(), StoreError> {
    for half in ["a", "b"] {
        let record = SnapshotRecord {
            id: value,
            kind: Kind::Active,
            parent: None,
            labels: BTreeMap::new(),
            created: 0,
            updated: 0,
            layer: None,
            chain: Vec::new(),
            vouched: false,
            remapped: false,
            usage: Usage::default(),
        };
        snapshots.put(&format!("{name}.{half}"), &record)?;
    }
    Ok(())
}

const THREADS: u64 = 6;
const STEPS: u64 = 60;

/// Several threads, each with a name of its own and one that all share, make changes of which some fail at each point; then the disk
/// fails, or the power. What was answered with success is there, what failed is not, and nothing is half there.
fn run(seed: u64) {
    let (disk, metrics) = (Disk::default(), Arc::new(Metrics::new()));
    let store = Arc::new(disk.open(&metrics));
    let mut random = Random::new(seed);
    let fails = random.below(3) > 0;
    if fails {
        *disk.0.left.lock().unwrap() = Some(random.below(THREADS * STEPS / 2) as usize);
    }
    // Of each thread: the last value that was answered, and one that may be there or not.
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let (store, mut random) = (Arc::clone(&store), Random::new(seed * 97 + thread));
            std::thread::spawn(move || {
                let (mut sure, mut unsure) = (None, None);
                for step in 1..=STEPS {
                    let (value, how) = (thread * 1000 + step, random.below(6));
                    let name = format!("own{thread}");
                    let changed = store.write_snapshots(move |snapshots| {
                        put_pair(snapshots, "shared", value)?;
                        match how {
                            0 => return Err(StoreError::Exhausted { what: "patience" }),
                            1 => panic!("on purpose"),
                            _ => {}
                        }
                        put_pair(snapshots, &name, value)?;
                        match how {
                            2 => Err(StoreError::Exhausted { what: "patience" }),
                            _ => Ok(()),
                        }
                    });
                    match changed {
                        Ok(()) => sure = Some(value),
                        Err(StoreError::GivenUp(_)) => {
                            // Of a commit that failed nobody knows whether it reached the disk.
                            unsure = unsure.or(Some(value));
                        }
                        Err(_) => assert!(how < 3, "{changed:?}"),
                    }
                }
                (sure, unsure)
            })
        })
        .collect();
    let expected: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let power_cut = disk.after_power_cut();
    // In memory nothing of a failed commit is seen.
    let chains: Vec<_> = (0..THREADS)
        .map(|thread| store.chain(&format!("own{thread}.a")))
        .collect();
    drop(store);
    let after = power_cut.open(&Arc::new(Metrics::new()));
    let value = |key: &str| after.snapshot(key).unwrap().map(|record| record.id);
    let mut any = None;
    for (thread, (sure, unsure)) in expected.into_iter().enumerate() {
        let found = value(&format!("own{thread}.a"));
        assert_eq!(found, value(&format!("own{thread}.b")), "seed {seed}: half a change");
        assert!(
            found == sure || (unsure.is_some() && found == unsure),
            "seed {seed}: {found:?}, not {sure:?}"
        );
        let seen = chains[thread]
            .as_ref()
            .unwrap()
            .first()
            .map(|(_, ancestor)| ancestor.id);
        assert_eq!(seen, sure, "seed {seed}: in memory");
        any = any.max(found);
    }
    assert_eq!(value("shared.a"), value("shared.b"), "seed {seed}: half a change");
    assert_eq!(value("shared.a").is_some(), any.is_some());
}

#[test]
fn batches_are_whole_and_durable() {
    for seed in 1..=40 {
        run(seed);
    }
}

#[test]
fn what_is_queued_during_a_commit_shares_the_next_one() {
    const CHANGES: u64 = 100;
    let (disk, metrics) = (Disk::default(), Arc::new(Metrics::new()));
    let store = Arc::new(disk.open(&metrics));
    let before = (commits(&metrics), disk.syncs());
    disk.hold();
    let first = {
        let store = Arc::clone(&store);
        std::thread::spawn(move || store.write_snapshots(|snapshots| put_pair(snapshots, "first", 1)))
    };
    while !disk.0.waiting.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    // Tasks on one thread: they wait for the disk without taking it.
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let waiting = (0..CHANGES).map(|change| {
        let (store, digest) = (Arc::clone(&store), Digest::of(&change.to_le_bytes()));
        runtime.spawn(async move { store.change(move |draft| draft.slot(&digest)).await })
    });
    let waiting: Vec<_> = waiting.collect();
    let queued = async {
        for _ in 0..10 * CHANGES {
            tokio::task::yield_now().await;
        }
        disk.release();
        for change in waiting {
            change.await.unwrap().unwrap();
        }
    };
    runtime.block_on(queued);
    first.join().unwrap().unwrap();
    assert_eq!(commits(&metrics) - before.0, 2);
    assert_eq!(metrics.database_changes_total.get(), CHANGES + 1);
    assert!(disk.syncs() - before.1 <= 4, "{} syncs", disk.syncs() - before.1);
}

/// A task that changes something while the disk hangs holds up no other task, on a runtime of one thread.
#[test]
fn the_runtime_goes_on_while_the_disk_hangs() {
    let disk = Disk::default();
    let store = Arc::new(disk.open(&Arc::new(Metrics::new())));
    disk.hold();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let changing = Arc::clone(&store);
        let change = tokio::spawn(async move { changing.change(|draft| draft.slot(&Digest::of(b"a"))).await });
        while !disk.0.waiting.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
        let (ping, pong) = tokio::sync::oneshot::channel();
        let other = tokio::spawn(async move { ping.send("pong") });
        assert_eq!(pong.await, Ok("pong"));
        other.await.unwrap().unwrap();
        assert!(!change.is_finished());
        disk.release();
        assert_eq!(change.await.unwrap().unwrap(), 1);
    });
}

#[cfg(debug_assertions)]
#[tokio::test]
async fn a_task_cannot_read_or_write_where_it_would_block() {
    let store = crate::sync::blocking(|| Arc::new(Disk::default().open(&Arc::new(Metrics::new())))).await;
    let reading = Arc::clone(&store);
    let read = tokio::spawn(async move { drop(reading.layers()) }).await;
    assert!(read.unwrap_err().is_panic());
    let writing = Arc::clone(&store);
    let written = tokio::spawn(async move { drop(writing.remove_layer(&Digest::of(b"a"))) }).await;
    assert!(written.unwrap_err().is_panic());
    // It goes on afterwards.
    let slot = store.change(|draft| draft.slot(&Digest::of(b"a"))).await;
    assert_eq!(slot.unwrap(), 1);
}

#[test]
fn what_is_unchanged_costs_no_commit() {
    let metrics = Arc::new(Metrics::new());
    let store = Disk::default().open(&metrics);
    let (record, index) = (layer(b"blob"), IndexRecord::Built { published: None });
    let all = || {
        store.record_layer(record.clone(), Some(index.clone())).unwrap();
        store.put_image(&image("app", &[b"blob"])).unwrap();
        store
            .write_snapshots(|snapshots| snapshots.put("s", &snapshot(1, None)))
            .unwrap();
        store
            .record_chain(
                Digest::of(b"chain"),
                vec![record.digest],
                crate::store::ChainRole::Lowest,
            )
            .unwrap();
    };
    let before = commits(&metrics);
    all();
    assert_eq!(commits(&metrics) - before, 4, "a layer, its slot and its index are one");
    all();
    assert_eq!(commits(&metrics) - before, 4);
}

#[test]
fn a_refused_commit_is_everybodys_error_and_nothing_is_there() {
    let disk = Disk::default();
    let store = disk.open(&Arc::new(Metrics::new()));
    *disk.0.left.lock().unwrap() = Some(0);
    let error = store.allocate_slot(&Digest::of(b"a")).unwrap_err();
    assert!(error.to_string().contains("the disk fails"), "{error}");
    assert!(matches!(
        store.write_snapshots(|snapshots| put_pair(snapshots, "a", 1)),
        Err(StoreError::GivenUp(_))
    ));
    assert!(store.chain("a.a").unwrap().is_empty());
}

#[test]
fn what_is_queued_at_the_end_is_written() {
    let disk = Disk::default();
    let store = disk.open(&Arc::new(Metrics::new()));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (done, end) = mpsc::channel();
    let changes: Vec<_> = (0..20_u64)
        .map(|change| {
            let done = done.clone();
            let change = store.change(move |draft| {
                done.send(()).unwrap();
                draft.slot(&Digest::of(&change.to_le_bytes()))
            });
            Box::pin(change)
        })
        .collect();
    // Queued, and then nobody waits any more.
    runtime.block_on(async {
        for mut change in changes {
            let _ = futures::poll!(change.as_mut());
        }
    });
    drop(store);
    assert_eq!(end.try_iter().count(), 20);
    let store = disk.after_power_cut().open(&Arc::new(Metrics::new()));
    assert_eq!(store.slot(&Digest::of(&7_u64.to_le_bytes())).unwrap(), Some(8));
    assert_eq!(schema::SCHEMA, store_schema(&store));
}

fn store_schema(store: &Store) -> u64 {
    use redb::TableDefinition;
    let table: TableDefinition<&str, u64> = TableDefinition::new("meta");
    let transaction = store.inner.begin_read().unwrap();
    let table = transaction.open_table(table).unwrap();
    table.get("schema").unwrap().unwrap().value()
}
