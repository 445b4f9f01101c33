//! groupstate keeps the state of alert groups for the replicas of an
//! alert-history service: a gRPC server over Redis or over memory.
//!
//! The modules, as a request travels:
//!
//! - [`store`]: the store contract, and the stores
//! - [`document`]: the JSON document of a group
//! - [`group`]: the domain
//! - [`version`]: versions, write ids, the clock of Redis

#![forbid(unsafe_code)]

pub mod document;
pub mod group;
pub mod store;
pub mod version;
