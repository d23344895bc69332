//! TLS as people have it: certificates made by the `openssl` command, shown by its server.

use std::path::Path;

use lazuli::config::RegistryConfig;

use crate::support::openssl::{Pki, Server, write_hosts};
use crate::{config, source};

/// The names of a server on this machine.
const NAMES: &str = "subjectAltName=IP:127.0.0.1,DNS:localhost";
const LEAF: &str = "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n";

/// Asks for the manifest with the files below `root`.
async fn ask(root: &Path, host: &str) -> Result<(), String> {
    let config = RegistryConfig {
        config_path: vec![root.to_owned()],
        attempts: 1,
        ..config()
    };
    let manifest = source(&config, host).manifest("1").await;
    manifest.map(drop).map_err(|error| error.to_string())
}

/// Asks a server that shows `name`, with `ca` in hosts.toml.
async fn ask_with(pki: &Pki, name: &str, ca: &str, more: &[&str]) -> Result<(), String> {
    let server = Server::start(pki, name, more);
    let root = tempfile::tempdir().unwrap();
    let ca = pki.path(ca).display().to_string();
    write_hosts(root.path(), server.host(), &format!("ca = {ca:?}"));
    ask(root.path(), server.host()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_self_signed_certificate_given_as_ca_works_with_every_key() {
    let pki = Pki::default();
    for kind in ["rsa", "P-256", "P-384", "P-521", "ed25519"] {
        // What `openssl req -x509` makes is an authority (CA:TRUE).
        pki.self_signed(kind, kind, &["-addext", NAMES]);
        for version in ["-tls1_2", "-tls1_3"] {
            let result = ask_with(&pki, kind, &format!("{kind}.crt"), &[version]).await;
            assert_eq!(result, Ok(()), "{kind} {version}");
        }
    }
    // It is trusted because it is given, not because it is there.
    let error = ask_with(&pki, "rsa", "P-256.crt", &[]).await.unwrap_err();
    assert!(error.contains("127.0.0.1") && error.contains("hosts.toml"), "{error}");
    // Nothing but P-521 for the key exchange.
    assert_eq!(
        ask_with(&pki, "P-521", "P-521.crt", &["-groups", "P-521"]).await,
        Ok(())
    );
    assert_eq!(
        ask_with(&pki, "P-521", "P-521.crt", &["-groups", "P-521", "-tls1_2"]).await,
        Ok(())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_in_certs_d_works() {
    let pki = Pki::default();
    pki.self_signed("own", "rsa", &["-addext", NAMES]);
    let server = Server::start(&pki, "own", &[]);
    let root = tempfile::tempdir().unwrap();
    for name in [
        server.host().to_owned(),
        format!("{}_", server.host().replace(':', "_")),
    ] {
        let dir = root.path().join(&name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(pki.path("own.crt"), dir.join("ca.crt")).unwrap();
        assert_eq!(ask(root.path(), server.host()).await, Ok(()), "{name}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn authorities_of_every_kind_are_followed() {
    let pki = Pki::default();
    pki.self_signed("ca", "rsa", &["-addext", "basicConstraints=critical,CA:TRUE"]);
    pki.self_signed("ca-p521", "P-521", &[]);
    pki.self_signed("ca-p256", "P-256", &["-sha512"]);
    pki.self_signed("ca-p384", "P-384", &["-sha512"]);
    for (ca, hash) in [
        ("ca", "-sha256"),
        ("ca", "-sha512"),
        ("ca-p521", "-sha256"),
        ("ca-p521", "-sha384"),
        ("ca-p521", "-sha512"),
        ("ca-p256", "-sha512"),
        ("ca-p384", "-sha512"),
    ] {
        pki.signed("leaf", "rsa", ca, LEAF, &[hash]);
        assert_eq!(
            ask_with(&pki, "leaf", &format!("{ca}.crt"), &[]).await,
            Ok(()),
            "{ca} {hash}"
        );
    }
    // Signed with the extensions of an authority, as happens with the default section of openssl.cnf.
    pki.signed(
        "both",
        "P-256",
        "ca",
        "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:TRUE\nkeyUsage=keyCertSign\n",
        &[],
    );
    assert_eq!(ask_with(&pki, "both", "ca.crt", &[]).await, Ok(()));
    // The end certificate in the place of its authority.
    pki.signed("leaf", "P-256", "ca", LEAF, &[]);
    assert_eq!(ask_with(&pki, "leaf", "leaf.crt", &[]).await, Ok(()));
    // An intermediate one that the server does not send, alone and with its authority.
    pki.signed("middle", "rsa", "ca", "basicConstraints=CA:TRUE\n", &[]);
    pki.signed("below", "rsa", "middle", LEAF, &[]);
    assert_eq!(ask_with(&pki, "below", "middle.crt", &[]).await, Ok(()));
    pki.write("both.pem", pki.read("ca.crt") + &pki.read("middle.crt"));
    assert_eq!(ask_with(&pki, "below", "both.pem", &[]).await, Ok(()));
    let chain = pki.path("middle.crt").display().to_string();
    assert_eq!(
        ask_with(&pki, "below", "ca.crt", &["-cert_chain", &chain]).await,
        Ok(())
    );
    assert!(
        ask_with(&pki, "below", "ca.crt", &[])
            .await
            .unwrap_err()
            .contains("authorities")
    );
    // Version 1, which has no extensions.
    pki.words("req -new -nodes -newkey rsa:2048 -keyout v1.key -out v1.csr -subj /CN=old");
    pki.words("x509 -req -in v1.csr -signkey v1.key -out v1.crt -days 30");
    pki.signed("leaf", "rsa", "v1", LEAF, &[]);
    assert_eq!(ask_with(&pki, "leaf", "v1.crt", &[]).await, Ok(()));
    // For any purpose.
    pki.signed(
        "any",
        "rsa",
        "ca",
        &format!("{LEAF}extendedKeyUsage=anyExtendedKeyUsage\n"),
        &[],
    );
    assert_eq!(ask_with(&pki, "any", "ca.crt", &[]).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_read_as_people_write_them() {
    let pki = Pki::default();
    pki.self_signed("own", "P-256", &["-addext", NAMES]);
    pki.self_signed("other", "rsa", &[]);
    let (own, other) = (pki.read("own.crt"), pki.read("other.crt"));
    pki.words("x509 -in own.crt -outform DER -out own.der");
    pki.words("x509 -in own.crt -text -out text.crt");
    pki.words("x509 -in own.crt -trustout -out trusted.crt");
    pki.write("crlf.crt", own.replace('\n', "\r\n"));
    pki.write("bom.crt", format!("\u{feff}{own}"));
    pki.write(
        "trailing.crt",
        format!("{own}\n\n# the end\n-----BEGIN CERTIFICATE-----\ncut off"),
    );
    pki.write(
        "several.crt",
        format!("{other}nonsense\n-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n{own}"),
    );
    pki.write("key.pem", pki.read("own.key") + &own);
    for ca in [
        "own.der",
        "text.crt",
        "crlf.crt",
        "bom.crt",
        "trailing.crt",
        "several.crt",
        "key.pem",
    ] {
        assert_eq!(ask_with(&pki, "own", ca, &[]).await, Ok(()), "{ca}");
    }
    for (ca, content) in [
        ("empty.crt", ""),
        ("none.crt", "no certificate"),
        ("key.crt", &pki.read("own.key")),
    ] {
        pki.write(ca, content);
        let error = ask_with(&pki, "own", ca, &[]).await.unwrap_err();
        assert!(error.contains(ca) && error.contains("no certificate"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_containerd_refuses_is_refused_in_words() {
    let pki = Pki::default();
    let ca = ["-addext", "basicConstraints=critical,CA:TRUE"];
    pki.self_signed("ca", "rsa", &ca);
    pki.self_signed("bare", "rsa", &[]);
    pki.self_signed(
        "elsewhere",
        "rsa",
        &["-addext", "subjectAltName=DNS:registry.corp.test,IP:10.0.0.1"],
    );
    pki.signed("leaf-bare", "rsa", "ca", "basicConstraints=CA:FALSE\n", &[]);
    pki.signed("expired", "rsa", "ca", LEAF, &[]);
    pki.date("expired", "ca", "20200101000000Z", "20210101000000Z");
    pki.signed("early", "rsa", "ca", LEAF, &[]);
    pki.date("early", "ca", "20480101000000Z", "20520101000000Z");
    pki.signed(
        "client",
        "rsa",
        "ca",
        &format!("{LEAF}extendedKeyUsage=clientAuth\n"),
        &[],
    );
    pki.signed(
        "strange",
        "rsa",
        "ca",
        &format!("{LEAF}1.2.3.4=critical,DER:0500\n"),
        &[],
    );
    for (name, ca, word) in [
        ("bare", "bare.crt", "subjectAltName"),
        ("leaf-bare", "ca.crt", "subjectAltName"),
        ("elsewhere", "elsewhere.crt", "registry.corp.test"),
        ("expired", "ca.crt", "expired"),
        // Also if it is trusted itself.
        ("expired", "expired.crt", "expired"),
        ("early", "ca.crt", "not valid before"),
        ("early", "early.crt", "not valid before"),
        ("client", "ca.crt", "not meant for servers"),
        ("client", "client.crt", "not meant for servers"),
        ("strange", "ca.crt", "UnsupportedCriticalExtension"),
    ] {
        let error = ask_with(&pki, name, ca, &[]).await.unwrap_err();
        assert!(
            error.contains(word) && error.contains("127.0.0.1"),
            "{name} with {ca}: {error}"
        );
    }
    // Who says so takes all of that.
    let server = Server::start(&pki, "expired", &[]);
    let root = tempfile::tempdir().unwrap();
    write_hosts(root.path(), server.host(), "skip_verify = true");
    assert_eq!(ask(root.path(), server.host()).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_only_looks_like_the_trusted_one_is_refused() {
    let pki = Pki::default();
    pki.self_signed("own", "P-256", &["-addext", NAMES]);
    pki.self_signed("false", "P-256", &["-addext", NAMES]);
    // The same names, the same extensions, another key.
    let error = ask_with(&pki, "false", "own.crt", &[]).await.unwrap_err();
    assert!(error.contains("cannot be trusted"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_wants_a_certificate_gets_it() {
    let pki = Pki::default();
    pki.self_signed("own", "P-256", &["-addext", NAMES]);
    pki.self_signed("ca", "rsa", &["-addext", "basicConstraints=critical,CA:TRUE"]);
    for kind in ["rsa", "P-256", "P-384", "P-521", "ed25519"] {
        pki.signed(kind, kind, "ca", "basicConstraints=CA:FALSE\n", &[]);
    }
    pki.self_signed("stranger", "rsa", &[]);
    pki.words("rsa -in rsa.key -traditional -out pkcs1.key");
    pki.words("ec -in P-256.key -out sec1.key");
    pki.words("ec -in P-521.key -out sec1-p521.key");
    pki.words("pkey -in P-256.key -aes128 -passout pass:word -out encrypted.key");
    pki.words("rsa -in rsa.key -traditional -aes128 -passout pass:word -out encrypted-old.key");
    pki.write("both.pem", pki.read("P-256.key") + &pki.read("P-256.crt"));
    pki.write("both-reversed.pem", pki.read("rsa.crt") + &pki.read("rsa.key"));
    let authority = pki.path("ca.crt").display().to_string();
    for version in ["-tls1_2", "-tls1_3"] {
        let server = Server::start(
            &pki,
            "own",
            &["-Verify", "2", "-verify_return_error", "-CAfile", &authority, version],
        );
        let root = tempfile::tempdir().unwrap();
        let ask = async |client: &str| {
            let path = |name: &str| pki.path(name).display().to_string();
            let client = client.replace("DIR", &path("")).replace("//", "/");
            let ca = path("own.crt");
            write_hosts(root.path(), server.host(), &format!("ca = {ca:?}\n{client}"));
            ask(root.path(), server.host()).await
        };
        for client in [
            "client = [[\"DIR/rsa.crt\", \"DIR/rsa.key\"]]",
            "client = [[\"DIR/rsa.crt\", \"DIR/pkcs1.key\"]]",
            "client = [[\"DIR/P-256.crt\", \"DIR/P-256.key\"]]",
            "client = [[\"DIR/P-256.crt\", \"DIR/sec1.key\"]]",
            "client = [[\"DIR/P-384.crt\", \"DIR/P-384.key\"]]",
            "client = [[\"DIR/P-521.crt\", \"DIR/P-521.key\"]]",
            "client = [[\"DIR/P-521.crt\", \"DIR/sec1-p521.key\"]]",
            "client = [[\"DIR/ed25519.crt\", \"DIR/ed25519.key\"]]",
            "client = \"DIR/both.pem\"",
            "client = [\"DIR/both-reversed.pem\"]",
            // Of several the one that the server says it takes.
            "client = [[\"DIR/stranger.crt\", \"DIR/stranger.key\"], [\"DIR/rsa.crt\", \"DIR/rsa.key\"]]",
        ] {
            assert_eq!(ask(client).await, Ok(()), "{client} {version}");
        }
        ask("").await.unwrap_err();
        ask("client = [[\"DIR/stranger.crt\", \"DIR/stranger.key\"]]")
            .await
            .unwrap_err();
        for (client, word) in [
            ("client = [[\"DIR/P-256.crt\", \"DIR/encrypted.key\"]]", "encrypted"),
            ("client = [[\"DIR/rsa.crt\", \"DIR/encrypted-old.key\"]]", "encrypted"),
            ("client = [[\"DIR/rsa.crt\", \"DIR/P-256.key\"]]", "another certificate"),
            ("client = [[\"DIR/rsa.crt\", \"DIR/P-521.key\"]]", "another certificate"),
            ("client = \"DIR/rsa.crt\"", "no key"),
            ("client = [[\"DIR/rsa.crt\", \"DIR/missing.key\"]]", "missing.key"),
        ] {
            let error = ask(client).await.unwrap_err();
            assert!(error.contains(word), "{client}: {error}");
        }
    }
}
