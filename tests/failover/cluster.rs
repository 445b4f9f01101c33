//! A Redis Cluster, of which one part fails.

use std::time::Instant;

use common::{
    fault_proxy::Direction, redis_cluster::RedisCluster, redis_server::RedisServer, stalls::Bound,
};

use super::*;

/// More than enough for some of them to lie on every server.
const KEYS: usize = 30;

/// How long a node of these clusters may be silent until its replica takes over.
const NODE_TIMEOUT: Duration = Duration::from_millis(1_500);

/// How long the cluster needs for that: the timeout, to agree on it, to wait
/// for the best replica, and to vote.
const PROMOTED_WITHIN: Duration = Duration::from_secs(8);

/// A service on a cluster.
struct ClusterScene {
    cluster: RedisCluster,
    service: Service,
    client: Client,
}

impl ClusterScene {
    async fn new(cluster: RedisCluster) -> Self {
        let url = cluster.url();
        let settings = ["--redis-url", &url, "--on-recovery", "reconcile"];
        let service = Service::start(&settings);
        let scene = Self {
            client: service.client().await,
            service,
            cluster,
        };
        scene.wait_until_back(BACK_WITHIN).await;
        scene
    }

    /// Stores a group under each key, and says who has answered.
    async fn store_all(&mut self, fingerprints: &[&str]) -> Vec<i32> {
        let mut backends = Vec::new();
        for i in 0..KEYS {
            let stored = store(&mut self.client, &format!("k/{i}"), fingerprints).await;
            backends.push(stored.backend);
        }
        backends
    }

    /// Checks that each key holds these alerts, in Redis.
    async fn holds_all(&mut self, expected: &[&str]) {
        for i in 0..KEYS {
            let loaded = load(&mut self.client, &format!("k/{i}")).await.unwrap();
            assert_eq!(loaded.backend, REDIS, "k/{i}");
            assert_eq!(fingerprints(&loaded), expected, "k/{i}");
        }
    }

    async fn switch(&self) -> String {
        let health = self.service.health().await;
        health["switch"]["state"].as_str().unwrap().to_owned()
    }

    async fn wait_until_degraded(&self) {
        wait_until("degraded", BACK_WITHIN, async || {
            self.service.health().await["status"] == "degraded"
        })
        .await;
    }

    async fn wait_until_back(&self, bound: Duration) {
        wait_until("back on Redis", bound, async || {
            let health = self.service.health().await;
            health["switch"]["state"] == "closed" && health["mirror"]["dirty"] == 0
        })
        .await;
    }
}

/// The replica of the primary `index` has become a primary itself.
async fn wait_until_promoted(replica: &RedisServer) {
    let mut connection = replica.connect().await;
    let bound = Bound::of(PROMOTED_WITHIN);
    loop {
        let info = redis_command(&mut connection, &["INFO", "replication"]).await;
        let info: String = redis::from_redis_value(info).unwrap();
        if info.contains("role:master") {
            return;
        }
        bound.assert_holds("a replica takes over");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_primary_that_answers_ping_and_refuses_writes_keeps_it_open() {
    let mut scene = ClusterScene::new(RedisCluster::start().await).await;
    assert_eq!(scene.store_all(&["a"]).await, [REDIS; KEYS]);
    let mut primary = scene.cluster.primaries[2].connect().await;
    redis_command(&mut primary, &["CONFIG", "SET", "maxmemory", "1"]).await;
    scene.wait_until_degraded().await;
    assert_eq!(scene.store_all(&["b"]).await, [MEMORY; KEYS]);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(1_500) {
        assert_ne!(scene.switch().await, "closed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let reason = scene.service.health().await["switch"]["reason"].clone();
    assert!(reason.as_str().unwrap().contains("OOM"), "{reason}");
    redis_command(&mut primary, &["CONFIG", "SET", "maxmemory", "0"]).await;
    scene.wait_until_back(BACK_WITHIN).await;
    scene.holds_all(&["b"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_primary_that_hangs_and_wakes_up_is_used_again() {
    let mut scene = ClusterScene::new(RedisCluster::start().await).await;
    scene.store_all(&["a"]).await;
    scene.cluster.primaries[1].process().signal("STOP");
    scene.wait_until_degraded().await;
    assert_eq!(scene.store_all(&["b"]).await, [MEMORY; KEYS]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_ne!(scene.switch().await, "closed");
    scene.cluster.primaries[1].process().signal("CONT");
    scene.wait_until_back(BACK_WITHIN).await;
    scene.holds_all(&["b"]).await;
}

/// The part of the keys that was lost is given back, as of a single Redis.
#[tokio::test(flavor = "multi_thread")]
async fn one_primary_that_comes_back_empty_gets_its_groups_back() {
    let mut scene = ClusterScene::new(RedisCluster::start().await).await;
    scene.store_all(&["a"]).await;
    scene.cluster.primaries[0].restart().await;
    // A node of a cluster refuses everything in its first two seconds.
    wait_until("every group is there", PROMOTED_WITHIN, async || {
        let size = scene.client.clone().size(pb::SizeRequest::default()).await;
        size.is_ok_and(|size| {
            let size = size.into_inner();
            (size.backend, size.count) == (REDIS, KEYS as i64)
        })
    })
    .await;
    scene.holds_all(&["a"]).await;
}

async fn a_replica_takes_over(fail: impl FnOnce(&mut RedisCluster)) {
    let cluster = RedisCluster::start_replicated(NODE_TIMEOUT).await;
    let mut scene = ClusterScene::new(cluster).await;
    assert_eq!(scene.store_all(&["a"]).await, [REDIS; KEYS]);
    fail(&mut scene.cluster);
    scene.wait_until_degraded().await;
    assert_eq!(scene.store_all(&["b"]).await, [MEMORY; KEYS]);
    wait_until_promoted(&scene.cluster.replicas[1]).await;
    let promoted = Instant::now();
    scene.wait_until_back(BACK_WITHIN).await;
    println!("followed {:?} after the promotion", promoted.elapsed());
    scene.holds_all(&["b"]).await;
    assert_eq!(scene.store_all(&["c"]).await, [REDIS; KEYS]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_takes_over_from_a_dead_primary_is_followed() {
    a_replica_takes_over(|cluster| cluster.primaries[1].kill()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_takes_over_from_a_hung_primary_is_followed() {
    a_replica_takes_over(|cluster| cluster.primaries[1].process().signal("STOP")).await;
}

/// A slot moves while its groups are being written: first key by key (`ASK`),
/// then as a whole (`MOVED`).
/// The key by which the service knows what a server has lost goes along with its slot.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_moves_is_not_taken_for_a_loss() {
    let scene = ClusterScene::new(RedisCluster::start().await).await;
    let mut first = scene.cluster.primaries[0].connect().await;
    let keys = async |first: &mut MultiplexedConnection| {
        let keys = redis_command(first, &["KEYS", "group:*"]).await;
        redis::from_redis_value::<Vec<String>>(keys).unwrap()
    };
    // Nobody has stored a group: these are its own.
    let before = keys(&mut first).await;
    assert!(!before.is_empty());
    scene.cluster.move_slots(before.len(), 0, 2).await;
    wait_until(
        "another key is there",
        Duration::from_secs(15),
        async || {
            let now = keys(&mut first.clone()).await;
            !now.is_empty() && !now.iter().any(|key| before.contains(key))
        },
    )
    .await;
    let log = scene.service.log().join("\n");
    assert!(!log.contains("another process"), "{log}");
    assert!(!log.contains("lost data"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_moves_to_another_primary_loses_nothing() {
    const TAGGED_KEYS: usize = 20;
    let mut scene = ClusterScene::new(RedisCluster::start().await).await;
    let key = |i: usize| format!("k/{i}{{moves}}");
    let mut first = scene.cluster.primaries[0].connect().await;
    let slot = redis_command(&mut first, &["CLUSTER", "KEYSLOT", &key(0)]).await;
    let slot: u16 = redis::from_redis_value(slot).unwrap();
    let owner = RedisCluster::owner_of(slot);
    let (from, to) = (owner, (owner + 1) % 3);

    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut writers = Vec::new();
    let (writes_of, mut written) = tokio::sync::watch::channel([0; TAGGED_KEYS]);
    for i in 0..TAGGED_KEYS {
        let (mut client, stop) = (scene.client.clone(), stop.clone());
        let writes_of = writes_of.clone();
        let mut version = store(&mut client, &key(i), &["0"]).await.version;
        writers.push(tokio::spawn(async move {
            let mut writes = 0;
            while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                writes += 1;
                let alert = format!("{writes}");
                let swapped = swap(&mut client, &key(i), &[&alert], version).await;
                assert_eq!((swapped.backend, swapped.swapped), (REDIS, true), "{i}");
                version = swapped.version;
                writes_of.send_modify(|writes_of| writes_of[i] = writes);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            writes
        }));
    }
    // Some before the slot moves, and some after.
    let some = written.wait_for(|written| written.iter().all(|writes| *writes > 10));
    some.await.unwrap();
    let keys: Vec<_> = (0..TAGGED_KEYS)
        .map(|i| format!("group:{}", key(i)))
        .collect();
    scene.cluster.migrate(slot, from, to, &keys).await;
    let before = *written.borrow();
    let more = |(written, before): (&i32, &i32)| written - before > 10;
    let some = written.wait_for(|written| written.iter().zip(&before).all(more));
    some.await.unwrap();
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    for (i, writer) in writers.into_iter().enumerate() {
        let writes = writer.await.unwrap();
        let loaded = load(&mut scene.client, &key(i)).await.unwrap();
        assert_eq!(fingerprints(&loaded), [writes.to_string()]);
    }
    assert_eq!(scene.service.metric("storage_recovery_total").await, 0.0);
}

/// No call has met a server that sends it elsewhere, so nothing has told the service.
#[tokio::test(flavor = "multi_thread")]
async fn a_listing_of_an_idle_instance_is_complete_after_slots_have_moved() {
    let mut scene = ClusterScene::new(RedisCluster::start().await).await;
    assert_eq!(scene.store_all(&["a"]).await, [REDIS; KEYS]);
    // Its mirror is filled; from now on it does nothing.
    wait_until("it is idle", PROMOTED_WITHIN, async || {
        scene.service.health().await["status"] == "ok"
    })
    .await;
    scene.cluster.add_primary().await;
    let mut first = scene.cluster.primaries[0].connect().await;
    let mut moved = 0;
    for i in 0..KEYS {
        let key = format!("group:k/{i}");
        let slot = redis_command(&mut first, &["CLUSTER", "KEYSLOT", &key]).await;
        let slot: u16 = redis::from_redis_value(slot).unwrap();
        let from = RedisCluster::owner_of(slot);
        if i % 3 == 0 {
            scene.cluster.migrate(slot, from, 3, &[key]).await;
            moved += 1;
        }
    }
    assert!(moved >= KEYS / 3);
    let size = scene.client.size(pb::SizeRequest::default()).await;
    assert_eq!(size.unwrap().into_inner().count, KEYS as i64);
    let request = pb::LoadAllRequest::default();
    let mut all = scene.client.load_all(request).await.unwrap().into_inner();
    let (mut groups, mut complete) = (0, false);
    while let Some(batch) = all.message().await.unwrap() {
        groups += batch.groups.len();
        complete |= batch.summary.is_some_and(|summary| summary.complete);
    }
    assert_eq!((groups, complete), (KEYS, true));
}

/// Connections to it stay as they are, and are dead: nobody says so.
#[tokio::test(flavor = "multi_thread")]
async fn one_primary_that_was_out_of_reach_is_connected_to_anew() {
    let (cluster, proxies) = RedisCluster::start_behind_proxies().await;
    let mut scene = ClusterScene::new(cluster).await;
    assert_eq!(scene.store_all(&["a"]).await, [REDIS; KEYS]);
    proxies[1].swallow(Direction::Both);
    scene.wait_until_degraded().await;
    assert_eq!(scene.store_all(&["b"]).await, [MEMORY; KEYS]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    proxies[1].stop_swallowing();
    scene.wait_until_back(BACK_WITHIN).await;
    scene.holds_all(&["b"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_reach_servers_that_do_not_know_them() {
    let mut scene = ClusterScene::new(RedisCluster::start().await).await;
    assert_eq!(scene.store_all(&["a"]).await, [REDIS; KEYS]);
    for primary in &scene.cluster.primaries {
        redis_command(&mut primary.connect().await, &["SCRIPT", "FLUSH"]).await;
    }
    let groups = (0..KEYS).map(|i| group(&format!("k/{i}"), &["b"]));
    let request = pb::StoreAllRequest {
        groups: groups.collect(),
        expiry: None,
    };
    let stored = scene.client.store_all(request).await.unwrap().into_inner();
    for stored in stored.results {
        assert_eq!((stored.backend, stored.error), (REDIS, None));
    }
    scene.holds_all(&["b"]).await;

    // A server that was not there when the service started.
    scene.cluster.add_primary().await;
    let mut first = scene.cluster.primaries[0].connect().await;
    let slot = redis_command(&mut first, &["CLUSTER", "KEYSLOT", "group:k/0"]).await;
    let slot: u16 = redis::from_redis_value(slot).unwrap();
    let key = ["group:k/0".to_owned()];
    let from = RedisCluster::owner_of(slot);
    scene.cluster.migrate(slot, from, 3, &key).await;
    let backends = scene.store_all(&["c"]).await;
    assert_eq!(backends, [REDIS; KEYS], "{:#?}", scene.service.log());
    scene.holds_all(&["c"]).await;
    let mut last = scene.cluster.primaries[3].connect().await;
    let held = redis_command(&mut last, &["EXISTS", "group:k/0"]).await;
    assert_eq!(held, redis::Value::Int(1));
}
