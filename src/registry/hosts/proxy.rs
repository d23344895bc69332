//! HTTP proxies, as the environment names them and Go understands them: containerd's unit and Lazuli's can have the same drop-in.
//!
//! `HTTPS_PROXY` is asked for https addresses and `HTTP_PROXY` for http ones (`ALL_PROXY`, which Go does not know, where these are not set),
//! unless `NO_PROXY` lists the host; each also in lower case. This machine itself is never asked for through a proxy. `NO_PROXY` is a list,
//! separated by commas or spaces, of
//!
//! ```text
//! corp.test          this host and all below it       corp.test:5000   only this port
//! .corp.test         all below it                     *.corp.test      the same
//! 10.1.2.3           this address, also with a port   10.0.0.0/8       these addresses
//! *                  everything
//! ```

use std::net::IpAddr;
use std::sync::Arc;

use url::{Host, Url};

/// Schemes of proxies that can be spoken to.
const SCHEMES: [&str; 5] = ["http", "https", "socks5", "socks5h", "socks4"];

/// Which proxy is asked for which address.
#[derive(Debug, Clone, Default)]
pub struct Proxies(Arc<Rules>);

#[derive(Debug, Default)]
struct Rules {
    http: Option<Url>,
    https: Option<Url>,
    except: Vec<Exception>,
}

/// An entry of `NO_PROXY`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exception {
    All,
    /// An address with so many bits, and a port.
    Network(IpAddr, u8, Option<u16>),
    /// What a name ends with, with a dot before it; whether the name itself is meant as well; and a port.
    Domain(String, bool, Option<String>),
}

impl Proxies {
    /// Those of this process's environment.
    pub fn from_environment() -> Self {
        Self::new(|name| std::env::var(name).ok())
    }

    /// Those that the variables name which `get` gives. A proxy that cannot be used is named in the log, and not used.
    pub fn new(get: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| {
            let lower = name.to_ascii_lowercase();
            let values = [name, &lower].into_iter().filter_map(&get);
            values
                .map(|value| value.trim().to_owned())
                .find(|value| !value.is_empty())
        };
        let proxy = |name: &str| {
            let text = either(name)?;
            parse(&text)
                .map_err(|problem| tracing::error!(variable = name, problem, "this proxy cannot be used"))
                .ok()
        };
        let all = proxy("ALL_PROXY");
        // In a CGI program it may be a header of whoever asks.
        let is_cgi = get("REQUEST_METHOD").is_some_and(|method| !method.is_empty());
        let http = if is_cgi {
            None
        } else {
            proxy("HTTP_PROXY").or_else(|| all.clone())
        };
        let except = either("NO_PROXY").unwrap_or_default();
        let except = except
            .split(|c: char| c == ',' || c.is_whitespace())
            .filter_map(exception);
        Proxies(Arc::new(Rules {
            http,
            https: proxy("HTTPS_PROXY").or(all),
            except: except.collect(),
        }))
    }

    /// The proxy that is asked for `url`, with what it wants of a user.
    pub fn of(&self, url: &Url) -> Option<Url> {
        let proxy = match url.scheme() {
            "https" => self.0.https.as_ref()?,
            _ => self.0.http.as_ref()?,
        };
        let (name, address) = match url.host()? {
            Host::Domain(name) => (name.trim_end_matches('.').to_ascii_lowercase(), name.parse().ok()),
            Host::Ipv4(address) => (String::new(), Some(IpAddr::from(address))),
            Host::Ipv6(address) => (String::new(), Some(IpAddr::from(address).to_canonical())),
        };
        let port = url.port_or_known_default().unwrap_or_default();
        let itself = name == "localhost" || address.is_some_and(|address| address.is_loopback());
        let excepted = itself
            || self
                .0
                .except
                .iter()
                .any(|exception| exception.holds(&name, address, port));
        (!excepted).then(|| proxy.clone())
    }

    /// The proxy that is asked for `url` as it is shown: without what it wants of a user.
    pub fn shown(&self, url: &Url) -> Option<String> {
        let proxy = self.of(url)?;
        let port = proxy.port().map(|port| format!(":{port}")).unwrap_or_default();
        Some(format!("{}://{}{port}", proxy.scheme(), proxy.host_str()?))
    }
}

impl Exception {
    fn holds(&self, name: &str, address: Option<IpAddr>, port: u16) -> bool {
        match self {
            Exception::All => true,
            Exception::Network(network, bits, of_port) => {
                of_port.is_none_or(|of| of == port) && address.is_some_and(|address| contains(*network, *bits, address))
            }
            Exception::Domain(end, itself, of_port) => {
                let named = name.ends_with(end.as_str()) || (*itself && end.strip_prefix('.') == Some(name));
                address.is_none() && named && of_port.as_ref().is_none_or(|of| *of == port.to_string())
            }
        }
    }
}

/// Whether the first `bits` of two addresses are the same.
fn contains(network: IpAddr, bits: u8, address: IpAddr) -> bool {
    let number = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(u32::from(address)) << 96, 32),
        IpAddr::V6(address) => (u128::from(address), 128),
    };
    let ((network, len), (address, len_of_it)) = (number(network), number(address));
    let differing = (network ^ address).leading_zeros();
    len == len_of_it && (differing >= u32::from(bits) || bits == 0)
}

/// The address of a proxy: with http if no scheme is given.
fn parse(text: &str) -> Result<Url, String> {
    let full = match text.contains("://") {
        true => text.to_owned(),
        false => format!("http://{text}"),
    };
    // The text may hold a password.
    let mut url = Url::parse(&full).map_err(|error| format!("it is no address: {error}"))?;
    if !SCHEMES.contains(&url.scheme()) || url.host_str().is_none_or(str::is_empty) {
        return Err(format!(
            "{:?} is no scheme of a proxy; there are {}",
            url.scheme(),
            SCHEMES.join(", ")
        ));
    }
    // Go leaves names to the proxy.
    if url.scheme() == "socks5" {
        let _ = url.set_scheme("socks5h");
    }
    Ok(url)
}

/// An entry of `NO_PROXY`; `None` if it means nothing.
fn exception(entry: &str) -> Option<Exception> {
    let entry = entry.trim().to_ascii_lowercase();
    if entry == "*" {
        return Some(Exception::All);
    }
    if let Some((address, bits)) = entry.split_once('/')
        && let (Ok(address), Ok(bits)) = (address.parse::<IpAddr>(), bits.parse::<u8>())
    {
        let most = if address.is_ipv4() { 32 } else { 128 };
        return (bits <= most).then_some(Exception::Network(address, bits, None));
    }
    let is_bare = entry.parse::<IpAddr>().is_ok();
    let (host, port) = match entry.rsplit_once(':') {
        Some((host, port)) if !is_bare && !host.ends_with(':') => (host, Some(port.to_owned())),
        _ => (entry.as_str(), None),
    };
    let host = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    if let Ok(address) = host.parse::<IpAddr>() {
        let address = address.to_canonical();
        let bits = if address.is_ipv4() { 32 } else { 128 };
        return match port.map(|port| port.parse()) {
            None => Some(Exception::Network(address, bits, None)),
            Some(port) => port.ok().map(|port| Exception::Network(address, bits, Some(port))),
        };
    }
    let below = host.strip_prefix('*').unwrap_or(host);
    match below.strip_prefix('.') {
        Some("") => None,
        Some(_) => Some(Exception::Domain(below.to_owned(), false, port)),
        None if host.is_empty() => None,
        None => Some(Exception::Domain(format!(".{host}"), true, port)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Proxies {
        let get = |name: &str| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        Proxies::new(get)
    }

    fn shown(proxies: &Proxies, url: &str) -> Option<String> {
        proxies.shown(&Url::parse(url).unwrap())
    }

    /// Whether `url` is asked for directly although there is a proxy.
    fn direct(no_proxy: &str, url: &str) -> bool {
        let proxies = proxies(&[("HTTP_PROXY", "p:1"), ("https_proxy", "p:1"), ("NO_PROXY", no_proxy)]);
        shown(&proxies, url).is_none()
    }

    #[test]
    fn exceptions_mean_what_go_takes_them_for() {
        for (no_proxy, url, expected) in [
            ("corp.test", "https://corp.test", true),
            ("corp.test", "https://a.b.corp.test:5000", true),
            ("corp.test", "https://notcorp.test", false),
            ("CORP.test", "http://r.Corp.Test", true),
            (".corp.test", "https://r.corp.test", true),
            (".corp.test", "https://corp.test", false),
            ("*.corp.test", "https://r.corp.test", true),
            ("*.corp.test", "https://corp.test", false),
            ("corp.test:5000", "https://r.corp.test:5000", true),
            ("corp.test:5000", "https://corp.test:5000", true),
            ("corp.test:5000", "https://corp.test", false),
            ("corp.test:443", "https://corp.test", true),
            ("*.corp.test:5000", "http://r.corp.test:5000", true),
            ("*.corp.test:5000", "http://r.corp.test", false),
            ("*", "https://anything.example", true),
            ("x.test, *", "https://anything.example", true),
            ("a.test,b.test , c.test", "https://c.test", true),
            ("a.test b.test", "https://b.test", true),
            ("10.1.2.3", "https://10.1.2.3:5000", true),
            ("10.1.2.3", "https://10.1.2.4", false),
            ("10.1.2.3:5000", "https://10.1.2.3:5000", true),
            ("10.1.2.3:5000", "https://10.1.2.3", false),
            ("10.0.0.0/8", "https://10.200.0.1", true),
            ("10.0.0.0/8", "https://11.0.0.1", false),
            ("10.0.0.0/33", "https://10.0.0.1", false),
            ("0.0.0.0/0", "https://11.0.0.1", true),
            ("0.0.0.0/0", "https://name.test", false),
            ("fd00::/8", "https://[fd12::1]:5000", true),
            ("fd00::/8", "https://[fe80::1]", false),
            ("fd12::1", "https://[fd12::1]", true),
            ("[fd12::1]:5000", "https://[fd12::1]:5000", true),
            ("[fd12::1]:5000", "https://[fd12::1]", false),
            ("[fd12::1]", "https://[fd12::1]", true),
            ("corp.test", "https://corp.test.", true),
            ("", "https://corp.test", false),
            (",., *., :80,", "https://corp.test", false),
            // Without any entry.
            ("", "http://localhost:5000", true),
            ("", "https://127.0.0.7", true),
            ("", "http://[::1]:5000", true),
            ("", "http://sub.localhost", false),
        ] {
            assert_eq!(direct(no_proxy, url), expected, "NO_PROXY={no_proxy} {url}");
        }
    }

    #[test]
    fn variables_and_addresses_of_proxies() {
        let of = |variables: &[(&str, &str)], url: &str| shown(&proxies(variables), url);
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(of(&[], "https://a.test"), None);
        assert_eq!(
            of(&[("HTTPS_PROXY", "http://p.test:3128")], "https://a.test"),
            some("http://p.test:3128")
        );
        assert_eq!(of(&[("HTTPS_PROXY", "http://p.test:3128")], "http://a.test"), None);
        assert_eq!(
            of(&[("http_proxy", "p.test:3128/")], "http://a.test"),
            some("http://p.test:3128")
        );
        assert_eq!(
            of(&[("HTTP_PROXY", ""), ("http_proxy", "q.test")], "http://a.test"),
            some("http://q.test")
        );
        assert_eq!(
            of(&[("HTTP_PROXY", "p:1"), ("http_proxy", "q:1")], "http://a.test"),
            some("http://p:1")
        );
        assert_eq!(
            of(&[("HTTPS_PROXY", "https://p.test")], "https://a.test"),
            some("https://p.test")
        );
        assert_eq!(
            of(&[("HTTPS_PROXY", "socks5://p.test:1080")], "https://a.test"),
            some("socks5h://p.test:1080")
        );
        assert_eq!(of(&[("ALL_PROXY", "p:1")], "https://a.test"), some("http://p:1"));
        assert_eq!(
            of(&[("ALL_PROXY", "p:1"), ("HTTPS_PROXY", "q:1")], "https://a.test"),
            some("http://q:1")
        );
        assert_eq!(of(&[("HTTPS_PROXY", "ftp://p.test")], "https://a.test"), None);
        assert_eq!(
            of(&[("HTTP_PROXY", "p:1"), ("REQUEST_METHOD", "GET")], "http://a.test"),
            None
        );
        // Whoever sees it is not told the password; the proxy is.
        let secret = proxies(&[("HTTPS_PROXY", "me:pass%40word@p.test:1")]);
        let url = Url::parse("https://a.test").unwrap();
        assert_eq!(secret.shown(&url), some("http://p.test:1"));
        assert_eq!(secret.of(&url).unwrap().as_str(), "http://me:pass%40word@p.test:1/");
    }

    proptest! {
        #[test]
        fn any_text_is_understood_or_passed_over(text in "[*.:/\\[\\], a-c0-9]{0,30}", proxy in "\\PC{0,20}") {
            direct(&text, "https://a.b.c:5000");
            proxies(&[("HTTPS_PROXY", &proxy)]);
        }
    }
}
