//! The daemon dies and comes back: without a network, with everything that was read before.

use std::path::Path;

use ::lazuli::layer::Digest;
use ::lazuli::store::Store;
use redb::ReadableTable as _;
use serde_json::Value;

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, ordinary};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::proxy::total_bytes;
use crate::support::sandbox::{COMMAND_TIMEOUT, run, unmount_below};
use crate::support::tar::Entry;

const READ_ALL: &str = "find /app /bin -type f -exec sha256sum {} + | sort; find / -xdev | sort | sha256sum";

fn check(converted: bool, end: impl Fn(&mut Stage)) {
    if subject() != SNAPSHOTTER {
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
    if subject() != SNAPSHOTTER {
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
    if subject() != SNAPSHOTTER {
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

type Table = redb::TableDefinition<'static, &'static [u8; 32], &'static [u8]>;

fn hex(digest: &str) -> [u8; 32] {
    *digest.parse::<Digest>().unwrap().as_bytes()
}

/// Turns the database and the cache below `root` into what version 1 would have left: layers are known by their blobs.
fn as_version_1(root: &Path) {
    let (layers, indexes): (Table, Table) = (Table::new("layers"), Table::new("indexes"));
    let slots: redb::TableDefinition<&[u8; 32], u32> = redb::TableDefinition::new("slots");
    let snapshots: redb::TableDefinition<&str, &[u8]> = redb::TableDefinition::new("snapshots");
    let meta: redb::TableDefinition<&str, u64> = redb::TableDefinition::new("meta");
    let db = redb::Database::open(root.join("metadata.redb")).unwrap();
    let transaction = db.begin_write().unwrap();
    {
        let mut table = transaction.open_table(layers).unwrap();
        let records: Vec<Value> = table
            .iter()
            .unwrap()
            .map(|entry| serde_json::from_slice(entry.unwrap().1.value()).unwrap())
            .collect();
        let mut slots = transaction.open_table(slots).unwrap();
        let mut indexes = transaction.open_table(indexes).unwrap();
        let mut names = std::collections::HashMap::new();
        for mut record in records {
            let id = record["digest"].as_str().unwrap().to_owned();
            let fields = record.as_object_mut().unwrap();
            fields.remove("proof");
            assert!(fields["variant_of"].is_null(), "this image has none");
            let Some(blob) = fields.remove("blob") else { continue };
            let blob = blob.as_str().unwrap().to_owned();
            fields.insert("digest".to_owned(), Value::from(blob.clone()));
            table.remove(&hex(&id)).unwrap();
            table.insert(&hex(&blob), record.to_string().as_bytes()).unwrap();
            let slot = slots.remove(&hex(&id)).unwrap().unwrap().value();
            slots.insert(&hex(&blob), slot).unwrap();
            // Tables of contents had no record.
            indexes.remove(&hex(&id)).unwrap();
            let dir = |digest: &str| root.join("layers").join(digest.trim_start_matches("sha256:"));
            std::fs::rename(dir(&id), dir(&blob)).unwrap();
            names.insert(id, blob);
        }
        assert!(!names.is_empty(), "something was vouched for");
        let mut table = transaction.open_table(snapshots).unwrap();
        let records: Vec<(String, Value)> = table
            .iter()
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|(key, bytes)| (key.value().to_owned(), serde_json::from_slice(bytes.value()).unwrap()))
            .collect();
        for (key, mut record) in records {
            let fields = record.as_object_mut().unwrap();
            fields.remove("vouched");
            fields.remove("chain");
            if let Some(blob) = fields["layer"].as_str().and_then(|layer| names.get(layer)) {
                fields.insert("layer".to_owned(), Value::from(blob.clone()));
            }
            table.insert(key.as_str(), record.to_string().as_bytes()).unwrap();
        }
        transaction.open_table(meta).unwrap().insert("schema", 1).unwrap();
    }
    transaction.commit().unwrap();
    std::fs::remove_file(root.join("layers/.ids")).unwrap();
}

/// Images of version 1 go on as they were, and nobody else gets what was believed of their layers.
#[test]
fn after_an_update_from_version_1() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new("after_an_update_from_version_1", Generation::One);
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let reference = stage.push_converted(&image, "demo/app:1", &["--estargz"]);
    stage.pull(&reference);
    let before = stage.sh(&reference, READ_ALL);
    let top = stage.containerd.chain_ids(&reference).pop().unwrap();
    let key = stage.containerd.marked_snapshot("view", SNAPSHOTTER, &top);
    stage.lazuli().stop();
    as_version_1(&stage.lazuli().root());
    stage.registry.stop();
    stage.restart_daemon();
    // What was made before keeps what it had.
    stage.proxy.take();
    let view = stage.sandbox.dir("kept");
    stage.containerd.mount_snapshot(SNAPSHOTTER, &key, &view);
    let read = std::fs::read_to_string(view.join("app/lib/p3/m8.txt")).unwrap();
    assert!(read.starts_with("module 3008\n"));
    unmount_below(&view);
    assert_eq!(stage.proxy.take().len(), 0, "it asked the network for what it had");
    stage.registry.restart();
    // What is made from now on is not shown what nobody can vouch for any more, but what the image says, and that lazily.
    stage.proxy.take();
    assert_eq!(
        stage.sh(&reference, "cat /app/lib/p3/m8.txt | head -n 1"),
        "module 3008\n"
    );
    let fetched = total_bytes(&stage.blob_requests());
    assert!(
        fetched > 0 && fetched < image.layer_bytes() / 2,
        "{fetched} bytes of {}",
        image.layer_bytes()
    );
    assert_eq!(stage.sh(&reference, READ_ALL), before);
    let mut pull = stage.lazuli().command("pull", &["--namespace", "other", &reference]);
    run(&mut pull, COMMAND_TIMEOUT).expect_success();
    let other = stage.containerd.in_namespace("other");
    assert_eq!(other.sh(&reference, &subject(), READ_ALL), before);
    let status = stage.lazuli().status();
    let ids = status["layers"].as_array().unwrap().iter();
    let ids: Vec<_> = ids
        .map(|layer| (layer["digest"].clone(), layer["id"].clone()))
        .collect();
    let blobs: std::collections::HashSet<_> = ids.iter().map(|(blob, _)| blob.to_string()).collect();
    assert!(ids.len() > blobs.len(), "{status}");
}
