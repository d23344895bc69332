//! A hold: as long as one lives, nothing of a layer's data file is evicted, punched or replaced.

use std::any::Any;
use std::fmt;

/// Keeps every byte of a layer's data file in place as long as it lives.
pub struct Hold {
    /// What ends the hold when it is dropped.
    _guard: Box<dyn Any + Send + Sync>,
}

impl Hold {
    /// A hold that ends when `guard` is dropped.
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Hold {
            _guard: Box::new(guard),
        }
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hold")
    }
}
