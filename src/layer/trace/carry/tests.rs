//! Layers are made of tables of contents, as eStargz has them.

use proptest::prelude::*;
use serde_json::json;

use super::super::tests::{clear, digest, wish, wishes};
use super::*;
use crate::layer::toc::{self, Dialect};
use crate::layer::trace::{Entry, Looked, Seen, Sight, observe};
use crate::layer::{Access, Codec, Ino};

/// Bytes of a chunk.
const CHUNK: u64 = 1000;

/// A layer with these files: path, size, and what is in it. It is the same in two files of a size if that text is.
fn layer(files: &[(&str, u64, &str)]) -> LayerIndex {
    layer_with(files, &[])
}

/// The same, with hard links: path and what it is linked to.
fn layer_with(files: &[(&str, u64, &str)], links: &[(&str, &str)]) -> LayerIndex {
    let mut entries = Vec::new();
    let mut blob = 0;
    for (path, size, content) in files {
        // An empty file has an entry, too.
        for offset in (0..(*size).max(1)).step_by(CHUNK as usize) {
            let len = CHUNK.min(size - offset);
            let kind = if offset == 0 { "reg" } else { "chunk" };
            entries.push(json!({
                "name": path, "type": kind, "size": if offset == 0 { *size } else { 0 }, "offset": blob, "mode": 0o644,
                "chunkOffset": offset, "chunkSize": if len == *size { 0 } else { len },
                "chunkDigest": Digest::of(format!("{content} {offset} {len}").as_bytes()).to_string(),
            }));
            blob += len;
        }
    }
    for (path, target) in links {
        entries.push(json!({ "name": path, "type": "hardlink", "linkName": target }));
    }
    let table = json!({ "version": 1, "entries": entries }).to_string();
    let dialect = Dialect {
        codec: Codec::Gzip,
        stargz: true,
    };
    let index = toc::index(table.as_bytes(), &dialect, blob, blob, u64::MAX)
        .unwrap()
        .index;
    assert_eq!(index.access(), Access::Ranges);
    index
}

fn inode(names: &LayerIndex, path: &str) -> crate::layer::Inode {
    let ino: Ino = names
        .lookup_path(path.as_bytes())
        .unwrap_or_else(|| panic!("{path} is there"));
    *names.inode(ino).unwrap()
}

fn content(names: &LayerIndex, path: &str) -> Option<Content> {
    Contents::of(names).get(&inode(names, path))
}

/// What a start reads of the layer `old`: path, offset and length.
fn trace(names: &LayerIndex, reads: &[(&str, u64, u64)]) -> Trace {
    let looked = Looked {
        digest: digest("old"),
        sight: Sight::Clear,
        names: Some(names),
    };
    let seen: Vec<Seen> = (0..)
        .zip(reads)
        .map(|(at, (path, offset, len))| Seen {
            layer: 0,
            offset: inode(names, path).data + offset,
            len: *len,
            at,
        })
        .collect();
    let entry = Entry::of(&["/bin/app".to_owned()]);
    observe(("r/app", digest("m1"), entry), 7, &[looked], &seen)
}

/// What is wished of an image with the layers `new0`, `new1` and so on, the lowest first: at once, and when all have come.
struct Wished {
    at_once: Vec<(String, u64, u64)>,
    later: Vec<(String, u64, u64)>,
    counts: Counts,
    moved: Trace,
}

fn carried(trace: &Trace, layers: &[&LayerIndex]) -> Wished {
    let order: Vec<usize> = (0..layers.len()).collect();
    carried_in(trace, layers, &order)
}

/// The same, if the layers come in this order.
fn carried_in(trace: &Trace, layers: &[&LayerIndex], order: &[usize]) -> Wished {
    let name = |at: usize| digest(&format!("new{at}"));
    let image: HashSet<Digest> = (0..layers.len()).map(name).collect();
    let mut carried = Carried::new(Arc::new(trace.clone()), Arc::new(image.clone()));
    let mut found = Vec::new();
    for &at in order {
        let placed = carried.take(at, trace.found_in(&name(at), layers[at], &image));
        found.push((at, placed));
    }
    let (rest, counts) = carried.rest();
    // Each is where its path is.
    for (at, placed) in found.iter().chain(&rest) {
        for place in placed {
            let inode = inode(layers[*at], &path(trace, place));
            assert_eq!((place.data, place.size), (inode.data + place.offset, inode.size));
            assert!(place.len > 0 && place.offset + place.len <= place.size);
        }
    }
    let shown = |found: &[(usize, Vec<Placed>)]| -> Vec<(String, u64, u64)> {
        let of = |(at, placed): &(usize, Vec<Placed>)| {
            let shown = |place: &Placed| (format!("{at}:{}", path(trace, place)), place.offset, place.len);
            placed.iter().map(shown).collect::<Vec<_>>()
        };
        found.iter().flat_map(of).collect()
    };
    let (at_once, later) = (shown(&found), shown(&rest));
    found.extend(rest);
    let found: Vec<_> = found.into_iter().map(|(at, placed)| (name(at), placed)).collect();
    let moved = trace.moved(digest("m2"), &found);
    Wished {
        at_once,
        later,
        counts,
        moved: Trace::decode(&moved.encode()).expect("what is carried is a trace"),
    }
}

fn path(trace: &Trace, place: &Placed) -> String {
    let file = &trace.files[trace.wishes[place.wish].file as usize];
    place.path.as_deref().unwrap_or(&file.path).to_owned()
}

fn part(path: &str, offset: u64, len: u64) -> (String, u64, u64) {
    (path.to_owned(), offset, len)
}

fn counts(same: u64, changed: u64, moved: u64, gone: u64) -> Counts {
    Counts {
        same,
        changed,
        moved,
        gone,
    }
}

#[test]
fn the_content_of_a_file_is_known_from_its_chunks() {
    let one = layer(&[
        ("a", 900, "x"),
        ("b", 900, "y"),
        ("c", 2500, "x"),
        ("d", 2500, "y"),
        ("e", 0, ""),
    ]);
    let other = layer(&[("more", 3000, "z"), ("sub/c", 2500, "x"), ("a", 900, "x")]);
    // One chunk: what sha256sum says.
    assert_eq!(content(&one, "a"), Some(Content::of(&Digest::of(b"x 0 900"))));
    assert_eq!(content(&one, "a"), content(&other, "a"));
    assert_ne!(content(&one, "a"), content(&one, "b"));
    // Several.
    assert!(content(&one, "c").is_some());
    assert_eq!(content(&one, "c"), content(&other, "sub/c"));
    assert_ne!(content(&one, "c"), content(&one, "d"));
    assert_eq!(content(&one, "e"), None);
    // A chunk that holds more than the file says nothing of it, nor does the digest of compressed bytes.
    let mut parts = one.parts().clone();
    let at = parts.inodes.iter().position(|i| i.is_reg() && i.size == 900).unwrap();
    parts.inodes[at].size = 899;
    let (ino, cut) = (at as Ino + 1, LayerIndex::new(parts).unwrap());
    assert_eq!(Contents::of(&cut).get(cut.inode(ino).unwrap()), None);
    let trace = trace(&one, &[("c", 0, 10)]);
    assert_eq!(trace.files[0].content, content(&one, "c"));
}

/// Names of one file without end cost no more than the layer is large.
#[test]
fn files_that_share_their_chunks_are_not_looked_at_without_end() {
    let names = layer(&[("a", 1000 * CHUNK, "x")]);
    let file = inode(&names, "a");
    let mut contents = Contents::of(&names);
    let known = (0..1000).filter(|_| contents.get(&file).is_some()).count();
    assert!((1..4).contains(&known), "it was looked at {known} times");
}

/// A release in a directory of its own, and a library whose name says its version.
#[test]
fn what_was_renamed_is_found_by_its_content() {
    let old = layer(&[
        ("app/release-41/lib/one.js", 900, "one"),
        ("app/release-41/main.js", 3500, "main"),
        ("usr/lib/libfoo.so.1.2.3", 5000, "foo"),
        ("usr/share/gone", 800, "gone"),
    ]);
    let reads = [
        ("app/release-41/main.js", 0, 1000),
        ("usr/lib/libfoo.so.1.2.3", 2000, 1000),
        ("app/release-41/main.js", 3000, 500),
        ("app/release-41/lib/one.js", 0, 900),
        ("usr/share/gone", 0, 100),
    ];
    let trace = trace(&old, &reads);
    let new = layer(&[
        ("app/release-42/lib/one.js", 900, "one"),
        ("app/release-42/main.js", 3500, "main"),
        ("app/release-42/more.js", 3500, "more"),
        ("usr/lib/libfoo.so.1.2.4", 5000, "foo"),
    ]);
    let wished = carried(&trace, &[&new]);
    assert_eq!(wished.at_once, []);
    let expected = [
        part("0:app/release-42/main.js", 0, 1000),
        part("0:usr/lib/libfoo.so.1.2.4", 2000, 1000),
        part("0:app/release-42/main.js", 3000, 500),
        part("0:app/release-42/lib/one.js", 0, 900),
    ];
    assert_eq!(wished.later, expected);
    assert_eq!(wished.counts, counts(0, 0, 3, 1));
    // And it is known of the new image, so that the next one is found from there.
    let moved = wished.moved;
    let expected = [
        wish("app/release-42/main.js", 0, 1000, 0),
        wish("usr/lib/libfoo.so.1.2.4", 2000, 1000, 0),
        wish("app/release-42/main.js", 3000, 500, 0),
        wish("app/release-42/lib/one.js", 0, 900, 0),
    ];
    assert_eq!((wishes(&moved), moved.layers.len()), (expected.to_vec(), 1));
    for file in &moved.files {
        assert_eq!(file.content, content(&new, &file.path), "{}", file.path);
    }
    // Of a trace without contents nothing is found.
    let mut without = trace.clone();
    without.files.iter_mut().for_each(|file| file.content = None);
    assert_eq!(carried(&without, &[&new]).later, []);
}

/// A file of the same size is another one if its content is.
#[test]
fn the_same_size_is_not_the_same_file() {
    let old = layer(&[("a", 3000, "old"), ("b", 3000, "old"), ("c", 3000, "same")]);
    let reads = [
        ("a", 0, 900),
        ("a", 1000, 2000),
        ("b", 500, 1000),
        ("c", 0, 900),
        ("c", 1000, 2000),
    ];
    let new = layer(&[("a", 3000, "new"), ("b", 3000, "new"), ("c", 3000, "same")]);
    let wished = carried(&trace(&old, &reads), &[&new]);
    // Nearly all of `a` was read, and all of it is wished for; the others as before.
    let expected = [
        part("0:a", 0, 3000),
        part("0:b", 500, 1000),
        part("0:c", 0, 900),
        part("0:c", 1000, 2000),
    ];
    assert_eq!((wished.at_once, wished.later), (expected.to_vec(), Vec::new()));
    assert_eq!(wished.counts, counts(1, 2, 0, 0));
}

/// Whatever the order in which the layers come, a file that is at its path is not looked for elsewhere.
#[test]
fn no_layer_is_searched_for_what_another_has_at_its_path() {
    let old = layer(&[("opt/tool", 900, "tool"), ("opt/moved", 800, "moved")]);
    let trace = trace(&old, &[("opt/tool", 0, 900), ("opt/moved", 0, 800)]);
    let copies = layer(&[("copies/tool", 900, "tool"), ("srv/x", 800, "moved")]);
    let own = layer(&[("opt/tool", 900, "tool"), ("srv/moved", 800, "moved")]);
    for order in [[0, 1], [1, 0]] {
        let wished = carried_in(&trace, &[&copies, &own], &order);
        assert_eq!(wished.at_once, [part("1:opt/tool", 0, 900)]);
        // Of two, the one of the same name.
        assert_eq!(wished.later, [part("1:srv/moved", 0, 800)]);
        assert_eq!((wished.counts, wished.moved.files.len()), (counts(1, 0, 1, 0), 2));
    }
    // A layer that both images have needs no search: what was read of it is found there.
    let image = clear(&["old", "new0"]);
    let found = trace.found_in(&digest("new0"), &copies, &image);
    assert_eq!((found.placed.len(), found.elsewhere.len()), (0, 0));
    let found = trace.found_in(&digest("old"), &old, &image);
    assert_eq!((found.placed.len(), found.elsewhere.len()), (2, 0));
}

/// A path that is there is what will be opened.
#[test]
fn a_path_with_another_content_is_followed_to_a_namesake_alone() {
    let old = layer(&[("bin/python3", 900, "3.11"), ("a/lib.so", 800, "lib")]);
    let trace = trace(&old, &[("bin/python3", 0, 400), ("a/lib.so", 0, 400)]);
    let new = layer(&[
        ("a/lib.so", 800, "other"),
        ("b/lib.so", 800, "lib"),
        ("bin/python3", 900, "3.12"),
        ("bin/python3.11", 900, "3.11"),
    ]);
    let wished = carried(&trace, &[&new]);
    assert_eq!(
        wished.at_once,
        [part("0:bin/python3", 0, 400), part("0:a/lib.so", 0, 400)]
    );
    assert_eq!(wished.later, [part("0:b/lib.so", 0, 400)]);
    assert_eq!(wished.counts, counts(0, 1, 1, 0));
}

#[test]
fn of_two_layers_with_a_path_the_upper_one_is_seen() {
    let old = layer(&[("etc/conf", 900, "old")]);
    let trace = trace(&old, &[("etc/conf", 0, 900)]);
    let (low, high) = (layer(&[("etc/conf", 900, "low")]), layer(&[("etc/conf", 700, "high")]));
    let upper = [part("1:etc/conf", 0, 700)];
    assert_eq!(carried_in(&trace, &[&low, &high], &[1, 0]).at_once, upper);
    // What has come is not waited for.
    let both = carried_in(&trace, &[&low, &high], &[0, 1]).at_once;
    assert_eq!(both, [part("0:etc/conf", 0, 900), upper[0].clone()]);
}

/// The same content under many names.
#[test]
fn each_of_many_alike_finds_its_own_and_no_more() {
    let names: Vec<String> = (0..40)
        .map(|at| format!("lib/python3.11/pkg{at}/__init__.py"))
        .collect();
    let files: Vec<(&str, u64, &str)> = names.iter().map(|name| (name.as_str(), 300, "import")).collect();
    let reads: Vec<(&str, u64, u64)> = names.iter().map(|name| (name.as_str(), 0, 300)).collect();
    let trace = trace(&layer(&files), &reads);
    // Each in its own package, though all are the same, and others besides.
    let others: Vec<String> = (0..4000).map(|at| format!("licences/{at}")).collect();
    let renamed: Vec<String> = names.iter().map(|name| name.replace("3.11", "3.12")).collect();
    let files = renamed.iter().chain(&others);
    let files: Vec<(&str, u64, &str)> = files.map(|name| (name.as_str(), 300, "import")).collect();
    let wished = carried(&trace, &[&layer(&files)]);
    let expected: Vec<_> = renamed.iter().map(|name| part(&format!("0:{name}"), 0, 300)).collect();
    assert_eq!(wished.later, expected);
    // Where there is only one of them, under whatever name or names, it is wished for once.
    let one = layer_with(
        &[("licences/1", 300, "import")],
        &[("licences/2", "licences/1"), ("pkg7/__init__.py", "licences/1")],
    );
    let wished = carried(&trace, &[&one]);
    assert_eq!(wished.later, [part("0:pkg7/__init__.py", 0, 300)]);
    assert_eq!(wished.counts, counts(0, 0, 1, 39));
    // What is at its path leaves nothing to be found under other names of it.
    let kept = layer_with(
        &[(&names[3], 300, "import")],
        &[("pkg7/__init__.py", names[3].as_str())],
    );
    let wished = carried(&trace, &[&kept]);
    assert_eq!((wished.at_once.len(), wished.later), (1, Vec::new()));
}

/// A path that no program can name is not wished for, and what lies beside it is found.
#[test]
fn paths_have_an_end() {
    let trace = trace(
        &layer(&[("a/x", 900, "x"), ("a/y", 900, "y")]),
        &[("a/x", 0, 900), ("a/y", 0, 900)],
    );
    let below = |dirs: usize| "d/".repeat(dirs);
    let (x, y) = (format!("{}x", below(21)), format!("{}y", below(20)));
    // No tar and no table has such a path; an index that is shared may.
    let mut parts = layer(&[(&x, 900, "x"), (&y, 900, "y")]).parts().clone();
    let long = "d".repeat(200);
    for at in 0..parts.dirents.len() {
        let entry = &mut parts.dirents[at];
        if parts.inodes[entry.ino as usize - 1].is_dir() {
            (entry.name, entry.name_len) = (parts.strings.len() as u32, long.len() as u32);
            parts.strings.extend_from_slice(long.as_bytes());
        }
    }
    let wished = carried(&trace, &[&LayerIndex::new(parts).unwrap()]);
    let y = y.replace('d', &long);
    assert_eq!(wished.later, [part(&format!("0:{y}"), 0, 900)]);
    assert_eq!(wished.counts, counts(0, 0, 1, 1));
}

/// A directory, a name, a size and what is in it: few enough of each that many files have something in common.
fn file() -> impl Strategy<Value = (String, u64, String)> {
    let name = (0..3u8, 0..3u8, 0..4u8).prop_map(|(top, dir, name)| format!("t{top}/d{dir}/f{name}"));
    (name, prop_oneof![Just(400u64), Just(2500)], 0..3u8).prop_map(|(name, size, of)| (name, size, format!("c{of}")))
}

fn made(files: &BTreeMap<String, (u64, String)>) -> LayerIndex {
    let files: Vec<_> = files
        .iter()
        .map(|(path, (size, content))| (path.as_str(), *size, content.as_str()))
        .collect();
    layer(&files)
}

fn files() -> impl Strategy<Value = BTreeMap<String, (u64, String)>> {
    proptest::collection::vec(file(), 0..14).prop_map(|files| {
        let pair = |(path, size, content)| (path, (size, content));
        files.into_iter().map(pair).collect()
    })
}

proptest! {
    /// Whatever is in the old image and in two layers of the new one: no place is wished for twice at its path and elsewhere, what is found by content has
    /// it, and what could be found is.
    #[test]
    fn what_is_found_is_what_was_read(old in files(), low in files(), high in files(), lowest_first in any::<bool>()) {
        let (old_layer, low_layer, high_layer) = (made(&old), made(&low), made(&high));
        let reads: Vec<_> = old.iter().map(|(path, (size, _))| (path.as_str(), 0, size / 2)).collect();
        let trace = trace(&old_layer, &reads);
        let order = if lowest_first { [0, 1] } else { [1, 0] };
        let wished = carried_in(&trace, &[&low_layer, &high_layer], &order);
        prop_assert_eq!(wished.at_once.len() + wished.later.len(), wished.moved.wishes.len());
        let image = [&low, &high];
        let mut places = HashSet::new();
        for (name, ..) in wished.at_once.iter().chain(&wished.later) {
            prop_assert!(places.insert(name.clone()), "{} twice", name);
        }
        let mut later = HashSet::new();
        for (name, ..) in &wished.later {
            let (layer, path) = name.split_once(':').unwrap();
            let holder = &image[layer.parse::<usize>().unwrap()][path];
            prop_assert!(old.values().any(|of| of == holder), "{} is nothing that was read", name);
            later.insert(holder);
        }
        // One that is nowhere at its path, but is somewhere, is found, unless that place is wished for by its own path. (Of several alike, one that is at
        // its path with another content may be the nearest to what is there.)
        let is_gone = |path: &String| image.iter().all(|layer| !layer.contains_key(path));
        for content in old.values() {
            let mut wanted = old.iter().filter(|(_, of)| *of == content);
            let holders = (0..2).flat_map(|at| image[at].iter().map(move |(path, of)| (at, path, of)));
            let is_seen = |at: usize, path: &String| at == 1 || !high.contains_key(path);
            let is_free = |at, path| is_seen(at, path) && !places.contains(&format!("{at}:{path}"));
            let mut free = holders.filter(|(at, path, of)| *of == content && is_free(*at, path));
            if wanted.all(|(path, _)| is_gone(path)) && free.next().is_some() {
                prop_assert!(later.contains(content), "{:?} is not found", content);
            }
        }
    }

    /// A tree that was renamed, whatever is in it, is found file by file.
    #[test]
    fn a_renamed_tree_is_found(old in files(), top in "[a-z]{1,8}") {
        let rename = |path: &str| path.replacen("t0/", &format!("{top}-2/"), 1);
        let new = old.iter().map(|(path, file)| (rename(path), file.clone())).collect();
        let reads: Vec<_> = old.iter().map(|(path, (size, _))| (path.as_str(), 0, *size)).collect();
        let wished = carried(&trace(&made(&old), &reads), &[&made(&new)]);
        let mut found: Vec<_> = wished.at_once.into_iter().chain(wished.later).map(|(name, ..)| name).collect();
        found.sort();
        let mut expected: Vec<_> = new.keys().map(|path| format!("0:{path}")).collect();
        expected.sort();
        prop_assert_eq!(found, expected);
    }
}
