//! A bug in one piece of work is the end of that work alone.

use std::io;
use std::panic::AssertUnwindSafe;

use futures::FutureExt as _;

/// Runs work, and makes an error of its panic, for those who have to tell others how it ended: a task that just vanished would leave them
/// waiting. What panicked, and where, is in the log already.
///
/// # Errors
/// The work panicked.
pub async fn caught<T>(work: impl Future<Output = T>) -> io::Result<T> {
    let result = AssertUnwindSafe(work).catch_unwind().await;
    result.map_err(|_| io::Error::other("it ended by a bug in Lazuli"))
}
