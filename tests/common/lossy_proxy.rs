//! A TCP proxy in front of Redis on a bad day: at random it loses replies, holds
//! requests and replies back, and lets requests arrive after their connection was
//! closed.
//!
//! It stands beside [`super::proxy`], which loses one reply at a moment that the
//! test chooses. Here nobody chooses: what matters is that replies are lost while
//! others write.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::{late_requests::LateRequests, redis_server, resp::Requests};

/// Passes bytes on both ways, as the weather allows.
pub struct LossyProxy {
    /// Where it listens.
    addr: SocketAddr,
    /// What all its connections share.
    state: Arc<State>,
}

/// How often a chunk of bytes fares badly. A chunk is what one read gives: a
/// request or a reply, or a few of one connection. Requests are always whole.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    /// The share of replies that are swallowed. Redis has executed what they
    /// answer; the connection is closed, so whatever else was under way on it is
    /// lost as well.
    pub lost: f64,
    /// The share of requests, and of replies, that wait, and with them all that
    /// comes after on their connection.
    pub late: f64,
    /// The share of requests whose connection is closed at once, and that reach
    /// Redis all the same after they have waited.
    pub outliving: f64,
    /// They wait up to this long.
    pub longest_wait: Duration,
}

/// What the connections of a proxy share.
struct State {
    /// Fair until [`LossyProxy::set_weather`].
    weather: Mutex<Weather>,
    /// Decides the fate of each chunk.
    dice: Mutex<StdRng>,
    /// The replies that were swallowed.
    lost: Mutex<Vec<Vec<u8>>>,
    /// The requests that outlive their connections.
    late: Arc<LateRequests>,
}

/// What becomes of requests.
enum FateOfRequests {
    Pass,
    Wait(Duration),
    Outlive(Duration),
}

/// What becomes of replies.
enum FateOfReplies {
    Pass,
    Wait(Duration),
    AreLost,
}

// === impl LossyProxy ===

impl LossyProxy {
    /// Starts in fair weather, so that clients can connect.
    pub async fn start(upstream: SocketAddr, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(State {
            weather: Mutex::default(),
            dice: Mutex::new(StdRng::seed_from_u64(seed)),
            lost: Mutex::default(),
            late: LateRequests::new(upstream),
        });
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, upstream, shared.clone()));
            }
        });
        Self { addr, state }
    }

    pub fn url(&self) -> String {
        redis_server::url("redis", self.addr)
    }

    pub fn set_weather(&self, weather: Weather) {
        *self.state.weather.lock().unwrap() = weather;
    }

    /// The replies that were swallowed so far.
    pub fn lost_replies(&self) -> Vec<Vec<u8>> {
        self.state.lost.lock().unwrap().clone()
    }

    /// The requests that outlive their connections.
    pub fn late_requests(&self) -> &LateRequests {
        &self.state.late
    }
}

// === impl State ===

impl State {
    fn fate_of_requests(&self) -> FateOfRequests {
        let weather = *self.weather.lock().unwrap();
        let mut dice = self.dice.lock().unwrap();
        if dice.random_bool(weather.outliving) {
            FateOfRequests::Outlive(weather.longest_wait.mul_f64(dice.random()))
        } else if dice.random_bool(weather.late) {
            FateOfRequests::Wait(weather.longest_wait.mul_f64(dice.random()))
        } else {
            FateOfRequests::Pass
        }
    }

    fn fate_of_replies(&self) -> FateOfReplies {
        let weather = *self.weather.lock().unwrap();
        let mut dice = self.dice.lock().unwrap();
        if dice.random_bool(weather.lost) {
            FateOfReplies::AreLost
        } else if dice.random_bool(weather.late) {
            FateOfReplies::Wait(weather.longest_wait.mul_f64(dice.random()))
        } else {
            FateOfReplies::Pass
        }
    }
}

async fn pass(client: TcpStream, upstream: SocketAddr, state: Arc<State>) {
    let Ok(server) = TcpStream::connect(upstream).await else {
        return;
    };
    // As between real machines: otherwise small requests wait for each other.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // Either end closes both directions. A request that still waits here is
    // dropped then; only one that was sent on a detour outlives its connection.
    tokio::select! {
        () = pass_requests(from_client, to_server, &state) => {}
        () = pass_replies(from_server, to_client, &state) => {}
    }
}

/// Passes requests on until some outlive the connection or either side closes.
async fn pass_requests(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: &State) {
    let mut requests = Requests::default();
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let mut whole = requests.whole(&buffer[..read]);
        if whole.is_empty() {
            continue;
        }
        state.late.pass_by(&mut whole);
        match state.fate_of_requests() {
            FateOfRequests::Pass => {}
            FateOfRequests::Wait(time) => tokio::time::sleep(time).await,
            FateOfRequests::Outlive(time) => {
                let _ = state.late.detour(time).send(whole);
                return;
            }
        }
        if to.write_all(&whole).await.is_err() {
            return;
        }
    }
}

/// Passes replies on until some are lost or either side closes.
async fn pass_replies(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: &State) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        match state.fate_of_replies() {
            FateOfReplies::Pass => {}
            FateOfReplies::Wait(time) => tokio::time::sleep(time).await,
            FateOfReplies::AreLost => {
                state.lost.lock().unwrap().push(buffer[..read].to_vec());
                return;
            }
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
