//! Who is shown what: every way to vouch for an index, with and without required signatures.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::cache::Cache;
use crate::catalog::loader::Loader;
use crate::catalog::shared::trust::SigningKey;
use crate::catalog::shared::{NAMED_DIGEST, NAMED_SIZE, SharedIndexes};
use crate::catalog::soci::{LABEL, SociIndexes, manifest::INDEX_DIGEST};
use crate::config::{CacheConfig, FetchConfig, FormatsConfig, IndexConfig, RegistryConfig};
use crate::fetch::Fetcher;
use crate::layer::estargz::TOC_DIGEST_ANNOTATION;
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::store::LayerSource;
use crate::sync::Budget;

// The first key pair of RFC 8032, section 7.1, in the form that openssl writes.
const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n-----END PRIVATE KEY-----\n";
const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----\n";

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

fn place(repository: &str) -> LayerSource {
    LayerSource {
        host: "r.example".to_owned(),
        repository: repository.to_owned(),
    }
}

/// A loader with everything that the configuration can say: a key, a cluster's repository, trusted ones, a SOCI index for one manifest.
fn loader(dir: &Path, require_signature: bool) -> Loader {
    let public = dir.join("public");
    std::fs::write(&public, PUBLIC).unwrap();
    let config = IndexConfig {
        repository: "r.example/cluster".to_owned(),
        trusted_repositories: vec!["r.example/team/*".to_owned()],
        public_keys: vec![public],
        soci_indexes: BTreeMap::from([(digest("configured").to_string(), digest("soci").to_string())]),
        require_signature,
        ..IndexConfig::default()
    };
    let metrics = Arc::new(Metrics::new());
    let registry = Registry::new(&RegistryConfig::default(), Arc::clone(&metrics)).unwrap();
    let root = dir.join(format!("root {require_signature}"));
    let cache = Cache::open(&root, &CacheConfig::default(), Arc::clone(&metrics)).unwrap();
    let runtime = tokio::runtime::Handle::current();
    let fetcher = Fetcher::new(
        &FetchConfig::default(),
        Budget::new(1 << 30),
        Arc::clone(&cache),
        runtime,
        Arc::clone(&metrics),
    );
    let memory = Arc::clone(fetcher.memory());
    let shared = SharedIndexes::new(
        &config,
        Arc::clone(&registry),
        Arc::clone(&memory),
        Arc::clone(&metrics),
    )
    .unwrap();
    let soci = SociIndexes::new(&config, registry, memory, metrics).unwrap();
    Loader::new(cache, fetcher, FormatsConfig::default())
        .with_shared(shared)
        .with_soci(soci)
}

/// An image: what its manifest says of the layer, its digest, and where it comes from.
fn image(annotations: &[(&str, String)], manifest: &str, repository: &str) -> (LayerSpec, Origin) {
    let spec = LayerSpec {
        digest: digest("blob"),
        size: 10 << 20,
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        annotations: annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone()))
            .collect(),
        foreign: false,
        diff_id: Some(digest("tar")),
    };
    let origin = Origin {
        sources: vec![place(repository)],
        manifest: Some(digest(manifest)),
    };
    (spec, origin)
}

fn belief(id: Digest, index: Option<IndexRecord>) -> Belief {
    Belief {
        id,
        blob: digest("blob"),
        proof: None,
        index,
    }
}

fn soci(by: Voucher, repository: &str) -> Belief {
    let record = IndexRecord::Soci {
        from: String::new(),
        trust: String::new(),
        digest: digest("soci"),
        verified: None,
        place: Some(place(repository)),
        by,
    };
    belief(Kind::Soci.id(&digest("blob"), &digest("soci")), Some(record))
}

fn portable(signature: Option<String>, repository: &str) -> Belief {
    let record = IndexRecord::Shared {
        from: String::new(),
        trust: String::new(),
        digest: digest("portable"),
        verified: None,
        place: Some(place(repository)),
        signature,
    };
    belief(Kind::Portable.id(&digest("blob"), &digest("portable")), Some(record))
}

#[tokio::test]
async fn every_image_is_shown_what_it_or_the_configuration_vouches_for() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("private"), PRIVATE).unwrap();
    let key = SigningKey::load(&dir.path().join("private")).unwrap();
    let signature = key.sign(&digest("blob"), &digest("portable"));
    let of_other = key.sign(&digest("another blob"), &digest("portable"));
    let text = |text: &str| digest(text).to_string();
    let named = |of: &str| vec![(NAMED_DIGEST, text(of)), (NAMED_SIZE, "100".to_owned())];
    let images = [
        ("plain", image(&[], "plain", "stranger/app")),
        ("plain in a trusted place", image(&[], "plain", "team/app")),
        (
            "table",
            image(&[(TOC_DIGEST_ANNOTATION, text("table"))], "table", "stranger/app"),
        ),
        (
            "other table",
            image(&[(TOC_DIGEST_ANNOTATION, text("x"))], "other", "stranger/app"),
        ),
        // SOCI v2, or the label as the annotation of the layer.
        ("soci", image(&[(INDEX_DIGEST, text("soci"))], "soci", "stranger/app")),
        (
            "other soci",
            image(&[(INDEX_DIGEST, text("x"))], "other", "stranger/app"),
        ),
        ("client", image(&[(LABEL, text("soci"))], "client", "stranger/app")),
        ("configured", image(&[], "configured", "stranger/app")),
        ("portable", image(&named("portable"), "portable", "stranger/app")),
        ("other portable", image(&named("x"), "other", "stranger/app")),
    ];
    let (spec, origin) = &images[2].1;
    let table = loader(dir.path(), false).vouched(spec, origin)[0];
    let everybody: Vec<&str> = images.iter().map(|(name, _)| *name).collect();
    // What it is, and who is shown it by default, and with required signatures.
    let table_record = IndexRecord::Table { digest: digest("x") };
    let cases: Vec<(&str, Belief, Vec<&str>, Vec<&str>)> = vec![
        (
            "built from the blob",
            belief(digest("blob"), Some(IndexRecord::Built { published: None })),
            everybody.clone(),
            everybody.clone(),
        ),
        (
            "a table of contents",
            belief(table, Some(table_record)),
            vec!["table"],
            vec!["table"],
        ),
        (
            "a SOCI index named by a manifest",
            soci(Voucher::Manifest, "stranger/app"),
            vec!["soci", "client", "configured"],
            vec!["soci"],
        ),
        (
            "a SOCI index named by a client",
            soci(Voucher::Client, "stranger/app"),
            vec!["soci", "client", "configured"],
            vec!["soci"],
        ),
        (
            "a SOCI index about an image in a trusted place",
            soci(Voucher::Place, "team/app"),
            vec!["soci", "client", "configured", "plain in a trusted place"],
            vec!["soci"],
        ),
        (
            "a SOCI index about an image in another place",
            soci(Voucher::Place, "stranger/app"),
            vec!["soci", "client", "configured"],
            vec!["soci"],
        ),
        (
            "a SOCI index of an older version",
            soci(Voucher::Unknown, "team/app"),
            vec!["soci", "client", "configured"],
            vec!["soci"],
        ),
        (
            "a portable index",
            portable(None, "stranger/app"),
            vec!["portable"],
            vec!["portable"],
        ),
        (
            "a portable index in a trusted place",
            portable(None, "team/app"),
            vec!["portable", "plain in a trusted place"],
            vec!["portable"],
        ),
        (
            "a portable index in the cluster's repository",
            portable(None, "cluster"),
            everybody.clone(),
            vec!["portable"],
        ),
        (
            "a signed portable index",
            portable(Some(signature), "stranger/app"),
            everybody.clone(),
            everybody.clone(),
        ),
        (
            "a portable index with the signature of another layer",
            portable(Some(of_other), "stranger/app"),
            vec!["portable"],
            vec!["portable"],
        ),
        ("something of schema 1", belief(digest("legacy"), None), vec![], vec![]),
    ];
    for require_signature in [false, true] {
        let loader = loader(dir.path(), require_signature);
        for (what, belief, by_default, signed) in &cases {
            let expected = if require_signature { signed } else { by_default };
            for (name, (spec, origin)) in &images {
                let judged = loader.judge(vec![belief.clone()], spec, origin);
                let is_shown = judged.usable.iter().any(|(_, id)| *id == belief.id);
                let case = format!("{what} to {name}, signatures required: {require_signature}");
                assert_eq!(is_shown, expected.contains(name), "{case}");
                assert_eq!(judged.refused.contains(&belief.id), !is_shown, "{case}");
            }
            // Once it is found to be the tar that all of them promise, nobody minds where it came from.
            let mut proven = belief.clone();
            proven.proof = Some(digest("tar"));
            // And nobody gets what was found to be something else, or not what its index says.
            let mut other = belief.clone();
            other.proof = Some(digest("another tar"));
            let mut is_false = belief.clone();
            if let Some(index) = &mut is_false.index {
                index.set_verified(false);
            }
            let checkable = is_false.is_false();
            for (name, (spec, origin)) in &images {
                let judged = loader.judge(vec![proven.clone()], spec, origin);
                assert_eq!(judged.usable[0], (Ground::Proven, belief.id), "{what} to {name}");
                let mut bad = vec![other.clone()];
                bad.extend(checkable.then(|| is_false.clone()));
                for bad in bad {
                    let judged = loader.judge(vec![bad], spec, origin);
                    assert!(judged.usable.iter().all(|(_, id)| *id != belief.id), "{what} to {name}");
                    assert_eq!(judged.refused, [belief.id], "{what} to {name}");
                }
            }
        }
    }
}

#[tokio::test]
async fn the_best_comes_first() {
    let dir = tempfile::tempdir().unwrap();
    let loader = loader(dir.path(), false);
    let (spec, origin) = image(
        &[
            (TOC_DIGEST_ANNOTATION, digest("table").to_string()),
            (INDEX_DIGEST, digest("soci").to_string()),
        ],
        "both",
        "stranger/app",
    );
    let vouched = loader.vouched(&spec, &origin);
    let soci = soci(Voucher::Manifest, "stranger/app");
    assert_eq!((vouched.len(), vouched[1]), (2, soci.id));
    let cluster = portable(None, "cluster");
    let mut proven = belief(digest("blob"), None);
    proven.proof = Some(digest("tar"));
    let order = |known: Vec<Belief>| -> Vec<Digest> {
        let usable = loader.judge(known, &spec, &origin).usable;
        usable.into_iter().map(|(_, id)| id).collect()
    };
    let all = vec![cluster.clone(), soci.clone(), proven.clone()];
    // The table is not known of, and may be in the cache all the same.
    assert_eq!(order(all), [proven.id, vouched[0], soci.id, cluster.id]);
    assert_eq!(loader.judge(vec![proven], &spec, &origin).proof, Some(digest("tar")));
    // What is believed of another blob is nothing to it, whoever vouches for it.
    for mut of_another in [cluster, soci] {
        of_another.blob = digest("another blob");
        assert_eq!(of_another.ground(&spec, &origin, &vouched, loader.policy()), None);
    }
}

#[tokio::test]
async fn the_clients_word_counts_where_no_signature_is_required() {
    let dir = tempfile::tempdir().unwrap();
    for (require_signature, by, counts) in [
        (false, Voucher::Client, true),
        (false, Voucher::Manifest, false),
        (false, Voucher::Place, false),
        (true, Voucher::Client, false),
    ] {
        let loader = loader(dir.path(), require_signature);
        let belief = soci(by, "stranger/app");
        assert_eq!(belief.is_clients_word(loader.policy()), counts, "{by:?}");
        assert!(!belief.is_clients_word(None));
    }
}

#[test]
fn ids_tell_kinds_layers_and_indexes_apart() {
    let (a, b) = (digest("a"), digest("b"));
    let ids = [
        Kind::Table.id(&a, &b),
        Kind::Soci.id(&a, &b),
        Kind::Portable.id(&a, &b),
        Kind::Table.id(&b, &a),
        a,
        b,
    ];
    let distinct: std::collections::HashSet<_> = ids.iter().collect();
    assert_eq!(distinct.len(), ids.len());
}

#[test]
fn beliefs_come_and_go() {
    let beliefs = Beliefs::default();
    let record = |id: Digest, proof: Option<Digest>| LayerRecord {
        digest: id,
        blob: (id != digest("blob")).then(|| digest("blob")),
        variant_of: None,
        proof,
        formerly: None,
        diff_id: None,
        media_type: String::new(),
        size: 1,
        annotations: BTreeMap::new(),
        slot: 1,
        sources: Vec::new(),
        images: Vec::new(),
        streamed: None,
    };
    let (blob, other) = (digest("blob"), digest("other"));
    beliefs.note(&record(blob, None));
    beliefs.note(&record(other, None));
    beliefs.note_index(&other, IndexRecord::Table { digest: digest("x") });
    beliefs.note_index(&digest("unknown"), IndexRecord::Table { digest: digest("x") });
    // A proof stays, whoever loads the layer next.
    beliefs.note(&record(other, Some(digest("tar"))));
    beliefs.note(&record(other, None));
    let variant = LayerRecord {
        variant_of: Some(other),
        ..record(digest("variant"), None)
    };
    beliefs.note(&variant);
    assert_eq!(
        (beliefs.layer_of(&variant.digest), beliefs.layer_of(&blob)),
        (other, blob)
    );
    let ids = |beliefs: &Beliefs| {
        beliefs
            .of_blob(&blob)
            .into_iter()
            .map(|belief| belief.id)
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(&beliefs), [blob, other]);
    let known = beliefs.get(&other).unwrap();
    assert_eq!(
        (known.blob, known.proof, known.index.is_some()),
        (blob, Some(digest("tar")), true)
    );
    beliefs.forget(&blob);
    beliefs.forget_variant(&variant.digest);
    assert_eq!(
        (ids(&beliefs), beliefs.layer_of(&variant.digest)),
        (vec![other], variant.digest)
    );
    beliefs.forget(&other);
    beliefs.forget(&other);
    assert!(ids(&beliefs).is_empty() && beliefs.get(&other).is_none());
}
