//! What *ring* lacks of the curves of NIST: P-521, and SHA-512 with the smaller ones.
//!
//! A server of TLS 1.2 shows a certificate with a P-521 key only to a client that has the curve for the key exchange, so there is that too;
//! it comes last of all, and is used with nobody who can do another.

use std::sync::Arc;

use p521::ecdsa::signature::Signer as _;
use p521::elliptic_curve::Generate as _;
use p521::elliptic_curve::sec1::ToSec1Point as _;
use p521::pkcs8::DecodePrivateKey as _;
use rustls::crypto::{
    ActiveKeyExchange, CryptoProvider, KeyProvider, SharedSecret, SupportedKxGroup, WebPkiSupportedAlgorithms,
};
use rustls::pki_types::{
    AlgorithmIdentifier, InvalidSignature, PrivateKeyDer, SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer,
    alg_id,
};
use rustls::sign::{Signer, SigningKey, public_key_to_spki};
use rustls::{Error, NamedGroup, SignatureAlgorithm, SignatureScheme};

/// The provider with what it lacks.
pub(super) fn extend(mut provider: CryptoProvider) -> CryptoProvider {
    let known = provider.signature_verification_algorithms;
    // Once in the life of the process.
    let all: Vec<_> = known.all.iter().copied().chain(ALGORITHMS).collect();
    let mut mapping = known.mapping.to_vec();
    // Before TLS 1.3, a scheme stands for its hash, with any curve.
    for (scheme, more) in HANDSHAKES {
        match mapping.iter_mut().find(|(known, _)| *known == scheme) {
            Some((_, algorithms)) => *algorithms = [*algorithms, more].concat().leak(),
            None => mapping.push((scheme, more)),
        }
    }
    provider.signature_verification_algorithms = WebPkiSupportedAlgorithms {
        all: all.leak(),
        mapping: mapping.leak(),
    };
    provider.kx_groups.push(&Secp521r1);
    provider.key_provider = &Keys;
    provider
}

/// Verifies signatures of a curve over a hash.
#[derive(Debug)]
struct Ecdsa {
    key: AlgorithmIdentifier,
    signature: AlgorithmIdentifier,
    hash: Hash,
    verify: fn(&[u8], &[u8], &[u8]) -> bool,
}

#[derive(Debug, Clone, Copy)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    fn of(self, message: &[u8]) -> Vec<u8> {
        let algorithm = match self {
            Hash::Sha256 => &ring::digest::SHA256,
            Hash::Sha384 => &ring::digest::SHA384,
            Hash::Sha512 => &ring::digest::SHA512,
        };
        ring::digest::digest(algorithm, message).as_ref().to_vec()
    }
}

static P521_SHA256: Ecdsa = Ecdsa {
    key: alg_id::ECDSA_P521,
    signature: alg_id::ECDSA_SHA256,
    hash: Hash::Sha256,
    verify: p521,
};
static P521_SHA384: Ecdsa = Ecdsa {
    key: alg_id::ECDSA_P521,
    signature: alg_id::ECDSA_SHA384,
    hash: Hash::Sha384,
    verify: p521,
};
static P521_SHA512: Ecdsa = Ecdsa {
    key: alg_id::ECDSA_P521,
    signature: alg_id::ECDSA_SHA512,
    hash: Hash::Sha512,
    verify: p521,
};
static P384_SHA512: Ecdsa = Ecdsa {
    key: alg_id::ECDSA_P384,
    signature: alg_id::ECDSA_SHA512,
    hash: Hash::Sha512,
    verify: p384,
};
static P256_SHA512: Ecdsa = Ecdsa {
    key: alg_id::ECDSA_P256,
    signature: alg_id::ECDSA_SHA512,
    hash: Hash::Sha512,
    verify: p256,
};

static ALGORITHMS: [&dyn SignatureVerificationAlgorithm; 5] =
    [&P521_SHA512, &P521_SHA384, &P521_SHA256, &P384_SHA512, &P256_SHA512];

/// Schemes of handshakes, with what is added to them. The first of a scheme counts in TLS 1.3.
static HANDSHAKES: [(SignatureScheme, &[&dyn SignatureVerificationAlgorithm]); 3] = [
    (
        SignatureScheme::ECDSA_NISTP521_SHA512,
        &[&P521_SHA512, &P384_SHA512, &P256_SHA512],
    ),
    (SignatureScheme::ECDSA_NISTP384_SHA384, &[&P521_SHA384]),
    (SignatureScheme::ECDSA_NISTP256_SHA256, &[&P521_SHA256]),
];

impl SignatureVerificationAlgorithm for Ecdsa {
    fn verify_signature(&self, public_key: &[u8], message: &[u8], signature: &[u8]) -> Result<(), InvalidSignature> {
        match (self.verify)(public_key, &self.hash.of(message), signature) {
            true => Ok(()),
            false => Err(InvalidSignature),
        }
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        self.key
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        self.signature
    }
}

/// Whether `signature`, in DER, is one over `hash`. A hash that is shorter than the numbers of the curve is a number with zeros before it; the
/// crates refuse those that are shorter than half.
macro_rules! verifies {
    ($curve:ident, $len:expr) => {
        fn $curve(key: &[u8], hash: &[u8], signature: &[u8]) -> bool {
            use ::$curve::ecdsa::signature::hazmat::PrehashVerifier as _;
            let mut number = vec![0; ($len as usize).saturating_sub(hash.len())];
            number.extend_from_slice(hash);
            let key = ::$curve::ecdsa::VerifyingKey::from_sec1_bytes(key);
            let signature = ::$curve::ecdsa::Signature::from_der(signature);
            match (key, signature) {
                (Ok(key), Ok(signature)) => key.verify_prehash(&number, &signature).is_ok(),
                _ => false,
            }
        }
    };
}

verifies!(p256, 32);
verifies!(p384, 48);
verifies!(p521, 66);

/// The key exchange.
#[derive(Debug)]
struct Secp521r1;

struct Exchange {
    secret: p521::ecdh::EphemeralSecret,
    public: Vec<u8>,
}

impl SupportedKxGroup for Secp521r1 {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        let secret = p521::ecdh::EphemeralSecret::try_generate().map_err(|_| Error::FailedToGetRandomBytes)?;
        let public = secret.public_key().to_sec1_point(false).as_bytes().to_vec();
        Ok(Box::new(Exchange { secret, public }))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

impl ActiveKeyExchange for Exchange {
    fn complete(self: Box<Self>, peer: &[u8]) -> Result<SharedSecret, Error> {
        let invalid = rustls::PeerMisbehaved::InvalidKeyShare;
        let peer = p521::PublicKey::from_sec1_bytes(peer).map_err(|_| invalid)?;
        let shared = self.secret.diffie_hellman(&peer);
        Ok(SharedSecret::from(&shared.raw_secret_bytes()[..]))
    }

    fn pub_key(&self) -> &[u8] {
        &self.public
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

/// Loads keys of clients: those that *ring* knows, and those of P-521.
#[derive(Debug)]
struct Keys;

impl KeyProvider for Keys {
    fn load_private_key(&self, der: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, Error> {
        let secret = match &der {
            PrivateKeyDer::Pkcs8(pkcs8) => p521::SecretKey::from_pkcs8_der(pkcs8.secret_pkcs8_der()).ok(),
            PrivateKeyDer::Sec1(sec1) => p521::SecretKey::from_sec1_der(sec1.secret_sec1_der()).ok(),
            _ => None,
        };
        match secret {
            Some(secret) => Ok(Arc::new(P521Key(secret.into()))),
            None => rustls::crypto::ring::sign::any_supported_type(&der),
        }
    }
}

/// A P-521 key.
#[derive(Debug, Clone)]
struct P521Key(p521::ecdsa::SigningKey);

impl SigningKey for P521Key {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let is_offered = offered.contains(&SignatureScheme::ECDSA_NISTP521_SHA512);
        is_offered.then(|| Box::new(self.clone()) as Box<dyn Signer>)
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        let point = self.0.verifying_key().to_sec1_point(false);
        Some(public_key_to_spki(&alg_id::ECDSA_P521, point.as_bytes()))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl Signer for P521Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let signature: p521::ecdsa::Signature = self
            .0
            .try_sign(message)
            .map_err(|_| Error::General("signing failed".into()))?;
        Ok(signature.to_der().as_bytes().to_vec())
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ECDSA_NISTP521_SHA512
    }
}
