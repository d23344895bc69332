//! Layers that are not there within Prepare's bound: containerd is lent what is being streamed, so that each byte comes over the network once; and
//! whatever happens meanwhile, containerd has its image in the end.

use std::collections::HashMap;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use ::lazuli::catalog::containerd::{Containerd, Ingest, IngestError, Ingested};
use ::lazuli::layer::Digest;

use crate::stage::{Stage, subject};
use crate::support::containerd::{Generation, NAMESPACE};
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries, digest_of};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::proxy::{Exchange, Link, total_bytes};
use crate::support::sandbox::{PATIENCE, wait_until};
use crate::support::tar::{Entry, noise};
use crate::takeover::harness::kill_worker;

/// Bytes of the layer that takes too long.
const LARGE: usize = 90_000_000;
/// It takes 18 s over this link, and Prepare waits for 8.
const LINK: Link = Link {
    latency: Duration::from_millis(5),
    bytes_per_second: Some(5_000_000),
};
/// It takes 10 s over this one.
const FASTER: Link = Link {
    latency: Duration::from_millis(5),
    bytes_per_second: Some(9_000_000),
};
/// Bytes behind the wrong one: what ends a gzip member is not decoded.
const LAST: u64 = 1_000_000;
/// What a pull may fetch of an image, of its size, in percent: tables and manifests are no matter.
const ONCE: u64 = 103;

/// A base, a layer that takes too long, and two on top of it, of which one takes a moment.
fn image() -> Image {
    let layers = [
        base_entries(),
        vec![Entry::dir("data"), Entry::file("data/large", noise(41, LARGE))],
        vec![Entry::dir("data"), Entry::file("data/next", noise(42, 8_000_000))],
        vec![Entry::dir("data"), Entry::file("data/last", b"last".to_vec())],
    ];
    let layers = layers.map(|entries| Layer::of(Compression::Gzip, entries));
    Image::new(Flavour::Oci, layers.to_vec())
}

fn size(image: &Image) -> u64 {
    image.layers.iter().map(|layer| layer.blob.bytes.len() as u64).sum()
}

/// containerd's own requests for a blob.
fn by_containerd<'a>(asked: &'a [Exchange], digest: &str) -> Vec<&'a Exchange> {
    let of_it = asked.iter().filter(|exchange| exchange.path.contains(digest));
    of_it.filter(|exchange| exchange.agent.contains("containerd")).collect()
}

fn log(stage: &Stage) -> String {
    stage.lazuli.as_ref().unwrap().log()
}

fn check_content(stage: &Stage, reference: &str) {
    let sums = stage.sh(
        reference,
        "sha256sum /data/large /data/next | cut -d' ' -f1; cat /data/last",
    );
    let sum = |bytes: &[u8]| digest_of(bytes)["sha256:".len()..].to_owned();
    let expected = format!("{}\n{}\nlast", sum(&noise(41, LARGE)), sum(&noise(42, 8_000_000)));
    assert_eq!(sums.trim_end(), expected);
}

/// A stage with Lazuli as the differ, and the image behind a slow link.
fn slow(name: &str) -> Option<(Stage, Image, String)> {
    if subject() != SNAPSHOTTER {
        return None;
    }
    let stage = Stage::applying(name, Generation::two()?, "");
    let (image, reference) = behind_slow_link(&stage);
    Some((stage, image, reference))
}

/// The image behind a slow link.
fn behind_slow_link(stage: &Stage) -> (Image, String) {
    let image = image();
    let reference = stage.push(&image, "lend/slow:1");
    stage.proxy.set_link(LINK);
    stage.proxy.take();
    (image, reference)
}

#[test]
fn a_layer_that_is_left_to_containerd_comes_once() {
    let Some((mut stage, image, reference)) = slow("a_layer_that_is_left_to_containerd_comes_once") else {
        return;
    };
    stage.pull(&reference);
    let asked = stage.blob_requests();
    let large = &image.layers[1].blob.digest;
    let log_now = log(&stage);
    assert!(log_now.contains("is left to containerd"), "it was not slow:\n{log_now}");
    assert!(log_now.contains("containerd was lent what was streamed"), "{log_now}");
    assert_eq!(by_containerd(&asked, large).len(), 0, "{asked:#?}");
    let (bytes, size) = (total_bytes(&asked), size(&image));
    assert!(bytes * 100 <= size * ONCE, "{bytes} bytes came of {size}");
    // containerd has the blob, and Lazuli the layer: nothing is unpacked, nothing is packed once more.
    let content = stage.containerd.ctr_ok(&["content", "ls", "-q"]).text();
    assert!(content.contains(large.as_str()), "{content}");
    assert!(!log_now.contains("is unpacked by containerd's own differ"), "{log_now}");
    let passes = log_now
        .lines()
        .filter(|line| line.contains(": streamed layer="))
        .count();
    assert_eq!(passes, image.layers.len(), "{log_now}");
    check_content(&stage, &reference);
    assert_eq!(total_bytes(&stage.blob_requests()), bytes, "nothing is missing");
    stage.restart_daemon();
    check_content(&stage, &reference);
}

/// A byte of what was lent turns out wrong at the end: it is taken back, and containerd gets the next download, or begins anew by itself where all
/// of them are wrong. It never goes on behind what is wrong, for then its pull would fail.
#[test]
fn what_was_lent_and_is_wrong_is_taken_back() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let Some(generation) = Generation::two() else { return };
    for (times, is_lent) in [(1, true), (usize::MAX, false)] {
        let name = "what_was_lent_and_is_wrong_is_taken_back";
        // A stream is one body then.
        let config = "[fetch]\nmax_stream_connections = 1\n";
        let stage = Stage::configured(name, generation.clone(), |_| String::new(), config);
        let image = image();
        let reference = stage.push(&image, "lend/slow:1");
        stage.proxy.set_link(FASTER);
        stage.proxy.take();
        let large = &image.layers[1].blob;
        let last = large.bytes.len() as u64 - LAST;
        stage.proxy.damage(&large.digest, "containerd", last, times);
        stage.pull(&reference);
        let log_now = log(&stage);
        let of_large =
            |line: &&str| line.contains("containerd was lent what was streamed") && line.contains(&large.digest);
        let asked = stage.blob_requests();
        assert_eq!(
            log_now.lines().filter(of_large).count(),
            usize::from(is_lent),
            "{log_now}"
        );
        assert_eq!(by_containerd(&asked, &large.digest).is_empty(), is_lent, "{asked:#?}");
        let own = asked.iter().filter(|exchange| exchange.path.contains(&large.digest));
        assert!(own.count() > 1, "nothing was wrong: {asked:#?}");
        check_content(&stage, &reference);
    }
}

/// Where that is not wanted, each fetches for himself.
#[test]
fn nothing_is_lent_where_that_is_not_wanted() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let Some(generation) = Generation::two() else { return };
    let stage = Stage::configured(
        "nothing_is_lent",
        generation,
        |_| String::new(),
        "[content]\nlend = false\n",
    );
    let (image, reference) = behind_slow_link(&stage);
    stage.pull(&reference);
    let log_now = log(&stage);
    assert!(log_now.contains("is left to containerd"), "it was not slow:\n{log_now}");
    assert!(!log_now.contains("lent"), "{log_now}");
    let asked = stage.blob_requests();
    let large = &image.layers[1].blob.digest;
    let own = by_containerd(&asked, large);
    let whole = |exchange: &&Exchange| exchange.range.is_none();
    assert!(own.iter().any(whole), "containerd has not fetched it: {asked:#?}");
    check_content(&stage, &reference);
}

/// Where containerd unpacks what it is lent, nobody needs what Lazuli would make of it.
#[test]
fn nothing_is_made_of_a_layer_that_containerd_unpacks() {
    for generation in crate::stage::generations() {
        if subject() != SNAPSHOTTER {
            return;
        }
        let stage = Stage::unpacking("nothing_is_made_of_a_layer", generation);
        let (image, reference) = behind_slow_link(&stage);
        stage.pull(&reference);
        let log_now = log(&stage);
        let large = image.layers[1].blob.digest.as_str();
        assert!(log_now.contains("containerd was lent what was streamed"), "{log_now}");
        let made = |line: &&str| line.contains(": streamed layer=") && line.contains(large);
        assert_eq!(log_now.lines().filter(made).count(), 0, "{log_now}");
        let cached = stage.lazuli.as_ref().unwrap().root().join("layers");
        let cached = cached.join(large.strip_prefix("sha256:").unwrap());
        assert!(!cached.exists(), "its bytes are on the disk twice");
        let (bytes, size) = (total_bytes(&stage.blob_requests()), size(&image));
        assert!(bytes * 100 <= size * ONCE, "{bytes} bytes came of {size}");
        check_content(&stage, &reference);
    }
}

/// The same where containerd knows Lazuli's differ and has not asked it for the last layer that it was left.
#[test]
fn nothing_is_made_for_a_differ_that_is_not_asked() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let Some(generation) = Generation::two() else { return };
    let stage = Stage::ignoring("nothing_is_made_for_a_differ", generation);
    // A layer that nobody but containerd unpacks.
    let mut foreign = Layer::of(Compression::Gzip, [Entry::file("foreign", "foreign")]);
    stage.push(&Image::new(Flavour::Oci, vec![foreign.clone()]), "elsewhere/layers:1");
    foreign.media_type = Some("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip".to_owned());
    let host = stage.registry.host();
    foreign.urls = vec![format!(
        "http://{host}/v2/elsewhere/layers/blobs/{}",
        foreign.blob.digest
    )];
    stage.pull(&stage.push(&Image::new(Flavour::Oci, vec![foreign]), "lend/foreign:1"));
    let (image, reference) = behind_slow_link(&stage);
    stage.pull(&reference);
    let (log_now, large) = (log(&stage), image.layers[1].blob.digest.as_str());
    assert!(log_now.contains("containerd was lent what was streamed"), "{log_now}");
    let made = |line: &&str| line.contains(": streamed layer=") && line.contains(large);
    assert_eq!(log_now.lines().filter(made).count(), 0, "{log_now}");
    check_content(&stage, &reference);
}

/// Who comes to want a layer when it is decided that it comes for containerd alone has it in the end all the same, from where it has gone.
#[test]
fn a_late_joiner_has_what_comes_for_containerd_alone() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let Some(generation) = Generation::two() else { return };
    let stage = Stage::unpacking("a_late_joiner", generation);
    // Elsewhere in its image, so that containerd itself does not wait for the other pull.
    let other = Layer::of(Compression::Gzip, [Entry::file("data/other", b"other".to_vec())]);
    let [base, large] = [0, 1].map(|at| image().layers[at].clone());
    let joiner = Image::new(Flavour::Oci, vec![large.clone(), base, other]);
    let joiner = stage.push(&joiner, "lend/joiner:1");
    let (image, reference) = behind_slow_link(&stage);
    let large = large.blob.digest.as_str();
    let lazuli = stage.lazuli.as_ref().unwrap();
    thread::scope(|scope| {
        let pull = scope.spawn(|| stage.try_pull(&reference));
        let alone = |line: &str| line.contains("comes for containerd alone") && line.contains(large);
        let is_alone = || log(&stage).lines().any(alone).then_some(());
        wait_until(PATIENCE, is_alone).expect("it was not slow");
        // What is left comes within Prepare's bound.
        let received = || {
            let status = lazuli.status();
            let mut loading = status["loading"].as_array().unwrap().iter();
            let loading = loading.find(|loading| loading["digest"] == large);
            loading.map_or(0, |loading| loading["received_bytes"].as_u64().unwrap())
        };
        let nearly_all = (LARGE - 30_000_000) as u64;
        wait_until(PATIENCE, || (received() > nearly_all).then_some(())).expect("it does not come");
        stage.pull(&joiner);
        pull.join().unwrap().expect_success();
    });
    let log_now = log(&stage);
    assert!(
        log_now.contains("is had from its content store"),
        "it came too late:\n{log_now}"
    );
    let left = |line: &&str| line.contains("is left to containerd, which waits") && line.contains(large);
    assert_eq!(log_now.lines().filter(left).count(), 1, "{log_now}");
    let status = lazuli.status();
    let mut live = status["layers"].as_array().unwrap().iter();
    assert!(live.any(|live| live["digest"] == large), "{status:#}");
    let (bytes, size) = (total_bytes(&stage.blob_requests()), size(&image));
    assert!(bytes * 100 <= size * ONCE, "{bytes} bytes came of {size}");
    let sum = stage.sh(&joiner, "sha256sum /data/large | cut -d' ' -f1; cat /data/other");
    let expected = &digest_of(&noise(41, LARGE))["sha256:".len()..];
    assert_eq!(sum.trim_end(), format!("{expected}\nother"));
    check_content(&stage, &reference);
}

/// The same with containerd 1.6, which unpacks by itself, and `lazuli pull`.
#[test]
fn lazuli_pull_waits_for_what_is_lent() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("lazuli_pull_waits_for_what_is_lent", Generation::One);
    let (image, reference) = behind_slow_link(&stage);
    let lazuli = stage.lazuli.as_ref().unwrap();
    lazuli.pull(&reference).expect_success();
    assert!(
        lazuli.log().contains("containerd was lent what was streamed"),
        "{}",
        lazuli.log()
    );
    let (bytes, size) = (total_bytes(&stage.blob_requests()), size(&image));
    assert!(bytes * 100 <= size * ONCE, "{bytes} bytes came of {size}");
    check_content(&stage, &reference);
}

/// containerd fetches everything from a layer on that it is left; not what is there, or lazy.
#[test]
fn lazy_layers_above_one_that_is_left_are_not_fetched() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let Some(generation) = Generation::two() else { return };
    let conversion = Stage::new("lazy_layers_above: conversion", Generation::One);
    let layers = [
        base_entries(),
        vec![Entry::dir("lazy"), Entry::file("lazy/most", noise(51, 30_000_000))],
        vec![Entry::file("lazy/more", noise(52, 20_000_000))],
        vec![Entry::file("lazy/other", noise(53, 20_000_000))],
        vec![Entry::file("lazy/last", noise(54, 20_000_000))],
    ];
    let layers = layers.map(|entries| Layer::of(Compression::Gzip, entries));
    let lazy = conversion.converted(&Image::new(Flavour::Oci, layers.to_vec()), &["--estargz"]);
    drop(conversion);
    // Two plain ones: below, and above more lazy ones than containerd fetches at a time.
    let plain = image();
    let mut layers = vec![plain.layers[1].clone()];
    layers.extend(lazy.layers.iter().cloned());
    layers.extend(plain.layers[2..].iter().cloned());
    let image = Image::new(Flavour::Oci, layers);
    let stage = Stage::applying("lazy_layers_above_one_that_is_left", generation, "");
    let reference = stage.push(&image, "lend/mixed:1");
    stage.proxy.set_link(LINK);
    stage.proxy.take();
    stage.pull(&reference);
    let asked = stage.blob_requests();
    assert!(
        log(&stage).contains("is left to containerd"),
        "it was not slow:\n{}",
        log(&stage)
    );
    let bytes = total_bytes(&asked);
    // What lazy layers have to read is their tables, and what is read ahead of them.
    let streamed: u64 = plain.layers[1..]
        .iter()
        .map(|layer| layer.blob.bytes.len() as u64)
        .sum();
    assert!(
        bytes < streamed + 20_000_000,
        "{bytes} bytes, of which {streamed} are streamed: {asked:#?}"
    );
    check_content(&stage, &reference);
    let sum = stage.sh(&reference, "sha256sum /lazy/last | cut -d' ' -f1");
    assert_eq!(sum.trim_end(), &digest_of(&noise(54, 20_000_000))["sha256:".len()..]);
}

/// The stream's end in the middle is not the pull's: containerd goes on where it was.
#[test]
fn containerd_goes_on_where_a_killed_worker_ended() {
    let Some((stage, image, reference)) = slow("containerd_goes_on_where_a_killed_worker_ended") else {
        return;
    };
    let large = image.layers[1].blob.digest.clone();
    thread::scope(|scope| {
        let pull = scope.spawn(|| stage.try_pull(&reference));
        let left = || log(&stage).contains("is left to containerd").then_some(());
        wait_until(PATIENCE, left).expect("it was not slow");
        thread::sleep(Duration::from_secs(2));
        let lazuli = stage.lazuli.as_ref().unwrap();
        kill_worker(lazuli, lazuli.worker().unwrap());
        // The rest at once.
        stage.proxy.set_link(Link::default());
        pull.join().unwrap().expect_success();
    });
    let asked = stage.blob_requests();
    let own = by_containerd(&asked, &large);
    let resumes = |exchange: &&Exchange| {
        let range = exchange.range.as_deref().unwrap_or_default();
        let from = range.strip_prefix("bytes=").and_then(|range| range.split('-').next());
        from.is_some_and(|from| from.parse::<u64>().is_ok_and(|from| from > 1_000_000))
    };
    assert!(own.iter().all(resumes) && !own.is_empty(), "{asked:#?}");
    check_content(&stage, &reference);
}

/// Nobody waits for a pull that was given up: the stream ends, and the next pull has all it needs.
#[test]
fn what_is_lent_ends_with_a_pull_that_is_given_up() {
    let Some((stage, _, reference)) = slow("what_is_lent_ends_with_a_pull_that_is_given_up") else {
        return;
    };
    let mut pull = stage.containerd.ctr(&["images", "pull", "--plain-http", &reference]);
    pull.env("CONTAINERD_SNAPSHOTTER", SNAPSHOTTER);
    let mut pull = pull.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // containerd has to know of the snapshot: one that it asked for in vain goes with its next collection of garbage.
    let unpacks = |key: &String| key.contains("extract-");
    let left = || {
        let left = log(&stage).contains("is left to containerd");
        (left && stage.containerd.snapshots(SNAPSHOTTER).iter().any(unpacks)).then_some(())
    };
    let left = wait_until(PATIENCE, left);
    // As Ctrl-C would end it.
    pull.kill().unwrap();
    assert!(!pull.wait().unwrap().success(), "it was not slow");
    left.expect("it was not slow");
    let over = || log(&stage).contains("a pull was given up").then_some(());
    wait_until(PATIENCE, over).unwrap_or_else(|| panic!("the stream goes on: {}", log(&stage)));
    let status = || stage.lazuli.as_ref().unwrap().status();
    let idle = || (status()["loading"].as_array().map_or(0, Vec::len) == 0).then_some(());
    wait_until(PATIENCE, idle).unwrap_or_else(|| panic!("{:#}", status()["loading"]));
    stage.proxy.set_link(Link::default());
    stage.pull(&reference);
    check_content(&stage, &reference);
}

/// A writer of a blob is one at a time, goes on where another one was, and takes back what was wrong.
#[test]
fn what_was_wrong_is_taken_back() {
    let Some(generation) = Generation::two() else { return };
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("what_was_wrong_is_taken_back", generation);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let containerd = {
        let _entered = runtime.enter();
        Containerd::new(&stage.containerd.address)
    };
    let bytes = noise(77, 3_000_000);
    let digest: Digest = digest_of(&bytes).parse().unwrap();
    let ingest = || Ingest {
        namespace: NAMESPACE,
        lease: "writers",
        reference: format!("layer-{digest}"),
        digest,
        size: bytes.len() as u64,
        labels: HashMap::from([("lazuli.test".to_owned(), "lent".to_owned())]),
    };
    runtime.block_on(async {
        containerd.create_lease(NAMESPACE, "writers", 1).await.unwrap();
        // Once it has come back, nothing is there, whoever looks first.
        for _ in 0..10 {
            let mut wrong = containerd.open_ingest(ingest()).await.unwrap().unwrap();
            assert_eq!(wrong.from(), 0, "what was wrong is there");
            assert!(wrong.write(noise(78, 1_000_000)).await);
            wrong.take_back().await;
        }
        let mut first = containerd.open_ingest(ingest()).await.unwrap().unwrap();
        assert_eq!(first.from(), 0);
        assert!(first.write(&bytes[..1_000_000]).await);
        let taken = containerd
            .open_ingest(ingest())
            .await
            .err()
            .expect("two writers at a time");
        assert!(matches!(taken, IngestError::Taken { .. }), "{taken}");
        // What was given to the call has arrived before it ends.
        let at = |from: u64| {
            let (containerd, ingest) = (&containerd, ingest());
            async move {
                for _ in 0..100 {
                    match containerd.open_ingest(ingest.clone()).await {
                        Ok(writer) => {
                            let writer = writer.unwrap();
                            assert!(writer.from() <= from);
                            return writer;
                        }
                        Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                    }
                }
                panic!("the reference is not let go");
            }
        };
        drop(first);
        let mut second = at(1_000_000).await;
        let from = second.from() as usize;
        assert!(second.write(vec![0; bytes.len() - from]).await);
        assert!(second.begin_anew().await);
        assert!(second.write(&bytes[..500_000]).await);
        assert!(second.write(&bytes[500_000..]).await);
        assert_eq!(second.commit().await.unwrap(), Ingested::Written { from: 0 });
        assert!(containerd.open_ingest(ingest()).await.unwrap().is_none(), "it is there");
        let info = containerd.info(NAMESPACE, &digest).await.unwrap().unwrap();
        assert_eq!(info.labels.get("lazuli.test").map(String::as_str), Some("lent"));
        // And what stays wrong is not kept.
        let other = Digest::of(b"another");
        let false_one = Ingest {
            reference: format!("layer-{other}"),
            digest: other,
            size: 7,
            ..ingest()
        };
        let mut writer = containerd.open_ingest(false_one.clone()).await.unwrap().unwrap();
        assert!(writer.write(b"anotheR").await);
        assert!(matches!(writer.commit().await, Err(IngestError::Corrupt { .. })));
        let again = containerd.open_ingest(false_one).await.unwrap().unwrap();
        assert_eq!(again.from(), 0);
    });
}
