//! `Content-Encoding` on what is not encoded, and on what is: the digest decides.

use std::io::Write as _;

use bytes::Bytes;
use lazuli::registry::{RegistryError, image};

use crate::ranges::{Node, files, load, read_all};
use crate::support::fault_registry::{Fault, FaultRegistry, Odd, OddBody, On};
use crate::support::lazy;
use crate::{Fixture, REPOSITORY, add_image, config, read, source};

const ALWAYS: usize = usize::MAX;

fn gzip(bytes: &[u8]) -> Bytes {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap().into()
}

fn deflate(bytes: &[u8]) -> Bytes {
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    zlib.write_all(bytes).unwrap();
    zlib.finish().unwrap().into()
}

/// A proxy that encodes whatever passes.
fn encoding(name: &'static str, body: Bytes) -> Odd {
    Odd::full(OddBody::Bytes(body)).with("content-encoding", name).always()
}

#[tokio::test]
async fn an_encoding_that_is_only_claimed_does_no_harm() {
    for claimed in [
        "",
        "identity",
        "none",
        "binary",
        "UTF-8",
        "aws-chunked",
        "gzip",
        "x-gzip",
        "deflate",
        "zstd",
        "br",
        "aws-chunked, gzip",
        "something/else",
    ] {
        let f = Fixture::new().await;
        f.registry.fail(On::Blob, ALWAYS, Fault::Encoding(claimed));
        f.good(0, 300_000).await;
        f.good(10, 20_000).await;
        assert_eq!(f.registry.seen(On::Blob).len(), 2, "{claimed}");
    }
}

#[tokio::test]
async fn what_really_is_encoded_is_decoded() {
    let text: Vec<u8> = (0..100_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
    for (name, body) in [
        ("gzip", gzip(&text)),
        ("X-Gzip", gzip(&text)),
        ("deflate", deflate(&text)),
        ("zstd", zstd::encode_all(&text[..], 1).unwrap().into()),
        ("gzip, zstd", zstd::encode_all(&gzip(&text)[..], 1).unwrap().into()),
        ("aws-chunked, gzip", gzip(&text)),
    ] {
        let registry = FaultRegistry::start().await;
        let digest = registry.add_blob(text.clone());
        let source = source(&config(), &registry.host());
        let blob = source.blob(digest, text.len() as u64);
        registry.fail(On::Blob, ALWAYS, Fault::Odd(encoding(name, body.clone())));
        assert!(read(&blob, 0..blob.size()).await.unwrap() == text, "{name}");
        // Also where a part was asked for.
        assert!(
            read(&blob, 1000..300_000).await.unwrap() == text[1000..300_000],
            "{name}"
        );
        assert_eq!(registry.seen(On::Blob).len(), 2, "{name}");
        // Without a length it shows with the digest only.
        registry.heal();
        registry.fail(On::Blob, ALWAYS, Fault::Odd(encoding(name, body).unsized_()));
        let size = text.len() as u64;
        assert!(source.read_small(digest, size, size).await.unwrap() == text, "{name}");
        assert_eq!(registry.seen(On::Blob).len(), 4, "{name}");
    }
}

#[tokio::test]
async fn a_part_of_an_encoded_body_is_not_taken() {
    let f = Fixture::new().await;
    let encoded = gzip(&f.bytes);
    let part = Odd::partial(OddBody::Bytes(encoded.slice(1000..2000)))
        .with("content-encoding", "gzip")
        .with("content-range", "bytes 1000-1999/200000");
    f.registry.fail(On::Blob, 1, Fault::Odd(part));
    f.registry.fail(On::Blob, ALWAYS, Fault::Odd(encoding("gzip", encoded)));
    f.good(1000, 2000).await;
    assert_eq!(f.registry.seen(On::Blob).len(), 2);
}

#[tokio::test]
async fn an_encoding_that_cannot_be_undone_is_named() {
    let f = Fixture::new().await;
    f.registry.fail(
        On::Blob,
        ALWAYS,
        Fault::Odd(encoding("br", Bytes::from_static(b"brotli"))),
    );
    let error = f.error(0, 300_000).await;
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("br") && text.contains(&f.registry.host()), "{text}");
    // Where only the digest tells, those who see it are told what was claimed.
    f.registry.heal();
    let odd = encoding("br", Bytes::from(vec![1; 300_000]));
    f.registry.fail(On::Blob, ALWAYS, Fault::Odd(odd));
    read(&f.blob, 0..300_000).await.unwrap();
    f.blob.distrust();
    assert!(
        f.blob.describe().contains("Content-Encoding br"),
        "{}",
        f.blob.describe()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_compresses_everything_costs_a_reader_nothing_but_time() {
    for (name, layer) in [
        ("estargz", lazy::estargz(&files())),
        ("zstd:chunked", lazy::zstd_chunked(&files())),
    ] {
        for sized in [true, false] {
            let (registry, node) = (FaultRegistry::start().await, Node::new());
            let odd = encoding("gzip", gzip(&layer.blob));
            let odd = Odd { sized, ..odd };
            registry.fail(On::Blob, ALWAYS, Fault::Odd(odd));
            let loaded = load(&node, &registry, &layer).await;
            assert!(loaded.streamed.is_some(), "{name}");
            read_all(name, &loaded.layer).await;
        }
    }
}

#[tokio::test]
async fn manifests_are_what_their_digest_says_however_they_are_encoded() {
    for really in [false, true] {
        let registry = FaultRegistry::start().await;
        let manifest = add_image(&registry, b"layer");
        let source = source(&config(), &registry.host());
        let index = registry
            .manifest(registry.tagged(crate::REPOSITORY, "1").unwrap())
            .unwrap();
        for document in [index, registry.manifest(manifest).unwrap()] {
            let fault = match really {
                true => Fault::Odd(encoding("gzip", gzip(&document))),
                false => Fault::Encoding("gzip"),
            };
            registry.fail(On::Manifest, 1, fault);
        }
        let image = image::resolve(&*source, "1").await.unwrap();
        assert_eq!(image.manifest_digest, manifest);
        assert_eq!(registry.seen(On::Manifest).len(), 2);
    }
}

#[tokio::test]
async fn a_login_page_is_no_manifest_and_no_blob() {
    let f = Fixture::new().await;
    let page = Bytes::from_static(b"<!DOCTYPE html><title>Please log in</title>");
    let page = || {
        Odd::full(OddBody::Bytes(page.clone()))
            .with("content-type", "text/html")
            .always()
    };
    f.registry
        .add_manifest("application/vnd.oci.image.manifest.v1+json", "{}");
    add_image(&f.registry, b"layer");
    f.registry.fail(On::Manifest, ALWAYS, Fault::Odd(page()));
    let error = f.source.manifest("1").await.unwrap_err().to_string();
    assert!(error.contains("HTML") && error.contains(&f.registry.host()), "{error}");
    f.registry.fail(On::Blob, 2, Fault::Odd(page()));
    f.good(0, 300_000).await;
    f.registry.fail(On::Blob, 2, Fault::Odd(page()));
    f.good(10, 20).await;
    // The type alone says nothing.
    let odd = Odd::full(OddBody::Whole).with("content-type", "text/html").always();
    f.registry.fail(On::Blob, 1, Fault::Odd(odd));
    f.good(0, 300_000).await;
}

/// A manifest that does not end is given up where it is longer than any.
#[tokio::test]
async fn a_manifest_that_does_not_end_is_given_up() {
    let registry = FaultRegistry::start().await;
    let digest = registry.add_manifest("application/vnd.oci.image.manifest.v1+json", &b"{}"[..]);
    registry.tag(REPOSITORY, "1", digest);
    registry.fail(On::Manifest, 9, Fault::Long(64 << 20));
    let source = source(&config(), &registry.host());
    for reference in ["1".to_owned(), digest.to_string()] {
        let error = source.manifest(&reference).await.unwrap_err().to_string();
        assert!(error.contains("more than 8388608 bytes"), "{error}");
    }
    let seen = registry.seen(On::Manifest).len();
    assert_eq!(seen, 2, "what is too long is not asked for again");
}
