//! TLS as registries have it: whatever curl and containerd accept with the same files.
//!
//! rustls on *ring* does the protocol, as a build needs nothing but a C compiler for that. Two things it lacks, and they are added here instead
//! of another provider (aws-lc-rs has the first of them; it would add a C library of half a million lines to every build):
//! - P-521, and ECDSA with SHA-512 on the smaller curves: `nist` adds them from the RustCrypto crates, for signatures of certificates and
//!   handshakes, for keys of clients, and for the key exchange that servers of TLS 1.2 need to show a P-521 certificate at all. No
//!   connection that does without uses any of it.
//! - Certificates as `openssl req -x509` makes them: an end certificate that is an authority as well. `verifier` takes them.
//!
//! `files` reads what people write into such files. No certificate is taken whose name or dates do not fit; why is said in words.

use std::fmt;
use std::sync::{Arc, OnceLock};

use rustls::client::ResolvesClientCert;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, SignatureScheme};

mod der;
pub(super) mod files;
mod nist;
mod verifier;

use verifier::Verifier;

/// Application protocols, the best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// What does the cryptography.
pub(super) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| {
        let provider = nist::extend(rustls::crypto::ring::default_provider());
        // For whoever else makes a connection in this process; an error means that one has been chosen already.
        drop(provider.clone().install_default());
        Arc::new(provider)
    }))
}

/// How connections are made: `authorities` are trusted beside the system's, and `identities` are shown to servers that ask for one.
///
/// # Errors
/// What the TLS library cannot do.
pub(super) fn client_config(
    authorities: Vec<CertificateDer<'static>>,
    identities: Vec<Arc<CertifiedKey>>,
    skip_verify: bool,
) -> Result<ClientConfig, rustls::Error> {
    let provider = provider();
    let verifier = match skip_verify {
        true => Verifier::of_nobody(&provider),
        false => {
            let system = rustls_native_certs::load_native_certs();
            if system.certs.is_empty() {
                tracing::warn!(errors = ?system.errors, "there are no CA certificates of the system (install ca-certificates)");
            }
            Verifier::new(&provider, authorities.into_iter().chain(system.certs))
        }
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(Identities(identities)));
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).into();
    Ok(config)
}

/// The same for connections over which one request goes at a time.
pub(super) fn without_http2(config: &ClientConfig) -> ClientConfig {
    let mut config = config.clone();
    config.alpn_protocols.retain(|protocol| protocol != PROTOCOLS[0]);
    config
}

/// The certificates of a client.
struct Identities(Vec<Arc<CertifiedKey>>);

impl fmt::Debug for Identities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} identities", self.0.len())
    }
}

impl ResolvesClientCert for Identities {
    /// The first that the server says it would take; or the first at all, as some servers say less than they take.
    fn resolve(&self, issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let usable = || {
            self.0
                .iter()
                .filter(|identity| identity.key.choose_scheme(schemes).is_some())
        };
        let is_wanted = |identity: &&Arc<CertifiedKey>| {
            let issuer =
                |certificate: &CertificateDer<'_>| der::EndCertificate::parse(certificate).map(|c| c.issuer.to_vec());
            let known = identity.cert.iter().filter_map(issuer);
            known.into_iter().any(|issuer| issuers.contains(&issuer.as_slice()))
        };
        usable().find(is_wanted).or_else(|| usable().next()).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}
