use proptest::prelude::*;

use super::*;
use crate::layer::index::{Dirent, IndexParts, Inode, mode};
use crate::layer::{Access, Codec, LayerIndex, Verify};
use std::collections::HashSet;
use std::sync::Arc;

const MANIFEST: &[u8] = b"manifest";

/// A layer with these files in one directory `d`: name and size, one after the other, each from a multiple of 512 on.
fn layer(files: &[(&str, u64)]) -> LayerIndex {
    let dir = |parent, data, count| Inode {
        mode: mode::DIR,
        parent,
        data,
        count,
        ..Inode::default()
    };
    let mut inodes = vec![dir(1, 0, 1), dir(1, 1, files.len() as u32)];
    let mut strings = b"d".to_vec();
    let mut dirents = vec![Dirent {
        name: 0,
        name_len: 1,
        ino: 2,
    }];
    let mut data = 512;
    for (name, size) in files {
        inodes.push(Inode {
            mode: mode::REG,
            size: *size,
            data,
            ..Inode::default()
        });
        dirents.push(Dirent {
            name: strings.len() as u32,
            name_len: name.len() as u32,
            ino: inodes.len() as u32,
        });
        strings.extend_from_slice(name.as_bytes());
        data = (data + size).next_multiple_of(512);
    }
    LayerIndex::new(IndexParts {
        access: Access::Stream,
        codec: Codec::None,
        data_size: data,
        blob_size: 0,
        inodes,
        dirents,
        xattrs: Vec::new(),
        chunks: Vec::new(),
        checkpoints: Vec::new(),
        verify: Verify::Content,
        strings,
    })
    .expect("the parts are an index")
}

fn entry() -> Entry {
    Entry::of(&["/bin/app".to_owned(), "--password=secret".to_owned()])
}

pub(super) fn digest(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

/// What a start reads of one layer.
pub(super) fn start(of: &str, names: &LayerIndex, sight: Sight, seen: &[(u64, u64)]) -> Trace {
    let looked = Looked {
        digest: digest(of),
        sight,
        names: Some(names),
    };
    let seen: Vec<Seen> = (0..)
        .zip(seen)
        .map(|(at, &(offset, len))| Seen {
            layer: 0,
            offset,
            len,
            at,
        })
        .collect();
    observe(("r/app", Digest::of(MANIFEST), entry()), 7, &[looked], &seen)
}

/// Where the wishes lie in a layer of an image with the layers `image`.
pub(super) fn placed(trace: &Trace, of: &str, names: &LayerIndex, image: &HashSet<Digest>) -> Vec<Placed> {
    let found = trace.found_in(&digest(of), names, image);
    Carried::new(Arc::new(trace.clone()), Arc::new(image.clone())).take(0, found)
}

/// What is wished for: path, offset, length, and how often it was missed.
pub(super) fn wishes(trace: &Trace) -> Vec<(String, u64, u64, u8)> {
    let wishes = trace.wishes.iter();
    wishes
        .map(|wish| {
            let path = trace.files[wish.file as usize].path.clone();
            (path, wish.offset, wish.len, wish.missed)
        })
        .collect()
}

pub(super) fn wish(path: &str, offset: u64, len: u64, missed: u8) -> (String, u64, u64, u8) {
    (path.to_owned(), offset, len, missed)
}

/// Layers that were seen clearly.
pub(super) fn clear(names: &[&str]) -> HashSet<Digest> {
    names.iter().map(|name| digest(name)).collect()
}

#[test]
fn reads_become_ranges_of_files() {
    let names = layer(&[("a", 1000), ("b", 100), ("c", 5000)]);
    // The page of `c`, then all of what lies before it, with what is between the files.
    let trace = start("layer", &names, Sight::Clear, &[(2048, 4096), (0, 2048)]);
    let expected = [wish("d/c", 0, 4096, 0), wish("d/a", 0, 1000, 0), wish("d/b", 0, 100, 0)];
    assert_eq!(wishes(&trace), expected);
    assert_eq!(trace.bytes(), 5196);
    // And back, to the same places.
    let placed = placed(&trace, "layer", &names, &clear(&["layer"]));
    let places: Vec<_> = placed.iter().map(|place| (place.data, place.len)).collect();
    assert_eq!(places, [(2048, 4096), (512, 1000), (1536, 100)]);
}

#[test]
fn what_is_no_longer_read_is_forgotten() {
    let names = layer(&[("a", 1000), ("b", 1000)]);
    let first = start("l", &names, Sight::Clear, &[(512, 1000), (1536, 1000)]);
    let again = start("l", &names, Sight::Clear, &[(1536, 512)]);
    let second = first.merged(&again, &clear(&["l"]));
    assert_eq!(second.starts, 2);
    let expected = [
        wish("d/b", 0, 512, 0),
        wish("d/a", 0, 1000, 1),
        wish("d/b", 512, 488, 1),
    ];
    let mut found = wishes(&second);
    found.sort_by_key(|(_, offset, _, missed)| (*missed, *offset));
    assert_eq!(found, expected);
    assert_eq!(wishes(&second.merged(&again, &clear(&["l"]))), [wish("d/b", 0, 512, 0)]);
    // What is read once more was never missed.
    let third = second.merged(&first, &clear(&["l"]));
    assert!(wishes(&third).iter().all(|(.., missed)| *missed == 0));
}

#[test]
fn a_start_that_does_not_show_it_forgets_nothing() {
    let names = layer(&[("a", 1000), ("b", 1000)]);
    let first = start("l", &names, Sight::Clear, &[(512, 1000)]);
    let warm = start("l", &names, Sight::Blurred, &[(1536, 1000)]);
    let mut trace = first;
    for _ in 0..5 {
        trace = trace.merged(&warm, &clear(&[]));
    }
    let mut found = wishes(&trace);
    found.sort();
    // What another may have read is kept until a clear start misses it.
    assert_eq!(found, [wish("d/a", 0, 1000, 0), wish("d/b", 0, 1000, FORGET_AFTER - 1)]);
    let cold = start("l", &names, Sight::Clear, &[(512, 1000)]);
    assert_eq!(wishes(&trace.merged(&cold, &clear(&["l"]))), [wish("d/a", 0, 1000, 0)]);
}

#[test]
fn another_image_of_the_repository_is_searched_for_the_files() {
    let old = layer(&[("a", 1000), ("b", 1000), ("gone", 1000)]);
    let trace = start("old", &old, Sight::Clear, &[(1536, 512), (512, 1000), (2560, 1000)]);
    // `a` has become longer and was read whole; of `b` the beginning is wished for as before.
    let new = layer(&[("0", 700), ("a", 3000), ("b", 1000)]);
    let placed = placed(&trace, "new", &new, &clear(&["new"]));
    let places: Vec<_> = placed.iter().map(|p| (p.wish, p.data, p.offset, p.len)).collect();
    assert_eq!(places, [(0, 4608, 0, 512), (1, 1536, 0, 3000)]);
    // If the image still has the layer, another one is not searched for its files.
    assert_eq!(super::tests::placed(&trace, "new", &new, &clear(&["new", "old"])), []);
    let moved = trace.moved(digest("m2"), &[(digest("new"), placed)]);
    assert_eq!((moved.manifest, &moved.layers), (digest("m2"), &vec![digest("new")]));
    assert_eq!(wishes(&moved), [wish("d/b", 0, 512, 0), wish("d/a", 0, 3000, 0)]);
    moved.check().unwrap();
}

/// What is here already need not be looked for, and is carried along as it is.
#[test]
fn a_layer_that_stays_is_carried_without_its_names() {
    let names = layer(&[("a", 1000), ("b", 1000)]);
    let trace = start("l", &names, Sight::Clear, &[(1536, 512), (512, 1000)]);
    let known = trace.known(&digest("l")).unwrap();
    let moved = trace.moved(digest("m2"), &[(digest("l"), known)]);
    assert_eq!((wishes(&moved), moved.layers), (wishes(&trace), trace.layers.clone()));
    assert_eq!(trace.known(&digest("other")), None);
}

#[test]
fn a_shorter_file_is_not_read_behind_its_end() {
    let old = layer(&[("a", 10_000)]);
    let trace = start("old", &old, Sight::Clear, &[(512, 1000), (8512, 1000)]);
    let new = layer(&[("a", 500)]);
    let placed = placed(&trace, "new", &new, &clear(&["new"]));
    assert_eq!(placed.len(), 1);
    assert_eq!((placed[0].offset, placed[0].len), (0, 500));
}

#[test]
fn an_entry_point_is_its_whole_command_and_keeps_no_argument() {
    let args = |args: &[&str]| Entry::of(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>());
    assert_ne!(args(&["sh", "a b"]), args(&["sh", "a", "b"]));
    assert_ne!(args(&["sh"]), args(&["sh", ""]));
    assert_eq!(args(&["/bin/a\n", "secret"]).program, "/bin/a");
    assert!(args(&["/bin/app", "--job=1"]).resembles(&args(&["/bin/app", "--job=2"])));
    assert!(!args(&["/bin/app"]).resembles(&args(&["/bin/other"])) && !args(&[]).resembles(&args(&[])));
    assert!(!args(&["/bin/sh", "-c", "a"]).resembles(&args(&["/bin/sh", "-c", "b"])));
    let names = layer(&[("a", 1000)]);
    let text = serde_json::to_string(&start("l", &names, Sight::Clear, &[(512, 1000)])).unwrap();
    assert!(text.contains("/bin/app") && !text.contains("secret"));
}

#[test]
fn it_comes_back_as_it_was() {
    let names = layer(&[("a", 1000), ("ü", 9000)]);
    let trace = start("l", &names, Sight::Clear, &[(512, 1000), (4000, 2000)]);
    let bytes = trace.encode();
    assert_eq!(Trace::decode(&bytes).unwrap(), trace);
    let mut other = bytes.clone();
    other[8] = 9;
    assert!(matches!(Trace::decode(&other), Err(LayerError::Unsupported { .. })));
}

#[test]
fn what_would_be_too_long_is_cut_off_at_its_end() {
    let mut trace = start("l", &layer(&[("a", 1000)]), Sight::Clear, &[(512, 1000)]);
    trace.files = (0..40_000)
        .map(|at| File {
            layer: 0,
            path: format!("{}{at}", Digest::of(&[at as u8, (at >> 8) as u8]).hex().repeat(8)),
            size: 10,
            content: Some(Content::of(&Digest::of(&[at as u8, (at >> 8) as u8]))),
        })
        .collect();
    trace.wishes = (0..40_000)
        .map(|file| Wish {
            file,
            offset: 0,
            len: 10,
            at: file,
            missed: 0,
        })
        .collect();
    let bytes = trace.encode();
    assert!(bytes.len() <= MAX_LEN);
    let read = Trace::decode(&bytes).unwrap();
    assert!(read.wishes.len() > 1000 && read.wishes.len() < 40_000);
    let paths = |trace: &Trace| {
        trace.files[..1000]
            .iter()
            .map(|file| file.path.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(paths(&read), paths(&trace));
}

#[test]
fn what_cannot_be_is_no_trace() {
    let good = start("l", &layer(&[("a", 1000)]), Sight::Clear, &[(512, 1000)]);
    type Spoil = fn(&mut Trace);
    let spoilt: [(&str, Spoil); 6] = [
        ("a range is in no file", |trace| trace.wishes[0].file = 1),
        ("a file is in no layer", |trace| trace.files[0].layer = 1),
        ("a range is not in its file", |trace| trace.wishes[0].len = 1001),
        ("a range is not in its file", |trace| trace.wishes[0].offset = u64::MAX),
        ("too many bytes", |trace| {
            (trace.files[0].size, trace.wishes[0].len) = (MAX_BYTES + 1, MAX_BYTES + 1);
        }),
        ("length of a name", |trace| {
            trace.repository = "r".repeat(MAX_NAME_LEN + 1)
        }),
    ];
    for (reason, spoil) in spoilt {
        let mut trace = good.clone();
        spoil(&mut trace);
        let error = trace.check().unwrap_err().to_string();
        assert!(error.contains(reason), "{error} instead of {reason}");
    }
}

/// A trace as an older Lazuli writes it, which knows no contents, and as a newer one may, which knows more.
#[test]
fn traces_of_other_versions_are_read() {
    let mut trace = start("l", &layer(&[("a", 1000)]), Sight::Clear, &[(512, 1000)]);
    trace.files[0].content = Some(Content::of(&Digest::of(b"abc")));
    let read = |document: &serde_json::Value| {
        let raw = serde_json::to_vec(document).unwrap();
        let packed = zstd::bulk::compress(&raw, LEVEL).unwrap();
        let (version, len) = (VERSION.to_le_bytes(), (raw.len() as u32).to_le_bytes());
        let mut bytes = [&MAGIC[..], &version, &len, &packed].concat();
        let sum = Digest::of(&bytes);
        bytes.extend_from_slice(sum.as_bytes());
        Trace::decode(&bytes)
    };
    let mut document = serde_json::to_value(&trace).unwrap();
    assert_eq!(document["files"][0]["content"], "ba7816bf8f01cfea");
    document["files"][0]["more"] = 7.into();
    document["more"] = "of the same".into();
    assert_eq!(read(&document).unwrap(), trace);
    for wrong in [
        "",
        "ba7816bf8f01cfe",
        "BA7816BF8F01CFEA",
        "+a7816bf8f01cfea",
        "ba7816bf8f01cfeaa",
    ] {
        document["files"][0]["content"] = wrong.into();
        let error = read(&document).unwrap_err().to_string();
        assert!(error.contains("16 hex digits"), "{error}");
    }
    document["files"][0].as_object_mut().unwrap().remove("content");
    trace.files[0].content = None;
    assert_eq!(read(&document).unwrap(), trace);
}

/// A trace that is too long with its contents loses them before it loses any of its reads.
#[test]
fn contents_give_way_to_reads() {
    let mut trace = start("l", &layer(&[("a", 1000)]), Sight::Clear, &[(512, 1000)]);
    let (file, wish) = (trace.files[0].clone(), trace.wishes[0]);
    // Names of 80 digits: 7.6 MiB of the 8 that a document may have, and contents would be 1.7 more.
    let many = 0..60_000u32;
    trace.files = many
        .clone()
        .map(|at| File {
            path: format!("{at:080}"),
            content: Some(Content::of(&Digest::of(&at.to_le_bytes()))),
            ..file.clone()
        })
        .collect();
    trace.wishes = many.map(|file| Wish { file, ..wish }).collect();
    let read = Trace::decode(&trace.encode()).unwrap();
    assert!(read.wishes == trace.wishes, "{} of them", read.wishes.len());
    assert!(read.files.iter().all(|file| file.content.is_none()));
}

/// What one start does not know of a content is known from the one before.
#[test]
fn a_content_that_was_known_stays_known() {
    let names = layer(&[("a", 1000)]);
    let mut old = start("l", &names, Sight::Clear, &[(512, 1000)]);
    let mut new = start("l", &names, Sight::Clear, &[(512, 512)]);
    let content = |text: &str| Some(Content::of(&digest(text)));
    let merged = |old: &Trace, new: &Trace| old.merged(new, &clear(&["l"])).files[0].content;
    old.files[0].content = content("1");
    assert_eq!(merged(&old, &new), content("1"));
    new.files[0].content = content("2");
    assert_eq!(merged(&old, &new), content("2"));
}

/// A document that unpacks to more than it says costs no more than it says.
#[test]
fn a_bomb_is_refused() {
    let raw = vec![b' '; 64 << 20];
    let packed = zstd::bulk::compress(&raw, 3).unwrap();
    let mut bytes = [&MAGIC[..], &VERSION.to_le_bytes(), &100u32.to_le_bytes(), &packed].concat();
    let sum = Digest::of(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    let error = Trace::decode(&bytes).unwrap_err().to_string();
    assert!(error.contains("another length") || error.contains("memory"), "{error}");
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Trace::decode(&bytes).is_err());
    }

    #[test]
    fn no_byte_may_be_another(at in 0usize..200, change in 1u8..) {
        let trace = start("l", &layer(&[("a", 1000)]), Sight::Clear, &[(512, 1000)]);
        let mut bytes = trace.encode();
        let at = at % bytes.len();
        bytes[at] ^= change;
        prop_assert!(Trace::decode(&bytes).is_err());
    }

    /// After one clear start nothing is missing that it has read, nothing is in twice, and nothing is in that nobody has read.
    #[test]
    fn a_merged_trace_has_what_was_read(
        old in proptest::collection::vec((0u64..90, 1u64..20), 0..8),
        new in proptest::collection::vec((0u64..90, 1u64..20), 0..8),
        is_clear in any::<bool>(),
    ) {
        let names = layer(&[("a", 200)]);
        let sight = if is_clear { Sight::Clear } else { Sight::Blurred };
        let disjoint = |ranges: &[(u64, u64)]| {
            let mut bytes = HashSet::new();
            ranges.iter().for_each(|(from, len)| bytes.extend(*from..from + len));
            let mut bytes: Vec<u64> = bytes.into_iter().collect();
            bytes.sort_unstable();
            (bytes.iter().map(|at| (512 + at, 1)).collect::<Vec<_>>(), bytes)
        };
        let ((old, old_bytes), (new, new_bytes)) = (disjoint(&old), disjoint(&new));
        let clearly = if is_clear { clear(&["l"]) } else { clear(&[]) };
        let merged = start("l", &names, Sight::Clear, &old).merged(&start("l", &names, sight, &new), &clearly);
        let mut expected: Vec<u64> = old_bytes.into_iter().chain(new_bytes).collect();
        expected.sort_unstable();
        expected.dedup();
        let mut found: Vec<u64> = merged.wishes.iter().flat_map(|wish| wish.offset..wish.offset + wish.len).collect();
        found.sort_unstable();
        prop_assert_eq!(found, expected);
    }
}
