//! Writing to the disk ahead of a sync (sync_file_range(2)): what is written while more is being made need not be waited for at the end.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

/// Has the kernel begin to write what is dirty in `len` bytes of a file from `offset` on, and waits for none of it. It makes nothing durable.
///
/// # Errors
/// The kernel's; also `InvalidInput` for a range no file can have.
pub fn begin_writeback(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: the descriptor is open as long as `file` is borrowed, and the call takes plain numbers.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn what_is_written_can_be_begun_with_and_is_as_it_was() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 100_000]).unwrap();
        begin_writeback(file.as_file(), 0, 100_000).unwrap();
        begin_writeback(file.as_file(), 50_000, 1 << 40).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), [7; 100_000]);
    }

    #[test]
    fn what_is_no_range_of_a_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = begin_writeback(&file, u64::MAX, 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let (_reader, writer) = std::io::pipe().unwrap();
        let error = begin_writeback(&File::from(OwnedFd::from(writer)), 0, 1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESPIPE));
    }
}
