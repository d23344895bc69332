//! Small concurrency tools that several rooms share.

mod budget;
mod epochs;
mod flight;

pub use budget::{Budget, Share};
pub use epochs::{Epochs, Passage};
pub use flight::SingleFlight;
