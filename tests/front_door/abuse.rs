//! Clients that mean harm, or are badly broken: what the service spends on them, and
//! what others notice. `make abuse` does it at full size and prints a table.

use std::{
    convert::Infallible,
    error::Error,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::try_join_all;
use groupstate::grpc::proto as pb;
use http::Request;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{net::TcpStream, task::JoinSet};

use crate::{
    common::service::{Client, Service},
    start, wire,
    wire::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, RST_STREAM, SETTINGS, Wire,
        frame,
    },
};

/// How to misbehave.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Abuse {
    /// Connections that never send anything.
    HalfOpen,
    /// Connections of HTTP/2 without a call.
    Idle,
    /// Headers that come byte by byte.
    DrippingHeaders,
    /// Bodies that come byte by byte, in many calls on each connection.
    DrippingBodies,
    /// Messages of 4 MiB to every kind of path that come but for their last byte, under as
    /// much metadata as may be.
    UnfinishedMessages,
    /// Large replies that nobody takes, in many calls on each connection.
    UnreadReplies,
    /// Watches of health, which need no token.
    Watches,
    /// Calls that are reset as soon as they have begun.
    RapidReset,
    /// PINGs whose answers nobody reads.
    PingFlood,
    /// SETTINGS whose answers nobody reads.
    SettingsFlood,
    /// Headers that never end.
    EndlessHeaders,
}

/// How much of it.
#[derive(Clone, Copy)]
struct Size {
    connections: usize,
    lasts: Duration,
}

/// What it came to.
#[derive(Debug)]
struct Toll {
    before: usize,
    peak: usize,
    after: usize,
    /// Connections of the abuser that the service had when it was worst.
    connections: f64,
    honest_calls: usize,
    failed: usize,
    slowest: Duration,
}

/// What the service may spend on any of them.
const MOST: usize = 200 << 20;

/// The requests in flight of a service whose clients do not finish theirs, and what it may
/// spend beside them.
const INFLIGHT: usize = 64 << 20;
const BESIDE: usize = 100 << 20;

/// Most honest calls are answered within this.
const SOON: Duration = Duration::from_secs(1);

/// The largest document.
const LARGE: usize = 1_000_000;

const STORE: &str = "/groupstate.v1.GroupStateService/Store";
const LOAD: &str = "/groupstate.v1.GroupStateService/Load";
const WATCH: &str = "/grpc.health.v1.Health/Watch";

/// One of every kind.
const PATHS: [&str; 11] = [
    STORE,
    LOAD,
    "/groupstate.v1.GroupStateService/StoreAll",
    "/groupstate.v1.GroupStateService/LoadAll",
    "/groupstate.v1.GroupStateService/Nothing",
    "/grpc.health.v1.Health/Check",
    WATCH,
    "/grpc.health.v1.Health/Nothing",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/other.Service/Call",
];

/// Of one connection.
const STREAMS: usize = 100;

const MIB: usize = 1 << 20;

// === impl Abuse ===

impl Abuse {
    const ALL: [Self; 11] = [
        Self::HalfOpen,
        Self::Idle,
        Self::DrippingHeaders,
        Self::DrippingBodies,
        Self::UnfinishedMessages,
        Self::UnreadReplies,
        Self::Watches,
        Self::RapidReset,
        Self::PingFlood,
        Self::SettingsFlood,
        Self::EndlessHeaders,
    ];

    /// What `make abuse` does.
    fn full(self) -> Size {
        let connections = match self {
            Self::HalfOpen | Self::Idle => 10_000,
            Self::DrippingHeaders => 2_000,
            Self::DrippingBodies | Self::UnfinishedMessages => 100,
            Self::Watches => 20,
            Self::UnreadReplies => 8,
            Self::RapidReset | Self::PingFlood | Self::SettingsFlood | Self::EndlessHeaders => 16,
        };
        Size {
            connections,
            lasts: Duration::from_secs(20),
        }
    }

    /// Enough to see that it is noticed.
    fn short(self) -> Size {
        let full = self.full();
        Size {
            connections: full.connections.div_ceil(10).min(500),
            lasts: Duration::from_secs(2),
        }
    }

    fn settings(self) -> Vec<Vec<String>> {
        match self {
            Self::UnfinishedMessages => {
                vec![vec!["--max-inflight-bytes".into(), INFLIGHT.to_string()]]
            }
            _ => Vec::new(),
        }
    }

    /// What the service may spend on it.
    fn most(self) -> usize {
        match self {
            Self::UnfinishedMessages => INFLIGHT + BESIDE,
            _ => MOST,
        }
    }

    /// An honest call is answered within this.
    fn soon(self) -> Duration {
        match self {
            // Its clients take both processors for a while: their 10,000 calls begin at once,
            // with 150 MB of metadata.
            Self::UnfinishedMessages => 5 * SOON,
            _ => SOON,
        }
    }

    /// One connection that misbehaves until it is closed.
    async fn connection(self, addr: String) -> std::io::Result<()> {
        if self == Self::HalfOpen {
            let tcp = TcpStream::connect(&addr).await?;
            Wire { tcp }.drain().await;
            return Ok(());
        }
        if self == Self::UnfinishedMessages {
            let unfinished = unfinished_messages(&addr).await;
            return unfinished.map_err(std::io::Error::other);
        }
        let mut wire = match self {
            Self::UnreadReplies => Wire::connect_and_read_nothing(&addr).await?,
            _ => Wire::connect(&addr).await?,
        };
        let headers = |path| wire::headers(path);
        let streams = (1..).step_by(2);
        match self {
            Self::HalfOpen | Self::UnfinishedMessages => {}
            Self::Idle => wire.drain().await,
            Self::DrippingHeaders => {
                let bytes = frame(HEADERS, END_HEADERS, 1, &headers(STORE));
                for byte in bytes.iter().cycle() {
                    wire.send(&[*byte]).await?;
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
            Self::DrippingBodies => {
                // They announce a message that is as large as may be.
                let begin = [0, 0, 0xff, 0xff, 0xff];
                for stream in streams.clone().take(STREAMS) {
                    wire.send(&frame(HEADERS, END_HEADERS, stream, &headers(STORE)))
                        .await?;
                    wire.send(&frame(DATA, 0, stream, &begin)).await?;
                }
                loop {
                    for stream in streams.clone().take(STREAMS) {
                        wire.send(&frame(DATA, 0, stream, &[0])).await?;
                    }
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
            Self::UnreadReplies => {
                let body = message(&pb::LoadRequest {
                    key: "large".into(),
                    include_expire_time: false,
                });
                for stream in streams.take(1_000) {
                    wire.send(&frame(HEADERS, END_HEADERS, stream, &headers(LOAD)))
                        .await?;
                    wire.send(&frame(DATA, END_STREAM, stream, &body)).await?;
                }
                wire.drain().await;
            }
            Self::Watches => {
                for stream in streams.take(1_000) {
                    wire.send(&frame(HEADERS, END_HEADERS, stream, &headers(WATCH)))
                        .await?;
                    wire.send(&frame(DATA, END_STREAM, stream, &[0; 5])).await?;
                }
                wire.drain().await;
            }
            Self::RapidReset => {
                for stream in streams {
                    let mut both = frame(HEADERS, END_HEADERS, stream, &headers(STORE));
                    both.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
                    wire.send(&both).await?;
                }
            }
            Self::PingFlood => {
                let many = frame(PING, 0, 0, &[0; 8]).repeat(1_000);
                loop {
                    wire.send(&many).await?;
                }
            }
            Self::SettingsFlood => {
                let many = frame(SETTINGS, 0, 0, &[]).repeat(1_000);
                loop {
                    wire.send(&many).await?;
                }
            }
            Self::EndlessHeaders => {
                wire.send(&frame(HEADERS, 0, 1, &headers(STORE))).await?;
                let mut more = vec![0x00, 1, b'x', 100];
                more.extend([b'x'; 100]);
                let many = frame(CONTINUATION, 0, 1, &more.repeat(100));
                loop {
                    wire.send(&many).await?;
                }
            }
        }
        Ok(())
    }

    /// Does it to a service, beside an honest client.
    async fn commit(self, size: Size) -> Toll {
        raise_open_files();
        let service = start(&self.settings());
        let mut honest = service.client().await;
        store_large(&mut honest).await;
        let before = service.resident_bytes();

        let mut crowd = JoinSet::new();
        let ends = Instant::now() + size.lasts;
        for _ in 0..size.connections {
            let addr = service.addr().to_owned();
            crowd.spawn(async move {
                while Instant::now() < ends {
                    // What the service closes is opened again.
                    let connection = self.connection(addr.clone());
                    let _ = tokio::time::timeout(ends - Instant::now(), connection).await;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            });
        }
        let mut toll = Toll {
            before,
            peak: before,
            after: 0,
            connections: 0.0,
            honest_calls: 0,
            failed: 0,
            slowest: Duration::ZERO,
        };
        // On a machine with more to do, it may be over after the first visit.
        while Instant::now() < ends || toll.honest_calls <= 2 {
            toll.visit(&mut honest, &service).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        crowd.shutdown().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        toll.after = service.resident_bytes();
        toll
    }
}

// === impl Toll ===

impl Toll {
    /// A few honest calls, of which one is on a new connection.
    async fn visit(&mut self, honest: &mut Client, service: &Service) {
        let mut newcomer = crate::client(service, None);
        for client in [honest, &mut newcomer] {
            let request = pb::LoadRequest {
                key: "small".into(),
                include_expire_time: false,
            };
            let begin = Instant::now();
            let answer = tokio::time::timeout(Duration::from_secs(10), client.load(request)).await;
            self.honest_calls += 1;
            self.failed += usize::from(!matches!(answer, Ok(Ok(_))));
            self.slowest = self.slowest.max(begin.elapsed());
        }
        self.peak = self.peak.max(service.resident_bytes());
        let metric = service.metric("connections");
        if let Ok(connections) = tokio::time::timeout(SOON, metric).await {
            self.connections = self.connections.max(connections);
        }
    }

    fn row(&self, abuse: Abuse, size: Size) -> String {
        format!(
            "{:<16} {:>6} {:>8} {:>7} {:>7} {:>7} {:>8} {:>7} {:>8?}",
            format!("{abuse:?}"),
            size.connections,
            self.connections,
            self.before / MIB,
            self.peak / MIB,
            self.after / MIB,
            self.honest_calls,
            self.failed,
            Duration::from_millis(self.slowest.as_millis() as u64),
        )
    }
}

const HEADING: &str = "abuse             tried  at once  before    peak   after    calls  failed  slowest\n\
                       \u{20}                               MiB     MiB     MiB   honest";

/// Opens as many streams.
async fn unfinished_messages(addr: &str) -> Result<(), Box<dyn Error + Send + Sync>> {
    let tcp = TcpStream::connect(addr).await?;
    let (client, connection) = h2::client::handshake(tcp).await?;
    let mut unfinished = vec![0; 4 * MIB];
    let length = (unfinished.len() as u32 - 4).to_be_bytes();
    unfinished[1..5].copy_from_slice(&length);
    let unfinished = Bytes::from(unfinished);
    let streams = (0..STREAMS).map(|number| {
        let url = format!("http://{addr}{}", PATHS[number % PATHS.len()]);
        unfinished_stream(client.clone(), url, unfinished.clone())
    });
    tokio::select! {
        result = connection => result?,
        ended = try_join_all(streams) => {
            let _: Vec<Infallible> = ended?;
        }
    }
    Ok(())
}

/// A stream, and another one when it was answered; until the connection fails.
async fn unfinished_stream(
    mut client: h2::client::SendRequest<Bytes>,
    url: String,
    unfinished: Bytes,
) -> Result<Infallible, h2::Error> {
    loop {
        client = client.ready().await?;
        let request = Request::post(&url)
            .header("content-type", "application/grpc")
            .header("x-metadata", "x".repeat(15 << 10))
            .body(())
            .expect("it is well-formed");
        let (response, mut body) = client.send_request(request, false)?;
        body.send_data(unfinished.clone(), false)?;
        // It is reset when it was refused.
        if let Ok(reply) = response.await {
            let mut reply = reply.into_body();
            while let Some(Ok(data)) = reply.data().await {
                let _ = reply.flow_control().release_capacity(data.len());
            }
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

fn message(message: &impl prost::Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    let mut bytes = vec![0];
    bytes.extend((body.len() as u32).to_be_bytes());
    bytes.extend(body);
    bytes
}

/// A small group, and one that is as large as may be.
async fn store_large(client: &mut Client) {
    for (key, bytes) in [("small", 10), ("large", LARGE)] {
        let alert = pb::Alert {
            fingerprint: "f".into(),
            status: pb::AlertStatus::Firing.into(),
            annotations: [("text".to_owned(), "x".repeat(bytes))].into(),
            ..Default::default()
        };
        let group = pb::AlertGroup {
            key: key.into(),
            alerts: [("f".to_owned(), alert)].into(),
            metadata: Some(pb::GroupMetadata {
                state: pb::GroupState::Firing.into(),
                ..Default::default()
            }),
        };
        let request = pb::StoreRequest {
            group: Some(group),
            expiry: None,
        };
        client.store(request).await.unwrap();
    }
}

/// The clients of this test are many.
fn raise_open_files() {
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    setrlimit(Resource::Nofile, files).unwrap();
}

/// At a size that does not keep others waiting. How quick honest calls are answered
/// is not looked at: on a machine with more to do that says little.
#[tokio::test(flavor = "multi_thread")]
async fn a_little_of_each_costs_little_and_others_are_served() {
    for abuse in Abuse::ALL {
        let toll = abuse.commit(abuse.short()).await;
        assert!(
            toll.peak - toll.before < abuse.most(),
            "{abuse:?}: {toll:?}"
        );
        assert_eq!(toll.failed, 0, "{abuse:?}: {toll:?}");
    }
}

/// Reflection has no other way in than all calls have: what is announced is refused before
/// it comes.
#[tokio::test(flavor = "multi_thread")]
async fn large_messages_to_reflection_are_refused_as_soon_as_they_are_announced() {
    let service = start(&[]);
    let before = service.most_resident_bytes();
    let tcp = TcpStream::connect(service.addr()).await.unwrap();
    let (client, connection) = h2::client::handshake(tcp).await.unwrap();
    tokio::spawn(connection);
    let announced = Bytes::from([vec![0, 0, 64, 0, 0], vec![0; 4 * MIB - 1]].concat());
    let mut streams = JoinSet::new();
    for number in 0..STREAMS {
        let path = PATHS[8 + number % 2];
        assert!(path.contains("reflection"), "{path}");
        let request = Request::post(format!("http://{}{path}", service.addr()))
            .header("content-type", "application/grpc");
        let mut client = client.clone().ready().await.unwrap();
        let announced = announced.clone();
        streams.spawn(async move {
            let request = request.body(()).unwrap();
            let (response, mut body) = client.send_request(request, false).unwrap();
            body.send_data(announced, false).unwrap();
            let mut reply = response.await.unwrap();
            assert!(reply.body_mut().data().await.is_none(), "no answer");
            let trailers = reply.body_mut().trailers().await.unwrap();
            let headers = trailers.unwrap_or_else(|| reply.headers().clone());
            let status = tonic::Status::from_header_map(&headers).unwrap();
            assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status:?}");
        });
    }
    let all = tokio::time::timeout(Duration::from_secs(30), streams.join_all());
    all.await.expect("each of them is answered");
    let grown = service.most_resident_bytes() - before;
    assert!(grown < 32 * MIB, "{grown}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: `make abuse`"]
async fn at_full_size() {
    println!("{HEADING}");
    let mut wrong = Vec::new();
    for abuse in Abuse::ALL {
        if std::env::var("ABUSE").is_ok_and(|only| only != format!("{abuse:?}")) {
            continue;
        }
        let size = abuse.full();
        let toll = abuse.commit(size).await;
        println!("{}", toll.row(abuse, size));
        if toll.peak - toll.before > abuse.most() || toll.failed > 0 || toll.slowest > abuse.soon()
        {
            wrong.push(abuse);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
