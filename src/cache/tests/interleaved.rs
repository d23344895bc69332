//! The ready map between those who read, store, verify, evict, distrust, seal and hold, in many orders: see [`crate::sync::primitives`].
//!
//! In all of them whoever gets bytes gets the right ones, and in the end what is counted is what there is, and the map on disk says nothing that is
//! not so.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;

use super::{bytes, digest, fill, holds, insert, open, restores};
use crate::cache::map::decode;
use crate::cache::{CachedLayer, Stored};
use crate::sync::primitives::explore;

const LAYER: &str = "layer";
const CHUNKS: usize = 3;

fn any() -> usize {
    thread_rng().gen_range(0..CHUNKS)
}

/// What each thread does over and over.
type Work = fn(&CachedLayer);

fn reads(cached: &CachedLayer) {
    holds(cached, LAYER, any());
}

fn restoring(cached: &CachedLayer) {
    restores(cached, LAYER, any());
}

fn stores(cached: &CachedLayer) {
    let chunk = any();
    assert_eq!(cached.store(chunk, &bytes(LAYER, chunk)).unwrap(), Stored::Cached);
}

fn evicts(cached: &CachedLayer) {
    cached.evict_all();
}

fn checks(cached: &CachedLayer) {
    let checked = cached.check_all(|| false);
    assert_eq!(checked.damaged, Vec::<usize>::new(), "nothing is damaged");
}

fn seals(cached: &CachedLayer) {
    cached.seal().unwrap();
}

/// Counts, bits and the map on disk agree.
fn agrees(cached: &CachedLayer) {
    let ready = (0..CHUNKS).filter(|&chunk| cached.ready.get(chunk));
    let present = (0..CHUNKS).filter(|&chunk| cached.ready.get(chunk) || cached.suspect.get(chunk));
    assert_eq!(cached.unready.load(Ordering::SeqCst), CHUNKS - ready.count());
    assert_eq!(cached.present_bytes(), (present.count() * super::CHUNK) as u64);
    let map = std::fs::read(cached.dir.join("map")).unwrap();
    let saved = decode(&map, CHUNKS, &cached.id).unwrap();
    assert_eq!(saved.words[0], cached.ready.word(0) | cached.suspect.word(0));
    assert!(!saved.sealed || cached.suspect.ones().next().is_none());
    for chunk in 0..CHUNKS {
        assert!(
            !cached.ready.get(chunk) || holds(cached, LAYER, chunk),
            "{chunk} is ready"
        );
        assert!(
            !cached.checked.get(chunk) || cached.ready.get(chunk),
            "{chunk} may be mounted"
        );
    }
}

/// Runs these side by side over a layer, of which all is there, or nothing.
fn together(is_full: bool, works: &'static [Work]) {
    explore(move || {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 0);
        let cached = insert(&cache, LAYER, CHUNKS);
        if is_full {
            fill(&cached, LAYER);
        }
        let threads: Vec<_> = works
            .iter()
            .map(|work| {
                let cached = Arc::clone(&cached);
                thread::spawn(move || (0..2).for_each(|_| work(&cached)))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        agrees(&cached);
    });
}

#[test]
fn interleaved_readers_meet_evictions() {
    together(true, &[reads, restoring, evicts, reads]);
}

#[test]
fn interleaved_stores_meet_evictions_and_readers() {
    together(false, &[stores, stores, evicts, reads, restoring]);
}

#[test]
fn interleaved_seals_and_checks_meet_changes() {
    together(true, &[seals, stores, evicts, checks, reads]);
}

/// What an earlier process left is verified by many at once.
#[test]
fn interleaved_verifications_meet_stores_and_evictions() {
    explore(|| {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 0);
        fill(&insert(&cache, LAYER, CHUNKS), LAYER);
        // As after a crash: nothing was sealed.
        drop(cache);
        let cache = open(dir.path(), 0);
        let cached = cache.get(&digest(LAYER)).unwrap().unwrap();
        assert!(cached.suspect.get(0), "it is to be verified");
        let works: [Work; 5] = [reads, restoring, stores, checks, evicts];
        let threads: Vec<_> = works
            .into_iter()
            .map(|work| {
                let cached = Arc::clone(&cached);
                thread::spawn(move || work(&cached))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        agrees(&cached);
    });
}
