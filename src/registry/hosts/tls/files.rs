//! Certificates and keys as they stand in files: PEM with anything between the blocks, with either kind of line ends, several blocks of
//! several kinds in one file, or a single certificate in DER.

use std::sync::Arc;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use super::der::EndCertificate;
use super::provider;

/// Takes base64 with and without its padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// A block of PEM.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    /// What stands behind BEGIN.
    label: String,
    /// Whether its bytes can only be had with a passphrase.
    encrypted: bool,
    bytes: Vec<u8>,
}

/// The blocks of a file. What is no block is passed over, and so is a block that does not end, or is no base64.
fn blocks(file: &[u8]) -> Vec<Block> {
    let text = String::from_utf8_lossy(file);
    let mut blocks = Vec::new();
    let mut open: Option<(String, bool, String)> = None;
    for line in text.lines() {
        let line = line.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}' || c == '\0');
        let label = |word: &str| line.strip_prefix("-----")?.strip_prefix(word)?.strip_suffix("-----");
        if let Some(label) = label("BEGIN ") {
            open = Some((label.to_owned(), label.contains("ENCRYPTED"), String::new()));
        } else if label("END ").is_some() {
            if let Some((label, encrypted, text)) = open.take()
                && let Ok(bytes) = BASE64.decode(text)
            {
                blocks.push(Block {
                    label,
                    encrypted,
                    bytes,
                });
            }
        } else if let Some((_, encrypted, text)) = &mut open {
            // Old keys have headers before their base64.
            match line.contains(':') {
                true => *encrypted |= line.contains("ENCRYPTED"),
                false => text.extend(line.chars().filter(|c| !c.is_whitespace())),
            }
        }
    }
    blocks
}

/// The certificates of a file.
///
/// # Errors
/// What is wrong with it.
pub(in crate::registry::hosts) fn certificates(file: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let is_certificate = |der: &[u8]| EndCertificate::parse(der).is_some();
    // A single certificate in DER.
    if file.first() == Some(&0x30) && is_certificate(file) {
        return Ok(vec![CertificateDer::from(file.to_vec())]);
    }
    let blocks = blocks(file);
    let labelled = blocks.iter().filter(|block| block.label.ends_with("CERTIFICATE"));
    // What openssl calls a trusted certificate has more behind the certificate.
    let found: Vec<_> = labelled
        .filter(|block| is_certificate(&block.bytes))
        .map(|block| CertificateDer::from(block.bytes.clone()))
        .collect();
    match found.is_empty() {
        true => Err("it holds no certificate, neither in PEM (-----BEGIN CERTIFICATE-----) nor in DER".to_owned()),
        false => Ok(found),
    }
}

/// The certificate of a client with those of its authorities, and its key, which may be in the same file.
///
/// # Errors
/// What is wrong with them.
pub(in crate::registry::hosts) fn identity(
    certificate: &[u8],
    key: Option<&[u8]>,
) -> Result<Arc<CertifiedKey>, String> {
    let chain = certificates(certificate)?;
    let keys = blocks(key.unwrap_or(certificate));
    let mut keys = keys.into_iter().filter(|block| block.label.ends_with("PRIVATE KEY"));
    let Some(block) = keys.next() else {
        return Err("there is no key to it (-----BEGIN PRIVATE KEY-----, or EC or RSA PRIVATE KEY)".to_owned());
    };
    if block.encrypted {
        return Err("its key is encrypted, and there is nobody to ask for the passphrase; decrypt it with: openssl pkey -in KEY -out KEY".to_owned());
    }
    let key = match block.label.as_str() {
        "RSA PRIVATE KEY" => PrivateKeyDer::Pkcs1(block.bytes.into()),
        "EC PRIVATE KEY" => PrivateKeyDer::Sec1(block.bytes.into()),
        _ => PrivateKeyDer::Pkcs8(block.bytes.into()),
    };
    let key = provider().key_provider.load_private_key(key).map_err(|error| {
        format!("its key is none that can be used (RSA from 2048 bits, P-256, P-384, P-521 or Ed25519): {error}")
    })?;
    let identity = CertifiedKey::new(chain, key);
    match identity.keys_match() {
        Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)) => {
            Err("its key belongs to another certificate".to_owned())
        }
        _ => Ok(Arc::new(identity)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_are_found_among_anything() {
        let text = "\u{feff}subject=/CN=a: b\r\n-----BEGIN CERTIFICATE-----\r\nAQID\r\n BA==  \r\n-----END CERTIFICATE-----\r\nnotes\n\
                    -----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nBQ==\n-----END RSA PRIVATE KEY-----\n\
                    -----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n\
                    -----BEGIN CERTIFICATE-----\nBg==\n";
        let block = |label: &str, encrypted, bytes: &[u8]| Block {
            label: label.to_owned(),
            encrypted,
            bytes: bytes.to_vec(),
        };
        assert_eq!(
            blocks(text.as_bytes()),
            [
                block("CERTIFICATE", false, &[1, 2, 3, 4]),
                block("RSA PRIVATE KEY", true, &[5])
            ]
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(certificates(b"").unwrap_err().contains("no certificate"));
        assert!(certificates(b"-----BEGIN CERTIFICATE-----\nAQID\n-----END CERTIFICATE-----").is_err());
        assert!(identity(b"nothing", None).unwrap_err().contains("no certificate"));
    }

    proptest! {
        #[test]
        fn any_file_is_read_or_refused(text in "(-----(BEGIN|END) (CERTIFICATE|PRIVATE KEY)-----\n|[A-Za-z0-9=]{0,20}\n|\\PC){0,12}") {
            let _ = (certificates(text.as_bytes()), identity(text.as_bytes(), Some(text.as_bytes())));
        }
    }
}
