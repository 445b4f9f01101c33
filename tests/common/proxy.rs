//! A TCP proxy in front of Redis that can lose replies.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
};

use super::redis_server;

/// Passes bytes on both ways until it is told to lose replies.
pub struct Proxy {
    addr: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// The next reply after a request that contains `EVALSHA` is swallowed and
    /// its connection closed.
    armed: AtomicBool,
    /// Whether that has happened since.
    swallowed: AtomicBool,
    swallowed_one: Notify,
    /// The next request that contains `EVALSHA` outlives its connection.
    detached: AtomicBool,
    /// Script calls wait as long as this holds.
    held: AtomicBool,
    released: Notify,
}

impl Proxy {
    /// How long a request is under way that outlives its connection.
    pub const DETOUR: Duration = Duration::from_millis(300);

    pub async fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state: Arc<State> = Arc::default();
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

    /// Swallows the reply to the next script call, which Redis has executed
    /// then, and closes the connection. Later script calls of all connections
    /// wait until [`Proxy::release`].
    pub fn swallow_next_reply(&self) {
        self.state.swallowed.store(false, Ordering::SeqCst);
        self.state.held.store(true, Ordering::SeqCst);
        self.state.armed.store(true, Ordering::SeqCst);
    }

    /// Closes the connection of the next script call at once; the call reaches
    /// Redis all the same, after [`Proxy::DETOUR`].
    pub fn detach_next_request(&self) {
        self.state.detached.store(true, Ordering::SeqCst);
    }

    /// Waits until that reply was swallowed.
    pub async fn swallowed(&self) {
        let notified = self.state.swallowed_one.notified();
        if !self.state.swallowed.load(Ordering::SeqCst) {
            notified.await;
        }
    }

    /// Lets script calls pass again.
    pub fn release(&self) {
        self.state.held.store(false, Ordering::SeqCst);
        self.state.released.notify_waiters();
    }
}

async fn pass(client: TcpStream, upstream: SocketAddr, state: Arc<State>) {
    let Ok(server) = TcpStream::connect(upstream).await else {
        return;
    };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let swallow = Arc::new(AtomicBool::new(false));

    let requests = {
        let (state, swallow) = (state.clone(), swallow.clone());
        async move {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
                let is_script = buffer[..read].windows(7).any(|word| word == b"EVALSHA");
                if is_script && state.detached.swap(false, Ordering::SeqCst) {
                    let request = buffer[..read].to_vec();
                    tokio::spawn(async move {
                        tokio::time::sleep(Proxy::DETOUR).await;
                        let mut late = TcpStream::connect(upstream).await.unwrap();
                        late.write_all(&request).await.unwrap();
                        let _ = late.read(&mut [0; 1024]).await;
                    });
                    return;
                }
                if is_script && state.armed.swap(false, Ordering::SeqCst) {
                    swallow.store(true, Ordering::SeqCst);
                } else if is_script {
                    loop {
                        let released = state.released.notified();
                        if !state.held.load(Ordering::SeqCst) {
                            break;
                        }
                        released.await;
                    }
                }
                if to_server.write_all(&buffer[..read]).await.is_err() {
                    return;
                }
            }
        }
    };
    let replies = async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = from_server.read(&mut buffer).await {
            if swallow.load(Ordering::SeqCst) {
                state.swallowed.store(true, Ordering::SeqCst);
                state.swallowed_one.notify_waiters();
                return;
            }
            if to_client.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
    };
    // Either end closes both directions.
    tokio::select! {
        () = requests => {}
        () = replies => {}
    }
}
