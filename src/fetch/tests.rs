//! The scheduler over a source with faults.

mod dense;
pub(in crate::fetch) mod fake;
mod filling;
mod flights;
#[cfg(feature = "shuttle")]
mod interleaved;
mod outages;
mod panics;
mod ranges;
mod seeds;
mod sharing;
mod spans;
mod streams;
mod sweeps;
mod wishes;
