//! Sentinels let a replica take the place of the primary.

use std::time::Instant;

use common::{
    redis_sentinel::{RedisSentinel, is_primary},
    stalls::Bound,
};
use futures::future::join_all;

use super::*;

/// More than a few, so that some change while a failover goes on.
const KEYS: usize = 20;

/// How long a primary of these tests may be silent until it gives way.
const DOWN_AFTER: Duration = Duration::from_secs(1);

/// How long the sentinels need for that: to notice, to agree, to elect one of
/// them, and to tell the replica. A vote that nobody wins is repeated after up to
/// twice the failover timeout.
const PROMOTED_WITHIN: Duration = Duration::from_secs(20);

/// How long it takes until the old primary, once it is back, is told that it is
/// one no more.
const DEMOTED_WITHIN: Duration = Duration::from_secs(20);

struct SentinelScene {
    redis: RedisSentinel,
    service: Service,
    client: Client,
}

impl SentinelScene {
    async fn new() -> Self {
        let redis = RedisSentinel::start(DOWN_AFTER).await;
        let url = redis.url();
        let service = Service::start(&["--redis-url", &url, "--on-recovery", "reconcile"]);
        let scene = Self {
            client: service.client().await,
            service,
            redis,
        };
        scene.wait_until_back().await;
        scene
    }

    /// Stores a group under each key, all at once, and says who has answered.
    async fn store_all(&self, fingerprints: &[&str]) -> Vec<i32> {
        let stores = (0..KEYS).map(|i| {
            let mut client = self.client.clone();
            async move { store(&mut client, &format!("k/{i}"), fingerprints).await }
        });
        let stored = join_all(stores).await;
        stored.into_iter().map(|stored| stored.backend).collect()
    }

    /// Checks that each key holds these alerts, in Redis.
    async fn holds_all(&mut self, expected: &[&str]) {
        for i in 0..KEYS {
            let loaded = load(&mut self.client, &format!("k/{i}")).await.unwrap();
            assert_eq!(loaded.backend, REDIS, "k/{i}");
            assert_eq!(fingerprints(&loaded), expected, "k/{i}");
        }
    }

    async fn wait_until_back(&self) {
        wait_until("back on Redis", BACK_WITHIN, async || {
            let health = self.service.health().await;
            health["switch"]["state"] == "closed" && health["mirror"]["dirty"] == 0
        })
        .await;
    }

    /// The primary fails and a replica takes its place, which is followed; then
    /// the old primary comes back, and is not.
    async fn gives_way_and_comes_back(
        &mut self,
        fail: impl FnOnce(&mut RedisSentinel),
        return_to: impl AsyncFnOnce(&mut RedisSentinel),
    ) {
        assert_eq!(self.store_all(&["a"]).await, [REDIS; KEYS]);
        fail(&mut self.redis);
        wait_until("degraded", BACK_WITHIN, async || {
            self.service.health().await["status"] == "degraded"
        })
        .await;
        assert_eq!(self.store_all(&["b"]).await, [MEMORY; KEYS]);
        self.redis.wait_until_promoted(0, PROMOTED_WITHIN).await;
        let promoted = Instant::now();
        self.wait_until_back().await;
        println!("followed {:?} after the promotion", promoted.elapsed());
        self.holds_all(&["b"]).await;

        return_to(&mut self.redis).await;
        let bound = Bound::of(DEMOTED_WITHIN);
        while is_primary(&self.redis.servers[0]).await {
            bound.assert_holds("the old primary is one no more");
            assert_eq!(self.store_all(&["c"]).await, [REDIS; KEYS]);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(self.store_all(&["d"]).await, [REDIS; KEYS]);
        self.holds_all(&["d"]).await;
        assert_eq!(self.service.metric("storage_recovery_total").await, 1.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_promoted_for_a_dead_primary_is_followed() {
    let mut scene = SentinelScene::new().await;
    scene
        .gives_way_and_comes_back(
            |redis| redis.servers[0].kill(),
            async |redis| redis.servers[0].restart().await,
        )
        .await;
}

/// With its machine, on which one of the sentinels runs as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_promoted_for_a_hung_primary_is_followed() {
    let mut scene = SentinelScene::new().await;
    let signal = |redis: &RedisSentinel, name: &str| {
        redis.sentinels[0].process().signal(name);
        redis.servers[0].process().signal(name);
    };
    scene
        .gives_way_and_comes_back(
            |redis| signal(redis, "STOP"),
            async |redis| signal(redis, "CONT"),
        )
        .await;
}

/// Nobody has failed, so nothing may be answered by memory for long.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_promoted_on_purpose_is_followed() {
    let mut scene = SentinelScene::new().await;
    assert_eq!(scene.store_all(&["a"]).await, [REDIS; KEYS]);
    scene.redis.sentinels[0].fail_over().await;
    scene.redis.wait_until_promoted(0, PROMOTED_WITHIN).await;
    let bound = Bound::of(DEMOTED_WITHIN);
    while is_primary(&scene.redis.servers[0]).await {
        bound.assert_holds("the old primary is one no more");
        scene.store_all(&["b"]).await;
    }
    scene.wait_until_back().await;
    assert_eq!(scene.store_all(&["c"]).await, [REDIS; KEYS]);
    scene.holds_all(&["c"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sentinels_that_do_not_know_the_primary_or_are_not_there_are_said() {
    let redis = RedisSentinel::start(DOWN_AFTER).await;
    let other = redis
        .url()
        .replace("ServiceName=groups", "ServiceName=other");
    let nowhere = format!(
        "redis-sentinel://{}?sentinelServiceName=groups",
        common::free_address()
    );
    for (url, reason) in [
        (&other, "No such master with that name"),
        (&nowhere, "Connection refused"),
    ] {
        let service = Service::start(&["--redis-url", url]);
        let health = service.health().await;
        assert_eq!(health["status"], "degraded");
        let said = health["switch"]["reason"].as_str().unwrap();
        assert!(
            said.contains("the sentinel at") && said.contains(reason),
            "{said}"
        );
    }
}
