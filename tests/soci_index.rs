//! SOCI indexes that SOCI's own tool made: found where they are named, believed as the configuration says, and no obstacle if they are bad.

mod support;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use lazuli::cache::Cache;
use lazuli::catalog::loader::{Asked, LayerSpec, Loaded, Loader};
use lazuli::catalog::shared::{Origin, check};
use lazuli::catalog::soci::manifest::{self, INDEX_DIGEST};
use lazuli::catalog::soci::{LABEL, SociIndexes};
use lazuli::config::{ByteSize, CacheConfig, FetchConfig, FormatsConfig, IndexConfig, MemoryConfig, RegistryConfig};
use lazuli::fetch::{Fetcher, LayerData};
use lazuli::layer::soci::{ZtocBuilder, index_from_ztoc};
use lazuli::layer::{Compression, Digest};
use lazuli::metrics::Metrics;
use lazuli::registry::Registry;
use lazuli::registry::artifact::{Artifact, Descriptor, fallback_tag};
use lazuli::registry::image::{MANIFEST_TYPE, OCI_INDEX};
use lazuli::store::{IndexRecord, LayerSource};
use lazuli::sync::Budget;
use serde_json::json;
use support::fault_registry::{Fault, FaultRegistry, On};
use support::torture;

const REPOSITORY: &str = "demo/app";
const IMAGE_V1: &str = "839455020035c41508cfbeee382320826ed70264c4b17d01175fd3537b014ce7";
const INDEX_V1: &str = "ab92ea014e31bc8d14f4c0badb6be752916730228d650d261f04b508e9e6fd08";
const INDEX_V2: &str = "808f1958ff17c2adf2c4ea87964373fbe7ef7dc9f866cb3bdfbef6b26b115d19";
/// The image's layers, the lower one first.
const LAYERS: [&str; 2] = [
    "c0f1ef42ac411f82bee5baa80e626073690699f05561a1c25bb4d6a4b8de3aeb",
    "0d9219c355de9bb426e38b176495e018c1d1c0a018a3a13ff0cde2e4c68ebfbd",
];
/// zTOC of the lower layer in the index of version 1.
const ZTOC: &str = "da691f31c9ac9004b0bb2ea85ed4ea80225913470dd4a0ab1ece1a726acbd7dd";

fn digest(hex: &str) -> Digest {
    Digest::from_hex(hex).unwrap()
}

fn vector(version: &str, hex: &str) -> Vec<u8> {
    let dir: PathBuf = [
        env!("CARGO_MANIFEST_DIR"),
        "tests/vectors/soci",
        version,
        "blobs/sha256",
    ]
    .iter()
    .collect();
    std::fs::read(dir.join(hex)).unwrap()
}

fn untar(blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    flate2::read::MultiGzDecoder::new(blob).read_to_end(&mut tar).unwrap();
    tar
}

/// A registry with everything that SOCI's tool made; the artifact about the image is listed under its tag.
async fn registry() -> FaultRegistry {
    let registry = FaultRegistry::start().await;
    for version in ["v1", "v2"] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/vectors/soci/{version}/blobs/sha256"));
        for entry in std::fs::read_dir(dir).unwrap() {
            let bytes = Bytes::from(std::fs::read(entry.unwrap().path()).unwrap());
            if Artifact::parse(&bytes).is_ok() {
                registry.add_manifest(MANIFEST_TYPE, bytes.clone());
            }
            registry.add_blob(bytes);
        }
    }
    list(&registry, digest(INDEX_V1));
    registry
}

/// Lists an index under the tag of the image.
fn list(registry: &FaultRegistry, index: Digest) {
    let size = registry.manifest(index).unwrap().len();
    let list = json!({
        "schemaVersion": 2, "mediaType": OCI_INDEX,
        "manifests": [{
            "mediaType": MANIFEST_TYPE, "digest": index.to_string(), "size": size, "artifactType": manifest::TYPE_V1,
        }],
    });
    let list = registry.add_manifest(OCI_INDEX, list.to_string());
    registry.tag(REPOSITORY, &fallback_tag(&digest(IMAGE_V1)), list);
}

/// Another index of version 1, with these blobs.
fn add_index(registry: &FaultRegistry, entries: &[Descriptor]) -> Digest {
    let subject = Descriptor {
        media_type: MANIFEST_TYPE.to_owned(),
        digest: digest(IMAGE_V1),
        size: 584,
        annotations: BTreeMap::new(),
    };
    let index = manifest::index(entries, Some(&subject), "a test");
    registry.add_manifest(MANIFEST_TYPE, index)
}

/// A machine.
struct Node {
    registry: Arc<Registry>,
    loader: Loader,
    metrics: Arc<Metrics>,
    origin: Origin,
    _root: tempfile::TempDir,
}

impl Node {
    fn new(stage: &FaultRegistry, index: IndexConfig) -> Self {
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
            min_free: ByteSize(0),
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
        let soci = SociIndexes::new(&index, registry.clone(), fetcher.memory().clone(), metrics.clone()).unwrap();
        Node {
            loader: Loader::new(cache, fetcher, FormatsConfig::default()).with_soci(soci),
            registry,
            metrics,
            origin: Origin {
                sources: vec![LayerSource {
                    host: stage.host(),
                    repository: REPOSITORY.to_owned(),
                }],
                manifest: Some(digest(IMAGE_V1)),
            },
            _root: root,
        }
    }

    /// Loads a layer of the image, with these annotations.
    async fn load(&self, layer: usize, annotations: &[(&str, &str)]) -> Loaded {
        let source = &self.origin.sources[0];
        let source = self.registry.repository(&source.host, &source.repository);
        let blob = vector("v2", LAYERS[layer]);
        let annotation = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let spec = LayerSpec {
            digest: digest(LAYERS[layer]),
            size: blob.len() as u64,
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            annotations: annotations.iter().map(annotation).collect(),
            foreign: false,
            diff_id: Some(Digest::of(&untar(&blob))),
        };
        let blob = source.blob(spec.digest, spec.size);
        let judged = self.loader.alone(&spec);
        let asked = Asked {
            origin: Some(&self.origin),
            ..Asked::default()
        };
        self.loader.load(&spec, blob, &[], asked, &judged).await.unwrap()
    }

    fn count(&self, word: &str) -> u64 {
        self.metrics.soci_lookups_total.with_label_values(&[word]).get()
    }
}

/// Trusts the image's own repository.
fn trusting(stage: &FaultRegistry) -> IndexConfig {
    IndexConfig {
        trusted_repositories: vec![format!("{}/demo/*", stage.host())],
        ..IndexConfig::default()
    }
}

fn expect_soci(loaded: &Loaded, why: &str) {
    match &loaded.index {
        Some(IndexRecord::Soci { trust, .. }) => assert_eq!(trust, why),
        other => panic!("{other:?}"),
    }
}

fn expect_streamed(loaded: &Loaded) {
    assert!(
        matches!(loaded.index, Some(IndexRecord::Built { .. })),
        "{:?}",
        loaded.index
    );
}

/// Reads all of a layer, and compares it with its tar.
async fn expect_all(loaded: &Loaded, layer: usize) {
    let tar = untar(&vector("v2", LAYERS[layer]));
    let size = loaded.layer.index().data_size();
    for offset in (0..size).step_by(1 << 20) {
        let len = (size - offset).min(1 << 20) as u32;
        let read = loaded.layer.read(offset, len, Duration::from_secs(30)).await.unwrap();
        assert!(read[..] == tar[offset as usize..][..len as usize], "{offset}");
    }
}

#[tokio::test]
async fn an_index_about_the_image_is_used_where_its_repository_is_trusted() {
    let stage = registry().await;
    let node = Node::new(&stage, trusting(&stage));
    let loaded = node.load(0, &[]).await;
    expect_soci(&loaded, "trusted repository");
    assert_eq!(
        loaded.layer.present_bytes(),
        0,
        "nothing of the layer itself was fetched"
    );
    let index = loaded.layer.names().unwrap();
    let hosts = index.inode(index.lookup_path(b"etc/hosts").unwrap()).unwrap();
    let read = loaded
        .layer
        .read(hosts.data, hosts.size as u32, Duration::from_secs(30))
        .await;
    assert_eq!(read.unwrap(), &b"127.0.0.1 localhost\n"[..]);
    let span = u64::from(index.chunks()[0].data_len);
    assert_eq!(loaded.layer.present_bytes(), span, "all of the span is kept");
    expect_all(&loaded, 0).await;
    expect_all(&node.load(1, &[]).await, 1).await;
    assert_eq!(node.count("found"), 2);
    // By the referrers API as well.
    stage.set_referrers(true);
    let node = Node::new(&stage, trusting(&stage));
    expect_soci(&node.load(0, &[]).await, "trusted repository");
}

#[tokio::test]
async fn an_index_about_the_image_is_not_asked_for_elsewhere() {
    let stage = registry().await;
    let off = IndexConfig {
        soci: false,
        ..trusting(&stage)
    };
    for config in [IndexConfig::default(), off] {
        let node = Node::new(&stage, config);
        let before = stage.log().len();
        expect_streamed(&node.load(0, &[]).await);
        let log = stage.log();
        assert!(
            log[before..].iter().all(|seen| seen.path.contains(LAYERS[0])),
            "nobody else is asked"
        );
    }
}

#[tokio::test]
async fn an_index_that_is_named_needs_no_more_trust() {
    let stage = registry().await;
    let index = digest(INDEX_V2).to_string();
    let node = Node::new(&stage, IndexConfig::default());
    let loaded = node.load(0, &[(INDEX_DIGEST, &index)]).await;
    expect_soci(&loaded, "named by the manifest");
    expect_all(&loaded, 0).await;
    // Its zTOC of the small layer is larger than the layer.
    expect_streamed(&node.load(1, &[(INDEX_DIGEST, &index)]).await);

    let node = Node::new(&stage, IndexConfig::default());
    let labelled = [(INDEX_DIGEST, index.as_str()), (LABEL, &digest(INDEX_V1).to_string())];
    let loaded = node.load(1, &labelled).await;
    expect_soci(&loaded, "named by the client");
    expect_all(&loaded, 1).await;

    let config = IndexConfig {
        soci_indexes: BTreeMap::from([(digest(IMAGE_V1).to_string(), digest(INDEX_V1).to_string())]),
        ..IndexConfig::default()
    };
    let node = Node::new(&stage, config.clone());
    expect_soci(&node.load(1, &[]).await, "named by the configuration");
    let bad = IndexConfig {
        soci_indexes: BTreeMap::from([("latest".to_owned(), index)]),
        ..config
    };
    assert!(SociIndexes::new(&bad, node.registry.clone(), Budget::new(0), node.metrics.clone()).is_err());
}

#[tokio::test]
async fn a_bad_index_is_no_obstacle() {
    let stage = registry().await;
    let layer = digest(LAYERS[0]);
    let ztoc = vector("v1", ZTOC);
    let entry = |bytes: &[u8], of: &Digest| {
        stage.add_blob(bytes.to_vec());
        manifest::entry(bytes, of, "application/vnd.oci.image.layer.v1.tar+gzip", 131_072)
    };
    let mut missing = entry(&ztoc, &layer);
    missing.digest = Digest::of(b"nowhere");
    let mut huge = entry(&ztoc, &layer);
    huge.size = u64::MAX;
    let of_other = vector("v1", "1c5a9414425f1b258e2254978056a351d9bea0d12ac148e70f7ca3b14e188681");
    for (what, entries, word) in [
        ("no zTOC", vec![entry(b"nonsense", &layer)], "damaged"),
        ("an empty one", vec![entry(b"", &layer)], "damaged"),
        ("a part", vec![entry(&ztoc[..ztoc.len() / 2], &layer)], "damaged"),
        ("another layer's", vec![entry(&of_other, &layer)], "damaged"),
        ("a missing one", vec![missing], "failed"),
        ("one without end", vec![huge], "failed"),
        (
            "this layer left out",
            vec![entry(&of_other, &digest(LAYERS[1]))],
            "left-out",
        ),
        ("nothing", vec![], "left-out"),
    ] {
        let index = add_index(&stage, &entries);
        list(&stage, index);
        let node = Node::new(&stage, trusting(&stage));
        let loaded = node.load(0, &[]).await;
        expect_streamed(&loaded);
        assert_eq!((node.count(word), node.count("found")), (1, 0), "{what}");
        expect_all(&loaded, 0).await;
    }
    // What is about another image, or is not there.
    for named in [digest(IMAGE_V1), Digest::of(b"nowhere")] {
        let node = Node::new(&stage, IndexConfig::default());
        expect_streamed(&node.load(0, &[(INDEX_DIGEST, &named.to_string())]).await);
        assert_eq!(node.count("none"), 1);
    }
    // That it ends at all is the test: the answer would come in ten minutes.
    stage.fail(On::Manifest, 9, Fault::Delay(Duration::from_secs(600)));
    let config = IndexConfig {
        lookup_deadline: Duration::from_secs(1),
        ..trusting(&stage)
    };
    let node = Node::new(&stage, config);
    expect_streamed(&node.load(0, &[]).await);
    assert_eq!(node.count("failed"), 1);
}

#[tokio::test]
async fn a_span_that_is_not_the_index_s_is_not_shown() {
    let stage = registry().await;
    // The digest of the first span is another one.
    let mut ztoc = vector("v1", ZTOC);
    let of_span = {
        let blob = vector("v2", LAYERS[0]);
        let (index, _) = lazuli::layer::soci::index_from_ztoc(&ztoc, blob.len() as u64, true).unwrap();
        index.checkpoints()[0].digest.to_string()
    };
    let at = ztoc
        .windows(of_span.len())
        .position(|text| text == of_span.as_bytes())
        .unwrap();
    ztoc[at + 10] = if ztoc[at + 10] == b'0' { b'1' } else { b'0' };
    stage.add_blob(ztoc.clone());
    let entry = manifest::entry(&ztoc, &digest(LAYERS[0]), "", 131_072);
    let index = add_index(&stage, &[entry]);
    let node = Node::new(&stage, IndexConfig::default());
    let loaded = node.load(0, &[(LABEL, &index.to_string())]).await;
    expect_soci(&loaded, "named by the client");
    assert!(loaded.layer.read(0, 512, Duration::from_secs(30)).await.is_err());
    let second = loaded.layer.index().chunks().get(1).unwrap().data_offset;
    assert!(loaded.layer.read(second, 512, Duration::from_secs(30)).await.is_ok());
}

#[tokio::test]
async fn what_the_index_s_author_wants_ahead_is_fetched_ahead() {
    let stage = registry().await;
    let layer = digest(LAYERS[0]);
    let ztoc = manifest::entry(&vector("v1", ZTOC), &layer, "", 131_072);
    for (list, first) in [
        (
            &br#"{"version":"1.0","prefetch_spans":[{"start_span":2,"end_span":3}]}"#[..],
            Some(2),
        ),
        (b"nonsense", None),
    ] {
        stage.add_blob(list.to_vec());
        let list = Descriptor {
            media_type: manifest::PREFETCH_TYPE.to_owned(),
            ..manifest::entry(list, &layer, "", 0)
        };
        let index = add_index(&stage, &[ztoc.clone(), list]);
        let node = Node::new(&stage, IndexConfig::default());
        let loaded = node.load(0, &[(LABEL, &index.to_string())]).await;
        expect_soci(&loaded, "named by the client");
        let Some(first) = first else { continue };
        let spans: Vec<_> = loaded.layer.index().chunks().range(first..first + 2).collect();
        let wanted: u64 = spans.iter().map(|span| u64::from(span.data_len)).sum();
        let arrived = async {
            while loaded.layer.present_bytes() < wanted {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), arrived)
            .await
            .expect("it is fetched");
        let mut byte = [0];
        assert!(loaded.layer.read_ready(spans[0].data_offset, &mut byte).is_some());
    }
}

/// All of a layer in the cache, by the index that its zTOC makes: what there is to compare once everything was read.
fn compare(
    cache: &Cache,
    ztoc: &[u8],
    blob: &[u8],
    tar: &[u8],
    xattrs: bool,
) -> Option<Result<Digest, check::Mismatch>> {
    // Sparse layers have no index.
    let (index, windows) = index_from_ztoc(ztoc, blob.len() as u64, xattrs).ok()?;
    let id = Digest::of(&[ztoc, blob, &[u8::from(xattrs)]].concat());
    let cached = cache.insert_with_windows(&id, index, &windows).unwrap();
    for (at, chunk) in cached.index().chunks().iter().enumerate() {
        let bytes = &tar[chunk.data_offset as usize..chunk.data_end() as usize];
        cached.store(at, bytes).unwrap();
    }
    assert!(cached.is_complete());
    Some(check::describes(
        &cached,
        &[Digest::of(b"of another image"), Digest::of(tar)],
    ))
}

#[test]
fn honest_indexes_are_never_called_false() {
    let root = tempfile::tempdir().unwrap();
    let cache = Cache::open(root.path(), &CacheConfig::default(), Arc::new(Metrics::new())).unwrap();
    let mut compared = 0;
    let mut honest = |what: &str, ztoc: &[u8], blob: &[u8], tar: &[u8]| {
        let has_xattrs = tar.windows(13).any(|bytes| bytes == b"SCHILY.xattr.");
        // SOCI says that a layer has no attributes if that is so.
        for xattrs in if has_xattrs { &[true][..] } else { &[true, false] } {
            if let Some(found) = compare(&cache, ztoc, blob, tar, *xattrs) {
                assert!(
                    matches!(&found, Ok(proof) if *proof == Digest::of(tar)),
                    "{what}, attributes: {xattrs}: {found:?}"
                );
                compared += 1;
            }
        }
    };
    for (at, (version, ztoc)) in [
        ("v1", ZTOC),
        ("v2", "f03434983abd22f2d08d118c13f6a40c2fffc2af2a383408aecfd4d5edbe2f88"),
        ("v1", "1c5a9414425f1b258e2254978056a351d9bea0d12ac148e70f7ca3b14e188681"),
        ("v2", "beb334392bcc917317fc89af8fe5a691da27b1229d2c5b3f76920901b72234a5"),
    ]
    .into_iter()
    .enumerate()
    {
        let blob = vector("v2", LAYERS[at / 2]);
        honest(
            &format!("SOCI's own {at}"),
            &vector(version, ztoc),
            &blob,
            &untar(&blob),
        );
    }
    let cases = [
        torture::names(),
        torture::links(),
        torture::duplicates(),
        torture::metadata(),
        torture::xattrs(),
        torture::sizes(),
        torture::archives(),
        torture::devices(),
        torture::whiteouts(),
        torture::base_whiteouts(),
        torture::implied(),
    ];
    for case in &cases {
        for (at, layer) in case.image.layers.iter().enumerate() {
            let compression = match layer.compression {
                support::image::Compression::None => Compression::None,
                support::image::Compression::Gzip => Compression::Gzip,
                _ => continue,
            };
            // Its index says nothing of the bytes behind the end of the archive, which are no zeros: it cannot be proven.
            if (case.name, at) == ("archives", 4) {
                continue;
            }
            let blob = &layer.blob.bytes;
            let tar = match compression {
                Compression::None => blob.to_vec(),
                _ => untar(blob),
            };
            let mut builder = ZtocBuilder::new(compression, 1 << 16, "a test").unwrap();
            let built = builder.push(blob).and_then(|()| builder.finish());
            if let Ok(ztoc) = built {
                honest(&format!("{} {at}", case.name), &ztoc, blob, &tar);
            }
        }
    }
    assert!(compared > 30, "{compared}");
}

#[test]
fn a_false_index_is_called_so() {
    let root = tempfile::tempdir().unwrap();
    let cache = Cache::open(root.path(), &CacheConfig::default(), Arc::new(Metrics::new())).unwrap();
    let blob = vector("v2", LAYERS[0]);
    let tar = untar(&blob);
    let honest = vector("v1", ZTOC);
    // Another name of the same length.
    let at = honest.windows(9).position(|bytes| bytes == b"etc/hosts").unwrap();
    let mut named = honest.clone();
    named[at..at + 9].copy_from_slice(b"etc/hostz");
    let found = compare(&cache, &named, &blob, &tar, true).unwrap();
    assert!(matches!(found, Err(check::Mismatch::Tree)), "{found:?}");
    // Other bytes: what is decoded with false windows.
    let mut other = tar.clone();
    other[1000] ^= 1;
    let (index, windows) = index_from_ztoc(&honest, blob.len() as u64, true).unwrap();
    let cached = cache
        .insert_with_windows(&Digest::of(b"other"), index, &windows)
        .unwrap();
    for (at, chunk) in cached.index().chunks().iter().enumerate() {
        let bytes = &other[chunk.data_offset as usize..chunk.data_end() as usize];
        cached.store(at, bytes).unwrap();
    }
    let found = check::describes(&cached, &[Digest::of(&tar)]);
    assert!(matches!(found, Err(check::Mismatch::Tar { .. })), "{found:?}");
}
