//! The operating system: mounts, descriptors, id-mapping. The only room where `unsafe` may stand; it has no policy.
//!
//! Everything here is a thin, safe wrapper of system calls: it says which call failed and on what, and decides nothing.

pub mod erofs;
pub mod error;
pub mod fuse;
pub mod limits;
pub mod mount;
pub mod mountinfo;

pub use error::SysError;
