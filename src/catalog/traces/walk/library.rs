//! What the modules of Python's own library import, known beforehand.
//!
//! Modules of the library lie in one directory, of which a program needs a quarter, and name each other in long rows: looked into one after the other, each
//! would be a request of its own, and wait for the one before. What they import hardly changes from one version to the next; so all that follows from a
//! module is wished for as soon as the module is named, in a few requests. The files are looked into all the same when they are
//! here, which costs no request, and what a version imports besides is followed then. A module that a version does not have is not found.

use std::collections::HashMap;
use std::sync::LazyLock;

/// A line for each module of CPython 3.11 that imports others when it is imported itself: those of them that are read from files.
/// `benches/tools/python_library.py` writes it.
const IMPORTS: &str = include_str!("library.txt");

static LIBRARY: LazyLock<HashMap<&str, &str>> =
    LazyLock::new(|| IMPORTS.lines().filter_map(|line| line.split_once(": ")).collect());

/// What a module of the library imports; `None` if that is not known.
pub(super) fn imported(module: &str) -> Option<impl Iterator<Item = &'static str> + use<>> {
    LIBRARY.get(module).map(|names| names.split(' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_names_a_module_and_others() {
        assert_eq!(LIBRARY.len(), IMPORTS.lines().count());
        for (module, names) in LIBRARY.iter() {
            let is_name = |name: &str| {
                let parts = name.split('.');
                parts.clone().all(|part| !part.is_empty())
                    && name
                        .bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte))
            };
            assert!(is_name(module), "{module}");
            assert!(
                names.split(' ').all(|name| is_name(name) && name != *module),
                "{module}: {names}"
            );
        }
    }

    #[test]
    fn what_follows_from_a_module_is_known_without_looking_into_it() {
        let imports: Vec<&str> = imported("pickle").unwrap().collect();
        assert!(
            imports.contains(&"struct") && imports.contains(&"_compat_pickle"),
            "{imports:?}"
        );
        assert!(imported("no such module").is_none());
    }
}
