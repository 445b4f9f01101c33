//! What the benchmarks send, and a client that moves messages as bytes: what a
//! load generator does with them is not to be measured.

#![allow(dead_code, reason = "each benchmark uses some of it")]

pub mod pass_through;
pub mod usage;

use bytes::{Buf, BufMut, Bytes};
use groupstate::grpc::proto as pb;
use http::uri::PathAndQuery;
use prost::Message;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};

pub const LOAD: &str = "/groupstate.v1.GroupStateService/Load";
pub const STORE: &str = "/groupstate.v1.GroupStateService/Store";
pub const STORE_ALL: &str = "/groupstate.v1.GroupStateService/StoreAll";
pub const LIST_KEYS: &str = "/groupstate.v1.GroupStateService/ListKeys";
pub const SIZE: &str = "/groupstate.v1.GroupStateService/Size";
pub const LOAD_ALL: &str = "/groupstate.v1.GroupStateService/LoadAll";
pub const COMPARE_AND_SWAP: &str = "/groupstate.v1.GroupStateService/CompareAndSwap";

/// Connections to a server, and messages as bytes over them.
#[derive(Clone)]
pub struct RawClient {
    channels: Vec<Channel>,
}

impl RawClient {
    pub async fn connect(addr: &str, connections: usize) -> Self {
        let mut channels = Vec::new();
        for _ in 0..connections {
            let endpoint = Endpoint::from_shared(format!("http://{addr}")).unwrap();
            channels.push(endpoint.tcp_nodelay(true).connect().await.unwrap());
        }
        Self { channels }
    }

    /// Calls over one of the connections; `number` chooses which.
    pub async fn call(
        &self,
        number: usize,
        path: &'static str,
        request: Bytes,
    ) -> Result<Bytes, Status> {
        let channel = self.channels[number % self.channels.len()].clone();
        let mut client = tonic::client::Grpc::new(channel);
        let ready = client.ready().await;
        ready.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = PathAndQuery::from_static(path);
        let reply = client.unary(tonic::Request::new(request), path, Raw).await;
        reply.map(tonic::Response::into_inner)
    }

    /// Calls and takes a stream to its end. The last message.
    pub async fn last_of_stream(
        &self,
        path: &'static str,
        request: Bytes,
    ) -> Result<Bytes, Status> {
        let mut client = tonic::client::Grpc::new(self.channels[0].clone());
        let ready = client.ready().await;
        ready.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = PathAndQuery::from_static(path);
        let request = tonic::Request::new(request);
        let mut stream = client
            .server_streaming(request, path, Raw)
            .await?
            .into_inner();
        let mut last = Bytes::new();
        while let Some(message) = stream.message().await? {
            last = message;
        }
        Ok(last)
    }
}

// === groups ===

pub fn key_of(number: usize) -> String {
    format!("alertname=HighCPU,cluster=prod,instance=web-{number}")
}

/// A group of so many alerts, of about 450 bytes each as a document.
pub fn group(number: usize, alerts: usize) -> pb::AlertGroup {
    let alert = |fingerprint: &str| pb::Alert {
        fingerprint: fingerprint.into(),
        alert_name: "HighCPU".into(),
        status: pb::AlertStatus::Firing.into(),
        labels: [
            ("alertname", "HighCPU"),
            ("cluster", "prod"),
            ("severity", "critical"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into(),
        annotations: [(
            "summary".to_owned(),
            "CPU usage is above 90 % for 10 minutes".to_owned(),
        )]
        .into(),
        starts_at: Some(prost_types::Timestamp {
            seconds: 1_795_000_000,
            nanos: 78_740_000,
        }),
        generator_url: "http://prometheus.example/graph?g0.expr=cpu".into(),
        ..Default::default()
    };
    pb::AlertGroup {
        key: key_of(number),
        alerts: (0..alerts)
            .map(|at| format!("{at:016x}"))
            .map(|fingerprint| (fingerprint.clone(), alert(&fingerprint)))
            .collect(),
        metadata: Some(pb::GroupMetadata {
            state: pb::GroupState::Firing.into(),
            firing_count: alerts as i32,
            group_by: vec!["alertname".into(), "cluster".into()],
            ..Default::default()
        }),
    }
}

pub fn load_request(number: usize) -> Bytes {
    encode(&pb::LoadRequest {
        key: key_of(number),
        ..Default::default()
    })
}

pub fn store_request(number: usize, alerts: usize) -> Bytes {
    encode(&pb::StoreRequest {
        group: Some(group(number, alerts)),
        expiry: None,
    })
}

/// A CompareAndSwap that lacks its version.
pub fn swap_request(number: usize, alerts: usize) -> Bytes {
    encode(&pb::CompareAndSwapRequest {
        group: Some(group(number, alerts)),
        ..Default::default()
    })
}

/// The same with it: parts of a message that follow each other are one message.
pub fn at_version(swap: &Bytes, version: i64) -> Bytes {
    let version = pb::CompareAndSwapRequest {
        expected_version: version,
        ..Default::default()
    };
    [swap, &version.encode_to_vec()[..]].concat().into()
}

pub fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

// === messages as they are ===

/// A codec that leaves messages as bytes.
#[derive(Clone, Copy)]
pub struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
