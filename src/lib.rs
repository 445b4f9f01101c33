//! groupstate keeps the state of alert groups for the replicas of an
//! alert-history service: a gRPC server over Redis or over memory.
//!
//! The modules, as a request travels; each knows only those below it:
//!
//! | module | what is in it |
//! |---|---|
//! | [`config`] | every setting, its default, its check |
//! | [`telemetry`] | logs, metrics and traces |
//! | [`reload`] | what is read from files and read again when they change |
//! | [`server`] | puts the parts together; start and graceful stop |
//! | [`admin`] | the HTTP port: probes, health, metrics |
//! | [`grpc`] | the protobuf surface |
//! | [`manager`] | the replica side, which calls a service of this crate or any store |
//! | [`store`] | the store contract, and the stores |
//! | [`domain`] | groups, documents, versions, changes, merging: values |

#![forbid(unsafe_code)]

pub mod admin;
pub mod config;
pub mod domain;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing;
pub mod grpc;
pub mod manager;
pub mod pem;
pub mod reload;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod transport;
