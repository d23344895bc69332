//! What a file may say, and what it is told.

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("test.toml"))
}

#[test]
fn defaults_are_valid_and_round_trip() {
    let config = Config::default();
    config.check().unwrap();
    let text = toml::to_string(&config).unwrap();
    assert_eq!(parse(&text).unwrap(), config);
    assert_eq!(parse("").unwrap(), config);
}

#[test]
fn sizes_have_units() {
    for (text, bytes) in [
        ("0", 0),
        ("512MiB", 512 << 20),
        ("20 GB", 20_000_000_000),
        ("7B", 7),
        ("1TiB", 1 << 40),
    ] {
        assert_eq!(text.parse::<ByteSize>().unwrap().0, bytes, "{text}");
    }
    for text in ["", "GiB", "-1", "1.5GiB", "99999999999TiB", "10 bananas"] {
        assert!(text.parse::<ByteSize>().is_err(), "{text}");
    }
    assert_eq!(
        parse("[cache]\nmax_size = \"10GiB\"").unwrap().cache.max_size.0,
        10 << 30
    );
    assert_eq!(parse("[cache]\nmax_size = 10").unwrap().cache.max_size.0, 10);
}

#[test]
fn legacy_formats_have_to_be_allowed() {
    assert!(!parse("").unwrap().formats.allow_legacy_estargz);
    let allowed = parse("[formats]\nallow_legacy_estargz = true").unwrap();
    assert!(allowed.formats.allow_legacy_estargz);
}

#[test]
fn mistakes_are_named() {
    for (text, expected) in [
        ("rooot = \"/x\"", "rooot"),
        ("root = \"x\"", "root: x is not an absolute path"),
        ("root = \"/a:b\"", "root: /a:b may not contain"),
        ("admin_address = \"localhost\"", "127.0.0.1:8987"),
        ("[log]\nformat = \"xml\"", "xml"),
        ("[log]\nlevel = \"a=b=c\"", "log.level"),
        (
            "[registry]\nattempts = 0",
            "registry.attempts: 0 is not between 1 and 100",
        ),
        ("[fetch]\nmax_request = \"1GiB\"", "fetch.max_request"),
        ("[fuse]\nthreads = 65", "fuse.threads"),
        (
            "[cache]\nhigh_percent = 101",
            "cache.high_percent: 101 is not between 2 and 100",
        ),
        (
            "[cache]\nhigh_percent = 75",
            "cache.low_percent: 75 is not between 1 and 74",
        ),
        (
            "[cache]\nlow_percent = 0",
            "cache.low_percent: 0 is not between 1 and 79",
        ),
        ("[cache]\nlow_percent = \"70%\"", "low_percent"),
        (
            "[index]\nlookup_deadline = 0",
            "index.lookup_deadline: 0 is not between 1 and 60",
        ),
        ("[index]\nrepository = \"r.example\"", "index.repository"),
        ("[index]\nrepository = \"r.example/a:tag\"", "without a tag"),
        ("[index]\ntrusted_repositories = [\"*\"]", "index.trusted_repositories"),
        ("[index]\ntrusted_repositories = [\"r.example/a*\"]", "\"r.example/a*\""),
        (
            "[index]\nrequire_signature = true",
            "index.require_signature: it needs a key",
        ),
        ("[index]\npublsh = true", "publsh"),
        ("root = ", "line 1"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn index_repositories_are_read() {
    let text = "[index]\nrepository = \"r.example:5000/a/b\"\npublish = true\nsigning_key = \"/k\"\npublic_keys = [\"/p\"]\n\
                require_signature = true\ntrusted_repositories = [\"r.example/x\", \"r.example/y/*\", \"127.0.0.1:5000/*\"]";
    let index = parse(text).unwrap().index;
    assert!(index.enabled && index.publish && index.require_signature);
    assert_eq!(index.repository, "r.example:5000/a/b");
    assert_eq!(index.trusted_repositories.len(), 3);
    assert_eq!(index.signing_key.as_deref(), Some(Path::new("/k")));
}

#[test]
fn passwords_do_not_appear() {
    let config = parse("[registry.credentials.\"r.example\"]\nusername = \"u\"\npassword = \"hunter2\"").unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
    assert!(!toml::to_string(&config).unwrap().contains("hunter2"));
}

#[test]
fn a_face_is_chosen_by_its_name() {
    assert_eq!(parse("").unwrap().fuse.face, FaceChoice::Auto);
    for (name, face) in [
        ("auto", FaceChoice::Auto),
        ("image", FaceChoice::Image),
        ("tree", FaceChoice::Tree),
    ] {
        assert_eq!(parse(&format!("[fuse]\nface = \"{name}\"")).unwrap().fuse.face, face);
    }
    let error = parse("[fuse]\nface = \"erofs\"").unwrap_err().to_string();
    assert!(error.contains("`auto`, `image`, `tree`"), "{error}");
}

#[test]
fn admin_address_can_be_switched_off() {
    assert_eq!(parse("admin_address = \"\"").unwrap().admin_address, None);
}
