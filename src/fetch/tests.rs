//! The scheduler over a source with faults.

mod fake;
mod ranges;
mod spans;
mod streams;
