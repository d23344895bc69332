//! What a Python module imports when it is loaded: statements outside of functions, as far as lines tell.
//!
//! Blocks of `if` and `try` are read as if they ran, but for `if TYPE_CHECKING`. Functions are passed over: they run later, or never. Classes
//! too, since hardly any imports.

/// Bytes of a module that are read: imports are at its beginning.
pub const MAX_MODULE: u64 = 256 << 10;
/// Imports of a module that are followed.
pub const MAX_IMPORTS: usize = 512;
/// Names of one import.
pub const MAX_NAMES: usize = 256;

/// One statement.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Import {
    /// How many packages up it begins: 0 is absolute.
    pub level: u32,
    /// The module; empty for `from . import name`.
    pub module: String,
    /// What is taken from it: these may be modules as well. Empty for `import module`.
    pub names: Vec<String>,
}

/// The imports of a module with this text.
pub fn imports(text: &[u8]) -> Vec<Import> {
    let text = String::from_utf8_lossy(text);
    let mut found = Vec::new();
    let mut lines = text.lines();
    // The indentation of a block that is passed over, and the quotes of a text that goes on.
    let (mut passed, mut quotes) = (None, None);
    while let Some(line) = lines.next() {
        if found.len() >= MAX_IMPORTS {
            break;
        }
        if let Some(end) = quotes {
            if line.contains(end) {
                quotes = None;
            }
            continue;
        }
        let trimmed = line.trim_start();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let indent = line.len() - trimmed.len();
        if passed.is_some_and(|block| indent > block) {
            quotes = opened(trimmed);
            continue;
        }
        passed = None;
        let is_passed = [
            "def ",
            "class ",
            "async def ",
            "if TYPE_CHECKING",
            "if typing.TYPE_CHECKING",
        ];
        if is_passed.iter().any(|start| trimmed.starts_with(start)) {
            passed = Some(indent);
            quotes = opened(trimmed);
            continue;
        }
        if !(trimmed.starts_with("import ") || trimmed.starts_with("from ")) {
            quotes = opened(trimmed);
            // What stands on one line, as in `-c`.
            for statement in trimmed.split(';').skip(1).take(MAX_NAMES) {
                found.extend(statement_of(statement.trim()));
            }
            continue;
        }
        let mut whole = without_comment(trimmed).to_owned();
        if whole.contains('(') {
            while !whole.contains(')')
                && let Some(next) = lines.next()
                && whole.len() < MAX_MODULE as usize
            {
                whole.push(' ');
                whole.push_str(without_comment(next));
            }
        }
        while whole.ends_with('\\')
            && let Some(next) = lines.next()
        {
            whole.pop();
            whole.push(' ');
            whole.push_str(without_comment(next).trim());
        }
        for statement in whole.split(';').take(MAX_NAMES) {
            found.extend(statement_of(statement.trim()));
        }
    }
    found.truncate(MAX_IMPORTS);
    found
}

/// The end of a text that begins on this line and does not end there.
fn opened(line: &str) -> Option<&'static str> {
    let (first, quotes) = ["\"\"\"", "'''"]
        .into_iter()
        .filter_map(|quotes| Some((line.find(quotes)?, quotes)))
        .min()?;
    let after = &line[first + quotes.len()..];
    (after.matches(quotes).count() % 2 == 0).then_some(quotes)
}

fn without_comment(line: &str) -> &str {
    line.split('#').next().unwrap_or_default().trim_end()
}

fn is_name(text: &str) -> bool {
    let is_first = |c: char| c.is_alphabetic() || c == '_';
    text.starts_with(is_first) && text.chars().all(|c| c.is_alphanumeric() || c == '_')
}

fn is_path(text: &str) -> bool {
    text.split('.').all(is_name)
}

fn statement_of(statement: &str) -> Vec<Import> {
    let first = |text: &str| text.split_whitespace().next().unwrap_or_default().to_owned();
    if let Some(modules) = statement.strip_prefix("import ") {
        let modules = modules.split(',').take(MAX_NAMES).map(first);
        return modules
            .filter(|module| is_path(module))
            .map(|module| Import {
                module,
                ..Import::default()
            })
            .collect();
    }
    let Some(rest) = statement.strip_prefix("from ") else {
        return Vec::new();
    };
    let Some((module, names)) = rest.split_once(" import") else {
        return Vec::new();
    };
    let module = module.trim();
    let level = module.bytes().take_while(|&byte| byte == b'.').count();
    let module = module[level..].trim();
    if !(module.is_empty() && level > 0 || is_path(module)) {
        return Vec::new();
    }
    let names = names.trim_matches(|c: char| c.is_whitespace() || c == '(' || c == ')');
    let names = names.split(',').take(MAX_NAMES).map(first);
    vec![Import {
        level: level as u32,
        module: module.to_owned(),
        names: names.filter(|name| is_name(name)).collect(),
    }]
}
