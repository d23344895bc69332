//! Small concurrency tools that several rooms share.

mod budget;
mod epochs;
mod flight;
mod gate;

pub use budget::{Budget, Share};
pub use epochs::{Epochs, Passage};
pub use flight::SingleFlight;
pub use gate::{Class, Gate, Pass};
