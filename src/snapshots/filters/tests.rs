//! Tests of the filter language. The expectations are those of containerd's own parser, which was compared over many
//! random filters.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// `parent` is empty, `name` is `n/1/k`, and labels are what they are.
struct Sample(BTreeMap<String, String>);

impl Fields for Sample {
    fn field(&self, path: &[Vec<u8>]) -> Option<&[u8]> {
        let (first, rest) = path.split_first()?;
        match first.as_slice() {
            b"name" => Some(b"n/1/k"),
            b"parent" => Some(b""),
            b"labels" => {
                let key = String::from_utf8(rest.join(&b'.')).ok()?;
                self.0.get(&key).map(String::as_bytes)
            }
            _ => None,
        }
    }
}

fn sample() -> Sample {
    let labels = [
        ("l", "2"),
        ("a.b", "x y"),
        ("containerd.io/snapshot.ref", "sha256:ab"),
        ("quote", r#""\"#),
        ("umlaut", "é"),
    ];
    Sample(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into())
}

fn parse(filters: &[&str]) -> Result<Filters, FilterError> {
    Filters::parse(&filters.iter().map(|&filter| filter.to_owned()).collect::<Vec<_>>())
}

fn matches(filter: &str) -> bool {
    parse(&[filter])
        .unwrap_or_else(|error| panic!("{error}"))
        .matches(&sample())
}

#[test]
fn matching() {
    for filter in [
        "",
        "name",
        "name==n/1/k",
        "name == n/1/k",
        r#"parent=="""#,
        "labels.l",
        "labels.l==2,name!=other",
        r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="""#,
        r#"labels.a.b=="x y""#,
        r#"labels."a.b""#,
        r#"labels.quote=="\"\\""#,
        r#"labels.umlaut=="\u00e9""#,
        r#"labels.umlaut=="\303\xa9""#,
        "labels.umlaut==é",
        "name~=^n/",
        "name~=/^n.1.k$/",
        "name~=|/1/|",
        r#"name~="k$""#,
        // An absent field is the empty text here.
        "labels.none!=x",
        "labels.none~=^$",
    ] {
        assert!(matches(filter), "{filter}");
    }
    for filter in [
        "labels",
        "labels.none",
        "nothing",
        "name==n",
        "labels.l==2,name==other",
        r#"labels.none=="""#,
        r#"labels.none!="""#,
        r#"parent!="""#,
        "name~=^k",
    ] {
        assert!(!matches(filter), "{filter}");
    }
}

#[test]
fn one_of_several_filters_is_enough() {
    for (filters, expected) in [
        (&[] as &[&str], true),
        (&["name==other", "labels.l==2"], true),
        (&["name==other", "labels.l==3"], false),
        (&["name==other", ""], true),
    ] {
        assert_eq!(parse(filters).unwrap().matches(&sample()), expected, "{filters:?}");
    }
}

#[test]
fn errors_say_where_and_what() {
    for (filter, offset, problem) in [
        ("name=x", 5, "no operator"),
        ("name===x", 7, "no operator"),
        ("name==", 6, "expected a value"),
        ("name== =x", 7, "expected a value"),
        ("name==x y", 7, "comma"),
        ("name==.x", 6, "expected a value"),
        ("name==x,", 8, "name of a field"),
        (",", 0, "name of a field"),
        ("name x", 5, "operators"),
        ("labels.", 7, "name of a field"),
        ("labels./x/", 7, "name of a field"),
        ("name==/x/", 6, "only a regular expression"),
        ("name==\"x", 8, "does not end"),
        ("name==\"x\ny\"", 9, "does not end"),
        ("name==\"\0\"", 8, "NUL"),
        (r#"name=="\q""#, 9, "escape"),
        (r#"name=="\'""#, 9, "escape"),
        (r#"name=="\x4""#, 11, "2 digits"),
        (r#"name=="\400""#, 11, "octal"),
        (r#"name=="\UFFFFFFFF""#, 17, "10FFFF"),
        (r"name~=/\d/", 9, "escape"),
        ("name~=[", 7, "unclosed character class"),
        (r#"name~="\xff""#, 12, "UTF-8"),
        ("name~=(x{9999}){9999}", 21, "bad regular expression"),
    ] {
        let error = parse(&[filter]).unwrap_err();
        assert!(error.problem.contains(problem), "{filter}: {error}");
        assert_eq!(error.offset, offset, "{filter}: {error}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}

#[test]
fn what_a_field_must_equal_is_told_only_if_it_must() {
    for (filters, expected) in [
        (&[r#"labels.l==2,parent=="p""#] as &[&str], Some("p")),
        (&[r#"parent=="""#], Some("")),
        (&["parent!=p"], None),
        (&["parent~=p"], None),
        (&["name==p"], None),
        (&["parent.x==p"], None),
        (&["parent==p", "name==x"], None),
        (&[], None),
    ] {
        assert_eq!(parse(filters).unwrap().equals("parent"), expected, "{filters:?}");
    }
}

/// A text as Go's `%q` writes it.
fn go_quote(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str(r"\n"),
            c if c.is_ascii_control() => quoted.push_str(&format!(r"\x{:02x}", u32::from(c))),
            c if c.is_control() => quoted.push_str(&format!(r"\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

proptest! {
    #[test]
    fn any_text_survives_quoting(key in any::<String>(), value in any::<String>()) {
        let filters = Filters::parse(&[format!("labels.{}=={}", go_quote(&key), go_quote(&value))]).unwrap();
        let one = |key: &str, value: &str| Sample([(key.to_owned(), value.to_owned())].into());
        prop_assert!(filters.matches(&one(&key, &value)));
        let (other_key, other_value) = (key.clone() + "x", value.clone() + "x");
        prop_assert!(!filters.matches(&one(&key, &other_value)));
        prop_assert!(!filters.matches(&one(&other_key, &value)));
    }

    #[test]
    fn nothing_panics(filter in any::<String>()) {
        if let Ok(filters) = Filters::parse(&[filter]) {
            filters.matches(&sample());
        }
    }

    #[test]
    fn nothing_made_of_its_own_signs_panics(
        signs in proptest::collection::vec(
            prop::sample::select(vec![
                "name", "labels", "a", ".", ",", "==", "!=", "~=", "=", "\"", "/", "|", r"\", r"\x4", r"\u", "1", " ",
            ]),
            0..12,
        )
    ) {
        let filter = signs.concat();
        match Filters::parse(std::slice::from_ref(&filter)) {
            Ok(filters) => drop(filters.matches(&sample())),
            Err(error) => prop_assert!(error.offset <= filter.len()),
        }
    }
}
