//! The connections of gRPC clients, from accept to close: how many there may be, how
//! long they may take to begin, how old they may get.
//!
//! A connection begins with a TLS handshake, if TLS is on, and the preface of
//! HTTP/2. Until then it costs little, may take [`BEGIN_TIMEOUT`], and gives way to newer
//! ones when there are [`MAX_BEGINNING`]: who opens connections and sends nothing
//! keeps nobody out.
//!
//! tonic's own server would serve as well, but for this: it knows one age for all connections,
//! so that clients that came together would come back together; it has no bound on
//! handshakes or on connections; and it spins when there are no file descriptors left.

use std::{
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::Request;
use hyper::{
    body::Incoming,
    server::conn::http2,
    service::{Service, service_fn},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    accept::{Newest, pause_after},
    call_executor::Tasks,
    tls::{self, ServerTls},
    write_coalescing::Corked,
};
use crate::{
    grpc::{
        admission::{envelope::Envelope, head::MAX_HEADER_LIST_BYTES, slow_clients::Waits},
        services::Services,
    },
    telemetry::{self, ConnectionFailure, rate_limited},
};

/// What connections may be.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// More are closed at once.
    pub max_connections: usize,
    /// After about this time a client is asked to open another one. Calls in
    /// flight go on.
    pub max_age: Duration,
    /// The time that it has for that: afterwards no call is served.
    pub age_grace: Duration,
    /// Calls at once on one connection.
    pub max_streams: u32,
}

/// What all connections share.
struct Shared {
    calls: Envelope<Services>,
    tasks: Tasks,
    max_streams: u32,
    max_age: Duration,
    age_grace: Duration,
    waits: Arc<Waits>,
    open: TaskTracker,
    /// Connections are to end when their calls have.
    closing: CancellationToken,
}

/// Why a connection did not begin.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{}", tls::handshake_failure(.0))]
    Tls(io::Error),
    #[error("{0}")]
    NotHttp2(&'static str),
    #[error("nothing useful came within {BEGIN_TIMEOUT:?}")]
    Timeout,
    /// As load balancers do, to see whether somebody listens.
    #[error("closed before it began")]
    Closed,
}

/// A connection whose first bytes have been read already.
struct Begun<IO> {
    /// The preface, as long as it has not been read again.
    preface: &'static [u8],
    io: IO,
}

/// The time that a connection may take to begin.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections that may be beginning at once. One that has sent nothing takes about
/// 1 KiB.
const MAX_BEGINNING: usize = 4_096;

/// What a connection of HTTP/2 begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What HTTP/1 begins with.
const METHODS: [&[u8]; 6] = [b"GET", b"POS", b"PUT", b"HEA", b"DEL", b"OPT"];

/// A record of TLS begins with its type; 22 is a handshake.
const TLS_HANDSHAKE: u8 = 22;

/// Ages differ by this much, so that clients that came together do not come back
/// together.
const AGE_JITTER: f64 = 0.1;

/// A connection on which nothing is heard is asked for a sign of life this often.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// What may come before it is read of one call, and of all on a connection unless that has
/// many. It lies in h2 and is not counted: a hundred clients that send more than we read
/// would hold as many windows.
const WINDOW_BYTES: u32 = 256 << 10;

/// The time that replies get to leave a connection that is closed after its last call.
const LAST_REPLIES: Duration = Duration::from_secs(5);

/// Files that are open for other things than connections of clients: connections
/// to Redis and of the HTTP port.
const OTHER_FILES: u64 = 512;

/// How many connections there may be: as the setting says, if the process may
/// open as many files. What it may open by itself is raised to what it is allowed.
pub fn within_open_files(max_connections: usize) -> usize {
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    if setrlimit(Resource::Nofile, files).is_err() {
        files = getrlimit(Resource::Nofile);
    }
    let Some(open_files) = files.current else {
        return max_connections;
    };
    // Half of very few.
    let most = open_files.saturating_sub(OTHER_FILES).max(open_files / 2);
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    if most < max_connections {
        tracing::warn!(
            max_connections,
            open_files,
            most,
            "the process may not open as many files as there may be connections"
        );
    }
    max_connections.min(most)
}

/// Serves the connections that come to `listener` until `stop`, and waits until
/// the last call on them is over.
pub async fn serve(
    listener: TcpListener,
    mut tls: Option<ServerTls>,
    limits: ConnectionLimits,
    waits: Arc<Waits>,
    calls: Envelope<Services>,
    stop: impl Future<Output = ()>,
) {
    let shared = Arc::new(Shared {
        calls,
        tasks: Tasks::start(),
        max_streams: limits.max_streams,
        max_age: limits.max_age,
        age_grace: limits.age_grace,
        waits,
        open: TaskTracker::new(),
        closing: CancellationToken::new(),
    });
    let slots = Arc::new(Semaphore::new(limits.max_connections));
    let mut beginning = Newest::new(MAX_BEGINNING);
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            () = renew(&mut tls) => continue,
            accepted = listener.accept() => accepted,
        };
        let (tcp, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            telemetry::connection_failed(ConnectionFailure::MaxConnections);
            let most = limits.max_connections;
            rate_limited!(warn, %peer, most, "a connection was closed, being over --max-connections");
            continue;
        };
        let acceptor = tls.as_ref().map(ServerTls::acceptor);
        let begin = shared.clone().begin(tcp, peer, acceptor, slot);
        if beginning.push(tokio::spawn(begin).abort_handle()) {
            telemetry::connection_failed(ConnectionFailure::Timeout);
            let most = MAX_BEGINNING;
            rate_limited!(
                warn,
                most,
                "too many connections that do not begin: the oldest was closed"
            );
        }
    }
    // From here on nobody can connect.
    drop((listener, beginning));
    shared.closing.cancel();
    shared.open.close();
    shared.open.wait().await;
}

fn http2(tasks: Tasks, max_streams: u32) -> http2::Builder<Tasks> {
    let mut http2 = http2::Builder::new(tasks);
    http2
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .max_concurrent_streams(max_streams)
        .initial_connection_window_size(connection_window(max_streams))
        .initial_stream_window_size(WINDOW_BYTES)
        .max_header_list_size(MAX_HEADER_LIST_BYTES)
        // Calls that were cancelled before they were looked at. By itself h2 ends a
        // connection at 20 of them, as a flood, with all calls on it: a client in a
        // hurry comes to that when this process is held up for a moment.
        .max_pending_accept_reset_streams(max_streams as usize);
    http2
}

/// h2 takes messages of few bytes for a flood, and ends a connection with all calls on it,
/// when more of them wait to be read than fit into half its window at 256 bytes each.
fn connection_window(max_streams: u32) -> u32 {
    const MOST: u32 = (1 << 31) - 1; // of HTTP/2
    max_streams
        .saturating_mul(2 * 256)
        .clamp(WINDOW_BYTES, MOST)
}

async fn renew(tls: &mut Option<ServerTls>) {
    match tls {
        Some(tls) => tls.renew().await,
        None => std::future::pending().await,
    }
}

// === impl Shared ===

impl Shared {
    async fn begin(
        self: Arc<Self>,
        tcp: TcpStream,
        peer: SocketAddr,
        acceptor: Option<TlsAcceptor>,
        slot: OwnedSemaphorePermit,
    ) {
        // Small replies must not wait for more of them.
        let _ = tcp.set_nodelay(true);
        let begun = async {
            match acceptor {
                Some(acceptor) => {
                    // A client that has sent nothing at all is no failed handshake.
                    if !matches!(tcp.peek(&mut [0]).await, Ok(1..)) {
                        return Err(Failure::Closed);
                    }
                    let io = acceptor.accept(tcp).await.map_err(Failure::Tls)?;
                    let begun = Begun::new(io).await?;
                    self.open.spawn(self.clone().serve(begun, peer, slot));
                }
                None => {
                    let begun = Begun::new(tcp).await?;
                    self.open.spawn(self.clone().serve(begun, peer, slot));
                }
            }
            Ok(())
        };
        let begun = tokio::time::timeout(BEGIN_TIMEOUT, begun).await;
        match begun.unwrap_or(Err(Failure::Timeout)) {
            Ok(()) => {}
            Err(Failure::Closed) => tracing::debug!(%peer, "a connection was closed unused"),
            Err(failure) => {
                telemetry::connection_failed(match failure {
                    Failure::Timeout => ConnectionFailure::Timeout,
                    _ => ConnectionFailure::Handshake,
                });
                if let Failure::Tls(error) = &failure
                    && let Some(reason) = tls::authentication_failure(error)
                {
                    telemetry::authentication_failed(reason);
                }
                rate_limited!(warn, %peer, reason = %failure, "a connection was refused");
            }
        }
    }

    async fn serve<IO>(
        self: Arc<Self>,
        io: Begun<IO>,
        peer: SocketAddr,
        _slot: OwnedSemaphorePermit,
    ) where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let _open = telemetry::connection_opens();
        let connected = self.waits.connect(peer);
        let tasks = self.tasks.of_connection();
        let service = service_fn(|mut request: Request<Incoming>| {
            request.extensions_mut().insert(connected.client().clone());
            let answer = self.calls.call(request);
            tasks.next_is(&answer);
            answer
        });
        let http2 = http2(tasks.clone(), self.max_streams);
        let io = Corked::new(io);
        let connection = http2.serve_connection(TokioIo::new(io.clone()), service);
        let mut connection = pin!(connection);
        let served = async {
            tokio::select! {
                result = &mut connection => return result.map_err(io::Error::other),
                () = tokio::time::sleep(self.max_age.mul_f64(jitter())) => {}
                () = self.closing.cancelled() => {}
            }
            // No more calls are taken; those that there are end in their own time. But HTTP/2
            // has the client agree: until it answers a PING, its calls are taken.
            connected.leave();
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                result = &mut connection => return result.map_err(io::Error::other),
                () = tokio::time::sleep(self.age_grace) => {}
            }
            let retired = async {
                connected.retire().await;
                tokio::time::sleep(LAST_REPLIES).await;
            };
            tokio::select! {
                result = &mut connection => result.map_err(io::Error::other),
                () = retired => {
                    telemetry::connection_failed(ConnectionFailure::Age);
                    rate_limited!(
                        info,
                        %peer,
                        "a connection was closed: its client went on with it beyond \
                         --max-connection-age and --max-connection-age-grace"
                    );
                    Ok(())
                }
            }
        };
        tokio::select! {
            result = io.turns(served) => if let Err(error) = result {
                // What hyper says itself is only "http2 error".
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::debug!(%peer, %error, cause, "a connection failed");
            },
            // With all calls that there are on it.
            () = connected.closing() => {}
        }
    }
}

fn jitter() -> f64 {
    rand::random_range(1.0 - AGE_JITTER..1.0 + AGE_JITTER)
}

// === impl Begun ===

impl<IO: AsyncRead + Unpin> Begun<IO> {
    /// Waits for the preface.
    async fn new(mut io: IO) -> Result<Self, Failure> {
        let mut read = [0; PREFACE.len()];
        let mut bytes = 0;
        while bytes < PREFACE.len() {
            match io.read(&mut read[bytes..]).await {
                Ok(0) | Err(_) => return Err(Failure::Closed),
                Ok(more) => bytes += more,
            }
            if !PREFACE.starts_with(&read[..bytes]) {
                return Err(Failure::NotHttp2(spoken(&read[..bytes])));
            }
        }
        Ok(Self {
            preface: PREFACE,
            io,
        })
    }
}

/// What the first bytes of a client that does not speak HTTP/2 look like.
fn spoken(begin: &[u8]) -> &'static str {
    if begin[0] == TLS_HANDSHAKE {
        "the client speaks TLS, and this port does not: --tls-cert is not set"
    } else if METHODS.iter().any(|method| begin.starts_with(method)) {
        "the client speaks HTTP/1, and gRPC needs HTTP/2"
    } else {
        "the client does not speak HTTP/2"
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Begun<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.preface.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buffer);
        }
        let (now, later) = self
            .preface
            .split_at(self.preface.len().min(buffer.remaining()));
        buffer.put_slice(now);
        self.preface = later;
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Begun<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
