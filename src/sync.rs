//! Small concurrency tools that several rooms share.
