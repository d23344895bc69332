//! `WWW-Authenticate` headers (RFC 9110, section 11.6.1; the distribution token specification).

use http::{HeaderMap, header};

/// One way in which a host wants requests to be authenticated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// A token has to be fetched first.
    Bearer {
        /// Address of the token service.
        realm: String,
        /// Name of the registry, for the token service.
        service: Option<String>,
        /// What access is needed: `repository:name:pull`, several separated by spaces.
        scope: Option<String>,
    },
    /// A user name and a password.
    Basic,
    /// A scheme that Lazuli does not speak.
    Other(String),
}

/// The challenges of an answer, tokens first, as containerd has it: a password is not needed for what a token does.
pub fn challenges_of(headers: &HeaderMap) -> Vec<Challenge> {
    let values = headers.get_all(header::WWW_AUTHENTICATE).iter();
    let mut challenges: Vec<_> = values
        .flat_map(|value| parse_challenges(&String::from_utf8_lossy(value.as_bytes())))
        .collect();
    challenges.sort_by_key(|challenge| !matches!(challenge, Challenge::Bearer { .. }));
    challenges
}

/// Whether two answers ask for the same, whatever their realms carry along.
pub(super) fn ask_alike(some: &[Challenge], others: &[Challenge]) -> bool {
    let bare = |challenge: &Challenge| match challenge {
        Challenge::Bearer { realm, service, scope } => Challenge::Bearer {
            realm: realm.split('?').next().unwrap_or_default().to_owned(),
            service: service.clone(),
            scope: scope.clone(),
        },
        other => other.clone(),
    };
    some.iter().map(bare).eq(others.iter().map(bare))
}

/// Parses the challenges of one header value, in order. Malformed parts are skipped: another challenge may still be usable.
pub fn parse_challenges(header: &str) -> Vec<Challenge> {
    let mut challenges: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            break;
        }
        let (word, after) = token(rest);
        if word.is_empty() {
            // Not a token: skip one character and look again.
            let mut chars = rest.chars();
            chars.next();
            rest = chars.as_str();
            continue;
        }
        let unspaced = after.trim_start_matches([' ', '\t']);
        // A word followed by a single '=' is a parameter of the challenge before; anything else begins a challenge.
        match unspaced.strip_prefix('=') {
            Some(value) if !challenges.is_empty() => {
                let (value, after) = parameter_value(value.trim_start_matches([' ', '\t']));
                if let Some((_, parameters)) = challenges.last_mut() {
                    parameters.push((word.to_ascii_lowercase(), value));
                }
                rest = after;
            }
            _ => {
                challenges.push((word.to_owned(), Vec::new()));
                rest = after;
            }
        }
    }
    challenges.into_iter().filter_map(challenge).collect()
}

fn challenge((scheme, parameters): (String, Vec<(String, String)>)) -> Option<Challenge> {
    let get = |name: &str| {
        parameters
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
            .filter(|value| !value.is_empty())
    };
    if scheme.eq_ignore_ascii_case("bearer") {
        Some(Challenge::Bearer {
            realm: get("realm")?,
            service: get("service"),
            scope: get("scope"),
        })
    } else if scheme.eq_ignore_ascii_case("basic") {
        Some(Challenge::Basic)
    } else {
        Some(Challenge::Other(scheme))
    }
}

/// The token that `text` begins with, and what follows it.
fn token(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !(c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)))
        .unwrap_or(text.len());
    text.split_at(end)
}

/// A quoted string or a bare value, and what follows it.
fn parameter_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        // Bare values may hold what a token may not: addresses are seen unquoted.
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => break,
            '\\' => value.extend(chars.next()),
            c => value.push(c),
        }
    }
    (value, chars.as_str())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }
    }

    #[test]
    fn common_forms() {
        assert_eq!(
            parse_challenges(
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/alpine:pull,push""#
            ),
            [bearer(
                "https://auth.docker.io/token",
                Some("registry.docker.io"),
                Some("repository:library/alpine:pull,push")
            )]
        );
        assert_eq!(parse_challenges(r#"Basic realm="x y""#), [Challenge::Basic]);
        assert_eq!(parse_challenges("basic"), [Challenge::Basic]);
        assert_eq!(
            parse_challenges(r#"Negotiate, Basic realm="a, b", bearer realm = "https://t/" , error="invalid_token""#),
            [
                Challenge::Other("Negotiate".to_owned()),
                Challenge::Basic,
                bearer("https://t/", None, None)
            ]
        );
        assert_eq!(
            parse_challenges("Bearer realm=https://t/x?y=z,service=s"),
            [bearer("https://t/x?y=z", Some("s"), None)]
        );
        assert_eq!(
            parse_challenges(r#"Bearer realm="a\"b\\c"#),
            [bearer("a\"b\\c", None, None)]
        );
    }

    #[test]
    fn tokens_come_first_and_realms_may_carry_something_along() {
        let headers = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::WWW_AUTHENTICATE, value.parse().unwrap());
            }
            challenges_of(&headers)
        };
        let both = headers(&["Basic realm=x", "BEARER REALM=\"https://t/?n=1\""]);
        assert_eq!(both, [bearer("https://t/?n=1", None, None), Challenge::Basic]);
        assert!(ask_alike(
            &both,
            &headers(&["Bearer realm=\"https://t/?n=2\", Basic realm=y"])
        ));
        assert!(!ask_alike(
            &both,
            &headers(&["Bearer realm=\"https://t/?n=1\",scope=\"a\", Basic realm=x"])
        ));
        assert!(!ask_alike(&both, &[]));
    }

    #[test]
    fn malformed_ones_are_skipped() {
        assert_eq!(parse_challenges(""), []);
        assert_eq!(parse_challenges("Bearer service=\"no realm\""), []);
        assert_eq!(parse_challenges("=,, ;; Basic"), [Challenge::Basic]);
    }

    proptest! {
        #[test]
        fn any_text_ends(text in "(Bearer|Basic|realm|=|\"|,| |\\\\|\\PC){0,40}") {
            let _ = parse_challenges(&text);
        }

        #[test]
        fn quoted_values_come_back(realm in "[ -~]{1,30}", service in "[ -~]{1,30}") {
            let quote = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
            let header = format!("Bearer service=\"{}\", realm=\"{}\"", quote(&service), quote(&realm));
            prop_assert_eq!(parse_challenges(&header), [bearer(&realm, Some(&service), None)]);
        }
    }
}
