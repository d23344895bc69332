//! The order of the rooms, and where `unsafe` may stand. `src/lib.rs` draws the order; this test reads the source and holds it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What each room may use besides itself: every room to its right, and what stands beside all rooms.
const ROOMS: [(&str, &[&str]); 17] = [
    ("cli", ABOVE),
    ("daemon", ABOVE),
    ("admin", ABOVE),
    (
        "snapshots",
        &["catalog", "fs", "store", "fetch", "cache", "registry", "layer", "sys"],
    ),
    (
        "catalog",
        &["fs", "store", "fetch", "cache", "registry", "layer", "sys"],
    ),
    ("fs", &["fetch", "cache", "registry", "layer", "sys"]),
    ("store", &["fetch", "cache", "registry", "layer", "sys"]),
    ("fetch", &["cache", "registry", "layer", "sys"]),
    ("cache", &["layer", "sys"]),
    ("registry", &["layer", "sys"]),
    ("layer", &["sys"]),
    ("sys", &[]),
    ("config", &[]),
    ("metrics", &[]),
    ("sync", &[]),
    ("proto", &[]),
    ("main", ABOVE),
];
const ABOVE: &[&str] = &[
    "cli",
    "daemon",
    "admin",
    "snapshots",
    "catalog",
    "fs",
    "store",
    "fetch",
    "cache",
    "registry",
    "layer",
    "sys",
];
const BESIDE: [&str; 4] = ["config", "metrics", "sync", "proto"];
/// Lines after which a file is two files.
const LONGEST_FILE: usize = 1000;

/// All source files with their room and text.
fn sources() -> Vec<(PathBuf, String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut directories = vec![root.clone()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).expect("src can be listed") {
            let path = entry.expect("src can be listed").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let relative = path.strip_prefix(&root).expect("it was found below src");
                let first = relative.components().next().expect("a file has a name");
                let room = Path::new(first.as_os_str()).with_extension("").display().to_string();
                let text = std::fs::read_to_string(&path).expect("a source file can be read");
                found.push((path, room, text));
            }
        }
    }
    found
}

/// Rooms that a text names: `crate::room`, also within `use crate::{a, b::c}`. Comments do not count.
fn rooms_named(text: &str) -> Vec<String> {
    let code: String = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let mut named = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        // `$crate::` and `some_crate::` are other things.
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => named.extend(top_level_names(group)),
            None => named.push(identifier(rest)),
        }
    }
    named
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// First identifiers of the parts of a `{...}` group, whose opening brace is already gone.
fn top_level_names(group: &str) -> Vec<String> {
    let (mut depth, mut names, mut part) = (0, Vec::new(), String::new());
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(identifier(std::mem::take(&mut part).trim())),
            _ if depth == 0 => part.push(c),
            _ => {}
        }
    }
    names.push(identifier(part.trim()));
    names.retain(|name| !name.is_empty());
    names
}

#[test]
fn rooms_use_only_rooms_to_their_right() {
    let allowed: BTreeMap<&str, &[&str]> = ROOMS.into_iter().collect();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for (path, room, text) in sources() {
        if room == "lib" {
            continue;
        }
        let Some(allowed) = allowed.get(room.as_str()) else {
            wrong.push(format!("{}: no room is called {room}", path.display()));
            continue;
        };
        for used in rooms_named(&text) {
            checked += 1;
            let known = ROOMS.iter().any(|(name, _)| *name == used);
            if known && used != room && !BESIDE.contains(&used.as_str()) && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{}: {room} uses {used}", path.display()));
            }
        }
    }
    assert!(
        checked > 100,
        "only {checked} uses were found; the test no longer reads the source as it is written"
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_stands_in_sys_alone_and_is_justified() {
    let mut wrong = Vec::new();
    for (path, room, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let is_unsafe = code
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .any(|word| word == "unsafe");
            let reasoned = lines[number.saturating_sub(5)..number]
                .iter()
                .any(|line| line.contains("SAFETY:"));
            if is_unsafe && (room != "sys" || !reasoned) {
                wrong.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_file_is_endless() {
    let long: Vec<String> = sources()
        .into_iter()
        .map(|(path, _, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > LONGEST_FILE)
        .map(|(path, lines)| format!("{}: {lines} lines", path.display()))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn the_reader_of_uses_is_right() {
    let text = "use crate::a::B;\nuse crate::{c, d::{e, f}, g::H};\n// crate::no\nlet x = crate::i::j(); $crate::no; my_crate::no;";
    assert_eq!(rooms_named(text), ["a", "c", "d", "g", "i"]);
}
