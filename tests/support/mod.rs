//! Tools that several integration tests share. Each test uses a part of them.
#![allow(dead_code, missing_docs)]

pub mod fault_registry;
