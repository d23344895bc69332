//! The daemon dies and comes back: without a network, with everything that was read before.

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use ::lazuli::store::Store;

use crate::support::image::{Compression, Flavour, Image, Layer, ordinary};
use crate::support::lazuli;
use crate::support::tar::Entry;

const READ_ALL: &str = "find /app /bin -type f -exec sha256sum {} + | sort; find / -xdev | sort | sha256sum";

fn check(converted: bool, end: impl Fn(&mut Stage)) {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new("restart", Generation::One);
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let reference = match converted {
        true => stage.push_converted(&image, "demo/app:1", &["--estargz"]),
        false => stage.push(&image, "demo/app:1"),
    };
    stage.pull(&reference);
    let before = stage.sh(&reference, READ_ALL);
    assert!(before.lines().count() > 320, "{before}");
    let snapshots = stage.containerd.snapshots(&subject());
    for _ in 0..2 {
        end(&mut stage);
        stage.registry.stop();
        stage.restart_daemon();
        assert_eq!(stage.containerd.snapshots(&subject()), snapshots);
        stage.proxy.take();
        assert_eq!(stage.sh(&reference, READ_ALL), before);
        assert_eq!(stage.proxy.take().len(), 0, "it asked the network for what it had");
    }
}

#[test]
fn killed_gzip() {
    check(false, |stage| stage.lazuli().kill());
}

#[test]
fn killed_estargz() {
    check(true, |stage| stage.lazuli().kill());
}

#[test]
fn stopped() {
    check(false, |stage| {
        assert!(stage.lazuli().stop(), "SIGTERM does not end the daemon with 0")
    });
}

/// A pull that was cut off by the daemon's death is done again without traces.
#[test]
fn killed_in_the_middle_of_a_pull() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new("killed_in_the_middle_of_a_pull", Generation::One);
    let reference = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "demo/app:1");
    stage.proxy.set_link(crate::support::proxy::Link {
        bytes_per_second: Some(4 << 20),
        ..Default::default()
    });
    std::thread::scope(|scope| {
        let lazuli = stage.lazuli.as_ref().unwrap();
        let pull = scope.spawn(|| lazuli.pull(&reference));
        let proxy = &stage.proxy;
        let begun = || {
            proxy
                .exchanges()
                .iter()
                .any(|exchange| exchange.bytes > 1 << 20)
                .then_some(())
        };
        crate::support::sandbox::wait_until(crate::support::sandbox::PATIENCE, begun)
            .expect("the pull fetches a layer");
        lazuli.kill_shared();
        let pull = pull.join().unwrap();
        assert!(!pull.success(), "{}", pull.describe());
        assert!(
            pull.status.and_then(|status| status.code()).is_some(),
            "it crashed: {}",
            pull.describe()
        );
    });
    stage.proxy.set_link(Default::default());
    stage.restart_daemon();
    stage.pull(&reference);
    let sums = stage.sh(&reference, "sha256sum /app/data/large.bin");
    assert!(
        sums.starts_with("28de41db3d3faa1f05c6c7d2dbdd7e33337037e4f38ceaa9c775bbd630fce013"),
        "{sums}"
    );
}

/// Two images over one base; one is removed. After the next start nothing is recorded of it but what its bytes in the cache need, and nothing at
/// all when these are gone.
#[test]
fn what_was_removed_is_forgotten() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new("what_was_removed_is_forgotten", Generation::One);
    let base = ordinary(Flavour::Oci, Compression::Gzip).layers;
    let images = ["stays", "goes"].map(|name| {
        let own = Layer::of(Compression::Gzip, [Entry::file(name, name)]);
        Image::new(Flavour::Oci, base.iter().cloned().chain([own]).collect())
    });
    let gone = images[1].layers.last().unwrap().blob.digest.clone();
    let [stays, goes] = ["stays", "goes"].map(|name| format!("demo/{name}:1"));
    let references = [stage.push(&images[0], &stays), stage.push(&images[1], &goes)];
    for reference in &references {
        stage.pull(reference);
    }
    stage.containerd.remove_image(&references[1]);
    let records = |stage: &mut Stage| {
        assert!(stage.lazuli().stop());
        let store = Store::open(&stage.lazuli().root().join("metadata.redb")).unwrap();
        let layers = store
            .layers()
            .unwrap()
            .into_iter()
            .map(|(digest, _)| digest.to_string());
        (store.images().unwrap().len(), layers.collect::<Vec<_>>())
    };
    // By the release at the start, which is not over when the daemon listens.
    let forgotten = |stage: &mut Stage, images: usize, layers: usize| {
        (0..20).any(|round| {
            stage.lazuli().restart();
            std::thread::sleep(std::time::Duration::from_millis(100 * round));
            let records = records(stage);
            (records.0, records.1.len()) == (images, layers)
        })
    };
    let before = records(&mut stage);
    assert!(before.0 == 2 && before.1.contains(&gone), "{before:?}");
    assert!(forgotten(&mut stage, 1, before.1.len()));
    let hex = gone.trim_start_matches("sha256:");
    std::fs::remove_dir_all(stage.lazuli().root().join("layers").join(hex)).unwrap();
    assert!(forgotten(&mut stage, 1, before.1.len() - 1));
    assert!(!records(&mut stage).1.contains(&gone));
    stage.restart_daemon();
    assert_eq!(stage.sh(&references[0], "cat stays"), "stays");
}
