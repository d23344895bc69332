//! Parsers of what programs say, against files that were made by real tools or by hand, and against anything.

use proptest::prelude::*;

use super::elf::{Elf, HEAD_LEN, Links};
use super::python::Import;
use super::{javascript, libraries, pyc, python, script, text_at};

/// Any of the parsers, on anything.
fn all(bytes: &[u8]) {
    if let Some(elf) = Elf::parse(bytes) {
        let _ = (elf.interpreter(), elf.dynamic(), elf.loaded().count());
        let _ = elf.links(bytes);
    }
    let _ = libraries::find(bytes, "libc.so.6", 62, true);
    let _ = libraries::configured(bytes);
    let _ = script::interpreter(bytes);
    for command in script::commands(bytes) {
        assert!(!command.words.is_empty());
        let _ = (command.literal(), command.passes_on());
    }
    let _ = python::imports(bytes);
    let _ = pyc::imports(bytes);
    let _ = javascript::required(bytes);
    let _ = javascript::main(bytes);
    let _ = text_at(bytes, 3);
}

proptest! {
    #[test]
    fn anything_is_read_or_left(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        all(&bytes);
    }

    /// Beginnings that are right.
    #[test]
    fn anything_after_a_right_beginning(
        start in prop_oneof![
            Just(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0\x01\0\0\0".to_vec()),
            Just(b"\x7fELF\x01\x02\x01\0\0\0\0\0\0\0\0\0".to_vec()),
            Just(b"glibc-ld.so.cache1.1".to_vec()),
            Just(b"ld.so-1.7.0\0\x02\0\0\0".to_vec()),
            Just(b"#!".to_vec()),
            Just(b"\xa7\x0d\r\n\0\0\0\0\0\0\0\0\0\0\0\0\xe3".to_vec()),
        ],
        bytes in proptest::collection::vec(any::<u8>(), 0..512),
    ) {
        all(&[start, bytes].concat());
    }

    #[test]
    fn any_text_is_read(text in "(\\$\\(|\"|'|`|\\\\|;|\\||<<|\n| |exec|if|import |from | \\(|def |\"\"\"|require\\(|\\PC){0,60}") {
        all(text.as_bytes());
    }
}

/// This program itself: what any Linux loads.
/// Linkers put the names of libraries before or behind those of all symbols, of which large libraries have megabytes.
#[test]
fn names_are_found_at_either_end_of_a_long_table() {
    let links = |needed: &[u64], len| Links {
        needed: needed.to_vec(),
        texts: (1000, len),
        ..Links::default()
    };
    assert_eq!(links(&[1, 20], 5_000_000).used(), 1001..1020 + 4096);
    assert_eq!(links(&[4_999_000, 4_999_500], 5_000_000).used(), 5_000_000..5_001_000);
    assert_eq!(links(&[1, 20], 300).used(), 1001..1300);
    // Of what lies too far apart the beginning is read.
    assert_eq!(links(&[1, 4_999_500], 5_000_000).used(), 1000..1000 + (1 << 20));
    assert_eq!(links(&[u64::MAX], u64::MAX).used(), 1000..1000 + (1 << 20));
    assert_eq!(links(&[9], 0).used(), 1000..1000);
}

#[test]
fn a_real_program_says_what_it_loads() {
    let file = std::fs::read("/proc/self/exe").unwrap();
    let elf = Elf::parse(&file[..HEAD_LEN as usize]).unwrap();
    let part = |range: std::ops::Range<u64>| &file[range.start as usize..range.end as usize];
    let loader = text_at(part(elf.interpreter().unwrap()), 0).unwrap();
    assert!(loader.starts_with("/lib"), "{loader}");
    let links = elf.links(part(elf.dynamic().unwrap())).unwrap();
    let texts = part(links.texts.0..links.texts.0 + links.texts.1);
    let needed: Vec<_> = links.needed.iter().map(|&at| text_at(texts, at).unwrap()).collect();
    assert!(needed.iter().any(|name| name.starts_with("libc.")), "{needed:?}");
    let loaded: Vec<_> = elf.loaded().collect();
    assert!(loaded.iter().any(|segment| segment.is_code()));
    // Counts that are insane, and places outside of the file.
    let mut insane = file[..HEAD_LEN as usize].to_vec();
    insane[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
    assert_eq!(Elf::parse(&insane), None);
    let mut outside = file[..HEAD_LEN as usize].to_vec();
    outside[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(Elf::parse(&outside), None);
    assert_eq!(Elf::parse(&file[..60]), None);
    assert_eq!(elf.links(&[]), None);
}

/// A cache in the newer form with these libraries: name, path, flags, hardware.
pub fn cache(entries: &[(&str, &str, u32, u64)]) -> Vec<u8> {
    let mut cache = b"glibc-ld.so.cache1.1".to_vec();
    cache.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    cache.resize(48, 0);
    let (mut texts, mut at) = (Vec::new(), 48 + 24 * entries.len());
    for &(name, path, flags, hardware) in entries {
        cache.extend_from_slice(&flags.to_le_bytes());
        for text in [name, path] {
            cache.extend_from_slice(&(at as u32).to_le_bytes());
            texts.extend_from_slice(text.as_bytes());
            texts.push(0);
            at += text.len() + 1;
        }
        cache.extend_from_slice(&[0; 4]);
        cache.extend_from_slice(&hardware.to_le_bytes());
    }
    [cache, texts].concat()
}

#[test]
fn libraries_are_found_in_the_loaders_cache() {
    let new = cache(&[
        ("libz.so.1", "/usr/lib/glibc-hwcaps/x86-64-v3/libz.so.1", 0x303, 0),
        ("libz.so.1", "/opt/special/libz.so.1", 0x303, 1 << 62),
        ("libz.so.1", "/lib/x86_64-linux-gnu/libz.so.1", 0x303, 0),
        ("libz.so.1", "/lib/i386-linux-gnu/libz.so.1", 0x003, 0),
    ]);
    let find = |cache: &[u8], machine, is_wide| {
        let found = libraries::find(cache, "libz.so.1", machine, is_wide);
        found.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(find(&new, 62, true), ["/lib/x86_64-linux-gnu/libz.so.1"]);
    assert_eq!(find(&new, 3, false), ["/lib/i386-linux-gnu/libz.so.1"]);
    assert!(find(&new, 183, true).is_empty());
    assert_eq!(
        find(&new, 0x1234, true).len(),
        2,
        "of an unknown machine all are as good"
    );
    assert!(libraries::find(&new, "libz.so", 62, true).is_empty());
    // Behind one in the old form, of three entries.
    let mut old = b"ld.so-1.7.0\0\x03\0\0\0".to_vec();
    old.resize((16 + 3 * 12_usize).next_multiple_of(8), 0);
    assert_eq!(find(&[old, new.clone()].concat(), 62, true).len(), 1);
    let mut insane = new;
    insane[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(find(&insane, 62, true).is_empty());
}

#[test]
fn directories_of_the_loader_are_listed() {
    let text = b"# comment\ninclude /etc/ld.so.conf.d/*.conf\n/opt/lib # own\n\n/a:/b\nrelative\n";
    let found = libraries::configured(text);
    assert_eq!(found.directories, ["/opt/lib", "/a", "/b"]);
    assert_eq!(found.includes, ["/etc/ld.so.conf.d/*.conf"]);
}

#[test]
fn the_first_line_names_the_interpreter() {
    let of = |text: &'static str| script::interpreter(text.as_bytes());
    assert_eq!(of("#!/bin/sh\nexit"), Some(("/bin/sh", None)));
    assert_eq!(
        of("#! /usr/bin/env  -S python3 -u \r\nx"),
        Some(("/usr/bin/env", Some("-S python3 -u")))
    );
    assert_eq!(of("#!/bin/sh"), Some(("/bin/sh", None)));
    assert_eq!(of("#!\n/bin/sh"), None);
    assert_eq!(of("# !/bin/sh"), None);
    assert_eq!(script::split_words("-S  python3\t-u"), ["-S", "python3", "-u"]);
}

fn commands(text: &str) -> Vec<String> {
    let commands = script::commands(text.as_bytes());
    let words = commands.iter().map(|command| command.literal().join(" "));
    words.collect()
}

#[test]
fn commands_of_a_shell_are_where_they_begin() {
    assert_eq!(
        commands(
            "git init -q /tmp/r; cd /tmp/r && A=1 B='x y' git -c user.name=\"a b\" commit | tee x 2>/dev/null >&2"
        ),
        [
            "git init -q /tmp/r",
            "cd /tmp/r",
            "git -c user.name=a b commit",
            "tee x"
        ]
    );
    assert_eq!(
        commands("if [ -f /x ]; then\n  echo yes # no; never\nelse\n  cat <<EOF\nrm -rf /\nEOF\n  ls\nfi\n"),
        ["[ -f /x ]", "echo yes", "cat", "ls"]
    );
    // The text within comes last.
    assert_eq!(
        commands("x=$(date +%s); echo \"$(id -u)\" `hostname`"),
        ["echo", "hostname", "id -u", "date +%s"]
    );
    assert_eq!(commands("for x in a b; do touch $x; done"), ["touch"]);
    assert_eq!(commands("'unclosed"), ["unclosed"]);
}

#[test]
fn what_a_script_becomes_is_told_apart() {
    let text =
        b"#!/bin/sh\nset -e\nif [ \"$1\" = x ]; then\n  exec gosu redis \"$0\" \"$@\"\nfi\nexec -a name \"$@\"\n";
    let commands = script::commands(text);
    let exec: Vec<_> = commands.iter().filter(|command| command.is_exec).collect();
    assert_eq!(exec.len(), 2);
    assert_eq!(exec[0].literal(), ["gosu", "redis"]);
    assert!(exec[0].passes_on() && exec[1].passes_on());
    assert!(commands.iter().all(|command| command.words[0].text != "fi"));
}

#[test]
fn modules_are_imported_outside_of_functions() {
    let text = r#"
"""A text that says
import nothing
"""
import os, sys as system
from . import core, _sub  # why
from .core import (
    first,
    second as other,  # a comment
)
from ..a.b import *
try:
    import fast
except ImportError:
    import slow
if TYPE_CHECKING:
    import never
def function():
    import later
    """
import text
"""
class Thing:
    import in_class
import last; import very_last
from a \
    import b
x = 1; import inline
import 7, not-a-name
"#;
    let found = python::imports(text.as_bytes());
    let modules: Vec<_> = found
        .iter()
        .map(|import| (import.level, import.module.as_str()))
        .collect();
    assert_eq!(
        modules,
        [
            (0, "os"),
            (0, "sys"),
            (1, ""),
            (1, "core"),
            (2, "a.b"),
            (0, "fast"),
            (0, "slow"),
            (0, "last"),
            (0, "very_last"),
            (0, "a"),
            (0, "inline")
        ]
    );
    assert_eq!(found[2].names, ["core", "_sub"]);
    assert_eq!(found[3].names, ["first", "second"]);
    assert_eq!(python::imports(b"import numpy; print(1)")[0].module, "numpy");
}

/// What CPython 3.11 has compiled of:
/// `import os.path`, `from . import core as c, sub`, `from ..a import *`, and a function that imports something else.
const COMPILED: &[u8] = include_bytes!("tests/module.cpython-311.pyc");

#[test]
fn a_compiled_module_says_the_same() {
    let found = pyc::imports(COMPILED).unwrap();
    let import = |level, module: &str, names: &[&str]| Import {
        level,
        module: module.to_owned(),
        names: names.iter().map(|&name| name.to_owned()).collect(),
    };
    assert_eq!(
        found,
        [
            import(0, "os.path", &[]),
            import(1, "", &["core", "sub"]),
            import(2, "a", &["*"])
        ]
    );
    let mut other = COMPILED.to_vec();
    other[..2].copy_from_slice(&9999_u16.to_le_bytes());
    assert_eq!(pyc::imports(&other), None, "an unknown version");
    assert_eq!(pyc::imports(&COMPILED[..COMPILED.len() / 2]), None);
}

proptest! {
    #[test]
    fn a_damaged_module_is_read_or_left(at in 16..COMPILED.len(), byte: u8) {
        let mut damaged = COMPILED.to_vec();
        damaged[at] = byte;
        let _ = pyc::imports(&damaged);
    }
}

/// Objects within objects, and tuples of references to tuples of references, take neither the stack nor memory.
#[test]
fn hostile_modules_are_left() {
    let head = [&COMPILED[..16], &[0xe3], &[0; 20]].concat();
    let deep = [head.clone(), b")\x01".repeat(100_000)].concat();
    assert_eq!(pyc::imports(&deep), None);
    let mut doubling = head;
    doubling.extend_from_slice(&[0xa9, 100]);
    doubling.extend(std::iter::repeat_n(b'N', 100));
    for number in 1..200_u32 {
        doubling.extend_from_slice(&[0xa9, 100]);
        for _ in 0..100 {
            doubling.push(b'r');
            doubling.extend_from_slice(&number.to_le_bytes());
        }
    }
    assert_eq!(pyc::imports(&doubling), None);
}

#[test]
fn scripts_say_what_they_require() {
    let text = br#"
const a = require("express"), b = require( './lib/b' );
import fs from 'node:fs';
import "./side";
export { x } from "./x.js";
// require("never")
 * require("documentation")
const c = require(name); xrequire("no"); module.require("no");
a.from("not this"); Array.from('x');
"#;
    assert_eq!(
        javascript::required(text),
        ["express", "./lib/b", "node:fs", "./side", "./x.js"]
    );
}

#[test]
fn packages_say_where_they_begin() {
    let main = |text: &str| javascript::main(text.as_bytes());
    assert_eq!(main(r#"{"main": "./lib/index"}"#).as_deref(), Some("./lib/index"));
    assert_eq!(main(r#"{"main": 7}"#), None);
    assert_eq!(
        main(
            r#"{"main": "x", "exports": {".": {"import": "./m.mjs", "require": {"types": "t", "default": "./m.cjs"}}}}"#
        )
        .as_deref(),
        Some("./m.cjs")
    );
    assert_eq!(main(r#"{"exports": "./only.js"}"#).as_deref(), Some("./only.js"));
    assert_eq!(main("nothing"), None);
}

/// One byte of a file can be an object of many: of those there is a bound, before they are made.
#[test]
fn a_module_of_a_million_objects_is_none() {
    let module = |count: u32| {
        // Python 3.11: the header, a code object with five counts, its instructions, and a tuple of `None`.
        let mut bytes = vec![0xa7, 0x0d, b'\r', b'\n'];
        bytes.resize(16, 0);
        bytes.push(b'c');
        bytes.resize(bytes.len() + 20, 0);
        bytes.extend([b's', 0, 0, 0, 0, b'(']);
        bytes.extend(count.to_le_bytes());
        bytes.resize(bytes.len() + count as usize, b'N');
        // Names; variables and their kinds, the file and two names; the first line; lines and exceptions.
        bytes.extend([b')', 0, b'N', b'N', b'N', b'N', b'N', 0, 0, 0, 0, b'N', b'N']);
        bytes
    };
    assert_eq!(pyc::imports(&module(1000)), Some(Vec::new()));
    assert_eq!(pyc::imports(&module(900_000)), None);
}
