//! The metrics of this room with their labels resolved once, so that counting a request is one atomic addition.

use std::sync::Arc;

use fuser::Errno;
use prometheus::IntCounter;

use super::errno;
use crate::metrics::Metrics;

/// Counters of requests by operation, and of their failures.
pub(super) struct Counters {
    pub(super) lookup: IntCounter,
    pub(super) forget: IntCounter,
    pub(super) getattr: IntCounter,
    pub(super) readlink: IntCounter,
    pub(super) open: IntCounter,
    pub(super) opendir: IntCounter,
    /// Reads of files of the tree face.
    pub(super) read: IntCounter,
    /// Reads of data spaces, for the image face.
    pub(super) read_data: IntCounter,
    /// Reads of images' metadata.
    pub(super) read_metadata: IntCounter,
    pub(super) readdir: IntCounter,
    pub(super) readdirplus: IntCounter,
    pub(super) getxattr: IntCounter,
    pub(super) listxattr: IntCounter,
    pub(super) statfs: IntCounter,
    /// Every operation that would change something.
    pub(super) write: IntCounter,
    /// Operations that are answered with "not implemented", most of them once per session.
    pub(super) other: IntCounter,
    /// Requests that the kernel has sent once more.
    pub(super) resent: IntCounter,
    metrics: Arc<Metrics>,
}

impl Counters {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        let op = |name| metrics.fuse_requests_total.with_label_values(&[name]);
        Counters {
            lookup: op("lookup"),
            forget: op("forget"),
            getattr: op("getattr"),
            readlink: op("readlink"),
            open: op("open"),
            opendir: op("opendir"),
            read: op("read"),
            read_data: op("read_data"),
            read_metadata: op("read_metadata"),
            readdir: op("readdir"),
            readdirplus: op("readdirplus"),
            getxattr: op("getxattr"),
            listxattr: op("listxattr"),
            statfs: op("statfs"),
            write: op("write"),
            other: op("other"),
            resent: metrics.fuse_resent_requests_total.clone(),
            metrics,
        }
    }

    /// Counts an answer that is an error, and gives it back.
    pub(super) fn failed(&self, errno: Errno) -> Errno {
        if errno != Errno::ENOENT && errno != Errno::ENODATA {
            let label = errno::name(errno);
            self.metrics.fuse_errors_total.with_label_values(&[label]).inc();
        }
        errno
    }
}
