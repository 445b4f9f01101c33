//! The pool of Redis connections, and what is known of the clocks behind them.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fred::{
    interfaces::ClusterInterface,
    prelude::{
        Builder, Client, ClientLike, Config, ConnectionConfig, Error, EventInterface,
        PerformanceConfig, Pool, ReconnectPolicy, Server, ServerConfig, Value,
    },
    types::config::ClusterDiscoveryPolicy,
};
use futures::future::join_all;
use tokio::{sync::watch, time::Instant};

use super::{
    fault::{is_reply_of_redis, readable},
    topology::{Node, Topology},
};
use crate::{
    store::StoreError,
    telemetry::{self, RedisCommand},
    version::IntervalClock,
};

/// Where Redis is and how to reach it. Its debug form holds no credentials.
#[derive(Clone)]
pub struct RedisSettings {
    config: Config,
    pool_size: usize,
    timeout: Duration,
}

/// Connections to Redis, and what is known of its clocks. Cheap to clone. In a
/// cluster each of them leads to every primary.
#[derive(Clone)]
pub struct Connections {
    pool: Pool,
    /// None: it is not always the same one.
    only_server: Option<Arc<Server>>,
    /// The time one command gets at most.
    timeout: Duration,
    topology: Arc<Mutex<Arc<Topology>>>,
    clocks: Arc<Mutex<HashMap<Node, IntervalClock>>>,
    /// Where local microseconds begin.
    started: Instant,
    /// What happened to a connection last.
    last_event: Arc<Mutex<LastEvent>>,
    /// Counts new connections.
    connected: watch::Sender<u64>,
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

// === impl RedisSettings ===

impl RedisSettings {
    /// Reads a Redis URL. The error does not repeat the URL, which may hold a
    /// password.
    pub fn new(url: &str, pool_size: usize, timeout: Duration) -> Result<Self, String> {
        if !["redis://", "redis-cluster://"]
            .iter()
            .any(|scheme| url.starts_with(scheme))
        {
            return Err(
                "must begin with redis:// or redis-cluster://, such as redis://host:6379".into(),
            );
        }
        let mut config = Config::from_url(url).map_err(|error: Error| {
            format!("is not of the form redis://host:6379: {}", error.details())
        })?;
        if let ServerConfig::Clustered { policy, .. } = &mut config.server {
            // The nodes of the URL may be gone some day.
            *policy = ClusterDiscoveryPolicy::UseCache;
        }
        // Redis may come up later than this service.
        config.fail_fast = false;
        Ok(Self {
            config,
            pool_size,
            timeout,
        })
    }

    /// Replaces the user of the URL.
    pub fn set_username(&mut self, username: String) {
        self.config.username = Some(username);
    }

    /// Replaces the password of the URL.
    pub fn set_password(&mut self, password: String) {
        self.config.password = Some(password);
    }
}

impl fmt::Debug for RedisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSettings")
            .field("server", &self.config.server)
            .field("username", &self.config.username)
            .field("pool_size", &self.pool_size)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

// === impl Connections ===

impl Connections {
    const RECONNECT_MIN_DELAY_MS: u32 = 50;
    const RECONNECT_MAX_DELAY_MS: u32 = 500;
    /// fred does not say when a client gets a connection, only whether it has.
    const CONNECTED_POLL: Duration = Duration::from_millis(10);
    const RECONNECT_BOUND: Duration = Duration::from_secs(1);
    const CONNECT_AGAIN: Duration = Duration::from_millis(100);

    /// Starts to connect, in the background and for as long as it takes.
    pub fn open(settings: &RedisSettings) -> Result<Self, StoreError> {
        let pool = Builder::from_config(settings.config.clone())
            .with_performance_config(|config: &mut PerformanceConfig| {
                // The only timeout that takes a command back out of fred's
                // queues; dropping the future of a call does not. It is no
                // less than what any attempt waits for its answer.
                config.default_command_timeout = settings.timeout * 2;
            })
            .with_connection_config(|config: &mut ConnectionConfig| {
                config.connection_timeout = settings.timeout.max(Duration::from_millis(500));
                config.internal_command_timeout = settings.timeout.max(Duration::from_millis(500));
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
            .build_pool(settings.pool_size)
            .map_err(|error| StoreError::Unavailable(error.details().to_owned()))?;
        let topology = if settings.config.server.is_clustered() {
            Topology::default()
        } else {
            Topology::single()
        };
        let only_server = match &settings.config.server {
            ServerConfig::Centralized { server } => Some(Arc::new(server.clone())),
            _ => None,
        };
        let connections = Self {
            pool,
            only_server,
            timeout: settings.timeout,
            topology: Arc::new(Mutex::new(Arc::new(topology))),
            clocks: Arc::default(),
            started: Instant::now(),
            last_event: Arc::default(),
            connected: watch::Sender::new(0),
        };
        connections.watch();
        for client in connections.pool.clients() {
            tokio::spawn(stay_connected(client.clone()));
        }
        Ok(connections)
    }

    /// Waits until Redis answers, at most until `deadline`; false if it does
    /// not.
    pub async fn wait(&self, deadline: Instant) -> bool {
        let connected = self.pool.wait_for_connect();
        matches!(
            tokio::time::timeout_at(deadline, connected).await,
            Ok(Ok(()))
        )
    }

    /// Logs when the connections of the pool come and go, forgets the clock of a
    /// server that may not be the one we talk to next, and follows the changes
    /// of a cluster.
    fn watch(&self) {
        for client in self.pool.clients() {
            let (connections, event) = (self.clone(), self.last_event.clone());
            client.on_reconnect(move |server| {
                connections.met(&server);
                if lock(&event).changes_to(format!("connected to {server}")) {
                    tracing::info!(%server, "connected to Redis");
                }
                async { Ok(()) }
            });
            let (connections, of_client) = (self.clone(), client.clone());
            client.on_cluster_change(move |_| {
                if let Some(routing) = of_client.cached_cluster_state() {
                    connections.learn(Topology::of_cluster(&routing));
                }
                async { Ok(()) }
            });
            let event = self.last_event.clone();
            client.on_error(move |(error, _)| {
                let reason = readable(&error);
                let mut event = lock(&event);
                event.error = reason.to_owned();
                if event.changes_to(reason.to_owned()) {
                    tracing::warn!(reason, "no connection to Redis, trying again");
                }
                async { Ok(()) }
            });
        }
    }

    /// A new connection may lead to another process than the one before.
    fn met(&self, server: &Server) {
        let node = match self.topology().nodes()[..] {
            [Node::Only] => Node::Only,
            _ => Node::Primary(server.clone()),
        };
        lock(&self.clocks).remove(&node);
        self.connected.send_modify(|count| *count += 1);
    }

    /// Takes in who holds what in a cluster.
    fn learn(&self, topology: Topology) {
        let mut known = lock(&self.topology);
        if **known != topology {
            let nodes = topology.nodes();
            tracing::debug!(nodes = nodes.len(), "the cluster has changed");
            lock(&self.clocks).retain(|node, _| nodes.contains(node));
            *known = Arc::new(topology);
        }
    }

    /// Asks a cluster who holds what. What comes of it is in [`Self::topology`].
    pub async fn look_at_cluster(&self) {
        if let Some(client) = self.client() {
            let _ = tokio::time::timeout(Self::RECONNECT_BOUND, client.sync_cluster()).await;
        }
    }

    /// Which server holds which keys.
    pub fn topology(&self) -> Arc<Topology> {
        lock(&self.topology).clone()
    }

    /// Counts new connections: each may lead to another server than before.
    pub fn connected(&self) -> watch::Receiver<u64> {
        self.connected.subscribe()
    }

    /// Why there is no connection.
    pub fn why_not(&self) -> String {
        match lock(&self.last_event).error.as_str() {
            "" => "not connected".into(),
            error => format!("not connected: {error}"),
        }
    }

    /// Number of connections.
    pub fn count(&self) -> usize {
        self.pool.clients().len()
    }

    /// Asks over any connection whether Redis is there, each of its servers.
    pub async fn ping_any(&self, bound: Duration) -> Result<(), NoPong> {
        self.ping_over(self.pool.next_connected(), bound).await
    }

    /// Asks over the connection `index` whether Redis is there, each of its
    /// servers.
    pub async fn ping(&self, index: usize, bound: Duration) -> Result<(), NoPong> {
        self.ping_over(&self.pool.clients()[index], bound).await
    }

    async fn ping_over(&self, client: &Client, bound: Duration) -> Result<(), NoPong> {
        let end = Instant::now() + bound;
        while Instant::now() < end {
            // What is sent without a connection waits for the next one in fred.
            let nodes = self.topology().nodes();
            if client.is_connected() && !nodes.is_empty() {
                let pings = nodes.iter().map(|node| ping_node(client, node));
                match tokio::time::timeout_at(end, join_all(pings)).await {
                    Ok(pongs) if pongs.iter().all(Result::is_ok) => return Ok(()),
                    Ok(pongs) => {
                        let errors = pongs.into_iter().filter_map(Result::err);
                        let mut refusals = errors
                            .map(|error| error.details().to_owned())
                            .filter(|text| is_reply_of_redis(text));
                        if let Some(refusal) = refusals.next() {
                            return Err(NoPong::Refused(refusal));
                        }
                        // The connection broke; the next one may be there in time.
                    }
                    Err(_) => break,
                }
            }
            tokio::time::sleep(Self::CONNECTED_POLL).await;
        }
        Err(NoPong::Silence)
    }

    /// Replaces the connection `index`, whatever it is waiting for.
    pub async fn reconnect(&self, index: usize) {
        let client = &self.pool.clients()[index];
        if !client.is_connected() {
            // It is being replaced already.
            return;
        }
        // The result is in `is_connected`.
        let _ = tokio::time::timeout(Self::RECONNECT_BOUND, client.force_reconnection()).await;
    }

    /// The client that takes the next command, if it is connected.
    pub fn client(&self) -> Option<Client> {
        let client = self.pool.next_connected();
        client.is_connected().then(|| client.clone())
    }

    /// The server that is connected, if it is always the same one.
    pub fn only_server(&self) -> Option<&Arc<Server>> {
        self.only_server.as_ref()
    }

    /// The time one command gets at most.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// What the clock of a server shows at least at a local moment. None until
    /// it has said what time it is.
    pub fn redis_time(&self, node: &Node, moment: Instant) -> Option<i64> {
        let clocks = lock(&self.clocks);
        clocks.get(node)?.earliest_remote(self.micros(moment))
    }

    /// Takes in what time it was on a server between `sent` and now.
    pub fn observe(&self, node: &Node, sent: Instant, redis_now: i64) {
        let received = self.micros(Instant::now()) + 1;
        let mut clocks = lock(&self.clocks);
        let clock = clocks.entry(node.clone()).or_default();
        clock.observe(self.micros(sent), received, redis_now);
    }

    fn micros(&self, moment: Instant) -> i64 {
        i64::try_from(moment.duration_since(self.started).as_micros()).unwrap_or(i64::MAX / 2)
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
/// cluster, whatever the policy says, and would leave a dead client.
async fn stay_connected(client: Client) {
    loop {
        // A task that ended by a panic is begun anew as well.
        let ended = client.connect().await;
        tracing::debug!(?ended, "connecting to Redis again from the beginning");
        tokio::time::sleep(Connections::CONNECT_AGAIN).await;
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
