//! Any text as a list filter of containerd, and as a configuration file. None panics.

#![no_main]

use std::path::Path;

use lazuli::config::Config;
use lazuli::snapshots::Filters;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = Filters::parse(&[text.to_owned()]);
    if let Ok(config) = Config::parse(text, Path::new("fuzz.toml")) {
        config.check().expect("what was parsed was checked");
    }
});
