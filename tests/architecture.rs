//! The house keeps its order: which room uses which, where `unsafe` stands, how long files are.
//!
//! The sources are read as tokens, without comments, strings and characters, and every path that begins at the crate's root
//! (`crate::x`, `crate::{x, y}`, or `super::x` from a place where that leads to the root) is a use of room `x`. Tests count like any
//! other code: a test that needs a room which its own may not use is an integration test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Rooms from left to right; those of one step may not use each other. Each may use the ones of later steps.
const ORDER: [&[&str]; 7] = [
    &["snapshots"],
    &["catalog"],
    &["fs", "store"],
    &["fetch"],
    &["cache", "registry"],
    &["layer"],
    &["sys"],
];
/// Usable by all; of the rooms they use only each other.
const BESIDE: [&str; 3] = ["config", "metrics", "sync"];
/// Generated from `proto/`; uses nothing.
const GENERATED: &str = "proto";
/// May use everything, and nothing else may use them.
const ABOVE: [&str; 3] = ["cli", "daemon", "admin"];
/// What the tests of all rooms share; the library itself does not have it.
const FOR_TESTS: &str = "skip";
/// Files that belong to no room: the crate's root and the program.
const NO_ROOM: [&str; 2] = ["lib", "main"];
/// The only room with `unsafe`.
const UNSAFE_ROOM: &str = "sys";
/// Most lines of a file. 600 is a smell; this is the end.
const MAX_LINES: usize = 1000;
/// Lines above an `unsafe` in which its `SAFETY:` comment is looked for.
const SAFETY_REACH: usize = 8;

/// A source file.
struct Source {
    path: PathBuf,
    text: String,
    /// Modules between the crate's root and the file: 1 for `src/x.rs`, 2 for `src/x/y.rs`.
    depth: usize,
    room: String,
}

/// All sources in a directory of the package, and below it.
fn rust_files(dir: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    assert!(found.len() > 20, "only {} source files in {dir}", found.len());
    found.sort();
    found
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let source = |path: PathBuf| {
        let relative = path.strip_prefix(&root).unwrap().with_extension("");
        let modules: Vec<String> = relative
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        let room = modules[0].clone();
        let depth = if NO_ROOM.contains(&room.as_str()) {
            0
        } else {
            modules.len()
        };
        let text = fs::read_to_string(&path).unwrap();
        Source {
            path,
            text,
            depth,
            room,
        }
    };
    rust_files("src").into_iter().map(source).collect()
}

/// Identifiers, and each other character that is no blank, with the line they stand in. `::` is one token.
fn tokens(text: &str) -> Vec<(usize, String)> {
    let characters: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let (mut at, mut line) = (0, 1);
    let peek = |at: usize| characters.get(at).copied().unwrap_or('\0');
    while at < characters.len() {
        let start = at;
        match peek(at) {
            '/' if peek(at + 1) == '/' => {
                while at < characters.len() && peek(at) != '\n' {
                    at += 1;
                }
            }
            '/' if peek(at + 1) == '*' => {
                let mut nested = 0;
                loop {
                    match (peek(at), peek(at + 1)) {
                        ('/', '*') => (nested, at) = (nested + 1, at + 2),
                        ('*', '/') => (nested, at) = (nested - 1, at + 2),
                        _ => at += 1,
                    }
                    if nested == 0 || at >= characters.len() {
                        break;
                    }
                }
            }
            '"' => at = end_of_string(&characters, at),
            '\'' => {
                // A character ('x', '\n', '\''), or the beginning of a lifetime.
                if peek(at + 1) == '\\' {
                    at += 3;
                    while at < characters.len() && peek(at) != '\'' {
                        at += 1;
                    }
                    at += 1;
                } else if peek(at + 2) == '\'' {
                    at += 3;
                } else {
                    at += 1;
                }
            }
            first if first.is_alphabetic() || first == '_' => {
                while peek(at).is_alphanumeric() || peek(at) == '_' {
                    at += 1;
                }
                let word: String = characters[start..at].iter().collect();
                let hashes = (at..).take_while(|at| peek(*at) == '#').count();
                if ["r", "br", "cr"].contains(&word.as_str()) && peek(at + hashes) == '"' {
                    at = end_of_raw_string(&characters, at + hashes + 1, hashes);
                } else {
                    tokens.push((line, word));
                }
            }
            ':' if peek(at + 1) == ':' => {
                tokens.push((line, "::".to_owned()));
                at += 2;
            }
            blank if blank.is_whitespace() => at += 1,
            other => {
                tokens.push((line, other.to_string()));
                at += 1;
            }
        }
        let end = at.min(characters.len());
        line += characters[start..end]
            .iter()
            .filter(|character| **character == '\n')
            .count();
    }
    tokens
}

fn end_of_string(characters: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < characters.len() && characters[at] != '"' {
        at += if characters[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

fn end_of_raw_string(characters: &[char], start: usize, hashes: usize) -> usize {
    let closes = |at: usize| {
        let rest = characters.get(at + 1..at + 1 + hashes);
        characters[at] == '"' && rest.is_some_and(|rest| rest.iter().all(|character| *character == '#'))
    };
    let end = (start..characters.len())
        .find(|at| closes(*at))
        .unwrap_or(characters.len());
    end + 1 + hashes
}

/// Rooms that a file names by a path from the crate's root, with their lines.
fn uses(text: &str, depth: usize) -> Vec<(usize, String)> {
    let tokens = tokens(text);
    let word = |at: usize| tokens.get(at).map_or("", |(_, word)| word.as_str());
    let mut found = Vec::new();
    // For each open brace, whether it is that of a module.
    let mut braces = Vec::new();
    for at in 0..tokens.len() {
        match word(at) {
            "{" => braces.push(at >= 2 && word(at - 2) == "mod"),
            "}" => {
                braces.pop();
            }
            // `pub(crate)` is no path; `$crate` and `x::super` do not occur.
            "crate" if word(at + 1) == "::" => first_names(&tokens, at + 2, &mut found),
            "super" if at == 0 || word(at - 1) != "::" => {
                let mut next = at;
                let mut levels = 0;
                while word(next) == "super" && word(next + 1) == "::" {
                    (levels, next) = (levels + 1, next + 2);
                }
                let inner = braces.iter().filter(|module| **module).count();
                if levels > 0 && levels == depth + inner {
                    first_names(&tokens, next, &mut found);
                }
            }
            _ => {}
        }
    }
    found
}

/// The name at `at`, or the first name of each path of the group that begins there.
fn first_names(tokens: &[(usize, String)], at: usize, found: &mut Vec<(usize, String)>) {
    let word = |at: usize| tokens.get(at).map_or("", |(_, word)| word.as_str());
    if word(at) != "{" {
        found.extend(tokens.get(at).cloned());
        return;
    }
    let mut level = 0;
    let mut before = "";
    for token in &tokens[at..] {
        let begins = level == 1 && ["{", ","].contains(&before);
        match token.1.as_str() {
            "{" => level += 1,
            "}" => level -= 1,
            _ if begins => found.push(token.clone()),
            _ => {}
        }
        if level == 0 {
            break;
        }
        before = token.1.as_str();
    }
}

fn step(room: &str) -> Option<usize> {
    ORDER.iter().position(|rooms| rooms.contains(&room))
}

/// Whether a room may use another.
fn may_use(room: &str, other: &str) -> bool {
    if room == other || other == FOR_TESTS || ABOVE.contains(&room) || NO_ROOM.contains(&room) {
        return true;
    }
    if ABOVE.contains(&other) {
        return false;
    }
    if room == GENERATED {
        return false;
    }
    if BESIDE.contains(&other) || (other == GENERATED && step(room).is_some()) {
        return true;
    }
    match (step(room), step(other)) {
        (Some(room), Some(other)) => room < other,
        _ => false,
    }
}

/// Every room that exists, as `lib.rs` declares it.
fn declared_rooms() -> BTreeSet<String> {
    let lib = sources()
        .into_iter()
        .find(|source| source.room == "lib")
        .expect("src/lib.rs exists");
    let tokens = tokens(&lib.text);
    let pairs = tokens.windows(2).filter(|pair| pair[0].1 == "mod");
    pairs.map(|pair| pair[1].1.clone()).collect()
}

#[test]
fn rooms_use_only_rooms_to_their_right() {
    let rooms = declared_rooms();
    let mut wrong = Vec::new();
    for source in sources() {
        for (line, other) in uses(&source.text, source.depth) {
            // `crate::Something` of lib.rs itself would be no room; there is no such thing.
            if !rooms.contains(&other) || !may_use(&source.room, &other) {
                wrong.push(format!(
                    "{}:{line}: {} uses {other}",
                    source.path.display(),
                    source.room
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "not in this order:\n{}", wrong.join("\n"));
}

#[test]
fn every_room_has_its_place() {
    let known: BTreeSet<String> = ORDER
        .iter()
        .flat_map(|rooms| rooms.iter())
        .chain(&BESIDE)
        .chain(&ABOVE)
        .chain([&GENERATED, &FOR_TESTS])
        .map(|room| (*room).to_owned())
        .collect();
    assert_eq!(declared_rooms(), known);
    for source in sources() {
        assert!(
            known.contains(&source.room) || NO_ROOM.contains(&source.room.as_str()),
            "{} belongs to no room",
            source.path.display()
        );
    }
}

/// The order of the rooms excludes most cycles by itself; the rooms beside and above it could still have one.
#[test]
fn rooms_use_each_other_in_no_circle() {
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources()
        .iter()
        .filter(|source| !NO_ROOM.contains(&source.room.as_str()))
    {
        let used = uses(&source.text, source.depth).into_iter().map(|(_, other)| other);
        let others = used.filter(|other| *other != source.room);
        graph.entry(source.room.clone()).or_default().extend(others);
    }
    while let Some(leaf) = graph
        .iter()
        .find(|(_, used)| used.iter().all(|room| !graph.contains_key(room)))
    {
        let leaf = leaf.0.clone();
        graph.remove(&leaf);
    }
    assert!(graph.is_empty(), "these rooms use each other in a circle: {graph:?}");
}

#[test]
fn unsafe_stands_in_one_room_and_says_why() {
    for source in sources() {
        let lines: Vec<&str> = source.text.lines().collect();
        for (line, _) in tokens(&source.text).iter().filter(|(_, word)| word == "unsafe") {
            let place = format!("{}:{line}", source.path.display());
            assert_eq!(source.room, UNSAFE_ROOM, "{place}: unsafe outside src/{UNSAFE_ROOM}");
            let above = &lines[line.saturating_sub(SAFETY_REACH + 1)..*line];
            let said = above
                .iter()
                .any(|line| line.contains("SAFETY:") || line.contains("# Safety"));
            assert!(said, "{place}: an unsafe without its SAFETY comment");
        }
    }
}

#[test]
fn files_are_short_and_say_what_they_are() {
    for source in sources() {
        let count = source.text.lines().count();
        assert!(
            count <= MAX_LINES,
            "{} has {count} lines, more than {MAX_LINES}",
            source.path.display()
        );
        // A file of tests is named for what it tests.
        let named = source.path.ends_with("tests.rs");
        assert!(
            named || source.text.starts_with("//!"),
            "{} does not say what it is",
            source.path.display()
        );
    }
}

#[test]
fn uses_are_found_wherever_they_hide() {
    let text = r##"
        // crate::not_this
        /* crate::nor /* crate::nested */ crate::this */
        pub(crate) use crate::{alpha, beta::{inner, crate_name}, gamma as other};
        fn f<'a>(x: &'a str) -> char { let _ = "crate::text \" crate::text"; let _ = r#"crate::raw"#; '"' }
        mod tests {
            use super::super::delta::Thing;
            use super::sibling;
            fn g() { crate::epsilon::call('\'', b"crate::bytes"); }
        }
        use super::zeta;
    "##;
    let found: Vec<String> = uses(text, 1).into_iter().map(|(_, room)| room).collect();
    assert_eq!(found, ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]);
    assert!(uses(text, 2).iter().all(|(_, room)| room != "delta" && room != "zeta"));
}

#[test]
fn the_order_is_the_one_that_is_meant() {
    for (room, other) in [
        ("snapshots", "sys"),
        ("fs", "fetch"),
        ("cache", "layer"),
        ("layer", "config"),
        ("cli", "fs"),
        ("store", "proto"),
    ] {
        assert!(may_use(room, other), "{room} may use {other}");
    }
    for (room, other) in [
        ("fs", "store"),
        ("store", "fs"),
        ("cache", "registry"),
        ("layer", "cache"),
        ("config", "layer"),
        ("proto", "config"),
        ("metrics", "proto"),
        ("catalog", "daemon"),
        ("sys", "layer"),
    ] {
        assert!(!may_use(room, other), "{room} may not use {other}");
    }
}

/// What docs/SPECIFICATION.md says enforces a promise is there, and promises without a test say so.
#[test]
fn promises_name_tests_that_exist() {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/SPECIFICATION.md");
    let text = fs::read_to_string(text).unwrap();
    let mut functions = BTreeSet::new();
    for dir in ["src", "tests"] {
        for file in rust_files(dir) {
            let tokens = tokens(&fs::read_to_string(file).unwrap());
            let pairs = tokens
                .windows(2)
                .filter(|pair| matches!(pair[0].1.as_str(), "fn" | "mod"));
            functions.extend(pairs.map(|pair| pair[1].1.clone()));
        }
    }
    let mut promises = 0;
    for row in text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| promise"))
    {
        let by = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let named: Vec<&str> = by.split('`').skip(1).step_by(2).collect();
        let unknown: Vec<_> = named
            .iter()
            .filter(|name| !name.starts_with("make ") && !functions.contains(**name))
            .collect();
        assert!(unknown.is_empty(), "there is no test {unknown:?} for: {row}");
        assert!(
            !named.is_empty() || by.starts_with("no test"),
            "nothing enforces: {row}"
        );
        promises += 1;
    }
    assert!(promises > 25, "{promises} promises were found");
}
