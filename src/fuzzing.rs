//! What the targets in `fuzz/` reach of this crate and nobody else does. It is there
//! only when cargo-fuzz builds it.

pub use crate::store::redis::fuzzing::{ReadBy, read_info, read_reply};
