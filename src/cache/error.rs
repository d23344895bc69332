//! Why the cache on disk cannot be used.
