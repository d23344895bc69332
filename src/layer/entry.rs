//! What a program says of what it is going to read: the loader and libraries of an ELF file, the interpreter of a script, the commands and
//! modules that a program names.
//!
//! Everything here is read to guess. Who follows these names fetches something early, or something in vain, and nothing else depends on it; so
//! that what is not understood is left out, and is no error. All of it comes from an image: every list is bounded, and nothing is recursive
//! without a bound.

pub mod elf;
pub mod javascript;
pub mod libraries;
pub mod pyc;
pub mod python;
pub mod script;
pub mod view;

#[cfg(test)]
mod tests;

/// The `N` bytes at `at`.
fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// The text that begins at `at` and ends with the next zero.
pub fn text_at(bytes: &[u8], at: u64) -> Option<&str> {
    let rest = bytes.get(usize::try_from(at).ok()?..)?;
    let end = rest.iter().position(|&byte| byte == 0)?;
    std::str::from_utf8(&rest[..end]).ok()
}
