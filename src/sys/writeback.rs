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
