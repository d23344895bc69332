//! What a container sees of an image is what it sees with containerd's overlayfs snapshotter: names, types, modes, owners, sizes, times,
//! extended attributes, link counts, contents. For every format, and for layers as odd as containerd itself unpacks.

use crate::stage::{Stage, subject};
use crate::support::containerd::{Generation, REFERENCE};
use crate::support::image::{Compression, Flavour, Image, Layer, application_entries, base_entries, ordinary};
use crate::support::lazuli::Mounted;
use crate::support::sandbox::Sandbox;
use crate::support::tar::{Entry, noise};
use crate::support::torture::{self, Case};
use crate::support::tree::{Options, compare};

/// Entries that the ordinary image has at least; a comparison of less compared nothing.
const ORDINARY_ENTRIES: usize = 360;

fn check_ordinary(name: &str, image: &Image) {
    let stage = Stage::new(name, Generation::One);
    let reference = stage.push(image, "trees/ordinary:1");
    let comparison = stage.compare(&reference, &Options::default()).expect_equal();
    assert!(comparison.entries > ORDINARY_ENTRIES, "{comparison:?}");
    assert!(comparison.bytes > 5_000_000, "{comparison:?}");
}

#[test]
fn plain_gzip() {
    check_ordinary("plain_gzip", &ordinary(Flavour::Oci, Compression::Gzip));
}

#[test]
fn plain_zstd() {
    check_ordinary("plain_zstd", &ordinary(Flavour::Oci, Compression::Zstd));
}

#[test]
fn plain_tar() {
    check_ordinary("plain_tar", &ordinary(Flavour::Oci, Compression::None));
}

#[test]
fn docker_gzip() {
    check_ordinary("docker_gzip", &ordinary(Flavour::Docker, Compression::Gzip));
}

/// An image whose layers are all of different kinds, over each other's files.
#[test]
fn mixed_compressions() {
    let image = Image::new(
        Flavour::Oci,
        vec![
            Layer::of(Compression::Zstd, base_entries()),
            Layer::of(Compression::None, application_entries()),
            Layer::of(
                Compression::Gzip,
                [
                    Entry::dir("app"),
                    Entry::dir("app/data"),
                    Entry::whiteout("app/data/middle.bin"),
                    Entry::file("app/data/large.bin", noise(77, 3_000_000)),
                ],
            ),
        ],
    );
    check_ordinary("mixed_compressions", &image);
}

/// What eStargz cannot say, or says besides: its index has whole seconds only, and its own files are no part of the image.
fn estargz_options() -> Options {
    Options {
        ignored_root_names: ["stargz.index.json", ".no.prefetch.landmark", ".prefetch.landmark"]
            .map(str::to_owned)
            .into(),
        whole_seconds: true,
        ..Options::default()
    }
}

#[test]
fn estargz() {
    let stage = Stage::new("estargz", Generation::One);
    let image = ordinary(Flavour::Docker, Compression::Gzip);
    let reference = stage.push_converted(&image, "trees/estargz:1", &["--estargz"]);
    let comparison = stage.compare(&reference, &estargz_options()).expect_equal();
    assert!(comparison.entries > ORDINARY_ENTRIES, "{comparison:?}");
}

/// Chunks much smaller than the files, so that every file has many.
#[test]
fn estargz_of_small_chunks() {
    let stage = Stage::new("estargz_of_small_chunks", Generation::One);
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let options = ["--estargz", "--estargz-chunk-size", "20000"];
    let reference = stage.push_converted(&image, "trees/chunks:1", &options);
    let comparison = stage.compare(&reference, &estargz_options()).expect_equal();
    assert!(comparison.entries > ORDINARY_ENTRIES, "{comparison:?}");
}

/// The lower layer eStargz, the upper one plain gzip.
#[test]
fn estargz_below_gzip() {
    let stage = Stage::new("estargz_below_gzip", Generation::One);
    let lower = Image::new(Flavour::Oci, vec![Layer::of(Compression::Gzip, base_entries())]);
    let layer = stage.converted(&lower, &["--estargz"]).layers.remove(0);
    let upper = Layer::of(Compression::Gzip, application_entries());
    let reference = stage.push(&Image::new(Flavour::Oci, vec![layer, upper]), "trees/mixed:1");
    let comparison = stage.compare(&reference, &estargz_options()).expect_equal();
    assert!(comparison.entries > ORDINARY_ENTRIES, "{comparison:?}");
}

fn check_torture(case: &Case) {
    let stage = Stage::new(case.name, Generation::One);
    let reference = stage.push(&case.image, &format!("torture/{}:1", case.name));
    let options = Options {
        implied_dirs: case.implied_dirs.clone(),
        ..Options::default()
    };
    let comparison = stage.compare(&reference, &options).expect_equal();
    assert!(comparison.entries > 4, "{comparison:?}");
}

macro_rules! torture {
    ($($name:ident)*) => {
        mod torture_layers {
            use super::*;
            $(
                #[test]
                fn $name() {
                    check_torture(&torture::$name());
                }
            )*
        }
    };
}

torture! {
    names links duplicates metadata xattrs sizes sparse devices whiteouts base_whiteouts implied taken_over archives
    many_entries huge_file
}

/// The same odd layers as eStargz, where stargz' converter takes them: it writes names into JSON and follows no links.
mod torture_estargz {
    use super::*;

    fn check(case: &Case) {
        let stage = Stage::new(case.name, Generation::One);
        let reference = stage.push_converted(&case.image, &format!("torture/{}:esgz", case.name), &["--estargz"]);
        let options = Options {
            implied_dirs: case.implied_dirs.clone(),
            ..estargz_options()
        };
        stage.compare(&reference, &options).expect_equal();
    }

    #[test]
    fn sizes() {
        check(&torture::sizes());
    }

    #[test]
    fn whiteouts() {
        check(&torture::whiteouts());
    }

    #[test]
    fn devices() {
        check(&torture::devices());
    }

    #[test]
    fn many_entries() {
        check(&torture::many_entries());
    }
}

/// Seeds of [`random_chains`]: the first, and how many. `LAZULI_E2E_SEEDS=FIRST:COUNT` tries others.
const SEEDS: (u64, u64) = (1, 24);
/// Of so many chains containerd takes at least one: else nothing was compared.
const TAKEN_OF: u64 = 4;

fn seeds() -> (u64, u64) {
    let Ok(text) = std::env::var("LAZULI_E2E_SEEDS") else {
        return SEEDS;
    };
    let parsed = text
        .split_once(':')
        .and_then(|(first, count)| Some((first.parse().ok()?, count.parse().ok()?)));
    parsed.expect("LAZULI_E2E_SEEDS is FIRST:COUNT")
}

/// Chains made by chance look as containerd unpacks them, where it does.
#[test]
fn random_chains() {
    let stage = Stage::new("random_chains", Generation::One);
    let (first, count) = seeds();
    let (mut taken, mut entries, mut failed) = (0, 0, Vec::new());
    for seed in first..first + count {
        let reference = stage.push(&torture::chain(seed), &format!("random/chain:{seed}"));
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        if !stage.containerd.pull(&reference, REFERENCE).success() {
            continue;
        }
        taken += 1;
        let pulled = stage.try_pull(&reference);
        if !pulled.success() {
            failed.push(format!("seed {seed}: {}", pulled.describe()));
            continue;
        }
        let options = Options {
            unpacked_since: since.ok().map(|since| since.as_secs() as i64),
            ghosts: true,
            ..Options::default()
        };
        let expected = stage.containerd.view(&reference, REFERENCE);
        let view = stage.containerd.view(&reference, &subject());
        let comparison = compare(&expected.path, &view.path, &options);
        entries += comparison.entries;
        if !comparison.differences.is_empty() {
            failed.push(format!("seed {seed}:\n  {}", comparison.differences.join("\n  ")));
        }
    }
    println!("{taken} of {count} chains were compared, {entries} entries");
    assert!(
        failed.is_empty(),
        "{} of {taken} chains differ:\n{}",
        failed.len(),
        failed.join("\n")
    );
    assert!(
        taken * TAKEN_OF >= count,
        "containerd took only {taken} of {count} chains"
    );
}

/// GNU tar's old sparse files, which containerd refuses: compared with GNU tar's own extraction.
#[test]
fn old_gnu_sparse_files() {
    let sandbox = Sandbox::new("old_gnu_sparse_files");
    let reference = sandbox.path("reference");
    let case = torture::gnu_sparse(&reference);
    let layout = sandbox.path("layout");
    case.image.write_layout(&layout, "1");
    let mounted = Mounted::new(&sandbox, &format!("oci:{}", layout.display()));
    let comparison = compare(&reference, &mounted.path, &Options::default()).expect_equal();
    assert!(comparison.bytes > 60_000_000, "{comparison:?}");
}
