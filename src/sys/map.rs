//! Files mapped into memory, to be read.
//!
//! Pages of a mapping are those of the page cache: they cost the process nothing that the kernel could not take back. Whoever maps a file owns
//! it, and never makes it shorter: touching a page that the file has lost, or that the disk cannot read, ends the process.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// The first bytes of a file, read-only.
pub struct Mapping {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping is read-only memory that belongs to no thread, and lives until it is dropped.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `file`, which has `len` bytes now and keeps them as long as the mapping lives.
    ///
    /// # Errors
    /// If it has fewer, none at all, or the kernel refuses.
    pub fn of(file: &File, len: usize) -> io::Result<Self> {
        if len == 0 || file.metadata()?.len() < len as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: the kernel chooses a place that nobody has, and nothing writes there.
        let start = unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file, 0)? };
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Mapping { start, len };
        // What lies around a page is not wanted because the page is. It is only a hint.
        // SAFETY: the range is this mapping's.
        let _ = unsafe { madvise(mapping.start.as_ptr(), len, Advice::Random) };
        Ok(mapping)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes are mapped at `start` until `self` is dropped, and no process of ours writes to the file.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len) }
    }

    /// Takes its pages off this process; they come back when they are touched.
    pub fn release(&self) {
        // SAFETY: the range is this mapping's, and pages of a file that is only read come back as they were.
        let _ = unsafe { madvise(self.start.as_ptr(), self.len, Advice::LinuxDontNeed) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's, and nobody has it any more.
        let _ = unsafe { munmap(self.start.as_ptr(), self.len) };
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn bytes_are_those_of_the_file_also_after_a_release_and_without_a_name() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..20_000u32).flat_map(u32::to_le_bytes).collect();
        file.write_all(&bytes).unwrap();
        let mapping = Mapping::of(&file, bytes.len()).unwrap();
        drop(file);
        assert!(mapping.bytes() == bytes);
        mapping.release();
        assert!(mapping.bytes() == bytes);
    }

    #[test]
    fn more_than_there_is_cannot_be_mapped() {
        let mut file = tempfile::tempfile().unwrap();
        assert!(Mapping::of(&file, 0).is_err());
        file.write_all(b"three").unwrap();
        assert!(Mapping::of(&file, 6).is_err());
        assert_eq!(Mapping::of(&file, 5).unwrap().bytes(), b"three");
    }
}
