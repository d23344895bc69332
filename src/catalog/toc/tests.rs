//! Tests of reading tables of contents, on blobs in memory that count how they are read.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::ops::Range;
use std::sync::Mutex;

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use serde_json::json;

use super::*;
use crate::catalog::loader::NotLazy;
use crate::registry::{Body, ManifestBytes, Origin, SourceStats};

/// Random bytes that the blobs begin with, so that they are large enough to be lazy.
const CONTENTS: usize = 600 << 10;

/// A blob, or a small document.
struct Memory {
    bytes: Vec<u8>,
    reads: Mutex<Vec<Range<u64>>>,
}

impl Memory {
    fn new(bytes: Vec<u8>) -> Arc<Memory> {
        let reads = Mutex::default();
        Arc::new(Memory { bytes, reads })
    }
}

impl Blob for Memory {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.reads.lock().unwrap().push(range.clone());
        let part = Bytes::copy_from_slice(&self.bytes[range.start as usize..range.end as usize]);
        async move { Ok(futures::stream::iter([Ok(part)]).boxed() as Body) }.boxed()
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn origin(&self) -> Origin {
        Origin::default()
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

/// A repository with one manifest and small blobs.
struct Repository {
    tag: &'static str,
    manifest: Vec<u8>,
    blobs: BTreeMap<Digest, Vec<u8>>,
}

impl Source for Repository {
    fn manifest<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<ManifestBytes, RegistryError>> {
        let answer = match reference == self.tag {
            true => Ok(ManifestBytes {
                media_type: String::new(),
                digest: Digest::of(&self.manifest),
                bytes: self.manifest.clone().into(),
            }),
            false => Err(RegistryError::NotFound {
                host: "memory".into(),
                what: reference.into(),
            }),
        };
        async move { answer }.boxed()
    }

    fn blob(&self, digest: Digest, _: u64) -> Arc<dyn Blob> {
        Memory::new(self.blobs[&digest].clone())
    }

    fn read_small(&self, digest: Digest, _: u64, _: u64) -> BoxFuture<'_, Result<Bytes, RegistryError>> {
        let bytes = self.blobs[&digest].clone();
        async move { Ok(bytes.into()) }.boxed()
    }

    fn describe(&self) -> String {
        "memory/app".to_owned()
    }

    fn stats(&self) -> SourceStats {
        SourceStats::default()
    }
}

fn table() -> Vec<u8> {
    let digest = Digest::of(b"x").to_string();
    let entries = json!([{"name": "f", "type": "reg", "size": 1, "offset": 9, "digest": digest}]);
    json!({"version": 1, "entries": entries}).to_string().into_bytes()
}

/// The gzip member with the table.
fn member(json: &[u8]) -> Vec<u8> {
    let mut header = [0; 512];
    header[..17].copy_from_slice(b"stargz.index.json");
    header[124..136].copy_from_slice(format!("{:011o}\0", json.len()).as_bytes());
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&[&header[..], json].concat()).unwrap();
    gzip.finish().unwrap()
}

fn contents() -> Vec<u8> {
    (0..CONTENTS as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// An eStargz blob with a footer that has this extra field.
fn estargz_blob(member: &[u8], extra: &[u8]) -> Vec<u8> {
    let mut blob = [&contents()[..], member].concat();
    blob.extend([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff]);
    blob.extend((extra.len() as u16).to_le_bytes());
    blob.extend(extra);
    blob.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    blob
}

/// A blob of stargz' zstd:chunked, and the annotations with which it comes.
fn chunked_blob() -> (Vec<u8>, [(&'static str, String); 3]) {
    let json = table();
    let table = zstd::encode_all(&json[..], 1).unwrap();
    let offset = CONTENTS + 8;
    let frame = |content: &[u8]| {
        let len = (content.len() as u32).to_le_bytes();
        [&[0x50, 0x2a, 0x4d, 0x18][..], &len, content].concat()
    };
    let numbers = [offset, table.len(), json.len(), 1].map(|number| (number as u64).to_le_bytes());
    let footer = frame(&[numbers.concat().as_slice(), b"GnUlInUx"].concat());
    let blob = [contents(), frame(&table), footer].concat();
    let annotations = [
        (TOC_DIGEST_ANNOTATION, Digest::of(&json).to_string()),
        (
            "io.containers.zstd-chunked.manifest-checksum",
            Digest::of(&table).to_string(),
        ),
        (
            "io.containers.zstd-chunked.manifest-position",
            format!("{offset}:{}:{}:1", table.len(), json.len()),
        ),
    ];
    (blob, annotations)
}

fn spec_of(blob: &[u8], media_type: &str, annotations: &[(&str, String)]) -> LayerSpec {
    LayerSpec {
        digest: Digest::of(blob),
        size: blob.len() as u64,
        media_type: media_type.to_owned(),
        annotations: annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone()))
            .collect(),
        foreign: false,
        diff_id: None,
    }
}

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// Reads the table of a blob; also which ranges of it were read.
async fn read_of(
    blob: &[u8],
    annotations: &[(&str, String)],
    formats: FormatsConfig,
    images: &[TocImage],
) -> (Result<Table, TocError>, Vec<(u64, u64)>) {
    let spec = spec_of(blob, ZSTD, annotations);
    let memory = Memory::new(blob.to_vec());
    let source = Arc::clone(&memory) as Arc<dyn Blob>;
    let kind = kind(&spec).unwrap().unwrap();
    let budget = Budget::new(64 << 20);
    let table = read(&spec, &source, kind, &formats, images, &budget).await;
    assert!(table.is_ok() || budget.held() == 0);
    let reads = memory.reads.lock().unwrap();
    let reads = reads.iter().map(|range| (range.start, range.end)).collect();
    (table, reads)
}

fn extra_inside() -> Vec<u8> {
    [b"SG\x16\0", format!("{CONTENTS:016x}STARGZ").as_bytes()].concat()
}

fn promised() -> [(&'static str, String); 1] {
    [(TOC_DIGEST_ANNOTATION, Digest::of(&table()).to_string())]
}

#[tokio::test]
async fn the_footer_leads_to_the_table() {
    let blob = estargz_blob(&member(&table()), &extra_inside());
    let (table, reads) = read_of(&blob, &promised(), FormatsConfig::default(), &[]).await;
    let table = table.unwrap();
    assert_eq!((table.requests, table.bytes), (1, TAIL_MIN));
    let size = blob.len() as u64;
    assert_eq!(reads, [(size - TAIL_MIN, size)]);
    assert!(table.toc.index.lookup_path(b"f").is_some());
}

#[tokio::test]
async fn a_legacy_footer_has_to_be_allowed() {
    let blob = estargz_blob(&member(&table()), format!("{CONTENTS:016x}STARGZ").as_bytes());
    let (refused, _) = read_of(&blob, &promised(), FormatsConfig::default(), &[]).await;
    assert!(matches!(refused, Err(TocError::Legacy)));
    let allowed = FormatsConfig {
        allow_legacy_estargz: true,
    };
    let (table, _) = read_of(&blob, &promised(), allowed.clone(), &[]).await;
    assert!(table.unwrap().toc.index.lookup_path(b"f").is_some());
    // Whatever is allowed, a table has to be the promised one.
    let other = [(TOC_DIGEST_ANNOTATION, Digest::of(b"other").to_string())];
    let (wrong, _) = read_of(&blob, &other, allowed, &[]).await;
    assert!(matches!(wrong, Err(TocError::Layer(LayerError::DigestMismatch { .. }))));
}

#[tokio::test]
async fn a_table_in_another_image() {
    let member = member(&table());
    let blob = estargz_blob(b"", b"SG\x11\0STARGZEXTERNALTOC");
    let repository = |layer: &Digest| {
        let empty = json!({"digest": Digest::of(b"{}").to_string(), "size": 2, "mediaType": "application/json"});
        let descriptor = json!({"digest": Digest::of(&member).to_string(), "size": member.len(), "mediaType": GZIP,
            "annotations": {(EXTERNAL_TOC_LAYER_ANNOTATION): layer.to_string()}});
        let manifest = json!({"schemaVersion": 2, "config": empty, "layers": [empty, descriptor]});
        Arc::new(Repository {
            tag: "1-esgztoc",
            manifest: manifest.to_string().into_bytes(),
            blobs: BTreeMap::from([(Digest::of(&member), member.clone())]),
        })
    };
    let reference = Reference::parse("r.example/app:1").unwrap();
    let tag = TocImage::tag_of(&reference).unwrap();
    let there = TocImage::beside(repository(&Digest::of(&blob)), tag);
    let formats = FormatsConfig::default;
    let (table, _) = read_of(&blob, &promised(), formats(), std::slice::from_ref(&there)).await;
    let table = table.unwrap();
    assert_eq!(table.toc.index.chunks()[0].blob_end(), blob.len() as u64 - 46);
    assert_eq!(table.bytes, TAIL_MIN + member.len() as u64);

    let of_another = TocImage::beside(repository(&Digest::of(b"another")), tag);
    let absent = TocImage::beside(repository(&Digest::of(&blob)), "2");
    let (table, _) = read_of(&blob, &promised(), formats(), &[absent.clone(), there]).await;
    assert!(table.is_ok());
    for (images, what) in [
        (vec![], "containerd did not tell the name"),
        (vec![absent], "memory/app:2-esgztoc does not have it"),
        (vec![of_another], "memory/app:1-esgztoc does not have it"),
    ] {
        let (error, _) = read_of(&blob, &promised(), formats(), &images).await;
        let error = error.map(|_| ()).unwrap_err();
        assert!(
            matches!(error, TocError::Elsewhere(_)) && error.to_string().contains(what),
            "{error}"
        );
    }
    let pinned = Reference::parse(&format!("r.example/app@{}", Digest::of(b"x"))).unwrap();
    assert_eq!(TocImage::tag_of(&pinned), None);
}

#[tokio::test]
async fn zstd_chunked_with_and_without_its_place() {
    let (blob, annotations) = chunked_blob();
    let formats = FormatsConfig::default;
    // With the place in the manifest, one request brings the table and nothing else.
    for annotations in [&annotations[..], &annotations[1..]] {
        let (table, reads) = read_of(&blob, annotations, formats(), &[]).await;
        let start = CONTENTS as u64 + 8;
        assert_eq!(reads, [(start, blob.len() as u64 - 48)]);
        assert!(table.unwrap().toc.index.lookup_path(b"f").is_some());
    }
    // Without it, or with eStargz' annotation alone, the footer tells.
    for annotations in [&annotations[..1], &annotations[..2], &annotations[1..2]] {
        let (table, reads) = read_of(&blob, annotations, formats(), &[]).await;
        assert_eq!(reads.len(), 1);
        assert!(table.unwrap().toc.index.lookup_path(b"f").is_some());
    }
    let (table, _) = read_of(&contents(), &annotations[..1], formats(), &[]).await;
    let error = table.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("there is none"), "{error}");
}

/// However many tables are read at once, and however much each needs: no more is held than there is, and all come to an end.
#[tokio::test]
async fn many_tables_share_the_memory() {
    let (chunked, annotations) = chunked_blob();
    let estargz = estargz_blob(&member(&table()), &extra_inside());
    let formats = FormatsConfig::default();
    // Each table may take 4 MiB, and a little.
    let budget = Budget::new(10 << 20);
    let one = async |blob: &[u8], annotations: &[(&str, String)]| {
        let spec = spec_of(blob, ZSTD, annotations);
        let source = Memory::new(blob.to_vec()) as Arc<dyn Blob>;
        let table = read(&spec, &source, kind(&spec).unwrap().unwrap(), &formats, &[], &budget).await;
        assert!(budget.held() <= budget.total());
        let table = table.unwrap();
        // Of the share there is left what the index is.
        assert_eq!(
            table._share.bytes(),
            (2 * table.toc.index.memory()).next_multiple_of(4096)
        );
        // It is being stored.
        tokio::task::yield_now().await;
    };
    let promise = promised();
    let many = (0..8).map(|i| {
        one(
            if i % 2 == 0 { &chunked } else { &estargz },
            if i % 2 == 0 { &annotations } else { &promise },
        )
    });
    futures::future::join_all(many).await;
    assert_eq!((budget.held(), budget.waiting()), (0, 0));

    // A table that says it is larger than all the memory is refused before it is unpacked.
    let spec = spec_of(
        &chunked,
        ZSTD,
        &[
            annotations[1].clone(),
            (annotations[2].0, format!("{}:100:{}:1", CONTENTS + 8, 20 << 20)),
        ],
    );
    let source = Memory::new(chunked.clone()) as Arc<dyn Blob>;
    let promise = kind(&spec).unwrap().unwrap();
    let Kind::Chunked(promise) = promise else {
        panic!("it is zstd:chunked")
    };
    let promise = Kind::Chunked(Promise {
        compressed: Some(Digest::of(&chunked[CONTENTS + 8..CONTENTS + 108])),
        ..promise
    });
    let refused = read(&spec, &source, promise, &formats, &[], &budget).await.map(|_| ());
    let error = refused.unwrap_err().to_string();
    assert!(
        error.contains("size of the table of contents, beside what is in memory, is 20971520"),
        "{error}"
    );
    assert_eq!(budget.held(), 0);
}

#[test]
fn why_layers_are_streamed() {
    let (blob, annotations) = chunked_blob();
    let word = |spec: LayerSpec| NotLazy::of_spec(&spec).map(|reason| reason.word);
    assert_eq!(word(spec_of(&blob, ZSTD, &annotations)), None);
    assert_eq!(word(spec_of(&blob, GZIP, &promised())), None);
    assert_eq!(word(spec_of(&blob[..1000], GZIP, &promised())), Some("small"));
    assert_eq!(word(spec_of(&blob, GZIP, &[])), Some("plain"));
    assert_eq!(word(spec_of(&blob, ZSTD, &[])), Some("zstd"));
    // Nothing vouches for a place alone.
    assert_eq!(word(spec_of(&blob, ZSTD, &annotations[2..])), Some("zstd"));
    let wrong = [(TOC_DIGEST_ANNOTATION, "sha256:abc".to_owned())];
    assert_eq!(word(spec_of(&blob, GZIP, &wrong)), Some("toc"));
}
