//! Whether a server is who it should be, as Go judges it.
//!
//! An end certificate that is itself among those trusted is taken if its name, its dates and its purpose fit: an operator has said that it is
//! this one. Any other is judged by webpki, with two differences. It may say that it is an authority as well, as certificates made with
//! `openssl req -x509` or signed with its default extensions do; webpki refuses these, Go and OpenSSL do not. And a certificate that is for
//! any purpose is also for servers.
//!
//! How webpki is made to overlook that an end certificate is an authority: it is shown one that says it is none, of which nothing else
//! differs, and wherever it verifies the signature over that one, the signature over the real one is verified.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{
    AlgorithmIdentifier, CertificateDer, InvalidSignature, ServerName, SignatureVerificationAlgorithm, TrustAnchor,
    UnixTime,
};
use rustls::{DigitallySignedStruct, OtherError, SignatureScheme};
use webpki::{EndEntityCert, Error, ExtendedKeyUsageValidator, KeyPurposeIdIter, KeyUsage, RequiredEkuNotFoundContext};

use super::der::EndCertificate;

/// Purposes of certificates, as numbers: to be a server, and any.
const SERVER_AUTH: [usize; 9] = [1, 3, 6, 1, 5, 5, 7, 3, 1];
const ANY_USAGE: [usize; 5] = [2, 5, 29, 37, 0];

/// Judges the certificates of servers.
pub(super) struct Verifier {
    /// Certificates that are trusted, each by itself.
    trusted: Vec<CertificateDer<'static>>,
    /// The same as authorities for others.
    anchors: Vec<TrustAnchor<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
    /// Whether anything is judged at all.
    verifies: bool,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a verifier with {} authorities", self.anchors.len())
    }
}

impl Verifier {
    pub(super) fn new(provider: &CryptoProvider, trusted: impl Iterator<Item = CertificateDer<'static>>) -> Self {
        let trusted: Vec<_> = trusted.collect();
        // What is no authority is passed over, as Go and OpenSSL do.
        let anchors = trusted
            .iter()
            .filter_map(|der| Some(webpki::anchor_from_trusted_cert(der).ok()?.to_owned()));
        Verifier {
            anchors: anchors.collect(),
            trusted,
            algorithms: provider.signature_verification_algorithms,
            verifies: true,
        }
    }

    /// One that takes any certificate.
    pub(super) fn of_nobody(provider: &CryptoProvider) -> Self {
        Verifier {
            verifies: false,
            ..Verifier::new(provider, std::iter::empty())
        }
    }

    fn judge(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Refusal> {
        let found = EndCertificate::parse(certificate).ok_or(Refusal::Other(Error::BadDer))?;
        match self.trusted.iter().any(|trusted| trusted == certificate) {
            true => itself(&found, now)?,
            false => self.chain(certificate, &found, others, now)?,
        }
        if !found.has_names {
            return Err(Refusal::NoNames);
        }
        let end = EndEntityCert::try_from(certificate).map_err(Refusal::Other)?;
        end.verify_is_valid_for_subject_name(name).map_err(|error| match error {
            Error::CertNotValidForName(context) => Refusal::Name(context.presented.join(", ")),
            other => Refusal::Other(other),
        })
    }

    /// Judges a certificate by those who have signed it.
    fn chain(
        &self,
        certificate: &CertificateDer<'_>,
        found: &EndCertificate<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Refusal> {
        let mut shown = certificate.to_vec();
        if let Some(flag) = found.authority.and_then(|at| shown.get_mut(at)) {
            *flag = 0;
        }
        let shown = CertificateDer::from(shown);
        let part = |bytes: &[u8]| bytes.get(found.signed.clone()).unwrap_or_default().to_vec();
        let (seen, signed) = (part(&shown), part(certificate));
        let algorithms: Vec<Overlooking<'_>> = self
            .algorithms
            .all
            .iter()
            .map(|inner| Overlooking {
                inner: *inner,
                seen: &seen,
                signed: &signed,
            })
            .collect();
        let algorithms: Vec<&dyn SignatureVerificationAlgorithm> = algorithms.iter().map(|a| a as _).collect();
        let end = EndEntityCert::try_from(&shown).map_err(Refusal::Other)?;
        let path = end.verify_for_usage(&algorithms, &self.anchors, others, now, ForServers, None, None);
        path.map(drop).map_err(|error| match error {
            Error::CertExpired { not_after, .. } => Refusal::Expired(not_after),
            Error::CertNotValidYet { not_before, .. } => Refusal::Early(not_before),
            Error::UnknownIssuer => Refusal::Unknown,
            Error::RequiredEkuNotFoundContext(_) => Refusal::Purpose,
            other => Refusal::Other(other),
        })
    }
}

/// Judges a certificate that is trusted itself.
fn itself(found: &EndCertificate<'_>, now: UnixTime) -> Result<(), Refusal> {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
    let unix =
        |time: SystemTime| UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    if now < found.valid.0 {
        return Err(Refusal::Early(unix(found.valid.0)));
    }
    if now > found.valid.1 {
        return Err(Refusal::Expired(unix(found.valid.1)));
    }
    match found.for_servers {
        Some(false) => Err(Refusal::Purpose),
        _ => Ok(()),
    }
}

/// Why a server's certificate is not taken.
#[derive(Debug)]
enum Refusal {
    Expired(UnixTime),
    Early(UnixTime),
    Unknown,
    Purpose,
    NoNames,
    /// It has these.
    Name(String),
    Other(Error),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let date =
            |time: &UnixTime| httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs()));
        match self {
            Refusal::Expired(end) => write!(f, "it, or one that has signed it, has expired on {}", date(end)),
            Refusal::Early(begin) => write!(
                f,
                "it is not valid before {}; is this machine's clock right?",
                date(begin)
            ),
            Refusal::Unknown => write!(
                f,
                "none of the authorities that are trusted has signed it; give the one that has, or the certificate itself, as \"ca\" in hosts.toml"
            ),
            Refusal::Purpose => write!(f, "it is not meant for servers (extendedKeyUsage)"),
            Refusal::NoNames => write!(
                f,
                "it has no subjectAltName; a common name alone is not looked at by containerd either: make one with -addext subjectAltName=..."
            ),
            Refusal::Name(presented) => write!(f, "it is for other names: {presented}"),
            Refusal::Other(error) => write!(f, "{error:?}"),
        }
    }
}

impl std::error::Error for Refusal {}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.verifies {
            self.judge(end_entity, intermediates, server_name, now)
                .map_err(|refusal| {
                    let text = format!(
                        "the certificate of {} cannot be trusted: {refusal}",
                        server_name.to_str()
                    );
                    rustls::Error::Other(OtherError(Arc::from(Box::<dyn std::error::Error + Send + Sync>::from(
                        text,
                    ))))
                })?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Verifies the signature over the real certificate where that over the one shown is asked for.
#[derive(Debug)]
struct Overlooking<'a> {
    inner: &'static dyn SignatureVerificationAlgorithm,
    seen: &'a [u8],
    signed: &'a [u8],
}

impl SignatureVerificationAlgorithm for Overlooking<'_> {
    fn verify_signature(&self, public_key: &[u8], message: &[u8], signature: &[u8]) -> Result<(), InvalidSignature> {
        let message = if message == self.seen { self.signed } else { message };
        self.inner.verify_signature(public_key, message, signature)
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        self.inner.public_key_alg_id()
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        self.inner.signature_alg_id()
    }
}

/// Takes certificates for servers, for any purpose, and without a purpose.
struct ForServers;

impl ExtendedKeyUsageValidator for ForServers {
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), Error> {
        let mut present = Vec::new();
        for purpose in purposes {
            let purpose: Vec<usize> = purpose?.to_decoded_oid();
            if purpose == SERVER_AUTH || purpose == ANY_USAGE {
                return Ok(());
            }
            present.push(purpose);
        }
        match present.is_empty() {
            true => Ok(()),
            false => Err(Error::RequiredEkuNotFoundContext(RequiredEkuNotFoundContext {
                required: KeyUsage::server_auth(),
                present,
            })),
        }
    }
}
