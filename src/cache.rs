//! Bytes on disk: per layer a sparse file and a map of what in it is ready.
pub mod error;
