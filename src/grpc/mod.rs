//! The protobuf surface: nothing below knows gRPC, nothing above knows how
//! groups are stored.
//!
//! A call passes its [`admission`], then the [`service`], one of the [`services`] of the port
//! (a stream of [`reflection`] comes back for each message): [`validation`] turns the
//! request into the domain, the store answers, [`convert`] turns the answer into a reply, and
//! [`status`] turns whatever went wrong into a status.

pub mod admission;
pub mod convert;
mod load_all;
pub mod reflection;
pub mod service;
pub mod services;
pub(crate) mod status;
pub mod validation;

/// The generated messages, server and client.
pub mod proto {
    #![allow(missing_docs, clippy::pedantic, reason = "generated code")]
    tonic::include_proto!("groupstate.v1");
}

/// The compiled proto, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.binpb"));
