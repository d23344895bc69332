//! Small concurrency tools that several rooms share.

mod blocking;
mod budget;
mod caught;
mod epochs;
mod flight;
#[cfg(all(test, feature = "shuttle"))]
mod interleaved;
pub mod primitives;
#[cfg(test)]
pub mod random;
mod trash;

pub use blocking::{blocking, may_block, wait};
pub use budget::{Budget, Share};
pub use caught::caught;
pub use epochs::{Epochs, Passage};
pub use flight::SingleFlight;
pub use trash::Trash;
