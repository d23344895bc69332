//! The operating system (mounts, descriptors, id-mapping, memory), and zlib. The only room where `unsafe` may stand; it has no policy.
//!
//! Everything here is a thin, safe wrapper of calls: it says which call failed and on what, and decides nothing.

#[allow(unsafe_code)]
pub mod descriptors;
pub mod erofs;
pub mod error;
#[allow(unsafe_code)]
pub mod fuse;
pub mod idmap;
#[allow(unsafe_code)]
pub mod inflate;
#[allow(unsafe_code)]
pub mod lease;
pub mod limits;
#[allow(unsafe_code)]
pub mod malloc;
#[allow(unsafe_code)]
pub mod map;
pub mod mount;
pub mod mountinfo;
pub mod quota;
#[allow(unsafe_code)]
pub mod signals;
#[allow(unsafe_code)]
pub mod writeback;

pub use error::SysError;
