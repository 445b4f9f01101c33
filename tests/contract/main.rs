//! The store contract, against every store.
//!
//! `suite.rs` holds what every store promises; a new store is a new line below.
//! The other files hold what only Redis can show: documents of other writers,
//! lost replies, restarts, what the scripts read of a document.

#[path = "../common/mod.rs"]
mod common;

mod documents;
mod listing;
mod lost_replies;
mod suite;
mod tails;

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use common::{
    redis_cluster::RedisCluster, redis_sentinel::RedisSentinel, redis_server::RedisServer,
    service::Service,
};
use groupstate::{
    domain::version::InstanceId,
    manager::remote::{RemoteSettings, RemoteStore},
    store::{
        GroupStore,
        documents::Documents,
        failover::{Failover, FailoverSettings, switch::OnRecovery},
        memory::MemoryStore,
        redis::{RedisFiles, RedisLimits, RedisSettings, RedisStore},
    },
};
use tokio::{sync::Mutex, time::Instant};

const MAX_DOCUMENT_BYTES: usize = 1 << 20;

/// What a call of the suite waits for Redis: so long that a busy machine is not
/// taken for a Redis that fails.
const PATIENCE: Duration = Duration::from_secs(3);

/// A memory store of 256 MiB.
async fn memory_store() -> (Arc<dyn GroupStore>, ()) {
    let instance = InstanceId::random();
    let store = MemoryStore::new(256 << 20, instance.clone());
    tokio::spawn(store.clone().sweep_forever());
    (
        Arc::new(Documents::new(store, MAX_DOCUMENT_BYTES, instance)),
        (),
    )
}

/// A Redis store on a Redis of its own.
async fn redis_store() -> (Arc<dyn GroupStore>, RedisServer) {
    let server = RedisServer::start().await;
    (store_at(&server.url(), PATIENCE).await, server)
}

/// A Redis store on a cluster, with keys of its own. A cluster takes seconds to
/// form, so tests that run at the same time share one.
async fn cluster_store() -> (Arc<dyn GroupStore>, Arc<RedisCluster>) {
    static SHARED: Mutex<Weak<RedisCluster>> = Mutex::const_new(Weak::new());
    static STORES: AtomicU32 = AtomicU32::new(0);

    let mut shared = SHARED.lock().await;
    let cluster = match shared.upgrade() {
        Some(cluster) => cluster,
        None => Arc::new(RedisCluster::start().await),
    };
    *shared = Arc::downgrade(&cluster);
    let prefix = format!("group:store {}:", STORES.fetch_add(1, Ordering::Relaxed));
    let store = store_of(&cluster.url(), &prefix, PATIENCE).await;
    (store, cluster)
}

/// A Redis store that asks sentinels, in the same way.
async fn sentinel_store() -> (Arc<dyn GroupStore>, Arc<RedisSentinel>) {
    static SHARED: Mutex<Weak<RedisSentinel>> = Mutex::const_new(Weak::new());
    static STORES: AtomicU32 = AtomicU32::new(0);

    let mut shared = SHARED.lock().await;
    let sentinel = match shared.upgrade() {
        Some(sentinel) => sentinel,
        // Nobody fails over because the machine is busy.
        None => Arc::new(RedisSentinel::start(Duration::from_secs(30)).await),
    };
    *shared = Arc::downgrade(&sentinel);
    let prefix = format!("group:store {}:", STORES.fetch_add(1, Ordering::Relaxed));
    let store = store_of(&sentinel.url(), &prefix, PATIENCE).await;
    (store, sentinel)
}

/// Redis with memory behind it, while Redis answers.
async fn failover_store() -> (Arc<dyn GroupStore>, RedisServer) {
    let server = RedisServer::start().await;
    let settings = settings(&server.url(), PATIENCE);
    let redis = RedisStore::open(&settings, "group:", MAX_DOCUMENT_BYTES).unwrap();
    let instance = InstanceId::random();
    let failover = Failover::open(
        redis,
        FailoverSettings {
            trip_after: 5 * PATIENCE,
            on_recovery: OnRecovery::Reconcile,
            mirror_max_bytes: 256 << 20,
        },
        instance.clone(),
    );
    let bound = Instant::now() + Duration::from_secs(5);
    assert!(failover.started(bound).await);
    (
        Arc::new(Documents::new(failover, MAX_DOCUMENT_BYTES, instance)),
        server,
    )
}

/// A service in a process of its own, through the client of the replicas.
async fn remote_store() -> (Arc<dyn GroupStore>, (RedisServer, Service)) {
    let server = RedisServer::start().await;
    let service = Service::start(
        &[
            &["--redis-url", &server.url()][..],
            // What the suite takes for the default, which is the server's to say.
            &["--default-ttl", "100s"],
            // PATIENCE, and that of the failover store.
            &["--redis-timeout", "3s", "--trip-after", "15s"],
        ]
        .concat(),
    );
    let settings = RemoteSettings {
        call_timeout: 4 * PATIENCE,
        ..RemoteSettings::default()
    };
    let store = RemoteStore::at(service.addr(), settings).unwrap();
    (Arc::new(store), (server, service))
}

/// A store on the Redis at `url`. Each is an instance of its own.
async fn store_at(url: &str, timeout: Duration) -> Arc<dyn GroupStore> {
    store_of(url, "group:", timeout).await
}

/// The same, whose keys begin with `prefix`.
async fn store_of(url: &str, prefix: &str, timeout: Duration) -> Arc<dyn GroupStore> {
    let settings = settings(url, timeout);
    let store = RedisStore::open(&settings, prefix, MAX_DOCUMENT_BYTES).unwrap();
    assert!(store.wait(Instant::now() + Duration::from_secs(5)).await);
    Arc::new(Documents::new(
        store,
        MAX_DOCUMENT_BYTES,
        InstanceId::random(),
    ))
}

fn settings(url: &str, timeout: Duration) -> RedisSettings {
    RedisSettings::new(
        url,
        RedisFiles::default(),
        RedisLimits {
            pool_size: 2,
            timeout,
            ..RedisLimits::default()
        },
    )
    .unwrap()
}

/// Runs the whole suite against each of some stores.
macro_rules! every_store_keeps_the_contract {
    ($($store:ident),*) => {$(
        mod $store {
            every_store_keeps_the_contract!(@tests $store:
                a_stored_group_is_loaded_as_it_was,
                the_last_write_wins_and_versions_rise,
                an_absent_group_is_none,
                create_only_does_not_overwrite,
                a_swap_replaces_only_the_expected_version,
                a_lost_race_gives_the_current_group,
                a_swap_of_an_absent_group_is_lost,
                delete_is_idempotent,
                delete_of_another_version_deletes_nothing,
                a_version_does_not_come_back_after_a_delete,
                a_version_does_not_come_back_after_an_expiry,
                a_group_expires,
                a_load_that_meets_a_create_or_a_delete_sees_the_group_or_none,
                keep_ttl_keeps_what_is_left,
                keep_ttl_of_a_new_group_is_the_default,
                a_group_called_index_is_a_group,
                strange_keys_are_ordinary_keys,
                a_prefix_is_taken_as_it_is,
                ten_thousand_keys_are_paged_while_others_are_written,
                a_foreign_page_token_is_refused,
                sixty_four_tasks_increment_one_group_and_lose_nothing,
                store_all_answers_each_group_in_order,
                a_group_that_is_too_large_is_refused,
                load_all_gives_every_group_once,
                load_all_of_nothing_is_complete,
            );
        }
    )*};
    (@tests $store:ident: $($test:ident),* $(,)?) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            let (store, _server) = super::$store().await;
            super::suite::$test(store).await;
        }
    )*};
}

every_store_keeps_the_contract!(
    memory_store,
    redis_store,
    cluster_store,
    sentinel_store,
    failover_store,
    remote_store
);
