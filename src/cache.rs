//! Bytes on disk: per layer a sparse file and a map of what in it is ready. The cache never gives out an unverified byte.
//!
//! # On disk
//! ```text
//! <root>/layers/                    mode 0700: layer data is on no path that another user can reach
//!     .lock                         locked by the one process that uses the cache
//!     .incoming/<hex>-<random>/     layers in the making; moved to the trash at start
//!     .trash/<hex>.<n>+<bytes>/     layers that were removed, until they are deleted (sync/trash.rs)
//!     .ids                          says that directories are named for ids (adopt.rs)
//!     <hex id>/index                the layer's index (crate::layer::index)
//!     <hex id>/data                 its data space as a sparse file, and zeros up to the end of a page of 4096 bytes
//!     <hex id>/map                  which chunks are ready (map.rs)
//!     <hex id>/mounted              the boot in which the data was mounted (hold.rs)
//!     <hex id>/data.next            a data file that was to take the place of one that was mounted (evict.rs)
//!     .replaced/<inode>             data that is mounted and has lost its layer (disk.rs)
//!     <hex id>/windows              what is needed to decode its spans, if it has any (windows.rs)
//! ```
//! The id of a layer is the digest of its blob if its index was built from that, and another one for everything that somebody else said of it
//! ([`Key`]): indexes of one blob that come from different people have nothing in common, not even bytes.
//!
//! A layer appears by the rename of a directory in which everything is already durable, so there are no half-made layers.
//!
//! # Crashes
//! A map is *sealed* while its bits are known to be true of bytes that are durable: when a streamed layer is made, and when the
//! daemon ends in order ([`Cache::close`]). The seal is broken (durably) before the first change of a run. The bits of a map without
//! a seal are only hints: a chunk is verified against its digest before its first use, one by one as chunks are wanted, never in
//! bulk. So no chunk needs an fsync, a `kill -9` loses nothing, and a power cut loses at most what was written last. Damage of any
//! kind makes the chunk, or the layer, absent: it is logged and fetched again.
//!
//! # Readers and eviction
//! Readers take no lock. They validate: `evict` clears bits, *then* counts up `evictions`, *then* punches the hole; a reader loads
//! `evictions`, *then* checks the bits, *then* preads, *then* loads `evictions` again. If a pread saw the hole, the count was up before,
//! so the second load sees it; if the first load had seen it too, the cleared bits would have been seen as well. A bit that was set
//! again in between stands for bytes written after the hole, because stores and evictions of one layer exclude each other
//! (`mutation`, which stores share). A reader whose loads differ reads again on the slow way, which shares `mutation`.
//!
//! # Files that are mounted
//! A layer that is complete can be mounted from its file, without the cache in between. So that no unverified byte comes to a reader
//! that way either, everything is verified by this very process before (check.rs), and nothing of the file changes after (hold.rs).
//!
//! # Memory
//! What the kernel has read of a mounted file is not kept twice (pages.rs). Of each layer that somebody has open, memory holds where its bytes are; its names and attributes leave it when nobody asks for them
//! (names.rs).
//!
//! # Budget
//! Two limits that always hold, `max_size` and `min_free` (budget.rs): room is made by dropping layers that no container uses, least
//! recently used first, then groups of chunks of layers in use that can be fetched in ranges. Where no room can be made, reads are served
//! past the disk. And two marks (marks.rs): when the file system is fuller than the high one, layers that no snapshot refers to give way
//! until it is at the low one. All files count, with the blocks that they take (disk.rs).

pub mod adopt;
mod bitmap;
mod budget;
mod check;
mod dir;
mod disk;
pub mod error;
mod evict;
mod faults;
mod hold;
mod hot;
mod layer;
mod map;
mod marks;
mod names;
mod offline;
mod pages;
mod pins;
mod places;
mod spool;
mod staging;
#[cfg(test)]
mod tests;
mod twins;
mod windows;

pub use adopt::Key;
pub(crate) use bitmap::Bitmap;
pub use check::Checked;
pub use dir::Cache;
pub use error::CacheError;
#[cfg(test)]
pub(crate) use faults::{Decide, Fault, Point};
pub use hold::{Hold, NotWhole};
pub use layer::{CachedLayer, Stored};
pub use offline::portable_of;
pub use pins::InUse;
pub use spool::{Spool, SpoolEnd, Spooled};
pub use staging::Staging;
