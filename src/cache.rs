//! Bytes on disk: per layer a sparse file and a map of what in it is ready. The cache never gives out an unverified byte.
//!
//! # On disk
//! ```text
//! <root>/layers/                    mode 0700: layer data is on no path that another user can reach
//!     .lock                         locked by the one process that uses the cache
//!     .incoming/<hex>-<random>/     layers in the making; moved to the trash at start
//!     .trash/<hex>.<n>+<bytes>/     layers that were removed, until they are deleted (sync/trash.rs)
//!     <hex digest>/index            the layer's index (crate::layer::index)
//!     <hex digest>/data             its data space as a sparse file, and zeros up to the end of a page of 4096 bytes
//!     <hex digest>/map              which chunks are ready (map.rs)
//!     <hex digest>/mounted          the boot in which the data was mounted (hold.rs)
//!     <hex digest>/data.next        a data file that was to take the place of one that was mounted (evict.rs)
//!     <hex digest>/windows          what is needed to decode its spans, if it has any (windows.rs)
//! ```
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
//! # Budget
//! `max_size` and `min_free` (budget.rs): room is made by dropping layers that no container uses, least recently used first; then groups
//! of chunks of layers in use, then, as the last resort, whole streamed layers in use, which have to be streamed again from their
//! beginning when they are read. Where no room can be made, reads are served past the disk.

mod bitmap;
mod budget;
mod check;
mod dir;
pub mod error;
mod evict;
mod hold;
mod hot;
mod layer;
mod map;
mod offline;
mod staging;
#[cfg(test)]
mod tests;
mod windows;

pub use check::Checked;
pub use dir::Cache;
pub use error::CacheError;
pub use hold::{Hold, NotWhole};
pub use layer::{CachedLayer, InUse, Stored};
pub use offline::portable_of;
pub use staging::Staging;
