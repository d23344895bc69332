//! Shared indexes: looked for before a layer is streamed, believed as the configuration says, published once, and found out if false.
//!
//! A registry that fails on demand stands between a node that has an index and one that needs it. Layers are plain tars, whose indexes
//! can be made here in a few lines.

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lazuli::cache::{Cache, CachedLayer};
use lazuli::catalog::belief::Ground;
use lazuli::catalog::loader::{Asked, LayerSpec, Loaded, Loader};
use lazuli::catalog::shared::publish::{Publisher, Target, push};
use lazuli::catalog::shared::trust::SigningKey;
use lazuli::catalog::shared::{NAMED_DIGEST, NAMED_SIZE, Origin, SharedIndexes, check, tag_of};
use lazuli::config::{CacheConfig, FetchConfig, FormatsConfig, IndexConfig, MemoryConfig, RegistryConfig};
use lazuli::fetch::{Fetcher, LayerData};
use lazuli::layer::{Access, Chunk, Codec, Digest, LayerIndex, TarIndexer, Windows, portable};
use lazuli::metrics::Metrics;
use lazuli::registry::Registry;
use lazuli::registry::artifact::Artifact;
use lazuli::registry::image::MANIFEST_TYPE;
use lazuli::store::{IndexRecord, LayerSource};
use lazuli::sync::Budget;
use support::fault_registry::{Fault, FaultRegistry, On};
use support::tar::{Entry, Tar, noise};

/// Bytes of the data space per chunk.
const CHUNK: usize = 64 << 10;
const REPOSITORY: &str = "demo/app";
const CLUSTER: &str = "cluster/index";
// The first and the second key pair of RFC 8032, section 7.1.
const KEYS: [(&str, &str); 2] = [
    (
        "MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g",
        "MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=",
    ),
    (
        "MC4CAQAwBQYDK2VwBCIEIEzNCJso/5banbbDRuwRTg9bijGfNaumJNqM9u1PuKb7",
        "MCowBQYDK2VwAyEAPUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw=",
    ),
];

fn tar(names: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut tar = Tar::new(&mut bytes);
    for name in names {
        tar.add(Entry::file(*name, noise(name.len() as u64, 400_000))).unwrap();
    }
    tar.finish().unwrap();
    bytes
}

/// The index of a plain tar: ranges of it, without decompression.
fn index_of(tar: &[u8]) -> LayerIndex {
    let mut indexer = TarIndexer::new();
    indexer.push(tar).unwrap();
    let chunks = tar.chunks(CHUNK).enumerate().map(|(n, bytes)| Chunk {
        data_offset: (n * CHUNK) as u64,
        data_len: bytes.len() as u32,
        blob_offset: (n * CHUNK) as u64,
        blob_len: bytes.len() as u32,
        skip: 0,
        digest: Digest::of(bytes),
    });
    let layout = indexer.finish().unwrap();
    layout
        .into_index(Access::Ranges, Codec::None, chunks.collect(), tar.len() as u64)
        .unwrap()
}

fn packed(tar: &[u8]) -> Vec<u8> {
    portable::pack(&Digest::of(tar), &index_of(tar), &Windows::new()).unwrap()
}

/// A registry with an image of one layer.
struct Stage {
    registry: FaultRegistry,
    tar: Vec<u8>,
    layer: Digest,
    image: Digest,
    keys: tempfile::TempDir,
}

impl Stage {
    async fn new() -> Self {
        let registry = FaultRegistry::start().await;
        let tar = tar(&["a", "bb", "ccc"]);
        let layer = registry.add_blob(tar.clone());
        registry.add_blob(&b"{}"[..]);
        let image = Artifact::manifest("application/x", &[], None, &BTreeMap::new());
        let image = registry.add_manifest(MANIFEST_TYPE, image);
        let keys = tempfile::tempdir().unwrap();
        for (n, (private, public)) in KEYS.iter().enumerate() {
            let pem =
                |kind: &str, text: &str| format!("-----BEGIN {kind} KEY-----\n{text}\n-----END {kind} KEY-----\n");
            std::fs::write(keys.path().join(format!("{n}.key")), pem("PRIVATE", private)).unwrap();
            std::fs::write(keys.path().join(format!("{n}.pub")), pem("PUBLIC", public)).unwrap();
        }
        Stage {
            registry,
            tar,
            layer,
            image,
            keys,
        }
    }

    fn place(&self, repository: &str) -> LayerSource {
        LayerSource {
            host: self.registry.host(),
            repository: repository.to_owned(),
        }
    }

    fn key(&self, name: &str) -> PathBuf {
        self.keys.path().join(name)
    }

    fn cluster(&self) -> IndexConfig {
        IndexConfig {
            repository: format!("{}/{CLUSTER}", self.registry.host()),
            ..IndexConfig::default()
        }
    }

    fn node(&self, index: &IndexConfig) -> Node {
        Node::new(self, index)
    }

    /// Puts an index of the layer where machines look: into the cluster's repository, or beside the image.
    async fn share(&self, beside: bool, key: Option<&str>, bytes: Vec<u8>) {
        let node = self.node(&IndexConfig::default());
        let target = match beside {
            true => Target::image(&node.registry, self.place(REPOSITORY), &self.image)
                .await
                .unwrap(),
            false => Target::Repository(self.place(CLUSTER)),
        };
        let key = key.map(|name| SigningKey::load(&self.key(name)).unwrap());
        push(&node.registry, &target, key.as_ref(), &[(self.layer, bytes.into())])
            .await
            .unwrap();
    }

    /// Requests since `before`, without those for the blob of the layer itself.
    fn asked(&self, before: usize) -> Vec<String> {
        let layer = self.layer.to_string();
        let log = self.registry.log();
        let of_index = log[before..].iter().filter(|seen| !seen.path.contains(&layer));
        of_index.map(|seen| format!("{} {}", seen.method, seen.path)).collect()
    }
}

/// A machine.
struct Node {
    registry: Arc<Registry>,
    shared: Arc<SharedIndexes>,
    publisher: Option<Arc<Publisher>>,
    loader: Loader,
    metrics: Arc<Metrics>,
    spec: LayerSpec,
    origin: Origin,
    /// Ids of what was loaded.
    known: Mutex<Vec<Digest>>,
    _root: tempfile::TempDir,
}

impl Node {
    fn new(stage: &Stage, index: &IndexConfig) -> Self {
        let config = RegistryConfig {
            config_path: Vec::new(),
            docker_config: Some("/nonexistent/config.json".into()),
            attempts: 2,
            ..RegistryConfig::default()
        };
        let metrics = Arc::new(Metrics::new());
        let registry = Registry::new(&config, metrics.clone()).unwrap();
        let root = tempfile::tempdir().unwrap();
        let cache = CacheConfig {
            min_free: lazuli::config::ByteSize(0),
            high_percent: 100,
            ..CacheConfig::default()
        };
        let cache = Cache::open(root.path(), &cache, metrics.clone()).unwrap();
        let runtime = tokio::runtime::Handle::current();
        let fetcher = Fetcher::new(
            &FetchConfig::default(),
            Budget::new(MemoryConfig::default().budget.0),
            cache.clone(),
            runtime,
            metrics.clone(),
        );
        let shared = SharedIndexes::new(index, registry.clone(), fetcher.memory().clone(), metrics.clone()).unwrap();
        let publisher = Publisher::new(index, registry.clone(), shared.clone(), metrics.clone()).unwrap();
        Node {
            loader: Loader::new(cache, fetcher, FormatsConfig::default()).with_shared(shared.clone()),
            known: Mutex::default(),
            registry,
            shared,
            publisher,
            metrics,
            spec: LayerSpec {
                digest: stage.layer,
                size: stage.tar.len() as u64,
                media_type: "application/vnd.oci.image.layer.v1.tar".to_owned(),
                annotations: BTreeMap::new(),
                foreign: false,
                diff_id: Some(stage.layer),
            },
            origin: Origin {
                sources: vec![stage.place(REPOSITORY)],
                manifest: Some(stage.image),
            },
            _root: root,
        }
    }

    async fn load(&self) -> Loaded {
        let source = &self.origin.sources[0];
        let source = self.registry.repository(&source.host, &source.repository);
        let blob = source.blob(self.spec.digest, self.spec.size);
        // What the catalog would remember of earlier loads.
        let mut judged = self.loader.alone(&self.spec);
        let known = self.known.lock().unwrap().clone();
        judged.usable.extend(known.into_iter().map(|id| (Ground::Place, id)));
        let asked = Asked {
            origin: Some(&self.origin),
            ..Asked::default()
        };
        let loaded = self.loader.load(&self.spec, blob, &[], asked, &judged).await.unwrap();
        self.known.lock().unwrap().push(*loaded.layer.id());
        loaded
    }

    fn count(&self, word: &str) -> u64 {
        self.metrics.index_lookups_total.with_label_values(&[word]).get()
    }

    fn published(&self, word: &str) -> u64 {
        self.metrics.index_publications_total.with_label_values(&[word]).get()
    }

    /// The layer as it is when its index is here, and nothing else.
    fn indexed(&self, index: LayerIndex) -> Arc<CachedLayer> {
        self.loader.cache().insert(&self.spec.digest, index).unwrap()
    }
}

/// Loads the layer, which has to come of a shared index; why that was believed.
async fn expect_shared(node: &Node) -> String {
    let loaded = node.load().await;
    let Some(IndexRecord::Shared { trust, .. }) = loaded.index else {
        panic!("streamed: {:?}", loaded.index);
    };
    assert_eq!(node.count("found"), 1);
    assert_eq!(
        loaded.layer.present_bytes(),
        0,
        "nothing of the layer itself was fetched"
    );
    trust
}

/// Loads the layer, which has to be streamed, and counts this miss.
async fn expect_streamed(node: &Node, word: &str) {
    let loaded = node.load().await;
    assert!(
        matches!(loaded.index, Some(IndexRecord::Built { .. })),
        "{:?}",
        loaded.index
    );
    assert!(loaded.layer.present_bytes() >= node.spec.size);
    for other in ["found", "none", "untrusted", "damaged", "failed"] {
        assert_eq!(node.count(other), u64::from(other == word), "{other}");
    }
}

#[tokio::test]
async fn an_index_of_the_cluster_is_used() {
    let stage = Stage::new().await;
    stage.share(false, None, packed(&stage.tar)).await;
    let node = stage.node(&stage.cluster());
    let before = stage.registry.log().len();
    let loaded = node.load().await;
    let Some(IndexRecord::Shared {
        from, trust, verified, ..
    }) = &loaded.index
    else {
        panic!("{:?}", loaded.index);
    };
    assert_eq!(*from, format!("{}/{CLUSTER}", stage.registry.host()));
    assert_eq!((trust.as_str(), *verified), ("trusted repository", None));
    assert_eq!(stage.asked(before).len(), 2, "{:?}", stage.asked(before));
    let index = loaded.layer.names().unwrap();
    let ino = index.lookup_path(b"bb").unwrap();
    let inode = *index.inode(ino).unwrap();
    let read = loaded
        .layer
        .read(inode.data, 400_000, Duration::from_secs(30))
        .await
        .unwrap();
    assert!(read == noise(2, 400_000));
    // The next time it is simply there.
    let before = stage.registry.log().len();
    assert!(node.load().await.index.is_none());
    assert_eq!(stage.registry.log().len(), before);
}

/// A layer is what its blob says, and an image that promises another tar of it is not shown it, whoever had it first.
#[tokio::test]
async fn an_image_that_promises_another_tar_is_not_shown_the_layer() {
    let stage = Stage::new().await;
    let node = stage.node(&IndexConfig::default());
    let blob = || {
        let source = &node.origin.sources[0];
        let source = node.registry.repository(&source.host, &source.repository);
        source.blob(node.spec.digest, node.spec.size)
    };
    let liar = LayerSpec {
        diff_id: Some(Digest::of(b"another tar")),
        ..node.spec.clone()
    };
    let says = |error: String| {
        let all = [stage.layer.to_string(), Digest::of(b"another tar").to_string()];
        assert!(all.iter().all(|digest| error.contains(digest)), "{error}");
    };
    says(node.loader.build(&liar, blob(), false).await.err().unwrap().to_string());
    // As long as somebody has it, it is known what it is; later the database knows.
    let _shown = node.loader.build(&node.spec, blob(), false).await.unwrap();
    let before = stage.registry.log().len();
    says(node.loader.build(&liar, blob(), false).await.err().unwrap().to_string());
    // And what is known to be another tar is not even looked at.
    let mut judged = node.loader.alone(&liar);
    judged.proof = Some(stage.layer);
    let refused = node.loader.load(&liar, blob(), &[], Asked::default(), &judged).await;
    says(refused.err().unwrap().to_string());
    assert_eq!(stage.registry.log().len(), before, "nothing is fetched for that");
    // Who promises nothing takes what there is.
    let silent = LayerSpec {
        diff_id: None,
        ..node.spec.clone()
    };
    node.loader.build(&silent, blob(), false).await.unwrap();
}

#[tokio::test]
async fn an_index_beside_the_image_is_used() {
    for api in [true, false] {
        let stage = Stage::new().await;
        if api {
            stage.registry.set_referrers(true);
        }
        stage.share(true, None, packed(&stage.tar)).await;
        let trusting = IndexConfig {
            trusted_repositories: vec![format!("{}/demo/*", stage.registry.host())],
            ..IndexConfig::default()
        };
        assert_eq!(expect_shared(&stage.node(&trusting)).await, "trusted repository");
        // One that is about another image does not count, wherever it is listed.
        let mut node = stage.node(&trusting);
        node.origin.manifest = Some(Digest::of(b"another image"));
        expect_streamed(&node, "none").await;
    }
}

#[tokio::test]
async fn nobody_is_asked_whom_nobody_would_believe() {
    let stage = Stage::new().await;
    stage.share(true, Some("0.key"), packed(&stage.tar)).await;
    stage.share(false, Some("0.key"), packed(&stage.tar)).await;
    let off = IndexConfig {
        enabled: false,
        ..stage.cluster()
    };
    for config in [IndexConfig::default(), off] {
        let before = stage.registry.log().len();
        expect_streamed(&stage.node(&config), "").await;
        assert_eq!(stage.asked(before), [""; 0]);
    }
    let node = stage.node(&stage.cluster());
    let small = LayerSpec {
        size: 1000,
        ..node.spec.clone()
    };
    let before = stage.registry.log().len();
    assert!(node.shared.find(&small, &node.origin).await.is_none());
    assert_eq!(
        stage.registry.log().len(),
        before,
        "a small layer is not worth a question"
    );
}

#[tokio::test]
async fn a_signature_is_worth_what_its_key_is() {
    let stage = Stage::new().await;
    stage.share(true, Some("0.key"), packed(&stage.tar)).await;
    let with = |name: &str| IndexConfig {
        public_keys: vec![stage.key(name)],
        ..IndexConfig::default()
    };
    let trust = expect_shared(&stage.node(&with("0.pub"))).await;
    assert!(trust.contains("0.pub"), "{trust}");
    expect_streamed(&stage.node(&with("1.pub")), "untrusted").await;
    // The repository is trusted, but signatures are wanted.
    stage.share(false, Some("1.key"), packed(&stage.tar)).await;
    let strict = IndexConfig {
        repository: stage.cluster().repository,
        require_signature: true,
        ..with("1.pub")
    };
    expect_shared(&stage.node(&strict)).await;
    let other = IndexConfig {
        public_keys: vec![stage.key("0.pub")],
        ..strict
    };
    let mut node = stage.node(&other);
    node.origin.manifest = None;
    expect_streamed(&node, "untrusted").await;
}

#[tokio::test]
async fn an_index_that_the_manifest_names_needs_no_more_trust() {
    let stage = Stage::new().await;
    let bytes = packed(&stage.tar);
    let named = [
        (NAMED_DIGEST.to_owned(), Digest::of(&bytes).to_string()),
        (NAMED_SIZE.to_owned(), bytes.len().to_string()),
    ];
    stage.registry.add_blob(bytes);
    let mut node = stage.node(&IndexConfig::default());
    node.spec.annotations = named.clone().into();
    assert_eq!(expect_shared(&node).await, "named by the manifest");
    // A wrong size, an absent blob: streamed.
    let mut node = stage.node(&IndexConfig::default());
    node.spec.annotations = [named[0].clone(), (NAMED_SIZE.to_owned(), "7".to_owned())].into();
    expect_streamed(&node, "failed").await;
}

#[tokio::test]
async fn a_tampered_index_is_refused() {
    let stage = Stage::new().await;
    let good = packed(&stage.tar);
    let of_other = {
        let other = tar(&["a", "bb", "dddd"]);
        portable::pack(&Digest::of(&other), &index_of(&other), &Windows::new()).unwrap()
    };
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    let longer = {
        // Of a blob with another size.
        let mut longer = stage.tar.clone();
        longer.extend([0; 512]);
        portable::pack(&stage.layer, &index_of(&longer), &Windows::new()).unwrap()
    };
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("cut off", good[..good.len() - 1].to_vec()),
        ("its header alone", good[..portable::HEADER_LEN].to_vec()),
        ("damaged header", flipped(20)),
        ("damaged index", flipped(good.len() / 2)),
        ("another layer's", of_other),
        ("another size", longer),
        ("no index at all", noise(3, 5000)),
    ] {
        stage.share(false, None, bytes).await;
        let node = stage.node(&stage.cluster());
        let loaded = node.load().await;
        assert!(
            matches!(loaded.index, Some(IndexRecord::Built { .. })),
            "{what}: {:?}",
            loaded.index
        );
        assert_eq!(
            (node.count("damaged") + node.count("failed"), node.count("found")),
            (1, 0),
            "{what}"
        );
    }
    // Too large for what it is of: not even fetched.
    stage.share(false, None, noise(4, stage.tar.len())).await;
    let node = stage.node(&stage.cluster());
    let before = stage.registry.log().len();
    expect_streamed(&node, "failed").await;
    assert_eq!(stage.asked(before).len(), 1);
    // Damaged on its way only: the digest of the blob tells, and it is fetched again.
    stage.share(false, None, good.clone()).await;
    stage.registry.fail(On::Blob, 1, Fault::Corrupt(300));
    expect_shared(&stage.node(&stage.cluster())).await;
}

#[tokio::test]
async fn what_lies_about_chunks_shows_no_wrong_byte() {
    let stage = Stage::new().await;
    // The index of another tar of the same size, signed for this layer: its chunks have other digests.
    let other = tar(&["a", "bb", "cc2"]);
    assert_eq!(other.len(), stage.tar.len());
    let lie = portable::pack(&stage.layer, &index_of(&other), &Windows::new()).unwrap();
    stage.share(false, None, lie).await;
    let node = stage.node(&stage.cluster());
    let loaded = node.load().await;
    assert!(matches!(loaded.index, Some(IndexRecord::Shared { .. })));
    let index = loaded.layer.names().unwrap();
    let end = index.data_size();
    let read = loaded.layer.read(end - 10_000, 10_000, Duration::from_secs(30)).await;
    assert!(read.is_ok(), "the end is the same in both");
    let header = index.inode(index.lookup_path(b"cc2").unwrap()).unwrap().data - 512;
    let read = loaded.layer.read(header, 512, Duration::from_secs(30)).await;
    assert!(read.is_err(), "bytes that are not the index's are not given out");
}

#[tokio::test]
async fn a_place_that_does_not_answer_costs_its_deadline_once() {
    let stage = Stage::new().await;
    stage.share(false, None, packed(&stage.tar)).await;
    let config = IndexConfig {
        lookup_deadline: Duration::from_secs(1),
        ..stage.cluster()
    };
    stage
        .registry
        .fail(On::Manifest, 9, Fault::Delay(Duration::from_secs(600)));
    let node = stage.node(&config);
    // That it ends at all is the test: the answer would come in ten minutes.
    expect_streamed(&node, "failed").await;
    let before = stage.registry.log().len();
    assert!(node.shared.find(&node.spec, &node.origin).await.is_none());
    assert_eq!(stage.registry.log().len(), before, "it is left alone for a while");
    stage.registry.heal();
    // A definite answer is no reason to.
    stage.registry.fail(On::Manifest, 1, Fault::Status(403));
    let node = stage.node(&config);
    assert!(node.shared.find(&node.spec, &node.origin).await.is_none());
    assert!(node.shared.find(&node.spec, &node.origin).await.is_some());
}

#[tokio::test]
async fn an_index_is_published_once() {
    let stage = Stage::new().await;
    let config = IndexConfig {
        publish: true,
        signing_key: Some(stage.key("0.key")),
        ..stage.cluster()
    };
    let place = format!("{}/{CLUSTER}", stage.registry.host());
    let node = stage.node(&config);
    let cached = node.indexed(index_of(&stage.tar));
    let publisher = node.publisher.clone().unwrap();
    assert_eq!(publisher.publish(&cached, &node.origin).await, Some(place.clone()));
    assert_eq!(node.published("published"), 1);
    let artifact = stage.registry.tagged(CLUSTER, &tag_of(&stage.layer)).unwrap();
    // Again, here and elsewhere: it is there.
    assert_eq!(publisher.publish(&cached, &node.origin).await, Some(place.clone()));
    let other = stage.node(&config);
    let of_other = other.indexed(index_of(&stage.tar));
    let before = stage.registry.seen(On::Write).len();
    assert_eq!(
        other.publisher.clone().unwrap().publish(&of_other, &other.origin).await,
        Some(place.clone())
    );
    assert_eq!((node.published("present"), other.published("present")), (1, 1));
    assert_eq!(stage.registry.seen(On::Write).len(), before);
    // A third machine starts with it; by its signature as well.
    expect_shared(&stage.node(&stage.cluster())).await;
    let strict = IndexConfig {
        public_keys: vec![stage.key("0.pub")],
        require_signature: true,
        ..config.clone()
    };
    expect_shared(&stage.node(&strict)).await;
    // One that is not believed here does not count: it is replaced.
    let distrusting = IndexConfig {
        public_keys: vec![stage.key("1.pub")],
        require_signature: true,
        signing_key: Some(stage.key("1.key")),
        ..config
    };
    let node = stage.node(&distrusting);
    let cached = node.indexed(index_of(&stage.tar));
    assert_eq!(
        node.publisher.clone().unwrap().publish(&cached, &node.origin).await,
        Some(place)
    );
    assert_eq!(node.published("published"), 1);
    assert_ne!(stage.registry.tagged(CLUSTER, &tag_of(&stage.layer)).unwrap(), artifact);
}

#[tokio::test]
async fn without_an_index_repository_it_is_published_beside_its_image() {
    for api in [true, false] {
        let stage = Stage::new().await;
        if api {
            stage.registry.set_referrers(false);
        }
        let config = IndexConfig {
            publish: true,
            trusted_repositories: vec![format!("{}/{REPOSITORY}", stage.registry.host())],
            ..IndexConfig::default()
        };
        let node = stage.node(&config);
        let cached = node.indexed(index_of(&stage.tar));
        let publisher = node.publisher.clone().unwrap();
        for word in ["published", "present"] {
            let place = publisher.publish(&cached, &node.origin).await;
            assert_eq!(place, Some(format!("{}/{REPOSITORY}", stage.registry.host())));
            assert_eq!(node.published(word), 1);
        }
        expect_shared(&stage.node(&config)).await;
    }
    assert!(Stage::new().await.node(&IndexConfig::default()).publisher.is_none());
}

#[tokio::test]
async fn a_repository_that_refuses_is_left_alone() {
    let stage = Stage::new().await;
    let config = IndexConfig {
        publish: true,
        ..stage.cluster()
    };
    let node = stage.node(&config);
    let cached = node.indexed(index_of(&stage.tar));
    let publisher = node.publisher.clone().unwrap();
    stage.registry.fail(On::Upload, 9, Fault::Refuse(405, "read-only"));
    assert_eq!(publisher.publish(&cached, &node.origin).await, None);
    stage.registry.heal();
    let before = stage.registry.log().len();
    assert_eq!(publisher.publish(&cached, &node.origin).await, None);
    assert_eq!(stage.registry.log().len(), before);
    assert_eq!(node.published("failed"), 2);
}

/// Reads all of a layer.
async fn complete(loaded: &Loaded) {
    let size = loaded.layer.index().data_size();
    for offset in (0..size).step_by(1 << 20) {
        let len = (size - offset).min(1 << 20) as u32;
        loaded.layer.read(offset, len, Duration::from_secs(30)).await.unwrap();
    }
    assert!(loaded.layer.cached().is_complete());
}

#[tokio::test]
async fn a_whole_layer_tells_whether_its_index_is_true() {
    let stage = Stage::new().await;
    stage.share(false, None, packed(&stage.tar)).await;
    let loaded = stage.node(&stage.cluster()).load().await;
    let cached = loaded.layer.cached();
    assert!(matches!(
        check::describes(cached, &[stage.layer]),
        Err(check::Mismatch::Absent)
    ));
    complete(&loaded).await;
    // One of the images promises this tar; without any nothing can be told.
    let other = Digest::of(b"another tar");
    assert_eq!(check::describes(cached, &[other, stage.layer]).unwrap(), stage.layer);
    assert!(matches!(check::describes(cached, &[]), Err(check::Mismatch::Absent)));
    assert!(matches!(
        check::describes(cached, &[other]),
        Err(check::Mismatch::Tar { .. })
    ));
}

#[tokio::test]
async fn swapped_names_are_found_out() {
    let stage = Stage::new().await;
    // The chunks are the layer's, the names are not: "ccc" is called "ddd", with the same extent.
    let renamed = tar(&["a", "bb", "ddd"]);
    let mut indexer = TarIndexer::new();
    indexer.push(&renamed).unwrap();
    let chunks = index_of(&stage.tar).chunks().to_vec();
    let layout = indexer.finish().unwrap();
    let size = stage.tar.len() as u64;
    let lie = layout.into_index(Access::Ranges, Codec::None, chunks, size).unwrap();
    stage
        .share(
            false,
            None,
            portable::pack(&stage.layer, &lie, &Windows::new()).unwrap(),
        )
        .await;
    let node = stage.node(&stage.cluster());
    let loaded = node.load().await;
    assert!(loaded.layer.names().unwrap().lookup_path(b"ddd").is_some());
    complete(&loaded).await;
    let found = check::describes(loaded.layer.cached(), &[stage.layer]);
    assert!(matches!(found, Err(check::Mismatch::Tree)), "{found:?}");
    // What the catalog does with such a layer: out of the cache once nobody uses it, and not from anyone else again.
    let cache = Arc::clone(node.loader.cache());
    let id = *loaded.layer.id();
    assert_ne!(id, stage.layer, "it is not what the blob alone says");
    assert!(!cache.forget(&id), "it is in use");
    drop(loaded);
    // The request that brought the last bytes has answered its reader, and may not have ended yet.
    let gone = async {
        while !cache.forget(&id) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await.unwrap();
    assert!(cache.forget(&id), "it is not here any more");
    let source = node.registry.repository(&stage.registry.host(), REPOSITORY);
    let blob = source.blob(stage.layer, node.spec.size);
    let loaded = node
        .loader
        .load(&node.spec, blob, &[], Asked::default(), &node.loader.alone(&node.spec))
        .await
        .unwrap();
    assert!(matches!(loaded.index, Some(IndexRecord::Built { .. })));
    assert!(loaded.layer.names().unwrap().lookup_path(b"ccc").is_some());
}
