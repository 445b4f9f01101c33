//! A real Redis Cluster.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use redis::{FromRedisValue, aio::MultiplexedConnection};

use super::{
    fault_proxy::FaultProxy,
    free_address,
    redis_server::{self, RedisServer},
    stalls::Bound,
};

/// Three primaries that share the slots, some with a replica.
pub struct RedisCluster {
    /// The primaries, in the order of their slots, at the beginning.
    pub primaries: Vec<RedisServer>,
    /// One of each primary, or none.
    pub replicas: Vec<RedisServer>,
}

/// First and last slot of each primary.
const SLOTS: [(u16, u16); 3] = [(0, 5_460), (5_461, 10_922), (10_923, 16_383)];

impl RedisCluster {
    /// Three primaries, which nobody replaces.
    pub async fn start() -> Self {
        // Longer than any stall of a busy machine.
        Self::start_with(false, Duration::from_secs(10)).await
    }

    /// Three primaries with a replica each, which takes over when its primary is
    /// silent for `node_timeout`.
    pub async fn start_replicated(node_timeout: Duration) -> Self {
        Self::start_with(true, node_timeout).await
    }

    async fn start_with(replicated: bool, node_timeout: Duration) -> Self {
        let mut primaries = Vec::new();
        let mut replicas = Vec::new();
        for _ in SLOTS {
            primaries.push(start_node(node_timeout, &[]).await);
            if replicated {
                replicas.push(start_node(node_timeout, &[]).await);
            }
        }
        Self::joined(primaries, replicas).await
    }

    /// Three primaries that clients reach through a proxy each.
    pub async fn start_behind_proxies() -> (Self, Vec<FaultProxy>) {
        let mut primaries = Vec::new();
        let mut proxies = Vec::new();
        for _ in SLOTS {
            let primary = start_node(Duration::from_secs(10), &[]).await;
            let proxy = FaultProxy::start(primary.addr()).await;
            let port = proxy.addr().port().to_string();
            let mut set = redis::cmd("CONFIG");
            let set = set.arg(&["SET", "cluster-announce-port", &port]);
            let () = set.query_async(&mut primary.connect().await).await.unwrap();
            primaries.push(primary);
            proxies.push(proxy);
        }
        (Self::joined(primaries, Vec::new()).await, proxies)
    }

    /// Three primaries that are also reached by TLS, with these settings for it.
    pub async fn start_with_tls(settings: &[String]) -> Self {
        let mut primaries = Vec::new();
        for _ in SLOTS {
            let port = free_address().port().to_string();
            let mut all: Vec<&str> = settings.iter().map(String::as_str).collect();
            all.extend(["--tls-port", &port, "--tls-auth-clients", "no"]);
            // Else a node tells of its other port alone.
            all.extend(["--tls-cluster", "yes"]);
            primaries.push(start_node(Duration::from_secs(10), &all).await);
        }
        Self::joined(primaries, Vec::new()).await
    }

    async fn joined(primaries: Vec<RedisServer>, replicas: Vec<RedisServer>) -> Self {
        let cluster = Self {
            primaries,
            replicas,
        };
        cluster.join().await;
        cluster
    }

    /// The address of one primary as a URL; clients find the others.
    pub fn url(&self) -> String {
        redis_server::url("redis-cluster", self.primaries[0].addr())
    }

    /// The same by TLS.
    pub async fn tls_url(&self) -> String {
        let port = setting(&self.primaries[0], "tls-port").await;
        let addr = SocketAddr::new(self.primaries[0].addr().ip(), port.parse().unwrap());
        redis_server::url("rediss-cluster", addr)
    }

    /// One more primary, which has no slots.
    pub async fn add_primary(&mut self) {
        let primary = start_node(Duration::from_secs(10), &[]).await;
        self.primaries.push(primary);
        self.meet().await;
        self.wait_until_whole().await;
    }

    /// The primary that has a slot at the beginning.
    pub fn owner_of(slot: u16) -> usize {
        let has_it = |(first, last): &(u16, u16)| (*first..=*last).contains(&slot);
        SLOTS.iter().position(has_it).expect("all slots are shared")
    }

    /// Moves a slot with these keys in it from one primary to another, as
    /// `redis-cli --cluster reshard` does, and not in a hurry.
    pub async fn migrate(&self, slot: u16, from: usize, to: usize, keys: &[String]) {
        let mut connections = Vec::new();
        let mut ids: Vec<String> = Vec::new();
        for primary in &self.primaries {
            let mut connection = primary.connect().await;
            ids.push(cluster(&mut connection, &["MYID"]).await);
            connections.push(connection);
        }
        let slot = slot.to_string();
        let set =
            |what: &'static str, id: &str| ["SETSLOT", &slot, what, id].map(ToOwned::to_owned);
        let words = set("IMPORTING", &ids[from]);
        let () = cluster(&mut connections[to], &words).await;
        let words = set("MIGRATING", &ids[to]);
        let () = cluster(&mut connections[from], &words).await;
        let target = self.primaries[to].addr();
        for key in keys {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let () = redis::cmd("MIGRATE")
                .arg(target.ip().to_string())
                .arg(target.port())
                .arg(key)
                .arg(0)
                .arg(1_000)
                .query_async(&mut connections[from])
                .await
                .unwrap();
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        // First where the slot goes.
        for node in [to, from].into_iter().chain(0..ids.len()) {
            let words = set("NODE", &ids[to]);
            let () = cluster(&mut connections[node], &words).await;
        }
    }

    /// Moves so many slots that hold groups from one primary to another, while clients
    /// use them.
    pub async fn move_slots(&self, count: usize, from: usize, to: usize) {
        let mut source = self.primaries[from].connect().await;
        let keys: Vec<String> = redis::cmd("KEYS")
            .arg("group:*")
            .query_async(&mut source)
            .await
            .unwrap();
        let mut slots = BTreeSet::new();
        for key in keys {
            slots.insert(cluster::<u16>(&mut source, &["KEYSLOT", &key]).await);
        }
        let ids = [
            cluster::<String>(&mut source, &["MYID"]).await,
            cluster(&mut self.primaries[to].connect().await, &["MYID"]).await,
        ];
        for slot in slots.into_iter().take(count) {
            self.move_slot(slot, [from, to], &ids).await;
        }
    }

    async fn move_slot(&self, slot: u16, [from, to]: [usize; 2], [source, target]: &[String; 2]) {
        let slot = slot.to_string();
        let mut of_source = self.primaries[from].connect().await;
        let mut of_target = self.primaries[to].connect().await;
        let () = cluster(&mut of_target, &["SETSLOT", &slot, "IMPORTING", source]).await;
        let () = cluster(&mut of_source, &["SETSLOT", &slot, "MIGRATING", target]).await;
        let addr = self.primaries[to].addr();
        loop {
            let keys = ["GETKEYSINSLOT", &slot, "100"];
            let keys: Vec<String> = cluster(&mut of_source, &keys).await;
            if keys.is_empty() {
                break;
            }
            for key in keys {
                let mut migrate = redis::cmd("MIGRATE");
                migrate.arg(addr.ip().to_string()).arg(addr.port());
                let () = migrate
                    .arg(&key)
                    .arg(0)
                    .arg(1_000)
                    .query_async(&mut of_source)
                    .await
                    .unwrap();
            }
        }
        for primary in [to, from].into_iter().chain(0..self.primaries.len()) {
            let mut connection = self.primaries[primary].connect().await;
            let () = cluster(&mut connection, &["SETSLOT", &slot, "NODE", target]).await;
        }
    }

    fn nodes(&self) -> impl Iterator<Item = &RedisServer> {
        self.primaries.iter().chain(&self.replicas)
    }

    async fn join(&self) {
        for (primary, (first, last)) in self.primaries.iter().zip(SLOTS) {
            let mut connection = primary.connect().await;
            let slots = ["ADDSLOTSRANGE", &first.to_string(), &last.to_string()];
            let () = cluster(&mut connection, &slots).await;
        }
        self.meet().await;
        for (replica, primary) in self.replicas.iter().zip(&self.primaries) {
            let id: String = cluster(&mut primary.connect().await, &["MYID"]).await;
            let bound = Bound::of(Duration::from_secs(10));
            let mut connection = replica.connect().await;
            let mut command = redis::cmd("CLUSTER");
            command.arg("REPLICATE").arg(&id);
            // Until it has heard of the primary by gossip.
            while command.query_async::<()>(&mut connection).await.is_err() {
                bound.assert_holds("it becomes a replica");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        self.wait_until_followed().await;
    }

    /// Waits until every replica follows its primary.
    pub async fn wait_until_followed(&self) {
        self.wait_until_whole().await;
        for (replica, primary) in self.replicas.iter().zip(&self.primaries) {
            wait_until_in_sync(replica, primary).await;
        }
    }

    async fn meet(&self) {
        let mut first = self.primaries[0].connect().await;
        for node in self.nodes().skip(1) {
            let bus = setting(node, "cluster-port").await;
            let (ip, port) = (node.addr().ip().to_string(), node.addr().port().to_string());
            let () = cluster(&mut first, &["MEET", &ip, &port, &bus]).await;
        }
        self.wait_for_all("know each other", |info| {
            info.contains(&format!("cluster_known_nodes:{}", self.nodes().count()))
        })
        .await;
    }

    async fn wait_until_whole(&self) {
        self.wait_for_all("are one cluster", |info| {
            info.contains("cluster_state:ok") && info.contains("cluster_slots_ok:16384")
        })
        .await;
    }

    async fn wait_for_all(&self, what: &str, holds: impl Fn(&str) -> bool) {
        let bound = Bound::of(Duration::from_secs(20));
        for node in self.nodes() {
            let mut connection = node.connect().await;
            loop {
                let info: String = cluster(&mut connection, &["INFO"]).await;
                if holds(&info) {
                    break;
                }
                assert!(!bound.is_over(), "the nodes {what}: {info}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

async fn start_node(node_timeout: Duration, more: &[&str]) -> RedisServer {
    let timeout = node_timeout.as_millis().to_string();
    RedisServer::start_with_each(|| {
        // The usual port of the bus, 10,000 above, may be taken or none at all.
        let bus = free_address().port().to_string();
        let settings = [
            ["--cluster-enabled", "yes"],
            ["--cluster-port", &bus],
            ["--cluster-node-timeout", &timeout],
        ];
        let all = settings.as_flattened().iter().chain(more);
        all.map(ToString::to_string).collect()
    })
    .await
}

async fn setting(node: &RedisServer, name: &str) -> String {
    let mut command = redis::cmd("CONFIG");
    let (_, value): (String, String) = command
        .arg("GET")
        .arg(name)
        .query_async(&mut node.connect().await)
        .await
        .unwrap();
    value
}

async fn wait_until_in_sync(replica: &RedisServer, primary: &RedisServer) {
    let bound = Bound::of(Duration::from_secs(20));
    loop {
        // A change of its role ends all connections.
        let info: Result<String, _> = redis::cmd("INFO")
            .arg("replication")
            .query_async(&mut replica.connect().await)
            .await;
        if info
            .as_ref()
            .is_ok_and(|info| info.contains("master_link_status:up"))
        {
            return;
        }
        assert!(
            !bound.is_over(),
            "{} does not follow {}: {info:?}",
            replica.addr(),
            primary.addr()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs a `CLUSTER` command on one node.
async fn cluster<T: FromRedisValue>(
    connection: &mut MultiplexedConnection,
    words: &[impl AsRef<str>],
) -> T {
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    let mut command = redis::cmd("CLUSTER");
    command.arg(&words);
    let reply = command.query_async(connection).await;
    reply.unwrap_or_else(|error| panic!("CLUSTER {words:?}: {error}"))
}
