//! What arguments name: checked while the command line is parsed, so that a mistake costs nothing and ends with code 2.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::registry::{Reference, RegistryError};

/// Prefix of a source that is an OCI layout on disk.
const LAYOUT_PREFIX: &str = "oci:";
/// Longest name of a namespace, in bytes: containerd's own limit.
const NAMESPACE_MAX: usize = 76;

/// Where an image is: `registry.example/repo:tag` or `oci:DIRECTORY[:TAG]`.
#[derive(Debug, Clone)]
pub(super) enum SourceName {
    /// In a registry.
    Registry(Reference),
    /// In an OCI layout.
    Layout {
        /// Its directory.
        directory: PathBuf,
        /// Which image of it; empty for the only one.
        tag: String,
    },
}

impl SourceName {
    /// The reference, if it is in a registry.
    pub(super) fn reference(&self) -> Option<&Reference> {
        match self {
            SourceName::Registry(reference) => Some(reference),
            SourceName::Layout { .. } => None,
        }
    }
}

impl FromStr for SourceName {
    type Err = RegistryError;

    fn from_str(text: &str) -> Result<Self, RegistryError> {
        let Some(layout) = text.strip_prefix(LAYOUT_PREFIX) else {
            return Ok(SourceName::Registry(Reference::parse(text)?));
        };
        let (directory, tag) = match layout.rsplit_once(':') {
            Some((directory, tag)) if !tag.contains('/') => (directory, tag),
            _ => (layout, ""),
        };
        if directory.is_empty() {
            return Err(RegistryError::InvalidReference {
                reference: text.to_owned(),
                what: "a directory follows oci:".to_owned(),
            });
        }
        Ok(SourceName::Layout {
            directory: directory.into(),
            tag: tag.to_owned(),
        })
    }
}

impl fmt::Display for SourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SourceName::Registry(reference) => reference.fmt(f),
            SourceName::Layout { directory, tag } if tag.is_empty() => {
                write!(f, "{LAYOUT_PREFIX}{}", directory.display())
            }
            SourceName::Layout { directory, tag } => write!(f, "{LAYOUT_PREFIX}{}:{tag}", directory.display()),
        }
    }
}

/// A namespace of containerd, by its own rules.
pub(super) fn namespace(text: &str) -> Result<String, String> {
    let words = text.split(['.', '_', '-']);
    let is_word = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric());
    match text.len() <= NAMESPACE_MAX && words.clone().all(is_word) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "a namespace is letters and digits, with single . _ - between them, {NAMESPACE_MAX} at most"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_registries_or_directories() {
        let layout = |text: &str| match text.parse().unwrap() {
            SourceName::Layout { directory, tag } => (directory.display().to_string(), tag),
            other => panic!("{other:?}"),
        };
        assert_eq!(layout("oci:/a:b/c"), ("/a:b/c".to_owned(), String::new()));
        assert_eq!(layout("oci:/a/b:1"), ("/a/b".to_owned(), "1".to_owned()));
        for (text, shown) in [("alpine", "docker.io/library/alpine:latest"), ("oci:a:1", "oci:a:1")] {
            assert_eq!(text.parse::<SourceName>().unwrap().to_string(), shown);
        }
        for text in ["oci:", "oci::tag", "Not A Reference", "a@sha256:12"] {
            assert!(text.parse::<SourceName>().is_err(), "{text}");
        }
    }

    #[test]
    fn namespaces_are_those_of_containerd() {
        for good in ["default", "k8s.io", "a-b_c.d"] {
            assert!(namespace(good).is_ok(), "{good}");
        }
        for bad in ["", "a..b", "-a", "a b", "ä", &"a".repeat(77)] {
            assert!(namespace(bad).is_err(), "{bad}");
        }
    }
}
