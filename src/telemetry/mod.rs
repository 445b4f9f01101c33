//! Logs, metrics and traces: where they go and what they look like.
//!
//! The functions that are re-exported here are told what happens, in the words of
//! the caller; no other module knows the name of a metric.

mod logs;
mod metrics;
mod seldom;
mod spans;
mod traces;

pub(crate) use self::seldom::seldom;
pub use self::{logs::*, metrics::*, seldom::Seldom, spans::*, traces::Traces};
