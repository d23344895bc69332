//! Image references: `host[:port]/repository[:tag][@digest]`, and docker's short names for docker.io.

use std::fmt;
use std::str::FromStr;

use super::RegistryError;
use crate::layer::Digest;

/// Host of names that state none.
pub const DEFAULT_HOST: &str = "docker.io";
/// Tag of references that state neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";
/// Longest host and repository together, in bytes: what every other implementation accepts.
const MAX_NAME: usize = 255;
/// Longest tag, in bytes.
const MAX_TAG: usize = 128;
/// Longest part of a bad reference that an error repeats, in characters.
const QUOTED_LEN: usize = 300;

/// A reference to an image, in full.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Host and port as the name states them. `docker.io` stays so; only requests go to `registry-1.docker.io`.
    pub host: String,
    /// Path of the repository on that host.
    pub repository: String,
    /// Tag, if stated (or implied).
    pub tag: Option<String>,
    /// Digest, if stated. It wins over the tag.
    pub digest: Option<Digest>,
}

impl Reference {
    /// Parses containerd's full form, or a short name: `alpine` is `docker.io/library/alpine:latest`.
    ///
    /// # Errors
    /// [`RegistryError::InvalidReference`] says which part is not possible.
    pub fn parse(text: &str) -> Result<Self, RegistryError> {
        parse_reference(text).map_err(|what| RegistryError::InvalidReference {
            reference: text.chars().take(QUOTED_LEN).collect(),
            what,
        })
    }

    /// What [`super::Source::manifest`] is asked for: the digest if there is one, else the tag.
    pub fn manifest_reference(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = RegistryError;

    fn from_str(text: &str) -> Result<Self, RegistryError> {
        Reference::parse(text)
    }
}

/// The parser behind [`Reference::parse`]; the error says what is wrong.
///
/// # Errors
/// A text for people.
pub fn parse_reference(text: &str) -> Result<Reference, String> {
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest.parse::<Digest>().map_err(|error| error.to_string())?)),
        None => (text, None),
    };
    let (host, rest) = split_host(name);
    let (path, tag) = match rest.rsplit_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    check_host(host)?;
    let host = if host == "index.docker.io" { DEFAULT_HOST } else { host };
    let repository = if host == DEFAULT_HOST && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    for component in path.split('/') {
        check_component(component)?;
    }
    if host.len() + 1 + repository.len() > MAX_NAME {
        return Err(format!("host and repository have more than {MAX_NAME} characters"));
    }
    let tag = match (tag, digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, None) => Some(DEFAULT_TAG.to_owned()),
        (None, Some(_)) => None,
    };
    Ok(Reference {
        host: host.to_owned(),
        repository,
        tag,
        digest,
    })
}

/// Docker's rule: what stands before the first slash is a host if it has a dot, a colon or a capital letter, or is `localhost`.
fn split_host(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((host, rest))
            if host.contains(['.', ':', '['])
                || host == "localhost"
                || host.chars().any(|c| c.is_ascii_uppercase()) =>
        {
            (host, rest)
        }
        _ => (DEFAULT_HOST, name),
    }
}

fn check_host(host: &str) -> Result<(), String> {
    let bad = || format!("{host:?} is not a host name with an optional port");
    let (name, port) = if let Some(rest) = host.strip_prefix('[') {
        let (address, rest) = rest.split_once(']').ok_or_else(bad)?;
        address.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
        match rest.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if rest.is_empty() => (None, None),
            None => return Err(bad()),
        }
    } else {
        match host.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(host), None),
        }
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
    };
    if name.is_some_and(|name| !name.split('.').all(label)) {
        return Err(bad());
    }
    match port {
        Some(port) if !port.bytes().all(|c| c.is_ascii_digit()) || port.parse::<u16>().is_err() => Err(bad()),
        _ => Ok(()),
    }
}

/// `[a-z0-9]+` groups joined by one dot, one or two underscores, or hyphens.
fn check_component(component: &str) -> Result<(), String> {
    let bad = || {
        format!(
            "{component:?} is not a part of a repository name (lowercase letters and digits, joined by . _ __ or -)"
        )
    };
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if !component.starts_with(alphanumeric) || !component.ends_with(alphanumeric) {
        return Err(bad());
    }
    let separators = component.split(alphanumeric).filter(|part| !part.is_empty());
    for separator in separators {
        if !(matches!(separator, "." | "_" | "__") || separator.bytes().all(|c| c == b'-')) {
            return Err(bad());
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), String> {
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    let first = tag.bytes().next().is_some_and(word);
    if first && tag.len() <= MAX_TAG && tag.bytes().all(|c| word(c) || c == b'.' || c == b'-') {
        Ok(())
    } else {
        Err(format!("{tag:?} is not a tag"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn short_names_become_full_ones() {
        for (text, full) in [
            ("alpine", "docker.io/library/alpine:latest"),
            ("alpine:3.20", "docker.io/library/alpine:3.20"),
            ("library/x", "docker.io/library/x:latest"),
            ("user/x:tag", "docker.io/user/x:tag"),
            ("docker.io/alpine", "docker.io/library/alpine:latest"),
            ("index.docker.io/a/b", "docker.io/a/b:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x", "localhost:5000/x:latest"),
            ("127.0.0.1:5000/a/b__c/d--e:T", "127.0.0.1:5000/a/b__c/d--e:T"),
            ("[::1]:5000/a:1", "[::1]:5000/a:1"),
            ("Host/a", "Host/a:latest"),
        ] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), full, "{text}");
        }
    }

    #[test]
    fn a_digest_stands_alone_or_beside_a_tag() {
        let reference = Reference::parse(&format!("r.example/a@sha256:{HEX}")).unwrap();
        assert_eq!(reference.tag, None);
        assert_eq!(reference.manifest_reference(), format!("sha256:{HEX}"));
        let reference = Reference::parse(&format!("r.example/a:1@sha256:{HEX}")).unwrap();
        assert_eq!(reference.tag.as_deref(), Some("1"));
        assert_eq!(reference.manifest_reference(), format!("sha256:{HEX}"));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, part) in [
            ("", "empty"),
            ("r.example/", "repository name"),
            ("r.example/A", "repository name"),
            ("r.example/a//b", "repository name"),
            ("r.example/a___b", "repository name"),
            ("r.example/a:", "tag"),
            ("r.example/a:-x", "tag"),
            ("r.example:x/a", "host name"),
            ("r.example:99999/a", "host name"),
            ("-r.example/a", "host name"),
            ("r.example/a@sha256:12", "digest"),
            ("r.example/a/../b", "repository name"),
            ("http://r.example/a", "host name"),
        ] {
            let error = Reference::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(Reference::parse(&format!("r.example/{}", "a".repeat(300))).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,60}") {
            let _ = parse_reference(&text);
        }

        #[test]
        fn the_full_form_is_a_fixed_point(
            host in "([a-z]{1,5}\\.[a-z]{1,5}|localhost)(:[1-9][0-9]{0,3})?",
            path in "[a-z0-9]{1,6}(/[a-z0-9]{1,6}([._-][a-z0-9]{1,3})?){0,3}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,10}"),
            with_digest: bool,
        ) {
            let mut text = format!("{host}/{path}");
            if let Some(tag) = &tag {
                text.push_str(&format!(":{tag}"));
            }
            if with_digest {
                text.push_str(&format!("@sha256:{HEX}"));
            }
            let reference = Reference::parse(&text).unwrap();
            prop_assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference);
        }
    }
}
