//! Tests of merged chains. Layers come as tars; what is expected is what overlayfs shows of them.

use proptest::prelude::*;

use super::model::{expected, picture as lines};
use super::*;
use crate::layer::testing::{Head, Tar, picture};
use crate::layer::variant::on_top_of;

fn layer(fill: impl FnOnce(&mut Tar)) -> LayerIndex {
    let mut tar = Tar::default();
    fill(&mut tar);
    tar.end().index()
}

/// The picture of the layers merged, the lowest first, without the line of the root.
fn merged(layers: &[&LayerIndex]) -> String {
    let merged = merge(layers, None).unwrap();
    assert_eq!(lines(&merged.index), expected(layers));
    assert_eq!(merge(layers, None).unwrap(), merged);
    assert_eq!(LayerIndex::decode(&merged.index.encode()), Ok(merged.index.clone()));
    let text = picture(&merged.index);
    text.split_once('\n').unwrap().1.to_owned()
}

/// A layer with one directory, and one file in it.
fn one(dir: &str, file: &str) -> LayerIndex {
    layer(|tar| {
        tar.dir(dir, 0o755).file(&format!("{dir}/{file}"), file.as_bytes());
    })
}

#[test]
fn the_topmost_decides() {
    let low = layer(|tar| {
        tar.pax(&[("SCHILY.xattr.user.low", b"l")]).dir("d", 0o700);
        tar.file("d/kept", b"low")
            .file("d/replaced", b"low")
            .file("d/gone", b"");
        tar.dir("dir-then-file", 0o755).file("dir-then-file/x", b"");
        tar.file("file-then-dir", b"").symlink("link", "d");
        tar.dir("gone", 0o755).dir("gone/deep", 0o755).file("gone/deep/x", b"");
    });
    let high = layer(|tar| {
        tar.pax(&[("SCHILY.xattr.user.high", b"h"), ("mtime", b"9.5")])
            .dir("d", 0o1777);
        tar.file("d/replaced", b"upper")
            .file("d/.wh.gone", b"")
            .file("d/.wh.none", b"");
        tar.file("dir-then-file", b"f");
        tar.dir("file-then-dir", 0o711).file("file-then-dir/x", b"");
        tar.symlink("link", "elsewhere").file(".wh.gone", b"");
    });
    assert_eq!(
        merged(&[&low, &high]),
        "/d dir 1777 0:0 x2 @9.500000000 user.high=h
/d/kept file 644 0:0 x1 3
/d/replaced file 644 0:0 x1 5
/dir-then-file file 644 0:0 x1 1
/file-then-dir dir 711 0:0 x2
/file-then-dir/x file 644 0:0 x1 0
/link link 777 0:0 x1 -> elsewhere
"
    );
}

#[test]
fn a_directory_goes_down_to_what_ends_it() {
    let low = one("d", "low");
    let high = one("d", "high");
    let none = layer(|tar| {
        tar.file(".wh.d", b"");
    });
    let file = layer(|tar| {
        tar.file("d", b"");
    });
    let opaque = layer(|tar| {
        tar.dir("d", 0o755).file("d/.wh..wh..opq", b"").file("d/middle", b"");
    });
    let aside = one("other", "x");
    let names = |layers: &[&LayerIndex]| {
        let merged = merge(layers, None).unwrap().index;
        assert_eq!(lines(&merged), expected(layers));
        let dir = merged.inode(merged.lookup_path(b"d").unwrap()).unwrap();
        let names: Vec<_> = merged
            .entries(dir)
            .iter()
            .map(|entry| merged.name(entry).to_vec())
            .collect();
        String::from_utf8(names.join(&b' ')).unwrap()
    };
    assert_eq!(names(&[&low, &aside, &high]), "high low");
    assert_eq!(names(&[&low, &none, &high]), "high");
    assert_eq!(names(&[&low, &none, &aside, &high]), "high");
    assert_eq!(names(&[&low, &file, &high]), "high");
    assert_eq!(names(&[&low, &opaque, &high]), "high middle");
    assert_eq!(names(&[&low, &opaque]), "middle");
    // The mark is the one of the directory in its own layer: what is above does not keep it.
    let merged = merge(&[&opaque], None).unwrap().index;
    let dir = merged.inode(merged.lookup_path(b"d").unwrap()).unwrap();
    assert_eq!(dir.xattr_count, 0);
}

#[test]
fn whiteouts_go_and_other_devices_stay() {
    let special = layer(|tar| {
        for (name, kind, major, minor) in [
            ("null", b'3', 1, 3),
            ("zero", b'3', 0, 0),
            ("block", b'4', 0, 0),
            ("pipe", b'6', 0, 0),
        ] {
            let name = name.as_bytes();
            tar.add(
                Head {
                    name,
                    kind,
                    major,
                    minor,
                    ..Head::default()
                },
                b"",
            );
        }
    });
    assert_eq!(
        merged(&[&special]),
        "/block block 644 0:0 x1 0:0
/null char 644 0:0 x1 1:3
/pipe fifo 644 0:0 x1
"
    );
}

#[test]
fn an_upper_run_keeps_what_it_does_to_those_below() {
    let first = layer(|tar| {
        tar.dir("cleared", 0o755)
            .file("cleared/.wh..wh..opq", b"")
            .file(".wh.gone", b"")
            .file("was-file", b"f")
            .dir("goes-on", 0o755)
            .file("goes-on/.wh.low", b"");
    });
    let second = layer(|tar| {
        tar.dir("cleared", 0o755)
            .file("cleared/.wh.first", b"")
            .dir("was-file", 0o755)
            .file("was-file/.wh.low", b"")
            .dir("goes-on", 0o755)
            .file(".wh.gone-too", b"")
            .dir("gone", 0o755);
    });
    let below = layer(|tar| {
        tar.dir("cleared", 0o755)
            .file("cleared/first", b"")
            .dir("was-file", 0o755)
            .file("was-file/low", b"")
            .dir("gone", 0o755)
            .file("gone-too", b"")
            .dir("goes-on", 0o755)
            .file("goes-on/low", b"");
    });
    let run = merge(&[&first, &second], Some(&below)).unwrap().index;
    let find = |path: &str| {
        path.split('/').try_fold(ROOT_INO, |dir, name| {
            let dir = run.inode(dir).unwrap();
            let found = run.entries(dir).iter().find(|entry| run.name(entry) == name.as_bytes());
            found.map(|entry| entry.ino)
        })
    };
    let opaque =
        |path: &str| run.xattr(run.inode(find(path).unwrap()).unwrap(), OPAQUE_XATTR.0) == Some(OPAQUE_XATTR.1);
    let whiteout = |path: &str| run.inode(find(path).unwrap()).unwrap().is_whiteout();
    // A file, and a whiteout, end what is below as a mark does.
    assert_eq!(
        ["cleared", "was-file", "gone", "goes-on"].map(opaque),
        [true, true, true, false]
    );
    assert!(whiteout("gone-too") && whiteout("goes-on/low"));
    // Where nothing below is seen, there is nothing to hide, and overlayfs would list it.
    assert_eq!([find("cleared/first"), find("was-file/low")], [None, None]);
    assert_eq!(run.xattrs(run.inode(ROOT_INO).unwrap()).count(), 0);
    // Where there is nothing to hide, nothing is hidden.
    let nothing = layer(|tar| {
        tar.file("goes-on", b"");
    });
    let bare = merge(&[&first, &second], Some(&nothing)).unwrap().index;
    assert!(
        !bare
            .inodes()
            .iter()
            .any(|inode| inode.is_whiteout() || inode.xattr_count > 0)
    );
    // By itself, as the lowest run, it has nothing of that.
    let alone = merge(&[&run], None).unwrap().index;
    assert!(
        !alone
            .inodes()
            .iter()
            .any(|inode| inode.is_whiteout() || inode.xattr_count > 0)
    );
}

#[test]
fn the_root_is_never_opaque() {
    let opaque = layer(|tar| {
        tar.file(".wh..wh..opq", b"").file("new", b"");
    });
    let root = *opaque.inode(ROOT_INO).unwrap();
    assert_eq!(opaque.xattr(&root, OPAQUE_XATTR.0), Some(OPAQUE_XATTR.1));
    assert_eq!(
        merged(&[&one("d", "x"), &opaque]),
        "/d dir 755 0:0 x2
/d/x file 644 0:0 x1 1
/new file 644 0:0 x1 0
"
    );
}

#[test]
fn names_of_one_file_stay_together_with_the_count_of_their_layer() {
    let low = layer(|tar| {
        tar.file("a", b"xy").hardlink("b", "a").hardlink("c", "a");
        tar.dir("d", 0o755).hardlink("d/e", "a");
    });
    let high = layer(|tar| {
        tar.file("b", b"").file("d", b"").hardlink("z", "b");
    });
    let index = merge(&[&low, &high], None).unwrap().index;
    assert_eq!(lines(&index), expected(&[&low, &high]));
    let number = |name: &[u8]| index.lookup_path(name).unwrap();
    assert_eq!(number(b"a"), number(b"c"));
    assert_eq!(number(b"b"), number(b"z"));
    assert_ne!(number(b"a"), number(b"b"));
    assert_eq!(index.inode(number(b"a")).unwrap().nlink, 4);
    assert_eq!(index.inode(number(b"b")).unwrap().nlink, 2);
    // A layer that comes twice is two layers: everything is seen of the upper one.
    let twice = merge(&[&low, &high, &low], None).unwrap();
    assert_eq!(lines(&twice.index), expected(&[&low, &high, &low]));
    let file = *twice.index.inode(twice.index.lookup_path(b"d/e").unwrap()).unwrap();
    let original = *low.inode(low.lookup_path(b"a").unwrap()).unwrap();
    assert_eq!(file.data, twice.devices[0] + twice.devices[1] + original.data);
    assert_eq!(twice.devices.len(), 3);
}

#[test]
fn data_spaces_lie_one_after_the_other() {
    let parts = |size: u64, len: u64| {
        let mut parts = one("d", "f").parts().clone();
        parts.data_size = size;
        let file = parts.inodes.iter_mut().find(|inode| inode.is_reg()).unwrap();
        (file.data, file.size) = (size - len, len);
        parts
    };
    let low = LayerIndex::new(parts(1000, 400)).unwrap();
    let mut other = parts(77, 77);
    let name = other
        .dirents
        .iter_mut()
        .find(|entry| entry.name_len == 1 && entry.ino == 3)
        .unwrap();
    *name = Dirent {
        name: other.strings.len() as u32,
        ..*name
    };
    other.strings.push(b'g');
    let high = LayerIndex::new(other).unwrap();
    let empty = layer(|_| {});
    let merged = merge(&[&low, &empty, &high], None).unwrap();
    assert_eq!(merged.devices, [1000, empty.data_size(), 77]);
    assert_eq!(
        merged.index.data_size(),
        1024 + empty.data_size().next_multiple_of(512) + 512
    );
    let file = |path: &[u8]| *merged.index.inode(merged.index.lookup_path(path).unwrap()).unwrap();
    assert_eq!((file(b"d/f").data, file(b"d/f").size), (600, 400));
    assert_eq!(file(b"d/g").data, 1024 + empty.data_size().next_multiple_of(512));
    assert!(merged.index.chunks().is_empty());
}

#[test]
fn limits() {
    assert!(matches!(merge(&[], None), Err(LayerError::Unsupported { .. })));
    let small = one("d", "x");
    assert!(merge(&[&small; MAX_LAYERS], None).is_ok());
    assert_eq!(
        merge(&[&small; MAX_LAYERS + 1], None).unwrap_err().to_string(),
        "number of layers is 501, over the limit of 500"
    );
    let mut large = small.parts().clone();
    large.data_size = MAX_DATA_SIZE - 511;
    let large = LayerIndex::new(large).unwrap();
    assert_eq!(merge(&[&large], None).unwrap().index.data_size(), MAX_DATA_SIZE);
    assert_eq!(
        merge(&[&large, &small], None).unwrap_err().to_string(),
        format!(
            "uncompressed size of all layers is {}, over the limit of {MAX_DATA_SIZE}",
            MAX_DATA_SIZE + small.data_size()
        )
    );
}

/// The layer with the attribute `name` on the inode at `path`.
fn with_xattr(index: &LayerIndex, path: &[u8], name: &[u8], value: &[u8]) -> LayerIndex {
    let mut parts = index.parts().clone();
    let at = parts.strings.len() as u32;
    parts.strings.extend_from_slice(&[name, value].concat());
    let (name_len, value_len) = (name.len() as u32, value.len() as u32);
    let inode = &mut parts.inodes[index.lookup_path(path).unwrap() as usize - 1];
    (inode.xattr_first, inode.xattr_count) = (parts.xattrs.len() as u32, 1);
    parts.xattrs.push(Xattr {
        name: at,
        name_len,
        value: at + name_len,
        value_len,
    });
    LayerIndex::new(parts).unwrap()
}

#[test]
fn marks_that_no_parser_lets_through_are_refused_where_they_count() {
    let plain = one("d", "x");
    let high = one("d", "y");
    for (path, name, value) in [
        (&b"d"[..], &b"trusted.overlay.redirect"[..], &b"/e"[..]),
        (b"d", b"trusted.overlay.opaque", b"x"),
        (b"d/x", b"trusted.overlay.metacopy", b""),
        (b"", b"trusted.overlay.whiteouts", b"y"),
    ] {
        let marked = with_xattr(&plain, path, name, value);
        for chain in [&[&marked, &high][..], &[&high, &marked]] {
            let error = merge(chain, None).unwrap_err();
            assert!(matches!(error, LayerError::Unsupported { .. }), "{error}");
        }
        if !path.is_empty() {
            let hidden = layer(|tar| {
                tar.file("d", b"");
            });
            assert!(merge(&[&marked, &hidden], None).is_ok());
        }
    }
    // Not a directory: the mark means nothing.
    let marked = with_xattr(&plain, b"d/x", b"trusted.overlay.opaque", b"y");
    assert_eq!(merged(&[&marked]), merged(&[&plain]));
    // Those that are shown stay as they are.
    for name in [
        "trusted.overlay.overlay.opaque",
        "user.overlay.opaque",
        "user.overlay.redirect",
        "trusted.other",
    ] {
        let marked = with_xattr(&plain, b"d", name.as_bytes(), b"y");
        let text = merged(&[&plain, &marked, &plain]);
        assert_eq!(text, merged(&[&plain]), "attributes are those of the topmost");
        assert_eq!(
            merged(&[&one("d", "low"), &marked]).lines().next().unwrap(),
            format!("/d dir 755 0:0 x2 {name}=y")
        );
    }
}

#[test]
fn deep_and_wide_trees() {
    // 30,000 directories one in the other, in two layers that differ at the bottom.
    let deep = |file: &[u8]| {
        let depth = 30_000u32;
        let mut parts = layer(|_| {}).parts().clone();
        parts.strings = [&vec![b'd'; depth as usize - 1], file].concat();
        let dir = |parent: u32, at: u64| Inode {
            parent,
            data: at,
            count: 1,
            nlink: 3,
            mode: parts.inodes[0].mode,
            ..Inode::default()
        };
        parts.inodes = (0..depth).map(|i| dir(i.max(1), u64::from(i))).collect();
        parts.inodes.push(Inode {
            mode: crate::layer::index::mode::FIFO,
            nlink: 1,
            ..Inode::default()
        });
        parts.dirents = (0..depth)
            .map(|i| Dirent {
                name: i,
                name_len: 1,
                ino: i + 2,
            })
            .collect();
        LayerIndex::new(parts).unwrap()
    };
    let index = merge(&[&deep(b"a"), &deep(b"b")], None).unwrap().index;
    assert_eq!(index.inodes().len(), 30_002);
    // Every layer has a file of its own in one directory, and one that all have.
    let layers: Vec<_> = (0..MAX_LAYERS)
        .map(|i| {
            layer(|tar| {
                tar.dir("d", 0o755).file(&format!("d/{i:03}"), b"").file("d/x", b"");
            })
        })
        .collect();
    let layers: Vec<_> = layers.iter().collect();
    assert_eq!(merged(&layers).lines().count(), MAX_LAYERS + 2);
}

/// Layers of few names, so that they meet.
fn any_layer() -> impl Strategy<Value = LayerIndex> {
    let path = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4);
    let other = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4);
    let entry = (path, other, 0..12_u8, 0..8_u32);
    prop::collection::vec(entry, 0..16).prop_map(|entries| {
        let mut kept = Tar::default();
        for (path, other, kind, number) in entries {
            let mut tar = Tar(kept.0.clone());
            let (base, dirs) = path.split_last().unwrap();
            let parent: String = dirs.iter().map(|dir| format!("{dir}/")).collect();
            let name = format!("{parent}{base}");
            if number == 0 {
                tar.pax(&[("SCHILY.xattr.user.k", base.as_bytes()), ("mtime", b"7.5")]);
            }
            let head = Head {
                name: name.as_bytes(),
                mode: 0o600 + number,
                ..Head::default()
            };
            match kind {
                0 | 1 => tar.file(&format!("{parent}.wh.{base}"), b""),
                2 => tar.file(&format!("{name}/.wh..wh..opq"), b""),
                3 => tar.symlink(&name, "../a/b"),
                4 => tar.hardlink(&name, &other.join("/")),
                5 => tar.add(Head { kind: b'6', ..head }, b""),
                6 => tar.add(
                    Head {
                        kind: b'3',
                        major: number,
                        minor: 0,
                        ..head
                    },
                    b"",
                ),
                7..10 => tar.add(Head { kind: b'5', ..head }, b""),
                _ => tar.add(
                    Head {
                        size: number.into(),
                        ..head
                    },
                    &b"contents"[..number as usize],
                ),
            };
            // What cannot be unpacked is left out.
            if Tar(tar.0.clone()).end().layout().is_ok() {
                kept = tar;
            }
        }
        kept.end().index()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any chain is what the simple model makes of it, and merging a merged chain again changes nothing but the numbers of places.
    #[test]
    fn merged_is_what_the_model_says(layers in prop::collection::vec(any_layer(), 1..7)) {
        let chain: Vec<_> = layers.iter().collect();
        let whole = merge(&chain, None).unwrap();
        prop_assert_eq!(lines(&whole.index), expected(&chain));
        prop_assert!(!whole.index.inodes().iter().any(|inode| inode.is_whiteout() || inode.flags != 0));
        prop_assert_eq!(&LayerIndex::decode(&whole.index.encode()).unwrap(), &whole.index);
        let again = merge(&[&whole.index], None).unwrap();
        prop_assert_eq!(&again.index, &whole.index);
    }

    /// The same for layers as they look on their parents, which is how they come.
    #[test]
    fn layers_on_their_parents(layers in prop::collection::vec(any_layer(), 1..6)) {
        let mut chain: Vec<LayerIndex> = Vec::new();
        for layer in layers {
            let below: Vec<_> = chain.iter().rev().map(Some).collect();
            let looks = on_top_of(&layer, &below).unwrap();
            chain.push(looks.unwrap_or(layer));
        }
        let chain: Vec<_> = chain.iter().collect();
        prop_assert_eq!(lines(&merge(&chain, None).unwrap().index), expected(&chain));
    }

    /// However a chain is cut into runs, they show on each other what the layers show on each other.
    #[test]
    fn runs_on_each_other_show_what_their_layers_show(
        layers in prop::collection::vec(any_layer(), 2..8),
        cuts in prop::collection::vec(1..8_usize, 1..4),
    ) {
        let chain: Vec<_> = layers.iter().collect();
        let whole = merge(&chain, None).unwrap();
        let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut < chain.len()).collect();
        cuts.extend([0, chain.len()]);
        cuts.sort_unstable();
        cuts.dedup();
        let below = |at: usize| (at > 0).then(|| merge(&chain[..at], None).unwrap().index);
        let runs: Vec<LayerIndex> = cuts
            .windows(2)
            .map(|run| merge(&chain[run[0]..run[1]], below(run[0]).as_ref()).unwrap().index)
            .collect();
        let runs: Vec<_> = runs.iter().collect();
        let stacked = merge(&runs, None).unwrap();
        prop_assert_eq!(lines(&stacked.index), lines(&whole.index));
        // Any neighbours may be merged, also those that lie on others.
        for at in 1..runs.len() {
            let below = below(cuts[at]);
            let upper = merge(&runs[at..], below.as_ref()).unwrap().index;
            let direct = merge(&chain[cuts[at]..], below.as_ref()).unwrap().index;
            // Of a name that several layers take away, any of them may do it.
            let shown = |index| {
                // A character device, with whatever permissions, that is 0:0.
                let is_device = |mode: &str| mode.len() == 5 && mode.starts_with("20");
                let is_whiteout = |line: &String| line.split(' ').nth(1).is_some_and(is_device) && line.contains(" dev 0:0 ");
                let name = |line: &String| line.split(' ').next().unwrap_or_default().to_owned();
                let picture: Vec<String> = lines(index);
                let reduced = picture.iter().map(|line| if is_whiteout(line) { name(line) } else { line.clone() });
                reduced.collect::<Vec<_>>()
            };
            prop_assert_eq!(shown(&upper), shown(&direct));
            // Nothing hides what is not there.
            let whiteouts = direct.inodes().iter().filter(|inode| inode.is_whiteout()).count();
            prop_assert!(whiteouts <= below.unwrap().inodes().len());
        }
    }
}
