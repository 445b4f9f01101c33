//! The HTTP port, for probes, operators and Prometheus:
//!
//! | path | what it says |
//! |---|---|
//! | `/livez` | 200 as long as the process works |
//! | `/readyz` | 200 while calls are served, from memory too; 503 while stopping |
//! | `/health` | what answers, since when and why, as JSON |
//! | `/metrics` | what was counted, for Prometheus |
//! | `/loglevel` | the level of the log; PUT sets it, with a token, or without tokens from this machine |

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{ConnectInfo, DefaultBodyLimit, FromRequestParts, State},
    http::{StatusCode, header::CONTENT_TYPE, request::Parts},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    runtime::Handle,
};
use tower::ServiceExt;

use crate::{
    domain::version::InstanceId,
    grpc::admission::authentication::Tokens,
    reload::Watched,
    store::{failover::Failover, memory::MemoryStore},
    telemetry::{self, LogControl, LogLevel, MemoryUsage, rate_limited},
    transport::accept::{Newest, pause_after},
};

/// The text format of Prometheus.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// More than any request here has to say.
const MAX_BODY_BYTES: usize = 1_024;

/// Connections at once. More push out the oldest: probes and scrapes are short, so that
/// who opens connections and lets them lie keeps nobody out.
const MAX_CONNECTIONS: usize = 128;

/// The time in which the head of a request has to come, also of the next one on the same
/// connection; and then its body.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// What the HTTP port shows.
pub struct Admin {
    memory: MemoryStore,
    /// None without Redis.
    failover: Option<Failover>,
    instance: InstanceId,
    phase: AtomicU8,
    /// Who may change something; None: whoever calls from this machine.
    tokens: Option<Watched<Tokens>>,
    metrics: Option<PrometheusHandle>,
    /// None if this process writes its log elsewhere.
    log: Option<Arc<LogControl>>,
}

/// Where the process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    Starting,
    Serving,
    Stopping,
}

/// Why a request is not done, for people.
type Refusal = (StatusCode, String);

/// The request comes with a token; where there are none, from this machine. Beside tokens a
/// loopback address proves nothing: the other containers of a pod have it too.
struct Allowed;

/// The body of `/health`.
#[derive(Debug, Serialize)]
struct Health {
    status: Status,
    instance: String,
    version: &'static str,
    redis: RedisHealth,
    switch: SwitchHealth,
    mirror: MirrorHealth,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Starting,
    Ok,
    /// Redis answers, and the mirror is still being filled.
    Warming,
    /// Memory stands in for Redis.
    Degraded,
    Stopping,
}

#[derive(Debug, Serialize)]
struct RedisHealth {
    /// `up`, `down`, or `none` without `--redis-url`.
    status: &'static str,
    /// Of the last PING that was answered, in milliseconds.
    ping_ms: Option<f64>,
}

#[derive(Debug, Serialize)]
struct SwitchHealth {
    /// `closed` (Redis answers), `open` or `half_open` (memory does), or `none`.
    state: &'static str,
    /// RFC 3339.
    since: Option<String>,
    /// Why it is not closed.
    reason: String,
}

#[derive(Debug, Serialize)]
struct MirrorHealth {
    entries: usize,
    bytes: usize,
    dirty: usize,
}

// === impl Admin ===

impl Admin {
    /// Of a process without Redis.
    pub fn of_memory(memory: MemoryStore, instance: &InstanceId) -> Self {
        Self::new(memory, None, instance)
    }

    pub fn of_failover(failover: Failover, instance: &InstanceId) -> Self {
        Self::new(failover.memory().clone(), Some(failover), instance)
    }

    fn new(memory: MemoryStore, failover: Option<Failover>, instance: &InstanceId) -> Self {
        Self {
            memory,
            failover,
            instance: instance.clone(),
            phase: AtomicU8::new(Phase::Starting as u8),
            tokens: None,
            metrics: telemetry::metrics(),
            log: telemetry::log_control(),
        }
    }

    /// The same, which whoever has a token may change, and nobody else.
    pub fn open_to(self, tokens: Option<Watched<Tokens>>) -> Self {
        Self { tokens, ..self }
    }

    pub fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
    }

    /// Serves until it is dropped.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let app = self.router();
        let mut connections = Newest::new(MAX_CONNECTIONS);
        loop {
            let (tcp, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    pause_after(&error).await;
                    continue;
                }
            };
            let connection = tokio::spawn(serve_connection(tcp, peer, app.clone()));
            if connections.push(connection.abort_handle()) {
                let most = MAX_CONNECTIONS;
                rate_limited!(
                    warn,
                    most,
                    "too many connections to the HTTP port: the oldest was closed"
                );
            }
        }
    }

    fn router(self: Arc<Self>) -> Router {
        Router::new()
            .route("/livez", get(async || "ok\n"))
            .route("/readyz", get(readyz))
            .route("/health", get(health))
            .route("/metrics", get(metrics))
            .route("/loglevel", get(log_level).put(set_log_level))
            .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
            .with_state(self)
    }

    fn status(&self) -> Status {
        match self.phase.load(Ordering::SeqCst) {
            phase if phase == Phase::Starting as u8 => return Status::Starting,
            phase if phase == Phase::Stopping as u8 => return Status::Stopping,
            _ => {}
        }
        match &self.failover {
            None => Status::Ok,
            Some(failover) if failover.switch().redis_period().is_none() => Status::Degraded,
            Some(failover) if failover.monitor().resync().is_warming() => Status::Warming,
            Some(_) => Status::Ok,
        }
    }

    fn health(&self) -> Health {
        let usage = self.usage();
        let (redis, switch) = match &self.failover {
            None => (
                RedisHealth {
                    status: "none",
                    ping_ms: None,
                },
                SwitchHealth {
                    state: "none",
                    since: None,
                    reason: String::new(),
                },
            ),
            Some(failover) => {
                let status = failover.switch().status();
                let latency = failover.monitor().ping_latency();
                (
                    RedisHealth {
                        status: if status.closed { "up" } else { "down" },
                        ping_ms: latency.map(|latency| latency.as_micros() as f64 / 1_000.0),
                    },
                    SwitchHealth {
                        state: status.state,
                        since: Some(status.since.to_string()),
                        reason: status.reason,
                    },
                )
            }
        };
        Health {
            status: self.status(),
            instance: self.instance.as_str().to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            redis,
            switch,
            mirror: MirrorHealth {
                entries: usage.groups,
                bytes: usage.bytes,
                dirty: usage.dirty,
            },
        }
    }

    fn log(&self) -> Result<&Arc<LogControl>, Refusal> {
        self.log.as_ref().ok_or_else(|| {
            let text = "this process writes its log elsewhere\n".into();
            (StatusCode::SERVICE_UNAVAILABLE, text)
        })
    }

    fn usage(&self) -> MemoryUsage {
        let mut usage = self.memory.usage();
        if self.failover.is_none() {
            // Without Redis there is nobody to be told.
            (usage.dirty, usage.dirty_bytes) = (0, 0);
        }
        usage
    }
}

async fn serve_connection(
    io: impl AsyncRead + AsyncWrite + Unpin + 'static,
    peer: SocketAddr,
    app: Router,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        let answer = tokio::time::timeout(REQUEST_TIMEOUT, app.clone().oneshot(request));
        async {
            answer
                .await
                .unwrap_or_else(|_| Ok(StatusCode::REQUEST_TIMEOUT.into_response()))
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .serve_connection(TokioIo::new(io), service);
    if let Err(error) = served.await {
        tracing::debug!(%peer, %error, "a connection to the HTTP port failed");
    }
}

async fn readyz(State(admin): State<Arc<Admin>>) -> (StatusCode, &'static str) {
    match admin.status() {
        Status::Ok | Status::Warming => (StatusCode::OK, "ok\n"),
        Status::Degraded => (StatusCode::OK, "degraded: memory stands in for Redis\n"),
        Status::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
        Status::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
    }
}

async fn health(State(admin): State<Arc<Admin>>) -> Json<Health> {
    Json(admin.health())
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    telemetry::mirror(admin.usage());
    telemetry::tasks(Handle::current().metrics().num_alive_tasks());
    match &admin.metrics {
        Some(metrics) => ([(CONTENT_TYPE, EXPOSITION)], metrics.render()).into_response(),
        None => (
            StatusCode::SERVICE_UNAVAILABLE,
            "this process does not count\n",
        )
            .into_response(),
    }
}

async fn log_level(State(admin): State<Arc<Admin>>) -> Result<String, Refusal> {
    Ok(format!("{}\n", admin.log()?.level().name()))
}

async fn set_log_level(
    State(admin): State<Arc<Admin>>,
    _: Allowed,
    body: String,
) -> Result<String, Refusal> {
    let name = body.trim();
    let level = LogLevel::ALL.into_iter().find(|level| level.name() == name);
    let level = level.ok_or_else(|| {
        let names = LogLevel::ALL.map(LogLevel::name).join(", ");
        let text = format!("the body has to be one of: {names}\n");
        (StatusCode::BAD_REQUEST, text)
    })?;
    Ok(match admin.log()?.set(level) {
        Some(then) => {
            let minutes = LogControl::SET_FOR.as_secs() / 60;
            format!("{name} for {minutes} minutes, then {}\n", then.name())
        }
        None => format!("{name}\n"),
    })
}

// === impl Allowed ===

impl FromRequestParts<Arc<Admin>> for Allowed {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, admin: &Arc<Admin>) -> Result<Self, Refusal> {
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
        let Some(tokens) = &admin.tokens else {
            // An IPv4 peer of an IPv6 socket has an address of both.
            if peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback()) {
                return Ok(Self);
            }
            let text = "this may only be done from the machine or pod itself: \
                        send it to a loopback address\n";
            return Err((StatusCode::FORBIDDEN, text.into()));
        };
        let peer = peer.map(|peer| peer.0);
        match tokens.current().admit(&parts.headers, peer) {
            Ok(()) => Ok(Self),
            Err(rejection) => Err((StatusCode::UNAUTHORIZED, format!("{rejection}\n"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::{
        body::Body,
        http::{Request, header::AUTHORIZATION},
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn the_log_level_is_set_with_a_token_or_without_tokens_from_this_machine() {
        let instance = InstanceId::random();
        let memory = MemoryStore::new(1 << 20, instance.clone());
        let tokens = || Some(Watched::fixed(Tokens::parse(b"t0ken").unwrap()));
        let closed = Arc::new(Admin::of_memory(memory.clone(), &instance));
        let open = Arc::new(Admin::of_memory(memory, &instance).open_to(tokens()));
        // A level that there is not: nothing is changed by this test.
        let put = async |admin: &Arc<Admin>, peer: Option<&str>, token: Option<&str>| {
            let mut request = Request::put("/loglevel").body(Body::from("loud")).unwrap();
            if let Some(token) = token {
                let value = format!("Bearer {token}").parse().unwrap();
                request.headers_mut().insert(AUTHORIZATION, value);
            }
            if let Some(peer) = peer {
                let peer: SocketAddr = peer.parse().unwrap();
                request.extensions_mut().insert(ConnectInfo(peer));
            }
            let reply = admin.clone().router().oneshot(request).await;
            reply.unwrap().status()
        };
        for here in [
            "127.0.0.1:1",
            "127.9.9.9:1",
            "[::1]:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            for (admin, token, expected) in [
                (&closed, None, StatusCode::BAD_REQUEST),
                // A sidecar has this address, too.
                (&open, None, StatusCode::UNAUTHORIZED),
                (&open, Some("other"), StatusCode::UNAUTHORIZED),
                (&open, Some("t0ken"), StatusCode::BAD_REQUEST),
            ] {
                let status = put(admin, Some(here), token).await;
                assert_eq!(status, expected, "{here} {token:?}");
            }
        }
        for elsewhere in [
            Some("10.0.0.7:1"),
            Some("[2001:db8::1]:1"),
            Some("[::ffff:10.0.0.7]:1"),
            None,
        ] {
            for (admin, token, expected) in [
                (&closed, None, StatusCode::FORBIDDEN),
                (&closed, Some("t0ken"), StatusCode::FORBIDDEN),
                (&open, None, StatusCode::UNAUTHORIZED),
                (&open, Some("other"), StatusCode::UNAUTHORIZED),
                (&open, Some("t0ken"), StatusCode::BAD_REQUEST),
            ] {
                let status = put(admin, elsewhere, token).await;
                assert_eq!(status, expected, "{elsewhere:?} {token:?}");
            }
        }
    }

    /// Who sends half a request and waits is waited for only so long.
    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_come_is_given_up() {
        const HEAD: &str = "PUT /loglevel HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n";
        let instance = InstanceId::random();
        let memory = MemoryStore::new(1 << 20, instance.clone());
        let app = Arc::new(Admin::of_memory(memory, &instance)).router();
        for (sent, reply) in [
            (HEAD, "HTTP/1.1 408 "),
            (&HEAD[..HEAD.len() - 2], ""),
            ("", ""),
        ] {
            let (mut client, server) = tokio::io::duplex(1 << 10);
            let peer = "127.0.0.1:1".parse().unwrap();
            let served = tokio::spawn(serve_connection(server, peer, app.clone()));
            let begin = tokio::time::Instant::now();
            client.write_all(sent.as_bytes()).await.unwrap();
            let mut replied = String::new();
            // After a reply the next head is waited for as long again.
            let most = REQUEST_TIMEOUT * 2 + Duration::from_secs(1);
            let end = tokio::time::timeout(most, client.read_to_string(&mut replied));
            end.await.expect("it ends").unwrap();
            assert!(begin.elapsed() >= REQUEST_TIMEOUT, "{sent}");
            assert!(replied.starts_with(reply), "{sent}: {replied}");
            assert_eq!(replied.is_empty(), reply.is_empty(), "{sent}: {replied}");
            served.await.unwrap();
        }
    }
}
