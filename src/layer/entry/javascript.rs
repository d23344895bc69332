//! What a JavaScript module loads: `require("x")`, `import ... from "x"`, and the file that a `package.json` names.
//!
//! Whoever calls `require` in a function does so when that runs, and often at once; so all of them count. What is not a text as it stands does not.

use serde::Deserialize;
use serde_json::Value;

/// Bytes of a module that are read.
pub const MAX_MODULE: u64 = 1 << 20;
/// Longest `package.json` that is read, in bytes.
pub const MAX_PACKAGE: u64 = 256 << 10;
/// Modules that one module loads.
const MAX_REQUIRED: usize = 512;
/// Longest name of a module.
const MAX_NAME: usize = 512;
/// Conditions within conditions of `exports`.
const MAX_CONDITIONS: usize = 8;

/// The names of modules that this text loads, in order.
pub fn required(text: &[u8]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in text.split(|&byte| byte == b'\n') {
        let trimmed = line.trim_ascii_start();
        if trimmed.starts_with(b"//") || trimmed.starts_with(b"*") {
            continue;
        }
        for (word, calls) in [(&b"require"[..], true), (b"from", false), (b"import", false)] {
            for at in positions(line, word) {
                if found.len() >= MAX_REQUIRED {
                    return found;
                }
                let mut rest = line[at + word.len()..].trim_ascii_start();
                if calls {
                    match rest.strip_prefix(b"(") {
                        Some(argument) => rest = argument.trim_ascii_start(),
                        None => continue,
                    }
                }
                if let Some(name) = quoted(rest)
                    && !found.iter().any(|known| known == name)
                {
                    found.push(name.to_owned());
                }
            }
        }
    }
    found
}

/// Where a word is in a line, as a word.
fn positions<'a>(line: &'a [u8], word: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    let is_part =
        |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'.'));
    let windows = line.windows(word.len()).enumerate();
    windows
        .filter(move |(at, found)| {
            let before = at.checked_sub(1).and_then(|at| line.get(at));
            *found == word && !is_part(before) && !is_part(line.get(at + word.len()))
        })
        .map(|(at, _)| at)
}

fn quoted(text: &[u8]) -> Option<&str> {
    let (&quote, rest) = text.split_first()?;
    if !matches!(quote, b'"' | b'\'') {
        return None;
    }
    let end = rest.iter().take(MAX_NAME).position(|&byte| byte == quote)?;
    let name = std::str::from_utf8(&rest[..end]).ok()?;
    (!name.is_empty() && !name.contains('\\')).then_some(name)
}

/// The file that a package is loaded from, relative to it, if its `package.json` names one.
pub fn main(package: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Package {
        #[serde(default)]
        main: Value,
        #[serde(default)]
        exports: Value,
    }
    let package: Package = serde_json::from_slice(package).ok()?;
    let exports = match &package.exports {
        Value::Object(exports) if exports.contains_key(".") => exports.get("."),
        exports => Some(exports),
    };
    let exported = exports.and_then(|exports| chosen(exports, 0));
    exported.or_else(|| package.main.as_str().map(str::to_owned))
}

/// What of the conditions of `exports` holds for a program that requires it.
fn chosen(exports: &Value, depth: usize) -> Option<String> {
    match exports {
        Value::String(path) => Some(path.clone()),
        Value::Object(conditions) if depth < MAX_CONDITIONS => {
            let known = ["node", "require", "default", "import"];
            let found = known.iter().filter_map(|condition| conditions.get(*condition));
            found.into_iter().find_map(|exports| chosen(exports, depth + 1))
        }
        _ => None,
    }
}
