//! Logs, metrics and traces: where they go and what they look like.
//!
//! The functions that are re-exported here are told what happens, in the words of
//! the caller; no other module knows the name of a metric.

mod logs;
mod metrics;
mod rate_limited;
mod spans;
mod traces;

pub(crate) use self::rate_limited::rate_limited;
pub use self::{logs::*, metrics::*, rate_limited::RateLimit, spans::*, traces::Traces};
