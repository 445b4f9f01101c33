//! A TCP proxy in front of Redis that does to connections what networks do:
//! delays, resets, partitions that heal, bytes that vanish, and requests that
//! arrive when their connection is gone.
//!
//! TCP never loses bytes in the middle of a stream. So a connection on which
//! bytes have vanished stays dead in that direction for good, even when the
//! fault is over: it can only be given up or reset.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};

use super::{late_requests::LateRequests, redis_server, resp::Requests};

/// Passes connections on to a server, with faults on demand. Ends when dropped.
pub struct FaultProxy {
    addr: SocketAddr,
    upstream: SocketAddr,
    behaviour: watch::Sender<Behaviour>,
    late: Arc<LateRequests>,
    /// None while new connections are refused.
    accepting: Option<JoinHandle<()>>,
    /// Keeps the port while new connections are refused: others must not get it.
    _port: TcpSocket,
}

/// Which way bytes vanish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    FromServer,
    Both,
}

/// What happens to every connection at the moment.
#[derive(Clone, Copy, Debug, Default)]
struct Behaviour {
    /// Every byte arrives later by this, in both directions.
    delay: Duration,
    /// So many bytes go through in a second, in each direction and on each connection.
    rate: Option<usize>,
    /// Bytes wait, and arrive when this is over.
    held: bool,
    /// Bytes vanish this way.
    swallowed: Option<Direction>,
    /// Requests that vanish arrive this long after their connection was ended.
    detour: Option<Duration>,
    /// Connections that are older than the last of these resets are ended.
    resets: u64,
    /// The same for every other connection.
    half_resets: u64,
}

// === impl FaultProxy ===

impl FaultProxy {
    pub async fn start(upstream: SocketAddr) -> Self {
        let port = bind("127.0.0.1:0".parse().unwrap());
        let mut proxy = Self {
            addr: port.local_addr().unwrap(),
            upstream,
            behaviour: watch::Sender::default(),
            late: LateRequests::new(upstream),
            accepting: None,
            _port: port,
        };
        proxy.accept();
        proxy
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its address as a URL for clients of Redis.
    pub fn url(&self) -> String {
        redis_server::url("redis", self.addr)
    }

    /// From now on every byte arrives later by this; zero ends it.
    pub fn delay(&self, delay: Duration) {
        self.behaviour.send_modify(|now| now.delay = delay);
    }

    /// From now on a link that carries so many bytes a second; None ends it.
    pub fn limit(&self, bytes_per_second: Option<usize>) {
        self.behaviour
            .send_modify(|now| now.rate = bytes_per_second);
    }

    /// A partition that will heal: bytes wait until [`Self::release`].
    pub fn hold(&self) {
        self.behaviour.send_modify(|now| now.held = true);
    }

    /// Lets go of what was held.
    pub fn release(&self) {
        self.behaviour.send_modify(|now| now.held = false);
    }

    /// A black hole: bytes vanish, on new connections too.
    pub fn swallow(&self, direction: Direction) {
        let swallowed = Some(direction);
        self.behaviour.send_modify(|now| now.swallowed = swallowed);
    }

    /// A black hole that does not keep the requests it takes: they reach Redis
    /// this long after their connection was ended.
    pub fn divert(&self, delay: Duration) {
        self.behaviour.send_modify(|now| {
            now.swallowed = Some(Direction::ToServer);
            now.detour = Some(delay);
        });
    }

    /// Ends the black hole. Connections that lost bytes stay as they are.
    pub fn stop_swallowing(&self) {
        self.behaviour.send_modify(|now| {
            now.swallowed = None;
            now.detour = None;
        });
    }

    /// Ends all connections by RST.
    pub fn reset_all(&self) {
        self.behaviour.send_modify(|now| now.resets += 1);
    }

    /// Ends every other connection by RST.
    pub fn reset_every_other(&self) {
        self.behaviour.send_modify(|now| now.half_resets += 1);
    }

    /// The requests that outlive their connections.
    pub fn late_requests(&self) -> &LateRequests {
        &self.late
    }

    /// Refuses new connections, as a host without a server does.
    pub async fn refuse(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            accepting.abort();
            // Nobody listens when the task is gone.
            let _ = accepting.await;
        }
    }

    /// Leads new connections to another server, as a name does that was given
    /// another address. Those that are there stay where they are.
    pub async fn lead_to(&mut self, upstream: SocketAddr) {
        self.refuse().await;
        self.upstream = upstream;
        self.accept();
    }

    /// Takes new connections again.
    pub fn accept(&mut self) {
        if self.accepting.is_some() {
            return;
        }
        let listener: TcpListener = bind(self.addr).listen(1_024).unwrap();
        let (upstream, behaviour) = (self.upstream, self.behaviour.subscribe());
        let late = self.late.clone();
        self.accepting = Some(tokio::spawn(async move {
            let mut second = false;
            while let Ok((client, _)) = listener.accept().await {
                let (behaviour, late) = (behaviour.clone(), late.clone());
                tokio::spawn(pass(client, upstream, second, behaviour, late));
                second = !second;
            }
        }));
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        if let Some(accepting) = &self.accepting {
            accepting.abort();
        }
    }
}

/// A socket at an address where others of ours may be as well.
fn bind(addr: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind(addr).unwrap();
    socket
}

/// Carries one connection, every other of which `is_second`, until either end closes it, it is reset, or the proxy
/// is gone.
async fn pass(
    mut client: TcpStream,
    upstream: SocketAddr,
    is_second: bool,
    mut behaviour: watch::Receiver<Behaviour>,
    late: Arc<LateRequests>,
) {
    let before = *behaviour.borrow();
    let is_reset = |now: &Behaviour| {
        now.resets > before.resets || is_second && now.half_resets > before.half_resets
    };
    // A server that is gone looks to the client as if there were no proxy.
    let mut reset = true;
    if let Ok(mut server) = TcpStream::connect(upstream).await {
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        {
            let (from_client, to_client) = client.split();
            let (from_server, to_server) = server.split();
            let requests = pump(
                from_client,
                to_server,
                Direction::ToServer,
                behaviour.clone(),
                late.clone(),
            );
            let replies = pump(
                from_server,
                to_client,
                Direction::FromServer,
                behaviour.clone(),
                late,
            );
            tokio::select! {
                () = requests => reset = false,
                () = replies => reset = false,
                _ = behaviour.wait_for(is_reset) => {}
            }
        }
        if reset {
            let _ = server.set_zero_linger();
        }
    }
    if reset {
        let _ = client.set_zero_linger();
    }
}

/// Carries bytes one way until the connection ends. Once bytes have vanished it does
/// not end before the black hole does: who cannot be heard cannot say goodbye either.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    way: Direction,
    mut behaviour: watch::Receiver<Behaviour>,
    late: Arc<LateRequests>,
) {
    let (sender, mut line) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let mut gate = behaviour.clone();
    let read = async move {
        let mut buffer = vec![0; 64 * 1024];
        let mut requests = Requests::default();
        let mut dead = false;
        let mut detour = None;
        loop {
            let count = from.read(&mut buffer).await.unwrap_or(0);
            let now = *behaviour.borrow();
            dead |= now
                .swallowed
                .is_some_and(|swallowed| swallowed == Direction::Both || swallowed == way);
            if dead && count == 0 && way == Direction::FromServer {
                std::future::pending::<()>().await;
            }
            if count == 0 {
                // A goodbye that nobody has heard is said again.
                let _ = behaviour.wait_for(|now| now.swallowed.is_none()).await;
                return;
            }
            let mut bytes = buffer[..count].to_vec();
            if way == Direction::ToServer {
                bytes = requests.whole(&bytes);
                late.pass_by(&mut bytes);
            }
            if !dead {
                let _ = sender.send((Instant::now() + now.delay, bytes));
            } else if let Some(delay) = now.detour {
                let detour = detour.get_or_insert_with(|| late.detour(delay));
                let _ = detour.send(bytes);
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = line.recv().await {
            tokio::time::sleep_until(due).await;
            if gate.wait_for(|now| !now.held).await.is_err() || to.write_all(&bytes).await.is_err()
            {
                return;
            }
            let rate = gate.borrow().rate;
            if let Some(rate) = rate {
                tokio::time::sleep(Duration::from_secs(1) * bytes.len() as u32 / rate as u32).await;
            }
        }
    };
    // What was read before the end is still written.
    tokio::pin!(read, write);
    tokio::select! {
        () = &mut read => write.await,
        () = &mut write => {}
    }
}
