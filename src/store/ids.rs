//! From schema 1 to 2: layers are known by ids.
//!
//! Schema 1 knew a layer by its blob, whoever had said what its index is. What was certainly built from the blob itself stays where it is: the record
//! of its index says so, and the image that it was last loaded for names no table of contents. Everything else gets an id of its own, which
//! no image vouches for: the containers that show it keep it, and nobody else gets it. All that refers to it follows, in one transaction; its
//! files follow when they are next looked for ([`LayerRecord::formerly`](super::LayerRecord)).
//!
//! Records that cannot be read stay as they are. Nothing that they say is believed: snapshots of such a layer refer to an id that has no record.

use std::collections::{HashMap, HashSet};

use redb::{ReadableTable as _, WriteTransaction};
use serde_json::{Map, Value, json};

use super::StoreError;
use super::chains::CHAINS;
use super::indexes::INDEXES;
use super::layers::{LAYERS, SLOTS};
use super::snapshots::SNAPSHOTS;
use crate::layer::Digest;

/// Tells ids of layers of which it is not known any more what was believed of them from all others.
const LEGACY_DOMAIN: &[u8] = b"lazuli legacy layer\0";
/// As chains are known ever since there are any.
const CHAIN_DOMAIN: &[u8] = b"lazuli chain\0";
/// How annotations begin that promise a table of contents, in all dialects.
const TABLES: [&str; 3] = [
    "containerd.io/snapshot/stargz/toc.digest",
    "io.github.containers.zstd-chunked.",
    "io.containers.zstd-chunked.",
];

type Records = HashMap<Digest, Map<String, Value>>;

/// The id of something that was known by this digest.
pub(super) fn legacy_id(before: &Digest) -> Digest {
    Digest::of(&[LEGACY_DOMAIN, before.as_bytes()].concat())
}

/// The step.
pub(super) fn legacy(transaction: &WriteTransaction) -> Result<(), StoreError> {
    let layers = records(transaction, LAYERS)?;
    let built = built(transaction)?;
    let of = |record: &Map<String, Value>| digest(record.get("variant_of"));
    let mut stays: HashSet<Digest> = HashSet::new();
    for (id, record) in &layers {
        let has_table = record
            .get("annotations")
            .and_then(Value::as_object)
            .is_some_and(|annotations| {
                annotations
                    .keys()
                    .any(|key| TABLES.iter().any(|start| key.starts_with(start)))
            });
        if of(record).is_none() && built.contains(id) && !has_table {
            stays.insert(*id);
        }
    }
    let variants = layers
        .iter()
        .filter(|(_, record)| of(record).is_some_and(|of| stays.contains(&of)));
    let variants: Vec<Digest> = variants.map(|(id, _)| *id).collect();
    stays.extend(variants);
    let name = |id: &Digest| match stays.contains(id) {
        true => *id,
        false => legacy_id(id),
    };

    let mut moved: HashSet<Digest> = HashSet::new();
    {
        let mut table = transaction.open_table(LAYERS)?;
        for (id, record) in &layers {
            if stays.contains(id) {
                continue;
            }
            let mut record = record.clone();
            record.insert("digest".to_owned(), json!(legacy_id(id)));
            record.insert("formerly".to_owned(), json!(id));
            match of(&record) {
                Some(of) => record.insert("variant_of".to_owned(), json!(name(&of))),
                None => record.insert("blob".to_owned(), json!(id)),
            };
            table.remove(id.as_bytes())?;
            table.insert(legacy_id(id).as_bytes(), bytes_of(record).as_slice())?;
            moved.insert(*id);
        }
    }
    snapshots(transaction, &name, &mut moved)?;
    let chains = chains(transaction, &name)?;
    let mut slots = transaction.open_table(SLOTS)?;
    let mut indexes = transaction.open_table(INDEXES)?;
    let moves = moved.iter().map(|id| (*id, legacy_id(id))).chain(chains);
    for (from, to) in moves {
        // The old name has no slot any more: what is built from the blob gets one of its own.
        let slot = slots.remove(from.as_bytes())?.map(|slot| slot.value());
        if let Some(slot) = slot {
            slots.insert(to.as_bytes(), slot)?;
        }
        let index = indexes.remove(from.as_bytes())?.map(|index| index.value().to_vec());
        if let Some(index) = index {
            indexes.insert(to.as_bytes(), index.as_slice())?;
        }
    }
    Ok(())
}

/// Layers whose index was built here, as the table of indexes says. (The first databases had no such table, and built all.)
fn built(transaction: &WriteTransaction) -> Result<HashSet<Digest>, StoreError> {
    let records = records(transaction, INDEXES)?.into_iter();
    let built = records.filter(|(_, record)| record.get("kind").is_some_and(|kind| kind == "built"));
    Ok(built.map(|(id, _)| id).collect())
}

/// Snapshots show what they showed. Nobody has compared it with what their images promise: it counts as vouched for.
fn snapshots(
    transaction: &WriteTransaction,
    name: &impl Fn(&Digest) -> Digest,
    moved: &mut HashSet<Digest>,
) -> Result<(), StoreError> {
    let mut changed = Vec::new();
    let mut table = transaction.open_table(SNAPSHOTS)?;
    for entry in table.iter()? {
        let (key, bytes) = entry?;
        let Ok(mut record) = serde_json::from_slice::<Map<String, Value>>(bytes.value()) else {
            continue;
        };
        let Some(layer) = digest(record.get("layer")) else {
            continue;
        };
        let id = name(&layer);
        if id != layer {
            moved.insert(layer);
        }
        record.insert("layer".to_owned(), json!(id));
        record.insert("vouched".to_owned(), Value::Bool(true));
        changed.push((key.value().to_owned(), bytes_of(record)));
    }
    for (key, bytes) in changed {
        table.insert(key.as_str(), bytes.as_slice())?;
    }
    Ok(())
}

/// Chains are of the layers' ids, and known by the digest of them: the old and the new one of each that changes.
fn chains(
    transaction: &WriteTransaction,
    name: &impl Fn(&Digest) -> Digest,
) -> Result<Vec<(Digest, Digest)>, StoreError> {
    let mut renamed = Vec::new();
    let before = records(transaction, CHAINS)?;
    let mut table = transaction.open_table(CHAINS)?;
    for (key, mut record) in before {
        let layers = record.get("layers").and_then(Value::as_array);
        let Some(layers) = layers else { continue };
        let ids: Vec<Digest> = layers
            .iter()
            .filter_map(|layer| digest(Some(layer)))
            .map(|layer| name(&layer))
            .collect();
        let mut bytes = CHAIN_DOMAIN.to_vec();
        ids.iter().for_each(|id| bytes.extend_from_slice(id.as_bytes()));
        let id = Digest::of(&bytes);
        if id == key {
            continue;
        }
        record.insert("digest".to_owned(), json!(id));
        record.insert("layers".to_owned(), json!(ids));
        table.remove(key.as_bytes())?;
        table.insert(id.as_bytes(), bytes_of(record).as_slice())?;
        renamed.push((key, id));
    }
    Ok(renamed)
}

/// The records of a table that can be read.
fn records(
    transaction: &WriteTransaction,
    table: redb::TableDefinition<&[u8; Digest::LEN], &[u8]>,
) -> Result<Records, StoreError> {
    let table = transaction.open_table(table)?;
    let mut found = Records::new();
    for entry in table.iter()? {
        let (key, bytes) = entry?;
        if let Ok(record) = serde_json::from_slice(bytes.value()) {
            found.insert(Digest::from_bytes(*key.value()), record);
        }
    }
    Ok(found)
}

fn digest(value: Option<&Value>) -> Option<Digest> {
    value?.as_str()?.parse().ok()
}

/// Maps with text keys can always be written.
fn bytes_of(record: Map<String, Value>) -> Vec<u8> {
    Value::Object(record).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use redb::{Database, TableDefinition};

    use super::*;
    use crate::store::{IndexRecord, Kind, LayerRecord, Store};

    /// A database as version 1 left it: one layer of each origin, a variant and a snapshot of each, and a chain of all.
    fn old(path: &std::path::Path, origins: &[(&str, Value, Value)]) -> Vec<Digest> {
        let db = Database::create(path).unwrap();
        let transaction = db.begin_write().unwrap();
        let put = |table: TableDefinition<&[u8; Digest::LEN], &[u8]>, key: &Digest, record: Value| {
            let mut table = transaction.open_table(table).unwrap();
            table.insert(key.as_bytes(), record.to_string().as_bytes()).unwrap();
        };
        let record = |digest: &Digest, variant_of: Option<Digest>, annotations: &Value, slot: usize| {
            json!({"digest": digest, "variant_of": variant_of, "diff_id": Digest::of(b"tar"), "media_type": "", "size": 1,
                "annotations": annotations, "slot": slot, "sources": [], "images": []})
        };
        let mut ids = Vec::new();
        for (at, (name, index, annotations)) in origins.iter().enumerate() {
            let blob = Digest::of(name.as_bytes());
            let variant = Digest::of(format!("variant {name}").as_bytes());
            put(LAYERS, &blob, record(&blob, None, annotations, 2 * at + 1));
            put(LAYERS, &variant, record(&variant, Some(blob), annotations, 2 * at + 2));
            if !index.is_null() {
                put(INDEXES, &blob, index.clone());
            }
            let mut slots = transaction.open_table(SLOTS).unwrap();
            slots.insert(blob.as_bytes(), 2 * at as u32 + 1).unwrap();
            slots.insert(variant.as_bytes(), 2 * at as u32 + 2).unwrap();
            let mut snapshots = transaction.open_table(SNAPSHOTS).unwrap();
            for (key, layer) in [(name.to_string(), blob), (format!("on {name}"), variant)] {
                let record = json!({"id": at, "kind": "committed", "parent": null, "labels": {}, "created": 0, "updated": 0, "layer": layer});
                snapshots.insert(key.as_str(), record.to_string().as_bytes()).unwrap();
            }
            ids.extend([blob, variant]);
        }
        let chain = Digest::of(&[CHAIN_DOMAIN, ids[0].as_bytes(), ids[2].as_bytes()].concat());
        put(
            CHAINS,
            &chain,
            json!({"digest": chain, "slot": 77, "layers": [ids[0], ids[2]]}),
        );
        transaction
            .open_table(SLOTS)
            .unwrap()
            .insert(chain.as_bytes(), 77)
            .unwrap();
        let meta: TableDefinition<&str, u64> = TableDefinition::new("meta");
        let mut meta = transaction.open_table(meta).unwrap();
        meta.insert("schema", 1).unwrap();
        meta.insert("next_slot", 99).unwrap();
        drop(meta);
        transaction.commit().unwrap();
        ids
    }

    #[test]
    fn what_was_believed_of_layers_is_nobody_elses_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let digest = Digest::of(b"index");
        let origins = [
            ("built", json!({"kind": "built", "published": null}), json!({})),
            ("table", Value::Null, json!({TABLES[0]: "x"})),
            // It was built once, and later loaded with what a manifest said.
            (
                "both",
                json!({"kind": "built", "published": null}),
                json!({TABLES[0]: "x"}),
            ),
            (
                "soci",
                json!({"kind": "soci", "from": "", "trust": "", "digest": digest}),
                json!({}),
            ),
            (
                "shared",
                json!({"kind": "shared", "from": "", "trust": "", "digest": digest, "verified": true}),
                json!({}),
            ),
        ];
        let before = old(&path, &origins);
        let store = Store::open(&path).unwrap();
        for (at, (name, ..)) in origins.iter().enumerate() {
            let (blob, variant) = (before[2 * at], before[2 * at + 1]);
            let stays = *name == "built";
            let id = if stays { blob } else { legacy_id(&blob) };
            let looks = if stays { variant } else { legacy_id(&variant) };
            let of = |digest: &Digest| store.layer(digest).unwrap();
            let LayerRecord {
                digest,
                slot,
                formerly,
                proof,
                ..
            } = of(&id).unwrap();
            assert_eq!(
                (digest, slot, of(&id).unwrap().blob()),
                (id, 2 * at as u32 + 1, blob),
                "{name}"
            );
            assert_eq!((formerly, proof), ((!stays).then_some(blob), None), "{name}");
            let record = of(&looks).unwrap();
            assert_eq!(
                (record.variant_of, record.slot),
                (Some(id), 2 * at as u32 + 2),
                "{name}"
            );
            for (key, layer) in [(name.to_string(), id), (format!("on {name}"), looks)] {
                let snapshot = store.snapshot(&key).unwrap().unwrap();
                assert_eq!(
                    (snapshot.layer, snapshot.vouched, snapshot.kind),
                    (Some(layer), true, Kind::Committed),
                    "{key}"
                );
            }
            if !stays {
                assert_eq!((of(&blob), store.index(&blob).unwrap()), (None, None), "{name}");
                assert!(store.allocate_slot(&blob).unwrap() >= 100, "{name}: a slot of its own");
            }
        }
        let soci = legacy_id(&before[6]);
        assert!(matches!(
            store.index(&soci).unwrap(),
            Some(IndexRecord::Soci { verified: None, .. })
        ));
        let chains = store.chains().unwrap();
        let [(key, Ok(chain))] = chains.as_slice() else {
            panic!("{chains:?}")
        };
        assert_eq!((chain.digest, chain.slot), (*key, 77));
        assert_eq!(chain.layers, [before[0], legacy_id(&before[2])]);
        assert_eq!(store.allocate_slot(key).unwrap(), 77);
        drop(store);
        // Once.
        let again = Store::open(&path).unwrap();
        assert!(again.layer(&legacy_id(&soci)).unwrap().is_none() && again.layer(&soci).unwrap().is_some());
    }
}
