//! Any text as each of the small formats of the registry room: what a registry, an image or a configuration file may say. None panics.

#![no_main]

use lazuli::registry::image::{Command, Document, ImageConfig, Manifest};
use lazuli::registry::{attempts, auth, hosts, location, range, reference};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let _ = Document::parse(input);
    let _ = Manifest::parse(input);
    let _ = ImageConfig::parse(input);
    let _ = Command::parse(input);
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    if let Ok(parsed) = reference::parse_reference(text) {
        let again = reference::parse_reference(&parsed.to_string());
        assert_eq!(again.as_ref(), Ok(&parsed), "the full form names the same image");
    }
    let _ = hosts::parse_hosts_toml(text, std::path::Path::new("/etc/certs.d/x"));
    let _ = hosts::parse::parse_go_duration(text);
    let _ = auth::parse_challenges(text);
    let _ = auth::credentials::parse_docker_config(text);
    let head = range::Head {
        partial: text.len() % 2 == 0,
        content_range: Some(text),
        length: Some(text.len() as u64),
        ..range::Head::default()
    };
    if let Ok(range::Content::Part { start, end, .. }) = head.content(Some(&(100..200)), 1000) {
        assert!(
            start <= 100 && end.is_none_or(|end| end > 100),
            "it holds the first byte wanted"
        );
    }
    let _ = range::parse_unsatisfied(text);
    let _ = hosts::proxy::Proxies::new(|_| Some(text.to_owned()));
    let _ = attempts::parse_retry_after(text, std::time::SystemTime::UNIX_EPOCH);
    if let Ok(url) = text.parse() {
        let _ = location::parse_expiry(&url, std::time::SystemTime::UNIX_EPOCH.into());
    }
});
