//! Sentinels, and the Redis servers that they watch over.

use std::{
    fs,
    net::SocketAddr,
    process::{Command, Stdio},
    time::Duration,
};

use redis::{FromRedisValue, aio::MultiplexedConnection};
use tempfile::TempDir;

use super::{
    Process, free_address,
    redis_server::{self, RedisServer},
    stalls::Bound,
};

/// A primary, two replicas, and three sentinels.
pub struct RedisSentinel {
    /// The primary is the first one, at the beginning.
    pub servers: Vec<RedisServer>,
    pub sentinels: Vec<Sentinel>,
}

/// One sentinel.
pub struct Sentinel {
    addr: SocketAddr,
    process: Process,
    folder: TempDir,
}

/// As whom the service may ask a sentinel.
const ACL: &str = include_str!("../../deploy/redis/sentinel.acl");

/// The file in which it says what it does.
const LOG: &str = "sentinel.log";
/// What the sentinels call the primary.
const SERVICE: &str = "groups";
const SENTINELS: usize = 3;
const REPLICAS: usize = 2;
/// Sentinels that must agree that the primary is down.
const QUORUM: usize = 2;
/// Longer than a slow start of many processes on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(30);

// === impl RedisSentinel ===

impl RedisSentinel {
    /// The primary gives way when it is silent for `down_after`.
    pub async fn start(down_after: Duration) -> Self {
        let primary = RedisServer::start().await;
        let port = primary.addr().port();
        let follow = format!("127.0.0.1 {port}");
        let mut servers = vec![primary];
        for _ in 0..REPLICAS {
            servers.push(RedisServer::start_with(&["--replicaof", &follow]).await);
        }
        let mut sentinels = Vec::new();
        for _ in 0..SENTINELS {
            sentinels.push(Sentinel::start(servers[0].addr(), down_after).await);
        }
        let started = Self { servers, sentinels };
        started.wait_until_ready().await;
        started
    }

    /// The sentinels as a URL. There and in Redis the service is a user with no more
    /// rights than it needs.
    pub fn url(&self) -> String {
        let [user, password] = redis_server::login();
        let (first, others) = self.sentinels.split_first().unwrap();
        let others: String = others
            .iter()
            .map(|sentinel| format!("&node={}", sentinel.addr))
            .collect();
        format!(
            "redis-sentinel://{user}:{password}@{}{others}\
             &sentinelUsername={user}&sentinelPassword={password}",
            first.asked()
        )
    }

    /// Waits until another server than `old` is the primary.
    pub async fn wait_until_promoted(&self, old: usize, bound: Duration) -> usize {
        let bound = Bound::of(bound);
        loop {
            for (index, server) in self.servers.iter().enumerate() {
                if index != old && is_primary(server).await {
                    return index;
                }
            }
            bound.assert_holds("a replica takes over");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until every server but the primary follows that, and every sentinel
    /// knows it.
    pub async fn wait_until_ready(&self) {
        let bound = Bound::of(READY_WITHIN);
        'wait: loop {
            assert!(
                !bound.is_over(),
                "the sentinels are not ready; they say: {:#?}",
                self.sentinels.iter().map(Sentinel::log).collect::<Vec<_>>()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
            for sentinel in &self.sentinels {
                if !sentinel.sees_all().await {
                    continue 'wait;
                }
            }
            let mut replicas = 0;
            for server in &self.servers {
                let info: String = ask(&mut server.connect().await, &["INFO", "replication"]).await;
                replicas += usize::from(info.contains("master_link_status:up"));
            }
            if replicas == REPLICAS {
                return;
            }
        }
    }
}

/// Whether a server takes itself for a primary. A change of its mind ends all
/// connections.
pub async fn is_primary(server: &RedisServer) -> bool {
    let ask = async || -> redis::RedisResult<String> {
        let mut connection = server.try_to_connect().await?;
        let mut info = redis::cmd("INFO");
        info.arg("replication").query_async(&mut connection).await
    };
    ask().await.is_ok_and(|info| info.contains("role:master"))
}

async fn ask<T: FromRedisValue>(connection: &mut MultiplexedConnection, words: &[&str]) -> T {
    let mut command = redis::cmd(words[0]);
    command.arg(&words[1..]);
    let reply = command.query_async(connection).await;
    reply.unwrap_or_else(|error| panic!("{words:?}: {error}"))
}

// === impl Sentinel ===

impl Sentinel {
    /// Watches over the Redis at `primary`.
    pub async fn start(primary: SocketAddr, down_after: Duration) -> Self {
        Self::start_with(primary, down_after, "").await
    }

    /// The same with more lines in its file. It speaks only TLS if it has a
    /// certificate.
    pub async fn start_with(primary: SocketAddr, down_after: Duration, more: &str) -> Self {
        // Another process may take the port before the sentinel does.
        for _ in 0..10 {
            let mut sentinel = Self::spawn(primary, down_after, more);
            if sentinel.is_up().await {
                return sentinel;
            }
        }
        panic!("redis-sentinel does not start");
    }

    fn spawn(primary: SocketAddr, down_after: Duration, more: &str) -> Self {
        let addr = free_address();
        let folder = TempDir::new().unwrap();
        // Sentinels write into their file what they learn.
        let file = folder.path().join("sentinel.conf");
        let (ip, port) = (primary.ip(), primary.port());
        let own_port = addr.port();
        let millis = down_after.as_millis();
        let ports = if more.contains("tls-cert-file") {
            format!("port 0\ntls-port {own_port}")
        } else {
            format!("port {own_port}")
        };
        let settings = format!(
            "bind 127.0.0.1\n\
             {ports}\n\
             {ACL}\n\
             sentinel monitor {SERVICE} {ip} {port} {QUORUM}\n\
             sentinel down-after-milliseconds {SERVICE} {millis}\n\
             sentinel failover-timeout {SERVICE} 5000\n\
             sentinel parallel-syncs {SERVICE} {REPLICAS}\n\
             {more}\n"
        );
        fs::write(&file, settings).unwrap();
        let mut command = Command::new(redis_server::program());
        command
            .arg(&file)
            .arg("--sentinel")
            .stdout(fs::File::create(folder.path().join(LOG)).unwrap())
            .stderr(Stdio::null());
        Self {
            addr,
            process: Process::spawn(&mut command, redis_server::INSTALL),
            folder,
        }
    }

    /// Waits until it listens; false if it ended instead.
    async fn is_up(&mut self) -> bool {
        let bound = Bound::of(READY_WITHIN);
        while !bound.is_over() {
            if self.log().contains("Sentinel ID is") {
                return true;
            }
            if self.process.child.try_wait().unwrap().is_some() {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    }

    /// What it has said.
    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join(LOG)).unwrap()
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its address as part of a URL, with what it calls the primary.
    pub fn asked(&self) -> String {
        format!("{}?sentinelServiceName={SERVICE}", self.addr)
    }

    /// A connection of an independent client.
    pub async fn connect(&self) -> redis::RedisResult<MultiplexedConnection> {
        let client = redis::Client::open(format!("redis://{}", self.addr))?;
        client.get_multiplexed_async_connection().await
    }

    /// Asks the sentinels to let a replica take over, with nothing broken.
    pub async fn fail_over(&self) {
        let mut connection = self.connect().await.unwrap();
        let () = ask(&mut connection, &["SENTINEL", "FAILOVER", SERVICE]).await;
    }

    /// Whether it knows all servers and the other sentinels, and that all is well.
    async fn sees_all(&self) -> bool {
        let Ok(mut connection) = self.connect().await else {
            return false;
        };
        let master: Vec<String> = ask(&mut connection, &["SENTINEL", "MASTER", SERVICE]).await;
        let field = |name: &str| {
            let mut pairs = master.chunks(2);
            pairs.find_map(|pair| (pair[0] == name).then(|| pair[1].clone()))
        };
        field("num-slaves") == Some(REPLICAS.to_string())
            && field("num-other-sentinels") == Some((SENTINELS - 1).to_string())
            && field("flags").as_deref() == Some("master")
    }
}
