//! Redis servers of which a replica takes over when a primary fails, again and
//! again.

use std::{
    env, fmt,
    time::{Duration, Instant},
};

use super::{
    redis_cluster::RedisCluster,
    redis_sentinel::{RedisSentinel, is_primary},
    redis_server::RedisServer,
    stalls::Bound,
};

/// Who decides that a replica takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Sentinel,
    Cluster,
}

/// How a primary fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    Kill,
    Hang,
}

/// The servers.
pub enum Replicated {
    /// The first one is the primary.
    Sentinel(RedisSentinel),
    Cluster(RedisCluster),
}

/// How long a primary may be silent.
const DOWN_AFTER: Duration = Duration::from_secs(1);
/// A vote that nobody wins is repeated after seconds.
const PROMOTED_WITHIN: Duration = Duration::from_secs(30);
/// The part of a cluster that fails.
const SHARD: usize = 1;

// === impl Replicated ===

impl Replicated {
    pub async fn start(kind: Kind) -> Self {
        Self::start_with(kind, DOWN_AFTER).await
    }

    /// The same where no replica takes over.
    pub async fn start_patient(kind: Kind) -> Self {
        Self::start_with(kind, Duration::from_secs(60)).await
    }

    async fn start_with(kind: Kind, down_after: Duration) -> Self {
        match kind {
            Kind::Sentinel => Self::Sentinel(RedisSentinel::start(down_after).await),
            Kind::Cluster => Self::Cluster(RedisCluster::start_replicated(down_after).await),
        }
    }

    /// What the service is told.
    pub fn url(&self) -> String {
        match self {
            Self::Sentinel(sentinel) => sentinel.url(),
            Self::Cluster(cluster) => cluster.url(),
        }
    }

    /// Servers that hold groups at the moment.
    pub fn primaries(&self) -> &[RedisServer] {
        match self {
            Self::Sentinel(sentinel) => &sentinel.servers[..1],
            Self::Cluster(cluster) => &cluster.primaries,
        }
    }

    /// Lets a primary fail and come back, before a replica takes its place.
    pub async fn fail_for(&mut self, failure: Failure, length: Duration) {
        let failing = match self {
            Self::Sentinel(sentinel) => &mut sentinel.servers[0],
            Self::Cluster(cluster) => &mut cluster.primaries[SHARD],
        };
        fail(failing, failure);
        tokio::time::sleep(length).await;
        revive(failing, failure).await;
        match self {
            Self::Sentinel(sentinel) => sentinel.wait_until_ready().await,
            Self::Cluster(cluster) => cluster.wait_until_followed().await,
        }
    }

    /// Lets a primary fail, and waits until a replica has taken its place. When
    /// that was.
    pub async fn fail_over(&mut self, failure: Failure) -> Instant {
        self.find_primary().await;
        let (failing, candidates) = match self {
            Self::Sentinel(sentinel) => {
                let (primary, replicas) = sentinel.servers.split_first_mut().unwrap();
                (primary, replicas)
            }
            Self::Cluster(cluster) => (
                &mut cluster.primaries[SHARD],
                &mut cluster.replicas[SHARD..=SHARD],
            ),
        };
        fail(failing, failure);
        let bound = Bound::of(PROMOTED_WITHIN);
        loop {
            for candidate in candidates.iter_mut() {
                if is_primary(candidate).await {
                    let promoted = Instant::now();
                    std::mem::swap(failing, candidate);
                    return promoted;
                }
            }
            bound.assert_holds("a replica takes over");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The same after replicas have heard nothing of the primary for a while.
    pub async fn fail_over_behind(&mut self, failure: Failure, lag: Duration) -> Instant {
        // As somebody whom the primary does not know they cannot follow it.
        self.follow_as("nobody").await;
        tokio::time::sleep(lag).await;
        self.fail_over(failure).await
    }

    /// As whom each server logs in where it follows another one, from now on.
    async fn follow_as(&self, user: &str) {
        let servers = match self {
            Self::Sentinel(sentinel) => sentinel.servers.iter().collect(),
            Self::Cluster(cluster) => vec![&cluster.primaries[SHARD], &cluster.replicas[SHARD]],
        };
        let mut connections = Vec::new();
        for server in servers {
            let mut connection = server.connect().await;
            for setting in ["masteruser", "masterauth"] {
                let mut set = redis::cmd("CONFIG");
                set.arg("SET").arg(setting).arg(user);
                let () = set.query_async(&mut connection).await.unwrap();
            }
            connections.push(connection);
        }
        // Who is connected has logged in already.
        for connection in &mut connections {
            let mut end = redis::cmd("CLIENT");
            end.arg("KILL").arg("TYPE").arg("replica");
            let _: i64 = end.query_async(connection).await.unwrap();
        }
    }

    /// Moves some slots that hold groups from one primary of a cluster to another.
    pub async fn move_slots(&mut self) {
        const SLOTS: usize = 10;
        match self {
            Self::Cluster(cluster) => cluster.move_slots(SLOTS, 0, 2).await,
            Self::Sentinel(_) => unreachable!("there are no slots"),
        }
    }

    /// Lets the server that failed come back, and waits until all follow the
    /// primaries.
    pub async fn bring_back(&mut self, failure: Failure) {
        for fallen in self.fallen() {
            revive(fallen, failure).await;
        }
        self.follow_as("").await;
        match self {
            Self::Sentinel(sentinel) => {
                let primary = sentinel.servers[0].addr().port().to_string();
                for replica in &sentinel.servers[1..] {
                    // What sentinels write into the file of a server that has one,
                    // or tell it, only that takes ten seconds.
                    let mut follow = redis::cmd("REPLICAOF");
                    let follow = follow.arg("127.0.0.1").arg(&primary);
                    let _: redis::Value = follow
                        .query_async(&mut replica.connect().await)
                        .await
                        .unwrap();
                }
                sentinel.wait_until_ready().await;
                self.find_primary().await;
            }
            Self::Cluster(cluster) => cluster.wait_until_followed().await,
        }
    }

    /// On a busy machine sentinels may take a primary for dead that is not, and then it is
    /// another one than expected.
    async fn find_primary(&mut self) {
        if let Self::Sentinel(sentinel) = self {
            for index in 0..sentinel.servers.len() {
                if is_primary(&sentinel.servers[index]).await {
                    sentinel.servers.swap(0, index);
                    return;
                }
            }
        }
    }

    /// Of these one has failed.
    fn fallen(&mut self) -> &mut [RedisServer] {
        match self {
            Self::Sentinel(sentinel) => &mut sentinel.servers[1..],
            Self::Cluster(cluster) => &mut cluster.replicas[SHARD..=SHARD],
        }
    }
}

fn fail(server: &mut RedisServer, failure: Failure) {
    match failure {
        Failure::Kill => server.kill(),
        Failure::Hang => server.process().signal("STOP"),
    }
}

/// Does nothing to a server that is well.
async fn revive(server: &mut RedisServer, failure: Failure) {
    match failure {
        Failure::Kill if !server.is_running() => server.restart().await,
        Failure::Kill => {}
        Failure::Hang => server.process().signal("CONT"),
    }
}

// === impl Kind ===

impl Kind {
    /// `sentinel` or `cluster`, as an environment variable says; None if it is not
    /// set.
    pub fn of_environment(variable: &str) -> Option<Self> {
        match env::var(variable).ok()?.as_str() {
            "" => None,
            "sentinel" => Some(Self::Sentinel),
            "cluster" => Some(Self::Cluster),
            other => panic!("{variable}={other}: sentinel or cluster"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Sentinel => "sentinel",
            Self::Cluster => "cluster",
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kill => "kill",
            Self::Hang => "hang",
        })
    }
}
