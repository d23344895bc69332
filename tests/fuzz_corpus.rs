//! What the fuzz targets do, without a fuzzer: with every file of `fuzz/corpus`, and with some hundred variations of each, the same in every run.
//! `make fuzz` looks for new ones.

#![deny(unsafe_code)]

// The targets name the crate of the fuzzer; here it is this one.
extern crate self as libfuzzer_sys;

use std::fs;
use std::path::Path;

/// Makes a function of a target, whose input is read as the fuzzer does: numbers from the front, and bytes from what remains.
macro_rules! fuzz_target {
    (|$input:ident: $kind:ty| $body:expr) => {
        pub fn replay(bytes: &[u8]) {
            let mut rest = bytes;
            let $input = <$kind as crate::Input>::last(&mut rest);
            $body
        }
    };
}
pub(crate) use fuzz_target;

/// A value out of the bytes of a file.
trait Input<'a>: Sized {
    /// One that others come after.
    fn next(rest: &mut &'a [u8]) -> Self;

    /// The last one, which takes all that remains.
    fn last(rest: &mut &'a [u8]) -> Self {
        Self::next(rest)
    }
}

macro_rules! numbers {
    ($($number:ty),*) => { $(
        impl<'a> Input<'a> for $number {
            fn next(rest: &mut &'a [u8]) -> Self {
                const LEN: usize = size_of::<$number>();
                let taken = rest.len().min(LEN);
                let mut bytes = [0; LEN];
                bytes[..taken].copy_from_slice(&rest[..taken]);
                *rest = &rest[taken..];
                <$number>::from_le_bytes(bytes)
            }
        }
    )* };
}
numbers!(u8, u16, u32, u64);

impl<'a, T: Input<'a>, const N: usize> Input<'a> for [T; N] {
    fn next(rest: &mut &'a [u8]) -> Self {
        std::array::from_fn(|_| T::next(rest))
    }
}

impl<'a> Input<'a> for &'a [u8] {
    fn next(rest: &mut &'a [u8]) -> Self {
        std::mem::take(rest)
    }
}

impl<'a> Input<'a> for &'a str {
    fn next(rest: &mut &'a [u8]) -> Self {
        let bytes = std::mem::take(rest);
        std::str::from_utf8(bytes)
            .unwrap_or_else(|error| std::str::from_utf8(&bytes[..error.valid_up_to()]).expect("so much of it is text"))
    }
}

macro_rules! tuples {
    ($($name:ident)*; $last:ident) => {
        impl<'a, $($name: Input<'a>,)* $last: Input<'a>> Input<'a> for ($($name,)* $last,) {
            fn next(rest: &mut &'a [u8]) -> Self {
                ($($name::next(rest),)* $last::last(rest),)
            }
        }
    };
}
tuples!(A; Z);
tuples!(A B; Z);
tuples!(A B C; Z);
tuples!(A B C D; Z);

#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/compression_decode.rs"]
mod compression_decode;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/entry.rs"]
mod entry;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/erofs.rs"]
mod erofs;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/estargz_footer_toc.rs"]
mod estargz_footer_toc;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/filters_config.rs"]
mod filters_config;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/index_decode.rs"]
mod index_decode;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/inflate_span.rs"]
mod inflate_span;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/merge.rs"]
mod merge;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/portable.rs"]
mod portable;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/registry_text.rs"]
mod registry_text;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/tar.rs"]
mod tar;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/trace.rs"]
mod trace;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/zchunked_toc.rs"]
mod zchunked_toc;
#[allow(unused_attributes, unused_imports, dead_code, clippy::duplicate_mod)]
#[path = "../fuzz/fuzz_targets/ztoc.rs"]
mod ztoc;

/// A fuzz target: its name, and what it does with an input.
type Target = (&'static str, fn(&[u8]));

/// All of them.
const TARGETS: [Target; 14] = [
    ("compression_decode", compression_decode::replay),
    ("entry", entry::replay),
    ("erofs", erofs::replay),
    ("estargz_footer_toc", estargz_footer_toc::replay),
    ("filters_config", filters_config::replay),
    ("index_decode", index_decode::replay),
    ("inflate_span", inflate_span::replay),
    ("merge", merge::replay),
    ("portable", portable::replay),
    ("registry_text", registry_text::replay),
    ("tar", tar::replay),
    ("trace", trace::replay),
    ("zchunked_toc", zchunked_toc::replay),
    ("ztoc", ztoc::replay),
];

/// The variable that names another corpus, such as what `make fuzz` has learned, which is tried as it is.
const CORPUS: &str = "LAZULI_CORPUS";
/// Variations of each file.
const VARIATIONS: u64 = 150;
/// Longest input that a fuzzer tries, in bytes.
const LONGEST: usize = 64 << 10;

/// Numbers without a pattern, the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 16) % limit.max(1) as u64) as usize
    }
}

/// The file with some changes of those that fuzzers make.
fn variation(file: &[u8], seed: u64) -> Vec<u8> {
    let mut random = Random((seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut bytes = file.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(64)).min(bytes.len());
        match random.below(6) {
            0 => bytes
                .iter_mut()
                .skip(at)
                .take(1)
                .for_each(|byte| *byte ^= 1 << (seed % 8)),
            1 => bytes
                .iter_mut()
                .skip(at)
                .take(1)
                .for_each(|byte| *byte = [0, 1, 0x7f, 0x80, 0xff][seed as usize % 5]),
            2 => bytes.iter_mut().skip(at).take(end - at).for_each(|byte| *byte = 0xff),
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..end)),
            _ => {
                let part = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, part);
            }
        }
    }
    bytes.truncate(LONGEST);
    bytes
}

#[test]
fn the_corpus_and_its_variations_break_nothing() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let others = std::env::var_os(CORPUS);
    let (corpus, variations) = match &others {
        Some(others) => (Path::new(others), 0),
        None => (seeds.as_path(), VARIATIONS),
    };
    for (target, replay) in TARGETS {
        let try_one = |what: &str, input: &[u8]| {
            let tried = std::panic::catch_unwind(|| replay(input));
            assert!(
                tried.is_ok(),
                "target {target}, {what}: {} bytes broke it (see above)",
                input.len()
            );
        };
        try_one("nothing", &[]);
        let Ok(files) = fs::read_dir(corpus.join(target)) else {
            continue;
        };
        let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            let file = fs::read(&path).unwrap();
            try_one(&path.display().to_string(), &file);
            for seed in 0..variations {
                try_one(
                    &format!("variation {seed} of {}", path.display()),
                    &variation(&file, seed),
                );
            }
        }
    }
}

/// Without seeds, only what needs no checksum or magic number is reached.
#[test]
fn every_target_has_seeds() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let names = |dir: &str| {
        let entries = fs::read_dir(fuzz.join(dir)).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| {
                entry
                    .unwrap()
                    .path()
                    .file_stem()
                    .unwrap()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("fuzz_targets"), TARGETS.map(|(name, _)| name.to_owned()));
    assert_eq!(names("corpus"), names("fuzz_targets"));
}
