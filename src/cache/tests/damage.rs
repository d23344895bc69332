//! What is damage, and what is only an error.

use std::io::{self, Read as _};

use rustix::io::Errno;

use super::*;
use crate::cache::error::is_damage;
use crate::cache::hold::MARKER;
use crate::cache::{Fault, Point};

const CHUNKS: usize = 4;

fn dir_of(root: &Path, layer: &str) -> std::path::PathBuf {
    root.join("layers").join(digest(layer).hex())
}

#[test]
fn an_error_that_says_nothing_of_the_disk_costs_no_layer() {
    for errno in [Errno::IO, Errno::UCLEAN, Errno::BADMSG, Errno::NOENT] {
        assert!(is_damage(&errno.into()), "{errno}");
    }
    let others = [
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOMEM,
        Errno::ACCESS,
        Errno::INTR,
        Errno::NOSPC,
        Errno::ROFS,
    ];
    for errno in others {
        assert!(!is_damage(&errno.into()), "{errno}");
        // Each of the files that are read when a layer is opened.
        for at in 0..3 {
            let root = tempfile::tempdir().unwrap();
            let cache = open(root.path(), 0);
            let cached = insert(&cache, "a", CHUNKS);
            fill(&cached, "a");
            cache.close();
            drop((cached, cache));
            let cache = open(root.path(), 0);
            let mut opened = 0;
            cache.fail_with(Box::new(move |point| {
                opened += usize::from(point == Point::Open);
                (point == Point::Open && opened == at + 1).then_some(Fault::Error(errno))
            }));
            assert!(cache.get(&digest("a")).is_err(), "{errno} of file {at}");
            let cached = cache.get(&digest("a")).unwrap().expect("it is still there");
            assert!(cached.is_complete(), "{errno} of file {at}: with all its bytes");
        }
    }
}

#[test]
fn what_the_disk_has_lost_is_as_good_as_not_there() {
    for (at, stays) in [(0, false), (1, false), (2, true)] {
        let root = tempfile::tempdir().unwrap();
        let cache = open(root.path(), 0);
        let cached = insert(&cache, "a", CHUNKS);
        fill(&cached, "a");
        cache.close();
        drop((cached, cache));
        let cache = open(root.path(), 0);
        let mut opened = 0;
        cache.fail_with(Box::new(move |point| {
            opened += usize::from(point == Point::Open);
            (point == Point::Open && opened == at + 1).then_some(Fault::Error(Errno::IO))
        }));
        // Of a map, only that nobody knows any more which bytes are there.
        let found = cache.get(&digest("a")).unwrap();
        assert_eq!(found.is_some(), stays, "file {at}");
        assert!(found.is_none_or(|cached| cached.present_bytes() == 0));
        assert_eq!(dir_of(root.path(), "a").exists(), stays, "it is moved away");
        let cached = insert(&cache, "a", CHUNKS);
        fill(&cached, "a");
        assert!((0..CHUNKS).all(|chunk| holds(&cached, "a", chunk)));
    }
}

/// A file that was mounted is never changed in place; if it cannot be told whether it was, it was.
#[test]
fn a_mark_that_cannot_be_read_is_a_mark() {
    let root = tempfile::tempdir().unwrap();
    let cache = open(root.path(), 0);
    let cached = insert(&cache, "a", CHUNKS);
    fill(&cached, "a");
    cache.close();
    drop((cached, cache));
    // A read of it is an error, other than that there is none.
    fs::create_dir(dir_of(root.path(), "a").join(MARKER)).unwrap();
    let mut mounted = fs::File::open(dir_of(root.path(), "a").join("data")).unwrap();
    let mut before = Vec::new();
    mounted.read_to_end(&mut before).unwrap();
    let cache = open(root.path(), 0);
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    cached.evict_all();
    let mut after = vec![0; before.len()];
    mounted.read_exact_at(&mut after, 0).unwrap();
    assert!(before == after, "what is mounted reads zeros");
}

/// A directory that could not be moved away when its layer was given up stands in nobody's way.
#[test]
fn what_is_left_of_a_layer_gives_way_to_the_next_one() {
    let root = tempfile::tempdir().unwrap();
    let cache = open(root.path(), 0);
    let left = dir_of(root.path(), "a");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("data"), "of somebody else").unwrap();
    let cached = insert(&cache, "a", CHUNKS);
    fill(&cached, "a");
    assert!((0..CHUNKS).all(|chunk| holds(&cached, "a", chunk)));
}

/// What an earlier process was making goes, and the directory for it stays: a full disk may have no room for another one.
#[test]
fn what_was_in_the_making_goes_without_a_new_directory() {
    use std::os::unix::fs::MetadataExt as _;
    let root = tempfile::tempdir().unwrap();
    let cache = open(root.path(), 0);
    let incoming = root.path().join("layers/.incoming");
    let inode = |path: &Path| -> io::Result<u64> { Ok(fs::metadata(path)?.ino()) };
    let before = inode(&incoming).unwrap();
    std::mem::forget(cache.stage(&digest("a")).unwrap());
    // As if the process had died: the lock goes with it, and nothing else.
    fs::create_dir(incoming.join("more")).unwrap();
    fs::remove_file(root.path().join("layers/.lock")).unwrap();
    let next = open(root.path(), 0);
    assert_eq!(inode(&incoming).unwrap(), before);
    assert_eq!(fs::read_dir(&incoming).unwrap().count(), 0);
    drop((next, cache));
}
