//! Whose indexes are believed.
//!
//! An index decides what a layer's names are and how its bytes come out of the blob, so that a false one can show false files. For one image (see
//! [`super::super::belief`]) it is believed if the image's manifest names its digest, if a configured key has signed it, or if it lies in a
//! repository that the configuration names. A signature covers a fixed text, the digest of the layer and that of the index ([`statement`]):
//! it cannot be taken from one layer to another, nor from another purpose to this one.

use std::fmt;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ED25519, ED25519_PUBLIC_KEY_LEN, Ed25519KeyPair, UnparsedPublicKey};

use crate::config::IndexConfig;
use crate::layer::Digest;
use crate::registry::Reference;
use crate::store::LayerSource;

/// First line of what is signed.
const DOMAIN: &str = "lazuli layer index signature v1";
/// First line of what is signed of a trace.
const TRACE_DOMAIN: &str = "lazuli trace signature v1";
/// Largest file of a key, in bytes.
const MAX_KEY_FILE: u64 = 64 << 10;
/// What stands in front of the 32 bytes of an ed25519 public key in DER (RFC 8410).
const PUBLIC_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// Longest text of a signature that is looked at, in bytes; 64 bytes take 88.
const MAX_SIGNATURE_TEXT: usize = 128;

/// Why the configuration of shared indexes cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IndexError {
    /// A key cannot be used.
    #[error("key {path}: {problem}")]
    Key {
        /// Its file.
        path: PathBuf,
        /// What is wrong, and what is wanted.
        problem: String,
    },
    /// A repository cannot be used.
    #[error("index repository {name:?}: {problem}")]
    Repository {
        /// As the configuration names it.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// An entry of the list of SOCI indexes cannot be used.
    #[error("index.soci_indexes: {name:?}: {problem}")]
    Soci {
        /// The digest of a manifest or of an index.
        name: String,
        /// What is wrong.
        problem: String,
    },
}

/// Why an index is believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// The image's manifest names its digest.
    Manifest,
    /// A configured key has signed it: file of the key.
    Signed(PathBuf),
    /// It lies in a repository that the configuration names.
    Repository,
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trust::Manifest => f.write_str("named by the manifest"),
            Trust::Signed(key) => write!(f, "signed with {}", key.display()),
            Trust::Repository => f.write_str("trusted repository"),
        }
    }
}

/// A public key.
struct PublicKey {
    file: PathBuf,
    key: [u8; ED25519_PUBLIC_KEY_LEN],
}

/// A private key.
pub struct SigningKey(Ed25519KeyPair);

/// Whose indexes are believed.
pub struct Policy {
    repository: Option<LayerSource>,
    trusted: Vec<String>,
    keys: Vec<PublicKey>,
    require_signature: bool,
}

/// What is signed: that this index is that layer's.
pub fn statement(layer: &Digest, index: &Digest) -> Vec<u8> {
    format!("{DOMAIN}\n{layer}\n{index}\n").into_bytes()
}

/// What is signed of a trace: that it is that image's.
fn trace_statement(manifest: &Digest, trace: &Digest) -> Vec<u8> {
    format!("{TRACE_DOMAIN}\n{manifest}\n{trace}\n").into_bytes()
}

/// Parses the name of a repository, without tag and digest.
///
/// # Errors
/// [`IndexError::Repository`].
pub fn parse_repository(name: &str) -> Result<LayerSource, IndexError> {
    let fail = |problem: String| IndexError::Repository {
        name: name.to_owned(),
        problem,
    };
    let tagged = name.rsplit_once('/').map_or(name, |(_, last)| last).contains(':');
    if tagged || name.contains('@') {
        return Err(fail("a repository has neither tag nor digest".to_owned()));
    }
    let reference = Reference::parse(name).map_err(|error| fail(error.to_string()))?;
    Ok(LayerSource {
        host: reference.host,
        repository: reference.repository,
    })
}

impl Policy {
    /// What `config` says. Reads the files of keys.
    ///
    /// # Errors
    /// [`IndexError`] names what cannot be used.
    pub fn new(config: &IndexConfig) -> Result<Self, IndexError> {
        let repository = match config.repository.as_str() {
            "" => None,
            name => Some(parse_repository(name)?),
        };
        let keys = config.public_keys.iter().map(|file| PublicKey::load(file));
        Ok(Policy {
            repository,
            trusted: config.trusted_repositories.clone(),
            keys: keys.collect::<Result<_, _>>()?,
            require_signature: config.require_signature,
        })
    }

    /// The cluster's index repository.
    pub fn repository(&self) -> Option<&LayerSource> {
        self.repository.as_ref()
    }

    /// Whether anything in `place` could be believed, so that it is worth asking.
    pub fn may_trust(&self, place: &LayerSource) -> bool {
        !self.keys.is_empty() || self.names(place)
    }

    /// Whether the index with digest `index`, found in `place`, is believed to be `layer`'s; `None` if not.
    pub fn judge(
        &self,
        place: &LayerSource,
        layer: &Digest,
        index: &Digest,
        signature: Option<&str>,
        named_by_manifest: bool,
    ) -> Option<Trust> {
        if named_by_manifest {
            return Some(Trust::Manifest);
        }
        if let Some(key) = signature.and_then(|text| self.signer(&statement(layer, index), text)) {
            return Some(Trust::Signed(key));
        }
        self.trusts_unsigned(place).then_some(Trust::Repository)
    }

    /// Whether the trace with digest `trace`, found in `place`, is believed to be that of the image with this manifest.
    pub fn judges_trace(
        &self,
        place: &LayerSource,
        manifest: &Digest,
        trace: &Digest,
        signature: Option<&str>,
    ) -> bool {
        let statement = trace_statement(manifest, trace);
        let signer = signature.and_then(|text| self.signer(&statement, text));
        signer.is_some() || self.trusts_unsigned(place)
    }

    /// Whether nothing is believed that is neither signed nor named by the image's own manifest.
    pub fn requires_signature(&self) -> bool {
        self.require_signature
    }

    /// Whether what lies in `place` is believed because it lies there.
    pub fn trusts_unsigned(&self, place: &LayerSource) -> bool {
        !self.require_signature && self.names(place)
    }

    /// The key that made a signature.
    fn signer(&self, statement: &[u8], text: &str) -> Option<PathBuf> {
        if text.len() > MAX_SIGNATURE_TEXT {
            return None;
        }
        let signature = STANDARD.decode(text).ok()?;
        let key = self.keys.iter().find(|key| {
            let public = UnparsedPublicKey::new(&ED25519, &key.key);
            public.verify(statement, &signature).is_ok()
        })?;
        Some(key.file.clone())
    }

    fn names(&self, place: &LayerSource) -> bool {
        let name = format!("{}/{}", place.host, place.repository);
        let named = |pattern: &String| match pattern.strip_suffix('*') {
            // With its slash: `r.example/a/*` is not `r.example/ab`.
            Some(prefix) => name.starts_with(prefix),
            None => *pattern == name,
        };
        self.repository.as_ref() == Some(place) || self.trusted.iter().any(named)
    }
}

impl PublicKey {
    fn load(file: &Path) -> Result<Self, IndexError> {
        let fail = |problem: &str| IndexError::Key {
            path: file.to_owned(),
            problem: problem.to_owned(),
        };
        let der = read_pem(file, "PUBLIC KEY")?;
        let key = der
            .strip_prefix(&PUBLIC_PREFIX)
            .and_then(|key| key.try_into().ok())
            .ok_or_else(|| fail("it is not an ed25519 public key; make one with: openssl pkey -in KEY -pubout"))?;
        Ok(PublicKey {
            file: file.to_owned(),
            key,
        })
    }
}

impl SigningKey {
    /// Reads a key.
    ///
    /// # Errors
    /// [`IndexError::Key`].
    pub fn load(file: &Path) -> Result<Self, IndexError> {
        let der = read_pem(file, "PRIVATE KEY")?;
        if std::fs::metadata(file).is_ok_and(|meta| meta.permissions().mode() & 0o077 != 0) {
            tracing::warn!(key = %file.display(), "the key can be read by others than its owner");
        }
        // openssl leaves the public key out, hence "maybe unchecked": there is nothing to check the private key against.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(|error| IndexError::Key {
            path: file.to_owned(),
            problem: format!(
                "it is not an ed25519 private key ({error}); make one with: openssl genpkey -algorithm ed25519"
            ),
        })?;
        Ok(SigningKey(pair))
    }

    /// The signature that this index is that layer's, as text.
    pub fn sign(&self, layer: &Digest, index: &Digest) -> String {
        STANDARD.encode(self.0.sign(&statement(layer, index)))
    }

    /// The signature that this trace is that image's, as text.
    pub fn sign_trace(&self, manifest: &Digest, trace: &Digest) -> String {
        STANDARD.encode(self.0.sign(&trace_statement(manifest, trace)))
    }
}

/// The bytes of a PEM file with one block of this kind.
fn read_pem(file: &Path, kind: &str) -> Result<Vec<u8>, IndexError> {
    let fail = |problem: String| IndexError::Key {
        path: file.to_owned(),
        problem,
    };
    let mut text = String::new();
    std::fs::File::open(file)
        .and_then(|file| file.take(MAX_KEY_FILE).read_to_string(&mut text))
        .map_err(|error| fail(error.to_string()))?;
    let block = text
        .split_once(&format!("-----BEGIN {kind}-----"))
        .and_then(|(_, rest)| rest.split_once(&format!("-----END {kind}-----")))
        .map(|(block, _)| block)
        .ok_or_else(|| fail(format!("it has no block BEGIN {kind}")))?;
    let packed: String = block.split_whitespace().collect();
    STANDARD
        .decode(packed)
        .map_err(|error| fail(format!("its block {kind} is not base64: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The first key pair of RFC 8032, section 7.1, in the form that openssl writes, and the public key of the second.
    const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n-----END PRIVATE KEY-----\n";
    const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----\n";
    const OTHER: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAPUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw=\n-----END PUBLIC KEY-----\n";

    fn place(repository: &str) -> LayerSource {
        LayerSource {
            host: "r.example".to_owned(),
            repository: repository.to_owned(),
        }
    }

    fn file(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn digests() -> (Digest, Digest) {
        (Digest::of(b"layer"), Digest::of(b"index"))
    }

    #[test]
    fn a_signature_counts_for_its_layer_and_its_index_alone() {
        let dir = tempfile::tempdir().unwrap();
        let key = SigningKey::load(&file(&dir, "key", PRIVATE)).unwrap();
        let (layer, index) = digests();
        let signature = key.sign(&layer, &index);
        let policy = |public: &str| {
            let config = IndexConfig {
                public_keys: vec![file(&dir, "other", OTHER), file(&dir, "public", public)],
                ..IndexConfig::default()
            };
            Policy::new(&config).unwrap()
        };
        let judge = |policy: &Policy, layer: &Digest, index: &Digest, signature: &str| {
            policy.judge(&place("anywhere"), layer, index, Some(signature), false)
        };
        let right = policy(PUBLIC);
        assert_eq!(
            judge(&right, &layer, &index, &signature),
            Some(Trust::Signed(dir.path().join("public")))
        );
        assert_eq!(judge(&right, &index, &layer, &signature), None);
        assert_eq!(judge(&right, &layer, &layer, &signature), None);
        for broken in [
            "",
            "A",
            "====",
            &signature[1..],
            &signature.to_lowercase(),
            &"A".repeat(4096),
        ] {
            assert_eq!(judge(&right, &layer, &index, broken), None, "{broken}");
        }
        assert_eq!(right.judge(&place("anywhere"), &layer, &index, None, false), None);
        assert_eq!(judge(&policy(OTHER), &layer, &index, &signature), None);
        assert!(right.may_trust(&place("anywhere")));
    }

    #[test]
    fn a_signature_of_a_trace_is_none_of_an_index() {
        let dir = tempfile::tempdir().unwrap();
        let key = SigningKey::load(&file(&dir, "key", PRIVATE)).unwrap();
        let config = IndexConfig {
            public_keys: vec![file(&dir, "public", PUBLIC)],
            trusted_repositories: vec!["r.example/team".to_owned()],
            ..IndexConfig::default()
        };
        let policy = Policy::new(&config).unwrap();
        let (image, trace) = digests();
        let (of_trace, of_index) = (key.sign_trace(&image, &trace), key.sign(&image, &trace));
        let judges = |place: &LayerSource, signature| policy.judges_trace(place, &image, &trace, signature);
        assert!(judges(&place("any"), Some(&of_trace)) && judges(&place("team"), None));
        assert!(!judges(&place("any"), Some(&of_index)) && !judges(&place("any"), None));
        assert_eq!(
            policy.judge(&place("any"), &image, &trace, Some(&of_trace), false),
            None
        );
        assert!(!policy.judges_trace(&place("any"), &trace, &image, Some(&of_trace)));
    }

    #[test]
    fn repositories_are_trusted_by_name() {
        let (layer, index) = digests();
        let config = IndexConfig {
            repository: "r.example/cluster/index".to_owned(),
            trusted_repositories: vec!["r.example/team/*".to_owned(), "r.example/one".to_owned()],
            ..IndexConfig::default()
        };
        let policy = Policy::new(&config).unwrap();
        for (name, trusted) in [
            ("cluster/index", true),
            ("team/app", true),
            ("team/a/b", true),
            ("one", true),
            ("one/more", false),
            ("team", false),
            ("teams/app", false),
            ("other", false),
        ] {
            let trust = policy.judge(&place(name), &layer, &index, Some("nonsense"), false);
            assert_eq!(trust, trusted.then_some(Trust::Repository), "{name}");
            assert_eq!(policy.may_trust(&place(name)), trusted, "{name}");
        }
        let elsewhere = LayerSource {
            host: "evil.example".to_owned(),
            ..place("one")
        };
        assert_eq!(policy.judge(&elsewhere, &layer, &index, None, false), None);
        assert_eq!(
            policy.judge(&elsewhere, &layer, &index, None, true),
            Some(Trust::Manifest)
        );
    }

    #[test]
    fn a_signature_can_be_required() {
        let dir = tempfile::tempdir().unwrap();
        let config = IndexConfig {
            repository: "r.example/index".to_owned(),
            public_keys: vec![file(&dir, "public", PUBLIC)],
            require_signature: true,
            ..IndexConfig::default()
        };
        let policy = Policy::new(&config).unwrap();
        let (layer, index) = digests();
        let signature = SigningKey::load(&file(&dir, "key", PRIVATE))
            .unwrap()
            .sign(&layer, &index);
        let judge = |signature| policy.judge(&place("index"), &layer, &index, signature, false);
        assert_eq!(judge(None), None);
        assert!(matches!(judge(Some(&signature)), Some(Trust::Signed(_))));
    }

    #[test]
    fn nothing_is_trusted_where_nothing_is_configured() {
        let policy = Policy::new(&IndexConfig::default()).unwrap();
        assert!(!policy.may_trust(&place("any")) && policy.repository().is_none());
    }

    #[test]
    fn keys_that_cannot_be_used_are_named() {
        let dir = tempfile::tempdir().unwrap();
        for (text, problem) in [
            ("", "BEGIN PUBLIC KEY"),
            (PRIVATE, "BEGIN PUBLIC KEY"),
            ("-----BEGIN PUBLIC KEY-----\n!\n-----END PUBLIC KEY-----", "not base64"),
            (
                "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
                "not an ed25519 public key",
            ),
        ] {
            let path = file(&dir, "bad", text);
            let config = IndexConfig {
                public_keys: vec![path.clone()],
                ..IndexConfig::default()
            };
            let error = Policy::new(&config).err().unwrap().to_string();
            assert!(
                error.contains(problem) && error.contains(&path.display().to_string()),
                "{error}"
            );
        }
        for (text, problem) in [
            (PUBLIC, "BEGIN PRIVATE KEY"),
            (
                "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----",
                "genpkey",
            ),
        ] {
            let error = SigningKey::load(&file(&dir, "bad", text)).err().unwrap().to_string();
            assert!(error.contains(problem), "{error}");
        }
        assert!(SigningKey::load(&dir.path().join("absent")).is_err());
    }

    #[test]
    fn repositories_have_no_tag() {
        assert_eq!(parse_repository("r.example/a/b").unwrap(), place("a/b"));
        assert_eq!(parse_repository("r.example:5000/a").unwrap().host, "r.example:5000");
        for name in ["r.example/a:1", "r.example/a@sha256:0", "r.example/A", ""] {
            assert!(parse_repository(name).is_err(), "{name}");
        }
    }
}
