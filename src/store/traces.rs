//! Traces: what starts have read, by repository, image and entry point. Keys are three digests (of the repository's name, the manifest, the
//! entry point), so that the traces of a repository lie side by side; values are the time of the last start (seconds since the epoch, 8 bytes,
//! little-endian) and the trace ([`crate::layer::trace`]).
//!
//! A trace that cannot be read is none: the next start makes another.
//!
//! Traces outlive their image, so that the next image of the repository can use them: [`Store::forget_traces`].

use std::collections::{HashMap, HashSet};

use redb::{ReadableTable as _, TableDefinition, WriteTransaction};

use super::draft::{Draft, table};
use super::{Store, StoreError};
use crate::layer::Digest;
use crate::layer::trace::Trace;

const TABLE: &str = "traces";
const TRACES: TableDefinition<&[u8], &[u8]> = TableDefinition::new(TABLE);

table!(Traces, TRACES, Some, Some, <[u8]>::to_vec);

/// Bytes of the time before a trace.
const TIME_LEN: usize = 8;
/// How long the traces of an image stay that is gone, in seconds: a release may be a month old when the next one comes.
const KEEP: u64 = 30 * 24 * 3600;
/// Of how many images of a repository that are gone traces stay: the next one is made like the last.
const GONE_MAX: usize = 3;
/// Most entry points of one image: containers whose arguments differ each time would be without end.
pub const ENTRIES_MAX: usize = 8;
/// Most traces at all. Each has some ten kilobytes.
const TRACES_MAX: usize = 2048;
/// Most bytes of all traces together: what a container reads is its own choice, and a trace of it may be a hundred times as long as others.
const BYTES_MAX: usize = 64 << 20;

fn prefix(repository: &str) -> Vec<u8> {
    Digest::of(repository.as_bytes()).as_bytes().to_vec()
}

fn key(repository: &str, manifest: &Digest, entry: &Digest) -> Vec<u8> {
    [
        prefix(repository),
        manifest.as_bytes().to_vec(),
        entry.as_bytes().to_vec(),
    ]
    .concat()
}

/// The time and the trace in a value.
fn split(value: &[u8]) -> Option<(u64, &[u8])> {
    let (time, trace) = value.split_first_chunk::<TIME_LEN>()?;
    Some((u64::from_le_bytes(*time), trace))
}

/// The trace of a key; `None`, and a line in the log, if it cannot be read, or is another's.
fn decode(found: &[u8], value: &[u8]) -> Option<Trace> {
    let trace = match Trace::decode(split(value)?.1) {
        Ok(trace) => trace,
        Err(error) => {
            tracing::warn!(%error, "a trace is damaged and not used");
            return None;
        }
    };
    let own = key(&trace.repository, &trace.manifest, &trace.entry.id);
    (own == found).then_some(trace)
}

pub(super) fn create_tables(transaction: &WriteTransaction) -> Result<(), StoreError> {
    transaction.open_table(TRACES)?;
    Ok(())
}

impl Store {
    /// The trace of an image of a repository with one entry point.
    ///
    /// # Errors
    /// An error of the database.
    pub fn trace(&self, repository: &str, manifest: &Digest, entry: &Digest) -> Result<Option<Trace>, StoreError> {
        let key = key(repository, manifest, entry);
        let table = self.read()?.open_table(TRACES)?;
        let value = table.get(key.as_slice())?;
        Ok(value.and_then(|value| decode(&key, value.value())))
    }

    /// Gives all traces, or those of a repository, to `take`, one after the other: each may take megabytes.
    ///
    /// # Errors
    /// An error of the database.
    pub fn each_trace(&self, repository: Option<&str>, mut take: impl FnMut(Trace)) -> Result<(), StoreError> {
        let prefix = repository.map(prefix).unwrap_or_default();
        let table = self.read()?.open_table(TRACES)?;
        for entry in table.range(prefix.as_slice()..)? {
            let (key, value) = entry?;
            if !key.value().starts_with(&prefix) {
                break;
            }
            if let Some(trace) = decode(key.value(), value.value()) {
                take(trace);
            }
        }
        Ok(())
    }

    /// Forgets traces, as of `now` (seconds since the epoch): of images without a record those that are old, or of more than a few images of
    /// one repository; the oldest of one image, if it has too many; and the oldest of all. How many that were.
    ///
    /// # Errors
    /// An error of the database; nothing is forgotten then.
    pub fn forget_traces(&self, now: u64) -> Result<usize, StoreError> {
        let images: HashSet<Digest> = self.images()?.into_iter().map(|(manifest, _)| manifest).collect();
        let mut known = Vec::new();
        {
            let table = self.read()?.open_table(TRACES)?;
            for entry in table.iter()? {
                let (key, value) = entry?;
                let time = split(value.value()).map_or(0, |(time, _)| time);
                known.push((time, key.value().to_vec(), value.value().len()));
            }
        }
        let unneeded = unneeded(known, &images, now);
        if unneeded.is_empty() {
            return Ok(0);
        }
        self.write(move |draft| {
            for key in &unneeded {
                draft.write::<Traces>(key, None)?;
            }
            Ok(unneeded.len())
        })
    }

    /// Takes away the traces of an image, or of all of a repository; how many that were.
    ///
    /// # Errors
    /// An error of the database; nothing is taken away then.
    pub fn remove_traces(&self, repository: &str, manifest: Option<&Digest>) -> Result<usize, StoreError> {
        let mut prefix = prefix(repository);
        prefix.extend(manifest.iter().flat_map(|manifest| *manifest.as_bytes()));
        let mut keys = Vec::new();
        {
            let table = self.read()?.open_table(TRACES)?;
            for entry in table.range(prefix.as_slice()..)? {
                let key = entry?.0.value().to_vec();
                if !key.starts_with(&prefix) {
                    break;
                }
                keys.push(key);
            }
        }
        self.write(move |draft| {
            for key in &keys {
                draft.write::<Traces>(key, None)?;
            }
            Ok(keys.len())
        })
    }
}

/// Which of these traces (time, key, bytes) go.
fn unneeded(mut known: Vec<(u64, Vec<u8>, usize)>, images: &HashSet<Digest>, now: u64) -> Vec<Vec<u8>> {
    known.sort_by(|a, b| b.cmp(a));
    // By repository, images that are gone, the youngest first; and by image how many traces it has.
    let mut gone: HashMap<Vec<u8>, Vec<Digest>> = HashMap::new();
    let mut entries: HashMap<Vec<u8>, usize> = HashMap::new();
    let (mut kept, mut kept_bytes) = (0, 0usize);
    let mut unneeded = Vec::new();
    for (time, key, bytes) in known {
        let parts = key
            .split_first_chunk::<{ Digest::LEN }>()
            .and_then(|(repository, rest)| Some((repository, rest.first_chunk::<{ Digest::LEN }>()?)));
        let stays = parts.is_some_and(|(repository, manifest)| {
            let manifest = Digest::from_bytes(*manifest);
            if !images.contains(&manifest) {
                let gone = gone.entry(repository.to_vec()).or_default();
                if !gone.contains(&manifest) {
                    gone.push(manifest);
                }
                let place = gone.iter().position(|other| *other == manifest);
                if time.saturating_add(KEEP) < now || place.is_none_or(|place| place >= GONE_MAX) {
                    return false;
                }
            }
            let entries = entries.entry(key[..2 * Digest::LEN].to_vec()).or_default();
            *entries += 1;
            *entries <= ENTRIES_MAX && kept < TRACES_MAX && kept_bytes.saturating_add(bytes) <= BYTES_MAX
        });
        match stays {
            true => {
                kept += 1;
                kept_bytes += bytes;
            }
            false => unneeded.push(key),
        }
    }
    unneeded
}

impl Draft<'_> {
    /// Keeps a trace, in the place of an earlier one.
    ///
    /// # Errors
    /// An error of the database.
    pub fn put_trace(&self, trace: &Trace) -> Result<(), StoreError> {
        let key = key(&trace.repository, &trace.manifest, &trace.entry.id);
        let value = [&trace.recorded.to_le_bytes()[..], &trace.encode()].concat();
        self.write::<Traces>(&key, Some(value)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::trace::{Entry, File, Wish};

    fn trace(repository: &str, manifest: &str, program: &str, recorded: u64) -> Trace {
        Trace {
            repository: repository.to_owned(),
            manifest: Digest::of(manifest.as_bytes()),
            entry: Entry::of(&[program.to_owned()]),
            starts: 1,
            recorded,
            layers: vec![Digest::of(b"layer")],
            files: vec![File {
                layer: 0,
                path: "bin/x".to_owned(),
                size: 10,
                content: None,
            }],
            wishes: vec![Wish {
                file: 0,
                offset: 1,
                len: 9,
                at: 5,
                missed: 0,
            }],
        }
    }

    fn put(store: &Store, trace: &Trace) {
        let trace = trace.clone();
        store.write(move |draft| draft.put_trace(&trace)).unwrap();
    }

    #[test]
    fn traces_come_back_by_image_and_entry_point() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let (a, b) = (trace("r/app", "1", "a", 7), trace("r/app", "1", "b", 8));
        let other = trace("r/other", "1", "a", 9);
        let store = Store::open(&path).unwrap();
        [&a, &b, &other].into_iter().for_each(|trace| put(&store, trace));
        drop(store);
        let store = Store::open(&path).unwrap();
        assert_eq!(store.trace("r/app", &a.manifest, &a.entry.id).unwrap(), Some(a.clone()));
        assert_eq!(store.trace("r/app", &a.manifest, &Digest::of(b"c")).unwrap(), None);
        let mut of = all(&store, Some("r/app"));
        of.sort_by_key(|trace| trace.recorded);
        assert_eq!(of, [a.clone(), b]);
        assert_eq!(all(&store, None).len(), 3);
        assert_eq!(store.remove_traces("r/app", Some(&Digest::of(b"2"))).unwrap(), 0);
        assert_eq!(store.remove_traces("r/app", Some(&a.manifest)).unwrap(), 2);
        assert_eq!(all(&store, None), [other]);
    }

    #[test]
    fn a_damaged_trace_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let (a, b) = (trace("r", "1", "a", 7), trace("r", "1", "b", 8));
        [&a, &b].into_iter().for_each(|trace| put(&store, trace));
        let place = key("r", &a.manifest, &a.entry.id);
        for value in [&b"{"[..], &[0; 100], &[]] {
            let (place, value) = (place.clone(), value.to_vec());
            store
                .write(move |draft| draft.write::<Traces>(&place, Some(value)).map(drop))
                .unwrap();
            assert_eq!(all(&store, Some("r")), std::slice::from_ref(&b));
        }
        // One that is right, in the place of another.
        let value = [&8u64.to_le_bytes()[..], &b.encode()].concat();
        store
            .write(move |draft| draft.write::<Traces>(&place, Some(value)).map(drop))
            .unwrap();
        assert_eq!(store.trace("r", &a.manifest, &a.entry.id).unwrap(), None);
    }

    fn all(store: &Store, repository: Option<&str>) -> Vec<Trace> {
        let mut traces = Vec::new();
        store.each_trace(repository, |trace| traces.push(trace)).unwrap();
        traces
    }

    #[test]
    fn long_traces_do_not_fill_the_disk() {
        let here = Digest::of(b"here");
        let keyed = |at: u8| key(&format!("r{at}"), &here, &Digest::of(b"entry"));
        let known = (0..8).map(|at| (u64::from(at), keyed(at), BYTES_MAX / 4));
        let went = unneeded(known.collect(), &HashSet::from([here]), 10);
        assert_eq!(went, [3, 2, 1, 0].map(keyed), "the oldest ones");
    }

    #[test]
    fn traces_of_images_that_are_gone_go_later() {
        let here = Digest::of(b"here");
        let keyed = |repository: &str, manifest: &Digest, entry: u8| key(repository, manifest, &Digest::of(&[entry]));
        let gone = |at: u8| Digest::of(&[at]);
        let old = (1, keyed("r", &here, 0), 1);
        assert!(unneeded(vec![old], &HashSet::from([here]), 10 * KEEP).is_empty());
        let images: Vec<_> = (0..5)
            .map(|at| (100 + u64::from(at), keyed("r", &gone(at), 0), 1))
            .collect();
        let second = (100, keyed("r", &gone(4), 1), 1);
        let mut known = images.clone();
        known.push(second.clone());
        let went = unneeded(known.clone(), &HashSet::new(), 200);
        assert_eq!(went, [images[1].1.clone(), images[0].1.clone()]);
        let mut all: Vec<_> = unneeded(known, &HashSet::new(), 200 + KEEP);
        all.sort();
        let mut expected: Vec<_> = images.into_iter().chain([second]).map(|(_, key, _)| key).collect();
        expected.sort();
        assert_eq!(all, expected);
        let many = (0..10).map(|at| (u64::from(at), keyed("r", &here, at), 1));
        let went = unneeded(many.collect(), &HashSet::from([here]), 1);
        assert_eq!(went, [keyed("r", &here, 1), keyed("r", &here, 0)]);
        assert_eq!(unneeded(vec![(1, b"short".to_vec(), 1)], &HashSet::new(), 1).len(), 1);
    }
}
