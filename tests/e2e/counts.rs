//! What a cold start costs its registry: requests and bytes of a fixed image and a fixed start, for each format, against figures that are kept
//! here. Seconds depend on the machine, these do not: whoever makes a start dearer finds out, and whoever makes it cheaper writes the new
//! figures down (the test prints them).

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::proxy::{Link, total_bytes};
use crate::support::tar::{Entry, noise};

/// What a start may cost more than its figures, in percent.
const MOST: u64 = 105;

/// How many connections a stream tries to use depends on how fast they are.
const CONFIG: &str = "[fetch]\nmax_stream_connections = 1\n";

/// Requests for blobs, and their bytes, from the beginning of the pull to the end of the start's reads.
struct Figures {
    format: &'static str,
    /// Options of the conversion; `None`: the image as it was made.
    options: Option<&'static [&'static str]>,
    requests: u64,
    bytes: u64,
}

const FIGURES: [Figures; 3] = [
    Figures {
        format: "plain",
        options: None,
        requests: 4,
        bytes: 24_930_009,
    },
    Figures {
        format: "estargz",
        options: Some(&["--estargz"]),
        requests: 12,
        bytes: 10_436_926,
    },
    Figures {
        format: "zstd:chunked",
        options: Some(&["--zstdchunked"]),
        requests: 12,
        bytes: 10_306_159,
    },
];

/// Something like an interpreter with its library: many small files of which few are read, and large ones of which parts are.
fn image() -> Image {
    let dirs = (0..10).map(|dir| Entry::dir(format!("lib/{dir}")));
    let small =
        (0..400_u64).map(|at| Entry::file(format!("lib/{}/{at}", at % 10), noise(at, 5_000 + 37 * at as usize)));
    let library = Layer::of(
        Compression::Gzip,
        std::iter::once(Entry::dir("lib")).chain(dirs).chain(small),
    );
    let large = (0..3_u64).map(|at| Entry::file(format!("large-{at}"), noise(1000 + at, 6 << 20)));
    let base = Layer::of(Compression::Gzip, base_entries());
    Image::new(Flavour::Oci, vec![base, library, Layer::of(Compression::Gzip, large)])
}

/// What the start reads, one after the other: every eighth of the small files, and a part of a large one.
const START: &str = "for at in $(seq 0 8 399); do cat /lib/$((at % 10))/$at; done | wc -c; \
    dd if=/large-1 bs=65536 skip=30 count=20 2>/dev/null | wc -c";

#[test]
fn a_start_costs_its_registry_no_more_than_it_did() {
    let Some(generation) = Generation::two() else { return };
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut dearer = Vec::new();
    for figures in &FIGURES {
        let stage = Stage::with("a_start_costs_its_registry", generation.clone(), CONFIG, |_| ());
        let reference = match figures.options {
            None => stage.push(&image(), "counts/this:1"),
            Some(options) => stage.push_converted(&image(), "counts/this:1", options),
        };
        // As far away as registries are: what is asked for meanwhile depends on it.
        stage.proxy.set_link(Link::SHAPED);
        stage.proxy.take();
        stage.pull(&reference);
        stage.sh(&reference, START);
        let asked = stage.blob_requests();
        let (requests, bytes) = (asked.len() as u64, total_bytes(&asked));
        eprintln!("{}: requests: {requests}, bytes: {bytes}", figures.format);
        if requests * 100 > figures.requests * MOST || bytes * 100 > figures.bytes * MOST {
            dearer.push(format!(
                "{}: {requests} requests and {bytes} bytes, not {} and {}",
                figures.format, figures.requests, figures.bytes
            ));
        }
    }
    assert!(dearer.is_empty(), "{dearer:#?}");
}
