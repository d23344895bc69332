//! Suites of other people that know what a file system has to do: what they say in a container on Lazuli is what they say on overlayfs.
//!
//! pjdfstest (system calls: names, owners, modes, times, errors) works in a directory of the image, fsx (reads, writes, mappings, truncations at
//! random, each byte compared) on a file of the image. Both are programs on crates.io; `make test-posix` builds them, linked statically, and
//! names their directory in `LAZULI_POSIX`. They are run by nothing else: building them takes minutes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::stage::{Stage, subject};
use crate::support::containerd::{Generation, REFERENCE};
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::tar::{Entry, noise};

/// Operations of fsx, and seeds of its runs.
const OPERATIONS: u32 = 3_000;
const SEEDS: [u32; 3] = [1, 2, 3];
/// Bytes of the file that fsx works on.
const LENGTH: usize = 300_000;
/// Fewer results than this of pjdfstest mean that it did not work; it has 398.
const TESTS: usize = 300;

/// What pjdfstest is told: two users that it may become, and the calls that Linux has.
const CONFIG: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
[dummy_auth]
entries = [["nobody", "nogroup"], ["tests", "tests"]]
"#;

/// Where the programs are.
fn program(name: &str) -> Vec<u8> {
    let dir = std::env::var_os("LAZULI_POSIX")
        .expect("LAZULI_POSIX names a directory with pjdfstest and fsx: make test-posix");
    let path = PathBuf::from(dir).join("bin").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn image() -> Image {
    let users = [
        Entry::file(
            "etc/passwd",
            "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\ntests:x:977:977::/:/bin/false\n",
        ),
        Entry::file("etc/group", "root:x:0:\nnogroup:x:65534:\ntests:x:977:\n"),
    ];
    let programs = ["pjdfstest", "fsx"].map(|name| Entry::file(format!("posix/{name}"), program(name)).mode(0o755));
    let mut files = vec![Entry::dir("posix"), Entry::dir("there").mode(0o755)];
    files.extend(programs);
    files.push(Entry::file("posix/config.toml", CONFIG));
    files.extend(SEEDS.map(|seed| Entry::file(format!("there/file-{seed}"), noise(seed.into(), LENGTH))));
    let layers = [base_entries(), users.into(), files];
    Image::new(
        Flavour::Oci,
        layers.map(|entries| Layer::of(Compression::Gzip, entries)).into(),
    )
}

/// How each test of pjdfstest ended.
fn results(stage: &Stage, reference: &str, snapshotter: &str) -> BTreeMap<String, String> {
    let script = "cd /there && /posix/pjdfstest -c /posix/config.toml -p /there 2>&1";
    let text = stage.containerd.run(reference, snapshotter, script).text();
    let words = ["ok", "FAILED", "skipped"];
    let results = text.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (name, result) = (fields.next()?, fields.next_back()?);
        (name.contains("::") && words.contains(&result)).then(|| (name.to_owned(), result.to_owned()))
    });
    let results: BTreeMap<_, _> = results.collect();
    let with = |word: &str| results.values().filter(|result| *result == word).count();
    eprintln!(
        "{snapshotter}: {} tests of pjdfstest, {} ok, {} failed, {} skipped",
        results.len(),
        with("ok"),
        with("FAILED"),
        with("skipped")
    );
    assert!(with("ok") > TESTS, "it does not work:\n{text}");
    results
}

#[test]
#[ignore = "needs pjdfstest and fsx: make test-posix"]
fn posix_suites_see_no_difference() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("posix_suites_see_no_difference", Generation::One);
    let reference = stage.push(&image(), "posix/suites:1");
    stage.pull(&reference);
    stage.containerd.pull(&reference, REFERENCE).expect_success();
    let [expected, seen] = [REFERENCE, SNAPSHOTTER].map(|snapshotter| results(&stage, &reference, snapshotter));
    for (name, result) in &expected {
        if result == "FAILED" {
            eprintln!("fails on {REFERENCE} as well: {name}");
        }
    }
    let differing = expected.iter().filter(|(name, result)| seen.get(*name) != Some(result));
    let differing: Vec<_> = differing.map(|(name, result)| (name, result, seen.get(name))).collect();
    assert!(differing.is_empty(), "{differing:?}");
    assert_eq!(seen.len(), expected.len());
    for seed in SEEDS {
        let script = format!(
            "/posix/fsx -N {OPERATIONS} -S {seed} -P /tmp /there/file-{seed} >/tmp/log 2>&1 || cat /tmp/log; sha256sum /there/file-{seed}"
        );
        let [expected, seen] =
            [REFERENCE, SNAPSHOTTER].map(|snapshotter| stage.containerd.sh(&reference, snapshotter, &script));
        eprintln!("fsx, seed {seed}: {}", seen.trim());
        assert_eq!(seen, expected, "seed {seed}");
        assert_eq!(seen.lines().count(), 1, "fsx finds something wrong: {seen}");
    }
}
