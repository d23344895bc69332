//! A node with a thousand layers, which starts again.
//!
//! Figures are for BENCHMARKS.md, by a release build: `LAZULI_BIN=target/release/lazuli`.

use std::time::{Duration, Instant};

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::{SNAPSHOTTER, address_in};
use crate::support::sandbox::{PATIENCE, listens_unix, wait_until};
use crate::support::tar::{Entry, noise};

/// Images, layers of each, and files of a layer with their bytes.
const IMAGES: u64 = 20;
const LAYERS: u64 = 50;
const FILES: u64 = 10;
const LENGTH: usize = 2_000;
/// Longest start in a test, which a debug build on a busy machine has to meet as well: with a single look at the network, the whole of a cache
/// or each layer's bytes it would take minutes.
const START: Duration = Duration::from_secs(15);

/// An image of layers that no other image has; a container can be started on the first one.
fn image(number: u64) -> Image {
    let layer = |at: u64| {
        let seed = number * LAYERS + at;
        let dir = format!("layer-{at}");
        let files = (0..FILES).map(|file| Entry::file(format!("{dir}/{file}"), noise(seed * FILES + file, LENGTH)));
        let mut entries = vec![Entry::dir(&dir)];
        entries.extend(files);
        if seed == 0 {
            entries.extend(base_entries());
        }
        Layer::of(Compression::Gzip, entries)
    };
    Image::new(Flavour::Oci, (0..LAYERS).map(layer).collect())
}

/// All of a thousand layers are there when the socket answers again, without a network, whether the daemon has ended in order, was killed, or its
/// worker was.
#[test]
#[ignore = "minutes, for pulls: make test-slow"]
fn a_thousand_layers_are_back_at_once() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new("a_thousand_layers_are_back_at_once", Generation::One);
    let mut references = Vec::new();
    for number in 0..IMAGES {
        let reference = stage.push(&image(number), &format!("many/image-{number}:1"));
        stage.pull(&reference);
        references.push(reference);
    }
    let live = |stage: &Stage| {
        let status = stage.lazuli.as_ref().unwrap().status();
        status["layers"].as_array().unwrap().len() as u64
    };
    let all = live(&stage);
    assert!(all >= IMAGES * LAYERS, "only {all} layers were taken");
    let container = stage.containerd.start_container(&references[0], &subject());
    stage.registry.stop();
    let address = address_in(&stage.sandbox);
    let restored = format!("restored={all} missing=0");

    let worker = stage.lazuli().worker();
    let log = stage.lazuli().log().len();
    let begun = Instant::now();
    let killed = rustix::process::Pid::from_raw(worker.unwrap() as i32).unwrap();
    rustix::process::kill_process(killed, rustix::process::Signal::KILL).unwrap();
    let serves = |stage: &Stage| {
        let new = stage.lazuli.as_ref().unwrap().log();
        new.get(log..)?.contains("serving address=").then_some(())
    };
    wait_until(PATIENCE, || serves(&stage)).expect("no next worker serves");
    let took = begun.elapsed();
    eprintln!("{all} layers: the next worker serves after {} ms", took.as_millis());
    assert!(took < START, "{took:?}");
    assert_eq!(live(&stage), all);
    let read = stage.containerd.exec(&container, "cat /layer-7/3");
    assert!(read.expect_success().stdout == noise(7 * FILES + 3, LENGTH));
    stage.containerd.remove_container(&container);

    for (how, kills) in [("an orderly end", false), ("a kill", true)] {
        match kills {
            true => stage.lazuli().kill(),
            false => assert!(stage.lazuli().stop()),
        }
        let log = stage.lazuli().log().len();
        let begun = Instant::now();
        stage.lazuli().restart();
        assert!(listens_unix(&address).is_some());
        let took = begun.elapsed();
        eprintln!(
            "{all} layers: a start after {how} answers after {} ms",
            took.as_millis()
        );
        assert!(took < START, "{how}: {took:?}");
        assert!(
            stage.lazuli().log()[log..].contains(&restored),
            "{how}: not all are back"
        );
        assert_eq!(live(&stage), all, "{how}");
    }
    stage.await_containerd();
    let last = format!("cat /layer-{}/9", LAYERS - 1);
    let read = stage.containerd.run(&references[0], &subject(), &last).expect_success();
    assert!(read.stdout == noise((LAYERS - 1) * FILES + 9, LENGTH));
}
