//! Calls for many groups at once, one after another, and what the pass-through needs
//! for as many: single calls, all in flight together.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::try_join_all;
use groupstate::grpc::proto as pb;
use prost::Message;

use super::{
    load::{self, RawClient, pass_through},
    sample::ROUND,
};

/// What is called.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    LoadAll,
    StoreAll,
    /// GETs by the pass-through.
    Gets,
    /// SETs by the pass-through.
    Sets,
}

/// Calls of one kind for a server.
pub struct Batches {
    addr: String,
    kind: Kind,
    groups: usize,
    /// What is sent for all groups: one request, or one for each.
    requests: Vec<Bytes>,
}

impl Batches {
    /// Of groups of so many alerts, whose documents have so many bytes.
    pub fn new(addr: &str, kind: Kind, groups: usize, alerts: usize, document: usize) -> Self {
        let numbers = 0..groups;
        let requests = match kind {
            Kind::LoadAll => vec![load::encode(&pb::LoadAllRequest::default())],
            Kind::StoreAll => vec![load::encode(&pb::StoreAllRequest {
                groups: numbers.map(|number| load::group(number, alerts)).collect(),
                expiry: None,
            })],
            Kind::Gets => numbers.map(pass_through::get_request).collect(),
            Kind::Sets => numbers
                .map(|number| pass_through::set_request(number, document))
                .collect(),
        };
        Self {
            addr: addr.to_owned(),
            kind,
            groups,
            requests,
        }
    }

    /// Calls for a round. How long all groups took, each time.
    pub async fn drive(&self) -> Vec<Duration> {
        let client = RawClient::connect(&self.addr, 1).await;
        let end = Instant::now() + ROUND;
        let mut latencies = Vec::new();
        loop {
            let sent = Instant::now();
            self.call(&client).await;
            let received = Instant::now();
            if received >= end {
                return latencies;
            }
            latencies.push(received - sent);
        }
    }

    async fn call(&self, client: &RawClient) {
        let only = self.requests[0].clone();
        let singly = |path| {
            let requests = self.requests.iter().cloned();
            try_join_all(requests.map(move |request| client.call(0, path, request)))
        };
        match self.kind {
            Kind::LoadAll => {
                let last = client.last_of_stream(load::LOAD_ALL, only).await.unwrap();
                let summary = pb::LoadAllResponse::decode(last).unwrap().summary.unwrap();
                let loaded = (summary.groups, summary.complete);
                assert_eq!(loaded, (self.groups as i64, true));
            }
            Kind::StoreAll => {
                let reply = client.call(0, load::STORE_ALL, only).await.unwrap();
                let reply = pb::StoreAllResponse::decode(reply).unwrap();
                assert_eq!(reply.results.len(), self.groups);
                assert!(reply.results.iter().all(|result| result.error.is_none()));
            }
            Kind::Gets => drop(singly(pass_through::GET).await.unwrap()),
            Kind::Sets => drop(singly(pass_through::SET).await.unwrap()),
        }
    }
}
