//! What the targets in `fuzz/` reach of this crate and nobody else does. It is there
//! when cargo-fuzz builds it, and in unit tests, which notice when it no longer compiles.

pub use crate::store::redis::fuzzing::{ReadBy, read_info, read_reply};
