//! groupstate keeps the state of alert groups for the replicas of an
//! alert-history service: a gRPC server over Redis or over memory.
//!
//! The modules, from the top down. Each knows only those below it, which
//! `tests/architecture.rs` checks:
//!
//! | module | what is in it |
//! |---|---|
//! | [`server`] | puts the parts together; start and graceful stop |
//! | [`config`] | every setting, its default, its check |
//! | [`admin`] | the HTTP port: probes, health, metrics |
//! | [`transport`] | the gRPC port as bytes: connections, TLS, tasks |
//! | [`manager`] | the replica side, which calls a service of this crate or any store |
//! | [`grpc`] | the protobuf surface, and what a call passes on its way in |
//! | [`store`] | the store contract, and the stores |
//! | [`pem`] | certificates and CAs as files hold them |
//! | [`reload`] | what is read from files and read again when they change |
//! | [`telemetry`] | logs, metrics and traces |
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
