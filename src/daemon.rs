//! Wiring: builds every room in order, runs them, and takes them down again.
