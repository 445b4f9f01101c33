//! The connections to a server or a cluster, and what is known of those at their
//! other end: who holds which keys, and what time it is there.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use fred::{
    interfaces::ClusterInterface,
    prelude::{
        Client, ClientLike, Config, ConnectionConfig, Error, EventInterface, PerformanceConfig,
        ReconnectPolicy, Server, ServerConfig, Value,
    },
    types::{ClusterHash, CustomCommand},
};
use futures::future::join_all;
use tokio::{
    sync::{broadcast::error::RecvError, watch},
    task::JoinSet,
    time::Instant,
};

use super::{
    events::Events,
    fault::is_reply_of_redis,
    renewable::Renewable,
    server_info::ServerInfo,
    topology::{Node, Topology},
};
use crate::{
    domain::version::{IntervalClock, RedisClock},
    telemetry::{self, RedisCommand},
};

/// Connections to a server; in a cluster each of them leads to every primary.
/// They are closed when this is dropped.
pub struct Link {
    /// The primary that sentinels have named; None without sentinels.
    server: Option<Server>,
    /// None: a cluster, or a socket.
    only_server: Option<Arc<Server>>,
    known: Arc<Known>,
    /// One for each purpose but [`Lane::Calls`], in the order of [`Lane::SINGLE`],
    /// then those for calls.
    connections: Vec<Arc<Renewable>>,
    next_call: AtomicUsize,
    /// Keep the connections.
    _tasks: JoinSet<()>,
}

/// What a connection is for. What waits on one does not wait behind another, so
/// that no client can make Redis look dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// PINGs and probes, by which it is judged whether Redis is well.
    Health,
    /// Large documents and listings.
    Bulk,
    /// What the service does of its own accord: it fills the mirror, puts back and
    /// carries over.
    Repair,
    /// Calls on small documents.
    Calls,
}

/// How many connections there are for what, and how long they may take.
#[derive(Clone, Copy, Debug)]
pub struct LinkSettings {
    /// Connections for calls.
    pub calls: usize,
    /// The time one command gets.
    pub timeout: Duration,
    /// The most that any attempt waits for its answer.
    pub longest_wait: Duration,
}

/// What is known of the other end, and how it is reached.
pub struct Known {
    topology: Mutex<Arc<Topology>>,
    clocks: Mutex<HashMap<Node, IntervalClock>>,
    clock: RedisClock,
    /// The `run_id` of the only server, as the last connection has met it. A connection
    /// to another one is replaced: all of them lead to one server. Empty: not known.
    identity: watch::Sender<String>,
    /// How often that was another one.
    identities: AtomicU64,
    events: Arc<Events>,
    config: Config,
    settings: LinkSettings,
}

/// Why a connection did not answer a PING.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoPong {
    /// No answer within the time, or no connection.
    Silence,
    /// No answer within the time, but others came: it waits behind them.
    Busy,
    /// Redis answered with an error.
    Refused(String),
}

// === impl Lane ===

impl Lane {
    /// Those with one connection each.
    const SINGLE: [Self; 3] = [Self::Health, Self::Bulk, Self::Repair];

    /// Number of connections where there are `calls` for calls.
    pub fn connections(calls: usize) -> usize {
        Self::SINGLE.len() + calls
    }
}

// === impl Link ===

impl Link {
    /// Between the end of a client and the next one.
    pub const CONNECT_AGAIN: Duration = Duration::from_millis(100);
    const LOOK_BOUND: Duration = Duration::from_secs(1);

    /// Starts to connect, in the background and for as long as it takes.
    pub fn open(
        server: Option<Server>,
        config: Config,
        settings: LinkSettings,
        events: Arc<Events>,
        clock: RedisClock,
    ) -> Self {
        let topology = if config.server.is_clustered() {
            Topology::default()
        } else {
            Topology::single()
        };
        let only_server = match &config.server {
            ServerConfig::Centralized { server } => Some(Arc::new(server.clone())),
            _ => None,
        };
        let known = Arc::new(Known {
            topology: Mutex::new(Arc::new(topology)),
            clocks: Mutex::default(),
            clock,
            identity: watch::Sender::default(),
            identities: AtomicU64::new(0),
            events,
            config,
            settings,
        });
        let mut tasks = JoinSet::new();
        let connections = (0..Lane::connections(settings.calls)).map(|_| {
            let connection = Renewable::new(known.clone());
            tasks.spawn(connection.clone().stay_connected());
            connection
        });
        Self {
            server,
            only_server,
            connections: connections.collect(),
            known,
            next_call: AtomicUsize::new(0),
            _tasks: tasks,
        }
    }

    /// The server at the other end, if there is just one.
    pub fn only_server(&self) -> Option<&Arc<Server>> {
        self.only_server.as_ref()
    }

    /// The primary that sentinels have named; None without sentinels.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_ref()
    }

    /// Whether every connection is there.
    pub fn is_connected(&self) -> bool {
        let mut connections = self.connections.iter();
        connections.all(|connection| connection.is_connected())
    }

    /// The connection that takes the next command of this kind: one of its own, or
    /// any other before Redis passes for dead because of one. None if none is there.
    pub fn connection(&self, lane: Lane) -> Option<&Arc<Renewable>> {
        let (singles, calls) = self.connections.split_at(Lane::SINGLE.len());
        let next = self.next_call.fetch_add(1, Relaxed) % calls.len().max(1);
        let calls = calls[next..].iter().chain(&calls[..next]);
        let own = singles
            .iter()
            .zip(Lane::SINGLE)
            .filter(|(_, of)| *of == lane);
        // The connection for PINGs is the last resort.
        let others = singles.iter().rev();
        let mut connections = own.map(|(own, _)| own).chain(calls).chain(others);
        connections.find(|connection| connection.is_connected())
    }

    /// Which server holds which keys.
    pub fn topology(&self) -> Arc<Topology> {
        lock(&self.known.topology).clone()
    }

    /// Asks a cluster who holds what. What comes of it is in [`Self::topology`].
    pub async fn look_at_cluster(&self) {
        if let Some(connection) = self.connection(Lane::Calls) {
            let client = connection.client();
            let _ = tokio::time::timeout(Self::LOOK_BOUND, client.sync_cluster()).await;
        }
    }

    /// PINGs over one connection, or over any, each of the servers. None where
    /// there is no connection, or it broke: the next one may be there in time.
    pub async fn ping(&self, index: Option<usize>) -> Option<Result<(), NoPong>> {
        let connection = match index {
            Some(index) => self.connections.get(index),
            None => self.connection(Lane::Health),
        }?;
        // What is sent without a connection waits for the next one in fred.
        let nodes = self.topology().nodes();
        if !connection.is_connected() || nodes.is_empty() {
            return None;
        }
        let client = connection.client();
        let pings = nodes.iter().map(async |node| {
            let pong = ping_node(&client, node).await;
            if pong.is_ok() {
                connection.answers(node);
            }
            pong
        });
        let pongs = join_all(pings).await;
        if pongs.iter().all(Result::is_ok) {
            return Some(Ok(()));
        }
        let errors = pongs.into_iter().filter_map(Result::err);
        let mut refusals = errors
            .map(|error| error.details().to_owned())
            .filter(|text| is_reply_of_redis(text));
        refusals.next().map(|refusal| Err(NoPong::Refused(refusal)))
    }

    /// Whether every server has answered something over the connection `index` since
    /// then.
    pub fn is_busy(&self, index: Option<usize>, since: Instant) -> bool {
        let connection = index.and_then(|index| self.connections.get(index));
        let nodes = self.topology().nodes();
        connection.is_some_and(|connection| connection.all_answered_since(&nodes, since))
    }

    /// Replaces one connection, whatever it is waiting for.
    pub fn reconnect(&self, index: usize) {
        if let Some(connection) = self.connections.get(index) {
            connection.renew();
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
        let now = Instant::now();
        self.known.clock.hear(now, redis_now);
        let received = events.micros(now) + 1;
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

// === impl Known ===

impl Known {
    const RECONNECT_MIN_DELAY_MS: u32 = 50;
    const RECONNECT_MAX_DELAY_MS: u32 = 500;

    /// A client that is not connected yet.
    pub fn new_client(&self) -> Client {
        let settings = self.settings;
        let performance = PerformanceConfig {
            // The only timeout that takes a command back out of fred's queues;
            // dropping the future of a call does not. It is no less than what any
            // attempt waits for its answer.
            default_command_timeout: settings.longest_wait,
            ..PerformanceConfig::default()
        };
        let bound = settings.timeout.max(Duration::from_millis(500));
        let mut connection = ConnectionConfig {
            connection_timeout: bound,
            internal_command_timeout: bound,
            // Repeating is decided by `Attempts`, which know what is safe. On
            // `ASK`, fred 10.1 would take another command's answer for that to its
            // own `ASKING`.
            max_command_attempts: 1,
            max_redirections: 0,
            reconnect_on_auth_error: true,
            ..ConnectionConfig::default()
        };
        connection.tcp.nodelay = Some(true);
        // Without a cluster a new client takes its place, which asks who is there.
        let policy = self.is_clustered().then(|| {
            ReconnectPolicy::new_exponential(
                0, // without end
                Self::RECONNECT_MIN_DELAY_MS,
                Self::RECONNECT_MAX_DELAY_MS,
                2,
            )
        });
        Client::new(
            self.reachable_config(),
            Some(performance),
            Some(connection),
            policy,
        )
    }

    fn is_clustered(&self) -> bool {
        self.config.server.is_clustered()
    }

    /// Waits until a client is connected, and until it is known to whom. From then on it
    /// may be used. The `run_id` of the server, or nothing, and [`Self::identities`].
    pub async fn meet(&self, client: &Client) -> Result<(String, u64), Error> {
        client.wait_for_connect().await?;
        if self.is_clustered() {
            return Ok((String::new(), self.identities()));
        }
        let info = CustomCommand::new_static("INFO", ClusterHash::Random, false);
        let info = client.custom(info, vec!["server"]).await;
        let run_id = match info {
            Ok(info) => {
                let info: String = info;
                ServerInfo::run_id(&info).unwrap_or_default().to_owned()
            }
            // That is told elsewhere.
            Err(error) if is_reply_of_redis(error.details()) => String::new(),
            Err(error) => return Err(error),
        };
        if let Some(server) = self.config.server.hosts().first() {
            self.met(server);
        }
        let mut identities = self.identities();
        if !run_id.is_empty() {
            self.identity.send_if_modified(|known| {
                let is_another = *known != run_id;
                if is_another {
                    known.clone_from(&run_id);
                    // From this moment on nothing is sent to the one before.
                    self.identities.fetch_add(1, SeqCst);
                }
                identities = self.identities();
                is_another
            });
        }
        Ok((run_id, identities))
    }

    /// Changes whenever a connection has met another server than the one before.
    pub fn identities(&self) -> u64 {
        self.identities.load(SeqCst)
    }

    /// Waits until another connection has met another server than this one.
    pub async fn is_another(&self, run_id: &str) {
        let mut identity = self.identity.subscribe();
        let is_another = |known: &String| !run_id.is_empty() && known != run_id;
        if identity.wait_for(is_another).await.is_err() {
            std::future::pending().await
        }
    }

    /// A client has ended.
    pub fn failed(&self, error: &Error) {
        self.events.failed(error);
    }

    /// How to connect now: the nodes of a cluster that the URL names may be gone
    /// some day, so those that are known come first.
    fn reachable_config(&self) -> Config {
        let mut config = self.config.clone();
        // Without it fred connects only as the policy says, and there is none.
        config.fail_fast = !self.is_clustered();
        if let ServerConfig::Clustered { hosts, .. } = &mut config.server {
            let nodes = lock(&self.topology).nodes();
            let mut reachable: Vec<_> = nodes
                .iter()
                .filter_map(|node| node.address().cloned())
                .collect();
            for host in hosts.drain(..) {
                if !reachable.contains(&host) {
                    reachable.push(host);
                }
            }
            *hosts = reachable;
        }
        config
    }

    /// A moment in local microseconds.
    pub fn micros(&self, moment: Instant) -> i64 {
        self.events.micros(moment)
    }

    /// Takes in what happens to a client, from now on.
    pub fn listen(self: Arc<Self>, client: &Client) -> impl Future<Output = ()> + use<> {
        let client = client.clone();
        let mut reconnects = client.reconnect_rx();
        let mut changes = client.cluster_change_rx();
        let mut errors = client.error_rx();
        async move {
            let mut heard = Ok(());
            while heard != Err(RecvError::Closed) {
                heard = tokio::select! {
                    server = reconnects.recv() => server.map(|server| {
                        if self.is_clustered() {
                            self.met(&server);
                        }
                    }),
                    change = changes.recv() => change.map(|_| {
                        if let Some(routing) = client.cached_cluster_state() {
                            self.learn(Topology::of_cluster(&routing));
                        }
                    }),
                    error = errors.recv() => error.map(|(error, _)| self.events.failed(&error)),
                };
            }
        }
    }

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

/// Locks what cannot be left half changed.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
