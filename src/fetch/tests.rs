//! The scheduler over a source with faults.

mod fake;
mod ranges;
mod seeds;
mod spans;
mod streams;
