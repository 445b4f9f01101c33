//! The protobuf surface: nothing below knows gRPC, nothing above knows how
//! groups are stored.
//!
//! A call passes the [`envelope`] (its [`head`], its [`call`] context, its credentials,
//! load shedding, panics), which has it [`receive`]d, then the [`service`], one of the
//! [`services`] of the port (a stream of [`reflection`] comes back for each message): [`validation`] turns the request into the domain, the
//! store answers, [`convert`] turns the answer into a reply, and [`status`] turns
//! whatever went wrong into a status.

pub mod call;
pub mod convert;
pub mod envelope;
pub mod head;
mod load_all;
mod receive;
pub mod reflection;
pub mod service;
pub mod services;
pub(crate) mod status;
pub mod validation;
mod weight;

/// The generated messages, server and client.
pub mod proto {
    #![allow(missing_docs, clippy::pedantic, reason = "generated code")]
    tonic::include_proto!("groupstate.v1");
}

/// The compiled proto, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.binpb"));
