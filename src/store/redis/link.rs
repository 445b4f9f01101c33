//! One pool of connections to a server or a cluster, and what is known of those
//! at its other end: who holds which keys, and what time it is there.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fred::{
    interfaces::ClusterInterface,
    prelude::{
        Builder, Client, ClientLike, Config, ConnectionConfig, Error, EventInterface,
        PerformanceConfig, Pool, ReconnectPolicy, Server, ServerConfig, Value,
    },
};
use futures::future::join_all;
use tokio::{
    sync::{Notify, broadcast::error::RecvError, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    fault::{is_reply_of_redis, readable},
    topology::{Node, Topology},
};
use crate::{
    store::StoreError,
    telemetry::{self, RedisCommand},
    version::IntervalClock,
};

/// A pool of connections. In a cluster each of them leads to every primary. They
/// are closed when this is dropped.
pub struct Link {
    /// The primary that sentinels have named; None without sentinels.
    server: Option<Server>,
    pool: Pool,
    /// None: a cluster, or a socket.
    only_server: Option<Arc<Server>>,
    known: Arc<Known>,
    /// Tells each client to let go of its connection.
    renewals: Vec<Arc<Notify>>,
    /// Keep the connections, and listen to what becomes of them.
    _tasks: JoinSet<()>,
}

/// What is known of the other end.
struct Known {
    topology: Mutex<Arc<Topology>>,
    clocks: Mutex<HashMap<Node, IntervalClock>>,
    events: Arc<Events>,
}

/// What happens to the connections of all links, one after the other.
pub struct Events {
    last: Mutex<LastEvent>,
    /// Counts new connections.
    connected: watch::Sender<u64>,
    /// Counts the times that other servers took the place of those before.
    moved: watch::Sender<u64>,
    /// Where local microseconds begin.
    started: Instant,
}

#[derive(Debug, Default)]
struct LastEvent {
    /// Every connection reports every attempt; one line a change is logged.
    logged: String,
    /// Why there is no connection.
    error: String,
}

/// Why a connection did not answer a PING.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoPong {
    /// No answer within the time, or no connection.
    Silence,
    /// Redis answered with an error.
    Refused(String),
}

// === impl Link ===

impl Link {
    const RECONNECT_MIN_DELAY_MS: u32 = 50;
    const RECONNECT_MAX_DELAY_MS: u32 = 500;
    const LOOK_BOUND: Duration = Duration::from_secs(1);
    const CONNECT_AGAIN: Duration = Duration::from_millis(100);

    /// Starts to connect, in the background and for as long as it takes.
    pub fn open(
        server: Option<Server>,
        config: Config,
        pool_size: usize,
        timeout: Duration,
        events: Arc<Events>,
    ) -> Result<Self, StoreError> {
        let topology = if config.server.is_clustered() {
            Topology::default()
        } else {
            Topology::single()
        };
        let only_server = match &config.server {
            ServerConfig::Centralized { server } => Some(Arc::new(server.clone())),
            _ => None,
        };
        let pool = Builder::from_config(config)
            .with_performance_config(|config: &mut PerformanceConfig| {
                // The only timeout that takes a command back out of fred's
                // queues; dropping the future of a call does not. It is no
                // less than what any attempt waits for its answer.
                config.default_command_timeout = timeout * 2;
            })
            .with_connection_config(|config: &mut ConnectionConfig| {
                config.connection_timeout = timeout.max(Duration::from_millis(500));
                config.internal_command_timeout = timeout.max(Duration::from_millis(500));
                // Repeating is decided here, where it is known what is safe. On
                // `ASK`, fred 10.1 would take another command's answer for that
                // to its own `ASKING`.
                config.max_command_attempts = 1;
                config.max_redirections = 0;
                config.reconnect_on_auth_error = true;
                config.tcp.nodelay = Some(true);
            })
            .set_policy(ReconnectPolicy::new_exponential(
                0, // without end
                Self::RECONNECT_MIN_DELAY_MS,
                Self::RECONNECT_MAX_DELAY_MS,
                2,
            ))
            .build_pool(pool_size)
            .map_err(|error| StoreError::Unavailable(error.details().to_owned()))?;
        let known = Arc::new(Known {
            topology: Mutex::new(Arc::new(topology)),
            clocks: Mutex::default(),
            events,
        });
        let mut tasks = JoinSet::new();
        let mut renewals = Vec::new();
        for client in pool.clients() {
            let renewal: Arc<Notify> = Arc::default();
            tasks.spawn(listen(client.clone(), known.clone()));
            tasks.spawn(stay_connected(client.clone(), renewal.clone()));
            renewals.push(renewal);
        }
        Ok(Self {
            server,
            pool,
            only_server,
            known,
            renewals,
            _tasks: tasks,
        })
    }

    /// The server at the other end, if there is just one.
    pub fn only_server(&self) -> Option<&Arc<Server>> {
        self.only_server.as_ref()
    }

    /// The primary that sentinels have named; None without sentinels.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_ref()
    }

    /// Whether every connection of the pool is there.
    pub fn is_connected(&self) -> bool {
        self.pool.clients().iter().all(Client::is_connected)
    }

    /// The client that takes the next command, if it is connected.
    pub fn client(&self) -> Option<Client> {
        let client = self.pool.next_connected();
        client.is_connected().then(|| client.clone())
    }

    /// Which server holds which keys.
    pub fn topology(&self) -> Arc<Topology> {
        lock(&self.known.topology).clone()
    }

    /// Asks a cluster who holds what. What comes of it is in [`Self::topology`].
    pub async fn look_at_cluster(&self) {
        if let Some(client) = self.client() {
            let _ = tokio::time::timeout(Self::LOOK_BOUND, client.sync_cluster()).await;
        }
    }

    /// PINGs over one connection, or over any, each of the servers. None where
    /// there is no connection, or it broke: the next one may be there in time.
    pub async fn ping(&self, index: Option<usize>, end: Instant) -> Option<Result<(), NoPong>> {
        let client = match index {
            Some(index) => &self.pool.clients()[index],
            None => self.pool.next_connected(),
        };
        // What is sent without a connection waits for the next one in fred.
        let nodes = self.topology().nodes();
        if !client.is_connected() || nodes.is_empty() {
            return None;
        }
        let pings = nodes.iter().map(|node| ping_node(client, node));
        let Ok(pongs) = tokio::time::timeout_at(end, join_all(pings)).await else {
            return Some(Err(NoPong::Silence));
        };
        if pongs.iter().all(Result::is_ok) {
            return Some(Ok(()));
        }
        let errors = pongs.into_iter().filter_map(Result::err);
        let mut refusals = errors
            .map(|error| error.details().to_owned())
            .filter(|text| is_reply_of_redis(text));
        refusals.next().map(|refusal| Err(NoPong::Refused(refusal)))
    }

    /// Replaces one connection, whatever it is waiting for.
    pub fn reconnect(&self, index: usize) {
        // If it is not connected, it is being replaced already.
        if self.pool.clients()[index].is_connected() {
            self.renewals[index].notify_one();
        }
    }

    /// What the clock of a server shows at least at a local moment. None until
    /// it has said what time it is.
    pub fn redis_time(&self, node: &Node, moment: Instant) -> Option<i64> {
        let clocks = lock(&self.known.clocks);
        let moment = self.known.events.micros(moment);
        clocks.get(node)?.earliest_remote(moment)
    }

    /// Takes in what time it was on a server between `sent` and now.
    pub fn observe(&self, node: &Node, sent: Instant, redis_now: i64) {
        let events = &self.known.events;
        let received = events.micros(Instant::now()) + 1;
        let mut clocks = lock(&self.known.clocks);
        let clock = clocks.entry(node.clone()).or_default();
        clock.observe(events.micros(sent), received, redis_now);
    }
}

async fn ping_node(client: &Client, node: &Node) -> Result<(), Error> {
    let _measured = telemetry::redis_attempt(RedisCommand::Other);
    match node.address() {
        None => client.ping::<Value>(None).await,
        Some(server) => client.with_cluster_node(server).ping(None).await,
    }
    .map(|_| ())
}

/// Connects again where fred gives up: its task ends with some errors of a
/// cluster, whatever the policy says, and would leave a dead client. And where it
/// does not: when it is told to reconnect, it keeps what connections to a cluster
/// show no error, and waits for a hung server to take what it has been sent.
async fn stay_connected(client: Client, renewal: Arc<Notify>) {
    loop {
        let task = AbortOnDropHandle::new(client.connect());
        tokio::select! {
            // A task that ended by a panic is begun anew as well.
            ended = task => {
                tracing::debug!(?ended, "connecting to Redis again from the beginning");
                tokio::time::sleep(Link::CONNECT_AGAIN).await;
            }
            () = renewal.notified() => tracing::debug!("a connection to Redis is replaced"),
        }
    }
}

/// Takes in what happens to a client, from now on.
fn listen(client: Client, known: Arc<Known>) -> impl Future<Output = ()> {
    let mut reconnects = client.reconnect_rx();
    let mut changes = client.cluster_change_rx();
    let mut errors = client.error_rx();
    async move {
        let mut heard = Ok(());
        while heard != Err(RecvError::Closed) {
            heard = tokio::select! {
                server = reconnects.recv() => server.map(|server| known.met(&server)),
                change = changes.recv() => change.map(|_| {
                    if let Some(routing) = client.cached_cluster_state() {
                        known.learn(Topology::of_cluster(&routing));
                    }
                }),
                error = errors.recv() => error.map(|(error, _)| known.events.failed(&error)),
            };
        }
    }
}

// === impl Known ===

impl Known {
    /// A new connection may lead to another process than the one before, whose
    /// clock is another one.
    fn met(&self, server: &Server) {
        let node = match lock(&self.topology).nodes()[..] {
            [Node::Only] => Node::Only,
            _ => Node::Primary(server.clone()),
        };
        lock(&self.clocks).remove(&node);
        self.events.connected_to(server);
    }

    /// Takes in who holds what in a cluster.
    fn learn(&self, topology: Topology) {
        let mut known = lock(&self.topology);
        if **known != topology {
            let nodes = topology.nodes();
            tracing::debug!(nodes = nodes.len(), "the cluster has changed");
            lock(&self.clocks).retain(|node, _| nodes.contains(node));
            *known = Arc::new(topology);
            self.events.moved_on();
        }
    }
}

// === impl Events ===

impl Events {
    pub fn new() -> Self {
        Self {
            last: Mutex::default(),
            connected: watch::Sender::new(0),
            moved: watch::Sender::new(0),
            started: Instant::now(),
        }
    }

    /// Counts new connections: each may lead to another server than before.
    pub fn connected(&self) -> watch::Receiver<u64> {
        self.connected.subscribe()
    }

    /// Why there is no connection.
    pub fn why_not(&self) -> String {
        match lock(&self.last).error.as_str() {
            "" => "not connected".into(),
            error => format!("not connected: {error}"),
        }
    }

    /// Counts the times that other servers took the place of those before.
    pub fn moved(&self) -> watch::Receiver<u64> {
        self.moved.subscribe()
    }

    /// What is used from now on are other servers than before.
    pub fn moved_on(&self) {
        self.connected.send_modify(|count| *count += 1);
        self.moved.send_modify(|count| *count += 1);
    }

    fn connected_to(&self, server: &Server) {
        if lock(&self.last).changes_to(format!("connected to {server}")) {
            tracing::info!(%server, "connected to Redis");
        }
        self.connected.send_modify(|count| *count += 1);
    }

    fn failed(&self, error: &Error) {
        self.cannot_connect(readable(error));
    }

    /// Takes down why it is not known where to connect to.
    pub fn has_no_address(&self, reason: &str) {
        lock(&self.last).error = reason.to_owned();
    }

    /// Takes down why there is no connection.
    pub fn cannot_connect(&self, reason: &str) {
        let mut last = lock(&self.last);
        last.error = reason.to_owned();
        if last.changes_to(reason.to_owned()) {
            tracing::warn!(reason, "no connection to Redis, trying again");
        }
    }

    fn micros(&self, moment: Instant) -> i64 {
        i64::try_from(moment.duration_since(self.started).as_micros()).unwrap_or(i64::MAX / 2)
    }
}

// === impl LastEvent ===

impl LastEvent {
    /// Takes in what happened. False if the same was logged last.
    fn changes_to(&mut self, event: String) -> bool {
        let changes = self.logged != event;
        self.logged = event;
        changes
    }
}

/// Locks what cannot be left half changed.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
