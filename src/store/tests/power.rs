//! What the disk holds of the database when the power is cut, and a disk that fails.
//!
//! A *tape* records every write, sync and change of length that redb makes. At any point of it the power may be cut. What was synchronised is on the
//! disk then; of what was not, each sector may be or not, whatever the order in which it was written. From each such disk the database has to open
//! by itself and hold exactly every change that was answered, and of those under way the first ones, each as a whole.
//!
//! `LAZULI_SEED=n cargo test --lib store::tests::power` repeats one program; `LAZULI_FAULT_MINUTES=n` goes on with others for so long.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use redb::{MultimapTableDefinition, ReadableTable as _, StorageBackend, TableDefinition};

use super::super::{Draft, IndexRecord, Store, StoreError};
use super::{image, layer, snapshot};
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::store::{LayerRecord, SnapshotRecord};
use crate::sync::random::Random;
use crate::sync::wait;

/// What a disk writes as a whole or not at all, in bytes.
const SECTOR: usize = 512;
/// Changes of one program.
const CHANGES: u64 = 40;
/// Most changes that wait for one commit.
const TOGETHER: u64 = 4;
/// One in so many disks is also written to, and opened once more.
const USED_AGAIN: u64 = 8;
/// The program that every run of the tests looks at.
const SEED: u64 = 1;

/// What was done to a file.
#[derive(Debug, Clone)]
enum Op {
    Write(usize, Vec<u8>),
    Len(usize),
    Sync,
}

/// A file in memory that remembers everything that was done to it, and can fail.
#[derive(Debug, Clone, Default)]
struct Tape(Arc<Mutex<Recorded>>);

#[derive(Debug, Default)]
struct Recorded {
    bytes: Vec<u8>,
    ops: Vec<Op>,
    /// How many more operations succeed, then how many fail.
    fails: Option<(usize, usize)>,
}

impl Recorded {
    fn may_fail(&mut self) -> io::Result<()> {
        match &mut self.fails {
            Some((0, 0)) => self.fails = None,
            Some((0, left)) => {
                *left -= 1;
                return Err(io::ErrorKind::StorageFull.into());
            }
            Some((good, _)) => *good -= 1,
            None => {}
        }
        Ok(())
    }
}

impl Tape {
    fn of(bytes: Vec<u8>) -> Self {
        let tape = Tape::default();
        tape.0.lock().unwrap().bytes = bytes;
        tape
    }

    fn open(&self) -> Result<Store, StoreError> {
        let tape = self.clone();
        Store::open_on(move || Ok(tape.clone()), Path::new("tape"), Arc::new(Metrics::new()))
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().ops.len()
    }
}

impl StorageBackend for Tape {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.0.lock().unwrap().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let tape = self.0.lock().unwrap();
        let range = offset as usize..offset as usize + out.len();
        out.copy_from_slice(tape.bytes.get(range).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        let mut tape = self.0.lock().unwrap();
        tape.may_fail()?;
        tape.bytes.resize(len as usize, 0);
        tape.ops.push(Op::Len(len as usize));
        Ok(())
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        let mut tape = self.0.lock().unwrap();
        tape.may_fail()?;
        tape.ops.push(Op::Sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        let mut tape = self.0.lock().unwrap();
        tape.may_fail()?;
        let offset = offset as usize;
        tape.bytes[offset..offset + data.len()].copy_from_slice(data);
        tape.ops.push(Op::Write(offset, data.to_vec()));
        Ok(())
    }
}

/// How much of what was not synchronised is on the disk.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// All of it, as after the death of the process.
    Process,
    /// Nothing of it.
    Nothing,
    /// Some writes, whole.
    Some,
    /// Some sectors.
    Torn,
}

const CUTS: [Cut; 4] = [Cut::Process, Cut::Nothing, Cut::Some, Cut::Torn];

/// The file as the disk has it. Writes to one sector may be lost before or after others of the same, so that going through them in order and
/// leaving some out gives every result that there is.
fn disk(synced: &[u8], pending: &[Op], cut: Cut, random: &mut Random) -> Vec<u8> {
    let mut bytes = synced.to_vec();
    let kept = |random: &mut Random| match cut {
        Cut::Process => true,
        Cut::Nothing => false,
        Cut::Some | Cut::Torn => random.below(2) == 0,
    };
    let lengths = pending.iter().filter(|op| matches!(op, Op::Len(_))).count() as u64;
    let lengths = match cut {
        Cut::Process => lengths,
        Cut::Nothing => 0,
        Cut::Some | Cut::Torn => random.below(lengths + 1),
    };
    let (mut seen, mut len) = (0, synced.len());
    for op in pending {
        match op {
            Op::Len(new) => {
                seen += 1;
                if seen <= lengths {
                    // What was cut off is gone, also if it grows again.
                    bytes.truncate(*new);
                    len = *new;
                }
            }
            Op::Write(offset, data) => {
                let end = offset + data.len();
                if bytes.len() < end.max(len) {
                    bytes.resize(end.max(len), 0);
                }
                let pieces = match cut {
                    Cut::Torn => SECTOR,
                    _ => data.len(),
                };
                for (at, piece) in data.chunks(pieces.max(1)).enumerate() {
                    if kept(random) {
                        bytes[offset + at * pieces..][..piece.len()].copy_from_slice(piece);
                    }
                }
            }
            Op::Sync => unreachable!("what comes before a sync is not pending"),
        }
    }
    bytes.resize(len, 0);
    bytes
}

/// Everything in all tables, byte for byte.
type Dump = BTreeMap<(&'static str, Vec<u8>), Vec<u8>>;

fn dump(store: &Store) -> Dump {
    let transaction = store.inner.begin_read().unwrap();
    let mut all = Dump::new();
    for name in ["layers", "images", "chains", "indexes"] {
        let table: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new(name);
        for entry in transaction.open_table(table).unwrap().iter().unwrap() {
            let (key, value) = entry.unwrap();
            all.insert((name, key.value().to_vec()), value.value().to_vec());
        }
    }
    let slots: TableDefinition<&[u8; Digest::LEN], u32> = TableDefinition::new("slots");
    for entry in transaction.open_table(slots).unwrap().iter().unwrap() {
        let (key, value) = entry.unwrap();
        all.insert(("slots", key.value().to_vec()), value.value().to_le_bytes().to_vec());
    }
    let meta: TableDefinition<&str, u64> = TableDefinition::new("meta");
    for entry in transaction.open_table(meta).unwrap().iter().unwrap() {
        let (key, value) = entry.unwrap();
        let value = value.value().to_le_bytes().to_vec();
        all.insert(("meta", key.value().as_bytes().to_vec()), value);
    }
    let snapshots: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");
    for entry in transaction.open_table(snapshots).unwrap().iter().unwrap() {
        let (key, value) = entry.unwrap();
        all.insert(("snapshots", key.value().as_bytes().to_vec()), value.value().to_vec());
    }
    let children: MultimapTableDefinition<&str, &str> = MultimapTableDefinition::new("children");
    let children = transaction.open_multimap_table(children).unwrap();
    for entry in redb::ReadableMultimapTable::iter(&children).unwrap() {
        let (key, values) = entry.unwrap();
        let mut list = Vec::new();
        for value in values {
            list.push(value.unwrap().value().to_owned());
        }
        all.insert(
            ("children", key.value().as_bytes().to_vec()),
            list.join("\n").into_bytes(),
        );
    }
    all
}

/// One change, which does the same wherever it is made.
#[derive(Debug, Clone)]
enum Change {
    /// A snapshot comes to be, on another one.
    Put(u64, u64),
    /// It is committed: it gets another key.
    Commit(u64),
    Remove(u64),
    Layer(u64, usize),
    ForgetLayer(u64),
    Image(u64),
    ForgetImage(u64),
    Chain(u64),
}

impl Change {
    fn any(random: &mut Random) -> Self {
        let which = random.below(12);
        match random.below(10) {
            0..=2 => Change::Put(which, random.below(12)),
            3 => Change::Commit(which),
            4 => Change::Remove(which),
            // Some are so large that the file has to grow.
            5 => Change::Layer(which, 1 + random.below(3) as usize * 40_000),
            6 => Change::ForgetLayer(which),
            7 => Change::Image(which),
            8 => Change::ForgetImage(which),
            _ => Change::Chain(which),
        }
    }

    fn make(&self, draft: &Draft<'_>) -> Result<(), StoreError> {
        match self {
            Change::ForgetLayer(which) => {
                draft.remove_index(&digest(*which))?;
                draft.remove_layer(&digest(*which)).map(drop)
            }
            Change::Layer(which, len) => {
                let record = LayerRecord {
                    annotations: [("text".to_owned(), "x".repeat(*len))].into(),
                    ..layer(format!("layer {which}").as_bytes())
                };
                let index = IndexRecord::Built { published: None };
                draft.record_layer(record, Some(&index)).map(drop)
            }
            Change::Image(which) => draft.put_image(&image(&format!("image {which}"), &[b"layer"])),
            Change::ForgetImage(which) => {
                let manifest = Digest::of(format!("image {which}").as_bytes());
                draft.remove_image(&manifest).map(drop)
            }
            Change::Chain(which) => draft.slot(&digest(100 + which)).map(drop),
            Change::Put(..) | Change::Commit(_) | Change::Remove(_) => unreachable!("see `queue`"),
        }
    }

    /// Queues it.
    fn queue<'s>(&self, store: &'s Store) -> BoxFuture<'s, Result<(), StoreError>> {
        let change = self.clone();
        let name = |which: u64| format!("snapshot {which}");
        match *self {
            Change::Put(which, parent) => store
                .change_snapshots(move |snapshots| {
                    let id = snapshots.allocate_id()?;
                    let parent = (parent != which).then(|| name(parent));
                    let record = SnapshotRecord {
                        parent,
                        ..snapshot(id, None)
                    };
                    snapshots.put(&name(which), &record)
                })
                .boxed(),
            Change::Commit(which) => store
                .change_snapshots(move |snapshots| match snapshots.remove(&name(which))? {
                    Some(record) => snapshots.put(&format!("committed {which}"), &record),
                    None => Ok(()),
                })
                .boxed(),
            Change::Remove(which) => store
                .change_snapshots(move |snapshots| {
                    snapshots.remove(&format!("committed {which}"))?;
                    snapshots.remove(&name(which)).map(drop)
                })
                .boxed(),
            _ => store.change(move |draft| change.make(draft)).boxed(),
        }
    }
}

fn digest(which: u64) -> Digest {
    Digest::of(format!("layer {which}").as_bytes())
}

/// A program, played.
struct Played {
    ops: Vec<Op>,
    /// What the database holds after so many changes.
    states: Vec<Dump>,
    /// After how many operations so many changes were answered, or were queued.
    answered: Vec<usize>,
    queued: Vec<usize>,
}

fn play(seed: u64) -> Played {
    let mut random = Random::new(seed);
    let changes: Vec<Change> = (0..CHANGES).map(|_| Change::any(&mut random)).collect();
    // One after the other, for what they make of the database.
    let store = Tape::default().open().unwrap();
    let mut states = vec![dump(&store)];
    for change in &changes {
        wait(change.queue(&store)).unwrap();
        states.push(dump(&store));
    }
    drop(store);
    // And as they come, several in one commit.
    let tape = Tape::default();
    let store = tape.open().unwrap();
    let (mut answered, mut queued) = (vec![tape.len()], vec![0]);
    let mut left = changes.as_slice();
    while !left.is_empty() {
        let (now, later) = left.split_at((1 + random.below(TOGETHER) as usize).min(left.len()));
        queued.extend(now.iter().map(|_| tape.len()));
        let all = futures::future::join_all(now.iter().map(|change| change.queue(&store)));
        assert!(wait(all).iter().all(Result::is_ok));
        answered.extend(now.iter().map(|_| tape.len()));
        left = later;
    }
    assert_eq!(dump(&store), *states.last().unwrap(), "seed {seed}: the same program");
    drop(store);
    let ops = std::mem::take(&mut tape.0.lock().unwrap().ops);
    Played {
        ops,
        states,
        answered,
        queued,
    }
}

/// Cuts the power at every operation of a program; how many disks were looked at.
fn cut_everywhere(seed: u64) -> usize {
    let played = play(seed);
    let mut random = Random::new(seed ^ 0xC07);
    let (mut synced, mut pending) = (Vec::new(), Vec::new());
    for (at, op) in played.ops.iter().enumerate() {
        match op {
            Op::Sync => {
                synced = disk(&synced, &pending, Cut::Process, &mut random);
                pending.clear();
            }
            op => pending.push(op.clone()),
        }
        let done = at + 1;
        let cut = CUTS[random.below(CUTS.len() as u64) as usize];
        let what = format!(
            "LAZULI_SEED={seed}, after {done} of {} operations, {cut:?}",
            played.ops.len()
        );
        let tape = Tape::of(disk(&synced, &pending, cut, &mut random));
        let store = tape.open().unwrap_or_else(|error| panic!("{what}: {error}"));
        let found = dump(&store);
        // The first count is of the changes that were made before any was.
        let sure = played.answered.iter().filter(|count| **count <= done).count().max(1) - 1;
        let maybe = played.queued.iter().filter(|count| **count < done).count().max(1) - 1;
        let allowed = &played.states[sure..=maybe.max(sure)];
        assert!(
            allowed.contains(&found),
            "{what}: the database holds neither what {sure} changes made of it nor what up to {maybe} did"
        );
        if random.below(USED_AGAIN) == 0 {
            store.put_image(&image("afterwards", &[b"layer"])).unwrap();
            let before = dump(&store);
            drop(store);
            let again = tape.open().unwrap_or_else(|error| panic!("{what}, once more: {error}"));
            assert_eq!(dump(&again), before, "{what}, once more");
        }
    }
    played.ops.len()
}

/// For how long random programs are looked at; none unless it is asked for.
fn minutes() -> Option<Duration> {
    let minutes: u64 = std::env::var("LAZULI_FAULT_MINUTES").ok()?.parse().expect("a number");
    Some(Duration::from_secs(60 * minutes))
}

#[test]
fn what_was_answered_survives_a_power_cut_at_every_write() {
    let seed = std::env::var("LAZULI_SEED")
        .ok()
        .map(|seed| seed.parse().expect("a number"));
    let disks = cut_everywhere(seed.unwrap_or(SEED));
    assert!(disks as u64 > 3 * CHANGES, "only {disks} operations");
    let Some(minutes) = minutes().filter(|_| seed.is_none()) else {
        return;
    };
    let (begun, mut programs) = (Instant::now(), 0);
    while begun.elapsed() < minutes {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        cut_everywhere(now.as_nanos() as u64 % 1_000_000_000_000);
        programs += 1;
    }
    eprintln!("{programs} random programs");
}

/// A disk that takes nothing for a while: who asks meanwhile is told so, what was answered before stays, and everything goes on when the disk
/// does, in the same process.
#[test]
fn the_database_goes_on_when_the_disk_does() {
    /// Operations of the disk until it fails, at most: all those of a few commits.
    const GOOD: usize = 40;
    /// How many times it fails.
    const BAD: [usize; 3] = [1, 3, 40];
    for (good, bad) in (0..GOOD).flat_map(|good| BAD.map(|bad| (good, bad))) {
        let what = format!("{bad} failures after {good} operations");
        let tape = Tape::default();
        let store = tape.open().unwrap();
        let put = |key: &str| {
            let key = key.to_owned();
            store.write_snapshots(move |snapshots| {
                let id = snapshots.allocate_id()?;
                snapshots.put(&key, &snapshot(id, None))
            })
        };
        put("before").unwrap();
        tape.0.lock().unwrap().fails = Some((good, bad));
        let begun = Instant::now();
        let mut answers = Vec::new();
        // Until the disk has failed as often as it wants to, and well after.
        while tape.0.lock().unwrap().fails.is_some() || answers.len() < 10 {
            let key = format!("key {}", answers.len());
            answers.push((put(&key).is_ok(), key));
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}: it never goes on");
            // As often as it is tried.
            std::thread::sleep(super::super::backend::AGAIN / 2);
        }
        put("after").unwrap_or_else(|error| panic!("{what}: {error}"));
        for (answered, key) in &answers {
            let (record, chain) = (store.snapshot(key).unwrap(), store.chain(key).unwrap());
            assert!(record.is_some() || !answered, "{what}: {key} was answered");
            assert_eq!(record.is_some(), !chain.is_empty(), "{what}: {key} in memory");
        }
        assert!(store.snapshot("before").unwrap().is_some() && store.snapshot("after").unwrap().is_some());
        let before = dump(&store);
        drop(store);
        assert_eq!(dump(&tape.open().unwrap()), before, "{what}: after a restart");
    }
}

/// Bytes of a database that are others than they were: it opens, or says that it does not; it never panics, and never hangs.
#[test]
fn damage_of_the_file_is_an_error() {
    const ROUNDS: u64 = 150;
    let tape = Tape::default();
    let store = tape.open().unwrap();
    let mut random = Random::new(SEED);
    for _ in 0..CHANGES {
        wait(Change::any(&mut random).queue(&store)).unwrap();
    }
    drop(store);
    let good = tape.0.lock().unwrap().bytes.clone();
    let mut refused = 0;
    for round in 0..ROUNDS {
        let mut bad = good.clone();
        let at = random.below(good.len() as u64) as usize / SECTOR * SECTOR;
        match random.below(4) {
            0 => bad.truncate(at),
            1 => bad[at..at + SECTOR].fill(0),
            2 => bad[at + random.below(SECTOR as u64) as usize] ^= 1 << random.below(8),
            // The head, which says where all else is.
            _ => bad[random.below(SECTOR as u64) as usize] ^= 1 << random.below(8),
        }
        match Tape::of(bad).open() {
            // What it says then may be an error as well, and is the record's alone.
            Ok(store) => drop((store.snapshots(), store.layers(), store.images(), store.chains())),
            Err(StoreError::Open { .. } | StoreError::Database(_) | StoreError::NewerSchema { .. }) => refused += 1,
            Err(error) => panic!("round {round}: {error}"),
        }
    }
    assert!(refused > 0);
}

/// A database of a node with many layers, whose process was killed: what the next start takes to open it. (It walks through all of it; redb's
/// quick repair would save that, for a second sync and more pages with each commit.)
#[test]
#[ignore = "it prints a figure: --nocapture"]
fn how_long_a_repair_takes() {
    const LAYERS: u64 = 1000;
    let dir = tempfile::tempdir().unwrap();
    let (killed, orderly) = (dir.path().join("killed"), dir.path().join("orderly"));
    let store = Store::open(&orderly).unwrap();
    for which in 0..LAYERS {
        wait(Change::Layer(which, 500).queue(&store)).unwrap();
        wait(Change::Put(which, which.saturating_sub(1)).queue(&store)).unwrap();
        wait(Change::Chain(which).queue(&store)).unwrap();
    }
    std::fs::copy(&orderly, &killed).unwrap();
    drop(store);
    for path in [orderly, killed] {
        let begun = Instant::now();
        let store = Store::open(&path).unwrap();
        let (took, len) = (begun.elapsed(), path.metadata().unwrap().len());
        eprintln!("{}: {took:?} for {len} bytes", path.display());
        assert_eq!(store.layers().unwrap().len() as u64, LAYERS);
    }
}
