//! The text of a `hosts.toml`, with containerd's meaning.
//!
//! ```toml
//! server = "https://registry.example"        # asked last; the registry itself if not given
//! [host."https://mirror.example"]            # asked first, in the order of the file
//!   capabilities = ["pull", "resolve"]       # all if not given
//!   ca = "ca.crt"                            # or a list; relative to the file's directory
//!   client = [["client.cert", "client.key"]] # or one file, or a list of files that hold both
//!   skip_verify = false
//!   override_path = false                    # true: no /v2 is appended
//!   dial_timeout = "500ms"
//!   [host."https://mirror.example".header]
//!     x-token = "a"                          # or a list
//! ```
//!
//! Keys that containerd does not know are ignored, as containerd does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;
use url::Url;

/// What a `hosts.toml` says of one host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostSpec {
    /// Base address, `/v2` included. `None`: the registry itself, at its own address.
    pub base: Option<Url>,
    /// May be asked for manifests and blobs by digest.
    pub pull: bool,
    /// May be asked what a tag means.
    pub resolve: bool,
    /// May be given manifests and blobs.
    pub push: bool,
    /// Certificate authorities to trust beside the system's.
    pub ca: Vec<PathBuf>,
    /// Client certificates with the file of their key, if that is another one.
    pub client: Vec<(PathBuf, Option<PathBuf>)>,
    /// Do not verify the host's certificate; `None` if not stated.
    pub skip_verify: Option<bool>,
    /// Headers of every request.
    pub headers: Vec<(String, String)>,
    /// Longest wait for a connection.
    pub dial_timeout: Option<Duration>,
}

#[derive(Deserialize)]
struct RawFile {
    server: Option<Spanned<String>>,
    #[serde(default)]
    host: BTreeMap<Spanned<String>, RawHost>,
    #[serde(flatten)]
    root: RawHost,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawHost {
    capabilities: Option<Vec<Spanned<String>>>,
    ca: Option<OneOrMany>,
    client: Option<RawClient>,
    skip_verify: Option<bool>,
    header: BTreeMap<String, OneOrMany>,
    override_path: bool,
    dial_timeout: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::One(text) => vec![text],
            OneOrMany::Many(texts) => texts,
        }
    }
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "a file, a list of files, or a list of [certificate, key] pairs"
)]
enum RawClient {
    One(String),
    Many(Vec<OneOrMany>),
}

/// Parses a `hosts.toml`. `dir` is the directory that relative file names start from. The hosts come in the order in which they are
/// asked; the last one is `server`, or the registry itself.
///
/// # Errors
/// What is wrong, with its line.
pub fn parse_hosts_toml(text: &str, dir: &Path) -> Result<Vec<HostSpec>, String> {
    let raw: RawFile = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    let mut hosts: Vec<_> = raw.host.into_iter().collect();
    // The map has them by name; containerd asks them by their place in the file.
    hosts.sort_by_key(|(name, _)| name.span().start);
    let mut specs = Vec::with_capacity(hosts.len() + 1);
    for (name, host) in hosts {
        specs.push(spec(text, Some(&name), host, dir)?);
    }
    specs.push(spec(text, raw.server.as_ref(), raw.root, dir)?);
    Ok(specs)
}

fn spec(text: &str, address: Option<&Spanned<String>>, raw: RawHost, dir: &Path) -> Result<HostSpec, String> {
    let base = match address.filter(|address| !address.get_ref().is_empty()) {
        Some(address) => Some(base_url(address.get_ref(), raw.override_path).map_err(|what| at(text, address, &what))?),
        None => None,
    };
    let (mut pull, mut resolve, mut push) = (true, true, true);
    // An empty list means all, as a missing one does.
    if let Some(capabilities) = raw.capabilities.filter(|list| !list.is_empty()) {
        (pull, resolve, push) = (false, false, false);
        for capability in &capabilities {
            match capability.get_ref().to_ascii_lowercase().as_str() {
                "pull" => pull = true,
                "resolve" => resolve = true,
                "push" => push = true,
                // Asked of hosts that resolve: their answer is no better proven than a tag's.
                "referrers" => {}
                other => {
                    let what = format!("unknown capability {other:?}; there are pull, resolve, push and referrers");
                    return Err(at(text, capability, &what));
                }
            }
        }
    }
    let mut client = Vec::new();
    match raw.client {
        None => {}
        Some(RawClient::One(file)) => client.push((dir.join(file), None)),
        Some(RawClient::Many(list)) => {
            for entry in list {
                client.push(match entry {
                    OneOrMany::One(file) => (dir.join(file), None),
                    OneOrMany::Many(pair) => match pair.as_slice() {
                        [cert, key] if key.is_empty() => (dir.join(cert), None),
                        [cert, key] => (dir.join(cert), Some(dir.join(key))),
                        _ => {
                            return Err(format!(
                                "client: a list of {} files; a pair is a certificate and its key",
                                pair.len()
                            ));
                        }
                    },
                });
            }
        }
    }
    let dial_timeout = match &raw.dial_timeout {
        Some(timeout) => Some(parse_go_duration(timeout.get_ref()).ok_or_else(|| {
            at(
                text,
                timeout,
                &format!("{:?} is not a duration such as 500ms or 10s", timeout.get_ref()),
            )
        })?),
        None => None,
    };
    Ok(HostSpec {
        base,
        pull,
        resolve,
        push,
        ca: raw
            .ca
            .map(OneOrMany::into_vec)
            .unwrap_or_default()
            .into_iter()
            .map(|file| dir.join(file))
            .collect(),
        client,
        skip_verify: raw.skip_verify,
        headers: raw
            .header
            .into_iter()
            .flat_map(|(name, values)| {
                values
                    .into_vec()
                    .into_iter()
                    .map(move |value| (name.to_ascii_lowercase(), value))
            })
            .collect(),
        dial_timeout,
    })
}

/// `message` with the line of `spanned` in `text`.
fn at<T>(text: &str, spanned: &Spanned<T>, message: &str) -> String {
    let before = text.as_bytes().get(..spanned.span().start).unwrap_or_default();
    let line = before.iter().filter(|c| **c == b'\n').count() + 1;
    format!("line {line}: {message}")
}

/// The base address of a host: https if no scheme is given, and `/v2` appended unless `override_path`.
fn base_url(address: &str, override_path: bool) -> Result<Url, String> {
    let full = if address.starts_with("http") {
        address.to_owned()
    } else {
        format!("https://{address}")
    };
    let mut url = Url::parse(&full).map_err(|error| format!("{address:?} is not an address: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(format!("{address:?} is not an http or https address"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(
            "an address may not hold a user name; put credentials into [registry.credentials] or config.json"
                .to_owned(),
        );
    }
    url.set_query(None);
    url.set_fragment(None);
    let path = url.path().trim_end_matches('/').to_owned();
    let path = if override_path || path.ends_with("/v2") {
        path
    } else {
        format!("{path}/v2")
    };
    url.set_path(&path);
    Ok(url)
}

/// Go's duration texts: `1h15m30.5s`, `200ms`, `0`.
pub fn parse_go_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest.is_empty() {
        return None;
    }
    let mut seconds = 0.0f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(digits);
        let unit = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let scale = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * scale;
        rest = after;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Vec<HostSpec>, String> {
        parse_hosts_toml(text, Path::new("/certs"))
    }

    #[test]
    fn hosts_keep_the_order_of_the_file() {
        let specs = parse(
            r#"
            server = "https://registry.example"
            [host."https://zebra.example"]
            [host."https://apple.example:8443/mirror"]
            [host."http://middle.example/v2/"]
            "#,
        )
        .unwrap();
        let bases: Vec<_> = specs.iter().map(|spec| spec.base.as_ref().unwrap().as_str()).collect();
        assert_eq!(
            bases,
            [
                "https://zebra.example/v2",
                "https://apple.example:8443/mirror/v2",
                "http://middle.example/v2",
                "https://registry.example/v2"
            ]
        );
    }

    #[test]
    fn every_option_is_read() {
        let specs = parse(
            r#"
            skip_verify = true
            [host."mirror.example/some/path"]
              capabilities = ["Pull"]
              ca = "ca.crt"
              client = [["a.cert", "a.key"], "both.pem", ["b.cert", ""]]
              skip_verify = false
              override_path = true
              dial_timeout = "1m1.5s"
              [host."mirror.example/some/path".header]
                X-One = "1"
                x-two = ["2", "3"]
            [host."other.example"]
              ca = ["/abs/ca1.crt", "ca2.crt"]
              client = "one.pem"
              capabilities = []
            "#,
        )
        .unwrap();
        let [mirror, other, root] = specs.as_slice() else {
            panic!("{specs:?}");
        };
        assert_eq!(
            mirror,
            &HostSpec {
                base: Some(Url::parse("https://mirror.example/some/path").unwrap()),
                pull: true,
                resolve: false,
                push: false,
                ca: vec!["/certs/ca.crt".into()],
                client: vec![
                    ("/certs/a.cert".into(), Some("/certs/a.key".into())),
                    ("/certs/both.pem".into(), None),
                    ("/certs/b.cert".into(), None),
                ],
                skip_verify: Some(false),
                headers: vec![
                    ("x-one".to_owned(), "1".to_owned()),
                    ("x-two".to_owned(), "2".to_owned()),
                    ("x-two".to_owned(), "3".to_owned()),
                ],
                dial_timeout: Some(Duration::from_millis(61_500)),
            }
        );
        assert_eq!(other.ca, [Path::new("/abs/ca1.crt"), Path::new("/certs/ca2.crt")]);
        assert_eq!(other.client, [("/certs/one.pem".into(), None)]);
        assert!(other.pull && other.resolve && other.push);
        assert_eq!((root.base.as_ref(), root.skip_verify), (None, Some(true)));
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, parts) in [
            ("server = 5", &["line 1"][..]),
            ("\n[host.\"https://a\"]\ncapabilities = [\"pul\"]", &["line 3", "pul"]),
            ("[host.\"https://a\"]\n\ndial_timeout = \"fast\"", &["line 3", "fast"]),
            ("[host.\"https://\"]", &["line 1", "address"]),
            ("server = \"https://me:secret@a\"", &["line 1", "credentials"]),
            ("ca = 3", &["list of texts"]),
            ("client = [[\"a\", \"b\", \"c\"]]", &["pair"]),
            ("[host", &["line 1"]),
        ] {
            let error = parse(text).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{text}: {error}");
            }
            assert!(!error.contains("me:"), "{error}");
        }
    }

    #[test]
    fn go_durations() {
        for (text, duration) in [
            ("200ms", Some(Duration::from_millis(200))),
            ("1h0m2s", Some(Duration::from_secs(3602))),
            ("0", Some(Duration::ZERO)),
            ("", None),
            ("5", None),
            ("s", None),
            ("-1s", None),
            ("1d", None),
            (".s", None),
        ] {
            assert_eq!(parse_go_duration(text), duration, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "(server|ca|client|\\[|\\]|host|\"|=|\\.|\n|\\PC){0,30}") {
            let _ = parse(&text);
            let _ = parse_go_duration(&text);
        }
    }
}
