//! Tests of layers on layers. They come as tars; what is expected is what containerd's unpacker leaves.

use proptest::prelude::*;

use super::*;
use crate::layer::testing::{Head, Tar, picture};

const NOBODY: Head<'_> = Head {
    kind: b'5',
    name: b"",
    link: b"",
    size: 0,
    mode: 0o700,
    uid: 7,
    gid: 8,
    mtime: 500,
    major: 0,
    minor: 0,
    magic: crate::layer::testing::USTAR,
    prefix: b"",
};

fn layer(fill: impl FnOnce(&mut Tar)) -> LayerIndex {
    let mut tar = Tar::default();
    fill(&mut tar);
    tar.end().index()
}

/// The picture of what changed, without the line of the root.
fn on(index: &LayerIndex, below: &[&LayerIndex]) -> Option<String> {
    let below: Vec<_> = below.iter().copied().map(Some).collect();
    let changed = on_top_of(index, &below).unwrap()?;
    assert_eq!(changed.chunks(), index.chunks());
    assert_eq!(LayerIndex::decode(&changed.encode()), Ok(changed.clone()));
    picture(&changed).split_once('\n').map(|(_, rest)| rest.to_owned())
}

#[test]
fn directories_without_an_entry_look_as_below() {
    let below = layer(|tar| {
        tar.dir("tmp", 0o1777)
            .pax(&[("SCHILY.xattr.user.mark", b"m"), ("mtime", b"500.25")]);
        tar.add(
            Head {
                name: b"tmp/secret",
                ..NOBODY
            },
            b"",
        );
        tar.file("tmp/secret/old", b"");
    });
    let above = layer(|tar| {
        tar.file("tmp/secret/.wh..wh..opq", b"")
            .file("tmp/secret/fresh/file", b"")
            .dir("own", 0o711)
            .file("own/fresh/file", b"");
    });
    assert_eq!(
        on(&above, &[&below]).unwrap(),
        "/own dir 711 0:0 x3
/own/fresh dir 755 0:0 x2
/own/fresh/file file 644 0:0 x1 0
/tmp dir 1777 0:0 x3
/tmp/secret dir 700 7:8 x3 @500.250000000 trusted.overlay.opaque=y user.mark=m
/tmp/secret/fresh dir 755 0:0 x2
/tmp/secret/fresh/file file 644 0:0 x1 0
"
    );
}

#[test]
fn a_group_that_is_handed_on_below_is_handed_on() {
    let below = layer(|tar| {
        tar.add(
            Head {
                name: b"d",
                mode: 0o2770,
                mtime: 0,
                ..NOBODY
            },
            b"",
        );
    });
    let above = layer(|tar| {
        tar.file("d/made/deeper/file", b"");
    });
    assert_eq!(
        on(&above, &[&below]).unwrap(),
        "/d dir 2770 7:8 x3
/d/made dir 755 0:8 x3
/d/made/deeper dir 755 0:0 x2
/d/made/deeper/file file 644 0:0 x1 0
"
    );
}

#[test]
fn most_layers_are_the_same_everywhere() {
    let ordinary = layer(|tar| {
        tar.dir("a", 0o700).file("a/x", b"").file(".wh.b", b"");
    });
    assert_eq!(on(&ordinary, &[&ordinary]), None);
    assert!(!depends_on_below(&ordinary));
    // Nobody below has the directory, or has it with the same attributes; or nothing is known of what is below.
    let implied = layer(|tar| {
        tar.file("d/x", b"");
    });
    let same = layer(|tar| {
        tar.dir("d", 0o755);
    });
    assert!(depends_on_below(&implied));
    assert_eq!(on(&implied, &[&ordinary]), None);
    assert_eq!(on(&implied, &[&same, &implied]), None);
    assert_eq!(on(&implied, &[]), None);
    assert_eq!(on_top_of(&implied, &[None]), Ok(None));
    // In the lowest layer there is nothing that a whiteout could be for.
    let plain = layer(|tar| {
        tar.dir("a", 0o700).file("a/x", b"");
    });
    assert_eq!(on(&plain, &[]), None);
}

#[test]
fn the_nearest_layer_that_has_the_path_decides() {
    let dir = |mode| {
        layer(|tar| {
            tar.dir("d", mode).dir("d/e", mode);
        })
    };
    let [low, high] = [dir(0o700), dir(0o750)];
    let above = layer(|tar| {
        tar.file("d/e/x", b"");
    });
    let modes = |below: &[&LayerIndex]| {
        let below: Vec<_> = below.iter().copied().map(Some).collect();
        let changed = on_top_of(&above, &below).unwrap();
        let index = changed.as_ref().unwrap_or(&above);
        let mode = |path: &[u8]| index.inode(index.lookup_path(path).unwrap()).unwrap().mode & 0o7777;
        [mode(b"d"), mode(b"d/e")]
    };
    assert_eq!(modes(&[&high, &low]), [0o750, 0o750]);
    let elsewhere = layer(|tar| {
        tar.dir("d", 0o711);
    });
    assert_eq!(modes(&[&elsewhere, &low]), [0o711, 0o700]);
    // An opaque directory hides nothing from the unpacker, a whiteout or a file ends the search.
    let opaque = layer(|tar| {
        tar.dir("d", 0o711).file("d/.wh..wh..opq", b"");
    });
    assert_eq!(modes(&[&opaque, &low]), [0o711, 0o700]);
    let whiteout = layer(|tar| {
        tar.file(".wh.d", b"");
    });
    assert_eq!(modes(&[&whiteout, &low]), [0o755, 0o755]);
    let file = layer(|tar| {
        tar.dir("d", 0o711).file("d/e", b"");
    });
    assert_eq!(modes(&[&file, &low]), [0o711, 0o755]);
    // Passed over, if unknown.
    let changed = on_top_of(&above, &[None, Some(&low)]).unwrap().unwrap();
    assert!(picture(&changed).contains("/d dir 700"));
}

#[test]
fn symlinks_below_are_followed_inside_their_layer() {
    let above = layer(|tar| {
        tar.file("bin/x", b"");
    });
    for (target, found) in [
        ("usr/bin", true),
        ("/usr/./bin/", true),
        ("../../usr/bin", true),
        ("usr/../usr/bin/more/..", true),
        ("usr/file", false),
        ("usr/none", false),
        ("bin", false),
    ] {
        let below = layer(|tar| {
            tar.dir("usr/bin/more", 0o700)
                .dir("usr/bin", 0o700)
                .file("usr/file", b"")
                .symlink("bin", target);
        });
        assert_eq!(on(&above, &[&below]).is_some(), found, "{target}");
    }
}

#[test]
fn whiteouts_leave_nothing_in_the_lowest_layer() {
    let base = layer(|tar| {
        tar.dir("b", 0o755)
            .file("b/deleted", b"x")
            .file("b/.wh.deleted", b"")
            .file("b/.wh.never-was", b"");
        tar.pax(&[("SCHILY.xattr.user.k", b"v")]).dir("b/opaque", 0o700);
        tar.file("b/opaque/before", b"")
            .file("b/opaque/.wh..wh..opq", b"")
            .file("b/opaque/after", b"");
        tar.file("b/hard", b"xy")
            .hardlink("b/other", "b/hard")
            .file("b/.wh.hard", b"");
        tar.symlink("b/z", "other").dir("b/sub/sub", 0o755);
        // A device 0:0 that is said to be one is one.
        tar.add(
            Head {
                name: b"b/device",
                kind: b'3',
                mode: 0,
                ..Head::default()
            },
            b"",
        );
    });
    assert_eq!(
        on(&base, &[]).unwrap(),
        "/b dir 755 0:0 x4
/b/device char 0 0:0 x1 0:0
/b/opaque dir 700 0:0 x2 user.k=v
/b/opaque/after file 644 0:0 x1 0
/b/opaque/before file 644 0:0 x1 0
/b/other file 644 0:0 x1 2
/b/sub dir 755 0:0 x3
/b/sub/sub dir 755 0:0 x2
/b/z link 777 0:0 x1 -> other
"
    );
    // Anywhere else they stay.
    assert_eq!(on(&base, &[&layer(|_| {})]), None);
}

#[test]
fn many_links_end() {
    let loops = layer(|tar| {
        tar.symlink("a", "b/x").symlink("b", "a/x");
    });
    let above = layer(|tar| {
        tar.file("a/x", b"");
    });
    assert_eq!(on(&above, &[&loops]), None);
}

/// Layers of few names, so that they meet.
fn any_layer() -> impl Strategy<Value = LayerIndex> {
    let path = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4);
    let entry = (path, 0..6_u8, 0..4_u32);
    prop::collection::vec(entry, 0..12).prop_map(|entries| {
        let mut kept = Tar::default();
        for (path, kind, mode) in entries {
            let mut tar = Tar(kept.0.clone());
            let (base, dirs) = path.split_last().unwrap();
            let parent: String = dirs.iter().map(|dir| format!("{dir}/")).collect();
            let name = format!("{parent}{base}");
            match kind {
                0 => tar.file(&format!("{parent}.wh.{base}"), b""),
                1 => tar.file(&format!("{name}/.wh..wh..opq"), b""),
                2 => tar.symlink(&name, "../a/b"),
                3 => tar.dir(&name, if mode == 3 { 0o2750 } else { 0o700 + mode }),
                _ => tar.file(&name, b"content"),
            };
            // What cannot be unpacked is left out.
            if Tar(tar.0.clone()).end().layout().is_ok() {
                kept = tar;
            }
        }
        kept.end().index()
    })
}

/// Paths of everything but whiteouts, with what a layer cannot change by its place.
fn contents(index: &LayerIndex) -> Vec<(String, u32, u64, u64)> {
    let mut found = Vec::new();
    let mut dirs = vec![(ROOT_INO, String::new())];
    while let Some((dir, path)) = dirs.pop() {
        for entry in index.entries(index.inode(dir).unwrap()) {
            let inode = index.inode(entry.ino).unwrap();
            let path = format!("{path}/{}", index.name(entry).escape_ascii());
            if inode.is_dir() {
                dirs.push((entry.ino, path.clone()));
                found.push((path, inode.file_type(), 0, 0));
            } else if !inode.is_whiteout() {
                found.push((path, inode.mode, inode.size, inode.data));
            }
        }
    }
    found.sort();
    found
}

/// The layer on others, found out in a simple way: the places of all directories in all layers are in memory.
fn simply(index: &LayerIndex, below: &[&LayerIndex]) -> Option<LayerIndex> {
    let mut steps = Steps {
        taken: 0,
        limit: u64::MAX,
    };
    let mut looks = Vec::new();
    let root: Vec<Place> = below.iter().map(|_| Place::Dir(ROOT_INO)).collect();
    let mut pending = vec![(ROOT_INO, root, None)];
    while let Some((dir, places, group)) = pending.pop() {
        for entry in index.entries(index.inode(dir).unwrap()) {
            let inode = index.inode(entry.ino).unwrap();
            if !inode.is_dir() {
                continue;
            }
            let step = |(layer, place): (&&LayerIndex, &Place)| match *place {
                Place::Dir(dir) => step(layer, dir, index.name(entry), &mut steps).unwrap(),
                other => other,
            };
            let own: Vec<Place> = below.iter().zip(&places).map(step).collect();
            let mut look = None;
            if inode.takes_over() {
                let group = group.filter(|_| inode.is_implied());
                look = match own.iter().position(|place| *place != Place::Missing) {
                    Some(at) => match own[at] {
                        Place::Dir(ino) => Some(Look::Of(below[at], ino)),
                        _ => group.map(Look::Group),
                    },
                    None => group.map(Look::Group),
                };
                if let Some(look) = look.filter(|look| !look.is_of(index, entry.ino)) {
                    looks.push((entry.ino, look));
                }
            }
            pending.push((entry.ino, own, look.and_then(|look| look.hands_on())));
        }
    }
    let changed = LayerIndex::new(dress(index, &looks).unwrap()).unwrap();
    (changed != *index).then_some(changed)
}

/// What the layer takes over is limited for each directory, though few texts are added.
#[test]
fn attributes_that_many_directories_take_over_have_a_limit() {
    let records: Vec<(String, &[u8])> = (0..1000)
        .map(|i| (format!("SCHILY.xattr.user.{i}"), &b""[..]))
        .collect();
    let records: Vec<(&str, &[u8])> = records.iter().map(|(key, value)| (&key[..], *value)).collect();
    let below = layer(|tar| {
        tar.pax(&records).dir("d", 0o700).symlink("d/x", ".");
    });
    let above = |depth: usize| {
        layer(|tar| {
            let path = format!("d/{}file", "x/".repeat(depth));
            tar.extended(b'L', path.as_bytes()).file("", b"");
        })
    };
    assert!(on_top_of(&above(60), &[Some(&below)]).unwrap().is_some());
    let error = on_top_of(&above(80), &[Some(&below)]).unwrap_err().to_string();
    assert!(error.contains("number of attributes taken over"), "{error}");
}

#[test]
fn the_way_through_layers_below_has_a_limit() {
    // Every directory is thousands of steps away, for few bytes.
    let below = layer(|tar| {
        tar.extended(b'K', "./".repeat(2000).as_bytes());
        tar.add(
            Head {
                kind: b'2',
                name: b"x",
                ..Head::default()
            },
            b"",
        );
    });
    let above = layer(|tar| {
        tar.extended(b'L', format!("{}file", "x/".repeat(1000)).as_bytes())
            .file("", b"");
    });
    let error = on_top_of(&above, &[Some(&below)]).unwrap_err().to_string();
    assert!(error.contains("number of steps to directories"), "{error}");
}

proptest! {
    #[test]
    fn in_depth_is_as_simply(index in any_layer(), below in prop::collection::vec(any_layer(), 1..5)) {
        let all: Vec<_> = below.iter().map(Some).collect();
        let simple = simply(&index, &below.iter().collect::<Vec<_>>());
        let changed = on_top_of(&index, &all).unwrap();
        prop_assert_eq!(changed.as_ref().map(LayerIndex::encode), simple.as_ref().map(LayerIndex::encode));
    }

    /// Whatever lies below, the same files stay at the same places, and what comes out is an index that changes no more.
    #[test]
    fn only_looks_change(index in any_layer(), below in prop::collection::vec(any_layer(), 0..4)) {
        let below: Vec<_> = below.iter().map(Some).collect();
        if let Some(changed) = on_top_of(&index, &below).unwrap() {
            prop_assert_ne!(&changed, &index);
            prop_assert_eq!(contents(&changed), contents(&index));
            prop_assert_eq!(changed.data_size(), index.data_size());
            prop_assert_eq!(&LayerIndex::decode(&changed.encode()).unwrap(), &changed);
            prop_assert_eq!(on_top_of(&changed, &below).unwrap(), None);
        }
    }
}

#[test]
fn what_a_link_leads_over_need_not_be_there() {
    let below = layer(|tar| {
        tar.dir("real", 0o1777).symlink("link", "gone/../real");
        tar.symlink("absolute", "/gone/./../link");
    });
    for name in ["link", "absolute"] {
        let above = layer(|tar| {
            tar.file(&format!("{name}/x"), b"");
        });
        assert_eq!(
            on(&above, &[&below]).unwrap(),
            format!("/{name} dir 1777 0:0 x2\n/{name}/x file 644 0:0 x1 0\n")
        );
    }
}

#[test]
fn a_directory_described_late_keeps_attributes_from_below() {
    let below = layer(|tar| {
        tar.pax(&[("SCHILY.xattr.user.a", b"below"), ("SCHILY.xattr.user.b", b"below")])
            .dir("d", 0o1777);
    });
    let above = layer(|tar| {
        tar.file("d/x", b"")
            .pax(&[("SCHILY.xattr.user.b", b"above")])
            .dir("d", 0o700);
    });
    assert_eq!(
        on(&above, &[&below]).unwrap(),
        "/d dir 700 0:0 x2 user.a=below user.b=above\n/d/x file 644 0:0 x1 0\n"
    );
    // One that was described first has only its own.
    let first = layer(|tar| {
        tar.dir("d", 0o700).file("d/x", b"");
    });
    assert_eq!(on(&first, &[&below]), None);
}

#[test]
fn a_default_list_from_below_is_handed_on() {
    let list = |user, mask, other| {
        crate::layer::acl::tests::list(&[
            (1, user, u32::MAX),
            (2, 5, 1001),
            (4, 5, u32::MAX),
            (16, mask, u32::MAX),
            (32, other, u32::MAX),
        ])
    };
    let below = layer(|tar| {
        tar.pax(&[("SCHILY.xattr.system.posix_acl_default", &list(7, 7, 7))])
            .dir("d", 0o750);
    });
    let above = layer(|tar| {
        tar.file("d/f", b"")
            .dir("d/sub", 0o700)
            .file("d/sub/made/deep", b"")
            .pax(&[("SCHILY.xattr.system.posix_acl_access", &list(1, 2, 3))])
            .file("d/sub/own", b"");
    });
    let changed = on_top_of(&above, &[Some(&below)]).unwrap().unwrap();
    let own = |path: &[u8], name: &[u8]| {
        let inode = changed.inode(changed.lookup_path(path).unwrap()).unwrap();
        changed.xattr(inode, name).map(<[u8]>::to_vec)
    };
    for (path, access) in [
        (&b"d/f"[..], list(6, 4, 4)),
        (b"d/sub", list(7, 0, 0)),
        (b"d/sub/made", list(7, 5, 5)),
        (b"d/sub/made/deep", list(6, 4, 4)),
        (b"d/sub/own", list(6, 4, 4)),
    ] {
        assert_eq!(own(path, acl::ACCESS), Some(access), "{}", path.escape_ascii());
    }
    assert_eq!(own(b"d", acl::ACCESS), None);
    for path in [&b"d"[..], b"d/sub", b"d/sub/made"] {
        assert_eq!(own(path, acl::DEFAULT), Some(list(7, 7, 7)));
    }
    assert_eq!(
        changed.inode(changed.lookup_path(b"d").unwrap()).unwrap().mode & 0o7777,
        0o750
    );
}
