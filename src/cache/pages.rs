//! Memory that would hold the same bytes twice.
//!
//! The kernel reads a mounted file of the cache through the page cache of that file into the pages of the EROFS mount. Those are what programs
//! share and come back to; the file's own pages are read once. They are given back a moment later, so that a layer takes the page cache
//! that it would take as a directory.
//!
//! The kernel drops what is clean, not mapped, and not being read. What it has read ahead and not used yet goes as well, if the moment is bad:
//! it is read again.

use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

use rustix::fs::Advice;

use super::{Cache, CachedLayer};

/// How often pages are given back. A reader at the speed of a disk has read some gigabytes by then, and one call for each mounted layer costs
/// nothing that could be noticed.
const PERIOD: Duration = Duration::from_secs(2);

impl Cache {
    /// Gives pages back from time to time, as long as the cache is there.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(super) fn give_pages_back(self: &Arc<Self>) -> io::Result<()> {
        let me = Arc::downgrade(self);
        let work = move || {
            loop {
                thread::sleep(PERIOD);
                let Some(cache) = me.upgrade() else { return };
                for layer in cache.open_layers().iter().filter(|layer| layer.is_held()) {
                    layer.give_pages_back();
                }
            }
        };
        thread::Builder::new().name("lazuli-pages".to_owned()).spawn(work)?;
        Ok(())
    }
}

impl CachedLayer {
    /// Has the kernel drop what it holds of the data file. Those who mounted the file keep what they have read of it.
    pub(super) fn give_pages_back(&self) {
        // Only memory is lost if it does not work.
        let _ = rustix::fs::fadvise(&**self.data.load(), 0, None, Advice::DontNeed);
    }
}
