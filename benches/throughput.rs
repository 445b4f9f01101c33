//! Throughput of the service over Redis beside a thin pass-through: a tonic
//! server whose handlers do one fred GET or SET and nothing else.
//!
//! `cargo bench --bench throughput` starts Redis, both servers as processes of
//! their own, and drives them in turn with the same load. Only the ratios within
//! one run mean something.

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    convert::Infallible,
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Command, Stdio},
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut, Bytes};
use common::{Process, redis_server::RedisServer, service::Service};
use fred::prelude::{Builder, ClientLike, Config, KeysInterface, Pool};
use futures::future::BoxFuture;
use groupstate::grpc::proto as pb;
use http::{Request, uri::PathAndQuery};
use prost::Message;
use tokio::net::TcpListener;
use tonic::{
    Response, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint, server::TcpIncoming},
};

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(2);
const WARM_UP: Duration = Duration::from_millis(300);
const IN_FLIGHT: [usize; 3] = [1, 8, 64];
const CONNECTIONS: usize = 4;
const KEYS: usize = 1_000;
const POOL_SIZE: usize = 4;

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("pass-through") {
        let redis = arguments.next().expect("the URL of Redis");
        return pass_through(&redis).await;
    }

    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    let (_process, addr) = start_pass_through(&redis.admin_url());
    let thin = Target::connect(&addr).await;
    let full = Target::connect(service.addr()).await;
    for key in 0..KEYS {
        full.call(Call::Store, store(key)).await;
        thin.call(Call::Set, thin_set(key)).await;
    }

    println!(
        "1 KB groups, {KEYS} keys, {CONNECTIONS} connections, median of {ROUNDS} rounds of {ROUND:?}\n"
    );
    println!(
        "| in flight | call | calls/s | p50 | p99 | pass-through calls/s | p50 | p99 | ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for in_flight in IN_FLIGHT {
        for (name, call, reference) in [
            ("Load", Call::Load, Call::Get),
            ("Store", Call::Store, Call::Set),
            ("CompareAndSwap", Call::Swap, Call::Set),
        ] {
            let mut rounds = [Vec::new(), Vec::new()];
            for _ in 0..ROUNDS {
                rounds[0].push(drive(&full, call, in_flight).await);
                rounds[1].push(drive(&thin, reference, in_flight).await);
            }
            let [full, thin] = rounds.map(median);
            println!(
                "| {in_flight} | {name} | {:.0} | {:?} | {:?} | {:.0} | {:?} | {:?} | {:.2} |",
                full.rate,
                full.p50,
                full.p99,
                thin.rate,
                thin.p50,
                thin.p99,
                full.rate / thin.rate,
            );
        }
    }
}

// === the load ===

#[derive(Clone, Copy)]
enum Call {
    Get,
    Set,
    Load,
    Store,
    Swap,
}

/// A server, over some connections.
struct Target {
    channels: Vec<Channel>,
}

impl Call {
    fn path(self) -> PathAndQuery {
        PathAndQuery::from_static(match self {
            Self::Get => "/thin/Get",
            Self::Set => "/thin/Set",
            Self::Load => "/groupstate.v1.GroupStateService/Load",
            Self::Store => "/groupstate.v1.GroupStateService/Store",
            Self::Swap => "/groupstate.v1.GroupStateService/CompareAndSwap",
        })
    }
}

struct Measured {
    rate: f64,
    p50: Duration,
    p99: Duration,
}

impl Target {
    async fn connect(addr: &str) -> Self {
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            let endpoint = Endpoint::from_shared(format!("http://{addr}")).unwrap();
            channels.push(endpoint.tcp_nodelay(true).connect().await.unwrap());
        }
        Self { channels }
    }

    async fn call(&self, call: Call, request: Bytes) -> Bytes {
        let mut client = tonic::client::Grpc::new(self.channels[0].clone());
        client.ready().await.unwrap();
        let request = tonic::Request::new(request);
        client
            .unary(request, call.path(), Raw)
            .await
            .unwrap()
            .into_inner()
    }
}

/// Calls from `in_flight` tasks, each as soon as its last one is answered.
async fn drive(target: &Target, call: Call, in_flight: usize) -> Measured {
    let begin = Instant::now() + WARM_UP;
    let tasks: Vec<_> = (0..in_flight)
        .map(|task| {
            let channel = target.channels[task % CONNECTIONS].clone();
            tokio::spawn(caller(channel, call, task, begin))
        })
        .collect();
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await.unwrap());
    }
    latencies.sort();
    Measured {
        rate: latencies.len() as f64 / ROUND.as_secs_f64(),
        p50: latencies[latencies.len() / 2],
        p99: latencies[latencies.len() * 99 / 100],
    }
}

async fn caller(channel: Channel, call: Call, task: usize, begin: Instant) -> Vec<Duration> {
    let mut client = tonic::client::Grpc::new(channel);
    let mut latencies = Vec::new();
    // Unknown at first: the first swap is lost and tells it.
    let mut version = 1;
    for number in task * 37.. {
        let key = number % KEYS;
        let request = match call {
            Call::Get => key_of(key).into(),
            Call::Set => thin_set(key),
            Call::Load => encode(&pb::LoadRequest {
                key: key_of(key),
                ..Default::default()
            }),
            Call::Store => store(key),
            Call::Swap => encode(&pb::CompareAndSwapRequest {
                group: Some(group(task)),
                expected_version: version,
                expiry: None,
            }),
        };
        let sent = Instant::now();
        client.ready().await.unwrap();
        let reply = client
            .unary(tonic::Request::new(request), call.path(), Raw)
            .await;
        let received = Instant::now();
        let reply = reply.unwrap().into_inner();
        if matches!(call, Call::Swap) {
            let reply = pb::CompareAndSwapResponse::decode(reply).unwrap();
            assert!(reply.swapped || version == 1);
            version = reply.version;
        }
        if received >= begin + ROUND {
            break;
        }
        if sent >= begin {
            latencies.push(received - sent);
        }
    }
    latencies
}

fn median(mut rounds: Vec<Measured>) -> Measured {
    rounds.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    rounds.swap_remove(ROUNDS / 2)
}

fn key_of(key: usize) -> String {
    format!("alertname=HighCPU,cluster=prod,instance=web-{key}")
}

/// Two alerts, whose document takes about 1 KB.
fn group(key: usize) -> pb::AlertGroup {
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
        key: key_of(key),
        alerts: ["160455a62d1bbe1f", "1871a50499e15c30"]
            .map(|fingerprint| (fingerprint.to_owned(), alert(fingerprint)))
            .into(),
        metadata: Some(pb::GroupMetadata {
            state: pb::GroupState::Firing.into(),
            firing_count: 2,
            group_by: vec!["alertname".into(), "cluster".into()],
            ..Default::default()
        }),
    }
}

fn store(key: usize) -> Bytes {
    encode(&pb::StoreRequest {
        group: Some(group(key)),
        expiry: None,
    })
}

fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

/// A key, a line break, and a value of 1 KB.
fn thin_set(key: usize) -> Bytes {
    let mut request = key_of(key).into_bytes();
    request.push(b'\n');
    request.resize(request.len() + 1_024, b'x');
    request.into()
}

// === the pass-through ===

fn start_pass_through(redis: &str) -> (Process, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["pass-through", redis]).stdout(Stdio::piped());
    let mut process = Process::spawn(&mut command, "it is this program");
    let mut addr = String::new();
    let stdout = process.child.stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut addr).unwrap();
    (process, addr.trim().to_owned())
}

async fn pass_through(redis: &str) {
    let pool = Builder::from_config(Config::from_url(redis).unwrap())
        .build_pool(POOL_SIZE)
        .unwrap();
    pool.init().await.unwrap();
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .await
        .unwrap();
    println!("{}", listener.local_addr().unwrap());
    tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .add_service(Thin {
            pool: Arc::new(pool),
        })
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await
        .unwrap();
}

#[derive(Clone)]
struct Thin {
    pool: Arc<Pool>,
}

impl tonic::server::NamedService for Thin {
    const NAME: &'static str = "thin";
}

impl tower::Service<Request<tonic::body::Body>> for Thin {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move { Ok(tonic::server::Grpc::new(Raw).unary(service, request).await) })
    }
}

impl tonic::server::UnaryService<Bytes> for Thin {
    type Response = Bytes;
    type Future = BoxFuture<'static, Result<Response<Bytes>, Status>>;

    fn call(&mut self, request: tonic::Request<Bytes>) -> Self::Future {
        let pool = self.pool.clone();
        Box::pin(async move {
            let request = request.into_inner();
            let key_end = request.iter().position(|byte| *byte == b'\n');
            let reply = match key_end {
                None => {
                    let value: Option<Bytes> = pool.get(request.as_ref()).await.unwrap();
                    value.unwrap_or_default()
                }
                Some(end) => {
                    let value = request.slice(end + 1..);
                    let () = pool
                        .set(&request[..end], value, None, None, false)
                        .await
                        .unwrap();
                    Bytes::new()
                }
            };
            Ok(Response::new(reply))
        })
    }
}

// === messages as they are ===

/// A codec that leaves messages as bytes.
#[derive(Clone, Copy)]
struct Raw;

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
