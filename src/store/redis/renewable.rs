//! One connection of ours that can be replaced by a new one at any time.
//!
//! A fred client is never connected a second time. What was queued in it when
//! its task was ended stays in its counters for ever, and from then on it sends
//! `GET` and `STRLEN` only together with the next command of another kind. So
//! whatever goes wrong, a new client takes the place of the old one, of which
//! nothing is left once the calls under way on it have ended.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use fred::prelude::{Client, ClientLike, Error};
use tokio::{sync::Notify, time::Instant};
use tokio_util::task::AbortOnDropHandle;

use super::{
    link::{Known, Link, lock},
    topology::Node,
};

/// A connection to a server, or to every primary of a cluster.
pub struct Renewable {
    client: Mutex<Client>,
    /// Whether it is connected, and it is known to whom.
    is_ready: AtomicBool,
    /// See [`Known::identities`]: when it was.
    identities: AtomicU64,
    /// Ends the client that is used now.
    renewal: Notify,
    known: Arc<Known>,
    answered: Answered,
}

/// When each server has last answered anything over this connection: a
/// connection whose PING waits behind large replies is not dead.
#[derive(Debug, Default)]
struct Answered {
    /// In local microseconds; 0: never.
    only: AtomicU64,
    primaries: Mutex<Vec<(Node, Instant)>>,
}

// === impl Renewable ===

impl Renewable {
    pub fn new(known: Arc<Known>) -> Arc<Self> {
        Arc::new(Self {
            client: Mutex::new(known.new_client()),
            is_ready: AtomicBool::new(false),
            identities: AtomicU64::new(0),
            renewal: Notify::new(),
            known,
            answered: Answered::default(),
        })
    }

    /// The client that is used now.
    pub fn client(&self) -> Client {
        lock(&self.client).clone()
    }

    pub fn is_connected(&self) -> bool {
        self.is_ready.load(SeqCst)
            && self.identities.load(SeqCst) == self.known.identities()
            && lock(&self.client).is_connected()
    }

    /// Replaces the client, whatever it is waiting for.
    pub fn renew(&self) {
        // If it is not connected, it is being replaced already.
        if self.is_connected() {
            self.renewal.notify_one();
        }
    }

    /// A server has answered.
    pub fn answers(&self, node: &Node) {
        let now = Instant::now();
        match node {
            Node::Only => {
                let now = u64::try_from(self.known.micros(now)).unwrap_or(0);
                self.answered.only.fetch_max(now, Relaxed);
            }
            Node::Primary(_) => {
                let mut primaries = lock(&self.answered.primaries);
                match primaries.iter_mut().find(|(known, _)| known == node) {
                    Some((_, at)) => *at = now,
                    None => primaries.push((node.clone(), now)),
                }
            }
        }
    }

    /// Whether each of these servers has answered since then.
    pub fn all_answered_since(&self, nodes: &[Node], moment: Instant) -> bool {
        let micros = u64::try_from(self.known.micros(moment)).unwrap_or(0);
        nodes.iter().all(|node| match node {
            Node::Only => self.answered.only.load(Relaxed) > micros,
            Node::Primary(_) => {
                let primaries = lock(&self.answered.primaries);
                let known = primaries.iter().find(|(known, _)| known == node);
                known.is_some_and(|(_, at)| *at > moment)
            }
        })
    }

    /// Keeps a client connected for ever. To a cluster it connects again by itself after
    /// an error of a connection. A new one takes its place when it gives up: its task
    /// ends with some errors of a cluster, whatever the policy says. And when it
    /// would not: when it is told to reconnect, it keeps what connections to a
    /// cluster show no error, and waits for a hung server to take what it was sent.
    /// And without a cluster, when another connection has met another server: an
    /// address may be moved while connections to where it led before live on.
    pub async fn stay_connected(self: Arc<Self>) {
        loop {
            let client = self.client();
            // Before it connects: nothing that happens to it is missed.
            let _listening =
                AbortOnDropHandle::new(tokio::spawn(self.known.clone().listen(&client)));
            let task = AbortOnDropHandle::new(client.connect());
            let is_of_use = async {
                let (run_id, identities) = self.known.meet(&client).await?;
                self.identities.store(identities, SeqCst);
                self.is_ready.store(true, SeqCst);
                self.known.is_another(&run_id).await;
                Ok::<(), Error>(())
            };
            let pause = tokio::select! {
                biased;
                // A task that ended by a panic is begun anew as well.
                ended = task => {
                    tracing::debug!(?ended, "connecting to Redis again from the beginning");
                    if let Ok(Err(error)) = &ended {
                        self.known.failed(error);
                    }
                    Link::CONNECT_AGAIN
                }
                is_another = is_of_use => {
                    tracing::debug!(?is_another, "a connection to Redis leads elsewhere");
                    if is_another.is_ok() { Duration::ZERO } else { Link::CONNECT_AGAIN }
                }
                () = self.renewal.notified() => {
                    tracing::debug!("a connection to Redis is replaced");
                    Duration::ZERO
                }
            };
            self.is_ready.store(false, SeqCst);
            tokio::time::sleep(pause).await;
            lock(&self.answered.primaries).clear();
            *lock(&self.client) = self.known.new_client();
        }
    }
}
