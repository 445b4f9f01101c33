//! Loads that look at what they are answered, from tasks that call as soon as the
//! last call is over.

use std::time::{Duration, Instant};

use bytes::Bytes;
use groupstate::grpc::proto as pb;
use prost::Message;

use super::{
    load::{self, RawClient, pass_through},
    sample::{Load, ROUND},
};

/// What is called. Each task has a group of its own.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Each task swaps its group, at the version it was told last.
    Swap,
    /// SET by the pass-through, to compare with.
    Set,
    /// Four times Load, once Store.
    Mixed,
    /// Four times GET, once SET by the pass-through.
    ThinMixed,
}

/// Calls of one kind for a server.
pub struct Caller {
    addr: String,
    kind: Kind,
    alerts: usize,
    document: usize,
}

/// Every so many calls of a mixed load is a write.
const WRITE_EVERY: usize = 5;

impl Caller {
    /// Of groups of so many alerts, whose documents have so many bytes.
    pub fn new(addr: &str, kind: Kind, alerts: usize, document: usize) -> Self {
        Self {
            addr: addr.to_owned(),
            kind,
            alerts,
            document,
        }
    }

    /// Calls for a round. How long each call took.
    pub async fn drive(&self, load: Load) -> Vec<Duration> {
        let client = RawClient::connect(&self.addr, load.connections).await;
        let end = Instant::now() + ROUND;
        let tasks: Vec<_> = (0..load.in_flight())
            .map(|task| tokio::spawn(self.call_until(client.clone(), task, end)))
            .collect();
        let mut latencies = Vec::new();
        for task in tasks {
            latencies.extend(task.await.expect("a task that does not panic"));
        }
        latencies
    }

    fn call_until(
        &self,
        client: RawClient,
        task: usize,
        end: Instant,
    ) -> impl Future<Output = Vec<Duration>> + Send + use<> {
        let Self {
            kind,
            alerts,
            document,
            ..
        } = *self;
        // Encoded once: what the load generator does is not to be measured.
        let (read_path, read, write_path, write) = match kind {
            Kind::Swap => (
                "",
                Bytes::new(),
                load::COMPARE_AND_SWAP,
                load::swap_request(task, alerts),
            ),
            Kind::Mixed => (
                load::LOAD,
                load::load_request(task),
                load::STORE,
                load::store_request(task, alerts),
            ),
            Kind::Set | Kind::ThinMixed => (
                pass_through::GET,
                pass_through::get_request(task),
                pass_through::SET,
                pass_through::set_request(task, document),
            ),
        };
        let always_writes = matches!(kind, Kind::Swap | Kind::Set);
        async move {
            let mut latencies = Vec::new();
            // Unknown at first: the first swap is lost and tells it.
            let mut version = 1;
            for call in 0.. {
                let (path, request) = if always_writes || call % WRITE_EVERY == 0 {
                    (write_path, write.clone())
                } else {
                    (read_path, read.clone())
                };
                let request = match kind {
                    Kind::Swap => load::at_version(&request, version),
                    _ => request,
                };
                let sent = Instant::now();
                let reply = client.call(task, path, request).await.unwrap();
                let received = Instant::now();
                if matches!(kind, Kind::Swap) {
                    let reply = pb::CompareAndSwapResponse::decode(reply).unwrap();
                    assert!(reply.swapped || version == 1);
                    version = reply.version;
                }
                if received >= end {
                    break;
                }
                latencies.push(received - sent);
            }
            latencies
        }
    }
}
