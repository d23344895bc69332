//! Where the dynamic loader of glibc finds libraries: `/etc/ld.so.cache`, in the form that glibc has written since 2.32 and reads since 2.2.
//!
//! ```text
//! 0   magic   20  "glibc-ld.so.cache1.1"
//! 20  count    4  entries
//! 48  entries     24 bytes each: flags 4, name 4, path 4, OS version 4, hardware 8
//! ```
//! Names and paths are positions from the beginning of the magic, of texts that end with a zero. The byte order is the machine's: little here, as
//! what is not is not worth a second way. A cache in the form before begins with another magic and its own entries, and has this one behind them.

use super::{array, text_at};

/// Longest cache that is read, in bytes: an entry and its texts take about a hundred, and a large system has some thousand.
pub const MAX_CACHE: u64 = 1 << 20;
const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const OLD_MAGIC: &[u8] = b"ld.so-1.7.0";
/// Where entries begin in the old form, and their bytes.
const OLD_HEADER: usize = 16;
const OLD_ENTRY: usize = 12;
const HEADER: usize = 48;
const ENTRY: usize = 24;
/// Entries for special hardware have any of these bits, or lie in a directory of this name.
const HARDWARE_DIRECTORY: &str = "/glibc-hwcaps/";

/// The paths that a cache has for a library, for an ELF file of this machine, the best one first.
pub fn find<'a>(cache: &'a [u8], name: &str, machine: u16, is_wide: bool) -> Vec<&'a str> {
    let entries = || {
        let cache = newer(cache)?;
        let count = u32::from_le_bytes(array(cache, 20)?) as usize;
        let entries = cache.get(HEADER..)?;
        let entries = entries.get(..count.checked_mul(ENTRY)?)?;
        let wanted = kind(machine, is_wide);
        let found = entries.chunks_exact(ENTRY).filter_map(|entry| {
            let flags = u32::from_le_bytes(array(entry, 0)?);
            let (at, path) = (
                u32::from_le_bytes(array(entry, 4)?),
                u32::from_le_bytes(array(entry, 8)?),
            );
            let is_plain = u64::from_le_bytes(array(entry, 16)?) == 0;
            let is_its = wanted.is_none_or(|wanted| wanted == flags & KIND_MASK);
            if !is_plain || !is_its || text_at(cache, at.into())? != name {
                return None;
            }
            text_at(cache, path.into()).filter(|path| !path.contains(HARDWARE_DIRECTORY))
        });
        Some(found.collect())
    };
    entries().unwrap_or_default()
}

/// The part of a cache that is in the newer form.
fn newer(cache: &[u8]) -> Option<&[u8]> {
    if cache.starts_with(MAGIC) {
        return Some(cache);
    }
    if !cache.starts_with(OLD_MAGIC) {
        return None;
    }
    let count = u32::from_le_bytes(array(cache, OLD_HEADER - 4)?) as usize;
    let end = OLD_HEADER.checked_add(count.checked_mul(OLD_ENTRY)?)?;
    cache
        .get(end.checked_next_multiple_of(8)?..)
        .filter(|rest| rest.starts_with(MAGIC))
}

/// The bits of an entry's flags that say for what machine it is.
const KIND_MASK: u32 = 0xff00;

/// What they are for a machine; `None` where it is not known: then all are as good.
fn kind(machine: u16, is_wide: bool) -> Option<u32> {
    match (machine, is_wide) {
        // i386, x86-64, and x86-64 with addresses of 32 bits.
        (3, _) => Some(0x0000),
        (62, true) => Some(0x0300),
        (62, false) => Some(0x0800),
        // AArch64.
        (183, true) => Some(0x0a00),
        _ => None,
    }
}

/// Directories of one `/etc/ld.so.conf`, or of what it includes: one in each line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Configured<'a> {
    /// Directories, in order.
    pub directories: Vec<&'a str>,
    /// Patterns of files that are included.
    pub includes: Vec<&'a str>,
}

/// Most lines of a configuration that are read.
const MAX_LINES: usize = 256;

/// Reads a configuration of the loader (`/etc/ld.so.conf`), or a list of directories (`/etc/ld-musl-x86_64.path`).
pub fn configured(text: &[u8]) -> Configured<'_> {
    let text = std::str::from_utf8(text).unwrap_or_default();
    let mut found = Configured::default();
    for line in text.lines().take(MAX_LINES) {
        let line = line.split('#').next().unwrap_or_default().trim();
        match line.split_once(char::is_whitespace) {
            Some(("include", pattern)) => found.includes.push(pattern.trim()),
            _ => {
                let each = line.split([':', ',', ' ', '\t']);
                found.directories.extend(each.filter(|path| path.starts_with('/')));
            }
        }
    }
    found
}
